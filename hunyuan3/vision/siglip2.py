"""SigLIP2 NaFlex vision tower: patches of a picture of any shape -> features (spec 10).

Our own small module instead of a library's: the reference's precision (norms in float32 feeding bfloat16 linears) is
written out here as everywhere in this package, and it does not move with the library's versions.

B pictures, P patch slots (padded to `max_num_patches`), W width.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ..config import VisionConfig
from ..types import Grid


class VisionTower(nn.Module):
    """Patch embedding with a resized position grid, pre-norm encoder, final norm. The pooling head is not built."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.patch_embedding = nn.Linear(config.num_channels * config.patch_size**2, width)
        self.position_embedding = nn.Embedding(config.num_positions, width)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, patches: torch.Tensor, mask: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Patches (B, P, 3 * patch * patch), mask (B, P) of real ones, their grids -> features (B, P, W).

        1. embed patches, add the position grid resized to each picture's shape
        2. encoder; every slot attends to the real patches only, padding slots produce values, too
        3. final norm
        """
        x = self.embed(patches, grids)
        keys = mask.bool()[:, None, None, :]  # (B, 1, 1, P)
        for layer in self.layers:
            x = layer(x, keys)
        return _norm(self.post_layernorm, x).to(x.dtype)

    def embed(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """(B, P, 3 * patch * patch) -> (B, P, W)."""
        x = _linear(self.patch_embedding, patches)
        positions = torch.stack([self._positions(grid, patches.shape[1]) for grid in grids])
        return x + positions.to(x.dtype)

    def _positions(self, grid: Grid, slots: int) -> torch.Tensor:
        """The square grid resized to `grid`, row by row; the padding slots take the value of the first. (P, W)."""
        side = int(self.position_embedding.num_embeddings**0.5)
        square = rearrange(self.position_embedding.weight, "(h w) c -> 1 c h w", h=side)
        # The CPU has no antialiased resize in the half formats.
        square = square.float() if square.device.type == "cpu" else square
        resized = F.interpolate(square, size=tuple(grid), mode="bilinear", align_corners=False, antialias=True)
        rows = rearrange(resized, "1 c h w -> (h w) c")
        return torch.cat((rows, rows[:1].expand(slots - len(rows), -1)))


class VisionLayer(nn.Module):
    """Pre-norm self-attention and MLP, each added to the stream."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)

    def forward(self, x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, P, W) and the mask of keys (B, 1, 1, P) -> (B, P, W)."""
        h = _norm(self.layer_norm1, x)
        q, k, v = (
            rearrange(_linear(projection, h), "b p (n d) -> b n p d", n=self.num_heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=keys), "b n p d -> b p (n d)")
        x = x + self.out_proj(attended)
        h = F.gelu(_linear(self.fc1, _norm(self.layer_norm2, x)), approximate="tanh")
        return x + self.fc2(h)


class VisionAligner(nn.Module):
    """Vision features -> transformer width, padding slots included (spec 10.3)."""

    def __init__(self, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, P, W) -> (B, P, D)."""
        return self.fc2(F.gelu(_linear(self.fc1, features)))


class Vision(nn.Module):
    """Tower and aligner: a picture's patches as tokens of the transformer."""

    def __init__(self, config: VisionConfig, hidden_size: int) -> None:
        super().__init__()
        self.tower = VisionTower(config)
        self.aligner = VisionAligner(config.hidden_size, hidden_size)

    @torch.no_grad()
    def forward(self, patches: torch.Tensor, mask: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Patches (B, P, 3 * patch * patch), mask (B, P), grids -> tokens (B, P, D)."""
        return self.aligner(self.tower(patches, mask, grids))


def _norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)


def _linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x.to(linear.weight.dtype))
