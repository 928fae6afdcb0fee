"""Page-locked host memory, from which a CUDA card copies at the link's full rate and beside its work.

Ordinary memory is locked where it lies (`cudaHostRegister`): torch's own pinned allocations are rounded up to a power
of two, which for an expert of the published model wastes a quarter of the RAM. What is locked must be unlocked before
it is freed, so whoever locks keeps the tensors until then.
"""

import logging
import weakref
from collections.abc import Callable, Iterable

import torch

_log = logging.getLogger(__name__)

_PORTABLE = 1  # cudaHostRegisterPortable: locked for every card, not for the current one alone

Register = Callable[[int, int], int]  # (address, bytes) -> CUDA's error code, 0 for none
Unregister = Callable[[int], int]


class PageLock:
    """What is locked, by name. Everything is unlocked when this dies."""

    def __init__(self, limit: int | None, register: Register, unregister: Unregister) -> None:
        """`limit`: bytes that may be locked, None for all; what is beyond stays as it is and is copied more slowly."""
        self.limit = limit
        self._register = register
        self._unregister = unregister
        self._held: dict[str, list[torch.Tensor]] = {}
        self._gave_up = False
        weakref.finalize(self, _unlock_all, self._held, unregister)

    @classmethod
    def for_devices(cls, devices: Iterable[torch.device], limit: int | None) -> "PageLock | None":
        """For CUDA cards (ROCm included); None if none of them is one: others do not need it."""
        cards = [device for device in devices if device.type == "cuda"]
        if not cards:
            return None
        runtime = torch.cuda.cudart()

        def unregister(address: int) -> int:
            for card in cards:
                torch.cuda.synchronize(card)  # nothing may still be copied from or to it
            return int(runtime.cudaHostUnregister(address))

        def register(address: int, nbytes: int) -> int:
            return int(runtime.cudaHostRegister(address, nbytes, _PORTABLE))

        return cls(limit, register, unregister)

    @property
    def nbytes(self) -> int:
        """Bytes that are locked."""
        return sum(tensor.nbytes for tensors in self._held.values() for tensor in tensors)

    def lock(self, name: str, tensors: Iterable[torch.Tensor]) -> None:
        """Locks tensors in host memory, as far as the limit and the system allow."""
        for tensor in tensors:
            if self._gave_up or (self.limit is not None and self.nbytes + tensor.nbytes > self.limit):
                return
            code = self._register(tensor.data_ptr(), tensor.nbytes)
            if code:
                _log.warning(
                    "Page-locking host memory failed (CUDA error %d) after %.1f GiB; the rest is copied more slowly.",
                    code,
                    self.nbytes / 2**30,
                )
                self._gave_up = True
                return
            self._held.setdefault(name, []).append(tensor)

    def unlock(self, name: str) -> None:
        """Unlocks what was locked under a name. Before it is freed or replaced."""
        _unlock(self._held.pop(name, []), self._unregister)


def _unlock(tensors: list[torch.Tensor], unregister: Unregister) -> None:
    for tensor in tensors:
        unregister(tensor.data_ptr())


def _unlock_all(held: dict[str, list[torch.Tensor]], unregister: Unregister) -> None:
    for tensors in held.values():
        _unlock(tensors, unregister)
    held.clear()
