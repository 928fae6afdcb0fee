"""How much memory a loaded model may use: what its loader allows, and what ComfyUI can give."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import comfy.model_management as mm
import torch

from ..hunyuan3.errors import OutOfBudgetError

if TYPE_CHECKING:
    from .memory import PartPatcher

GIB = 2**30
HOST = torch.device("cpu")


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
        self.loading = False  # the handle's own parts are taking turns on a device
        # Weakly: weights must die with their handle at once, not at the next garbage collection.
        self._parts: list[weakref.ref[PartPatcher]] = []

    @property
    def parts(self) -> list[PartPatcher]:
        """The handle's parts."""
        return [part for ref in self._parts if (part := ref()) is not None]

    @contextmanager
    def own_turns(self) -> Iterator[None]:
        """What is evicted meanwhile makes room for the handle's own work."""
        before, self.loading = self.loading, True
        try:
            yield
        finally:
            self.loading = before

    def add(self, part: PartPatcher) -> None:
        """Counts a part among them."""
        self._parts.append(weakref.ref(part))

    def device_bytes(self, device: torch.device) -> int | None:
        """The limit on a device."""
        limits = [self.vram, self.by_device.get(device), self.ram if mm.is_device_cpu(device) else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def make_room(self, wanted: Sequence[PartPatcher], work: Work) -> None:
        """Takes the handle's other parts off a device as far as these, which compute there, and their work need it.

        Raises OutOfBudgetError if they alone need more.
        """
        device = wanted[0].load_device
        limit = self.device_bytes(device)
        if limit is None:
            for part in wanted:
                part.room = None
            return
        weights = sum(part.least_bytes for part in wanted)
        work_bytes = work.on(max(part.share for part in wanted))
        others = [part for part in self.parts if part.load_device == device and part not in wanted]
        over = weights + work_bytes + sum(part.loaded_size() for part in others) - limit
        for part in others:
            if over > 0 and part.loaded_size():
                before = part.loaded_size()
                # On the CPU what is kept frees nothing.
                part.drop() if mm.is_device_cpu(device) else part.partially_unload(HOST, over)
                over -= before - part.loaded_size()
        if over + sum(part.kept_bytes() for part in wanted) > 0:
            for part in wanted:
                part.give_up_kept()
        for part in wanted:  # what may stream takes what is left
            part.room = max(0, -over)
        if over > 0:
            names = " and the ".join(part.placed.name for part in wanted)
            raise OutOfBudgetError(
                f"The {names} takes {weights / GIB:.2f} GiB on {device} and its work {work_bytes / GIB:.2f} GiB; the "
                f"loader's budget allows {limit / GIB:.2f} GiB. Raise vram_budget, ram_budget or the memory in "
                "gpu_split, choose a smaller format in the loader, or ask for a smaller picture."
            )

    def host_has_room(self, nbytes: int) -> bool:
        """Whether so many bytes of evicted weights may stay in host memory: see `host_room`."""
        return nbytes <= self.host_room()

    def host_room(self) -> float:
        """Bytes of weights that may still come to host memory: within the budget, a tenth of the host stays free."""
        room = mm.get_free_memory(HOST) - kept_free_on_host()
        if self.ram is None:
            return room
        return min(room, self.ram - sum(placed.host_bytes for placed in {part.placed for part in self.parts}))


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


def most_free_memory(device: torch.device) -> float:
    """Bytes that ComfyUI could free on a device by evicting every model."""
    return mm.get_total_memory(device) - mm.extra_reserved_memory()


def kept_free_on_host() -> float:
    """Bytes of the host's memory that stay free: a tenth of it."""
    return 0.1 * mm.get_total_memory(HOST)
