"""Fourth stage: a student learns to draw in 8 single passes what its teacher draws in many guided ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .joint import JointPass, Noisy, Shown
from .lessons import Lesson
from .optimiser import OptimiserConfig
from .rows import Batch, collate, lay_out
from .transformer import Epoch, TransformerStage, TransformerStageConfig, mixed, shifted


@dataclass(frozen=True)
class DistilStageConfig(TransformerStageConfig):
    """As the stages before, but no row goes without its words.

    Attributes:
        strengths: the least and the greatest guidance that the student is told.
        counts: the least and the greatest number of steps of the schedules whose steps it learns.
        beginnings: share of the steps that begin at pure noise.
    """

    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(rate=5e-4, muon_rate=1e-3))
    steps: int = 1000
    warmup: int = 100
    dropout: float = 0.0
    distilled: bool = True
    strengths: tuple[float, float] = (1.0, 5.0)
    counts: tuple[float, float] = (6.0, 24.0)
    beginnings: float = 0.1


class DistilStage(TransformerStage):
    """Learns words as every stage does, and pictures from a teacher that is not stepped.

    The velocity at noise level t with the end r is to be the mean velocity of the teacher's guided flow between the
    two, `x_r = x_t - (t - r) u`, as MeanFlow models predict it (Geng et al. 2025), for the strength of guidance that
    the student is told (Meng et al. 2023). It is measured on the teacher's flow by the midpoint method, two evaluations
    of both branches, rather than derived from the student's own derivative.
    """

    name = "distil"
    config: DistilStageConfig

    def __init__(self, config: DistilStageConfig, teacher: TransformerStage) -> None:
        """teacher: a stage with the weights to begin with, and to learn from."""
        super().__init__(config, teacher.tokenizer, teacher.vae_state, teacher.scaling, teacher.compute, teacher.crew)
        self.teacher = teacher

    def _flow(
        self, epoch: Epoch, batch: Batch, shown: Sequence[Shown], read: JointPass, generator: torch.Generator
    ) -> torch.Tensor:
        """The mean square difference of the student's velocities from the teacher's mean ones."""
        config = self.config
        samples = self._samples(batch)
        clean = self._clean(epoch, batch, samples)
        count = len(clean)
        sigmas, ends = spans(count, config.counts, config.beginnings, config.shift, generator)
        least, greatest = config.strengths
        guidance = least + (greatest - least) * torch.rand(count, generator=generator)
        noisy = Noisy(mixed(clean, torch.randn(clean.shape, generator=generator), sigmas), sigmas, ends, guidance)
        flow = GuidedField(self.teacher, batch.lessons, shown, epoch)
        return (read.velocity(noisy) - mean_velocity(flow, noisy)).square().mean()


class GuidedField:
    """The velocities of a model without a guidance token, guided by two branches, for the rows of one batch."""

    @torch.no_grad()
    def __init__(
        self, stage: TransformerStage, lessons: Sequence[Lesson], shown: Sequence[Shown], epoch: Epoch
    ) -> None:
        rows = [lay_out(stage.folder, lesson, epoch.scenes) for lesson in lessons] * 2
        dropped = [index >= len(lessons) for index in range(len(rows))]
        both = [Shown(picture.latents.repeat(2, 1, 1, 1), [*picture.patches] * 2) for picture in shown]
        self.read = JointPass(stage.model, stage.vision, collate(rows, stage.folder.tokens, dropped), both)

    @torch.no_grad()
    def velocity(self, latents: torch.Tensor, sigmas: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """(R * S, C, h, w) latents at the levels `sigmas` (R * S,) -> their guided velocities, float32."""
        both = self.read.velocity(Noisy(latents.repeat(2, 1, 1, 1), sigmas.repeat(2)))
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance[:, None, None, None] * (conditional - unconditional)


def mean_velocity(flow: GuidedField, noisy: Noisy) -> torch.Tensor:
    """(R * S, C, h, w): the mean velocity from `sigmas` to `ends`, by the midpoint method."""
    assert noisy.ends is not None
    assert noisy.guidance is not None
    middle = (noisy.sigmas + noisy.ends) / 2
    first = flow.velocity(noisy.latents, noisy.sigmas, noisy.guidance)
    there = noisy.latents + (middle - noisy.sigmas)[:, None, None, None] * first
    return flow.velocity(there, middle, noisy.guidance)


def spans(
    count: int, counts: tuple[float, float], beginnings: float, shift: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(count,) noise levels and the lower ones to step to, in 0..1: steps of schedules of any length, at any place.

    A step is 1 / n of the unshifted schedule long, n log-uniform in `counts`; it begins evenly anywhere, at the start
    with probability `beginnings`, and ends at 0 where it would go further.
    """
    place = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    place = (place / (1 - beginnings)).clamp(max=1.0)
    least, greatest = counts
    steps = least * (greatest / least) ** torch.rand(count, generator=generator)
    return shifted(place, shift), shifted((place - 1 / steps).clamp(min=0.0), shift)
