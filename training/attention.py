"""An attention backend for training on a CPU: plain products, whose gradients are plain products as well.

PyTorch's fused kernel computes a gradient of short bfloat16 sequences three times as slowly.
"""

import torch
from einops import rearrange


def attend_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """An `ops.attention.AttendFn`; the weights are those of `attend_math`, rounded to the values' dtype."""
    kv_heads, groups = k.shape[1], q.shape[1] // k.shape[1]
    folded = rearrange(q * q.shape[-1] ** -0.5, "b (h g) t d -> (b h) (g t) d", g=groups)
    scores = torch.bmm(folded, k.flatten(0, 1).transpose(1, 2))  # (B Hk, G T, S)
    if causal:
        queries, keys = q.shape[2], k.shape[2]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries).logical_not()
        scores = scores.masked_fill(hidden.repeat(groups, 1), float("-inf"))
    out = torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1))
    return rearrange(out, "(b h) (g t) d -> b (h g) t d", h=kv_heads, g=groups)
