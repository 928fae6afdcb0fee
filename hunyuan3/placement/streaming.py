"""Experts that are computed with from host memory: a ring of slots on the device, filled ahead of the compute.

A denoise step needs every expert of every layer, in the same order each time. The experts that are
not on the device come through the ring, one slot each, in the order in which the layers will ask for them: while one is
computed the next ones are copied, and behind the last layer comes the first again. A pass over few tokens (a word)
needs few experts: then only those are copied, and those that words use often take the places of others on the device
(placement.expert_cache).

What a slot holds is an expert as it is stored, so a compressed one travels compressed. Each expert's outputs go to rows
of their own (moe.dispatch), so no number depends on when an expert arrives.
"""

import re
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from ..moe.dispatch import Dispatch
from ..moe.weights import ExpertWeights
from .expert_cache import CacheStatistics, UseCounts

EXPERT_UNIT = "experts "  # and its number: the unit (placement.placed) of that expert in all layers
_EXPERT_PARAMETER = re.compile(r"(layers\.)(\d+)(\.mlp\.experts\.)(\d+)(\..+)")


class RingSlot:
    """Room for one expert on the device: `bank`, of one expert, with its own storage."""

    def __init__(self, bank: nn.Module) -> None:
        self.bank = bank

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.bank.parameters())


class Copier(Protocol):
    """How an expert gets into a slot. Calls come from one thread.

    ahead: whether copies run beside the compute, so that it pays to begin them early.
    """

    ahead: bool

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        """Begins to copy, once what was computed with the slot's former content is done."""

    def wait(self, slot: RingSlot) -> None:
        """What is computed from here on sees the slot's new content. Raises what the copy raised."""

    def used(self, slot: RingSlot) -> None:
        """What was computed with the slot has been asked for: it may be overwritten when that is done."""

    def drain(self, slot: RingSlot) -> None:
        """Returns when no copy into the slot is under way."""

    def forget(self, slot: RingSlot) -> None:
        """Nobody will wait for the slot's content; a copy that is begun into it later comes after this one."""

    def exchange(self, slot: RingSlot, resident: nn.Module, away: nn.Module) -> None:
        """The slot holds the expert of `away`: `resident` gets it, and `away` what `resident` held. See `exchange`."""


class DirectCopier:
    """Copies when the content is waited for: nothing overlaps."""

    ahead = False

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

    def forget(self, slot: RingSlot) -> None:
        self.drain(slot)

    def exchange(self, slot: RingSlot, resident: nn.Module, away: nn.Module) -> None:
        exchange(slot, resident, away)


class ThreadCopier:
    """Copies in a thread of its own while the caller computes: for devices that compute in host memory.

    copy: what copies an expert into a slot's bank.
    """

    ahead = True

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

    def forget(self, slot: RingSlot) -> None:
        job = self._jobs.get(id(slot))
        if job is not None:
            job.cancel()  # one that runs goes on, and the thread does one after the other

    def exchange(self, slot: RingSlot, resident: nn.Module, away: nn.Module) -> None:
        exchange(slot, resident, away, self._copy)


class StreamCopier:
    """Copies on a CUDA stream of its own, beside the stream that computes; the host never waits.

    Exchanges go on the stream that computes: behind what was computed with both experts, and before whatever moves
    them. They write over the link while the ring reads from it.
    """

    ahead = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._arrived: dict[int, torch.cuda.Event] = {}
        self._done: dict[int, torch.cuda.Event] = {}
        self._written: dict[int, torch.cuda.Event] = {}  # by source in host memory

    def start(self, source: nn.Module, slot: RingSlot) -> None:
        before = [self._done.pop(id(slot), None), self._written.pop(id(source), None)]
        if before[0] is None:  # a new slot: its memory may still be used by what was computed in it before
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for event in before:
                if event is not None:
                    self._stream.wait_event(event)
            copy_expert(source, slot.bank)
            self._arrived[id(slot)] = self._stream.record_event()

    def wait(self, slot: RingSlot) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived.pop(id(slot)))

    def used(self, slot: RingSlot) -> None:
        self._done[id(slot)] = torch.cuda.current_stream(self._device).record_event()

    def drain(self, slot: RingSlot) -> None:
        self._done.pop(id(slot), None)
        arrived = self._arrived.pop(id(slot), None)
        if arrived is not None:
            arrived.synchronize()

    def forget(self, slot: RingSlot) -> None:
        pass  # later copies come behind it on the same stream; its event stays for `drain`

    def exchange(self, slot: RingSlot, resident: nn.Module, away: nn.Module) -> None:
        exchange(slot, resident, away)
        self._written[id(away)] = torch.cuda.current_stream(self._device).record_event()


CopyExpert = Callable[[nn.Module, nn.Module], None]


def copy_expert(source: nn.Module, target: nn.Module) -> None:
    """Copies the parameters of one bank of one expert into those of another."""
    with torch.no_grad():
        for theirs, ours in zip(source.parameters(), target.parameters(), strict=True):
            ours.copy_(theirs, non_blocking=True)


def exchange(slot: RingSlot, resident: nn.Module, away: nn.Module, copy: CopyExpert = copy_expert) -> None:
    """An expert that just came from `away` into the slot becomes the resident one, and this one takes its place there.

    On the device the slot and the resident expert trade their storage, so nothing is copied but the one expert that
    leaves. Each of the three stays as large as it is. If the copy fails, all is as before.
    """
    try:
        copy(resident, away)
    except BaseException:
        copy_expert(slot.bank, away)
        raise
    arrived, leaving = dict(slot.bank.named_parameters()), dict(resident.named_parameters())
    for name in arrived:
        setattr(slot.bank, name, leaving[name])
        setattr(resident, name, arrived[name])


def copier_for(device: torch.device) -> Copier:
    """The way of copying that suits a device."""
    if device.type == "cuda":
        return StreamCopier(device)
    return ThreadCopier() if device.type == "cpu" else DirectCopier()


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


class StreamedBank(nn.ModuleList):
    """The routed experts of a layer as banks of one, each on the device or in host memory: a weight source.

    A place in this list is a rank; which expert it holds changes as experts are exchanged. Which ranks are on the
    device does not, so the bytes there and in host memory stay what the units (placement.placed) say.
    """

    def __init__(self, banks: Sequence[nn.Module]) -> None:
        super().__init__(banks)
        self.resident = [False] * len(banks)  # by rank
        self.expert_at = list(range(len(banks)))  # rank -> expert
        self.rank_of = list(range(len(banks)))  # expert -> rank
        self.streaming: ExpertStreaming | None = None
        self.layer = 0

    def chunks(self, dispatch: Dispatch | None = None) -> Iterator[ExpertWeights]:
        """All that are wanted; see `_in_turn` for their order."""
        few = dispatch is not None and self.is_few(len(dispatch.token))
        wanted = [self.rank_of[expert] for expert in dispatch.chosen] if few else range(len(self))
        if few and self.streaming is not None:
            self.streaming.used(self.layer, wanted, len(dispatch.place))
        here = [rank for rank in wanted if self.resident[rank]]
        away = [rank for rank in wanted if not self.resident[rank]]
        assert not away or self.streaming is not None, "nothing brings the experts that are not on the device"
        if few and away:
            self.streaming.begin(self.layer, away)
        for rank, bank in self._in_turn(here, away, few):
            yield _weights(bank, self.expert_at[rank])

    def _in_turn(self, here: Sequence[int], away: Sequence[int], few: bool) -> Iterator[tuple[int, nn.Module]]:
        """(rank, bank on the device). Of a word's few experts those on the device come first: the copies need the time.

        In a pass that needs all of them they come evenly between the streamed ones: in one block they would leave the
        link idle as soon as the ring is full (benchmarks/streaming.py).
        """
        arriving = self.streaming.bring(self.layer, away, few=few) if away else ()
        given = len(here) if few else 0
        yield from ((rank, self[rank]) for rank in here[:given])
        for index, arrived in enumerate(arriving):
            yield arrived
            due = max(given, len(here) * (index + 1) // len(away))
            yield from ((rank, self[rank]) for rank in here[given:due])
            given = due
        yield from ((rank, self[rank]) for rank in here[given:])

    def is_few(self, pairs: int) -> bool:
        """Whether a pass with so many (token, choice) pairs is one over few tokens, which leaves experts out."""
        return pairs < len(self)

    def exchanged(self, one: int, other: int) -> None:
        """These ranks hold each other's expert now."""
        held = self.expert_at
        held[one], held[other] = held[other], held[one]
        self.rank_of[held[one]], self.rank_of[held[other]] = one, other


class ExpertStreaming:
    """The streamed experts of all layers, the ring that brings them, and which of them words keep on the device."""

    def __init__(
        self, banks: Sequence[StreamedBank], ring: ExpertRing, slot_nbytes: int, *, cache: bool = True
    ) -> None:
        """cache: whether experts that words use often take the places of others on the device."""
        self.ring = ring
        self.cache = cache
        self._slot_nbytes = slot_nbytes
        # Weakly, as they know this: weights must die with their model at once.
        self._banks = tuple(weakref.ref(bank) for bank in banks)
        self.counts = [UseCounts(len(bank)) for bank in banks]  # by layer
        self._starts: list[int] | None = None
        self._sources: list[nn.Module] = []
        self._guessed: set[int] = set()  # ranks of the layer that is to come
        self.copied = 0  # experts that were copied and used so far
        self.reset_statistics()
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

    @property
    def statistics(self) -> CacheStatistics:
        """Of all passes over few tokens since the last reset."""
        return self._statistics

    def reset_statistics(self) -> None:
        """Counts from 0 again; what the policy knows of past uses stays."""
        self._statistics = CacheStatistics(expert_bytes=self._slot_nbytes)

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

    def held_by(self, parameter: str) -> str:
        """Name of the parameter whose weights this one holds: of the expert that has its rank; else the same."""
        match = _EXPERT_PARAMETER.fullmatch(parameter)
        if match is None:
            return parameter
        expert = self._banks[int(match[2])]().expert_at[int(match[4])]
        return f"{match[1]}{match[2]}{match[3]}{expert}{match[5]}"

    def used(self, layer: int, ranks: Sequence[int], tokens: int) -> None:
        """A pass over few tokens needs the experts at these ranks of a layer."""
        bank = self._banks[layer]()
        if self.cache:
            self.counts[layer].used([bank.expert_at[rank] for rank in ranks], tokens)
        hits = sum(bank.resident[rank] for rank in ranks)
        guessed, self._guessed = self._guessed, set()
        self._count(
            tokens=0 if layer else tokens, hits=hits, misses=len(ranks) - hits, right=len(guessed.intersection(ranks))
        )

    def wants_guesses(self, layer: int, pairs: int) -> bool:
        """Whether a guess at the experts of a layer may serve a pass with so many (token, choice) pairs."""
        bank = self._banks[layer]()
        return bank.is_few(pairs) and not all(bank.resident)

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """A layer that is about to run will probably need these experts, the likeliest first: their copies begin."""
        bank = self._banks[layer]()
        ranks = [rank for rank in (bank.rank_of[expert] for expert in experts) if not bank.resident[rank]]
        self._guessed = set()
        if ranks:
            begun = self.ring.begin([bank[rank] for rank in ranks])
            self._guessed = {ranks[index] for index in begun}
            self._count(guesses=len(begun))

    def begin(self, layer: int, ranks: Sequence[int]) -> None:
        """Begins to copy a word's experts at these ranks, as many as there are slots for."""
        bank = self._banks[layer]()
        self.ring.begin([bank[rank] for rank in ranks])

    def bring(self, layer: int, ranks: Sequence[int], *, few: bool) -> Iterator[tuple[int, nn.Module]]:
        """(rank, bank on the device) of the experts at ranks of a layer that are not on the device."""
        bank = self._banks[layer]()
        if few:
            ranks = [ranks[index] for index in self.ring.order([bank[rank] for rank in ranks])]
            sources = [bank[rank] for rank in ranks]
            for index, arrived in self.ring.run(sources, 0, len(sources), cyclic=False):
                self.copied += 1
                yield ranks[index], arrived
                self._keep(bank, ranks[index])
            return
        if self._starts is None:
            self._plan_cycle()
        start = self._starts[layer]
        for position, arrived in self.ring.run(self._sources, start, len(ranks), cyclic=True):
            self.copied += 1
            yield ranks[position - start], arrived

    def _keep(self, bank: StreamedBank, rank: int) -> None:
        """Keeps the expert that has just been computed with on the device, if it is used often enough."""
        if not self.cache:
            return
        residents = [expert for expert, here in zip(bank.expert_at, bank.resident, strict=True) if here]
        least = self.counts[bank.layer].to_replace(bank.expert_at[rank], residents)
        if least is None:
            return
        place = bank.rank_of[least]
        self.ring.exchange(bank[place], bank[rank])
        bank.exchanged(place, rank)
        self._count(swaps=1)

    def _count(self, **more: int) -> None:
        now = self._statistics
        self._statistics = replace(now, **{name: getattr(now, name) + count for name, count in more.items()})

    def _plan_cycle(self) -> None:
        self._starts, self._sources = [], []
        for ref in self._banks:
            bank = ref()
            self._starts.append(len(self._sources))
            self._sources += [expert for expert, here in zip(bank, bank.resident, strict=True) if not here]


def _weights(bank: nn.Module, expert: int) -> ExpertWeights:
    (weights,) = bank.chunks()
    return weights._replace(first=expert)
