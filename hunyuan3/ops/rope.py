"""Rotary position embedding on two axes (spec 6.3).

A text token at index i has the coordinates (i, i). The tokens of a picture have its rows and columns, centred on the
run of indices that the picture occupies. Frequencies alternate: even ones turn with y, odd ones with x. The table is
made once per sequence and indexed by position.
"""

from collections.abc import Sequence

import torch

from ..types import Grid, Span


def rope_positions(length: int, grids: Sequence[tuple[Span, Grid]]) -> torch.Tensor:
    """Integer coordinates of each token: (length, 2), int64, columns y and x.

    `grids`: for each picture its span and its grid; only the first grid.height * grid.width tokens of a span lie on
    the grid, the rest (padding patches) are placed like text. Half-integer centres are truncated.
    """
    positions = torch.arange(length).unsqueeze(1).repeat(1, 2)
    for span, (height, width) in grids:
        area = height * width
        first_y = int(span.start + (area - height) / 2)
        first_x = int(span.start + (area - width) / 2)
        on_grid = positions[span.start : span.start + area].view(height, width, 2)
        on_grid[..., 0] = first_y + torch.arange(height).unsqueeze(1)
        on_grid[..., 1] = first_x + torch.arange(width)
    return positions


def rope_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each (N, head_dim) float32, for coordinates (N, 2); the two halves are equal (tiled)."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim))
    yx = positions.float()
    angles = torch.empty(len(positions), head_dim // 2, device=positions.device)
    angles[:, 0::2] = yx[:, :1] * frequencies[0::2]
    angles[:, 1::2] = yx[:, 1:] * frequencies[1::2]
    tiled = angles.repeat(1, 2)
    return tiled.cos(), tiled.sin()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x (..., N, head_dim), split-half convention, by tables (N, head_dim). Result float32 (tables are)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
