"""Keys and values of what was already computed, in place, one pair of tensors per layer.

The prompt is written once; the positions of the picture being drawn are overwritten at every denoise step. Keys are
stored rotated and normalised.
"""

import copy
from collections.abc import Sequence

import torch


class KVCache:
    """Fixed-length cache of `rows` sequences: per layer keys and values (rows, kv_heads, length, head_dim).

    `devices`: of each layer.
    """

    def __init__(
        self,
        *,
        devices: Sequence[torch.device],
        rows: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        shape = (rows, kv_heads, length, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for device in devices]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for device in devices]

    def write(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores keys and values (rows, kv_heads, T, head_dim) at positions [start, start + T).

        Returns those of all positions [0, start + T), as views.
        """
        stop = start + keys.shape[2]
        assert stop <= self.keys[layer].shape[2], f"position {stop} is beyond the cache's end"
        self.keys[layer][:, :, start:stop] = keys
        self.values[layer][:, :, start:stop] = values
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]

    def fill(self, rows: slice, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], length: int) -> None:
        """Copies the first `length` positions of one row, per layer (1, kv_heads, >= length, head_dim), to `rows`."""
        for ours, theirs in zip((*self.keys, *self.values), (*keys, *values), strict=True):
            ours[rows, :, :length] = theirs[:1, :, :length]

    def view(self, rows: slice) -> "KVCache":
        """Some rows of this cache, sharing its memory."""
        view = copy.copy(self)
        view.keys = [keys[rows] for keys in self.keys]
        view.values = [values[rows] for values in self.values]
        return view

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(t.nbytes for t in (*self.keys, *self.values))
