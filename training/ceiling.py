"""The best score that a VAE allows: true scenes, encoded and decoded, looked at by the detector."""

from collections.abc import Callable
from itertools import groupby, islice

import numpy as np

from .detect import detect
from .draw import draw_array
from .marks import Marks, average, score_scene
from .wanted import Wanted
from .world import scenes

# uint8 pictures [count, height, width, 3] -> the same after a round trip.
EncodeDecode = Callable[[np.ndarray], np.ndarray]
_BATCH = 32


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
