"""Pictures -> what they show, by colours and masks alone: no network, so a model's drawings are judged from outside."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

from .draw import pattern_mask, shape_mask
from .scene import BACKGROUND_KINDS, BASIC_SHAPES, COLOURS, SHAPES, Background, place

NAMES = tuple(COLOURS)

_NEIGHBOURS = np.ones((3, 3))
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_SAME = 18.0  # Lab distance within which a pixel is taken for the background's colour
_PATTERN_PRICE = 0.02  # share of pixels by which a pattern must explain more than a plain colour does
_CORE = 30  # pixels that a blob must keep when its rim is taken off
_SIDE = 32  # of the masks that are compared
_LIKENESS = 0.7  # intersection over union below which a blob is no known shape: thin strokes are soon beside their own
_FULL_LIKENESS = 0.8  # below which it is none of _FULL, which have no thin parts
_FULL = ("circle", "square", "triangle", "heart")
_MISFIT = 0.15  # of its longer side, by which a blob's sides may differ from the shape's own
_LETTER_MISFIT = 0.2  # the same, of letters and digits: narrow and wide ones are read
_STRAY = 0.005  # of the pixels: what is neither background nor object, in specks of at least 2 by 2, is not to be seen
_EXPLAINED = 0.97  # of the pixels beside all objects, that a background must have where it has them
_BORDER = 5  # pixels across, of which a pattern's pixel may have any mix: patterns are drawn by a pixel or two beside
_SLACK = 0.1  # by which the mix of a pattern's two colours may be another
_GRADIENT_SLACK = 0.25  # the same, of gradients
_NAMED = 30.0  # Lab distance from a name's colour beyond which a colour has no name
_RIM = 0.2  # below which it may be a mere rim: those have 0.03 to 0.14
_RIM_DEPTH = 2.5  # pixels from its inside to its border up to which it is one
_ZOOMS = (1.0, 1.05, 1.1)  # a blurred tip shortens the bounding box: larger boxes are tried, too
_SHIFTS = ((0.0, 0.0), (0.0, -0.04), (0.0, 0.04), (-0.03, 0.0), (0.03, 0.0))  # down, across; shares of the box


@dataclass(frozen=True)
class FoundObject:
    """A blob of one colour.

    Attributes:
        shape: one of SHAPES, None where the blob is like none of them.
        colour: the nearest name; None where it is far from all.
        x, y, size: centre and longer side of its bounding box, in pixels.
        place: the name of the third in which the centre lies.
        likeness: intersection over union with the best shape's mask, 0 to 1.
    """

    shape: str | None
    colour: str | None
    x: float
    y: float
    size: float
    place: str
    likeness: float


@dataclass(frozen=True)
class Found:
    """What a picture shows; the objects from the largest to the smallest.

    A background of which a colour is far from all names has that of no name (""), which no background that is asked for
    has. So has one that is not where its pattern belongs, at more than a few pixels.

    stray: whether there is something else that is neither background nor object: specks, or a line.
    """

    width: int
    height: int
    background: Background
    objects: tuple[FoundObject, ...]
    stray: bool = False


def detect(picture: Image.Image | np.ndarray) -> Found:
    """Looks at an RGB picture, or at uint8 values [height, width, 3]."""
    rgb = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture).astype(np.float32)
    height, width = rgb.shape[:2]
    lab = to_lab(rgb)
    label = _nearest_names(lab)
    backdrop = _Backdrop.find(rgb, lab, label)
    differs = backdrop.differs(lab)
    blobs = _blobs(differs, label)
    objects = [_look_at(blob, blobs, rgb, backdrop.predicted) for blob in blobs]
    beside = ~ndimage.binary_dilation(np.logical_or.reduce([*blobs, np.zeros_like(differs)]), _NEIGHBOURS, iterations=3)
    stray = ndimage.binary_opening(differs & beside, np.ones((2, 2))).mean() > _STRAY
    background = backdrop.named()
    if beside.any() and backdrop.is_in_place(lab)[beside].mean() < _EXPLAINED:
        background = replace(background, colour="")
    objects = sorted((item for item in objects if item is not None), key=lambda item: -item.size)
    return Found(width, height, background, tuple(objects), bool(stray))


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """RGB values 0 to 255, [..., 3] -> CIE Lab (D65), float32, of the same shape."""
    values = np.clip(rgb, 0, 255) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4).astype(np.float32)
    xyz = linear @ _XYZ.T
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1).astype(np.float32)


@dataclass(frozen=True)
class _Backdrop:
    """A background as measured: `predicted` is the picture without objects, RGB [height, width, 3]."""

    background: Background
    predicted: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def find(cls, rgb: np.ndarray, lab: np.ndarray, label: np.ndarray) -> "_Backdrop":
        """The kind and colours that explain most pixels."""
        best, best_share = None, -1.0
        for kind in BACKGROUND_KINDS:
            for candidate in cls._of_kind(kind, rgb, label):
                distance = np.linalg.norm(lab[::2, ::2] - to_lab(candidate.predicted[::2, ::2]), axis=-1)
                share = float((distance < _SAME).mean()) - (0.0 if kind == "plain" else _PATTERN_PRICE)
                if share > best_share:
                    best, best_share = candidate, share
        assert best is not None
        return best

    @classmethod
    def _of_kind(cls, kind: str, rgb: np.ndarray, label: np.ndarray) -> Iterator["_Backdrop"]:
        """Backgrounds of a kind, of the colours that are common where the pattern has them."""
        height, width = label.shape
        amount = np.asarray(pattern_mask(kind, width, height)).astype(np.float32) / 255
        for name, first in _common(rgb, label, amount < 0.1):
            if kind == "plain":
                yield cls(Background(kind, name), np.broadcast_to(first, rgb.shape), first, first)
                continue
            for other, second in _common(rgb, label, amount > 0.9):
                if other != name:
                    predicted = first + (second - first) * amount[..., None]
                    yield cls(Background(kind, name, other), predicted, first, second)

    def named(self) -> Background:
        """The background, as far as its colours have names."""
        named = self.background
        second = None if named.second is None else _name(self.second)
        return Background(named.kind, _name(self.first), second)

    def differs(self, lab: np.ndarray) -> np.ndarray:
        """Which pixels are neither of the background's colours nor anything between them, bool [height, width].

        Between counts as background because blurred borders of a pattern lie there.
        """
        return np.min([distance for _, distance in self._distances(lab)], axis=0) > _SAME

    def is_in_place(self, lab: np.ndarray) -> np.ndarray:
        """Which pixels are what the background is there, or within a few pixels of there, bool [height, width]."""
        height, width = lab.shape[:2]
        amount = np.asarray(pattern_mask(self.background.kind, width, height)).astype(np.float32) / 255
        slack = _GRADIENT_SLACK if self.background.kind == "gradient" else _SLACK
        least = ndimage.minimum_filter(amount, _BORDER) - slack
        most = ndimage.maximum_filter(amount, _BORDER) + slack
        near = [(distance <= _SAME) & (least <= mix) & (mix <= most) for mix, distance in self._distances(lab)]
        return np.logical_or.reduce(near)

    def _distances(self, lab: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
        """Mixes of the two colours, 0 the first and 1 the second, and how far each pixel is from them."""
        for mix in (0.0,) if self.background.second is None else np.linspace(0, 1, 9, dtype=np.float32):
            yield float(mix), np.linalg.norm(lab - to_lab(self.first + (self.second - self.first) * mix), axis=-1)


def _common(rgb: np.ndarray, label: np.ndarray, where: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """One or two colours that are commonest among some pixels: the name, and the median of those pixels, RGB [3].

    Two, because an object may hide most of a gradient's end.
    """
    labels, values = label[where], rgb[where]
    counts = np.bincount(labels, minlength=len(NAMES))
    names = [int(name) for name in np.argsort(-counts)[:2] if counts[name] > 0.1 * len(labels)]
    return [(NAMES[name], np.median(values[labels == name], axis=0)) for name in names]


def _name(rgb: np.ndarray) -> str:
    """The name of the colour nearest to RGB values [3]; "" where it is far from all."""
    distances = np.linalg.norm(to_lab(rgb) - _palette_lab(), axis=-1)
    return NAMES[int(distances.argmin())] if distances.min() < _NAMED else ""


def _nearest_names(lab: np.ndarray) -> np.ndarray:
    """The index in NAMES of the colour nearest to each pixel, [height, width]."""
    return np.argmin(((lab[..., None, :] - _palette_lab()) ** 2).sum(-1), axis=-1)


def _blobs(foreground: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
    """Connected pixels of one colour, without specks (to about 7 pixels across); bool masks [height, width]."""
    blobs = []
    for name in range(len(NAMES)):
        pieces, count = ndimage.label(foreground & (label == name))
        if not count:
            continue
        cores = ndimage.binary_erosion(pieces > 0, _NEIGHBOURS)
        sizes = np.bincount(pieces[cores], minlength=count + 1)
        blobs += [pieces == piece for piece in range(1, count + 1) if sizes[piece] >= _CORE]
    return blobs


def _look_at(blob: np.ndarray, blobs: list[np.ndarray], rgb: np.ndarray, backdrop: np.ndarray) -> FoundObject | None:
    """Colour, extent and shape of a blob; None for a mere rim, which blur leaves between two colours."""
    core = ndimage.binary_erosion(blob, _NEIGHBOURS)
    colour = np.median(rgb[core], axis=0)
    # How far each pixel near the blob is from the background towards its colour: a mask with soft edges.
    towards = colour - backdrop
    coverage = ((rgb - backdrop) * towards).sum(-1) / np.maximum((towards**2).sum(-1), 1.0)
    near = ndimage.binary_dilation(blob, _NEIGHBOURS, iterations=2)
    for other in blobs:
        if other is not blob:
            near &= ~ndimage.binary_dilation(other, _NEIGHBOURS)
    coverage = np.where(near, np.clip(coverage, 0, 1), 0).astype(np.float32)
    inside = np.argwhere(coverage > 0.5)
    if not len(inside):
        return None
    (top, left), (bottom, right) = inside.min(0), inside.max(0) + 1
    height, width = float(bottom - top), float(right - left)
    x, y, size = float(left + right) / 2, float(top + bottom) / 2, max(height, width)
    shape, likeness = _shape(coverage, x, y, size)
    if likeness < _RIM and ndimage.distance_transform_edt(blob).max() <= _RIM_DEPTH:
        return None
    where = place(x, y, rgb.shape[1], rgb.shape[0])
    is_one = likeness >= (_FULL_LIKENESS if shape in _FULL else _LIKENESS) and _fits(shape, height, width)
    if shape not in (*_FULL, "I"):  # a mere lump has much in common with an 8
        is_one &= likeness >= _lumpiness(coverage[top:bottom, left:right])
    return FoundObject(shape if is_one else None, _name(colour) or None, x, y, size, where, likeness)


def _lumpiness(coverage: np.ndarray) -> float:
    """Intersection over union of a blob, cut to its box, with the box and with the ellipse in it, the greater."""
    height, width = coverage.shape
    box = Image.new("L", (width, height), 255)
    ellipse = Image.new("L", (width, height))
    ImageDraw.Draw(ellipse).ellipse((0, 0, width - 1, height - 1), fill=255)
    masks = [np.asarray(mask).astype(np.float32) / 255 for mask in (box, ellipse)]
    return max(float(np.minimum(m, coverage).sum() / np.maximum(m, coverage).sum()) for m in masks)


def _fits(shape: str, height: float, width: float) -> bool:
    """Whether a blob's sides are as long, one to the other, as a shape's are: no rectangle is a square."""
    down, across = _sides(shape)
    size = max(height, width)
    misfit = max(abs(height / size - down), abs(width / size - across))
    return misfit <= (_MISFIT if shape in BASIC_SHAPES else _LETTER_MISFIT)


@cache
def _sides(shape: str) -> tuple[float, float]:
    """Height and width of a shape, as shares of the longer."""
    inside = np.argwhere(np.asarray(shape_mask(shape, 64)) > 127)
    height, width = np.ptp(inside, axis=0) + 1
    return height / max(height, width), width / max(height, width)


def _shape(coverage: np.ndarray, x: float, y: float, size: float) -> tuple[str, float]:
    """The shape whose mask covers most of the blob and least else, and the intersection over union."""
    image = Image.fromarray((coverage * 255).astype(np.uint8))
    best, best_likeness = "", -1.0
    for zoom in _ZOOMS:
        half = size * zoom / 2
        for down, across in _SHIFTS:
            middle_x, middle_y = x + across * size, y + down * size
            box = (middle_x - half, middle_y - half, middle_x + half, middle_y + half)
            mask = np.asarray(_cut(image, box)).astype(np.float32) / 255
            likeness = np.minimum(_templates(), mask).sum((1, 2)) / np.maximum(_templates(), mask).sum((1, 2))
            index = int(likeness.argmax())
            if likeness[index] > best_likeness:
                best, best_likeness = SHAPES[index], float(likeness[index])
    return best, best_likeness


def _cut(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """A box of an image, which may reach beyond it, as _SIDE by _SIDE pixels."""
    left, top, right, _ = box
    step = (right - left) / _SIDE
    return image.transform(
        (_SIDE, _SIDE),
        Image.Transform.AFFINE,
        (step, 0, left, 0, step, top),
        Image.Resampling.BILINEAR,
    )


@cache
def _templates() -> np.ndarray:
    """Each shape's mask at the size of comparison, float32 [shapes, side, side], as soft as a drawn one."""
    masks = [shape_mask(shape, 64).filter(ImageFilter.BoxBlur(0.5)).reduce(2) for shape in SHAPES]
    return np.stack([np.asarray(mask).astype(np.float32) / 255 for mask in masks])


@lru_cache(maxsize=1)
def _palette_lab() -> np.ndarray:
    return to_lab(_PALETTE)


# Linear sRGB -> XYZ over the D65 white point (IEC 61966-2-1).
_XYZ = np.array(
    [
        [0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883],
    ],
    np.float32,
)
