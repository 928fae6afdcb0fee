"""Attention over a sequence that is causal text with bidirectional picture spans, without a dense mask (spec 6.2).

Cut at the borders of the spans, the square mask falls apart into runs of queries. The queries of a span see every key
up to the span's end, no mask needed; the queries of a text run see the keys up to themselves. So each run is one
`scaled_dot_product_attention`, the large ones (pictures) maskless, which is what the fast kernels want. Grouped-query
attention: the queries that share a key head are folded into the token axis, so keys and values are never repeated.

Shapes: B rows, Hq query heads, Hk key heads, G = Hq / Hk, T queries, S keys, D head dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from einops import rearrange
from torch.nn import functional as F

from ..errors import RequestError
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


def span_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, attend: "AttendFn"
) -> torch.Tensor:
    """Attention of queries (B, Hq, T, D) over keys and values (B, Hk, S, D) -> (B, T, Hq * D).

    The queries are those of `plan`, in order; key j is the key at position j, so S >= the plan's end. `attend` is one
    of the backends below.
    """
    offset = plan[0].start
    outputs = [
        attend(
            q[:, :, run.start - offset : run.stop - offset],
            k[:, :, : run.stop],
            v[:, :, : run.stop],
            # A single causal query at the end sees every key, too.
            not run.full and run.stop - run.start > 1,
        )
        for run in plan
    ]
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return rearrange(out, "b h t d -> b t (h d)")


AttendFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""`attend(q, k, v, causal)`: q (B, Hq, T, D), k and v (B, Hk, S, D) -> (B, Hq, T, D).

Every query sees every key, or if `causal` the last query sees all keys and each earlier one a key less.
"""


def attend_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """PyTorch's fused attention, which picks a kernel for the device."""
    groups = q.shape[1] // k.shape[1]
    if not causal:
        folded = rearrange(q, "b (h g) t d -> b h (g t) d", g=groups)
        out = F.scaled_dot_product_attention(folded, k, v)
        return rearrange(out, "b h (g t) d -> b (h g) t d", g=groups)
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
    mask = _lower_right(q.shape[2], k.shape[2], q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)


def attend_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention written out, softmax in float32: the reference for the others. Holds all T x S weights."""
    grouped = rearrange(q, "b (h g) t d -> b h g t d", h=k.shape[1])
    scores = (grouped @ k.unsqueeze(2).transpose(-2, -1)).float() * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(~_lower_right(q.shape[2], k.shape[2], q.device), float("-inf"))
    out = scores.softmax(dim=-1).to(v.dtype) @ v.unsqueeze(2)
    return rearrange(out, "b h g t d -> b (h g) t d")


AttentionBackend = Literal["auto", "sdpa", "math"]
ATTENTION_BACKENDS: tuple[AttentionBackend, ...] = ("auto", "sdpa", "math")
_BACKENDS: dict[str, AttendFn] = {"auto": attend_sdpa, "sdpa": attend_sdpa, "math": attend_math}


def attention_backend(name: str) -> AttendFn:
    """The function of a named backend; "auto" is "sdpa". Raises RequestError for another name."""
    if name not in _BACKENDS:
        raise RequestError(f"attention is {name!r}; it must be one of {', '.join(_BACKENDS)}.")
    return _BACKENDS[name]


@lru_cache(maxsize=8)
def _lower_right(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Boolean (queries, keys): the last query sees all keys, each earlier one a key less."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
