"""The one place that touches ComfyUI's versioned API: what differs between 0.3.75 and newer is settled here."""

import inspect
from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

__all__ = ["ComfyExtension", "io", "schema", "ui"]

_KNOWN_FIELDS = frozenset(inspect.signature(io.Schema).parameters)


def schema(**fields: Any) -> io.Schema:
    """`io.Schema` with the fields that this ComfyUI knows; newer, merely helpful ones are left out on older hosts.

    (An unknown field is a TypeError there, and one such error keeps the whole package from loading.)
    """
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN_FIELDS})
