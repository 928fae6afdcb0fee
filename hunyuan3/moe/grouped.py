"""Routed experts as two grouped matrix products (`torch.nn.functional.grouped_mm`, torch 2.10 and newer).

With quantised activations (fp8) it is `scaled_grouped_mm`, which few devices have. Any other quantised weight is read
back for the product, a chunk of experts at a time.
"""

import torch
from torch.nn import functional as F

from ..ops.product import QuantizedRows, Rows, Weight, rows_for
from ..ops.quantized import QuantizedWeight
from .dispatch import Dispatch
from .weights import ExpertWeights


def run_experts(x: torch.Tensor, dispatch: Dispatch, experts: ExpertWeights, out: torch.Tensor) -> None:
    """Same contract as `loop.run_experts`. With all experts at once nothing waits for the device."""
    num_experts = len(dispatch.ends)
    last = experts.first + experts.count
    if experts.count == num_experts:
        start, stop, ends = 0, len(dispatch.token), dispatch.ends
    else:
        start = int(dispatch.ends[experts.first - 1]) if experts.first else 0
        stop = int(dispatch.ends[last - 1])
        ends = dispatch.ends[experts.first : last] - start
    if start == stop:
        return
    hidden = _product(rows_for(x, experts.gate_up)[dispatch.token[start:stop]], experts.gate_up, ends)
    value, gate = hidden.chunk(2, dim=-1)
    out[start:stop] = _product(rows_for(value * F.silu(gate), experts.down), experts.down, ends)


def _product(rows: Rows, weight: Weight, ends: torch.Tensor) -> torch.Tensor:
    """Rows (N, in) in expert order times their experts' weights (E, out, in) -> (N, out)."""
    if isinstance(rows, QuantizedRows):
        by_row = F.ScalingType.RowWise
        return F.scaled_grouped_mm(
            rows.data,
            weight.data.transpose(1, 2),
            rows.scale.squeeze(-1),
            by_row,
            weight.scales[0].squeeze(-1),
            by_row,
            offs=ends,
            output_dtype=rows.dtype,
        )
    dense = weight.dequantize(rows.dtype) if isinstance(weight, QuantizedWeight) else weight
    return F.grouped_mm(rows, dense.transpose(1, 2), offs=ends)
