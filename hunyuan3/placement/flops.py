"""Floating-point operations of a denoise step, from the configuration alone."""

from dataclasses import dataclass

from ..config import ModelConfig
from .budget import Workload


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one denoise step.

    linear: of each layer's matrix products. attention: of each layer's. ends: patch embedding and final layer.
    """

    linear: tuple[float, ...]
    attention: tuple[float, ...]
    ends: float

    @property
    def total(self) -> float:
        return sum(self.linear) + sum(self.attention) + self.ends


def step_flops(config: ModelConfig, work: Workload) -> StepFlops:
    """Of a denoise step after the first: 2 per weight and token in matrix products, 4 per query, key and channel.

    The first step computes the prompt as well.
    """
    sequences = work.batch * work.rows * work.passes
    window = work.window(config)
    tokens = sequences * window
    context = work.before(config) + window
    queries = config.num_heads * config.head_dim
    size, moe = config.hidden_size, config.moe
    linear, attention = [], []
    for top_k, inner, shared in zip(moe.top_k, moe.intermediate_size, moe.num_shared_experts, strict=True):
        projections = size * (2 * queries + 2 * config.num_kv_heads * config.head_dim)
        active = projections + size * moe.num_experts + 3 * size * inner * (top_k + shared)
        linear.append(2.0 * tokens * active)
        attention.append(4.0 * tokens * context * queries)
    width, channels = config.patch_embed_hidden_dim, config.vae.latent_channels
    embed = 9 * (channels * width + width * size + size * size) + width * size
    final = 9 * (size * width + width * width + width * channels) + size * width
    pixels = work.batch * work.picture_tokens(config)
    ends = 2.0 * pixels * (embed * work.passes + final * work.rows * work.passes)
    return StepFlops(tuple(linear), tuple(attention), ends)
