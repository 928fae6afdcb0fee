"""Picture sizes: the table that ratio tokens index, and what a requested size becomes.

The reference snaps every request to a row of its table, by aspect ratio alone: asking for 512x512 draws the square row,
whatever its size. `ResolutionTable.parse` does the same; `ResolutionTable.free` keeps the exact size.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from ..errors import RequestError
from ..types import Grid, ImageSize

ALIGN = 16
EXTRA_SIZES = (ImageSize(1024, 768), ImageSize(1280, 720), ImageSize(768, 1024), ImageSize(720, 1280))


class Resolution(NamedTuple):
    """A size that can be drawn: pixels, tokens (pixels / 16) and the row whose ratio token announces it."""

    size: ImageSize
    grid: Grid
    ratio: int


@dataclass(frozen=True)
class ResolutionTable:
    """Rows indexed by ratio token: a staircase from widest to tallest around `base_size`, then the extra sizes.

    The extra sizes are fixed numbers and stand unsorted at the end, so the table as a whole is not sorted.
    """

    base_size: int
    rows: tuple[ImageSize, ...]

    @classmethod
    def build(cls, base_size: int, num_ratios: int) -> "ResolutionTable":
        """The table of a checkpoint whose vocabulary has `num_ratios` ratio tokens (33: no extra sizes, or 37).

        `base_size` is the config's `image_base_size`, a positive multiple of 16.
        """
        assert base_size > 0 and base_size % ALIGN == 0, f"image_base_size {base_size}"
        rows = _staircase(base_size)
        for extra in EXTRA_SIZES:
            ratios = {Fraction(*row) for row in rows}
            if len(rows) < num_ratios and Fraction(*extra) not in ratios:
                rows.append(extra)
        return cls(base_size, tuple(rows))

    def nearest(self, height: float, width: float) -> int:
        """Row whose height/width ratio is nearest to that of any positive size; the first of equals."""
        wanted = height / width
        return min(range(len(self.rows)), key=lambda row: abs(self.rows[row].height / self.rows[row].width - wanted))

    def row(self, ratio: int) -> Resolution:
        """The size of a ratio token's row. Raises RequestError for a row that this table lacks."""
        if not 0 <= ratio < len(self.rows):
            raise RequestError(f"aspect ratio {ratio} does not exist here; this checkpoint has 0..{len(self.rows) - 1}")
        return _resolution(self.rows[ratio], ratio)

    def parse(self, size: str | Sequence[int]) -> Resolution:
        """A size as the reference takes it, snapped to the nearest row.

        `"HxW"` and `(h, w)` are height first, `"W:H"` is width first, `"<img_ratio_i>"` is row i. "auto" is no size:
        the model chooses it, the caller asks. Raises RequestError for anything else, or a side below 1.
        """
        if not isinstance(size, str):
            return self._snap(*_two_integers(size))
        if match := re.fullmatch(r"\s*<img_ratio_(\d+)>\s*", size):
            return self.row(int(match[1]))
        if match := re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", size):
            return self._snap(int(match[1]), int(match[2]))
        if match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", size):
            return self._snap(int(match[2]), int(match[1]))
        raise RequestError(f"image size {size!r} is none of 'HEIGHTxWIDTH', 'WIDTH:HEIGHT', '<img_ratio_i>'")

    def free(self, height: int, width: int) -> Resolution:
        """Exactly this size, announced by the ratio token of the nearest row.

        Raises RequestError unless both sides are positive multiples of 16.
        """
        for name, value in (("height", height), ("width", width)):
            if value <= 0 or value % ALIGN:
                raise RequestError(
                    f"{name} is {value}; it must be a positive multiple of {ALIGN}, like {_align(value)}"
                )
        return _resolution(ImageSize(height, width), self.nearest(height, width))

    def _snap(self, height: int, width: int) -> Resolution:
        for name, value in (("height", height), ("width", width)):
            if value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1")
        return self.row(self.nearest(height, width))


def _staircase(base: int) -> list[ImageSize]:
    """From (base, base) both ways: one side grows by base/16 up to twice the base, the other shrinks down to half."""
    step, low, high = base // 16, base // 2, base * 2
    tall: list[tuple[int, int]] = []
    height = width = base
    while height < high or width > low:
        height, width = min(height + step, high), max(width - step, low)
        tall.append((height, width))
    sizes = [(base, base), *tall, *((width, height) for height, width in tall)]
    floored = [ImageSize(height // ALIGN * ALIGN, width // ALIGN * ALIGN) for height, width in sizes]
    return sorted(floored, key=lambda size: size.height / size.width)


def _resolution(size: ImageSize, ratio: int) -> Resolution:
    return Resolution(size, Grid(size.height // ALIGN, size.width // ALIGN), ratio)


def _align(value: int) -> int:
    """The multiple of 16 nearest to a value, at least 16."""
    return max(ALIGN, (value + ALIGN // 2) // ALIGN * ALIGN)


def _two_integers(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or any(isinstance(side, bool) or not isinstance(side, int) for side in size):
        raise RequestError(f"image size {size!r} should be two whole numbers, (height, width)")
    return size[0], size[1]
