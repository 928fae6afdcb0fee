"""Stand-in for torchaudio: lets ComfyUI's core import where no matching build exists. Test bed only; does nothing."""

from . import functional, transforms

__all__ = ["functional", "transforms"]
