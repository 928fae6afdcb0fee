"""The networks as ComfyUI's memory manager sees them: counted, loaded and evicted by it, each alone."""

import logging
from collections.abc import Sequence

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ..hunyuan3.callbacks import Progress, no_progress
from ..hunyuan3.errors import RequestError
from ..hunyuan3.generate.prefix import PrefixStore
from ..hunyuan3.placement.out_of_memory import is_out_of_host_memory
from ..hunyuan3.placement.placed import PlacedModule
from ..hunyuan3.placement.split import LayerSplit
from .budget import GIB, HOST, Budget, Work
from .out_of_memory import EVERYTHING_ELSE, with_one_retry

_log = logging.getLogger(__name__)


class PartPatcher(ModelPatcher):
    """Moves what a `PlacedModule` has on one device when the memory manager asks; weights are read when first loaded.

    A part whose layers are split over several devices has one such patcher for each, `beside` its first, so that the
    manager counts and evicts on all of them. Evicted weights stay in host memory while it has room, else they are
    dropped and read again later.
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
        share: float = 1.0,
    ) -> None:
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        self.placed = placed
        self.prefixes = prefixes
        self.budget = budget or Budget()
        self.share = share  # of the layers, those on this device
        self.progress: Progress = no_progress
        self.room: int | None = None  # bytes beyond `least_bytes` that the loader's budget allows
        self.work = Work(0)  # what it is being loaded for
        self.beside: tuple[PartPatcher, ...] = ()  # those of the part's other devices, held by the first

    @classmethod
    def of(
        cls,
        placed: PlacedModule,
        prefixes: PrefixStore | None = None,
        budget: Budget | None = None,
        split: LayerSplit | None = None,
    ) -> "PartPatcher":
        """The patcher of a part, with one beside it for each other device of a `split`.

        prefixes: kept prompts that count as part of it. budget: shared with the handle's other parts.
        """
        runs = ((placed.device, 1),) if split is None else split.runs
        layers = sum(count for _device, count in runs)
        patchers, first = [], 0
        for device, count in runs:
            # The manager takes two patchers of one module for two versions of it.
            module = placed.module if not patchers else torch.nn.ModuleList(placed.module.layers[first : first + count])
            size, share = placed.total_on(device), count / layers
            patchers.append(
                cls(module, device, HOST, size, placed=placed, prefixes=prefixes, budget=budget, share=share)
            )
            first += count
        for patcher in patchers:
            patcher.budget.add(patcher)
        patchers[0].beside = tuple(patchers[1:])
        return patchers[0]

    @property
    def least_bytes(self) -> int:
        """Bytes that must be on the device for the part to run: not those of experts that may stream."""
        return self.placed.required_on(self.load_device) + self.placed.full_ring_on(self.load_device)

    def clone(self) -> "PartPatcher":
        copy = super().clone()
        copy.placed = self.placed
        copy.prefixes = self.prefixes
        copy.budget = self.budget
        copy.progress = self.progress
        copy.share, copy.beside = self.share, self.beside
        return copy

    def is_dynamic(self) -> bool:
        """No: this part manages its own weights (newer ComfyUI asks)."""
        return False

    def model_size(self) -> int:
        """Bytes that it wants on the device. Once it is ready, what streams wants no more than it has."""
        if self.placed is None:
            return self.size
        if self.placed.streams is not None and self.placed.is_ready_on(self.load_device):
            return self.loaded_size()
        return self.placed.total_on(self.load_device) + self.kept_bytes()

    def loaded_size(self) -> int:
        """Bytes on the device: weights, kept prompts, and the ring of what streams."""
        if self.placed is None:
            return 0
        device = self.load_device
        return self.placed.loaded_on(device) + self.kept_bytes() + self.placed.ring_on(device)

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def model_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Loads what is missing; returns the bytes that came to the device. `extra_memory`: bytes that may be used."""
        placed, device = self.placed, self.load_device
        if placed.is_ready_on(device) and placed.streams is None:
            return 0
        before = self.loaded_size()
        extra_memory = self._extra(extra_memory)
        # What finds no room on any card comes to the host at last, when it is known how much that is (`_load`).
        host_has_room = self.budget.host_has_room if not placed.from_files else lambda _nbytes: False
        try:
            if placed.streams is None:
                self._require_room(placed.total_on(device) - placed.loaded_on(device), extra_memory)
                room = None
            else:
                room = {device: self._settle_streams(extra_memory)}
            placed.load(
                room=room,
                host_has_room=host_has_room,
                progress=self.progress,
                check_cancelled=mm.throw_exception_if_processing_interrupted,
                device=device,
            )
        except BaseException as error:
            # The manager does not list a part whose loading failed, so nobody would ever evict what is there already.
            self.give_up_kept()
            keep = None if is_out_of_host_memory(error) else self.budget.host_has_room
            placed.unload(host_has_room=keep, device=device)
            raise
        finally:
            self._tell_model()
        return self.loaded_size() - before

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Gives up kept prompts, then whole layers until `memory_to_free` bytes are free; returns the bytes freed."""
        freed = self.give_up_kept()
        if freed < memory_to_free and not self._keeping_frees_nothing():
            freed += self.placed.unload(int(memory_to_free) - freed, self.budget.host_has_room, self.load_device)
        self._tell_model()
        _log.info("%s: %.2f GiB evicted, %.2f GiB stay", self.placed.name, freed / GIB, self.loaded_size() / GIB)
        return freed

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """Evicts everything if `unpatch_all`; the manager also calls this with False merely to re-list a part.

        The part's other devices are freed as well: it cannot run without this one, and ComfyUI's "unload models" names
        its own device alone. Not where the handle's own parts take turns on this one: then it soon comes back.
        """
        self.eject_model()
        if not unpatch_all:
            return self.model
        self.give_up_kept()
        if self.budget.loading:
            self.leave()
            return self.model
        for part in self.budget.parts:
            # Beside a home that left in such a turn, nobody would free the others.
            if part.placed is self.placed or not part.placed.loaded_on(part.placed.device):
                part.leave()
        return self.model

    def leave(self, *, to_host: bool = True) -> None:
        """Evicts everything from this device."""
        self.placed.unload(host_has_room=self.budget.host_has_room if to_host else None, device=self.load_device)
        self._tell_model()

    def _keeping_frees_nothing(self) -> bool:
        """Whether device and host are the same memory, and there is room to stay in it."""
        return mm.is_device_cpu(self.load_device) and self.budget.host_has_room(0)

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
        placed, device = self.placed, self.load_device
        streamed = [unit for unit in placed.units if unit.streams and unit.device == device]
        beside = sum(unit.nbytes for unit in streamed if placed.is_on_device(unit))
        missing = placed.required_on(device) - (placed.loaded_on(device) - beside)
        room = int(min(extra_memory, 2**62)) - (placed.full_ring_on(device) - placed.ring_on(device)) - missing
        if self.room is not None:
            room = min(room, self.room - beside)
        if room < 0:
            room += self.give_up_kept()
        if room < 0:
            room += placed.shrink(-room, self.budget.host_has_room, device)
        if room < 0:
            self._require_room(missing - room, missing)
        return missing + room

    def _extra(self, extra_memory: float) -> float:
        """Bytes that may be used, where the manager does not measure them (its high and no VRAM states)."""
        if mm.is_device_cpu(self.load_device) or 1 < extra_memory < 1e31:
            return extra_memory
        reserved = max(mm.minimum_inference_memory(), self.work.on(self.share) + mm.extra_reserved_memory())
        return mm.get_free_memory(self.load_device) - reserved

    def require_room_beside(self) -> None:
        """Before the home is read: makes room for what this device, which is not the home, must hold, or raises."""
        least = self.least_bytes if self.placed.streams is not None else self.placed.total_on(self.load_device)
        missing = least - self.placed.loaded_on(self.load_device) - self.placed.ring_on(self.load_device)
        if missing <= 0 or mm.is_device_cpu(self.load_device):
            return
        work = self.work.on(self.share) + mm.extra_reserved_memory()
        ours = [loaded for loaded in mm.current_loaded_models if loaded.model is self]
        mm.free_memory(missing + work, self.load_device, keep_loaded=ours)
        if mm.get_free_memory(self.load_device) < missing + work:
            self.give_up_kept()
        self._require_room(missing, mm.get_free_memory(self.load_device) - work)

    def _require_room(self, missing: int, room: float) -> None:
        if missing > room:
            raise RequestError(
                f"The {self.placed.name} needs {missing / GIB:.1f} GiB more on {self.load_device}, ComfyUI can give it "
                f"{max(room, 0) / GIB:.1f} GiB. Close other programs that use the card, or use a larger one."
            )

    def kept_bytes(self) -> int:
        """Bytes of kept prompts on this device: each layer's are where it computes."""
        return 0 if self.prefixes is None else round(self.prefixes.nbytes * self.share)

    def give_up_kept(self) -> int:
        """Drops the kept prompts, on all devices; returns the bytes freed on this one."""
        freed = self.kept_bytes()
        if self.prefixes is not None:
            self.prefixes.clear()
        return freed

    def make_way(self, nbytes: int) -> int:
        """Frees so many bytes on the device, if it can without ceasing to be ready; returns the bytes freed."""
        freed = self.give_up_kept()
        if freed < nbytes and self.placed.streams is not None:
            freed += self.placed.shrink(nbytes - freed, self.budget.host_has_room, self.load_device)
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
    asked = [parts] if isinstance(parts, PartPatcher) else list(parts)
    work = Work(work) if isinstance(work, int) else work
    everywhere = [patcher for part in asked for patcher in (part, *part.beside)]
    devices = dict.fromkeys(patcher.load_device for patcher in everywhere)
    groups = [[patcher for patcher in everywhere if patcher.load_device == device] for device in devices]
    for group in groups:
        group[0].budget.make_room(group, work)
    with_one_retry(
        f"loading the {' and the '.join(part.placed.name for part in asked)}",
        lambda _plan: _load(groups, work, progress),
        None,
        lambda _plan, _error: (None, EVERYTHING_ELSE),
        parts=everywhere,
        expected=lambda _plan: sum(part.model_size() - part.loaded_size() for part in everywhere),
        advice=lambda _plan: advice,
        tell=lambda text: progress(text, 0, 1),
    )
    for group in groups:
        for part in group:
            missing = work.on(part.share) - mm.get_free_memory(part.load_device)
            if missing > 0 and part.make_way(int(missing)):
                mm.soft_empty_cache()


def _load(groups: Sequence[Sequence[PartPatcher]], work: Work, progress: Progress) -> None:
    """Each group is of one device. If one fails, nothing stays where nobody evicts it."""
    everywhere = [part for group in groups for part in group]
    for part in everywhere:
        part.progress, part.work = progress, work
    try:
        with everywhere[0].budget.own_turns():
            for part in everywhere:
                if part.load_device != part.placed.device:
                    part.require_room_beside()
            for group in groups:
                mm.load_models_gpu(group, memory_required=work.on(max(part.share for part in group)))
            for part in everywhere:
                if part.placed.from_files and part.load_device == part.placed.device:
                    part.placed.load(
                        room=dict.fromkeys(part.placed.devices, 0),
                        host_has_room=part.budget.host_has_room,
                        progress=progress,
                        check_cancelled=mm.throw_exception_if_processing_interrupted,
                    )
    except BaseException as error:
        # The manager takes all of them off its list before it loads the first: those that it did not come to would
        # stay on the card where nobody evicts them. Without its home, no part of a network stays anywhere.
        listed = mm.loaded_models()
        lost = {part.placed for part in everywhere if part not in listed and part.load_device == part.placed.device}
        for part in everywhere:
            if part not in listed or part.placed in lost:
                part.give_up_kept()
                part.leave(to_host=not is_out_of_host_memory(error))
        raise
    finally:
        for part in everywhere:
            part.progress = no_progress
