"""Mixture-of-experts block: a shared MLP for every token plus the routed experts of its choice."""

import torch
from torch import nn

from ..config import MoEConfig
from .capacity import drop_over_capacity
from .dispatch import Dispatch, combine
from .mlp import MLP
from .router import Router
from .select import ExpertFn, expert_backend
from .weights import ExpertBank


class MoELayer(nn.Module):
    """`shared_mlp(x) + sum over chosen experts`. Dropless unless `drop_tokens` is set.

    `backend` computes experts (one signature, see `loop.run_experts`); `experts` is the weight source.
    """

    def __init__(self, config: MoEConfig, layer: int, hidden_size: int) -> None:
        super().__init__()
        width = config.intermediate_size[layer]
        self.num_experts = config.num_experts
        self.capacity_factor = config.capacity_factor
        self.drop_tokens = config.drop_tokens
        self.router = Router(hidden_size, config.num_experts, config.top_k[layer])
        self.shared_mlp = MLP(hidden_size, width * config.num_shared_experts[layer])
        self.experts = ExpertBank(config.num_experts, hidden_size, width)
        self.backend: ExpertFn = expert_backend("loop")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D).

        1. choose experts for each token
        2. sort the (token, choice) pairs by expert
        3. run each expert on its block of rows
        4. add each token's contributions, first choice first, to the shared MLP's
        """
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat)
        if self.drop_tokens:
            routing = drop_over_capacity(routing, self.num_experts, self.capacity_factor)
        dispatch = Dispatch.sort(routing.ids, self.num_experts)
        outputs = flat.new_empty(len(dispatch.token), flat.shape[1])
        for experts in self.experts.chunks(dispatch):
            self.backend(flat, dispatch, experts, outputs)
        return (self.shared_mlp(flat) + combine(outputs, dispatch, routing)).view_as(x)
