"""Attention over a sequence that is causal text with bidirectional picture spans, without a dense mask (spec 6.2).

Cut at the borders of the spans, the square mask falls apart into runs of queries. The queries of a span see every key
up to the span's end, no mask needed; the queries of a text run see the keys up to themselves. So each run is one
`scaled_dot_product_attention`, the large ones (pictures) maskless, which is what the fast kernels want. Grouped-query
attention: the queries that share a key head are folded into the token axis, so keys and values are never repeated.

Shapes: B rows, Hq query heads, Hk key heads, G = Hq / Hk, T queries, S keys, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch.nn import functional as F

from ..types import Span


@dataclass(frozen=True)
class AttentionRun:
    """Queries at positions `start <= i < stop`; a `full` one sees the keys [0, stop), else each sees [0, i]."""

    start: int
    stop: int
    full: bool


AttentionPlan = tuple[AttentionRun, ...]


def plan_attention(window: Span, full_spans: Sequence[Span]) -> AttentionPlan:
    """Cuts the queries at positions `window` at the borders of the bidirectional spans.

    Every span must lie wholly inside the window or wholly outside (before: already in the cache).
    """
    runs: list[AttentionRun] = []
    position = window.start
    for span in sorted(full_spans):
        if span.stop <= window.start or span.start >= window.stop:
            continue
        assert window.start <= span.start and span.stop <= window.stop, (window, span)
        if position < span.start:
            runs.append(AttentionRun(position, span.start, full=False))
        runs.append(AttentionRun(span.start, span.stop, full=True))
        position = span.stop
    if position < window.stop:
        runs.append(AttentionRun(position, window.stop, full=False))
    return tuple(runs)


def span_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Attention of queries (B, Hq, T, D) over keys and values (B, Hk, S, D) -> (B, T, Hq * D).

    The queries are those of `plan`, in order; key j is the key at position j, so S >= the plan's end.
    """
    groups = q.shape[1] // k.shape[1]
    offset = plan[0].start
    outputs = []
    for run in plan:
        q_run = q[:, :, run.start - offset : run.stop - offset]
        k_run, v_run = k[:, :, : run.stop], v[:, :, : run.stop]
        outputs.append(_attend(q_run, k_run, v_run, groups, None if run.full else run.start))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return rearrange(out, "b h t d -> b t (h d)")


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int, causal_from: int | None) -> torch.Tensor:
    """One run. `causal_from`: the position of its first query if it is causal, None if it sees every key."""
    if causal_from is None or q.shape[2] == 1:  # a single causal query at the end sees every key, too
        folded = rearrange(q, "b (h g) t d -> b h (g t) d", g=groups)
        out = F.scaled_dot_product_attention(folded, k, v)
        return rearrange(out, "b h (g t) d -> b (h g) t d", g=groups)
    if causal_from == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
    mask = _lower_right(q.shape[2], k.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)


@lru_cache(maxsize=8)
def _lower_right(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Boolean (queries, keys): the last query sees all keys, each earlier one a key less."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
