"""Latent pixels <-> transformer tokens, one token per latent pixel, modulated by time (spec 8.2 - 8.4).

Norms run in float32 and convolutions in the weights' dtype, as the reference's autocast has it; in a float32 run all
of this is the identity.
"""

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ..types import Grid

_GROUPS = 32
_EPS = 1e-5


class PatchEmbed(nn.Module):
    """Latents -> tokens."""

    def __init__(self, latent_channels: int, width: int, hidden_size: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, width, 3, padding=1)
        self.block = TimeResBlock(width, hidden_size, hidden_size)

    def forward(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) and time embedding (B or 1, D) -> (B, h * w, D)."""
        x = _conv(self.conv_in, latents)
        return rearrange(self.block(x, time), "b d h w -> b (h w) d")


class FinalLayer(nn.Module):
    """Tokens -> velocity in latent space. Takes the raw residual stream: no norm comes before it."""

    def __init__(self, hidden_size: int, width: int, latent_channels: int) -> None:
        super().__init__()
        self.block = TimeResBlock(hidden_size, width, hidden_size)
        self.norm_out = nn.GroupNorm(_GROUPS, width, eps=_EPS)
        self.conv_out = nn.Conv2d(width, latent_channels, 3, padding=1)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, h * w, D) and time embedding (B or 1, D) -> (B, C, h, w)."""
        x = rearrange(tokens, "b (h w) d -> b d h w", h=grid.height, w=grid.width)
        return _conv(self.conv_out, F.silu(_norm(self.norm_out, self.block(x, time))))


class TimeResBlock(nn.Module):
    """Residual block of two 3x3 convolutions whose middle norm is scaled and shifted by the time embedding."""

    def __init__(self, in_channels: int, out_channels: int, time_size: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(_GROUPS, in_channels, eps=_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(time_size, 2 * out_channels)
        self.norm2 = nn.GroupNorm(_GROUPS, out_channels, eps=_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(B, Cin, h, w), (B or 1, D) -> (B, Cout, h, w).

        1. norm, SiLU, convolution
        2. norm, scaled and shifted by time, SiLU, convolution
        3. plus the input through a 1x1 convolution
        """
        h = _conv(self.conv1, F.silu(_norm(self.norm1, x)))
        scale, shift = rearrange(self.modulation(F.silu(time)), "b (two c) -> two b c 1 1", two=2)
        h = _norm(self.norm2, h) * (1 + scale) + shift
        h = _conv(self.conv2, F.silu(h))
        return _conv(self.skip, x) + h


def _conv(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return conv(x.to(conv.weight.dtype))


def _norm(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
