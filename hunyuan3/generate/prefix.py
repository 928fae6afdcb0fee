"""Keys and values of prompts that were already computed, kept for the next drawing or the next stage.

Everything before the picture depends on text and input pictures alone, so a new seed needs none of it again, and what
the model thought is drawn from where it stopped. Only an identical beginning counts: same token ids, same pictures,
and a bidirectional span only as a whole. And only a request that goes on from a kept one may use it: two requests that
merely begin alike (the same system prompt) do not, because starting elsewhere rounds differently, and a drawing should
not depend, not even in its last bits, on what was drawn before it. A store belongs to one set of weights and dies with
it.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from ..transformer.kv_cache import KVCache
from ..types import Span
from .rows import SequenceRows

TEXT = "text"  # kind of a prefix that a text pass left
_ENTRIES = 4  # two branches of a drawing, and of the text before it or of the drawing before that


@dataclass(frozen=True)
class Prefix:
    """The first `len(ids)` positions of one row: per layer keys and values (1, kv_heads, length, head_dim).

    request: how many of them were given; the model wrote the rest. kind: how they were computed, "text" or "draw" with
    the number of branches in the pass: numbers of different passes differ in their last bits.
    """

    ids: tuple[int, ...]
    request: int
    pictures: tuple[tuple[Span, str], ...]
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    kind: str = TEXT

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def common_length(self, ids: tuple[int, ...], rows: SequenceRows) -> int:
        """How many positions of a row with these ids and pictures this prefix holds the keys of."""
        length = 0
        for ours, theirs in zip(self.ids, ids, strict=False):
            if ours != theirs:
                break
            length += 1
        mine, wanted = dict(self.pictures), dict(shown(rows))
        for span in sorted(mine.keys() | wanted.keys()):
            if span.start < length and mine.get(span) != wanted.get(span):
                length = span.start
        for span in rows.full_spans:
            if span.start < length < span.stop:
                length = span.start
        return length


class PrefixStore:
    """The most recently used prefixes, a handful."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, tuple[int, ...], tuple[tuple[Span, str], ...]], Prefix] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(entry.nbytes for entry in self._entries.values())

    def find(
        self, ids: tuple[int, ...], rows: SequenceRows, *, kind: str = TEXT, partly: bool = False
    ) -> tuple[Prefix | None, int]:
        """The prefix of a kind that covers most of a row, and how much; (None, 0) if none does.

        A prefix serves if the row holds its whole request; with `partly` any common beginning will do.
        """
        best, length = None, 0
        for key, entry in self._entries.items():
            common = entry.common_length(ids, rows) if entry.kind == kind else 0
            if common > length and (partly or common >= entry.request):
                best, length = key, common
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        return self._entries[best], length

    def keep(
        self,
        ids: tuple[int, ...],
        rows: SequenceRows,
        cache: KVCache,
        row: int,
        *,
        kind: str = TEXT,
        request: int | None = None,
    ) -> None:
        """Keeps the keys and values of the first `len(ids)` positions of one row of a cache (copied).

        `request`: how many of them were given, None for all.
        """
        length = len(ids)
        pictures = tuple((span, key) for span, key in shown(rows) if span.stop <= length)
        keys = tuple(k[row : row + 1, :, :length].clone() for k in cache.keys)
        values = tuple(v[row : row + 1, :, :length].clone() for v in cache.values)
        request = len(ids) if request is None else request
        self._entries[kind, ids, pictures] = Prefix(ids, request, pictures, keys, values, kind)
        self._entries.move_to_end((kind, ids, pictures))
        while len(self._entries) > _ENTRIES:
            self._entries.popitem(last=False)

    def clear(self) -> int:
        """Gives everything up; returns the bytes freed."""
        freed = self.nbytes
        self._entries.clear()
        return freed


def shown(rows: SequenceRows) -> list[tuple[Span, str]]:
    """The input pictures of a request: the span of each (separator included) and its key."""
    return [(span, picture.key) for span, picture in zip(rows.sequence.joint_spans, rows.pictures, strict=True)]
