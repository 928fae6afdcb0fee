"""The gated MLP of this family: one matrix for both halves, the activation on the second (spec 2.3)."""

import torch
from torch import nn
from torch.nn import functional as F


class MLP(nn.Module):
    """`down(x1 * silu(x2))` with `x1, x2 = gate_and_up(x)`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_and_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        value, gate = self.gate_and_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(value * F.silu(gate))
