"""The slots on the device through which experts come, and which expert comes into which."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from .copier import Copier, RingSlot


@dataclass
class _Fetch:
    source: nn.Module
    slot: RingSlot


class ExpertRing:
    """The slots, and which expert comes into which: in a cycle, or as asked.

    What is under way is known by its source, so what was fetched ahead serves whoever asks for it.
    """

    def __init__(self, make_slot: Callable[[], RingSlot], count: int, copier: Copier) -> None:
        """`make_slot` allocates one on the device; all `count` (at least 2) are made when first needed."""
        assert count >= 2, "one is computed while the next is copied"
        self._make_slot = make_slot
        self.count = count
        self._copier = copier
        self._slots: list[RingSlot] = []
        self._free: deque[RingSlot] = deque()
        self._under_way: deque[_Fetch] = deque()
        self._taken: list[RingSlot] = []
        self._turn = 0  # counts resets: a pass that failed must not give its slot back after one

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that are there."""
        return sum(slot.nbytes for slot in self._slots)

    @property
    def num_free(self) -> int:
        """Slots that hold nothing anybody waits for."""
        return len(self._free)

    def run(
        self, sources: Sequence[nn.Module], start: int, count: int, *, cyclic: bool
    ) -> Iterator[tuple[int, nn.Module]]:
        """Yields (position, bank on the device) for `count` positions of `sources` from `start`; each is free to be
        overwritten when the next is asked for.

        cyclic: copies go on beyond the last position, from its end to the beginning of `sources`.
        """
        self._begin_pass()
        coming = [fetch.source for fetch in self._under_way]
        if not all(source is sources[(start + i) % len(sources)] for i, source in enumerate(coming)):
            self.reset()  # something else was expected
        turn, ahead = self._turn, start + count + (len(sources) if cyclic else 0)
        for step in range(count):
            self._fill(sources, start + step, ahead)
            fetch = self._under_way.popleft()
            self._taken.append(fetch.slot)
            try:
                self._copier.wait(fetch.slot)
                yield start + step, fetch.slot.bank
            finally:
                if turn == self._turn:
                    self._give_back(fetch.slot)
        self._fill(sources, start + count, ahead)

    def order(self, sources: Sequence[nn.Module]) -> list[int]:
        """Indices of `sources` in the order in which to run them: what is under way comes first.

        Everything else that is under way is forgotten.
        """
        left = {id(source): index for index, source in enumerate(sources)}
        coming, self._under_way = self._under_way, deque()
        found = []
        for fetch in coming:
            index = left.pop(id(fetch.source), None)
            if index is None:
                self._copier.forget(fetch.slot)
                self._free.append(fetch.slot)
            else:
                self._under_way.append(fetch)
                found.append(index)
        return [*found, *left.values()]

    def begin(self, sources: Sequence[nn.Module]) -> list[int]:
        """Begins to copy these, as many as there are slots for; returns the indices of those that were not under way.

        Everything else that is under way is forgotten.
        """
        self._begin_pass()
        order = self.order(sources)
        before = len(self._under_way)
        self._fill([sources[index] for index in order], 0, len(order))
        return order[before : len(self._under_way)]

    def exchange(self, resident: nn.Module, away: nn.Module) -> None:
        """Of the expert that `run` has just yielded, which came from `away`: see `Copier.exchange`."""
        self._copier.exchange(self._taken[-1], resident, away)

    def reset(self) -> None:
        """Forgets what was to come, and passes that ended in the middle; all slots are free afterwards."""
        while self._under_way:
            fetch = self._under_way.popleft()
            self._copier.drain(fetch.slot)
            self._free.append(fetch.slot)
        self._end_passes()

    def _begin_pass(self) -> None:
        if not self._slots:
            self._slots = [self._make_slot() for _ in range(self.count)]
            self._free = deque(self._slots)
            for slot in self._slots:
                self._copier.used(slot)  # their memory may be that of tensors which are still computed with
        self._end_passes()

    def _end_passes(self) -> None:
        """Takes back the slots of passes that ended in the middle."""
        self._turn += 1
        for slot in list(self._taken):
            self._give_back(slot)

    def _give_back(self, slot: RingSlot) -> None:
        self._copier.used(slot)
        self._taken.remove(slot)
        self._free.append(slot)

    def release(self) -> int:
        """Frees the slots' memory; returns the bytes. They are made again when next needed."""
        self.reset()
        for slot in self._slots:
            self._copier.drain(slot)  # also of what was forgotten
        freed = self.nbytes
        self._slots, self._free = [], deque()
        return freed

    def _fill(self, sources: Sequence[nn.Module], position: int, ahead: int) -> None:
        """Begins copies into all free slots, of what comes behind what is under way, up to position `ahead`."""
        position += len(self._under_way)
        while self._free and position < ahead:
            slot, source = self._free.popleft(), sources[position % len(sources)]
            try:
                self._copier.start(source, slot)
            except BaseException:
                self._free.append(slot)
                raise
            self._under_way.append(_Fetch(source, slot))
            position += 1
