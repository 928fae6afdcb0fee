"""The loader's plan: what this machine has, as ComfyUI knows it, and what the model would do with it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import comfy.model_management as mm
import torch

from ..hunyuan3.errors import OutOfBudgetError
from ..hunyuan3.folder import ModelFolder
from ..hunyuan3.parts import ResolvedOptions, reads_from_files, works
from ..hunyuan3.placement.budget import DISK, DeviceBudget, HostBudget, PartSizes, Rate, Workload
from ..hunyuan3.placement.plan import Plan
from ..hunyuan3.placement.planner import Freedom, attempt, better, plan
from ..hunyuan3.placement.split import LayerSplit, SplitRequest
from ..hunyuan3.plan import rates_of_card, sizes_of
from ..hunyuan3.quant.policy import FORMATS, storage_of
from .budget import GIB, HOST, Budget, kept_free_on_host, most_free_memory

_CPU_COMPUTE, _CPU_MEMORY = 1e12, 50e9  # FLOP/s and bytes/s of an ordinary processor; assumed
_SMALLER = (1024, 768, 512, 256, 128)  # sides of pictures that are tried where the base size does not fit


def planned(
    folder: ModelFolder, options: ResolvedOptions, budget: Budget, asked: SplitRequest | None = None
) -> tuple[Plan, str]:
    """(plan, the same as text). Where the model's own base size does not fit, that of the largest square that does,
    saying so.

    asked: over which devices the layers may be split; None: the options' own alone. Where it leaves that open
    ("auto"), the other cards help only if that one does not hold everything.

    Raises OutOfBudgetError with numbers and advice if no picture can be drawn. On a CPU all weights must fit; to any
    other device experts may be streamed from host memory, and from disk where they are stored as they are used.
    """
    config, base = folder.config, folder.config.image_base_size
    work = Workload(
        width=base,
        height=base,
        rows=1 if config.cfg_distilled else 2,
        dtype=options.dtype,
        vae_dtype=options.vae_dtype,
    )
    sizes = {options.format: _sizes(folder, options, options.format)}
    freedom = Freedom(
        streaming=not mm.is_device_cpu(options.device), split=True, counts=None if asked is None else asked.layers
    )

    def fits(side: int, within: Budget) -> Plan | None:
        smaller, host, best = replace(work, width=side, height=side), _host(folder, options, within), None
        for devices, least in _choices(options.device, asked):
            budgets = _devices(devices, within)
            made = attempt(config, sizes[options.format], budgets, host, smaller, replace(freedom, least=least))
            if isinstance(made, Plan) and (best is None or better(made, best)):
                best = made
            if best is not None and (best.fits_whole or len(devices) > 1):
                break
        return best

    made = fits(base, budget)
    if made is not None:
        return made, made.text()
    for side in (side for side in _SMALLER if side < base):
        if (made := fits(side, budget)) is not None:
            return made, f"{base}x{base} does not fit, {side}x{side} does.\n{made.text()}"
    if folder.stored_format == "bf16":  # a pack is what it is
        sizes |= {name: _sizes(folder, options, name) for name in FORMATS if name == storage_of(name)} | sizes
    *_others, (devices, least) = _choices(options.device, asked)
    limits = [budget.vram, budget.ram, *budget.by_device.values()]
    own = any(limit is not None for limit in limits) and fits(base, Budget()) is not None
    advice = " It fits without the limits in vram_budget, ram_budget and gpu_split." if own else ""
    try:
        plan(
            config,
            sizes[options.format],
            _devices(devices, budget),
            _host(folder, options, budget),
            work,
            replace(freedom, least=least),
            alternatives=sizes,
        )
    except OutOfBudgetError as error:
        raise OutOfBudgetError(f"This model cannot be drawn with here: {error}{advice}") from None
    raise AssertionError("a plan that was refused before is there now")


def split_of(plan: Plan) -> LayerSplit:
    """The devices of a plan, with their numbers of layers."""
    names = [layer.device for layer in plan.layers]
    return LayerSplit(tuple((torch.device(name), names.count(name)) for name in dict.fromkeys(names)))


def _choices(
    home: torch.device, asked: SplitRequest | None
) -> Iterator[tuple[tuple[torch.device, ...], tuple[int, ...] | None]]:
    """(devices that may be used together, layers that each must have at least), in the order in which to try them.

    Who names devices gets all of them. Otherwise the home computes, if anything can be drawn like that. Other cards are
    not touched before they are needed: that alone takes memory on them.
    """
    if asked is not None and asked.devices:
        yield asked.devices, (1,) * len(asked.devices)
        return
    yield (home,), None
    others = () if asked is None else other_cards(home)
    if others:
        yield (home, *others), (1,) + (0,) * len(others)
        yield (home, *others), None


def other_cards(home: torch.device) -> tuple[torch.device, ...]:
    """The CUDA cards (ROCm included) beside this one."""
    if home.type != "cuda":
        return ()
    cards = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return tuple(card for card in cards if card != torch.device("cuda", home.index or 0) and works(card))


def _sizes(folder: ModelFolder, options: ResolvedOptions, weight_format: str) -> PartSizes:
    one_by_one = 1 if options.moe_backend == "loop" else None
    return sizes_of(folder.config, weight_format, options.dtype, options.vae_dtype, experts_at_once=one_by_one)


def _devices(devices: Sequence[torch.device], budget: Budget) -> list[DeviceBudget]:
    """Compute devices with what ComfyUI could free on each, within the budget. Stand-ins on a CPU share its memory."""
    return [_device(device, budget, sharing=len(devices)) for device in devices]


def _device(device: torch.device, budget: Budget, sharing: int = 1) -> DeviceBudget:
    """`sharing`: devices that have the CPU's memory in common."""
    free, limit = _most_free(device), budget.device_bytes(device)
    is_cpu = mm.is_device_cpu(device)
    if is_cpu:
        free /= sharing
    nbytes = int(free if limit is None else min(free, limit))
    if is_cpu:
        return DeviceBudget(str(device), nbytes, Rate(_CPU_COMPUTE), Rate(_CPU_MEMORY))
    compute, memory = rates_of_card(mm.get_total_memory(device) / GIB)
    return DeviceBudget(str(device), nbytes, Rate(compute), Rate(memory))


def _host(folder: ModelFolder, options: ResolvedOptions, budget: Budget) -> HostBudget:
    """Host memory for weights, and whether they may stay on disk. Where the device is the host, all that it may use."""
    device = options.device
    if mm.is_device_cpu(device):
        return HostBudget(pinned=0, pageable=_device(device, budget).nbytes, disk=Rate(0.0))
    free = _most_free(HOST)
    free = max(0.0, free - kept_free_on_host())
    usable = int(free if budget.ram is None else min(free, budget.ram))
    pinned = min(usable, most_pinned()) if device.type == "cuda" else 0
    disk = Rate(DISK if reads_from_files(options.format, folder.stored_format) else 0.0)
    return HostBudget(pinned=pinned, pageable=usable - pinned, disk=disk)


def most_pinned() -> int:
    """Bytes of host memory that may be page-locked: half of it, as much as Windows allows."""
    return int(mm.get_total_memory(HOST)) // 2


def _most_free(device: torch.device) -> float:
    """Bytes that ComfyUI could free on a device. Of host memory only what is free, and our own weights in it."""
    if not mm.is_device_cpu(device):
        return most_free_memory(device)
    loaded = sum(model.model_loaded_memory() for model in mm.current_loaded_models if mm.is_device_cpu(model.device))
    return mm.get_free_memory(HOST) + loaded
