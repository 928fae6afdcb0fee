"""The networks as ComfyUI's memory manager sees them: counted, loaded and evicted by it, each alone."""

import logging
from collections.abc import Callable, Sequence

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

from ..hunyuan3.callbacks import Progress, no_progress
from ..hunyuan3.errors import RequestError
from ..hunyuan3.generate.prefix import PrefixStore
from ..hunyuan3.placement.placed import PlacedModule

_log = logging.getLogger(__name__)

GIB = 2**30


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
    ) -> None:
        super().__init__(model, load_device, offload_device, size, weight_inplace_update)
        self.placed = placed
        self.prefixes = prefixes
        self.progress: Progress = no_progress

    @classmethod
    def of(cls, placed: PlacedModule, prefixes: PrefixStore | None = None) -> "PartPatcher":
        """The patcher of a part that computes on its own device. `prefixes`: kept prompts that count as part of it."""
        cpu = torch.device("cpu")
        return cls(placed.module, placed.device, cpu, placed.total_bytes, placed=placed, prefixes=prefixes)

    def clone(self) -> "PartPatcher":
        copy = super().clone()
        copy.placed = self.placed
        copy.prefixes = self.prefixes
        copy.progress = self.progress
        return copy

    def is_dynamic(self) -> bool:
        """No: this part manages its own weights (newer ComfyUI asks)."""
        return False

    def model_size(self) -> int:
        return self.placed.total_bytes + self._kept_bytes() if self.placed is not None else self.size

    def loaded_size(self) -> int:
        return self.placed.loaded_bytes + self._kept_bytes() if self.placed is not None else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def model_dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Loads what is missing; returns the bytes that came to the device. `extra_memory`: bytes that may be used."""
        missing = self.model_size() - self.loaded_size()
        if missing == 0:
            return 0
        before = self.loaded_size()
        try:
            self._require_room(missing, extra_memory)
            self.placed.load(progress=self.progress, check_cancelled=mm.throw_exception_if_processing_interrupted)
        except BaseException:
            # The manager does not list a part whose loading failed, so nobody would ever evict what is there already.
            self.give_up_kept()
            self.placed.unload(host_has_room=_host_has_room)
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
            freed += self.placed.unload(int(memory_to_free) - freed, _host_has_room)
        self._tell_model()
        _log.info("%s: %.2f GiB evicted, %.2f GiB stay", self.placed.name, freed / GIB, self.loaded_size() / GIB)
        return freed

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """Evicts everything if `unpatch_all`; the manager also calls this with False merely to re-list a part."""
        self.eject_model()
        if unpatch_all:
            self.give_up_kept()
            self.placed.unload(host_has_room=_host_has_room)
            self._tell_model()
        return self.model

    def patch_model(self, *args: object, **kwargs: object) -> torch.nn.Module:
        return self.model

    def unpatch_model(self, *args: object, **kwargs: object) -> None:
        return None

    def add_patches(self, *args: object, **kwargs: object) -> list[str]:
        raise RequestError("LoRA and other weight patches are not supported for Hunyuan Image 3 yet.")

    def _require_room(self, missing: int, room: float) -> None:
        if missing > room:
            raise RequestError(
                f"The {self.placed.name} needs {missing / GIB:.1f} GiB more on {self.load_device}, ComfyUI can give it "
                f"{max(room, 0) / GIB:.1f} GiB. Close other programs that use the card, or use a larger one."
            )

    def _kept_bytes(self) -> int:
        return 0 if self.prefixes is None else self.prefixes.nbytes

    def give_up_kept(self) -> int:
        """Drops the kept prompts; returns the bytes freed."""
        return 0 if self.prefixes is None else self.prefixes.clear()

    def _tell_model(self) -> None:
        self.model.model_loaded_weight_memory = self.loaded_size()


def bring_to_device(
    parts: PartPatcher | Sequence[PartPatcher], memory_required: int, progress: Callable[[str, int, int], None]
) -> None:
    """Has the memory manager load parts together, with so many bytes to spare for the work, evicting others if needed.

    Kept prompts are given up where the room is still too small: the manager never evicts from what it is asked to load.
    """
    parts = [parts] if isinstance(parts, PartPatcher) else list(parts)
    for part in parts:
        part.progress = progress
    try:
        mm.load_models_gpu(parts, memory_required=memory_required)
    finally:
        for part in parts:
            part.progress = no_progress
    for part in parts:
        if mm.get_free_memory(part.load_device) < memory_required and part.give_up_kept():
            mm.soft_empty_cache()


def most_free_memory(device: torch.device) -> float:
    """Bytes that ComfyUI could free on a device by evicting every model."""
    return mm.get_total_memory(device) - mm.extra_reserved_memory()


def _host_has_room(nbytes: int) -> bool:
    """Whether evicted weights may stay in host memory: it must keep a tenth of itself free."""
    cpu = torch.device("cpu")
    return mm.get_free_memory(cpu) - nbytes > 0.1 * mm.get_total_memory(cpu)
