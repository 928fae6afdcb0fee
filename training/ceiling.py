"""The best score that a VAE allows: true scenes, encoded and decoded, looked at by the detector."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby, islice

import numpy as np
import torch

from .detect import detect
from .draw import draw_array
from .flat_vae import FlatVAE
from .marks import Marks, average, score_scene
from .vae import TINY_VAE, to_pixels
from .wanted import Wanted
from .world import scenes

# uint8 pictures [count, height, width, 3] -> the same after a round trip.
EncodeDecode = Callable[[np.ndarray], np.ndarray]
_BATCH = 32
_CEILINGS = {"one-object": 1, "two-object": 2, "three-object": 3}
_GATE = {"one-object": 0.97, "two-object": 0.95}  # what the VAE must reach before the transformer is worth training


def ceiling(encode_decode: EncodeDecode, count: int, objects: int | None = None, seed: int = 1) -> Marks:
    """Mean marks of `count` held-out scenes of `objects` objects (1 to 3; None: mixed) after a round trip.

    The scenes are those of the seed; pictures of one size go through together, at most 32 of them.
    """
    shown = sorted(islice(scenes("held-out", seed, objects), count), key=lambda scene: (scene.height, scene.width))
    marks = []
    for _, group in groupby(shown, key=lambda scene: (scene.height, scene.width)):
        alike = list(group)
        for start in range(0, len(alike), _BATCH):
            part = alike[start : start + _BATCH]
            pictures = encode_decode(np.stack([draw_array(scene) for scene in part]))
            marks += [score_scene(detect(p), Wanted.whole(s)) for p, s in zip(pictures, part, strict=True)]
    return average(marks)


@dataclass(frozen=True)
class Gate:
    """The ceilings of `count` scenes each of one, two and three objects."""

    count: int
    marks: Mapping[str, Marks]

    @property
    def reached(self) -> bool:
        """Whether a transformer is worth training."""
        return all(self.marks[name].all >= least for name, least in _GATE.items())

    @property
    def line(self) -> str:
        """All of it, as the model card says it."""
        shares = [f"{name} {mark.all:.3f} (shape {mark.shape:.3f})" for name, mark in self.marks.items()]
        verdict = "reaches" if self.reached else "misses"
        return f"ceiling: {' '.join(shares)}, {self.count} scenes each, {verdict} the gate"


def gate(encode_decode: EncodeDecode, count: int) -> Gate:
    """Measures the ceilings."""
    return Gate(count, {name: ceiling(encode_decode, count, objects) for name, objects in _CEILINGS.items()})


def flat_round_trip(state: Mapping[str, torch.Tensor]) -> EncodeDecode:
    """A `FlatVAE`'s weights -> pictures through it and back, in the bfloat16 that they were trained in."""
    vae = FlatVAE(TINY_VAE, torch.bfloat16).requires_grad_(False)
    vae.load_state_dict({name: tensor.to(torch.bfloat16).float() for name, tensor in state.items()})

    def encode_decode(pictures: np.ndarray) -> np.ndarray:
        mean, _ = vae.encode(to_pixels(pictures))
        pixels = (vae.decode(mean).clamp(-1, 1) * 0.5 + 0.5) * 255
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    return encode_decode
