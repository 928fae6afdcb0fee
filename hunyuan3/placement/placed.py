"""A network whose weights come and go, a unit (a layer) at a time.

Built on the meta device, so it costs nothing until it is loaded. Each unit is either on the compute device, in host
memory, or nowhere (read from the files again when needed). The network itself knows nothing of this.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from ..callbacks import CheckCancelled, Progress, never_cancelled, no_progress
from ..errors import OutOfBudgetError
from .page_lock import PageLock

Read = Callable[[nn.Module, Iterable[str], torch.device, CheckCancelled], None]
"""`read(module, parameter names, device, check_cancelled)` fills these parameters of the module from its files."""

HostHasRoom = Callable[[int], bool]
"""Whether so many bytes may be kept in host memory."""


class Streams(Protocol):
    """What brings units that stream to the compute device while the module runs (see placement.streaming)."""

    def nbytes_on(self, device: torch.device) -> int:
        """Bytes that it holds on a device."""

    def full_nbytes_on(self, device: torch.device) -> int:
        """Bytes that it holds there while the module runs."""

    def moved(self, unit: str, on_device: bool) -> None:
        """A unit came to its device or left it."""

    def release(self, device: torch.device) -> int:
        """Gives its bytes on a device up until it is next needed; returns them."""

    def held_by(self, parameter: str) -> str:
        """Name of the parameter whose weights this one holds: they may have changed places."""


_HOST = torch.device("cpu")
_NOWHERE = torch.device("meta")


@dataclass(frozen=True)
class Unit:
    """Parameters that are moved together. device: where they are computed with. streams: may be used from host memory
    (see placement.streaming).
    """

    name: str
    parameters: tuple[str, ...]
    nbytes: int
    device: torch.device
    streams: bool = False


class PlacedModule:
    """Where a network's weights are.

    `module` is ready to run whenever every unit is on its device or, if it streams, in host memory, or in its files
    where these may be read in every pass. `device` is the home of the network, where it takes its input and gives its
    output; units may have others.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        units: Iterable[Unit],
        device: torch.device,
        read: Read,
        streams: Streams | None = None,
        lock: PageLock | None = None,
        from_files: bool = False,
    ) -> None:
        """Args:
        streams: told of every unit that comes to its device or leaves it; a unit is nowhere at first.
        lock: locks the pages of what streams from host memory.
        from_files: whether units may stream from their files, too.
        """
        self.name = name
        self.module = module
        self.units = _in_order(units)
        self.device = device
        self.devices = tuple(dict.fromkeys((device, *(unit.device for unit in self.units))))
        self._read = read
        self.streams = streams
        self._lock = lock
        self.from_files = from_files
        self._where: dict[str, torch.device] = {unit.name: _NOWHERE for unit in self.units}

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def required_bytes(self) -> int:
        """Bytes of the weights that must be on their devices: all but those that may stream."""
        return sum(self.required_on(device) for device in self.devices)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights that are on their devices and in use."""
        return sum(self.loaded_on(device) for device in self.devices)

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights that are in host memory, off their devices."""
        return sum(unit.nbytes for unit in self.units if self._where[unit.name] == _HOST != unit.device)

    def total_on(self, device: torch.device) -> int:
        """Bytes of the weights that are computed with on a device."""
        return sum(unit.nbytes for unit in self.units if unit.device == device)

    def required_on(self, device: torch.device) -> int:
        """Bytes of those of them that must be there."""
        return sum(unit.nbytes for unit in self.units if unit.device == device and not unit.streams)

    def loaded_on(self, device: torch.device) -> int:
        """Bytes of those of them that are there."""
        return sum(unit.nbytes for unit in self.units if unit.device == device and self.is_on_device(unit))

    def ring_on(self, device: torch.device) -> int:
        """Bytes that what brings streamed weights holds on a device now."""
        return 0 if self.streams is None else self.streams.nbytes_on(device)

    def full_ring_on(self, device: torch.device) -> int:
        """Bytes that it holds there while the module runs."""
        return 0 if self.streams is None else self.streams.full_nbytes_on(device)

    @property
    def file_bytes(self) -> int:
        """Bytes of the weights that are in no memory."""
        return sum(self.file_bytes_on(device) for device in self.devices)

    def file_bytes_on(self, device: torch.device) -> int:
        """Bytes of those of them that are computed with on a device."""
        return sum(u.nbytes for u in self.units if u.device == device and self._where[u.name] == _NOWHERE)

    def is_on_device(self, unit: Unit) -> bool:
        """Whether a unit is on its device."""
        return self._where[unit.name] == unit.device

    @property
    def is_ready(self) -> bool:
        """Whether the module can run."""
        return all(self.is_ready_on(device) for device in self.devices)

    def is_ready_on(self, device: torch.device) -> bool:
        """Whether what is computed on a device can run."""
        return all(
            self.is_on_device(unit) or (unit.streams and (self.from_files or self._where[unit.name] == _HOST))
            for unit in self.units
            if unit.device == device
        )

    def load(
        self,
        *,
        room: int | Mapping[torch.device, int] | None = None,
        host_has_room: HostHasRoom | None = None,
        progress: Progress = no_progress,
        check_cancelled: CheckCancelled = never_cancelled,
        device: torch.device | None = None,
    ) -> nn.Module:
        """Brings every unit to where it is used from, and returns the module.

        Args:
            room: bytes that may be loaded to a device beside what is there, the same for each or by device; None, or
                a device left out, for as many as it takes. Units that stream stay in host memory where it is used up.
            host_has_room: asked before such a unit is put there; None: it always has.
            device: only what is computed on this one; None: everything.

        If it is stopped or fails, complete units stay where they are and the next call goes on from there. Raises
        OutOfBudgetError if a unit finds no place; where it may stream from its files it stays in them.
        """
        has_room = host_has_room or _always
        left: dict[torch.device, float] = dict.fromkeys(self.devices, float("inf"))
        if room is not None:
            left |= room if isinstance(room, Mapping) else dict.fromkeys(self.devices, room)
        units = [unit for unit in self.units if device in (None, unit.device)]
        ready = self.is_ready if device is None else self.is_ready_on(device)
        if ready and not self._gap(units, left, has_room):
            return self.module
        done, total = 0, sum(unit.nbytes for unit in units)
        for unit in units:
            check_cancelled()
            if not self.is_on_device(unit):
                if not unit.streams or unit.nbytes <= left[unit.device]:
                    self._bring(unit, unit.device, check_cancelled)
                    left[unit.device] -= unit.nbytes
                elif self._where[unit.name] != _HOST:
                    if has_room(unit.nbytes):
                        self._bring(unit, _HOST, check_cancelled)
                    elif not self.from_files:
                        raise self._no_place(unit)
            done += unit.nbytes
            progress(f"load {self.name}", done, total)
        return self.module

    def unload(
        self,
        nbytes: int | None = None,
        host_has_room: HostHasRoom | None = None,
        device: torch.device | None = None,
    ) -> int:
        """Takes units off a device (None: off all), the last ones first, until `nbytes` are freed there (None: all).

        A unit goes to host memory if `host_has_room` says so, else its weights are dropped. Returns the bytes freed,
        those of what brings streamed units among them: it goes when all of these are off the device.
        On a CPU the two places are the same, and what is kept frees nothing.
        """
        devices = self.devices if device is None else (device,)
        return sum(self._unload_from(device, nbytes, host_has_room) for device in devices)

    def _unload_from(self, device: torch.device, nbytes: int | None, host_has_room: HostHasRoom | None) -> int:
        freed = 0
        for unit in (unit for unit in reversed(self.units) if unit.device == device):
            if nbytes is not None and freed >= nbytes:
                break
            if self.streams is not None and not unit.streams:
                freed += self.streams.release(device)
                if nbytes is not None and freed >= nbytes:
                    break
            if not self.is_on_device(unit):
                continue
            keep = host_has_room is not None and host_has_room(unit.nbytes)
            if keep and device == _HOST:
                continue
            self._move(unit, _HOST if keep else _NOWHERE)
            freed += unit.nbytes
        return freed

    def shrink(self, nbytes: int, host_has_room: HostHasRoom | None = None, device: torch.device | None = None) -> int:
        """Moves units that stream from a device (None: from the home) to host memory until `nbytes` are freed or none
        is left there. Where they may stream from their files they need no host memory.

        The module stays ready. Returns the bytes freed.
        """
        device, freed = device or self.device, 0
        for unit in reversed(self.units):
            if freed >= nbytes or not unit.streams:
                break
            if unit.device != device or not self.is_on_device(unit):
                continue
            keep = host_has_room is None or host_has_room(unit.nbytes)
            if keep or self.from_files:
                self._move(unit, _HOST if keep else _NOWHERE)
                freed += unit.nbytes
        return freed

    def drop(self) -> None:
        """Gives all weights up, wherever they are; they are read again when next loaded."""
        if self.streams is not None:
            for device in self.devices:
                self.streams.release(device)
        for unit in self.units:
            if self._where[unit.name] != _NOWHERE:
                self._move(unit, _NOWHERE)

    def _gap(self, units: Iterable[Unit], room: Mapping[torch.device, float], host_has_room: HostHasRoom) -> bool:
        """Whether a unit streams that would fit on its device, or from its files though it would fit in host memory."""
        for unit in units:
            waits = not self.is_on_device(unit)
            if waits and unit.nbytes <= room[unit.device]:
                return True
            if waits and self._where[unit.name] == _NOWHERE and host_has_room(unit.nbytes):
                return True
        return False

    def _no_place(self, unit: Unit) -> OutOfBudgetError:
        missing = sum(other.nbytes for other in self.units if self._where[other.name] == _NOWHERE)
        return OutOfBudgetError(
            f"The {self.name} does not fit: {missing / 2**30:.2f} GiB of it find room neither on {unit.device} nor in "
            "host memory. Choose a smaller format in the loader, raise ram_budget, or close other programs."
        )

    def _bring(self, unit: Unit, device: torch.device, check_cancelled: CheckCancelled) -> None:
        if self._where[unit.name] == _NOWHERE:
            self._read(self.module, unit.parameters, device, check_cancelled)
            self._settle(unit, device)
        else:
            self._move(unit, device)

    def _move(self, unit: Unit, device: torch.device) -> None:
        moved = {name: self.module.get_parameter(name).detach().to(device) for name in unit.parameters}
        for name, tensor in moved.items():  # only now, or a move that fails half-way would leave a unit in two places
            owner, _, attribute = name.rpartition(".")
            setattr(self.module.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
        self._settle(unit, device)

    def _settle(self, unit: Unit, device: torch.device) -> None:
        self._where[unit.name] = device
        if self.streams is not None:
            self.streams.moved(unit.name, device == unit.device)  # no copy is under way after this
        if self._lock is not None and unit.streams:
            self._lock.unlock(unit.name)
            if device == _HOST:
                self._lock.lock(unit.name, (self.module.get_parameter(name).data for name in unit.parameters))


def _in_order(units: Iterable[Unit]) -> tuple[Unit, ...]:
    """What streams comes last, and is the first to go; of several devices in turns, so that each gets its share."""
    seen: dict[torch.device, int] = {}
    keys = []
    for index, unit in enumerate(units := list(units)):
        seen[unit.device] = seen.get(unit.device, 0) + unit.streams
        keys.append((unit.streams, seen[unit.device] if unit.streams else 0, index))
    return tuple(unit for _key, unit in sorted(zip(keys, units, strict=True), key=lambda pair: pair[0]))


def _always(_nbytes: int) -> bool:
    return True


def units_by_prefix(
    parameter_bytes: Mapping[str, int],
    unit_of: Callable[[str], str],
    device_of: Callable[[str], torch.device],
    streams: Callable[[str], bool] = lambda _name: False,
) -> list[Unit]:
    """Groups parameters into units by `unit_of(parameter name)`, units in order of first appearance.

    device_of: where a parameter is computed with; the same for all of a unit.
    streams: whether a unit of that name may be used from host memory.
    """
    groups: dict[str, list[str]] = {}
    for name in parameter_bytes:
        groups.setdefault(unit_of(name), []).append(name)
    return [
        Unit(unit, tuple(names), sum(parameter_bytes[n] for n in names), device_of(names[0]), streams(unit))
        for unit, names in groups.items()
    ]
