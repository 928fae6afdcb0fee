"""Stand-in for torchvision: lets ComfyUI's core import where no matching build exists. Test bed only; does nothing."""

from . import transforms

__all__ = ["transforms"]
