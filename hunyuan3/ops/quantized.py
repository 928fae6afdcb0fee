"""Weights stored small: one data class and a table of schemes. The products with them are in `product.py`.

A scheme stores a weight (..., out, in) as `data` and `scales`, and every scheme can be read back anywhere.

* `fp8`: e4m3, one scale per output row. About 2.6 % relative error on Gaussian weights (three mantissa bits).
* `int8`: one scale per output row. About 0.9 %.
* `int4`: 16 levels, groups of 16 along the input, an fp8 scale per group under a float32 scale per row: 4.5 bits a
  weight. The levels are a Lloyd quantiser of Gaussian weights divided by their group's largest; a group's scale is
  signed and chosen among a few by error. About 6.8 %. (`benchmarks/formats.py` derives the levels and compares
  other groups and codebooks.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
from einops import rearrange

from ..errors import RequestError

Scheme = Literal["fp8", "int8", "int4"]
SCHEMES: tuple[Scheme, ...] = ("fp8", "int8", "int4")

GROUP = 16
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_LEVELS = (
    -0.9302, -0.7442, -0.5910, -0.4561, -0.3323, -0.2181, -0.1077, 0.0,
    0.1045, 0.2118, 0.3275, 0.4540, 0.5944, 0.7596, 0.9869, 1.1610,
)  # fmt: skip
# A group's scale is its largest weight times one of these. Eleven instead of six gain 0.03 % of error.
_SCALE_TRIALS = (1.0, 0.93, 0.86, 0.79, 0.72, 1.05)
# A weight over its scale -> level, by a table over [-_EDGE, _EDGE): looking up is ten times as fast as searching.
_BINS, _EDGE = 4096, 1.5
# Weights that are quantised at once: on a CPU what stays in its cache, elsewhere what a small card has room for.
_CPU_BLOCK, _BLOCK = 2**18, 2**26


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (..., out, in), or a stack of them, in one scheme. Indexing and slicing act on the leading axes.

    dynamic: whether the activations that it is multiplied by are quantised, too, token by token (fp8 and int8).
    data and scales by scheme:
        fp8, int8: data (..., out, in); scales: row (..., out, 1) float32.
        int4: data (..., out, in / 2) uint8, the even column in the low half; scales: group (..., out, in / 16) fp8 and
            row (..., out, 1) float32. A group's scale is signed.
    """

    scheme: Scheme
    data: torch.Tensor
    scales: tuple[torch.Tensor, ...]
    dynamic: bool = False

    def __getitem__(self, index: Any) -> "QuantizedWeight":
        scales = tuple(scale[index] for scale in self.scales)
        return QuantizedWeight(self.scheme, self.data[index], scales, self.dynamic)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight itself."""
        *lead, columns = self.data.shape
        return (*lead, 2 * columns if self.scheme == "int4" else columns)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + sum(scale.nbytes for scale in self.scales)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (..., out, in) in a float dtype."""
        if self.scheme != "int4":
            return (self.data.float() * self.scales[0]).to(dtype)
        group, row = self.scales
        pairs = _tables(self.data.device).pairs.index_select(0, self.data.flatten().int())
        values = pairs.view(*group.shape, GROUP)  # two columns from each byte
        return (values * (group.float() * row).unsqueeze(-1)).flatten(-2).to(dtype)


Weight = torch.Tensor | QuantizedWeight


def quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """Stores a float weight (..., out, in) in a scheme. For int4, `in` must be a multiple of 16."""
    if scheme not in _QUANTIZERS:
        raise RequestError(f"format {scheme!r} does not exist; choose one of {', '.join(SCHEMES)}.")
    rows = weight.reshape(weight.shape[:-1].numel(), weight.shape[-1])
    block = max(1, (_CPU_BLOCK if rows.device.type == "cpu" else _BLOCK) // rows.shape[1])
    starts = range(0, max(1, len(rows)), block)  # no rows are one empty block
    parts = [_QUANTIZERS[scheme](rows[first : first + block].float()) for first in starts]
    joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    data, *scales = (tensor.view(*weight.shape[:-1], tensor.shape[-1]) for tensor in joined)
    return QuantizedWeight(scheme, data, tuple(scales))


def scale_shapes(shape: Sequence[int], scheme: Scheme) -> tuple[tuple[int, ...], ...]:
    """Shapes of the scales of a weight of this shape."""
    row = (*shape[:-1], 1)
    return ((*shape[:-1], shape[-1] // GROUP), row) if scheme == "int4" else (row,)


def scale_dtypes(scheme: Scheme) -> tuple[torch.dtype, ...]:
    """Dtypes of the scales."""
    return (_FP8, torch.float32) if scheme == "int4" else (torch.float32,)


def data_shape(shape: Sequence[int], scheme: Scheme) -> tuple[int, ...]:
    """Shape of the data of a weight of this shape."""
    return (*shape[:-1], shape[-1] // 2) if scheme == "int4" else tuple(shape)


def data_dtype(scheme: Scheme) -> torch.dtype:
    """Dtype of the data."""
    return {"fp8": _FP8, "int8": torch.int8, "int4": torch.uint8}[scheme]


def _quantize_int8(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scale = _safe(values.abs().amax(-1, keepdim=True) / 127)
    return (values / scale).round_().to(torch.int8), scale


def _quantize_fp8(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    scale = _safe(values.abs().amax(-1, keepdim=True) / _FP8_MAX)
    return (values / scale).to(_FP8), scale


def _quantize_int4(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if values.shape[-1] % GROUP:
        raise RequestError(f"int4 needs rows of a multiple of {GROUP} weights, this one has {values.shape[-1]}.")
    tables = _tables(values.device)
    groups = rearrange(values, "r (g n) -> r g n", n=GROUP)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)  # signed
    row = _safe(largest.abs().amax(-1, keepdim=True) * max(_SCALE_TRIALS) / _FP8_MAX)
    best_error, best_scale = None, None
    for trial in _SCALE_TRIALS:
        scale = (largest * trial / row).to(_FP8).float()
        step = _safe_signed(scale * row)
        levels = tables.levels.index_select(0, _bins(groups, step)).view_as(groups)
        error = levels.mul_(step.unsqueeze(-1)).sub_(groups).square_().sum(-1)
        if best_error is None:
            best_error, best_scale = error, scale
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
    codes = tables.codes.index_select(0, _bins(groups, _safe_signed(best_scale * row))).view_as(values)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), best_scale.to(_FP8), row


_QUANTIZERS = {"fp8": _quantize_fp8, "int8": _quantize_int8, "int4": _quantize_int4}


@dataclass(frozen=True)
class _Tables:
    """codes (bins,) uint8 and levels (bins,) float32 of each bin; pairs (256, 2) float32: the levels of a byte."""

    codes: torch.Tensor
    levels: torch.Tensor
    pairs: torch.Tensor


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> _Tables:
    levels = torch.tensor(_LEVELS)
    boundaries = torch.tensor([(a + b) / 2 for a, b in pairwise(_LEVELS)])
    centres = (torch.arange(_BINS) + 0.5) * (2 * _EDGE / _BINS) - _EDGE
    codes = torch.bucketize(centres, boundaries)
    byte = torch.arange(256)
    pairs = torch.stack((levels[byte & 15], levels[byte >> 4]), dim=-1)
    return _Tables(codes.to(torch.uint8).to(device), levels[codes].to(device), pairs.to(device))


def _bins(groups: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Bin of each weight (r, g, n) over its group's step (r, g), flat."""
    place = groups * ((_BINS / (2 * _EDGE)) / step).unsqueeze(-1)
    # A weight that is no number would be a place outside of the table.
    return place.add_(_BINS / 2).nan_to_num_(0).clamp_(0, _BINS - 1).to(torch.int32).reshape(-1)


def _safe(scale: torch.Tensor) -> torch.Tensor:
    """A row of zeros gets the scale 1. One that holds no number keeps a scale that is none: it must not be hidden."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _safe_signed(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale != 0, scale, torch.ones_like(scale))
