"""Scenes -> pictures, by pillow. Shapes and patterns are drawn once, larger, and kept; a picture is a few pastes."""

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scene import BASIC_SHAPES, COLOURS, Background, Scene

PERIOD = 16  # of stripes, checks and dots, in pixels: the VAE's own step, so that patterns survive it
_FINE = 8  # supersampling of shapes


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of its size, edges antialiased."""
    picture = _background(scene.background, scene.width, scene.height).copy()
    for item in scene.objects:
        left, top, _, _ = item.box
        picture.paste(COLOURS[item.colour], (left, top), shape_mask(item.shape, item.size))
    return picture


def draw_array(scene: Scene) -> np.ndarray:
    """The scene as uint8 values, [height, width, 3]."""
    return np.array(draw(scene))


@lru_cache(maxsize=4096)
def shape_mask(shape: str, size: int) -> Image.Image:
    """Coverage of a shape, "L", `size` by `size` pixels; its longer side fills them, the shorter is centred."""
    fine = size * _FINE
    mask = _outline(shape, fine) if shape in BASIC_SHAPES else _character(shape, fine)
    return mask.reduce(_FINE)


@lru_cache(maxsize=1024)
def pattern_mask(kind: str, width: int, height: int) -> Image.Image:
    """How much of the second colour a background has, "L": 0 none, 255 all."""
    if kind == "gradient":
        column = np.linspace(0, 255, height).round().astype(np.uint8)
        return Image.fromarray(np.repeat(column[:, None], width, axis=1))
    if kind == "dotted":
        return _dots(width, height)
    across = np.arange(width)[None, :] // PERIOD % 2
    down = np.arange(height)[:, None] // PERIOD % 2
    cells = {"plain": across * 0 + down * 0, "striped": across + down * 0, "checked": across ^ down}[kind]
    return Image.fromarray((cells * 255).astype(np.uint8))


@lru_cache(maxsize=512)
def _background(background: Background, width: int, height: int) -> Image.Image:
    picture = Image.new("RGB", (width, height), COLOURS[background.colour])
    if background.second is not None:
        picture.paste(COLOURS[background.second], (0, 0), pattern_mask(background.kind, width, height))
    return picture


def _dots(width: int, height: int) -> Image.Image:
    """Dots of five eighths of the period across, one in the middle of each square of the period."""
    mask = Image.new("L", (width * 4, height * 4))
    pen = ImageDraw.Draw(mask)
    period, radius = PERIOD * 4, PERIOD * 5 // 4
    for y in range(period // 2, height * 4, period):
        for x in range(period // 2, width * 4, period):
            pen.ellipse((x - radius, y - radius, x + radius - 1, y + radius - 1), fill=255)
    return mask.reduce(4)


def _outline(shape: str, side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    whole = (0, 0, side - 1, side - 1)
    match shape:
        case "circle":
            pen.ellipse(whole, fill=255)
        case "ring":
            pen.ellipse(whole, fill=255)
            inner = side // 4
            pen.ellipse((inner, inner, side - 1 - inner, side - 1 - inner), fill=0)
        case "square":
            pen.rectangle(whole, fill=255)
        case _:
            pen.polygon(_filled(_POINTS[shape](), side), fill=255)
    return mask


def _triangle() -> list[tuple[float, float]]:
    return [(0.0, 1.0), (0.5, 0.0), (1.0, 1.0)]


def _star() -> list[tuple[float, float]]:
    """Five points; the inner radius is 0.45 of the outer, which leaves arms thick enough to survive a small VAE."""
    radii = (1.0, 0.45)
    return [(radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]


def _heart() -> list[tuple[float, float]]:
    """The well-known curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    angles = [i * math.tau / 120 for i in range(120)]
    return [
        (
            16 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in angles
    ]


_POINTS = {"triangle": _triangle, "star": _star, "heart": _heart}


def _filled(points: list[tuple[float, float]], side: int) -> list[tuple[float, float]]:
    """The points scaled alike both ways until the longer extent fills the side, the shorter centred."""
    xs, ys = zip(*points, strict=True)
    scale = (side - 1) / max(max(xs) - min(xs), max(ys) - min(ys))
    middle_x, middle_y = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    half = (side - 1) / 2
    return [(half + (x - middle_x) * scale, half + (y - middle_y) * scale) for x, y in points]


def _character(character: str, side: int) -> Image.Image:
    """A letter or digit in pillow's own font, thickened, cut to its ink and scaled until the longer side fits."""
    font = ImageFont.load_default(side)
    ink = Image.new("L", (side * 2, side * 2))
    ImageDraw.Draw(ink).text((side // 2, side // 4), character, fill=255, font=font, stroke_width=round(side * 0.045))
    ink = ink.crop(ink.getbbox())
    scale = side / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BILINEAR)
    mask = Image.new("L", (side, side))
    mask.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return mask
