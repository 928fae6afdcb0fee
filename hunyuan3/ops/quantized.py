"""Weights stored small: one data class, a table of schemes, and a product that takes any of them.

A scheme stores a weight (..., out, in) as `data` and `scales`. Every scheme has a plain-torch path that runs anywhere;
where activations are quantised too, a faster kernel may serve, with the same numbers up to the order of summation.

* `fp8`: e4m3, one scale per output row. About 2.6 % relative error on Gaussian weights (three mantissa bits).
* `int8`: one scale per output row. About 0.9 %.
* `int4`: 16 levels, groups of 16 along the input, an fp8 scale per group under a float32 scale per row: 4.5 bits a
  weight. The levels are a Lloyd quantiser of Gaussian weights divided by their group's largest; a group's scale is
  signed and chosen among a few by error. About 7.0 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from einops import rearrange
from torch.nn import functional as F

from ..errors import RequestError

Scheme = Literal["fp8", "int8", "int4"]
SCHEMES: tuple[Scheme, ...] = ("fp8", "int8", "int4")

GROUP = 16
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_LEVELS = (
    -0.8953, -0.7142, -0.5670, -0.4376, -0.3196, -0.2101, -0.1046, 0.0,
    0.1010, 0.2032, 0.3086, 0.4181, 0.5360, 0.6677, 0.8263, 1.0146,
)  # fmt: skip
_SCALE_TRIALS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 1.03, 1.06)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (..., out, in), or a stack of them, in one scheme. Indexing and slicing act on the leading axes.

    data and scales by scheme:
        fp8, int8: data (..., out, in); scales: row (..., out, 1) float32.
        int4: data (..., out, in / 2) uint8, the even column in the low half; scales: group (..., out, in / 16) fp8 and
            row (..., out, 1) float32. A group's scale is signed.
    """

    scheme: Scheme
    data: torch.Tensor
    scales: tuple[torch.Tensor, ...]

    def __getitem__(self, index: Any) -> "QuantizedWeight":
        return QuantizedWeight(self.scheme, self.data[index], tuple(scale[index] for scale in self.scales))

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
        levels = torch.tensor(_LEVELS, device=self.data.device)
        codes = torch.stack((self.data & 15, self.data >> 4), dim=-1).flatten(-2).long()
        values = rearrange(levels[codes], "... (g n) -> ... g n", n=GROUP)
        return (values * (group.float() * row).unsqueeze(-1)).flatten(-2).to(dtype)


Weight = torch.Tensor | QuantizedWeight


def quantize(weight: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """Stores a float weight (..., out, in) in a scheme. For int4, `in` must be a multiple of 16."""
    values = weight.float()
    if scheme == "int8":
        scale = _safe(values.abs().amax(-1, keepdim=True) / 127)
        return QuantizedWeight("int8", (values / scale).round().to(torch.int8), (scale,))
    if scheme == "fp8":
        scale = _safe(values.abs().amax(-1, keepdim=True) / _FP8_MAX)
        return QuantizedWeight("fp8", (values / scale).to(_FP8), (scale,))
    if scheme == "int4":
        return _quantize_int4(values)
    raise RequestError(f"format {scheme!r} does not exist; choose one of {', '.join(SCHEMES)}.")


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """x (..., in) times a weight (out, in), quantised or not -> (..., out) in x's dtype."""
    if isinstance(weight, QuantizedWeight):
        return F.linear(x, weight.dequantize(x.dtype))
    return F.linear(x, weight)


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


def _quantize_int4(values: torch.Tensor) -> QuantizedWeight:
    if values.shape[-1] % GROUP:
        raise RequestError(f"int4 needs rows of a multiple of {GROUP} weights, this one has {values.shape[-1]}.")
    groups = rearrange(values, "... (g n) -> ... g n", n=GROUP)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)  # signed
    row = _safe(largest.abs().amax(-1, keepdim=True) * max(_SCALE_TRIALS) / _FP8_MAX)
    boundaries = torch.tensor([(a + b) / 2 for a, b in pairwise(_LEVELS)], device=values.device)
    levels = torch.tensor(_LEVELS, device=values.device)
    best_error, best_codes, best_scale = None, None, None
    for trial in _SCALE_TRIALS:
        scale = (largest * trial / row).to(_FP8)
        step = _safe_signed(scale.float() * row).unsqueeze(-1)
        codes = torch.bucketize(groups / step, boundaries)
        error = (levels[codes] * step - groups).square().sum(-1)
        if best_error is None:
            best_error, best_codes, best_scale = error, codes, scale.float()
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
            best_scale = torch.where(better, scale.float(), best_scale)
    codes = best_codes.flatten(-2).to(torch.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return QuantizedWeight("int4", packed, (best_scale.to(_FP8), row))


def _safe(scale: torch.Tensor) -> torch.Tensor:
    """A row of zeros gets the scale 1."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _safe_signed(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale != 0, scale, torch.ones_like(scale))
