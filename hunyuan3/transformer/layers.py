"""Small layers of the transformer: RMS norm and the sinusoidal time embedder."""

import math

import torch
from torch import nn
from torch.nn import functional as F

SINUSOID_DIM = 256


class RMSNorm(nn.Module):
    """Root-mean-square norm: normalised in float32, cast back, and only then multiplied by the weight (spec 7.1)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size), in the wider of x's and the weight's dtype."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class TimestepEmbedder(nn.Module):
    """A time in 0..1000 (or a guidance value) as a vector: sinusoid, linear, exact GELU, linear (spec 8.1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(SINUSOID_DIM, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(B,) float32 -> (B, D) in the weights' dtype."""
        return self.fc2(F.gelu(self.fc1(sinusoid(t).to(self.fc1.weight.dtype))))


def sinusoid(t: torch.Tensor) -> torch.Tensor:
    """(B,) float32 -> (B, 256) float32: cosines of 128 falling frequencies, then their sines."""
    half = SINUSOID_DIM // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
