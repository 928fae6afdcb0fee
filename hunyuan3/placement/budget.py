"""What a plan is made from: sizes of the weights, what devices and host have, and what is to be done."""

from dataclasses import dataclass
from math import ceil

import torch

from ..config import ModelConfig
from ..errors import RequestError

PCIE4 = 25e9  # bytes per second that a PCIe 4.0 x16 link brings from pinned memory
PAGEABLE = 8e9  # from pageable memory, which goes through a pinned buffer
DISK = 3e9  # from a solid state drive that sustains it


@dataclass(frozen=True)
class LayerSizes:
    """Bytes of a layer: `dense` (attention, shared MLP, router, norms) and each of its routed experts."""

    dense: int
    expert: int


@dataclass(frozen=True)
class PartSizes:
    """Bytes of the weights in one format.

    experts: of each layer. rest: embeddings, text head, patch embedding, final layer, time embedders. head: the text
    head's share of it, all of which a token reads. experts_at_once: that are computed together when all of them are
    resident. scratch: bytes for reading one expert's stored weights back, 0 if they are computed with as they are.
    """

    layers: tuple[LayerSizes, ...]
    experts: int
    rest: int
    vae: int
    vision: int
    head: int = 0
    experts_at_once: int = 8
    scratch: int = 0

    @property
    def transformer(self) -> int:
        """Bytes of the whole transformer."""
        return self.rest + sum(layer.dense + self.experts * layer.expert for layer in self.layers)


@dataclass(frozen=True)
class Rate:
    """Units per second, and whether that was measured here or is an assumption."""

    value: float
    measured: bool = False

    def __str__(self) -> str:
        return "measured" if self.measured else "assumed"


@dataclass(frozen=True)
class DeviceBudget:
    """What a device has. A device called "cpu" computes in host memory: its bytes are the host budget's.

    nbytes: usable by us. link: bytes/s from pinned host memory. compute: FLOP/s that the model's matrix products
    really reach, not the peak. memory: bytes/s of the device's own memory.
    """

    name: str
    nbytes: int
    compute: Rate
    memory: Rate
    link: Rate = Rate(PCIE4)


@dataclass(frozen=True)
class HostBudget:
    """Host memory that may hold weights, and the rates (bytes/s) of what is not pinned. disk 0: may not be used."""

    pinned: int
    pageable: int
    pageable_rate: Rate = Rate(PAGEABLE)
    disk: Rate = Rate(DISK)


@dataclass(frozen=True)
class Workload:
    """What is to be drawn and written.

    rows: sequences per picture in one pass: 2 with guidance, 1 without, for a distilled model, or with the branches
    one after the other, which makes `passes` 2. prompt_tokens: everything before the picture (system prompt, request,
    what was thought), input pictures apart. new_tokens: of a text pass, at most.
    """

    width: int = 1024
    height: int = 1024
    batch: int = 1
    rows: int = 2
    passes: int = 1
    prompt_tokens: int = 1300
    new_tokens: int = 2048
    pictures: int = 0
    dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.batch, self.rows, self.passes) < 1:
            raise RequestError(f"A workload's sizes and counts must be at least 1: {self}.")
        if min(self.prompt_tokens, self.new_tokens, self.pictures) < 0:
            raise RequestError(f"A workload's numbers of tokens and pictures must not be negative: {self}.")

    def picture_tokens(self, config: ModelConfig) -> int:
        return ceil(self.width / config.vae_downsample) * ceil(self.height / config.vae_downsample)

    def window(self, config: ModelConfig) -> int:
        """Tokens per row that every step computes: the picture's, and the control tokens before it."""
        return self.picture_tokens(config) + 1 + config.cfg_distilled + config.use_meanflow

    def before(self, config: ModelConfig) -> int:
        """Tokens per row before them: text, and each input picture twice, as latents and as vision tokens."""
        side = config.image_base_size // config.vae_downsample
        return self.prompt_tokens + self.pictures * (side * side + config.vision.max_num_patches)
