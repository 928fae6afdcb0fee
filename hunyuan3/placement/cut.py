"""The plan for one way to cut the layers over devices: what each device holds, streams and computes, and how fast.

Where not all experts of a device's layers fit, as many stay there as do, the same number in every layer (the copies of
the others then never idle), and the rest comes from host memory through a small ring of slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from ..config import ModelConfig
from ..errors import OutOfBudgetError
from . import estimate
from .budget import DeviceBudget, HostBudget, LayerSizes, PartSizes, Workload
from .flops import step_flops
from .plan import DevicePlan, LayerPlan, Plan, Refusal, gib

GROUP = 1  # experts that are copied, and computed, together: one of the published model is 20 to 75 MB
RING_GROUPS = 8  # what the link needs to go on while a layer's attention is computed (benchmarks/streaming.py)


@dataclass(frozen=True)
class Needs:
    """Bytes of the work beside the weights. activations: by the number of experts computed at once."""

    cache_per_layer: int
    activations: Mapping[int, int]
    decode_whole: int
    see: int

    @classmethod
    def of(cls, config: ModelConfig, sizes: PartSizes, work: Workload) -> "Needs":
        before, window = work.before(config), work.window(config)
        pass_rows = work.batch * work.rows
        drawn = estimate.cache_bytes(config, pass_rows * work.passes, before + window, work.dtype)
        kept = estimate.cache_bytes(config, work.rows * work.passes, before, work.dtype)  # generate.prefix
        written = estimate.cache_bytes(config, 1, before + work.new_tokens, work.dtype)
        # The prompt is a pass of its own, once per branch and not per picture.
        at_once = max(window, ceil(before / work.batch))

        def activations(experts: int) -> int:
            experts = min(experts, sizes.experts_at_once)
            scratch = experts * sizes.scratch
            draw = estimate.activation_bytes(
                config,
                pass_rows,
                before + window,
                work.dtype,
                at_once=at_once,
                experts_at_once=experts,
                scratch=scratch,
            )
            write = estimate.activation_bytes(config, 1, before, work.dtype, experts_at_once=experts, scratch=scratch)
            return max(draw, write)

        see = 0
        if work.pictures:
            base = config.image_base_size
            see = sizes.vae + sizes.vision + estimate.decode_bytes(config.vae, base, base, work.vae_dtype)
        return cls(
            cache_per_layer=ceil(max(drawn + kept, written) / config.num_layers),
            activations={experts: activations(experts) for experts in {*range(1, GROUP + 1), sizes.experts}},
            decode_whole=estimate.decode_bytes(config.vae, work.height, work.width, work.vae_dtype),
            see=see,
        )


@dataclass(frozen=True)
class _Fit:
    """What a device does with its run of layers."""

    resident: int
    group: int
    at_once: int
    fixed: int  # weights that are always there
    weights: int
    cache: int
    activations: int
    ring: int


def plan_of_cut(
    config: ModelConfig,
    sizes: PartSizes,
    devices: Sequence[DeviceBudget],
    counts: Sequence[int],
    host: HostBudget,
    work: Workload,
    needs: Needs,
    streaming: bool,
) -> Plan | Refusal:
    """The plan for layers cut into runs of these lengths; a device with none is not used."""
    used = [(device, count) for device, count in zip(devices, counts, strict=True) if count]
    runs: list[tuple[DeviceBudget, range, _Fit]] = []
    first = 0
    for device, count in used:
        extra = sizes.rest if not runs else 0
        span = range(first, first + count)
        first = span.stop
        layers = [sizes.layers[index] for index in span]
        fit = _fit(sizes, layers, extra, device.nbytes, needs, streaming)
        if isinstance(fit, int) and not streaming:
            text = (
                f"{device.name} has {gib(device.nbytes)}; {_layers(count)} at {_workload(work)} need {gib(fit)} "
                f"there, and experts may not be streamed."
            )
            return Refusal(device.name, fit, device.nbytes, text)
        if isinstance(fit, int):
            text = (
                f"{device.name} has {gib(device.nbytes)}; the least that {_layers(count)} at {_workload(work)} need "
                f"there is {gib(fit)}, with no expert kept on it."
            )
            return Refusal(device.name, fit, device.nbytes, text)
        runs.append((device, span, fit))

    home = used[0][0]
    if needs.see > home.nbytes:
        text = f"{home.name} has {gib(home.nbytes)}; looking at the input pictures needs {gib(needs.see)}."
        return Refusal(home.name, needs.see, home.nbytes, text)
    try:
        tile = estimate.decode_tile_size(config.vae, work.height, work.width, work.vae_dtype, home.nbytes - sizes.vae)
    except OutOfBudgetError:
        smallest = estimate.decode_bytes(config.vae, *_smallest_tile(work), work.vae_dtype)
        asked = sizes.vae + smallest
        text = (
            f"{home.name} has {gib(home.nbytes)}; decoding needs {gib(asked)} even in the smallest tiles and with "
            f"everything else given up."
        )
        return Refusal(home.name, asked, home.nbytes, text)

    streamed = [sizes.experts - fit.resident for _device, span, fit in runs for _ in span]
    tiers = _tiers([layer.expert for layer in sizes.layers], streamed, host)
    if isinstance(tiers, int):
        there = host.pinned + host.pageable
        total = sum(count * layer.expert for count, layer in zip(streamed, sizes.layers, strict=True))
        text = (
            f"{gib(total)} of experts do not fit on {' and '.join(device.name for device, _ in used)} and must stay "
            f"in host memory, which has {gib(there)} for them."
        )
        return Refusal("host", there + tiers, there, text)
    return _finish(config, sizes, runs, tiers, host, work, needs, tile)


def _fit(
    sizes: PartSizes, layers: Sequence[LayerSizes], extra: int, nbytes: int, needs: Needs, streaming: bool
) -> _Fit | int:
    """As many experts per layer as fit; or, if nothing fits, the bytes that the least would take.

    `extra`: bytes of weights beside the layers. Without `streaming` all experts must fit, computed as many at once as a
    resident bank does.
    """
    fixed = extra + sum(layer.dense for layer in layers)
    per_expert = sum(layer.expert for layer in layers)
    slot = max(layer.expert for layer in layers)
    cache = needs.cache_per_layer * len(layers)

    def fit(resident: int, group: int, at_once: int) -> _Fit:
        ring = 0 if resident == sizes.experts else RING_GROUPS * min(group, sizes.experts - resident) * slot
        weights = fixed + resident * per_expert
        return _Fit(resident, group, at_once, fixed, weights, cache, needs.activations[at_once], ring)

    def needed(fit: _Fit) -> int:
        return fit.weights + fit.cache + fit.activations + fit.ring

    whole = fit(sizes.experts, GROUP, sizes.experts)
    if needed(whole) <= nbytes:
        return whole
    if not streaming:
        return needed(whole)
    group = min(GROUP, sizes.experts)
    candidates = [fit(resident, group, group) for resident in range(sizes.experts, -1, -1)]
    # Groups shrink only where nothing is resident anyway, so that more memory never means fewer residents.
    candidates += [fit(0, smaller, smaller) for smaller in range(group - 1, 0, -1)]
    for candidate in candidates:
        if needed(candidate) <= nbytes:
            return candidate
    return min(needed(candidate) for candidate in candidates)


def _finish(
    config: ModelConfig,
    sizes: PartSizes,
    runs: Sequence[tuple[DeviceBudget, range, _Fit]],
    tiers: Sequence[tuple[int, int, int]],
    host: HostBudget,
    work: Workload,
    needs: Needs,
    tile: int | None,
) -> Plan:
    """Writes the plan down: layers, peaks, seconds."""
    flops = step_flops(config, work)
    decode = sizes.vae + (
        needs.decode_whole
        if tile is None
        else estimate.decode_bytes(config.vae, min(tile, work.height), min(tile, work.width), work.vae_dtype)
    )
    layers: list[LayerPlan] = []
    plans: list[DevicePlan] = []
    token_read = token_copy = 0.0
    for device, span, fit in runs:
        source_rates = (device.link.value, host.pageable_rate.value, host.disk.value)
        compute = copy = 0.0
        streams = False
        for index in span:
            size = sizes.layers[index]
            layers.append(LayerPlan(device.name, fit.resident, *tiers[index]))
            compute += (flops.linear[index] + flops.attention[index]) / device.compute.value
            seconds = sum(
                count * size.expert / min(rate, device.link.value)
                for count, rate in zip(tiers[index], source_rates, strict=True)
                if count
            )
            streams |= seconds > 0
            copy += work.passes * seconds
            # A token's experts are as likely here as there; none is remembered.
            hits = config.moe.top_k[index] / sizes.experts
            token_read += (size.dense + hits * fit.resident * size.expert) / device.memory.value
            token_copy += hits * seconds
        weights_read = fit.weights + sum(layers[i].streamed * sizes.layers[i].expert for i in span)
        is_home = not plans
        if is_home:
            compute += flops.ends / device.compute.value
            token_read += sizes.head / device.memory.value
        at_decode = max(0, fit.weights + decode - device.nbytes) if is_home else 0
        denoise = fit.weights + fit.cache + fit.activations + fit.ring
        # While loading one tensor is under way in its float form; a pass needs more.
        load = fit.weights + fit.ring + min(fit.at_once, sizes.experts_at_once) * sizes.scratch
        plans.append(
            DevicePlan(
                name=device.name,
                nbytes=device.nbytes,
                weights=fit.weights,
                cache=fit.cache,
                activations=fit.activations,
                ring=fit.ring,
                group=min(fit.group, sizes.experts - fit.resident) if streams else 0,
                at_once=min(fit.at_once, sizes.experts_at_once),
                most_at_once=min(sizes.experts, sizes.experts_at_once),
                load=load,
                denoise=denoise,
                decode=fit.weights - at_decode + (decode if is_home else 0),
                evicted=at_decode,
                compute_seconds=compute,
                read_seconds=work.passes * weights_read / device.memory.value,
                copy_seconds=copy,
            )
        )
    step = sum(device.step_seconds for device in plans)
    token = token_read + token_copy
    totals = [
        sum(tier[place] * layer.expert for tier, layer in zip(tiers, sizes.layers, strict=True)) for place in range(3)
    ]
    terms = " + ".join(
        f"max(compute {d.compute_seconds:.2f} s, read {d.read_seconds:.2f} s, copy {d.copy_seconds:.2f} s)"
        for d in plans
    )
    share = sum(layer.streamed for layer in layers) / (len(layers) * sizes.experts)
    return Plan(
        work=work,
        layers=tuple(layers),
        devices=tuple(plans),
        pinned=totals[0],
        pageable=totals[1],
        disk=totals[2],
        tile=tile,
        decode_whole=needs.decode_whole,
        flops=flops,
        step_seconds=step,
        token_seconds=token,
        formula=f"step = {terms} = {step:.2f} s ({flops.total / 1e12:.1f} TFLOP)",
        token_formula=f"token = read {token_read:.3f} s + copy {token_copy:.3f} s = {token:.3f} s "
        f"({share:.0%} of a token's experts are streamed, hit rate 0 for these)",
        rates=_rates([device for device, _span, _fit in runs], host, totals),
    )


def _rates(devices: Sequence[DeviceBudget], host: HostBudget, streamed: Sequence[int]) -> str:
    """Which rates the seconds were calculated with."""
    parts = []
    for device in devices:
        rates = [
            f"{device.compute.value / 1e12:.0f} TFLOP/s ({device.compute})",
            f"memory {device.memory.value / 1e9:.0f} GB/s ({device.memory})",
        ]
        if any(streamed):
            rates.append(f"link {device.link.value / 1e9:.0f} GB/s ({device.link})")
        parts.append(f"{device.name}: {', '.join(rates)}")
    if streamed[1]:
        parts.append(f"pageable RAM {host.pageable_rate.value / 1e9:.0f} GB/s ({host.pageable_rate})")
    if streamed[2]:
        parts.append(f"disk {host.disk.value / 1e9:.0f} GB/s ({host.disk})")
    return "rates: " + "; ".join(parts)


def _tiers(expert: Sequence[int], streamed: Sequence[int], host: HostBudget) -> list[tuple[int, int, int]] | int:
    """Of each layer's streamed experts, how many lie in pinned memory, pageable memory, on disk.

    Evenly over the layers, so that a slow source slows none of them more. If they find no place, the missing bytes.
    """
    left = list(streamed)
    taken = []
    for nbytes in (host.pinned, host.pageable):
        counts = _evenly(expert, left, nbytes)
        left = [have - count for have, count in zip(left, counts, strict=True)]
        taken.append(counts)
    if any(left) and not host.disk.value:
        pageable = sum((count + over) * size for count, over, size in zip(taken[1], left, expert, strict=True))
        return pageable - host.pageable
    return list(zip(*taken, left, strict=True))


def _evenly(expert: Sequence[int], wanted: Sequence[int], nbytes: int) -> list[int]:
    """How many of each layer's `wanted` experts of `expert` bytes fit: the same number everywhere, then one more."""
    level = 0
    while level < max(wanted) and _cost(expert, wanted, level + 1) <= nbytes:
        level += 1
    counts = [min(level, want) for want in wanted]
    left = nbytes - _cost(expert, wanted, level)
    for index, size in enumerate(expert):
        if counts[index] < wanted[index] and size <= left:
            counts[index] += 1
            left -= size
    return counts


def _cost(expert: Sequence[int], wanted: Sequence[int], level: int) -> int:
    return sum(min(level, want) * size for want, size in zip(wanted, expert, strict=True))


def _smallest_tile(work: Workload) -> tuple[int, int]:
    return min(estimate.SMALLEST_TILE, work.height), min(estimate.SMALLEST_TILE, work.width)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _workload(work: Workload) -> str:
    return f"{work.batch} x {work.width}x{work.height} ({work.batch * work.rows} rows in a pass)"
