"""One optimiser for all stages: Muon for matrices, AdamW for everything else, with a moving average of the weights.

Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") steps along the orthogonalised
momentum; its steps are scaled by `0.2 * sqrt(max(rows, columns))` (Liu et al. 2025, "Muon is scalable for LLM
training"), which gives them AdamW's size, so that one learning rate and one weight decay serve both.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .crew import Crew


@dataclass(frozen=True)
class OptimiserConfig:
    """Rates and decays. `betas`: AdamW's; `momentum`: Muon's; `ema`: of the weights, reached after a warm-up."""

    rate: float
    muon_rate: float
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.95
    decay: float = 0.02
    clip: float = 1.0
    ema: float = 0.999


class Optimiser:
    """Holds float32 masters of a network's parameters, which may be of any dtype, their moments and their average.

    matrices: names of the parameters that Muon steps; a convolution counts as a matrix of its output channels, a bank
    of experts as one matrix per expert.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        matrices: Iterable[str],
        config: OptimiserConfig,
        crew: Crew | None = None,
    ) -> None:
        """crew: processes with equal gradients, which share the orthogonalising."""
        self.config = config
        self.crew = crew or Crew()
        self.parameters = dict(parameters)
        self.matrices = frozenset(matrices)
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.average = {name: master.clone() for name, master in self.masters.items()}
        self.first = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self.second = {n: torch.zeros_like(m) for n, m in self.masters.items() if n not in self.matrices}
        self.steps = 0

    @torch.no_grad()
    def step(self, factor: float) -> float:
        """One update from the parameters' gradients, which are dropped. `factor`: of the rates, from the schedule.

        Returns the gradients' norm before clipping; a step whose norm is not finite is left out.
        """
        gradients = {name: p.grad.float() for name, p in self.parameters.items() if p.grad is not None}
        for parameter in self.parameters.values():
            parameter.grad = None
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        if not math.isfinite(norm):
            return norm
        self.steps += 1
        shrink = min(1.0, self.config.clip / (norm + 1e-6))
        if shrink < 1:
            gradients = {name: gradient * shrink for name, gradient in gradients.items()}
        for name in gradients.keys() - self.matrices:
            self._adam(name, gradients[name], factor)
        alike: dict[tuple[int, ...], list[str]] = defaultdict(list)  # orthogonalised together, which is faster
        for name in sorted(gradients.keys() & self.matrices):
            alike[self.masters[name].shape].append(name)
        for names in alike.values():
            self._muon(names, gradients, factor)
        keep = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
        for name, master in self.masters.items():
            self.average[name].lerp_(master, 1 - keep)
            self.parameters[name].copy_(master)
        return norm

    def state(self) -> dict[str, object]:
        """Everything that a bit-equal continuation needs, as tensors and numbers."""
        return {
            "masters": self.masters,
            "average": self.average,
            "first": self.first,
            "second": self.second,
            "steps": self.steps,
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, object]) -> None:
        """The inverse of `state`. Without masters it begins from the average, without moments from zero."""
        for name in ("masters", "average", "first", "second"):
            ours, theirs = getattr(self, name), state.get(name, state["average"] if name == "masters" else {})
            for key in ours.keys() & theirs.keys():
                ours[key].copy_(theirs[key])
        self.steps = int(state["steps"])
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])

    def _adam(self, name: str, gradient: Tensor, factor: float) -> None:
        config, master = self.config, self.masters[name]
        beta1, beta2 = config.betas
        first = self.first[name].lerp_(gradient, 1 - beta1)
        second = self.second[name].lerp_(gradient.square(), 1 - beta2)
        unbiased = second / (1 - beta2**self.steps)
        rate = config.rate * factor
        if master.ndim > 1:
            master.mul_(1 - rate * config.decay)
        master.addcdiv_(first, unbiased.sqrt_().add_(1e-8), value=-rate / (1 - beta1**self.steps))

    def _muon(self, names: list[str], gradients: Mapping[str, Tensor], factor: float) -> None:
        """Steps parameters of one shape."""
        config = self.config
        directions = []
        for name in names:
            momentum = self.first[name].lerp_(gradients[name], 1 - config.momentum)
            direction = gradients[name].lerp(momentum, config.momentum)  # Nesterov's
            directions.append(direction.flatten(1) if direction.ndim == 4 else direction)
        stacked = torch.stack(directions)
        matrices = stacked.flatten(0, -3)
        steps = self.crew.worked(orthogonalised, matrices).float() * (0.2 * math.sqrt(max(matrices.shape[-2:])))
        rate = config.muon_rate * factor
        for name, step in zip(names, steps.reshape(stacked.shape), strict=True):
            master = self.masters[name]
            master.mul_(1 - rate * config.decay).add_(step.view_as(master), alpha=-rate)


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix (..., rows, columns), bfloat16, roughly: singular values end in 0.7 to 1.2.

    Newton-Schulz with the quintic coefficients of Jordan et al.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the rates: linear warm-up, then half a cosine from 1 down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.5 * (1 + math.cos(math.pi * share))


def trapezoid(step: int, steps: int, warmup: int, decay_share: float) -> float:
    """Factor of the rates: linear warm-up, then constant, then linear to 0 over the last `decay_share` of the steps.

    (Hu et al. 2024, "MiniCPM": warm-up, stable, decay.) The constant part can be stopped and prolonged at will.
    """
    left = (steps - step) / max(1.0, decay_share * steps)
    return max(0.0, min((step + 1) / warmup, 1.0, left))
