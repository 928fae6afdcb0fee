"""Experts that stay in their files and are read into a slot each time they are needed: where host memory is too small.

Only weights that are used as they are stored can be read like this (a pack, or the published bfloat16): quantising
them anew in every step would take longer than everything else.
"""

from collections.abc import Callable, Mapping

from torch import nn

from ..checkpoint.index import CheckpointIndex
from ..checkpoint.keymap import Slot
from ..checkpoint.read import TORCH_DTYPES, TensorReader
from .copier import copy_expert, is_in_files

TensorsOf = Callable[[nn.Module], Mapping[str, tuple[str, Slot]]]
"""Of the expert that a bank of one stands for: parameter of the bank -> (published tensor name, its slot)."""


class ExpertFiles:
    """Copies experts into banks, those that are in host memory from there, the others from their files.

    Used by one thread at a time.
    """

    def __init__(self, index: CheckpointIndex, tensors_of: TensorsOf, *, pinned: bool) -> None:
        """`pinned`: whether to read by way of page-locked memory where the target is not on the CPU."""
        self._index = index
        self._tensors_of = tensors_of
        self._pinned = pinned
        self._reader: TensorReader | None = None
        self.bytes_read = 0

    def copy(self, source: nn.Module, target: nn.Module) -> None:
        """Fills `target` with the expert of `source`. Raises CheckpointError if a file cannot be read."""
        if not is_in_files(source):
            copy_expert(source, target)
            return
        reader = self._reader = self._reader or TensorReader(pinned=self._pinned)
        for name, (published, slot) in self._tensors_of(source).items():
            info = self._index[published]
            self._index.require_unchanged(info.file)
            place = getattr(target, name).data
            place = place if slot.expert is None else place[slot.expert]
            if place.device.type == "cpu" and place.dtype == TORCH_DTYPES[info.dtype]:
                reader.into(info, place)
            else:
                place.copy_(reader.get(info))  # waits: the reader's buffer is overwritten next
            self.bytes_read += info.nbytes
