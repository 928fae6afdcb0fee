"""Which experts a token goes to, and with what weight (spec 7.3)."""

from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

RouterPrecision = Literal["reference", "fp32"]

_EPS = torch.finfo(torch.float32).eps


class Routing(NamedTuple):
    """Choices of T tokens, best first: expert ids (T, K) int64 and combine weights (T, K) in the model's dtype."""

    ids: torch.Tensor
    weights: torch.Tensor


class Router(nn.Module):
    """Softmax gate with top-k and normalised weights.

    The weight is kept in float32. In a bfloat16 run the reference's autocast nevertheless runs this product in
    bfloat16, and 10 % of the choices depend on that, so `precision="reference"` follows; "fp32" keeps full precision.
    In a float32 run the two are the same.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.top_k = top_k
        self.precision: RouterPrecision = "reference"

    def forward(self, x: torch.Tensor) -> Routing:
        """(T, D) -> Routing of T tokens.

        1. logits, softmax in float32, top-k
        2. normalise over the chosen experts; the reference sums the probabilities rounded to the model's dtype
        """
        probabilities = self.logits(x).float().softmax(dim=-1)
        chosen, ids = probabilities.topk(self.top_k, dim=-1)
        total = chosen.to(x.dtype).float().sum(dim=-1, keepdim=True).to(x.dtype).float()
        return Routing(ids, (chosen / total.clamp(min=_EPS)).to(x.dtype))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, E): in x's dtype, or float32 when the precision says so."""
        if self.precision == "fp32":
            return F.linear(x.float(), self.weight.float())
        return F.linear(x, self.weight.to(x.dtype))
