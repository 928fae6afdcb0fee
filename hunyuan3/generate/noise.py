"""Starting noise, always from an explicit generator (spec 8.9).

* `comfy`: as ComfyUI prepares it: one CPU generator, float32, the whole batch in one draw. Same on every machine.
* `device`: one generator on the model's device, float32, the whole batch in one draw.
* `reference`: as the official pipeline: bfloat16 on the model's device, one generator per picture. Picture i of a
  batch uses seed + i (the official pipeline repeats one seed, which would draw the same picture again).
"""

from collections.abc import Sequence
from typing import Literal

import torch

NoiseSource = Literal["comfy", "device", "reference"]
NOISE_SOURCES: tuple[NoiseSource, ...] = ("comfy", "device", "reference")


def draw_noise(
    source: NoiseSource,
    seed: int,
    shape: tuple[int, int, int, int],
    device: torch.device,
    generators: Sequence[torch.Generator] | None = None,
) -> torch.Tensor:
    """Noise (B, C, h, w) float32 on `device`. `seed`: 0 <= seed < 2**64.

    `generators`: for "reference", one per picture where they were already drawn from, else made from the seed.
    """
    if source == "comfy":
        return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).to(device)
    if source == "device":
        return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    if source == "reference":
        # Drawn in bfloat16 itself: a float32 draw rounded afterwards gives other numbers for odd sizes.
        pictures = [
            torch.randn((1, *shape[1:]), generator=generator, device=device, dtype=torch.bfloat16)
            for generator in generators or reference_generators(seed, shape[0], device)
        ]
        return torch.cat(pictures).float()
    raise ValueError(f"noise is {source!r}; it must be one of {', '.join(NOISE_SOURCES)}.")


def reference_generators(seed: int, batch_size: int, device: torch.device) -> list[torch.Generator]:
    """One generator per picture, seeded seed, seed + 1, ... (wrapping at 2**64)."""
    return [torch.Generator(device).manual_seed((seed + i) % 2**64) for i in range(batch_size)]
