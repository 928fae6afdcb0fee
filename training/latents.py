"""Scenes and their latents, encoded once: what the transformer learns to draw."""

import random
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch

from hunyuan3.config import VAEConfig

from .draw import draw_array
from .flat_vae import FlatVAE
from .scene import Scene
from .vae import to_pixels
from .world import split_scene, stream

_BATCH = 32


@dataclass(frozen=True)
class Shard:
    """Scenes and, in the same order, their latents (C, h, w) as the transformer sees them: scaled, bfloat16."""

    scenes: tuple[Scene, ...]
    latents: tuple[torch.Tensor, ...]


def encode_shard(vae: FlatVAE, config: VAEConfig, seed: int, count: int) -> Shard:
    """`count` training scenes of a seed."""
    rng = stream("train", seed)
    scenes = tuple(training_scene(rng) for _ in range(count))
    return Shard(scenes, encode_scenes(vae, config, scenes))


def training_scene(rng: random.Random) -> Scene:
    """A scene of the training split."""
    return split_scene(rng, "train")


@torch.no_grad()
def encode_scenes(vae: FlatVAE, config: VAEConfig, scenes: tuple[Scene, ...]) -> tuple[torch.Tensor, ...]:
    """The latents of scenes of any formats: the posteriors' means, scaled."""
    order = sorted(range(len(scenes)), key=lambda index: (scenes[index].height, scenes[index].width))
    latents: dict[int, torch.Tensor] = {}
    for _, group in groupby(order, key=lambda index: (scenes[index].height, scenes[index].width)):
        while part := list(islice(group, _BATCH)):
            pixels = to_pixels(np.stack([draw_array(scenes[index]) for index in part]))
            mean, _ = vae.encode(pixels)
            latents |= zip(part, config.scale(mean).bfloat16(), strict=True)
    return tuple(latents[index].clone() for index in range(len(scenes)))


@torch.no_grad()
def scaling_of(vae: FlatVAE, seed: int, count: int = 256) -> tuple[float, float]:
    """(shift, scaling): the mean of all latent values of some scenes, and one over their deviation from it."""
    plain = encode_scenes(vae, vae.config, encode_shard(vae, vae.config, seed, count).scenes)
    values = torch.cat([latent.float().flatten() for latent in plain])
    return values.mean().item(), 1 / values.std().item()
