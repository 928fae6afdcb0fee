"""The reference's capacity rule (`moe_drop_tokens`), for compatibility only (spec 7.4).

Each expert takes at most C pairs; all first choices come before all second choices, rows in batch order, so the
conditional row is served before the unconditional one. What is dropped contributes nothing and the remaining weights
are not raised to make up for it. The result therefore depends on what else is in the batch.
"""

import torch

from .router import Routing


def expert_capacity(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Pairs that one expert may take out of `tokens * top_k`."""
    return int(max(top_k, (top_k * tokens) // num_experts) * factor)


def drop_over_capacity(routing: Routing, num_experts: int, factor: float) -> Routing:
    """The same choices with the weight of every dropped pair set to zero."""
    tokens, top_k = routing.ids.shape
    capacity = expert_capacity(tokens, top_k, num_experts, factor)
    by_rank = routing.ids.t().reshape(-1)  # all first choices, then all second choices, ...
    ordinal = torch.nn.functional.one_hot(by_rank, num_experts).cumsum(0).gather(1, by_rank.unsqueeze(1)).squeeze(1)
    kept = (ordinal <= capacity).view(top_k, tokens).t()
    return Routing(routing.ids, routing.weights * kept)
