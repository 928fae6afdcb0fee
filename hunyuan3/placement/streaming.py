"""Experts that are computed with from host memory: a ring of slots on the device, filled ahead of the compute.

A denoise step needs every expert of every layer, in the same order each time. The experts that are not on the device
come through the ring, one slot each, in the order in which the layers will ask for them: while one is computed the next
ones are copied, and behind the last layer comes the first again. A pass over few tokens (a word) needs few experts:
then only those are copied, and those that words use often take the places of others on the device
(placement.expert_cache).

What a slot holds is an expert as it is stored, so a compressed one travels compressed. Each expert's outputs go to rows
of their own (moe.dispatch), so no number depends on when an expert arrives.
"""

import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from ..moe.dispatch import Dispatch
from ..moe.weights import ExpertWeights
from .expert_cache import CacheStatistics, UseCounts
from .ring import ExpertRing

EXPERT_UNIT = "experts "  # how the names of these units (placement.placed) begin; see `expert_unit`
_EXPERT_UNIT = re.compile(rf"{EXPERT_UNIT}(\d+) on (.+)")
_EXPERT_PARAMETER = re.compile(r"(layers\.)(\d+)(\.mlp\.experts\.)(\d+)(\..+)")


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
        self,
        banks: Sequence[StreamedBank],
        rings: Mapping[torch.device, ExpertRing],
        slot_nbytes: int,
        *,
        devices: Sequence[torch.device] | None = None,
        cache: bool = True,
    ) -> None:
        """Args:
        banks: of the layers.
        rings: of the devices that compute them.
        slot_nbytes: of each slot.
        devices: of each layer; None where there is but one ring.
        cache: whether experts that words use often take the places of others on the device.
        """
        if devices is None:
            (only,) = rings
            devices = [only] * len(banks)
        self.rings = dict(rings)
        self.devices = tuple(devices)
        self.cache = cache
        self._slot_nbytes = slot_nbytes
        # Weakly, as they know this: weights must die with their model at once.
        self._banks = tuple(weakref.ref(bank) for bank in banks)
        self.counts = [UseCounts(len(bank)) for bank in banks]  # by layer
        self._cycles: dict[torch.device, _Cycle] = {}  # of the devices whose experts have not moved since
        self._guessed: set[int] = set()  # ranks of the layer that is to come
        self.copied = 0  # experts that were copied and used so far
        self.reset_statistics()
        for layer, bank in enumerate(banks):
            bank.layer, bank.streaming = layer, self

    @property
    def ring(self) -> ExpertRing:
        """The ring, where there is but one."""
        (ring,) = self.rings.values()
        return ring

    def nbytes_on(self, device: torch.device) -> int:
        """Bytes of a device's ring."""
        return self.rings[device].nbytes

    def full_nbytes_on(self, device: torch.device) -> int:
        """Bytes of a device's ring while it is used."""
        return self.rings[device].count * self._slot_nbytes

    @property
    def statistics(self) -> CacheStatistics:
        """Of all passes over few tokens since the last reset."""
        return self._statistics

    def reset_statistics(self) -> None:
        """Counts from 0 again; what the policy knows of past uses stays."""
        self._statistics = CacheStatistics(expert_bytes=self._slot_nbytes)

    def release(self, device: torch.device) -> int:
        """Frees a device's ring until it is next needed; returns its bytes."""
        return self.rings[device].release()

    def moved(self, unit: str, on_device: bool) -> None:
        """An expert of every layer of a device came to it, or left it; other units do not matter here."""
        found = _EXPERT_UNIT.fullmatch(unit)
        if found is None:
            return
        device = torch.device(found[2])
        for bank in self._banks_on(device):
            bank.resident[int(found[1])] = on_device
        self._cycles.pop(device, None)
        self.rings[device].reset()

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
            begun = self._ring_of(bank).begin([bank[rank] for rank in ranks])
            self._guessed = {ranks[index] for index in begun}
            self._count(guesses=len(begun))

    def begin(self, layer: int, ranks: Sequence[int]) -> None:
        """Begins to copy a word's experts at these ranks, as many as there are slots for."""
        bank = self._banks[layer]()
        self._ring_of(bank).begin([bank[rank] for rank in ranks])

    def bring(self, layer: int, ranks: Sequence[int], *, few: bool) -> Iterator[tuple[int, nn.Module]]:
        """(rank, bank on the device) of the experts at ranks of a layer that are not on the device."""
        bank = self._banks[layer]()
        ring = self._ring_of(bank)
        if few:
            ranks = [ranks[index] for index in ring.order([bank[rank] for rank in ranks])]
            sources = [bank[rank] for rank in ranks]
            for index, arrived in ring.run(sources, 0, len(sources), cyclic=False):
                self.copied += 1
                yield ranks[index], arrived
                self._keep(bank, ranks[index])
            return
        cycle = self._cycle_of(self.devices[layer])
        start = cycle.starts[layer]
        for position, arrived in ring.run(cycle.sources, start, len(ranks), cyclic=True):
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
        self._ring_of(bank).exchange(bank[place], bank[rank])
        bank.exchanged(place, rank)
        self._count(swaps=1)

    def _count(self, **more: int) -> None:
        now = self._statistics
        self._statistics = replace(now, **{name: getattr(now, name) + count for name, count in more.items()})

    def _ring_of(self, bank: StreamedBank) -> ExpertRing:
        return self.rings[self.devices[bank.layer]]

    def _banks_on(self, device: torch.device) -> Iterator[StreamedBank]:
        return (ref() for ref, its in zip(self._banks, self.devices, strict=True) if its == device)

    def _cycle_of(self, device: torch.device) -> "_Cycle":
        """What a device's ring brings in a pass that needs all experts, again and again."""
        if device not in self._cycles:
            starts: dict[int, int] = {}
            sources: list[nn.Module] = []
            for bank in self._banks_on(device):
                starts[bank.layer] = len(sources)
                sources += [expert for expert, here in zip(bank, bank.resident, strict=True) if not here]
            self._cycles[device] = _Cycle(starts, sources)
        return self._cycles[device]


class _Cycle(NamedTuple):
    """The streamed experts of a device's layers in order, and where each layer's begin."""

    starts: dict[int, int]
    sources: list[nn.Module]


def expert_unit(rank: int, device: torch.device) -> str:
    """Name of the unit that holds the experts of a rank in all layers of a device."""
    return f"{EXPERT_UNIT}{rank} on {device}"


def _weights(bank: nn.Module, expert: int) -> ExpertWeights:
    (weights,) = bank.chunks()
    return weights._replace(first=expert)
