"""A key-value cache that gradients pass through: what each pass adds is appended, nothing is overwritten."""

import torch


class GrowingCache:
    """Stands in for `transformer.kv_cache.KVCache` in training.

    Passes come in the order of the sequence. A pass may have more rows than those before it: what these left is then
    repeated, row by row, so that a beginning which rows share is computed, and its gradient summed, once.
    """

    def __init__(self, layers: int) -> None:
        self._keys: list[torch.Tensor | None] = [None] * layers
        self._values: list[torch.Tensor | None] = [None] * layers

    def fork(self) -> "GrowingCache":
        """A cache that goes on from what is in this one, which stays as it is."""
        forked = GrowingCache(0)
        forked._keys, forked._values = list(self._keys), list(self._values)
        return forked

    def write(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `KVCache.write`: appends (rows, kv_heads, T, head_dim) at `start`, returns all from position 0 on."""
        before = self._keys[layer]
        if before is None:
            assert start == 0, "the first pass begins at position 0"
        else:
            assert start == before.shape[2], f"position {start} does not follow {before.shape[2]}"
            repeats = keys.shape[0] // before.shape[0]
            keys = torch.cat((before.repeat_interleave(repeats, 0), keys), dim=2)
            values = torch.cat((self._values[layer].repeat_interleave(repeats, 0), values), dim=2)
        self._keys[layer], self._values[layer] = keys, values
        return keys, values
