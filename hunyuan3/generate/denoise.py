"""The denoise loop: from noise to clean latents, one velocity per step (spec 8).

The first step runs the whole sequence and fills the key-value cache. Everything before the picture depends on text and
input pictures alone, so later steps run only the control tokens and the picture's tokens against that cache; the
picture's own positions in it are overwritten each time. With a prefix store the prompt is a pass of its own, which is
skipped as far as the store already holds it. Without capacity dropping all of this equals recomputing everything.

B pictures of one request, R branches (conditional, unconditional); rows of a pass are all conditional ones, then all
unconditional ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..callbacks import CheckCancelled, never_cancelled
from ..errors import RequestError
from ..ops.attention import AttentionPlan, plan_attention
from ..ops.pace import QueueLimit
from ..ops.rope import rope_positions, rope_table
from ..transformer.model import Hunyuan3Transformer, OnLayer
from ..types import Span, TokenSequence
from .prefix import TEXT, Prefix, PrefixStore
from .rows import SequenceRows, embed_rows
from .schedule import TIME_SCALE, Schedule
from .taylor import TaylorCache, TaylorOptions


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
    prefixes: PrefixStore | None = None,
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
        prefixes: keys and values of earlier requests, used where the beginning is identical, and added to. Not used
            with capacity dropping, where nothing is independent of what follows.
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

    limit_queue = QueueLimit()

    def between_layers(layer: int, x: torch.Tensor) -> None:
        limit_queue(x.device)
        check_cancelled()
        if on_layer is not None:
            on_layer(layer, x)

    groups = [(branch,) for branch in branches] if one_branch_at_a_time else [branches]
    passes = [_Pass(model, rows, group, latents.shape[0], guidance, schedule.steps, taylor) for group in groups]
    if prefixes is not None and not model.drops_tokens:
        for one in passes:
            one.prefill(prefixes, between_layers)
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
        self.rows = rows
        self.branches = branches
        self.batch_size = batch_size
        self.picture = sequence.gen_run
        assert sequence.gen_timestep is not None
        # Control tokens lie directly before the picture's: together they are all that later steps recompute.
        self.window = Span(sequence.gen_timestep, self.picture.span.stop)
        self.ids = torch.tensor([b.ids for b in branches], device=device).repeat_interleave(batch_size, dim=0)
        positions = rope_positions(len(sequence), rows.grids).to(device)
        self.rope = rope_table(positions, config.head_dim, config.rope_theta)
        self.start = 0  # where the first step begins; everything before is in the cache then
        self.cache = model.new_cache(rows=len(self.ids), length=len(sequence))
        # The reference keeps the scaled guidance in bfloat16 (2.5 becomes 2496, not 2500).
        self.guidance = torch.tensor([guidance * TIME_SCALE], dtype=torch.bfloat16, device=device).float()
        self.taylor = TaylorCache(taylor, steps) if taylor else None
        self.ran_full = True

    def prefill(self, prefixes: PrefixStore, on_layer: OnLayer) -> None:
        """Fills the cache up to the picture, computing only what the store lacks, once per branch; the store keeps it.

        A pass of its own, unlike the whole-sequence first step: so a drawing whose prompt is known computes the very
        same numbers, to the bit, as the one that made it known.
        """
        self.start = self.window.start
        kind = f"draw{len(self.branches)}"
        found = [prefixes.find(branch.ids, self.rows, kind=kind) for branch in self.branches]
        known = [min(length, self.start) for _prefix, length in found]
        if min(known) < self.start:
            found = self._after_text(prefixes)
            known = [min(length, self.start) for _prefix, length in found]
        for index, (prefix, _length) in enumerate(found):
            if prefix is not None:
                self.cache.fill(self._lines(index), prefix.keys, prefix.values, known[index])
        if found[0][0] is not None and found[0][0].kind == kind:
            return  # every branch was found whole
        if not any(known):
            self._compute(range(len(self.branches)), 0, on_layer)
        else:
            for index, length in enumerate(known):
                if length < self.start:
                    self._compute(range(index, index + 1), length, on_layer)
        for index, branch in enumerate(self.branches):
            prefixes.keep(branch.ids[: self.start], self.rows, self.cache, self._lines(index).start, kind=kind)

    def _after_text(self, prefixes: PrefixStore) -> list[tuple[Prefix | None, int]]:
        """What a text pass that this drawing goes on from left for each branch; nothing if there was none.

        The unconditional branch shares with it what stands before the words that are replaced there.
        """
        first = prefixes.find(self.branches[0].ids, self.rows, kind=TEXT)
        others = self.branches[1:]
        if first[0] is None:
            return [first, *((None, 0) for _branch in others)]
        return [first, *(prefixes.find(branch.ids, self.rows, kind=TEXT, partly=True) for branch in others)]

    def _compute(self, branches: range, known: int, on_layer: OnLayer) -> None:
        """Runs the prompt of some branches from position `known` up to the picture, one row each."""
        first_lines = slice(branches.start * self.batch_size, branches.stop * self.batch_size, self.batch_size)
        lines = self.cache.view(first_lines)
        ids = torch.tensor([self.branches[index].ids for index in branches], device=self.model.device)
        x = embed_rows(self.model, ids, self.rows.sequence, self.rows.pictures)[:, known : self.start]
        self.model(x, *self._geometry(Span(known, self.start)), lines, on_layer)
        if self.batch_size > 1:
            for line, index in enumerate(branches):
                one = lines.view(slice(line, line + 1))
                self.cache.fill(self._lines(index), one.keys, one.values, self.start)

    def _lines(self, branch: int) -> slice:
        """The cache rows of a branch: one per picture."""
        return slice(branch * self.batch_size, (branch + 1) * self.batch_size)

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
        picture = model.embed_latents(latents, t.view(1)).repeat(len(self.branches), 1, 1)
        drawn = torch.cat((self._controls(t, r, len(self.ids)), picture), dim=1)
        if step > 0:
            return model(drawn, *self._geometry(window), self.cache, on_layer)
        x = embed_rows(model, self.ids, self.rows.sequence, self.rows.pictures)
        x[:, window.start : window.stop] = drawn
        span = Span(self.start, x.shape[1])
        out = model(x[:, span.start :], *self._geometry(span), self.cache, on_layer)
        return out[:, window.start - span.start : window.stop - span.start]

    def _geometry(self, span: Span) -> tuple[tuple[torch.Tensor, torch.Tensor], AttentionPlan]:
        """Rotary tables and attention plan of some positions."""
        cos, sin = (table[span.start : span.stop] for table in self.rope)
        return (cos, sin), plan_attention(span, self.rows.full_spans)

    def _controls(self, t: torch.Tensor, r: torch.Tensor, rows: int) -> torch.Tensor:
        """Embeddings (rows, n, D) of <timestep>, <guidance>, <timestep_r>, those that this model has."""
        model = self.model
        tokens = [model.timestep_emb(t.view(1))]
        if model.guidance_emb is not None:
            tokens.append(model.guidance_emb(self.guidance))
        if model.timestep_r_emb is not None:
            tokens.append(model.timestep_r_emb(r.view(1)))
        return torch.stack(tokens, dim=1).expand(rows, -1, -1)
