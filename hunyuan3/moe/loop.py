"""Routed experts one after the other: the plain backend that works everywhere and is the reference for the others."""

import torch
from torch.nn import functional as F

from ..ops.product import linear, rows_for
from .dispatch import Dispatch
from .weights import ExpertWeights


def run_experts(x: torch.Tensor, dispatch: Dispatch, experts: ExpertWeights, out: torch.Tensor) -> None:
    """Writes `down(x1 * silu(x2))` of each pair of these experts to its row of `out`.

    Args:
        x: (T, D) tokens.
        dispatch: the pairs of all experts, in expert order.
        experts: some consecutive experts of the layer.
        out: (N, D); only the rows of these experts are written.
    """
    ends = dispatch.ends_on_host
    rows = rows_for(x, experts.gate_up)  # before the gather: a token is quantised once, not for each of its experts
    stop = ends[experts.first - 1] if experts.first else 0
    for index in range(experts.count):
        start, stop = stop, ends[experts.first + index]
        if start == stop:
            continue
        hidden = linear(rows[dispatch.token[start:stop]], experts.gate_up[index])
        value, gate = hidden.chunk(2, dim=-1)
        out[start:stop] = linear(value * F.silu(gate), experts.down[index])
