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

    @property
    def nbytes(self) -> int:
        """Bytes that it holds on the device."""

    @property
    def full_nbytes(self) -> int:
        """Bytes that it holds there while the module runs."""

    def moved(self, unit: str, on_device: bool) -> None:
        """A unit came to the device or left it."""

    def release(self) -> int:
        """Gives its bytes up until it is next needed; returns them."""

    def held_by(self, parameter: str) -> str:
        """Name of the parameter whose weights this one holds: they may have changed places."""


_HOST = torch.device("cpu")
_NOWHERE = torch.device("meta")


@dataclass(frozen=True)
class Unit:
    """Parameters that are moved together. streams: may be used from host memory (see placement.streaming)."""

    name: str
    parameters: tuple[str, ...]
    nbytes: int
    streams: bool = False


class PlacedModule:
    """Where a network's weights are.

    `module` is ready to run whenever every unit is on the compute device or, if it streams, in host memory.
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
    ) -> None:
        """Args:
        streams: told of every unit that comes to the device or leaves it; a unit is nowhere at first.
        lock: locks the pages of what streams from host memory.
        """
        self.name = name
        self.module = module
        # What streams comes last, and is the first to go.
        self.units = tuple(sorted(units, key=lambda unit: unit.streams))
        self.device = device
        self._read = read
        self.streams = streams
        self._lock = lock
        self._where: dict[str, torch.device] = {unit.name: _NOWHERE for unit in self.units}

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def required_bytes(self) -> int:
        """Bytes of the weights that must be on the compute device: all but those that may stream."""
        return sum(unit.nbytes for unit in self.units if not unit.streams)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights that are on the compute device and in use."""
        return sum(unit.nbytes for unit in self.units if self._where[unit.name] == self.device)

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights that are in host memory, off the compute device."""
        return sum(unit.nbytes for unit in self.units if self._where[unit.name] == _HOST != self.device)

    def is_on_device(self, unit: Unit) -> bool:
        """Whether a unit is on the compute device."""
        return self._where[unit.name] == self.device

    @property
    def is_ready(self) -> bool:
        """Whether the module can run."""
        return all(
            self._where[unit.name] == self.device or (unit.streams and self._where[unit.name] == _HOST)
            for unit in self.units
        )

    def load(
        self,
        *,
        room: int | None = None,
        host_has_room: HostHasRoom | None = None,
        progress: Progress = no_progress,
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> nn.Module:
        """Brings every unit to where it is used from, and returns the module.

        Args:
            room: bytes that may be loaded to the compute device beside what is there; None for as many as it takes.
                Units that stream stay in host memory where it is used up.
            host_has_room: asked before such a unit is put there; None: it always has.

        If it is stopped or fails, complete units stay where they are and the next call goes on from there. Raises
        OutOfBudgetError if a unit finds no place.
        """
        if self.is_ready and (room is None or self._gap(room) is None):
            return self.module
        left, done = float("inf") if room is None else room, 0
        for unit in self.units:
            check_cancelled()
            if self._where[unit.name] != self.device:
                if not unit.streams or unit.nbytes <= left:
                    self._bring(unit, self.device, check_cancelled)
                    left -= unit.nbytes
                elif self._where[unit.name] != _HOST:
                    if host_has_room is not None and not host_has_room(unit.nbytes):
                        raise self._no_place(unit)
                    self._bring(unit, _HOST, check_cancelled)
            done += unit.nbytes
            progress(f"load {self.name}", done, self.total_bytes)
        return self.module

    def unload(self, nbytes: int | None = None, host_has_room: HostHasRoom | None = None) -> int:
        """Takes units off the compute device, the last ones first, until `nbytes` are freed (None: all).

        A unit goes to host memory if `host_has_room` says so, else its weights are dropped. Returns the bytes freed,
        those of what brings streamed units among them: it goes when all of these are off the device.
        On a CPU the two places are the same, and what is kept frees nothing.
        """
        freed = 0
        for unit in reversed(self.units):
            if nbytes is not None and freed >= nbytes:
                break
            if self.streams is not None and not unit.streams:
                freed += self.streams.release()
                if nbytes is not None and freed >= nbytes:
                    break
            if self._where[unit.name] != self.device:
                continue
            keep = host_has_room is not None and host_has_room(unit.nbytes)
            if keep and self.device == _HOST:
                continue
            self._move(unit, _HOST if keep else _NOWHERE)
            freed += unit.nbytes
        return freed

    def shrink(self, nbytes: int, host_has_room: HostHasRoom | None = None) -> int:
        """Moves units that stream from the device to host memory until `nbytes` are freed or none is left there.

        The module stays ready. Returns the bytes freed.
        """
        freed = 0
        for unit in reversed(self.units):
            if freed >= nbytes or not unit.streams:
                break
            if self._where[unit.name] == self.device and (host_has_room is None or host_has_room(unit.nbytes)):
                self._move(unit, _HOST)
                freed += unit.nbytes
        return freed

    def drop(self) -> None:
        """Gives all weights up, wherever they are; they are read again when next loaded."""
        if self.streams is not None:
            self.streams.release()
        for unit in self.units:
            if self._where[unit.name] != _NOWHERE:
                self._move(unit, _NOWHERE)

    def _gap(self, room: int) -> Unit | None:
        """The first unit that streams although it would fit on the device."""
        return next((unit for unit in self.units if self._where[unit.name] == _HOST and unit.nbytes <= room), None)

    def _no_place(self, unit: Unit) -> OutOfBudgetError:
        missing = sum(other.nbytes for other in self.units if self._where[other.name] == _NOWHERE)
        return OutOfBudgetError(
            f"The {self.name} does not fit: {missing / 2**30:.2f} GiB of it find room neither on {self.device} nor in "
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
            self.streams.moved(unit.name, device == self.device)  # no copy is under way after this
        if self._lock is not None and unit.streams:
            self._lock.unlock(unit.name)
            if device == _HOST:
                self._lock.lock(unit.name, (self.module.get_parameter(name).data for name in unit.parameters))


def units_by_prefix(
    parameter_bytes: Mapping[str, int],
    unit_of: Callable[[str], str],
    streams: Callable[[str], bool] = lambda _name: False,
) -> list[Unit]:
    """Groups parameters into units by `unit_of(parameter name)`, units in order of first appearance.

    streams: whether a unit of that name may be used from host memory.
    """
    groups: dict[str, list[str]] = {}
    for name in parameter_bytes:
        groups.setdefault(unit_of(name), []).append(name)
    return [
        Unit(unit, tuple(names), sum(parameter_bytes[n] for n in names), streams(unit))
        for unit, names in groups.items()
    ]
