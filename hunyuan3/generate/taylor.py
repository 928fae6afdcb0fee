"""Taylor step cache: most steps extrapolate the transformer's output instead of running it (spec 11).

The output (specials and picture tokens) is split along the token axis into a low and a high frequency band, each
followed by its finite differences over the last full steps. A skipped step is a Taylor series in the number of steps
since the last full one. Only the stack is skipped: patch embedding and final layer run at every step.
"""

import math
from dataclasses import dataclass

import torch

from ..errors import RequestError

_LOW_BAND = 0.1  # share of the highest frequency that counts as low


@dataclass(frozen=True)
class TaylorOptions:
    """Settings of the cache, named as the reference's `taylor_cache_*` arguments.

    interval: a full step at least every `interval` steps. order: highest derivative kept. first_enhance_steps: that
    many steps at the start are full (with `enable_first_enhance`). tailing_enhance_steps: so many at the end.
    low_freqs_order, high_freqs_order: highest derivative used in each band.
    """

    interval: int = 5
    order: int = 2
    enable_first_enhance: bool = True
    first_enhance_steps: int = 3
    enable_tailing_enhance: bool = False
    tailing_enhance_steps: int = 1
    low_freqs_order: int = 2
    high_freqs_order: int = 2

    def __post_init__(self) -> None:
        minimum = {
            "interval": 1,
            "order": 0,
            "first_enhance_steps": 1,
            "tailing_enhance_steps": 0,
            "low_freqs_order": 0,
            "high_freqs_order": 0,
        }
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise RequestError(f"Taylor cache: {name} is {getattr(self, name)}; it must be at least {least}.")


class TaylorCache:
    """The state of one run; make a new one per run. `is_full` decides, `update` or `extrapolate` follows."""

    def __init__(self, options: TaylorOptions, num_steps: int) -> None:
        self.options = options
        self.num_steps = num_steps
        self.since_full = 0
        self.last_full_step = 0
        self.low: list[torch.Tensor] = []
        self.high: list[torch.Tensor] = []

    def is_full(self, step: int) -> bool:
        """Whether step `step` must run the transformer."""
        options = self.options
        return (
            step == 0
            or self.since_full == options.interval - 1
            or (options.enable_first_enhance and step < options.first_enhance_steps)
            or (options.enable_tailing_enhance and step >= self.num_steps - options.tailing_enhance_steps)
        )

    def update(self, step: int, x: torch.Tensor) -> None:
        """Records the stack's output x (B, T, D) of the full step `step`."""
        self.since_full = 0
        warming_up = self.options.enable_first_enhance and step < self.options.first_enhance_steps - 1
        if not warming_up:
            self._update_derivatives(x, step - self.last_full_step)
        self.last_full_step = step

    def extrapolate(self) -> torch.Tensor:
        """The output (B, T, D) expected at the next, skipped step."""
        self.since_full += 1
        return _series(self.low, self.since_full) + _series(self.high, self.since_full)

    def _update_derivatives(self, x: torch.Tensor, distance: int) -> None:
        options = self.options
        low, high = split_bands(x)
        new_low = _differences(low, self.low, distance, min(options.low_freqs_order, options.order))
        new_high = _differences(high, self.high, distance, min(options.high_freqs_order, options.order))
        # As the reference: new values are taken over order by order, ending with the first order that the high band
        # did not reach, so the low band never goes more than one order further than the high one.
        self.low = new_low[: len(new_high) + 1]
        self.high = new_high


def split_bands(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, D) -> low and high frequency part along T, in x's dtype; they add up to x."""
    frequencies = torch.fft.fftfreq(x.shape[1], device=x.device).abs()
    is_low = (frequencies <= _LOW_BAND * frequencies.max())[:, None]
    spectrum = torch.fft.fft(x.float(), dim=1)
    low = torch.fft.ifft(spectrum * is_low, dim=1).real
    high = torch.fft.ifft(spectrum * ~is_low, dim=1).real
    return low.to(x.dtype), high.to(x.dtype)


def _differences(x: torch.Tensor, old: list[torch.Tensor], distance: int, order: int) -> list[torch.Tensor]:
    """x and its backward differences over `distance` steps, as far as the old ones reach, at most `order` of them."""
    new = [x]
    for i in range(min(order, len(old))):
        new.append((new[i] - old[i]) / distance)
    return new


def _series(derivatives: list[torch.Tensor], distance: int) -> torch.Tensor:
    terms = [d * (distance**i / math.factorial(i)) for i, d in enumerate(derivatives)]
    return sum(terms[1:], start=terms[0])
