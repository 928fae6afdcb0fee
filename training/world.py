"""The small world: which scenes there are, drawn at random from seeds. No files."""

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Literal

from .scene import BASIC_SHAPES, COLOURS, DIGITS, LETTERS, PLACES, Background, Object, Scene, row_and_column

Split = Literal["train", "held-out"]

# Names and (height, width): rows 16, 12, 20, 10 and 22 of the resolution table of base size 128.
FORMATS = {"square": (128, 128), "wide": (96, 160), "tall": (160, 96), "very wide": (80, 176), "very tall": (176, 80)}
SIZES = (40, 52, 68)  # sides in pixels: small, as a rule, big
# Where one, two or three objects are that nobody says a place for: what is drawn at once has no room for a choice.
HABITS = {1: ("middle",), 2: ("left", "right"), 3: ("left", "middle", "right")}

_COUNTS = (1, 1, 1, 1, 1, 2, 2, 2, 2, 3)
_SIZE_WEIGHTS = {1: (2, 5, 3), 2: (3, 6, 1), 3: (6, 4, 0)}
_CHARACTER_SHARE = 0.15
_SUITED_SHARE = 0.7
_FORMAT_WEIGHTS = (5, 2, 2, 1, 1)
_KIND_WEIGHTS = {"plain": 12, "striped": 2, "checked": 2, "dotted": 2, "gradient": 2}
_CONTRAST = 45.0  # least Lab distance of an object from anything behind it
_EDGE = 1  # pixels between an object and the border
_GAP = 2  # pixels between two objects, 6 where their colours are alike
_OFF = 2  # pixels that an object is off its place, down or up, right or left
_INSIDE = 3  # pixels between an object's centre and the border of its third
_HELD_OUT = 16  # one arrangement of objects in so many is kept from training


def stream(split: Split, seed: int | str) -> random.Random:
    """The generator of a split; equal seeds of different splits share nothing."""
    return random.Random(f"{split}:{seed}")


def scenes(split: Split, seed: int, objects: int | None = None) -> Iterator[Scene]:
    """Endless scenes of a split. No arrangement of objects (shapes, colours, places) is in both splits."""
    rng = stream(split, seed)
    while True:
        yield split_scene(rng, split, objects)


def split_scene(
    rng: random.Random,
    split: Split,
    objects: int | None = None,
    *,
    shapes: Sequence[str] | None = None,
    habitual: bool = False,
) -> Scene:
    """A random scene of a split; see `is_held_out` and `random_scene`."""
    while True:
        scene = random_scene(rng, objects, shapes=shapes, habitual=habitual)
        if is_held_out(scene) == (split == "held-out"):
            return scene


def is_held_out(scene: Scene) -> bool:
    """Whether training must not see this arrangement: shapes, colours and places, whatever the background."""
    parts = sorted(
        f"{item.shape} {item.colour} {where}" for item, where in zip(scene.objects, scene.places, strict=True)
    )
    return zlib.crc32("; ".join(parts).encode()) % _HELD_OUT == 0


def random_scene(
    rng: random.Random,
    objects: int | None = None,
    *,
    shapes: Sequence[str] | None = None,
    habitual: bool = False,
) -> Scene:
    """A scene with `objects` of them (1 to 3; None: mostly one or two).

    `shapes` are those to choose from (None: the basic ones, and in some scenes letters and digits). `habitual`: at the
    places of HABITS instead of any.
    """
    count = objects or rng.choice(_COUNTS)
    while True:
        scene = _attempt(rng, count, shapes, HABITS[count] if habitual else None)
        if scene is not None and fits(scene):
            return scene


def suited_format(places: Sequence[str]) -> str:
    """The format that suits some places: wide for objects side by side, tall for stacked ones, else square."""
    rows, columns = zip(*map(row_and_column, places), strict=True)
    if len(set(places)) < 2:
        return "square"
    if set(rows) == {1}:
        return "wide" if len(set(columns)) < 3 else "very wide"
    if set(columns) == {1}:
        return "tall" if len(set(rows)) < 3 else "very tall"
    return "square"


def is_habitual(scene: Scene) -> bool:
    """Whether the objects, in their order, lie where nobody has to say it."""
    return scene.places == HABITS[len(scene.objects)]


def format_of(scene: Scene) -> str:
    """The name of a scene's format. Raises StopIteration for a size that is none of FORMATS."""
    return next(name for name, size in FORMATS.items() if size == (scene.height, scene.width))


def fits(scene: Scene) -> bool:
    """Whether every object lies inside the picture and apart from the others, and stands out from the background."""
    for index, item in enumerate(scene.objects):
        left, top, right, bottom = item.box
        if left < _EDGE or top < _EDGE or right > scene.width - _EDGE or bottom > scene.height - _EDGE:
            return False
        if not stands_out(item.colour, scene.background):
            return False
        for other in scene.objects[:index]:
            gap = 3 * _GAP if item.colour == other.colour else _GAP
            if _overlap(item, other, gap):
                return False
    return True


@cache
def stands_out(colour: str, background: Background) -> bool:
    """Whether a colour is far, in Lab, from both colours of a background and from everything between them."""
    first = COLOURS[background.colour]
    second = COLOURS[background.second or background.colour]
    steps = [tuple(a + (b - a) * i / 8 for a, b in zip(first, second, strict=True)) for i in range(9)]
    return min(lab_distance(COLOURS[colour], step) for step in steps) >= _CONTRAST


def random_background(rng: random.Random) -> Background:
    kind = rng.choices(list(_KIND_WEIGHTS), list(_KIND_WEIGHTS.values()))[0]
    while True:
        colour, second = rng.choice(list(COLOURS)), rng.choice(list(COLOURS))
        if kind == "plain":
            return Background(kind, colour)
        if stands_out(second, Background("plain", colour)):
            return Background(kind, colour, second)


def put(rng: random.Random, shape: str, colour: str, size: int, where: str, width: int, height: int) -> Object | None:
    """An object at a named place, a little off its middle; None where it is too large for the place."""
    row, column = row_and_column(where)
    x = _coordinate(rng, column, size, width)
    y = _coordinate(rng, row, size, height)
    return None if x is None or y is None else Object(shape, colour, x, y, size)


def random_shapes(rng: random.Random) -> tuple[str, ...]:
    """The shapes that a scene chooses from: mostly the basic ones, at times letters and digits."""
    return LETTERS + DIGITS if rng.random() < _CHARACTER_SHARE else BASIC_SHAPES


def random_object(rng: random.Random, count: int, width: int, height: int) -> Object | None:
    """An object somewhere in a picture that is to have `count` of them; None where it is too large for its place."""
    where = rng.choice([name for row in PLACES for name in row])
    size = random_size(rng, count)
    return put(rng, rng.choice(random_shapes(rng)), rng.choice(list(COLOURS)), size, where, width, height)


def random_size(rng: random.Random, count: int) -> int:
    """A side in pixels; more small ones, and fewer big ones, where there are more objects."""
    return rng.choices(SIZES, _SIZE_WEIGHTS[count])[0]


def lab_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Distance of two RGB colours, 0 to 255 each, in CIE Lab (D65): about 2 is just noticeable, 100 black to white."""
    return sum((a - b) ** 2 for a, b in zip(_lab(first), _lab(second), strict=True)) ** 0.5


def _attempt(
    rng: random.Random, count: int, shapes: Sequence[str] | None, places: Sequence[str] | None
) -> Scene | None:
    """A scene that may not fit, mostly of the format that suits it; None where an object is too large for its place."""
    places = places or rng.sample([name for row in PLACES for name in row], count)
    suited = rng.random() < _SUITED_SHARE
    format_name = suited_format(places) if suited else rng.choices(list(FORMATS), _FORMAT_WEIGHTS)[0]
    height, width = FORMATS[format_name]
    shapes = shapes or random_shapes(rng)
    colours = [rng.choice(list(COLOURS)) for _ in places]
    if count > 1 and rng.random() < 0.8:  # few scenes repeat a colour: two of one colour say less about who is who
        colours = rng.sample(list(COLOURS), count)
    objects = [
        put(rng, rng.choice(shapes), colour, random_size(rng, count), where, width, height)
        for colour, where in zip(colours, places, strict=True)
    ]
    if None in objects:
        return None
    scene = Scene(width, height, random_background(rng), tuple(objects))
    for _ in range(8):  # colours first, the background yields
        if all(stands_out(colour, scene.background) for colour in colours):
            break
        scene = replace(scene, background=random_background(rng))
    return scene


def _coordinate(rng: random.Random, third: int, size: int, side: int) -> int | None:
    """A centre inside a third of a side: near the third's middle, the object inside the picture."""
    low = max(-(-third * side // 3) + _INSIDE, size // 2 + _EDGE)
    high = min((third + 1) * side // 3 - _INSIDE, side - size // 2 - _EDGE)
    if low > high:
        return None
    middle = min(max(round((third + 0.5) * side / 3), low), high)
    return min(max(middle + rng.choice((-_OFF, _OFF)), low), high)


def _overlap(one: Object, other: Object, gap: int) -> bool:
    left, top, right, bottom = one.box
    other_left, other_top, other_right, other_bottom = other.box
    across = left < other_right + gap and other_left < right + gap
    down = top < other_bottom + gap and other_top < bottom + gap
    return across and down


@lru_cache(maxsize=4096)
def _lab(colour: tuple[float, ...]) -> tuple[float, float, float]:
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (c / 255 for c in colour)
    ]
    xyz = [sum(weight * value for weight, value in zip(row, linear, strict=True)) for row in _XYZ]
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


# Linear sRGB -> XYZ over the D65 white point (IEC 61966-2-1).
_XYZ = (
    (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
)
