"""What was found in a picture against what was wanted."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import product

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from .detect import Found, FoundObject, to_lab
from .scene import BACKGROUND_KINDS, COLOURS, Background, Scene
from .wanted import Wanted, WantedObject
from .words import FORMAT_PHRASES, Language, background_phrases, object_phrase, size_word

_PRESERVED = 12.0  # Lab distance within which a pixel counts as left alone: a VAE's round trip moves it by a few
_MARGIN = 3  # pixels around what changes that may change, too: soft edges


@dataclass(frozen=True)
class Marks:
    """Shares from 0 to 1.

    Attributes:
        count: 1 if there are as many objects as wanted, and nothing else.
        colour, shape, place, size: of the wanted objects, those that were found with it; one left open counts as right.
        objects: of the wanted objects, those right in colour, shape and place.
        background: 1 if kind and colours are right; None where they were left open.
        all: 1 if the count and every object are right. Sizes and the background are reported, not asked for.
    """

    count: float
    colour: float
    shape: float
    place: float
    size: float
    objects: float
    background: float | None
    all: float


def score_scene(found: Found, wanted: Wanted) -> Marks:
    """Pairs the objects so that most attributes agree, and counts what agrees."""
    agree = [[_agreement(item, wish) for wish in wanted.objects] for item in found.objects]
    pairs: list[tuple[bool, bool, bool, bool]] = []
    if agree:
        gains = np.array([[sum(hits[:3]) + 0.1 * all(hits[:3]) for hits in row] for row in agree])
        pairs = [agree[row][column] for row, column in zip(*linear_sum_assignment(-gains), strict=True)]
    total = len(wanted.objects)
    count = len(found.objects) == total and not found.stray
    colour, shape, place, size = (sum(hits[i] for hits in pairs) / total for i in range(4))
    right = sum(all(hits[:3]) for hits in pairs)
    background = None if wanted.background is None else float(found.background == wanted.background)
    return Marks(float(count), colour, shape, place, size, right / total, background, float(count and right == total))


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


def rewrite_right(text: str, scene: Scene, language: Language, background: Background | None = None) -> bool:
    """Whether a rewrite names a scene's objects, size, colour, shape and place of each, no others, and a background.

    background: the one that it must name; None for any. It may begin with any format; the ratio is marked apart.
    """
    colon, comma, stop = (": ", ", ", ".") if language == "en" else ("：", "，", "。")
    opening, _, body = text.rpartition(colon)
    if opening and opening.lower() not in FORMAT_PHRASES[language].values():
        return False
    *named, behind = (phrase[:1].lower() + phrase[1:] for phrase in body.removesuffix(stop).split(comma))
    pairs = zip(scene.objects, scene.places, strict=True)
    right = _any_background(language) if background is None else background_phrases(background, language)
    return behind in right and sorted(named) == sorted(object_phrase(item, where, language) for item, where in pairs)


def answer_right(answer: str, expected: str) -> bool:
    """Whether an answer says the expected thing, whatever its case, spaces and punctuation."""
    return _plain(answer) == _plain(expected)


def _agreement(item: FoundObject, wish: WantedObject) -> tuple[bool, bool, bool, bool]:
    """In colour, shape, place, size."""
    return (
        wish.colour in (None, item.colour),
        wish.shape is None or wish.shape == item.shape,
        wish.place in (None, item.place),
        wish.size in (None, size_word(item.size, "en")),
    )


@cache
def _any_background(language: Language) -> frozenset[str]:
    """The names of all backgrounds that there are."""
    kinds = product(BACKGROUND_KINDS, COLOURS, COLOURS)
    return frozenset(phrase for kind in kinds for phrase in background_phrases(Background(*kind), language))


def _plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text).strip().lower()
