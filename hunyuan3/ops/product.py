"""The product of activations with a weight, stored small or not: one call, whatever the weight is.

Where a weight is `dynamic`, the activations are quantised as well, a scale per token, and the product runs on small
numbers: int8 with an exact int32 sum, or e4m3. Each such product has a plain path that runs anywhere and a kernel where
the device has one. int8: both give the same bits. fp8: the same up to the order of summation and one rounding to
bfloat16.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F

from .quantized import QuantizedWeight, quantize

Weight = torch.Tensor | QuantizedWeight

_EXACT_SUM = 1024  # products of two int8 that a float32 sum holds exactly: 1024 * 127 * 127 < 2**24
_KERNEL_ROWS = 32  # CUDA's int8 product wants more than 16 rows


@dataclass(frozen=True)
class QuantizedRows:
    """Activations (..., in) with a scale per token: data int8 or e4m3, scale (..., 1) float32; `dtype` of products.

    Indexing acts on the leading axes, so tokens are quantised once and then gathered for their experts.
    """

    data: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> "QuantizedRows":
        return QuantizedRows(self.data[index], self.scale[index], self.dtype)


Rows = torch.Tensor | QuantizedRows


def rows_for(x: torch.Tensor, weight: Weight) -> Rows:
    """x (..., in) as this weight wants it: quantised token by token if the weight is dynamic, else as it is."""
    if not (isinstance(weight, QuantizedWeight) and weight.dynamic):
        return x
    stored = quantize(x, weight.scheme)
    return QuantizedRows(stored.data, stored.scales[0], x.dtype)


def linear(x: Rows, weight: Weight) -> torch.Tensor:
    """x (..., in) times a weight (out, in) -> (..., out), in the dtype that x has or had before it was quantised."""
    if not isinstance(weight, QuantizedWeight):
        return F.linear(x, weight)
    if not weight.dynamic:
        return F.linear(x, weight.dequantize(x.dtype))
    rows = x if isinstance(x, QuantizedRows) else rows_for(x, weight)
    data, scale = rows.data.flatten(0, -2), rows.scale.flatten(0, -2)
    if weight.scheme == "int8":
        product = int8_product if has_int8_kernel(data.device) else int8_product_plain
        out = (product(data, weight.data).float() * scale * weight.scales[0].mT).to(rows.dtype)
    elif rows.dtype == torch.bfloat16 and has_fp8_kernel(data.device):
        out = fp8_product(data, scale, weight)
    else:
        out = fp8_product_plain(data, scale, weight).to(rows.dtype)
    return out.view(*rows.data.shape[:-1], out.shape[-1])


def int8_product_plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 (T, in) times int8 (out, in) -> int32 (T, out), exact: float32 sums of blocks that cannot round."""
    total = torch.zeros(len(x), len(weight), dtype=torch.int32, device=x.device)
    for first in range(0, x.shape[1], _EXACT_SUM):
        part = slice(first, first + _EXACT_SUM)
        total += F.linear(x[:, part].float(), weight[:, part].float()).to(torch.int32)
    return total


def int8_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `int8_product_plain`, by the device's own int8 instructions."""
    missing = _KERNEL_ROWS - len(x)
    if x.device.type == "cuda" and missing > 0:
        return torch._int_mm(F.pad(x, (0, 0, 0, missing)), weight.mT)[: len(x)]
    return torch._int_mm(x, weight.mT)


def fp8_product_plain(x: torch.Tensor, scale: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """e4m3 (T, in) with scales (T, 1) times a weight (out, in) -> float32 (T, out)."""
    return F.linear(x.float(), weight.data.float()) * scale * weight.scales[0].mT


def fp8_product(x: torch.Tensor, scale: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """As `fp8_product_plain`, by the device's own fp8 instructions, rounded to bfloat16."""
    return torch._scaled_mm(
        x, weight.data.mT, scale_a=scale, scale_b=weight.scales[0].mT.contiguous(), out_dtype=torch.bfloat16
    )


@lru_cache(maxsize=16)
def has_int8_kernel(device: torch.device) -> bool:
    """Whether `int8_product` works on a device and gives the plain path's bits; tried once."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-127, 128, (32, 64), generator=generator).to(device, torch.int8) for _ in range(2))
    try:
        return torch.equal(int8_product(x, weight), int8_product_plain(x, weight))
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


@lru_cache(maxsize=16)
def has_fp8_kernel(device: torch.device) -> bool:
    """Whether `fp8_product` works on a device, agrees with the plain path, and gains: not on a CPU. Tried once."""
    if device.type == "cpu":
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (quantize(torch.randn(32, 64, generator=generator).to(device), "fp8") for _ in range(2))
    try:
        actual = fp8_product(x.data, x.scales[0], weight).float()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    expected = fp8_product_plain(x.data, x.scales[0], weight)
    return ((actual - expected).norm() / expected.norm()).item() < 1e-2
