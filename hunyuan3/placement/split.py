"""Which device computes which layers, and how people ask for it."""

import re
from dataclasses import dataclass

import torch

from ..errors import RequestError

_GIB, _GB = 2**30, 10**9
_ITEM = re.compile(r"(?P<device>[a-z]+:\d+|\d+)(?::(?P<amount>[\d.]+)\s*(?P<unit>GiB|GB)?)?", re.IGNORECASE)
_LAST = 99  # torch keeps a device's number in a byte: larger ones come out as others
_GRAMMAR = (
    "write 'auto', devices in the order in which they compute ('0,1'), each with its number of layers "
    "('0:20,1:12'), or each with the memory that it may use ('0:22GiB,1:40GiB')"
)


@dataclass(frozen=True)
class LayerSplit:
    """The layers as runs of consecutive ones, each with its device. The first device holds what is in no layer."""

    runs: tuple[tuple[torch.device, int], ...]

    def __post_init__(self) -> None:
        devices = [device for device, _count in self.runs]
        if not devices or len(set(devices)) < len(devices):
            raise RequestError(
                f"A split must name devices, each once; it names {', '.join(map(str, devices)) or 'none'}."
            )
        if any(count < 1 for _device, count in self.runs):
            raise RequestError("A split must give each device at least one layer.")

    def __str__(self) -> str:
        return ", ".join(f"{count} layer{'s' * (count > 1)} on {device}" for device, count in self.runs)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(device for device, _count in self.runs)

    def by_layer(self, layers: int) -> tuple[torch.device, ...]:
        """The device of each of so many layers. Raises RequestError if the runs hold another number of them."""
        devices = tuple(device for device, count in self.runs for _ in range(count))
        if len(devices) != layers:
            raise RequestError(f"The split is about {len(devices)} layers ({self}); this model has {layers}.")
        return devices


@dataclass(frozen=True)
class SplitRequest:
    """What a user asks for. devices: in the order in which they compute, none for "auto". layers, nbytes: of each
    device, None to leave it open.
    """

    devices: tuple[torch.device, ...] = ()
    layers: tuple[int, ...] | None = None
    nbytes: tuple[int, ...] | None = None

    @classmethod
    def parse(cls, text: str, kind: str, name: str = "gpu_split") -> "SplitRequest":
        """From "auto", "0,1", "0:20,1:12" or "0:22GiB,1:40GiB".

        Args:
            kind: of the devices that plain numbers mean: "cuda". Others are written out: "cpu:1".
            name: of the input, for the error.

        Raises RequestError naming the item at fault.
        """
        if text.strip().lower() in ("auto", ""):
            return cls()
        devices: list[torch.device] = []
        amounts: list[str | None] = []
        units: list[str | None] = []
        for item in text.split(","):
            found = _ITEM.fullmatch(item.strip())
            if found is None:
                raise RequestError(f"{name} is {text!r}; {item.strip()!r} is not understood: {_GRAMMAR}.")
            devices.append(_device(found["device"], kind, text, name))
            amounts.append(found["amount"])
            units.append(found["unit"])
        if len(set(devices)) < len(devices):
            raise RequestError(f"{name} is {text!r}; a device stands there twice.")
        if all(amount is None for amount in amounts):
            return cls(tuple(devices))
        if None in amounts or any((unit is None) != (units[0] is None) for unit in units):
            raise RequestError(f"{name} is {text!r}; all devices need the same kind of number: {_GRAMMAR}.")
        if units[0] is None:
            return cls(tuple(devices), layers=tuple(_layers(amount, text, name) for amount in amounts))
        nbytes = tuple(_bytes(amount, unit, text, name) for amount, unit in zip(amounts, units, strict=True))
        return cls(tuple(devices), nbytes=nbytes)


def _device(text: str, kind: str, whole: str, name: str) -> torch.device:
    if int(text.rpartition(":")[2]) > _LAST:
        raise RequestError(f"{name} is {whole!r}; there is no device {text}.")
    try:
        return torch.device(f"{kind}:{text}" if text.isdigit() else text.lower())
    except RuntimeError as error:
        raise RequestError(f"{name} is {whole!r}; there is no kind of device called {text!r}.") from error


def _layers(amount: str, whole: str, name: str) -> int:
    if not amount.isdigit() or int(amount) < 1:
        raise RequestError(f"{name} is {whole!r}; {amount} is not a number of layers (memory is written '22GiB').")
    return int(amount)


def _bytes(amount: str, unit: str, whole: str, name: str) -> int:
    try:
        nbytes = int(float(amount) * (_GIB if unit.lower() == "gib" else _GB))
    except (ValueError, OverflowError) as error:
        raise RequestError(f"{name} is {whole!r}; {amount} is not a number.") from error
    if nbytes < 1:
        raise RequestError(f"{name} is {whole!r}; a device needs some memory.")
    return nbytes
