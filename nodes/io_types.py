"""The values that travel on this package's own wires."""

from dataclasses import dataclass

from ..hunyuan3.pipeline import Hunyuan3
from .compat import io
from .memory import PartPatcher

HunyuanModel = io.Custom("HUNYUAN3_MODEL")
HunyuanConditioning = io.Custom("HUNYUAN3_CONDITIONING")
HunyuanStepCache = io.Custom("HUNYUAN3_STEP_CACHE")


@dataclass(frozen=True)
class ModelHandle:
    """One loaded checkpoint: the core's handle and a patcher per network, which ComfyUI's memory manager moves.

    Nothing else owns the weights: when the last handle goes, they go.
    """

    name: str
    model: Hunyuan3
    transformer: PartPatcher
    vae: PartPatcher

    def get_ram_usage(self) -> int:
        """Bytes held, asked by ComfyUI's output cache under memory pressure."""
        return self.transformer.loaded_size() + self.vae.loaded_size()
