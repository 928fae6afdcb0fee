"""What a plan says: where each layer runs, what its experts do, bytes by phase, seconds and how they come about."""

from dataclasses import dataclass

from .budget import Workload
from .flops import StepFlops


@dataclass(frozen=True)
class LayerPlan:
    """Where a layer runs, and how many of its experts are on that device and elsewhere."""

    device: str
    resident: int
    pinned: int
    pageable: int
    disk: int

    @property
    def streamed(self) -> int:
        return self.pinned + self.pageable + self.disk


@dataclass(frozen=True)
class DevicePlan:
    """Bytes on a device. All phases together never need more than `nbytes`.

    weights: dense parts, resident experts, and on the first device the rest. cache: keys and values. activations: the
    most that is alive in a pass. ring: slots for streamed experts, `group` of them copied at a time. at_once: experts
    of a layer computed together, at most `most_at_once`. load, denoise, decode: peaks. evicted: weights that make room
    for decoding.
    """

    name: str
    nbytes: int
    weights: int
    cache: int
    activations: int
    ring: int
    group: int
    at_once: int
    most_at_once: int
    load: int
    denoise: int
    decode: int
    evicted: int
    compute_seconds: float
    read_seconds: float
    copy_seconds: float

    @property
    def free(self) -> int:
        """While drawing."""
        return self.nbytes - self.denoise

    @property
    def step_seconds(self) -> float:
        """Of its layers in one denoise step: computing, reading and copying overlap."""
        return max(self.compute_seconds, self.read_seconds, self.copy_seconds)


@dataclass(frozen=True)
class Plan:
    """What fits where, and how fast.

    tile: side of the tiles that the VAE decodes in, None for whole pictures. decode_whole: bytes that a whole picture
    takes beside the VAE's weights. pinned, pageable, disk: bytes of streamed experts there. formula, token_formula:
    how the seconds come about.
    """

    work: Workload
    layers: tuple[LayerPlan, ...]
    devices: tuple[DevicePlan, ...]
    pinned: int
    pageable: int
    disk: int
    tile: int | None
    decode_whole: int
    flops: StepFlops
    step_seconds: float
    token_seconds: float
    formula: str
    token_formula: str
    rates: str

    @property
    def streamed_share(self) -> float:
        """Of all experts."""
        total = sum(layer.resident + layer.streamed for layer in self.layers)
        return sum(layer.streamed for layer in self.layers) / total

    @property
    def fits_whole(self) -> bool:
        """Whether all experts are resident and computed as many at once as they would be without a plan."""
        return not self.streamed_share and all(device.at_once == device.most_at_once for device in self.devices)

    def text(self) -> str:
        """A few lines for everybody, then the numbers."""
        work = self.work
        names = " and ".join(device.name for device in self.devices)
        if not self.streamed_share:
            where = f"Everything fits on {names}."
        else:
            sources = [
                f"{nbytes / 2**30:.1f} GiB from {source}"
                for nbytes, source in ((self.pinned, "RAM (pinned)"), (self.pageable, "RAM"), (self.disk, "disk"))
                if nbytes
            ]
            where = f"{1 - self.streamed_share:.0%} of the experts stay on {names}; {', '.join(sources)} in every step."
        how = "whole" if self.tile is None else f"in tiles of {self.tile} pixels"
        lines = [
            where,
            f"{work.batch} x {work.width}x{work.height}: about {self.step_seconds:.2f} s per step; "
            f"writing about {1 / self.token_seconds:.1f} tokens (pieces of words) a second; decoded {how}.",
            self.formula,
            self.token_formula,
            self.rates,
        ]
        for device in self.devices:
            layers = [layer for layer in self.layers if layer.device == device.name]
            ring = f", ring {gib(device.ring)} in groups of {device.group}" if device.ring else ""
            lines.append(
                f"{device.name}: {len(layers)} layers, {layers[0].resident} experts of each resident, "
                f"{layers[0].streamed} streamed; weights {gib(device.weights)}, cache {gib(device.cache)}, "
                f"activations {gib(device.activations)}{ring}, free {gib(device.free)} of {gib(device.nbytes)}"
            )
            evicted = f" ({gib(device.evicted)} of experts make room)" if device.evicted else ""
            lines.append(
                f"{device.name}: peaks: load {gib(device.load)}, draw {gib(device.denoise)}, "
                f"decode {gib(device.decode)}{evicted}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Refusal:
    """Why there is no plan. where: "host", or a device's name. asked, there: bytes. text: both in words."""

    where: str
    asked: int
    there: int
    text: str

    @property
    def missing(self) -> int:
        return self.asked - self.there


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"
