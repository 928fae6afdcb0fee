"""What was found in a picture against what was wanted."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy.optimize import linear_sum_assignment

from .detect import Found, FoundObject, to_lab
from .scene import Background, Object, Scene

_PRESERVED = 12.0  # Lab distance within which a pixel counts as left alone: a VAE's round trip moves it by a few
_MARGIN = 6  # pixels around a changed object that may differ: soft edges


@dataclass(frozen=True)
class WantedObject:
    """An object that a text asked for; None where it left the choice open."""

    shape: str | None = None
    colour: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What a text asked for; `background` is None where the text left it open."""

    objects: tuple[WantedObject, ...]
    background: Background | None = None

    @classmethod
    def whole(cls, scene: Scene) -> "Wanted":
        """Everything that a scene shows."""
        pairs = zip(scene.objects, scene.places, strict=True)
        return cls(tuple(WantedObject(item.shape, item.colour, where) for item, where in pairs), scene.background)


@dataclass(frozen=True)
class Marks:
    """Shares from 0 to 1.

    Attributes:
        count: 1 if there are as many objects as wanted.
        colour, shape, place: of the wanted objects, those that were found with it; one left open counts as right.
        objects: of the wanted objects, those right in all three.
        background: 1 if kind and colours are right, or were left open.
        all: 1 if the count and every object are right. The background is reported, not asked for.
    """

    count: float
    colour: float
    shape: float
    place: float
    objects: float
    background: float
    all: float


def score_scene(found: Found, wanted: Wanted) -> Marks:
    """Pairs the objects so that most attributes agree, and counts what agrees."""
    agree = [[_agreement(item, wish) for wish in wanted.objects] for item in found.objects]
    pairs: list[tuple[bool, bool, bool]] = []
    if agree:
        gains = np.array([[sum(hits) + 0.1 * all(hits) for hits in row] for row in agree])
        pairs = [agree[row][column] for row, column in zip(*linear_sum_assignment(-gains), strict=True)]
    total = len(wanted.objects)
    count = len(found.objects) == total
    colour, shape, place = (sum(hits[i] for hits in pairs) / total for i in range(3))
    right = sum(all(hits) for hits in pairs)
    background = wanted.background is None or found.background == wanted.background
    return Marks(float(count), colour, shape, place, right / total, float(background), float(count and right == total))


def average(marks: Sequence[Marks]) -> Marks:
    """The mean of each mark. `marks` is not empty."""
    return Marks(*(float(np.mean([getattr(mark, field.name) for mark in marks])) for field in fields(Marks)))


def preservation(before: np.ndarray, after: np.ndarray, changed: Sequence[Object]) -> float:
    """The share of pixels outside the changed objects that an edit left alone, 0 to 1; 0 where the sizes differ.

    `before`, `after`: uint8 [height, width, 3]; `changed`: the objects as they were and as they should be.
    """
    if before.shape != after.shape:
        return 0.0
    untouched = np.ones(before.shape[:2], bool)
    for item in changed:
        left, top, right, bottom = item.box
        untouched[max(top - _MARGIN, 0) : bottom + _MARGIN, max(left - _MARGIN, 0) : right + _MARGIN] = False
    distance = np.linalg.norm(to_lab(before.astype(np.float32)) - to_lab(after.astype(np.float32)), axis=-1)
    return float((distance[untouched] < _PRESERVED).mean())


def answer_right(answer: str, expected: str) -> bool:
    """Whether an answer says the expected thing, whatever its case, spaces and punctuation."""
    return _plain(answer) == _plain(expected)


def _agreement(item: FoundObject, wish: WantedObject) -> tuple[bool, bool, bool]:
    return (
        wish.colour in (None, item.colour),
        wish.shape is None or wish.shape == item.shape,
        wish.place in (None, item.place),
    )


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip().lower()
