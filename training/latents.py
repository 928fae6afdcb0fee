"""Scenes as latents, encoded once: what the transformer learns to draw."""

from collections.abc import Sequence
from itertools import groupby, islice

import numpy as np
import torch

from hunyuan3.config import VAEConfig

from .draw import draw_array
from .flat_vae import FlatVAE
from .scene import Scene
from .vae import to_pixels
from .world import scenes

_BATCH = 32


@torch.no_grad()
def encode_scenes(vae: FlatVAE, config: VAEConfig, shown: Sequence[Scene]) -> tuple[torch.Tensor, ...]:
    """The latents (C, h, w) of scenes of any formats, as the transformer sees them: means, scaled, in bfloat16."""
    order = sorted(range(len(shown)), key=lambda index: (shown[index].height, shown[index].width))
    latents: dict[int, torch.Tensor] = {}
    for _, group in groupby(order, key=lambda index: (shown[index].height, shown[index].width)):
        while part := list(islice(group, _BATCH)):
            pixels = to_pixels(np.stack([draw_array(shown[index]) for index in part]))
            mean, _ = vae.encode(pixels)
            latents |= zip(part, config.scale(mean).bfloat16(), strict=True)
    return tuple(latents[index].clone() for index in range(len(shown)))


@torch.no_grad()
def scaling_of(vae: FlatVAE, seed: int, count: int = 256) -> tuple[float, float]:
    """(shift, scaling): the mean of all latent values of some scenes, and one over their deviation from it."""
    plain = encode_scenes(vae, vae.config, tuple(islice(scenes("train", seed), count)))
    values = torch.cat([latent.float().flatten() for latent in plain])
    return values.mean().item(), 1 / values.std().item()
