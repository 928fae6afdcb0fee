"""The networks as ComfyUI's memory manager sees them: counted, loaded and evicted by it, each alone."""

import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ..hunyuan3.callbacks import Progress, no_progress
from ..hunyuan3.errors import OutOfBudgetError, RequestError
from ..hunyuan3.generate.prefix import PrefixStore
from ..hunyuan3.placement.out_of_memory import is_out_of_host_memory
from ..hunyuan3.placement.placed import PlacedModule, Unit
from ..hunyuan3.placement.split import LayerSplit
from .out_of_memory import EVERYTHING_ELSE, with_one_retry

_log = logging.getLogger(__name__)

GIB = 2**30
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """Bytes beside the weights. activations: on whichever device computes. cache: keys and values of all layers, each
    layer's on its device.
    """

    activations: int
    cache: int = 0

    @property
    def total(self) -> int:
        """Where one device does everything."""
        return self.activations + self.cache

    def on(self, share: float) -> int:
        """On a device that computes this share of the layers."""
        return self.activations + ceil(self.cache * share)


class Budget:
    """What the parts of one handle may take together, weights and work; None: what ComfyUI can give.

    vram: bytes on each device that computes; by_device: on some of them (the smaller counts). ram: bytes of evicted
    weights in host memory; for a device that is the host, both are one, and the smaller counts.
    """

    def __init__(
        self,
        vram: int | None = None,
        ram: int | None = None,
        by_device: Mapping[torch.device, int] | None = None,
    ) -> None:
        self.vram = vram
        self.ram = ram
        self.by_device = dict(by_device or {})
        # Weakly: weights must die with their handle at once, not at the next garbage collection.
        self._parts: list[weakref.ref[PartPatcher]] = []

    @property
    def parts(self) -> "list[PartPatcher]":
        """The handle's parts."""
        return [part for ref in self._parts if (part := ref()) is not None]

    def add(self, part: "PartPatcher") -> None:
        """Counts a part among them."""
        self._parts.append(weakref.ref(part))

    def device_bytes(self, device: torch.device) -> int | None:
        """The limit on a device."""
        limits = [self.vram, self.by_device.get(device), self.ram if mm.is_device_cpu(device) else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def make_room(self, wanted: "Sequence[PartPatcher]", work: Work) -> None:
        """Takes the handle's other parts off the devices as far as these and their work need the room.

        Raises OutOfBudgetError if they alone need more.
        """
        for part in wanted:
            part.room = {}
        for device in dict.fromkeys(device for part in wanted for device in part.placed.devices):
            self._make_room_on(device, [part for part in wanted if device in part.placed.devices], work)

    def _make_room_on(self, device: torch.device, wanted: "Sequence[PartPatcher]", work: Work) -> None:
        limit = self.device_bytes(device)
        if limit is None:
            return
        weights = sum(part.least_on(device) for part in wanted)
        work_bytes = work.on(max(part.share_of(device) for part in wanted))
        others = [part for part in self.parts if part not in wanted]
        over = weights + work_bytes + sum(part.held_on(device) for part in others) - limit
        for part in others:
            if over > 0 and part.held_on(device):
                before = part.held_on(device)
                # On the CPU what is kept frees nothing.
                part.drop() if mm.is_device_cpu(device) else part.make_off(device, over)
                over -= before - part.held_on(device)
        if over + sum(part.kept_on(device) for part in wanted) > 0:
            for part in wanted:
                part.give_up_kept()
        for part in wanted:  # what may stream takes what is left
            part.room[device] = max(0, -over)
        if over > 0:
            names = " and the ".join(part.placed.name for part in wanted)
            where = "" if len(wanted[0].placed.devices) == 1 else f" on {device}"
            raise OutOfBudgetError(
                f"The {names} takes {weights / GIB:.2f} GiB{where} and its work {work_bytes / GIB:.2f} GiB; the "
                f"loader's budget allows {limit / GIB:.2f} GiB. Raise vram_budget, ram_budget or the memory in "
                "gpu_split (0: all there is), choose a smaller format in the loader, or ask for a smaller picture."
            )

    def host_has_room(self, nbytes: int) -> bool:
        """Whether evicted weights may stay in host memory: within the budget, and a tenth of the host stays free."""
        kept = sum(part.placed.host_bytes for part in self.parts)
        if self.ram is not None and kept + nbytes > self.ram:
            return False
        return mm.get_free_memory(_HOST) - nbytes > 0.1 * mm.get_total_memory(_HOST)


class PartPatcher(ModelPatcher):
    """Moves a `PlacedModule` when the memory manager asks; its weights are read when they are first loaded.

    Evicted weights stay in host memory while it has room, else they are dropped and read again later.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        load_device: torch.device,
        offload_device: torch.device,
        size: int = 0,
        weight_inplace_update: bool = False,
        placed: PlacedModule | None = None,
        prefixes: PrefixStore | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        self.placed = placed
        self.prefixes = prefixes
        self.budget = budget or Budget()
        self.progress: Progress = no_progress
        self.shares: Mapping[torch.device, float] = {load_device: 1.0}
        self.room: dict[torch.device, int] = {}  # bytes beyond `least_on` that the loader's budget allows; absent: any
        self.work = Work(0)  # that the parts are being loaded for

    @classmethod
    def of(
        cls,
        placed: PlacedModule,
        prefixes: PrefixStore | None = None,
        budget: Budget | None = None,
        split: LayerSplit | None = None,
    ) -> "PartPatcher":
        """The patcher of a part that computes on its own device.

        prefixes: kept prompts that count as part of it. budget: shared with the handle's other parts. split: where its
        layers are, if on several devices: this patcher looks after all of them, as the memory manager knows its home
        alone.
        """
        home = placed.total_on(placed.device)
        part = cls(placed.module, placed.device, _HOST, home, placed=placed, prefixes=prefixes, budget=budget)
        if split is not None:
            layers = sum(count for _device, count in split.runs)
            part.shares = {device: count / layers for device, count in split.runs}
        part.budget.add(part)
        return part

    def clone(self) -> "PartPatcher":
        copy = super().clone()
        copy.placed = self.placed
        copy.prefixes = self.prefixes
        copy.budget = self.budget
        copy.progress = self.progress
        copy.shares = self.shares
        return copy

    def share_of(self, device: torch.device) -> float:
        """Of the layers, those that a device computes."""
        return self.shares.get(device, 0.0)

    def least_on(self, device: torch.device) -> int:
        """Bytes that must be on a device for the part to run: not those of experts that may stream."""
        return self.placed.required_on(device) + self.placed.full_ring_on(device)

    def held_on(self, device: torch.device) -> int:
        """Bytes on a device: weights, kept prompts, and the ring of what streams."""
        return self.placed.loaded_on(device) + self.kept_on(device) + self.placed.ring_on(device)

    def kept_on(self, device: torch.device) -> int:
        """Bytes of kept prompts on a device: each layer's are on its own."""
        return 0 if self.prefixes is None else round(self.prefixes.nbytes * self.share_of(device))

    def is_dynamic(self) -> bool:
        """No: this part manages its own weights (newer ComfyUI asks)."""
        return False

    def model_size(self) -> int:
        """Bytes that it wants on its home device. Once it is ready, what streams wants no more than it has."""
        if self.placed is None:
            return self.size
        if self.placed.streams is not None and self.placed.is_ready:
            return self.loaded_size()
        return self.placed.total_on(self.load_device) + self.kept_on(self.load_device)

    def loaded_size(self) -> int:
        """Bytes on its home device; see `held_on`."""
        return 0 if self.placed is None else self.held_on(self.load_device)

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def model_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Loads what is missing; returns the bytes that came to the device. `extra_memory`: bytes that may be used."""
        if self.placed.is_ready and self.placed.streams is None:
            return 0
        before = self.loaded_size()
        try:
            room = {}
            for device in self.placed.devices:
                extra = extra_memory if device == self.load_device else self._free_elsewhere(device)
                if self.placed.streams is None:
                    missing = self.placed.total_on(device) - self.placed.loaded_on(device)
                    self._require_room(device, missing, extra)
                else:
                    room[device] = self._settle_streams(device, extra)
            self.placed.load(
                room=room,
                host_has_room=self.budget.host_has_room,
                progress=self.progress,
                check_cancelled=mm.throw_exception_if_processing_interrupted,
            )
        except BaseException as error:
            # The manager does not list a part whose loading failed, so nobody would ever evict what is there already.
            self.give_up_kept()
            self.placed.unload(host_has_room=None if is_out_of_host_memory(error) else self.budget.host_has_room)
            raise
        finally:
            self._tell_model()
        return self.loaded_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Gives up kept prompts, then whole layers until `memory_to_free` bytes are free; returns the bytes freed."""
        freed = self.make_off(self.load_device, int(min(memory_to_free, 2**62)))
        _log.info("%s: %.2f GiB evicted, %.2f GiB stay", self.placed.name, freed / GIB, self.loaded_size() / GIB)
        return freed

    def make_off(self, device: torch.device, nbytes: int) -> int:
        """Frees so many bytes on a device: kept prompts, then whole layers; returns the bytes freed there."""
        freed = self.kept_on(device)
        self.give_up_kept()
        if freed < nbytes:
            freed += self.placed.unload(nbytes - freed, self.budget.host_has_room, device)
        self._tell_model()
        return freed

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """Evicts everything if `unpatch_all`; the manager also calls this with False merely to re-list a part."""
        self.eject_model()
        if unpatch_all:
            self.give_up_kept()
            self.placed.unload(host_has_room=self.budget.host_has_room)
            self._tell_model()
        return self.model

    def drop(self) -> None:
        """Gives everything up, also what the host would have room for; it is read again when next loaded."""
        self.give_up_kept()
        self.placed.drop()  # experts that wait in host memory, too: it is the host's memory that ran out
        self._tell_model()

    def patch_model(self, *args: object, **kwargs: object) -> torch.nn.Module:
        return self.model

    def unpatch_model(self, *args: object, **kwargs: object) -> None:
        return None

    def add_patches(self, *args: object, **kwargs: object) -> list[str]:
        raise RequestError("LoRA and other weight patches are not supported for Hunyuan Image 3 yet.")

    def _free_elsewhere(self, device: torch.device) -> float:
        """Bytes that may be loaded to a device that is not the home, the work there taken off.

        Others have made way already (`clear_elsewhere`); the memory manager does not look after this device for us.
        """
        return mm.get_free_memory(device) - self._beside_on(device)

    def clear_elsewhere(self) -> None:
        """Evicts others from the devices that the memory manager does not know to be this part's."""
        for device in self.placed.devices:
            if device != self.load_device:
                missing = self.placed.total_on(device) + self.placed.full_ring_on(device) - self.held_on(device)
                if missing > 0:
                    mm.free_memory(missing + self._beside_on(device), device)

    def _beside_on(self, device: torch.device) -> int:
        """Bytes that must stay free beside the weights on a device, as the manager keeps them free on the home."""
        return self.work.on(self.share_of(device)) + int(mm.extra_reserved_memory())

    def _settle_streams(self, device: torch.device, extra_memory: float) -> int:
        """Bytes that experts may still take on a device, when `extra_memory` more may be used; 0 after some had to go
        to make room.
        """
        placed = self.placed
        beside = sum(unit.nbytes for unit in self._streamed_on(device))
        missing = placed.required_on(device) - (placed.loaded_on(device) - beside)
        room = int(min(extra_memory, 2**62)) - (placed.full_ring_on(device) - placed.ring_on(device)) - missing
        if device in self.room:
            room = min(room, self.room[device] - beside)
        if room < 0:
            room += self.kept_on(device)
            self.give_up_kept()
        if room < 0:
            room += placed.shrink(-room, self.budget.host_has_room, device)
        if room < 0:
            self._require_room(device, missing - room, missing)
        return missing + room

    def _streamed_on(self, device: torch.device) -> list[Unit]:
        """Units that could stream, but are on the device."""
        placed = self.placed
        return [unit for unit in placed.units if unit.streams and unit.device == device and placed.is_on_device(unit)]

    def _require_room(self, device: torch.device, missing: int, room: float) -> None:
        if missing > room:
            raise RequestError(
                f"The {self.placed.name} needs {missing / GIB:.1f} GiB more on {device}, ComfyUI can give it "
                f"{max(room, 0) / GIB:.1f} GiB. Close other programs that use the card, or use a larger one."
            )

    def give_up_kept(self) -> int:
        """Drops the kept prompts; returns the bytes freed."""
        return 0 if self.prefixes is None else self.prefixes.clear()

    def make_way(self, device: torch.device, nbytes: int) -> int:
        """Frees so many bytes on a device, if it can without ceasing to be ready; returns the bytes freed there."""
        freed = self.kept_on(device)
        self.give_up_kept()
        if freed < nbytes and self.placed.streams is not None:
            freed += self.placed.shrink(nbytes - freed, self.budget.host_has_room, device)
            self._tell_model()
        return freed

    def _tell_model(self) -> None:
        self.model.model_loaded_weight_memory = self.loaded_size()


def bring_to_device(
    parts: PartPatcher | Sequence[PartPatcher],
    work: Work | int,
    progress: Progress,
    *,
    advice: Sequence[str] = (),
) -> None:
    """Has the memory manager load parts together, with so many bytes to spare for the work, evicting others if needed.

    Kept prompts, and experts that may stream, make way where the room is still too small: the manager never evicts from
    what it is asked to load.
    If memory runs out nevertheless, everything else is evicted and what is missing is loaded once more; then
    OutOfBudgetError is raised, with `advice`, the settings that would make these parts smaller. It is raised at once
    where the loader's budget does not allow the work.
    """
    parts = [parts] if isinstance(parts, PartPatcher) else list(parts)
    work = Work(work) if isinstance(work, int) else work
    parts[0].budget.make_room(parts, work)
    for part in parts:
        part.work = work
    with_one_retry(
        f"loading the {' and the '.join(part.placed.name for part in parts)}",
        lambda _plan: _load(parts, progress),
        None,
        lambda _plan, _error: (None, EVERYTHING_ELSE),
        parts=parts,
        expected=lambda _plan: sum(part.model_size() - part.loaded_size() for part in parts),
        advice=lambda _plan: advice,
        tell=lambda text: progress(text, 0, 1),
    )
    for part in parts:
        for device in part.placed.devices:
            missing = work.on(part.share_of(device)) - mm.get_free_memory(device)
            if missing > 0 and part.make_way(device, int(missing)):
                mm.soft_empty_cache()


def _load(parts: Sequence[PartPatcher], progress: Progress) -> None:
    for part in parts:
        part.progress = progress
        part.clear_elsewhere()
    work = max(part.work.on(part.share_of(part.load_device)) for part in parts)
    try:
        mm.load_models_gpu(parts, memory_required=work)
    except BaseException:
        # The manager takes all of them off its list before it loads the first: those that it did not come to would
        # stay on the card where nobody evicts them.
        for part in parts:
            if part not in mm.loaded_models():
                part.detach()
        raise
    finally:
        for part in parts:
            part.progress = no_progress


def most_free_memory(device: torch.device) -> float:
    """Bytes that ComfyUI could free on a device by evicting every model."""
    return mm.get_total_memory(device) - mm.extra_reserved_memory()
