"""Flow-matching schedule: noise levels from 1 (pure noise) to 0, shifted towards noise (spec 8.5)."""

from dataclasses import dataclass

import torch

from ..errors import RequestError

TIME_SCALE = 1000.0
_LEAST_DENOISE = 0.001  # the whole schedule, of steps / denoise levels, is computed to take its end


@dataclass(frozen=True)
class Schedule:
    """Noise levels of one run: `sigmas` (steps + 1,) float32, falling, the last one 0.

    Model time is 1000 * sigma. `shift` is kept for the report.
    """

    sigmas: torch.Tensor
    shift: float

    @classmethod
    def flow_matching(cls, steps: int, shift: float, denoise: float = 1.0) -> "Schedule":
        """`steps` Euler steps; sigma = k s / (1 + (k - 1) s) for s from 1 to 0 and shift k.

        `denoise` below 1 keeps the last `steps` of a schedule of `int(steps / denoise)` steps, which starts at a
        lower noise level (the rule of ComfyUI's samplers). Raises RequestError out of range.
        """
        if steps < 1:
            raise RequestError(f"steps is {steps}; it must be at least 1 (0 means the checkpoint's own number).")
        if not shift > 0:
            raise RequestError(f"shift is {shift}; it must be above 0 (0 means the checkpoint's own value).")
        if not _LEAST_DENOISE <= denoise <= 1:
            raise RequestError(f"denoise is {denoise}; it must be from {_LEAST_DENOISE} to 1.")
        total = steps if denoise == 1 else int(steps / denoise)
        s = torch.linspace(1, 0, total + 1)
        sigmas = s if shift == 1 else shift * s / (1 + (shift - 1) * s)
        return cls(sigmas[-(steps + 1) :], shift)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def times(self) -> torch.Tensor:
        """(steps + 1,) float32: model time of each level, the last one 0."""
        return self.sigmas * TIME_SCALE

    def euler(self, latents: torch.Tensor, velocity: torch.Tensor, step: int) -> torch.Tensor:
        """Latents after step `step`: x + v * (next sigma - sigma), float32."""
        return latents.float() + velocity * (self.sigmas[step + 1] - self.sigmas[step]).to(latents.device)

    def predicted_clean(self, latents: torch.Tensor, velocity: torch.Tensor, step: int) -> torch.Tensor:
        """The clean latents that this velocity points at: x - sigma * v."""
        return latents.float() - velocity * self.sigmas[step].to(latents.device)
