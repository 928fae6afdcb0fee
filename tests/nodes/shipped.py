"""The shipped workflow files, and what a ComfyUI must have for them to run as they are."""

from __future__ import annotations

import json
from typing import Any

from hunyuan3.tiny import make_tiny
from tools.comfy_server import MODELS, ComfyServer
from tools.workflows import FOLDER, VARIANTS, WORKFLOWS

NAMES = [build.__name__ for build in WORKFLOWS]


def for_page(name: str) -> dict[str, Any]:
    """Return a workflow in the page's format."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def for_api(name: str) -> dict[str, Any]:
    """Return a workflow in the API format."""
    return json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def place_checkpoints(server: ComfyServer) -> None:
    """Put a tiny checkpoint into the server's models folder under each published name, where there is none yet."""
    for name, variant in VARIANTS.items():
        folder = server.base / "models" / MODELS / name
        if not folder.exists():
            make_tiny(folder, variant)
