"""Hunyuan Image 3 for ComfyUI: where ComfyUI finds the nodes.

`nodes` is imported inside the entry point, not here: it needs ComfyUI, and this file is also imported by tools (pytest
among them) that run without one. There is no NODE_CLASS_MAPPINGS on purpose: ComfyUI would take it and never call
`comfy_entrypoint`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

WEB_DIRECTORY = "./js"


async def comfy_entrypoint() -> ComfyExtension:
    """Return the extension that lists our nodes. ComfyUI calls this once, while it loads the package."""
    try:
        from .nodes import Hunyuan3Extension
    except Exception:
        # ComfyUI logs only the message of what is raised here; the traceback says which file and line.
        logging.getLogger(__name__).exception("Hunyuan Image 3: the nodes could not be loaded")
        raise
    return Hunyuan3Extension()
