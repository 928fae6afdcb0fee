"""Experts that are computed with from host memory: a ring of slots on the device, filled ahead of the compute.

A denoise step needs every expert of every layer, in the same order each time. The experts on the device are computed
first; the others come through the ring, one slot each, in the order in which the layers will ask for them: while one is
computed the next ones are copied, and behind the last layer comes the first again. A pass over few tokens (a word)
needs few experts: then only those are copied.

What a slot holds is an expert as it is stored, so a compressed one travels compressed. Each expert's outputs go to rows
of their own (moe.dispatch), so no number depends on when an expert arrives.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..moe.dispatch import Dispatch
from ..moe.weights import ExpertWeights

EXPERT_UNIT = "experts "  # and its number: the unit (placement.placed) of that expert in all layers


class RingSlot:
    """Room for one expert on the device: `bank`, of one expert, with its own storage."""

    def __init__(self, bank: nn.Module) -> None:
        self.bank = bank

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.bank.parameters())


class Copier(Protocol):
    """How an expert gets into a slot. Calls come from one thread."""

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        """Begins to copy, once what was computed with the slot's former content is done."""

    def wait(self, slot: RingSlot) -> None:
        """What is computed from here on sees the slot's new content. Raises what the copy raised."""

    def used(self, slot: RingSlot) -> None:
        """What was computed with the slot has been asked for: it may be overwritten when that is done."""

    def drain(self, slot: RingSlot) -> None:
        """Returns when no copy into the slot is under way."""


class DirectCopier:
    """Copies when the content is waited for: nothing overlaps."""

    def __init__(self) -> None:
        self._sources: dict[int, nn.Module] = {}

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        self._sources[id(slot)] = source

    def wait(self, slot: RingSlot) -> None:
        copy_expert(self._sources.pop(id(slot)), slot.bank)

    def used(self, slot: RingSlot) -> None:
        pass

    def drain(self, slot: RingSlot) -> None:
        self._sources.pop(id(slot), None)


class ThreadCopier:
    """Copies in a thread of its own while the caller computes: for devices that compute in host memory.

    copy: what copies an expert into a slot's bank.
    """

    def __init__(self, copy: "CopyExpert | None" = None) -> None:
        self._copy = copy or copy_expert
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hunyuan3-stream")
        self._jobs: dict[int, Future[None]] = {}

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        self._jobs[id(slot)] = self._pool.submit(self._copy, source, slot.bank)

    def wait(self, slot: RingSlot) -> None:
        self._jobs.pop(id(slot)).result()

    def used(self, slot: RingSlot) -> None:
        pass  # a CPU computes when it is asked

    def drain(self, slot: RingSlot) -> None:
        job = self._jobs.pop(id(slot), None)
        if job is not None and not job.cancel():
            job.exception()


class StreamCopier:
    """Copies on a CUDA stream of its own, beside the stream that computes; the host never waits."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._done: dict[int, torch.cuda.Event] = {}

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        done = self._done.pop(id(slot), None)
        with torch.cuda.stream(self._stream):
            if done is not None:
                self._stream.wait_event(done)
            copy_expert(source, slot.bank)
            self._arrived[id(slot)] = self._stream.record_event()

    def wait(self, slot: RingSlot) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived.pop(id(slot)))

    def used(self, slot: RingSlot) -> None:
        self._done[id(slot)] = torch.cuda.current_stream(self._device).record_event()

    def drain(self, slot: RingSlot) -> None:
        arrived = self._arrived.pop(id(slot), None)
        if arrived is not None:
            arrived.synchronize()


CopyExpert = Callable[[nn.Module, nn.Module], None]


def copy_expert(source: nn.Module, target: nn.Module) -> None:
    """Copies the parameters of one bank of one expert into those of another."""
    with torch.no_grad():
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs, non_blocking=True)


def copier_for(device: torch.device) -> Copier:
    """The way of copying that suits a device."""
    if device.type == "cuda":
        return StreamCopier(device)
    return ThreadCopier() if device.type == "cpu" else DirectCopier()


@dataclass
class _Fetch:
    position: int
    slot: RingSlot


class ExpertRing:
    """The slots, and which expert comes into which: in a cycle, or as asked."""

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
        if not self._slots:
            self._slots = [self._make_slot() for _ in range(self.count)]
            self._free = deque(self._slots)
        if not (self._under_way and self._under_way[0].position == start):
            self.reset()  # something else was expected
        turn, ahead = self._turn, start + count + (len(sources) if cyclic else 0)
        for step in range(count):
            self._fill(sources, start + step, ahead)
            fetch = self._under_way.popleft()
            self._taken.append(fetch.slot)
            try:
                self._copier.wait(fetch.slot)
                yield fetch.position, fetch.slot.bank
            finally:
                if turn == self._turn:
                    self._give_back(fetch.slot)
        self._fill(sources, start + count, ahead)
        for fetch in self._under_way:
            fetch.position %= len(sources)

    def reset(self) -> None:
        """Forgets what was to come, and passes that ended in the middle; all slots are free afterwards."""
        self._turn += 1
        while self._under_way:
            fetch = self._under_way.popleft()
            self._copier.drain(fetch.slot)
            self._free.append(fetch.slot)
        for slot in list(self._taken):
            self._give_back(slot)

    def _give_back(self, slot: RingSlot) -> None:
        self._copier.used(slot)
        self._taken.remove(slot)
        self._free.append(slot)

    def release(self) -> int:
        """Frees the slots' memory; returns the bytes. They are made again when next needed."""
        self.reset()
        freed = self.nbytes
        self._slots, self._free = [], deque()
        return freed

    def _fill(self, sources: Sequence[nn.Module], position: int, ahead: int) -> None:
        """Begins copies into all free slots, of what comes behind what is under way, up to position `ahead`."""
        position += len(self._under_way)
        while self._free and position < ahead:
            slot = self._free.popleft()
            self._copier.start(sources[position % len(sources)], slot)
            self._under_way.append(_Fetch(position, slot))
            position += 1


class StreamedBank(nn.ModuleList):
    """The routed experts of a layer as banks of one, each on the device or in host memory: a weight source."""

    def __init__(self, banks: Sequence[nn.Module]) -> None:
        super().__init__(banks)
        self.resident = [False] * len(banks)
        self.streaming: ExpertStreaming | None = None
        self.layer = 0

    def chunks(self, dispatch: Dispatch | None = None) -> Iterator[ExpertWeights]:
        """Those on the device first, then the others as they arrive."""
        few = dispatch is not None and len(dispatch.token) < len(self)
        wanted = dispatch.chosen if few else range(len(self))
        for expert in wanted:
            if self.resident[expert]:
                yield _weights(self[expert], expert)
        away = [expert for expert in wanted if not self.resident[expert]]
        if away:
            assert self.streaming is not None, "nothing brings the experts that are not on the device"
            for expert, bank in self.streaming.bring(self.layer, away, few=few):
                yield _weights(bank, expert)


class ExpertStreaming:
    """The streamed experts of all layers and the ring that brings them."""

    def __init__(self, banks: Sequence[StreamedBank], ring: ExpertRing, slot_nbytes: int) -> None:
        self.ring = ring
        self._slot_nbytes = slot_nbytes
        # Weakly, as they know this: weights must die with their model at once.
        self._banks = tuple(weakref.ref(bank) for bank in banks)
        self._starts: list[int] | None = None
        self._sources: list[nn.Module] = []
        self.copied = 0  # experts that were copied so far
        for layer, bank in enumerate(banks):
            bank.layer, bank.streaming = layer, self

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return self.ring.nbytes

    @property
    def full_nbytes(self) -> int:
        """Bytes of the ring while it is used."""
        return self.ring.count * self._slot_nbytes

    def release(self) -> int:
        """Frees the ring until it is next needed; returns its bytes."""
        return self.ring.release()

    def moved(self, unit: str, on_device: bool) -> None:
        """An expert of every layer came to the device, or left it; other units do not matter here."""
        if not unit.startswith(EXPERT_UNIT):
            return
        for ref in self._banks:
            ref().resident[int(unit.removeprefix(EXPERT_UNIT))] = on_device
        self._starts, self._sources = None, []
        self.ring.reset()

    def bring(self, layer: int, experts: Sequence[int], *, few: bool) -> Iterator[tuple[int, nn.Module]]:
        """(expert, bank on the device) of experts of a layer that are not there."""
        if few:
            self.ring.reset()
            bank = self._banks[layer]()
            sources = [bank[expert] for expert in experts]
            for index, arrived in self.ring.run(sources, 0, len(sources), cyclic=False):
                self.copied += 1
                yield experts[index], arrived
            return
        if self._starts is None:
            self._plan_cycle()
        start = self._starts[layer]
        for position, bank in self.ring.run(self._sources, start, len(experts), cyclic=True):
            self.copied += 1
            yield experts[position - start], bank

    def _plan_cycle(self) -> None:
        self._starts, self._sources = [], []
        for ref in self._banks:
            bank = ref()
            self._starts.append(len(self._sources))
            self._sources += [expert for expert, here in zip(bank, bank.resident, strict=True) if not here]


def _weights(bank: nn.Module, expert: int) -> ExpertWeights:
    (weights,) = bank.chunks()
    return weights._replace(first=expert)
