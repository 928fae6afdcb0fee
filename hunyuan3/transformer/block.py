"""One transformer layer."""

import torch
from torch import nn

from ..config import ModelConfig
from ..moe.layer import MoELayer
from ..ops.attention import AttentionPlan
from .attention import SelfAttention
from .kv_cache import KVCache
from .layers import RMSNorm


class Block(nn.Module):
    """Pre-norm attention and mixture of experts, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoELayer(config.moe, layer, config.hidden_size)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan, cache: KVCache
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, plan, cache)
        return x + self.mlp(self.post_attention_layernorm(x))
