"""A network whose weights come and go, a unit (a layer) at a time.

Built on the meta device, so it costs nothing until it is loaded. Each unit is either on the compute device, in host
memory, or nowhere (read from the files again when needed). The network itself knows nothing of this.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..callbacks import CheckCancelled, Progress, never_cancelled, no_progress

Read = Callable[[nn.Module, Iterable[str], torch.device, CheckCancelled], None]
"""`read(module, parameter names, device, check_cancelled)` fills these parameters of the module from its files."""

HostHasRoom = Callable[[int], bool]
"""Whether so many bytes may be kept in host memory."""

_HOST = torch.device("cpu")
_NOWHERE = torch.device("meta")


@dataclass(frozen=True)
class Unit:
    """Parameters that are moved together."""

    name: str
    parameters: tuple[str, ...]
    nbytes: int


class PlacedModule:
    """Where a network's weights are. `module` is ready to run whenever `loaded_bytes == total_bytes`."""

    def __init__(self, name: str, module: nn.Module, units: Iterable[Unit], device: torch.device, read: Read) -> None:
        self.name = name
        self.module = module
        self.units = tuple(units)
        self.device = device
        self._read = read
        self._where: dict[str, torch.device] = {unit.name: _NOWHERE for unit in self.units}

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights that are on the compute device and in use."""
        return sum(unit.nbytes for unit in self.units if self._where[unit.name] == self.device)

    @property
    def host_bytes(self) -> int:
        """Bytes of the weights that wait in host memory, off the compute device."""
        return sum(unit.nbytes for unit in self.units if self._where[unit.name] == _HOST != self.device)

    def load(self, *, progress: Progress = no_progress, check_cancelled: CheckCancelled = never_cancelled) -> nn.Module:
        """Brings every unit to the compute device and returns the module.

        If it is stopped or fails, complete units stay where they are and the next call goes on from there.
        """
        if self.loaded_bytes == self.total_bytes:
            return self.module
        done = 0
        for unit in self.units:
            check_cancelled()
            self._bring(unit, check_cancelled)
            done += unit.nbytes
            progress(f"load {self.name}", done, self.total_bytes)
        return self.module

    def unload(self, nbytes: int | None = None, host_has_room: HostHasRoom | None = None) -> int:
        """Takes units off the compute device, the last ones first, until `nbytes` are freed (None: all).

        A unit goes to host memory if `host_has_room` says so, else its weights are dropped. Returns the bytes freed.
        On a CPU the two places are the same, and what is kept frees nothing.
        """
        freed = 0
        for unit in reversed(self.units):
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

    def _bring(self, unit: Unit, check_cancelled: CheckCancelled) -> None:
        where = self._where[unit.name]
        if where == self.device:
            return
        if where == _NOWHERE:
            self._read(self.module, unit.parameters, self.device, check_cancelled)
            self._where[unit.name] = self.device
        else:
            self._move(unit, self.device)

    def _move(self, unit: Unit, device: torch.device) -> None:
        moved = {name: self.module.get_parameter(name).detach().to(device) for name in unit.parameters}
        for name, tensor in moved.items():  # only now, or a move that fails half-way would leave a unit in two places
            owner, _, attribute = name.rpartition(".")
            setattr(self.module.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
        self._where[unit.name] = device


def units_by_prefix(parameter_bytes: Mapping[str, int], unit_of: Callable[[str], str]) -> list[Unit]:
    """Groups parameters into units by `unit_of(parameter name)`, units in order of first appearance."""
    groups: dict[str, list[str]] = {}
    for name in parameter_bytes:
        groups.setdefault(unit_of(name), []).append(name)
    return [Unit(unit, tuple(names), sum(parameter_bytes[n] for n in names)) for unit, names in groups.items()]
