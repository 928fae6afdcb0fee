"""Sort (token, choice) pairs by expert, so that an expert's work is one contiguous block of rows; and add up again.

T tokens, K choices each, N = T * K pairs.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from .router import Routing


@dataclass(frozen=True)
class Dispatch:
    """The pairs in expert order.

    token: (N,) int64, the token of each sorted pair. place: (T, K) int64, where pair (t, k) went. ends: (E,) int32,
    cumulative number of pairs up to and including each expert.
    """

    token: torch.Tensor
    place: torch.Tensor
    ends: torch.Tensor

    @cached_property
    def ends_on_host(self) -> list[int]:
        """`ends` as numbers. Waits for the device, once."""
        return self.ends.tolist()

    @property
    def chosen(self) -> list[int]:
        """The experts that somebody chose, in order. Waits for the device, once."""
        starts = (0, *self.ends_on_host[:-1])
        return [
            expert for expert, (start, end) in enumerate(zip(starts, self.ends_on_host, strict=True)) if start < end
        ]

    @classmethod
    def sort(cls, ids: torch.Tensor, num_experts: int) -> "Dispatch":
        """From expert choices (T, K). Stable: an expert's rows stay in token order."""
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=ids.device)
        # One-hot sum instead of bincount: bincount on CUDA waits for the device to know its output size.
        counts = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        return cls(order // ids.shape[1], place.view_as(ids), counts.cumsum(0, dtype=torch.int32))


def combine(outputs: torch.Tensor, dispatch: Dispatch, routing: Routing) -> torch.Tensor:
    """Weighted sum of each token's K expert outputs: (N, D) in expert order -> (T, D).

    Summed in float32 from the first choice to the last: the order never depends on how or when the experts ran, so a
    streamed or chunked run agrees with a resident one to the bit.
    """
    weights = routing.weights.float()
    total = outputs.index_select(0, dispatch.place[:, 0]).float() * weights[:, :1]
    for choice in range(1, weights.shape[1]):
        total.addcmul_(outputs.index_select(0, dispatch.place[:, choice]).float(), weights[:, choice : choice + 1])
    return total.to(outputs.dtype)
