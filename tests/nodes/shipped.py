"""The shipped workflow files, and what a ComfyUI must have for them to run as they are."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

from hunyuan3.tiny import make_tiny
from tools.comfy_server import MODELS, ComfyServer
from tools.workflows import EXAMPLE, FOLDER, VARIANTS, WORKFLOWS

NAMES = [build.__name__ for build in WORKFLOWS]


def for_page(name: str) -> dict[str, Any]:
    """Return a workflow in the page's format."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def for_api(name: str) -> dict[str, Any]:
    """Return a workflow in the API format."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def furnish(server: ComfyServer) -> None:
    """Give the server what the workflows name: a tiny checkpoint under each published name, and ComfyUI's picture."""
    for name, variant in VARIANTS.items():
        folder = server.base / "models" / MODELS / name
        if not folder.exists():
            make_tiny(folder, variant)
    Image.radial_gradient("L").resize((160, 120)).convert("RGB").save(server.base / "input" / EXAMPLE)
