"""Encoding and decoding in overlapping tiles with linear blending, for pictures that do not fit at once (spec 9.7).

Pure functions of the callable that does one tile. Tiles start at multiples of the step; each is blended into its
upper, then into its left neighbour, which are already blended themselves. Off by default, because it changes pixels:
group norms and attention see one tile at a time.

One deviation from the reference: it also runs the tiles that lie wholly inside their predecessor (at 1024 pixels a
last row and column of one latent), and lets their context-free result win at the border. Here an axis ends with the
first tile that reaches its end, which leaves 9 tiles instead of 16 and makes one tile the same as no tiling.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..callbacks import CheckCancelled, never_cancelled
from ..errors import RequestError

OVERLAP_FACTOR = 0.125


@dataclass(frozen=True)
class Tiling:
    """Where tiles lie, in latent positions: side `tile`, one every `step`; `factor` pixels per latent position."""

    tile: int
    step: int
    factor: int

    @classmethod
    def of_pixels(cls, tile_size: int, factor: int) -> "Tiling":
        """Square tiles of `tile_size` pixels (rounded down to whole latents) that overlap by an eighth.

        384 pixels give 24 latents, a step of 21 and a blend of 3 latents, 48 pixels. Raises RequestError for a tile
        too small to overlap.
        """
        tile = tile_size // factor
        if tile < 2:
            raise RequestError(f"A VAE tile must be at least {2 * factor} pixels wide, got {tile_size}.")
        return cls(tile=tile, step=min(int(tile * (1 - OVERLAP_FACTOR)), tile - 1), factor=factor)

    @property
    def overlap(self) -> int:
        """Latent positions over which neighbours are blended."""
        return self.tile - self.step

    def starts(self, length: int) -> range:
        """First position of every tile of an axis: multiples of the step, until a tile reaches the end."""
        return range(0, max(length - self.overlap, 1), self.step)


def tiled_decode(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    tiling: Tiling,
    check_cancelled: CheckCancelled = never_cancelled,
) -> Tensor:
    """Latents `(B, C, h, w)` -> pixels `(B, 3, f * h, f * w)`; `decode` does the same for one tile."""
    return _run_tiles(decode, latents, tiling, 1, tiling.factor, check_cancelled)


def tiled_encode(
    encode: Callable[[Tensor], Tensor],
    pixels: Tensor,
    tiling: Tiling,
    check_cancelled: CheckCancelled = never_cancelled,
) -> Tensor:
    """Pixels `(B, 3, f * h, f * w)` -> moments `(B, 2 * C, h, w)`; `encode` does the same for one tile."""
    return _run_tiles(encode, pixels, tiling, tiling.factor, 1, check_cancelled)


def _run_tiles(
    run: Callable[[Tensor], Tensor],
    source: Tensor,
    tiling: Tiling,
    source_scale: int,
    result_scale: int,
    check_cancelled: CheckCancelled,
) -> Tensor:
    """Both directions; the scales are the values per latent position along an axis of source and result."""
    height, width = (side // source_scale for side in source.shape[-2:])
    extent = tiling.overlap * result_scale
    kept = tiling.step * result_scale
    result_rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in tiling.starts(height):
        row: list[Tensor] = []
        for left in tiling.starts(width):
            check_cancelled()
            rows, columns = (slice(at * source_scale, (at + tiling.tile) * source_scale) for at in (top, left))
            tile = run(source[..., rows, columns])
            if above:
                _blend(above[len(row)], tile, -2, extent)
            if row:
                _blend(row[-1], tile, -1, extent)
            row.append(tile)
        # Of every tile its first `kept` columns and rows: what follows is the overlap, blended into the next tile.
        # The last tile of an axis has no next one and is kept whole.
        strip = torch.cat([tile[..., :kept] for tile in row[:-1]] + row[-1:], dim=-1)
        last = top == tiling.starts(height)[-1]
        result_rows.append(strip if last else strip[..., :kept, :])
        above = row
    return torch.cat(result_rows, dim=-2)


def _blend(before: Tensor, tile: Tensor, dim: int, extent: int) -> None:
    """Fades the end of `before` into the beginning of `tile`, in place; at offset x the tile has weight x / extent."""
    start = tile.narrow(dim, 0, extent)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    weight = torch.arange(extent, dtype=torch.float32, device=tile.device) / extent
    weight = weight[:, None] if dim == -2 else weight
    start.copy_(torch.lerp(end.float(), start.float(), weight))
