"""Routed experts as two grouped matrix products (`torch.nn.functional.grouped_mm`, torch 2.10 and newer)."""

import torch
from torch.nn import functional as F

from ..ops.quantized import QuantizedWeight, Weight
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
    hidden = F.grouped_mm(x[dispatch.token[start:stop]], _dense(experts.gate_up, x.dtype).transpose(1, 2), offs=ends)
    value, gate = hidden.chunk(2, dim=-1)
    out[start:stop] = F.grouped_mm(value * F.silu(gate), _dense(experts.down, x.dtype).transpose(1, 2), offs=ends)


def _dense(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    return weight.dequantize(dtype) if isinstance(weight, QuantizedWeight) else weight
