"""Small preview pictures from latents: one linear map from latent channels to red, green, blue.

The map is fitted to the VAE at hand by least squares: a few dozen procedural pictures are encoded, and each latent
pixel is paired with the mean colour of the 16 x 16 pixels that it stands for.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import reduce

from ..callbacks import CheckCancelled, never_cancelled
from .autoencoder import AutoencoderKLConv3D

_PICTURES = 32
_SIDE = 64
_RIDGE = 1e-3


@dataclass(frozen=True)
class PreviewFactors:
    """rgb = latent @ weight + bias, in [-1, 1]; latent unscaled. weight (C, 3), bias (3,), float32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def picture(self, latent: torch.Tensor) -> torch.Tensor:
        """Unscaled latent (C, h, w) -> picture (h, w, 3) in [-1, 1], on the latent's device."""
        weight, bias = self.weight.to(latent.device), self.bias.to(latent.device)
        return (latent.float().permute(1, 2, 0) @ weight + bias).clamp(-1, 1)


@torch.no_grad()
def fit_preview(vae: AutoencoderKLConv3D, check_cancelled: CheckCancelled = never_cancelled) -> PreviewFactors:
    """Fits the factors of a loaded VAE: 32 pictures of 64 x 64 pixels are encoded."""
    weight = next(vae.parameters())
    factor = vae.config.ffactor_spatial
    latents, colours = [], []
    for picture in _pictures():
        check_cancelled()
        mean = vae.encode(picture[None].to(weight.device), check_cancelled=check_cancelled).mean.float().cpu()
        latents.append(mean[0].flatten(1).T)
        colours.append(reduce(picture, "c (h fh) (w fw) -> (h w) c", "mean", fh=factor, fw=factor))
    x = torch.cat(latents).double()
    x = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1)  # the last column fits the bias
    gram = x.T @ x
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=x.dtype)
    solution = torch.linalg.solve(gram + ridge, x.T @ torch.cat(colours).double()).float()
    return PreviewFactors(solution[:-1], solution[-1])


def _pictures() -> Iterator[torch.Tensor]:
    """Procedural pictures (3, side, side) in [-1, 1]: plain colours, gradients, waves and blocks of seeded colours."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, _SIDE), torch.linspace(-1, 1, _SIDE), indexing="ij")
    for index in range(_PICTURES):
        first, second = torch.rand(2, 3, 1, 1, generator=generator) * 2 - 1
        angle, wave = torch.rand(2, generator=generator).tolist()
        along = x * math.cos(2 * math.pi * angle) + y * math.sin(2 * math.pi * angle)
        kind = index % 4
        if kind == 0:
            blend = torch.zeros_like(x)
        elif kind == 1:
            blend = (along + 1) / 2
        elif kind == 2:
            blend = (torch.sin(along * math.pi * (1 + 5 * wave)) + 1) / 2
        else:
            blend = torch.rand(4, 4, generator=generator).repeat_interleave(16, 0).repeat_interleave(16, 1)
        yield (first + (second - first) * blend).clamp(-1, 1)
