"""Routed experts of one layer, as data."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from ..ops.product import Weight
from .dispatch import Dispatch


class ExpertWeights(NamedTuple):
    """A run of consecutive experts: E of them, the first being expert number `first` of its layer.

    gate_up (E, 2F, D): rows [:F] give x1, rows [F:] give x2 of `down(x1 * silu(x2))` (the activation is on the
    second half, unlike the usual convention; spec 2.3). down (E, D, F).
    Quantised weights are data as well, see ops.quantized.
    """

    first: int
    gate_up: Weight
    down: Weight

    @property
    def count(self) -> int:
        return self.gate_up.shape[0]


class ExpertBank(nn.Module):
    """All routed experts of a layer, resident: the weight source of the plain case.

    A weight source is anything with `chunks(dispatch)`: it yields the layer's experts, in one piece or in several, in
    any order, and may leave out those that nobody chose. It may free or overwrite a piece once the next is asked for.
    That is where streaming comes in from outside (placement.streaming).
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.chunk_size = num_experts

    def alone(self) -> "ExpertBank":
        """An empty bank for a single one of these experts, on the meta device."""
        with torch.device("meta"):
            _experts, doubled, hidden_size = self.gate_up.shape
            return ExpertBank(1, hidden_size, doubled // 2)

    def chunks(self, dispatch: Dispatch | None = None) -> Iterator[ExpertWeights]:
        """The experts in order, `chunk_size` at a time."""
        for first in range(0, self.gate_up.shape[0], self.chunk_size):
            part = slice(first, first + self.chunk_size)
            yield ExpertWeights(first, self.gate_up[part], self.down[part])
