"""The values that travel on this package's own wires."""

from dataclasses import dataclass

from ..hunyuan3.pictures import EncodedPicture, PosteriorMode
from ..hunyuan3.pipeline import Hunyuan3
from ..hunyuan3.text.template import Message
from .compat import io
from .memory import PartPatcher

HunyuanModel = io.Custom("HUNYUAN3_MODEL")
HunyuanConditioning = io.Custom("HUNYUAN3_CONDITIONING")
HunyuanStepCache = io.Custom("HUNYUAN3_STEP_CACHE")
HunyuanImages = io.Custom("HUNYUAN3_IMAGES")
HunyuanConversation = io.Custom("HUNYUAN3_CONVERSATION")


@dataclass(frozen=True)
class ModelHandle:
    """One loaded checkpoint: the core's handle and a patcher per network, which ComfyUI's memory manager moves.

    Nothing else owns the weights: when the last handle goes, they go.
    """

    name: str
    model: Hunyuan3
    transformer: PartPatcher
    vae: PartPatcher
    vision: PartPatcher

    def get_ram_usage(self) -> int:
        """Bytes held, asked by ComfyUI's output cache under memory pressure."""
        return sum(part.loaded_size() for part in (self.transformer, self.vae, self.vision))


@dataclass(frozen=True)
class PictureSet:
    """Encoded input pictures. align: whether they were stretched. posterior: how their latents are drawn.

    checkpoint: fingerprint of the folder whose networks encoded them.
    """

    pictures: tuple[EncodedPicture, ...]
    align: bool
    posterior: PosteriorMode
    checkpoint: str


@dataclass(frozen=True)
class Conversation:
    """Earlier turns, and the pictures in them, in order. posterior: how the pictures' latents are drawn."""

    messages: tuple[Message, ...]
    pictures: tuple[EncodedPicture, ...]
    checkpoint: str
    posterior: PosteriorMode = "fixed"
