"""The one place that touches ComfyUI's versioned API: what differs between 0.3.75 and newer is settled here."""

import inspect
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import ComfyExtension, io

from ..hunyuan3.errors import RequestError

__all__ = ["ComfyExtension", "io", "require_choice", "schema"]

_KNOWN_FIELDS = frozenset(inspect.signature(io.Schema).parameters)


def schema(**fields: Any) -> io.Schema:
    """`io.Schema` with the fields that this ComfyUI knows; newer, merely helpful ones are left out on older hosts.

    (An unknown field is a TypeError there, and one such error keeps the whole package from loading.)
    """
    return io.Schema(**{name: value for name, value in fields.items() if name in _KNOWN_FIELDS})


def require_choice(name: str, value: str, options: Sequence[str]) -> None:
    """Raises RequestError unless `value` is among the options.

    ComfyUI 0.3.75 does not check the choices of these nodes when a prompt comes through the HTTP API.
    """
    if value not in options:
        raise RequestError(f"{name} is {value!r}; it must be one of {', '.join(options)}.")
