"""First stage: the VAE, trained on scenes as a flat network (see `flat_vae`)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch.nn import functional as F

from hunyuan3.config import VAEConfig

from .draw import draw_array
from .flat_vae import FlatVAE
from .optimiser import Optimiser, OptimiserConfig, cosine
from .scene import Scene
from .world import scenes

TINY_VAE = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=16,
    block_out_channels=(64,) * 5,
    layers_per_block=0,
    ffactor_spatial=16,
    ffactor_temporal=1,
    sample_size=256,
    scaling_factor=1.0,
)


@dataclass(frozen=True)
class VAEStageConfig:
    """Lengths and weights of the stage.

    Attributes:
        steps: of the whole stage; the schedule of rates is laid over them.
        crop_share: share of the steps that see crops of `crop` pixels; the others see whole pictures, of one format
            per step.
        crops, wholes: pictures per step in either part.
        edges: how much more a pixel on a full edge counts than one inside a plain area.
        kl: weight of the Kullback-Leibler divergence, per latent value.
        whiten: weight of the penalty on each channel's mean and log deviation, so that one scaling number serves all.
    """

    vae: VAEConfig = TINY_VAE
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(rate=2e-3, muon_rate=2e-3, betas=(0.9, 0.99), decay=0.0, ema=0.998)
    )
    steps: int = 2600
    warmup: int = 100
    crop_share: float = 0.6
    crop: int = 64
    crops: int = 16
    wholes: int = 6
    edges: float = 4.0
    kl: float = 1e-3
    whiten: float = 0.1
    seed: int = 0


class VAEStage:
    """Trains; `step` is the whole story. A step's data and noise depend on its number alone."""

    name = "vae"
    measures = ("loss", "psnr", "kl", "whiteness", "norm")

    def __init__(self, config: VAEStageConfig, compute: torch.dtype = torch.bfloat16) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.vae = FlatVAE(config.vae, compute)
        parameters = dict(self.vae.named_parameters())
        matrices = [name for name, p in parameters.items() if p.ndim == 4 and p.shape[0] > 3 and p.shape[1] > 3]
        self.optimiser = Optimiser(parameters, matrices, config.optimiser)
        self.done = 0

    def step(self) -> dict[str, float]:
        """One update; returns what the log records."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.done)
        pixels = to_pixels(self._pictures(generator))
        mean, logvar = self.vae.encode(pixels)
        noise = torch.randn(mean.shape, generator=generator)
        restored = self.vae.decode(mean + torch.exp(0.5 * logvar) * noise)
        difference = restored - pixels
        weight = 1 + config.edges * edges(pixels)
        pixel_loss = (weight * (difference.abs() + difference.square())).mean() / weight.mean()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        centre, deviation = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
        whiteness = (centre.square() + deviation.clamp(min=1e-4).log().square()).mean()
        loss = pixel_loss + config.kl * divergence + config.whiten * whiteness
        loss.backward()
        norm = self.optimiser.step(cosine(self.done, config.steps, config.warmup))
        self.done += 1
        error = difference.detach().square().mean().item()
        return {
            "loss": loss.item(),
            "psnr": psnr(error),
            "kl": divergence.item(),
            "whiteness": whiteness.item(),
            "norm": norm,
        }

    def state(self) -> dict[str, object]:
        return {"done": self.done, "optimiser": self.optimiser.state()}

    def restore(self, state: dict[str, object]) -> None:
        self.done = int(state["done"])
        self.optimiser.restore(state["optimiser"])

    def _pictures(self, generator: torch.Generator) -> np.ndarray:
        """This step's pictures, uint8 (B, H, W, 3)."""
        config = self.config
        source = scenes("train", config.seed * 1_000_003 + self.done)
        if self.done >= config.crop_share * config.steps:
            return np.stack([draw_array(scene) for scene in _of_one_format(source, config.wholes)])
        corners = torch.rand(config.crops, 2, generator=generator).tolist()
        return np.stack([_crop(draw_array(next(source)), config.crop, *corner) for corner in corners])


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(pixels: torch.Tensor) -> torch.Tensor:
    """How much the colour changes within 2 pixels: (B, 1, H, W) in 0..1, the largest range of a channel there."""
    largest = F.max_pool2d(pixels, 5, stride=1, padding=2)
    smallest = -F.max_pool2d(-pixels, 5, stride=1, padding=2)
    return ((largest - smallest) / 2).amax(dim=1, keepdim=True)


def psnr(mean_square: float) -> float:
    """Peak signal-to-noise ratio in decibels of a mean square error of values in [-1, 1]."""
    return float(10 * np.log10(4 / max(mean_square, 1e-12)))


def _of_one_format(source: Iterator[Scene], count: int) -> list[Scene]:
    first = next(source)
    same = (scene for scene in source if (scene.height, scene.width) == (first.height, first.width))
    return [first, *islice(same, count - 1)]


def _crop(picture: np.ndarray, side: int, down: float, across: float) -> np.ndarray:
    """A square of `side` pixels whose corner lies on the latent grid, as it does in a whole picture."""
    top = int(down * ((picture.shape[0] - side) // 16 + 1)) * 16
    left = int(across * ((picture.shape[1] - side) // 16 + 1)) * 16
    return picture[top : top + side, left : left + side]
