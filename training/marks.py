"""What was found in a picture against what was wanted."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from .detect import Found, FoundObject, to_lab
from .scene import Background, Scene
from .words import SHAPE_WORDS, Language, object_phrase
from .world import BIG, SMALL

_PRESERVED = 12.0  # Lab distance within which a pixel counts as left alone: a VAE's round trip moves it by a few
_MARGIN = 3  # pixels around what changes that may change, too: soft edges


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
        background: 1 if kind and colours are right; None where they were left open.
        all: 1 if the count and every object are right. The background is reported, not asked for.
    """

    count: float
    colour: float
    shape: float
    place: float
    objects: float
    background: float | None
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
    background = None if wanted.background is None else float(found.background == wanted.background)
    return Marks(float(count), colour, shape, place, right / total, background, float(count and right == total))


def average(marks: Sequence[Marks]) -> Marks:
    """The mean of each mark, of the background where it was asked for. `marks` is not empty."""
    return Marks(*(mean(getattr(mark, field.name) for mark in marks) for field in fields(Marks)))


def mean(values: Iterable[float | bool | None]) -> float | None:
    """The mean of those that are not None; None if none is left."""
    there = [float(value) for value in values if value is not None]
    return sum(there) / len(there) if there else None


def preservation(before: np.ndarray, wanted: np.ndarray, after: np.ndarray) -> float:
    """Of the pixels that an edit should leave alone, the share that it left alone, 0 to 1; 0 where the sizes differ.

    `before` and `wanted` are drawings of the scenes before and after the edit, `after` is the picture to judge; all
    uint8 [height, width, 3].
    """
    if before.shape != after.shape:
        return 0.0
    changed = ndimage.binary_dilation((before != wanted).any(-1), np.ones((3, 3)), iterations=_MARGIN)
    distance = np.linalg.norm(to_lab(before.astype(np.float32)) - to_lab(after.astype(np.float32)), axis=-1)
    return 1.0 if changed.all() else float((distance[~changed] < _PRESERVED).mean())


def rewrite_right(text: str, scene: Scene, language: Language) -> bool:
    """Whether a rewrite names each object of a scene with its colour and place, and no more objects than there are.

    Sizes may differ, they were left open; so may the background.
    """
    for item, where in zip(scene.objects, scene.places, strict=True):
        for size in (item, replace(item, size=SMALL[0]), replace(item, size=BIG[1])):
            if object_phrase(size, where, language) in text[:1].lower() + text[1:]:
                break
        else:
            return False
    shapes = "|".join(re.escape(word) for word in SHAPE_WORDS[language].values())
    bounds = r"(?:%s)" if language == "zh" else r"\b(?:%s)\b"
    return len(re.findall(bounds % shapes, text)) == len(scene.objects)


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
