"""What was used, in the PNG files that ComfyUI writes."""

from typing import Any

KEY = "hunyuan3"


def note_in_png(extra_pnginfo: dict[str, Any] | None, node_id: str | None, used: dict[str, Any]) -> None:
    """Adds what a node used to what ComfyUI writes into PNG files, under "hunyuan3", by node.

    The page always sends that dictionary; a client of the HTTP API that sends none gets what ComfyUI writes.
    """
    if extra_pnginfo is not None:
        extra_pnginfo.setdefault(KEY, {})[str(node_id)] = used
