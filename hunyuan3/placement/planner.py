"""What fits where and how fast it will be, before anything is loaded: one pure function from sizes to a plan.

A denoise step needs every expert of every layer, in order, again and again: a cyclic scan, in which a cache of recently
used experts never hits. So a fixed share of every layer stays on the device, and the rest comes from host memory while
the device computes (placement.cut).

Bytes are exact for weights and the cache, counted for activations (`placement.estimate`). Times are calculated from
rates, each marked as measured or assumed, and so never better than these.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations

from ..config import ModelConfig
from ..errors import OutOfBudgetError, RequestError
from .budget import DISK, DeviceBudget, HostBudget, PartSizes, Rate, Workload
from .cut import Needs, plan_of_cut
from .plan import Plan, Refusal, gib

_TRIED_WHOLLY = 3  # devices over which every way to cut the layers is tried
_SMALLER_SIDES = (1024, 768, 512, 256)  # pictures that a refusal may advise
_CPU = "cpu"


@dataclass(frozen=True)
class Freedom:
    """What a plan may do.

    Attributes:
        streaming: whether experts may be streamed; if not, a plan that needs it is refused.
        split: whether layers may be shared out over several devices; if not, only the first device is used.
        counts: the layers of each device, None to choose them.
        least: the fewest layers of each device, if they are chosen; None for no such wish.
    """

    streaming: bool
    split: bool
    counts: Sequence[int] | None = None
    least: Sequence[int] | None = None


def plan(
    config: ModelConfig,
    sizes: PartSizes,
    devices: Sequence[DeviceBudget],
    host: HostBudget,
    work: Workload,
    freedom: Freedom,
    alternatives: Mapping[str, PartSizes] | None = None,
) -> Plan:
    """The fastest plan within the budgets.

    Args:
        sizes: of the chosen format.
        devices: in the order in which they would run; the first one also holds what is not in a layer.
        host: what may hold streamed weights.
        alternatives: sizes of other formats by name, which a refusal may advise.

    Raises OutOfBudgetError with what was asked, what was there, and changes each of which was tried and works.
    """
    outcome = attempt(config, sizes, devices, host, work, freedom)
    if isinstance(outcome, Plan):
        return outcome
    hints = _advice(config, sizes, devices, host, work, freedom, outcome, alternatives or {})
    raise OutOfBudgetError(f"{outcome.text} {' '.join(hints)}")


def attempt(
    config: ModelConfig,
    sizes: PartSizes,
    devices: Sequence[DeviceBudget],
    host: HostBudget,
    work: Workload,
    freedom: Freedom,
) -> Plan | Refusal:
    """As `plan`, but a refusal is a value.

    Layers go to the devices in contiguous runs. Every way to cut them is tried, the one in proportion to the devices'
    room first, and the fastest taken; with more than three devices that first one, bettered layer by layer. With
    `counts` only these.

    Raises RequestError for counts that are not one per device, or not of as many layers as there are.
    """
    if not devices:
        raise RequestError("A plan needs at least one device.")
    counts, streaming = freedom.counts, freedom.streaming
    if counts is not None and (len(counts) != len(devices) or sum(counts) != len(sizes.layers) or min(counts) < 0):
        raise RequestError(
            f"{' + '.join(map(str, counts))} layers on {len(devices)} devices: this model has {len(sizes.layers)}."
        )
    chosen = list(devices if freedom.split else devices[:1])
    if any(device.name == _CPU for device in chosen):
        if len(chosen) > 1:
            raise RequestError("Layers cannot be split between the CPU and other devices.")
        # Its memory is the host's, so nothing streams but from disk.
        chosen = [replace(chosen[0], nbytes=host.pinned + host.pageable, link=host.disk)]
        host = replace(host, pinned=0, pageable=0)
        streaming = streaming and host.disk.value > 0
    needs = Needs.of(config, sizes, work)
    best: Plan | Refusal | None = None
    rooms = [device.nbytes for device in chosen]
    least = freedom.least or [0] * len(rooms)

    def with_way(way: Sequence[int]) -> Plan | Refusal:
        return plan_of_cut(config, sizes, chosen, way, host, work, needs, streaming)

    taken: Sequence[int] = ()
    for way in [counts] if counts is not None else _splits(len(sizes.layers), rooms, least):
        outcome = with_way(way)
        if best is None or better(outcome, best):
            best, taken = outcome, way
    if best is not None and counts is None and len(chosen) > _TRIED_WHOLLY:
        best = _climb(best, taken, least, with_way)
    if best is None:
        raise RequestError(
            f"{len(chosen)} devices must have a layer each, but this model has only {len(sizes.layers)}."
        )
    return best


def _advice(
    config: ModelConfig,
    sizes: PartSizes,
    devices: Sequence[DeviceBudget],
    host: HostBudget,
    work: Workload,
    freedom: Freedom,
    refusal: Refusal,
    alternatives: Mapping[str, PartSizes],
) -> list[str]:
    """Sentences with single changes that make it fit. Each was tried: a plan with it exists."""

    def fits(**changes: object) -> bool:
        given = {"sizes": sizes, "devices": devices, "host": host, "work": work, "freedom": freedom}
        return isinstance(attempt(config, **(given | changes)), Plan)

    hints = []
    others = {other: name for name, other in reversed(alternatives.items())}  # of formats alike the first
    formats = [name for other, name in reversed(others.items()) if other != sizes and fits(sizes=other)]
    if formats:
        hints.append(f"It fits in the format {' or '.join(formats)}.")
    if not freedom.streaming and fits(freedom=replace(freedom, streaming=True)):
        hints.append("It fits if experts may be streamed from RAM.")
    if not freedom.split and len(devices) > 1 and fits(freedom=replace(freedom, split=True)):
        hints.append(f"It fits if the layers may be split over the {len(devices)} devices.")
    if freedom.counts is not None and fits(freedom=replace(freedom, counts=None)):
        hints.append("It fits if the layers are shared out otherwise.")
    if freedom.least is not None and fits(freedom=replace(freedom, least=None)):
        hints.append("It fits if not every device must have a layer.")
    if work.rows > 1 and fits(work=replace(work, rows=1, passes=work.rows * work.passes)):
        hints.append("It fits with sequential guidance (the branches one after the other, slower).")
    if work.batch > 1:
        batch = next((n for n in range(work.batch - 1, 0, -1) if fits(work=replace(work, batch=n))), None)
        if batch:
            hints.append(f"It fits with a batch of {batch}.")
    smaller = [side for side in _SMALLER_SIDES if side * side < work.width * work.height]
    side = next((side for side in smaller if fits(work=replace(work, width=side, height=side))), None)
    if side:
        hints.append(f"It fits with a picture of {side}x{side}.")
    if refusal.where == "host" or refusal.where == _CPU:
        more = replace(host, pageable=host.pageable + refusal.missing)
        if fits(host=more):
            hints.append(f"It fits with {gib(refusal.missing)} more of RAM.")
        if freedom.streaming and not host.disk.value and fits(host=replace(host, disk=Rate(DISK))):
            hints.append(
                "It fits if experts may be read from disk in every step (very slow; from a pack, or bf16 as published)."
            )
    else:
        more_devices = [
            replace(device, nbytes=device.nbytes + refusal.missing) if device.name == refusal.where else device
            for device in devices
        ]
        if fits(devices=more_devices):
            hints.append(
                f"It fits with {gib(refusal.missing)} more on {refusal.where} (a larger card, or fewer programs)."
            )
    return hints or ["No single change of format, picture, batch or guidance makes it fit; take a larger card or RAM."]


def _splits(layers: int, rooms: Sequence[int], least: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Numbers of layers per device, at least so many: in proportion to their room first, then every other way where the
    devices are few.
    """
    total = sum(rooms)
    ends = [round(layers * sum(rooms[: index + 1]) / total) if total else layers for index in range(len(rooms))]
    counts = [stop - start for start, stop in zip([0, *ends[:-1]], ends, strict=True)]
    for index, needed in enumerate(least):
        while counts[index] < needed:
            spare = [count - kept for count, kept in zip(counts, least, strict=True)]
            if max(spare) < 1:
                return  # fewer layers than devices that must have one
            counts[spare.index(max(spare))] -= 1
            counts[index] += 1
    proportional = tuple(counts)
    yield proportional
    if len(rooms) > _TRIED_WHOLLY:
        return
    for bars in combinations(range(layers + len(rooms) - 1), len(rooms) - 1):
        edges = [-1, *bars, layers + len(rooms) - 1]
        way = tuple(edges[i + 1] - edges[i] - 1 for i in range(len(rooms)))
        if way != proportional and all(count >= needed for count, needed in zip(way, least, strict=True)):
            yield way


def _climb(
    best: Plan | Refusal, way: Sequence[int], least: Sequence[int], with_way: Callable[[Sequence[int]], Plan | Refusal]
) -> Plan | Refusal:
    """Moves single layers from device to device as long as the outcome gets better."""
    moved = True
    while moved:
        moved = False
        for giver, taker in permutations(range(len(way)), 2):
            while way[giver] > least[giver]:
                changed = [count + (index == taker) - (index == giver) for index, count in enumerate(way)]
                outcome = with_way(changed)
                if not better(outcome, best):
                    break
                best, way, moved = outcome, changed, True
    return best


def better(new: Plan | Refusal, old: Plan | Refusal) -> bool:
    """A plan before a refusal, the faster plan, then the faster writer, the smaller shortage; else the old one."""
    if isinstance(new, Refusal):
        return isinstance(old, Refusal) and new.missing < old.missing
    if isinstance(old, Refusal):
        return True
    less = 1 - 1e-9  # sums in another order are no gain
    if new.step_seconds < old.step_seconds * less:
        return True
    return new.step_seconds * less <= old.step_seconds and new.token_seconds < old.token_seconds * less
