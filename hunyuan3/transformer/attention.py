"""Grouped-query self-attention with rotation before the query and key norms (spec 7.2)."""

import torch
from einops import rearrange
from torch import nn

from ..config import ModelConfig
from ..ops.attention import AttendFn, AttentionPlan, attend_sdpa, span_attention
from ..ops.rope import apply_rope
from .kv_cache import KVCache
from .layers import RMSNorm


class SelfAttention(nn.Module):
    """The rows of `qkv_proj` are grouped by key head: its G query heads, then the key head, then the value head."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.kv_heads = config.num_kv_heads
        self.groups = config.num_heads // config.num_kv_heads
        width = config.num_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width + 2 * config.num_kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attend: AttendFn = attend_sdpa

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan, cache: KVCache
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D) for the T positions of `plan`; their keys and values go into the cache.

        1. project to queries, keys, values
        2. rotate, then normalise queries and keys, in float32 throughout, then cast once
        3. store keys and values
        4. attend over everything up to here
        5. project back
        """
        q, k, v = self.project(x, rope)
        k, v = cache.write(self.layer, plan[0].start, k, v)
        return self.o_proj(span_attention(q, k, v, plan, self.attend))

    def project(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, D) -> queries (B, Hq, T, d), keys and values (B, Hk, T, d); the first two rotated and normalised."""
        qkv = rearrange(self.qkv_proj(x), "b t (h s d) -> b h s t d", h=self.kv_heads, s=self.groups + 2)
        q, k, v = qkv[:, :, : self.groups].flatten(1, 2), qkv[:, :, self.groups], qkv[:, :, self.groups + 1]
        q = self.query_layernorm(apply_rope(q, *rope)).to(v.dtype)
        k = self.key_layernorm(apply_rope(k, *rope)).to(v.dtype)
        return q, k, v
