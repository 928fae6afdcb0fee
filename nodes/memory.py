"""The networks as ComfyUI's memory manager sees them: counted, loaded and evicted by it, each alone."""

import logging
import weakref
from collections.abc import Sequence

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ..hunyuan3.callbacks import Progress, no_progress
from ..hunyuan3.errors import OutOfBudgetError, RequestError
from ..hunyuan3.generate.prefix import PrefixStore
from ..hunyuan3.placement.out_of_memory import is_out_of_host_memory
from ..hunyuan3.placement.placed import PlacedModule
from .out_of_memory import EVERYTHING_ELSE, with_one_retry

_log = logging.getLogger(__name__)

GIB = 2**30
_HOST = torch.device("cpu")


class Budget:
    """What the parts of one handle may take together, weights and work; None: what ComfyUI can give.

    vram: bytes on the compute device. ram: bytes of evicted weights in host memory; for a device that is the host,
    both are one, and the smaller counts.
    """

    def __init__(self, vram: int | None = None, ram: int | None = None) -> None:
        self.vram = vram
        self.ram = ram
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
        limits = [self.vram, self.ram if mm.is_device_cpu(device) else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def make_room(self, wanted: "Sequence[PartPatcher]", work: int) -> None:
        """Takes the handle's other parts off the device as far as these and their work need the room.

        Raises OutOfBudgetError if they alone need more.
        """
        limit = self.device_bytes(wanted[0].load_device)
        if limit is None:
            for part in wanted:
                part.room = None
            return
        weights = sum(part.least_bytes for part in wanted)
        others = [part for part in self.parts if part not in wanted]
        over = weights + work + sum(part.loaded_size() for part in others) - limit
        for part in others:
            if over > 0 and part.loaded_size():
                before = part.loaded_size()
                # On the CPU what is kept frees nothing.
                part.drop() if mm.is_device_cpu(part.load_device) else part.partially_unload(_HOST, over)
                over -= before - part.loaded_size()
        if over + sum(part.kept_bytes() for part in wanted) > 0:
            for part in wanted:
                part.give_up_kept()
        for part in wanted:  # what may stream takes what is left
            part.room = max(0, -over)
        if over > 0:
            names = " and the ".join(part.placed.name for part in wanted)
            raise OutOfBudgetError(
                f"The {names} takes {weights / GIB:.2f} GiB and its work {work / GIB:.2f} GiB; the loader's budget "
                f"allows {limit / GIB:.2f} GiB. Raise vram_budget or ram_budget (0: all there is), choose a smaller "
                "format in the loader, or ask for a smaller picture."
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
        self.room: int | None = None  # bytes beyond `least_bytes` that the loader's budget allows

    @property
    def least_bytes(self) -> int:
        """Bytes that must be on the device for the part to run: not those of experts that may stream."""
        ring = 0 if self.placed.streams is None else self.placed.streams.full_nbytes
        return self.placed.required_bytes + ring

    @classmethod
    def of(
        cls, placed: PlacedModule, prefixes: PrefixStore | None = None, budget: Budget | None = None
    ) -> "PartPatcher":
        """The patcher of a part that computes on its own device.

        prefixes: kept prompts that count as part of it. budget: shared with the handle's other parts.
        """
        part = cls(
            placed.module, placed.device, _HOST, placed.total_bytes, placed=placed, prefixes=prefixes, budget=budget
        )
        part.budget.add(part)
        return part

    def clone(self) -> "PartPatcher":
        copy = super().clone()
        copy.placed = self.placed
        copy.prefixes = self.prefixes
        copy.budget = self.budget
        copy.progress = self.progress
        return copy

    def is_dynamic(self) -> bool:
        """No: this part manages its own weights (newer ComfyUI asks)."""
        return False

    def model_size(self) -> int:
        """Bytes that it wants on the device. Once it is ready, what streams wants no more than it has."""
        if self.placed is None:
            return self.size
        if self.placed.streams is not None and self.placed.is_ready:
            return self.loaded_size()
        return self.placed.total_bytes + self.kept_bytes()

    def loaded_size(self) -> int:
        """Bytes on the device: weights, kept prompts, and the ring of what streams."""
        if self.placed is None:
            return 0
        ring = 0 if self.placed.streams is None else self.placed.streams.nbytes
        return self.placed.loaded_bytes + self.kept_bytes() + ring

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def model_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Loads what is missing; returns the bytes that came to the device. `extra_memory`: bytes that may be used."""
        missing = self.model_size() - self.loaded_size()
        if missing == 0 and self.placed.streams is None:
            return 0
        before = self.loaded_size()
        try:
            if self.placed.streams is None:
                self._require_room(missing, extra_memory)
                room = None
            else:
                room = self._settle_streams(extra_memory)
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
        freed = self.give_up_kept()
        if freed < memory_to_free:
            freed += self.placed.unload(int(memory_to_free) - freed, self.budget.host_has_room)
        self._tell_model()
        _log.info("%s: %.2f GiB evicted, %.2f GiB stay", self.placed.name, freed / GIB, self.loaded_size() / GIB)
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

    def _settle_streams(self, extra_memory: float) -> int:
        """Bytes that experts may still take on the device, when `extra_memory` more may be used; 0 after some had to go
        to make room.
        """
        streams, placed = self.placed.streams, self.placed
        beside = sum(unit.nbytes for unit in placed.units if unit.streams and placed.is_on_device(unit))
        missing = placed.required_bytes - (placed.loaded_bytes - beside)
        room = int(min(extra_memory, 2**62)) - (streams.full_nbytes - streams.nbytes) - missing
        if self.room is not None:
            room = min(room, self.room - beside)
        if room < 0:
            room += self.give_up_kept()
        if room < 0:
            room += placed.shrink(-room, self.budget.host_has_room)
        if room < 0:
            self._require_room(missing - room, missing)
        return missing + room

    def _require_room(self, missing: int, room: float) -> None:
        if missing > room:
            raise RequestError(
                f"The {self.placed.name} needs {missing / GIB:.1f} GiB more on {self.load_device}, ComfyUI can give it "
                f"{max(room, 0) / GIB:.1f} GiB. Close other programs that use the card, or use a larger one."
            )

    def kept_bytes(self) -> int:
        """Bytes of kept prompts."""
        return 0 if self.prefixes is None else self.prefixes.nbytes

    def give_up_kept(self) -> int:
        """Drops the kept prompts; returns the bytes freed."""
        return 0 if self.prefixes is None else self.prefixes.clear()

    def make_way(self, nbytes: int) -> int:
        """Frees so many bytes on the device, if it can without ceasing to be ready; returns the bytes freed."""
        freed = self.give_up_kept()
        if freed < nbytes and self.placed.streams is not None:
            freed += self.placed.shrink(nbytes - freed, self.budget.host_has_room)
            self._tell_model()
        return freed

    def _tell_model(self) -> None:
        self.model.model_loaded_weight_memory = self.loaded_size()


def bring_to_device(
    parts: PartPatcher | Sequence[PartPatcher],
    memory_required: int,
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
    parts[0].budget.make_room(parts, memory_required)
    with_one_retry(
        f"loading the {' and the '.join(part.placed.name for part in parts)}",
        lambda _plan: _load(parts, memory_required, progress),
        None,
        lambda _plan, _error: (None, EVERYTHING_ELSE),
        parts=parts,
        expected=lambda _plan: sum(part.model_size() - part.loaded_size() for part in parts),
        advice=lambda _plan: advice,
        tell=lambda text: progress(text, 0, 1),
    )
    for part in parts:
        missing = memory_required - mm.get_free_memory(part.load_device)
        if missing > 0 and part.make_way(int(missing)):
            mm.soft_empty_cache()


def _load(parts: Sequence[PartPatcher], memory_required: int, progress: Progress) -> None:
    for part in parts:
        part.progress = progress
    try:
        mm.load_models_gpu(parts, memory_required=memory_required)
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
