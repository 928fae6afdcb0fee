"""The loader's plan: what this machine has, as ComfyUI knows it, and what the model would do with it."""

from dataclasses import replace

import comfy.model_management as mm
import torch

from ..hunyuan3.errors import OutOfBudgetError
from ..hunyuan3.folder import ModelFolder
from ..hunyuan3.parts import ResolvedOptions
from ..hunyuan3.placement.budget import DeviceBudget, HostBudget, PartSizes, Rate, Workload
from ..hunyuan3.placement.plan import Plan
from ..hunyuan3.placement.planner import attempt, plan
from ..hunyuan3.plan import rates_of_card, sizes_of
from ..hunyuan3.quant.policy import FORMATS, storage_of
from .memory import GIB, Budget, most_free_memory

_HOST = torch.device("cpu")
_CPU_COMPUTE, _CPU_MEMORY = 1e12, 50e9  # FLOP/s and bytes/s of an ordinary processor; assumed
_SMALLER = (1024, 768, 512, 256, 128)  # sides of pictures that are tried where the base size does not fit


def planned(folder: ModelFolder, options: ResolvedOptions, budget: Budget) -> tuple[Plan, str]:
    """(plan, the same as text). Where the model's own base size does not fit, that of the largest square that does,
    saying so.

    Raises OutOfBudgetError with numbers and advice if no picture can be drawn. On a CPU all weights must fit; to any
    other device experts may be streamed from host memory.
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
    device, host = _device(options.device, budget), _host(options.device, budget)
    ways = {"streaming": not mm.is_device_cpu(options.device), "split": False}

    def fits(side: int) -> Plan | None:
        smaller = replace(work, width=side, height=side)
        made = attempt(config, sizes[options.format], [device], host, smaller, **ways)
        return made if isinstance(made, Plan) else None

    made = fits(base)
    if made is not None:
        return made, made.text()
    for side in (side for side in _SMALLER if side < base):
        if (made := fits(side)) is not None:
            return made, f"{base}x{base} does not fit, {side}x{side} does.\n{made.text()}"
    if folder.stored_format == "bf16":  # a pack is what it is
        sizes |= {name: _sizes(folder, options, name) for name in FORMATS if name == storage_of(name)} | sizes
    try:
        plan(config, sizes[options.format], [device], host, work, alternatives=sizes, **ways)
    except OutOfBudgetError as error:
        raise OutOfBudgetError(f"This model cannot be drawn with here: {error}") from None
    raise AssertionError("a plan that was refused before is there now")


def _sizes(folder: ModelFolder, options: ResolvedOptions, weight_format: str) -> PartSizes:
    one_by_one = 1 if options.moe_backend == "loop" else None
    return sizes_of(folder.config, weight_format, options.dtype, options.vae_dtype, experts_at_once=one_by_one)


def _device(device: torch.device, budget: Budget) -> DeviceBudget:
    """The compute device with what ComfyUI could free on it, within the budget."""
    free = _most_free(device)
    limit = budget.device_bytes(device)
    nbytes = int(free if limit is None else min(free, limit))
    if mm.is_device_cpu(device):
        return DeviceBudget("cpu", nbytes, Rate(_CPU_COMPUTE), Rate(_CPU_MEMORY))
    compute, memory = rates_of_card(mm.get_total_memory(device) / GIB)
    return DeviceBudget(str(device), nbytes, Rate(compute), Rate(memory))


def _host(device: torch.device, budget: Budget) -> HostBudget:
    """Host memory for weights. Where the device is the host, all that it may use."""
    if mm.is_device_cpu(device):
        return HostBudget(pinned=0, pageable=_device(device, budget).nbytes, disk=Rate(0.0))
    free = _most_free(_HOST)
    usable = int(free if budget.ram is None else min(free, budget.ram))
    pinned = min(usable, most_pinned()) if device.type == "cuda" else 0
    return HostBudget(pinned=pinned, pageable=usable - pinned, disk=Rate(0.0))


def most_pinned() -> int:
    """Bytes of host memory that may be page-locked: half of it, as much as Windows allows."""
    return int(mm.get_total_memory(_HOST)) // 2


def _most_free(device: torch.device) -> float:
    """Bytes that ComfyUI could free on a device. Of host memory only what is free, and our own weights in it."""
    if not mm.is_device_cpu(device):
        return most_free_memory(device)
    loaded = sum(model.model_loaded_memory() for model in mm.current_loaded_models if mm.is_device_cpu(model.device))
    return mm.get_free_memory(_HOST) + loaded
