"""The denoise loop: from noise to clean latents, one velocity per step (spec 8).

The first step runs the whole sequence and fills the key-value cache. Everything before the picture depends on text
alone, so later steps run only the control tokens and the picture's tokens against that cache; the picture's own
positions in it are overwritten each time. Without capacity dropping this equals recomputing everything.

B pictures of one request, R branches (conditional, unconditional); rows of a pass are all conditional ones, then all
unconditional ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..callbacks import CheckCancelled, never_cancelled
from ..errors import RequestError
from ..ops.attention import plan_attention
from ..ops.rope import rope_positions, rope_table
from ..transformer.model import Hunyuan3Transformer, OnLayer
from ..types import Grid, Span, TokenSequence
from .schedule import TIME_SCALE, Schedule
from .taylor import TaylorCache, TaylorOptions


@dataclass(frozen=True)
class SequenceRows:
    """The branches of one request: rows of equal geometry, with what the network must know of it.

    branches: the conditional row, and the unconditional one where there is guidance by two branches.
    full_spans: spans whose tokens see each other both ways. grids: what lies on the two rotary axes.
    """

    branches: tuple[TokenSequence, ...]
    full_spans: tuple[Span, ...]
    grids: tuple[tuple[Span, Grid], ...]

    def __post_init__(self) -> None:
        first = self.branches[0]
        for other in self.branches[1:]:
            assert len(other) == len(first) and other.runs == first.runs, "branches must share their geometry"

    @property
    def sequence(self) -> TokenSequence:
        """The conditional row; its geometry is every row's."""
        return self.branches[0]


@dataclass(frozen=True)
class DenoiseStep:
    """What one step gave. All tensors float32 on the model's device.

    step: 0-based. raw_prediction (R * B, C, h, w): the network's velocities. prediction (B, C, h, w): after guidance.
    latents (B, C, h, w): after the Euler step. predicted_clean (B, C, h, w): the picture that the prediction points
    at, for previews. full: whether the transformer ran (False: extrapolated by the step cache).
    """

    step: int
    steps: int
    raw_prediction: torch.Tensor
    prediction: torch.Tensor
    latents: torch.Tensor
    predicted_clean: torch.Tensor
    full: bool


@torch.no_grad()
def denoise(
    model: Hunyuan3Transformer,
    rows: SequenceRows,
    latents: torch.Tensor,
    schedule: Schedule,
    guidance: float,
    *,
    taylor: TaylorOptions | None = None,
    one_branch_at_a_time: bool = False,
    check_cancelled: CheckCancelled = never_cancelled,
    on_layer: OnLayer | None = None,
) -> Iterator[DenoiseStep]:
    """Yields a `DenoiseStep` for each step of the schedule; the last one's latents are the clean ones.

    Args:
        latents: (B, C, h, w) float32 at the schedule's first noise level, scaled as the network wants them.
        guidance: strength of classifier-free guidance; at or below 1 the conditional branch runs alone. For a
            distilled model it is told to the network instead.
        taylor: step cache, or None to run every step.
        one_branch_at_a_time: the branches one after the other, for less memory; not with capacity dropping, where
            they compete for the same experts.
        check_cancelled: called between layers.
        on_layer: sees the residual stream between layers (for tests and measurements).
    """
    config = model.config
    if config.cfg_distilled or guidance <= 1:
        branches = rows.branches[:1]
    elif len(rows.branches) == 2:
        branches = rows.branches
    else:
        raise RequestError(f"guidance is {guidance}, but this conditioning has no unconditional branch.")
    if model.drops_tokens and one_branch_at_a_time and len(branches) > 1:
        raise RequestError("Capacity dropping needs both guidance branches in one pass; turn one of the two off.")

    def between_layers(layer: int, x: torch.Tensor) -> None:
        check_cancelled()
        if on_layer is not None:
            on_layer(layer, x)

    groups = [(branch,) for branch in branches] if one_branch_at_a_time else [branches]
    passes = [_Pass(model, rows, group, latents.shape[0], guidance, schedule.steps, taylor) for group in groups]
    times = schedule.times.to(latents.device)
    for step in range(schedule.steps):
        check_cancelled()
        outputs = [p.velocity(step, latents, times[step], times[step + 1], between_layers) for p in passes]
        raw = torch.cat(outputs)
        if len(branches) == 2:
            conditional, unconditional = raw.chunk(2)
            prediction = unconditional + guidance * (conditional - unconditional)
        else:
            prediction = raw
        clean = schedule.predicted_clean(latents, prediction, step)
        latents = schedule.euler(latents, prediction, step)
        yield DenoiseStep(step, schedule.steps, raw, prediction, latents, clean, passes[0].ran_full)


class _Pass:
    """Branches that go through the network together, with their cache."""

    def __init__(
        self,
        model: Hunyuan3Transformer,
        rows: SequenceRows,
        branches: Sequence[TokenSequence],
        batch_size: int,
        guidance: float,
        steps: int,
        taylor: TaylorOptions | None,
    ) -> None:
        config, device = model.config, model.device
        sequence = rows.sequence
        self.model = model
        self.sequence = sequence
        self.num_branches = len(branches)
        self.picture = sequence.gen_run
        assert sequence.gen_timestep is not None
        # Control tokens lie directly before the picture's: together they are all that later steps recompute.
        self.window = Span(sequence.gen_timestep, self.picture.span.stop)
        self.ids = torch.tensor([b.ids for b in branches], device=device).repeat_interleave(batch_size, dim=0)
        positions = rope_positions(len(sequence), rows.grids).to(device)
        self.rope = rope_table(positions, config.head_dim, config.rope_theta)
        self.first_plan = plan_attention(Span(0, len(sequence)), rows.full_spans)
        self.later_plan = plan_attention(self.window, rows.full_spans)
        self.cache = model.new_cache(rows=len(self.ids), length=len(sequence))
        # The reference keeps the scaled guidance in bfloat16 (2.5 becomes 2496, not 2500).
        self.guidance = torch.tensor([guidance * TIME_SCALE], dtype=torch.bfloat16, device=device).float()
        self.taylor = TaylorCache(taylor, steps) if taylor else None
        self.ran_full = True

    def velocity(
        self, step: int, latents: torch.Tensor, t: torch.Tensor, r: torch.Tensor, on_layer: OnLayer
    ) -> torch.Tensor:
        """Latents (B, C, h, w) at time t -> velocities (branches * B, C, h, w); r: the time the step ends at."""
        self.ran_full = self.taylor is None or self.taylor.is_full(step)
        if self.ran_full:
            x = self._run(step, latents, t, r, on_layer)
            if self.taylor is not None:
                self.taylor.update(step, x)
        else:
            x = self.taylor.extrapolate()
        num_tokens = self.picture.span.stop - self.picture.span.start
        return self.model.velocity(x[:, -num_tokens:], t.view(1), self.picture.grid)

    def _run(
        self, step: int, latents: torch.Tensor, t: torch.Tensor, r: torch.Tensor, on_layer: OnLayer
    ) -> torch.Tensor:
        """Runs the stack; returns its output at the window's positions (rows, T, D)."""
        model, window = self.model, self.window
        # Branches see the same latents: embed them once.
        picture = model.embed_latents(latents, t.view(1)).repeat(self.num_branches, 1, 1)
        drawn = torch.cat((self._controls(t, r, len(self.ids)), picture), dim=1)
        if step > 0:
            rope = (self.rope[0][window.start : window.stop], self.rope[1][window.start : window.stop])
            return model(drawn, rope, self.later_plan, self.cache, on_layer)
        x = model.wte(self.ids)
        x[:, window.start : window.stop] = drawn
        return model(x, self.rope, self.first_plan, self.cache, on_layer)[:, window.start : window.stop]

    def _controls(self, t: torch.Tensor, r: torch.Tensor, rows: int) -> torch.Tensor:
        """Embeddings (rows, n, D) of <timestep>, <guidance>, <timestep_r>, those that this model has."""
        model = self.model
        tokens = [model.timestep_emb(t.view(1))]
        if model.guidance_emb is not None:
            tokens.append(model.guidance_emb(self.guidance))
        if model.timestep_r_emb is not None:
            tokens.append(model.timestep_r_emb(r.view(1)))
        return torch.stack(tokens, dim=1).expand(rows, -1, -1)
