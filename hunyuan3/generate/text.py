"""The text loop: prefill, then token by token on the key-value cache (spec 4.8).

Forced tokens go through the model as one chunk together with the token that triggered them. Logits are computed for
the last position only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from ..callbacks import CheckCancelled, never_cancelled
from ..errors import RequestError
from ..ops.attention import plan_attention
from ..ops.rope import rope_positions, rope_table
from ..transformer.model import Hunyuan3Transformer, OnLayer
from ..types import Span
from .prefix import TEXT, PrefixStore
from .rows import SequenceRows, embed_rows
from .sampling import TokenSampler, pick_among
from .stages import StagePlan

Finish = Literal["stop", "length", "end_of_text"]
_CLOSING_ROOM = 8  # a pass that is cut off may still close its tags and choose its ratio


@dataclass(frozen=True)
class TextStep:
    """One token. index: 0-based among the new ones; stage: "think", "recaption", "ratio" or "answer"; forced: not
    chosen by the model; logits (V,) float32 that it was chosen from, None for a forced one.
    """

    index: int
    token: int
    stage: str
    forced: bool
    logits: torch.Tensor | None


class TextPass:
    """Iterating writes, a `TextStep` at a time; afterwards `ids`, `finish` and `ratio` hold the result."""

    def __init__(
        self,
        model: Hunyuan3Transformer,
        rows: SequenceRows,
        plan: StagePlan,
        sampler: TokenSampler,
        *,
        max_new_tokens: int,
        max_length: int,
        prefixes: PrefixStore | None = None,
        check_cancelled: CheckCancelled = never_cancelled,
        on_layer: OnLayer | None = None,
    ) -> None:
        """Args:
        rows: one branch, a prompt that ends where the model is to write on.
        max_new_tokens: at least 1; forced tokens count. max_length: of the whole sequence.
        prefixes: keys and values of earlier requests, used where the beginning is identical, and added to.
        """
        room = max_length - len(rows.sequence) - _CLOSING_ROOM
        if max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if room < 1:
            raise RequestError(
                f"The prompt takes {len(rows.sequence)} tokens of the {max_length} that fit: no room to write. "
                "Shorten the text or use fewer input pictures."
            )
        self.model = model
        self.rows = rows
        self.plan = plan
        self.sampler = sampler
        self.budget = min(max_new_tokens, room)
        self.prefixes = None if model.drops_tokens else prefixes
        self.check_cancelled = check_cancelled
        self.on_layer = on_layer
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.ratio: int | None = None
        self._started = False

    @torch.no_grad()
    def __iter__(self) -> Iterator[TextStep]:
        if self._started:
            raise RuntimeError("A text pass writes once; make another one to write again.")
        self._started = True
        plan, writer = self.plan, _Writer(self)
        logits = writer.prefill()
        stage, unused = plan.first_stage, dict(plan.forced)
        previous = self.rows.sequence.ids[-1]
        while self.finish is None:
            self.check_cancelled()
            if previous == plan.ratio_after:
                token = pick_among(logits, plan.ratios)
            else:
                token = self.sampler.pick(logits, [*self.rows.sequence.ids, *self.ids])
            if token == plan.end_of_text:
                self.finish = "end_of_text"
                break
            yield self._step(token, stage, False, logits)
            stage = plan.stage_after.get(token, stage)
            if token in plan.stops:
                self.finish = "stop"
                break
            chunk = [token]
            for forced in unused.pop(token, ()):
                if len(self.ids) < self.budget:
                    yield self._step(forced, stage, True, None)
                    stage = plan.stage_after.get(forced, stage)
                    chunk.append(forced)
            if len(self.ids) >= self.budget:
                self.finish = "length"
            else:
                previous = chunk[-1]
                logits = writer.feed(chunk)
        if self.finish != "stop" and plan.to_ratio:
            yield from self._to_ratio(writer, stage)
        if self.ids and self.ids[-1] in plan.ratios:
            self.ratio = plan.ratios.index(self.ids[-1])
        writer.keep()

    def _to_ratio(self, writer: "_Writer", stage: str) -> Iterator[TextStep]:
        """After a pass that was cut off: close the open tag and go on to the ratio, which is never left unchosen."""
        already = [i for i, token in enumerate(self.ids) if token == self.plan.ratio_after]
        if not already:
            done = self._written_of(self.plan.to_ratio)
            closing = self.plan.closing.get(stage, ())
            open_tag = not done and tuple(self.ids[-1:]) != closing
            for token in (*(closing if open_tag else ()), *self.plan.to_ratio[done:]):
                yield self._step(token, stage, True, None)
        logits = writer.feed(self.ids[writer.fed :])
        yield self._step(pick_among(logits, self.plan.ratios), "ratio", False, logits)

    def _written_of(self, tokens: tuple[int, ...]) -> int:
        """How many of these tokens already stand at the end of what was written."""
        for count in range(len(tokens), 0, -1):
            if tuple(self.ids[-count:]) == tokens[:count]:
                return count
        return 0

    def _step(self, token: int, stage: str, forced: bool, logits: torch.Tensor | None) -> TextStep:
        self.ids.append(token)
        return TextStep(len(self.ids) - 1, token, stage, forced, logits)


class _Writer:
    """The model with the cache of one pass. `fed`: how many of the new tokens it has seen."""

    def __init__(self, text: TextPass) -> None:
        model, rows = text.model, text.rows
        self.text = text
        self.fed = 0
        self.prompt = len(rows.sequence)
        length = self.prompt + text.budget + _CLOSING_ROOM
        self.cache = model.new_cache(rows=1, length=length)
        positions = rope_positions(length, rows.grids).to(model.device)
        self.rope = rope_table(positions, model.config.head_dim, model.config.rope_theta)

    def prefill(self) -> torch.Tensor:
        """Runs the prompt, from where the prefix store ends; logits (V,) of its last position."""
        rows, model, prefixes = self.text.rows, self.text.model, self.text.prefixes
        ids = rows.sequence.ids
        prefix, length = prefixes.find(ids, rows, kind=TEXT) if prefixes is not None else (None, 0)
        length = min(length, self.prompt - 1)  # the last position must run: its logits are not kept
        if prefix is not None:
            self.cache.fill(slice(0, 1), prefix.keys, prefix.values, length)
        x = embed_rows(model, torch.tensor([ids], device=model.device), rows.sequence, rows.pictures)
        return self._run(x[:, length:], Span(length, self.prompt))

    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Runs some new tokens, each seeing those before it; logits (V,) of the last."""
        start = self.prompt + self.fed
        x = self.text.model.wte(torch.tensor([tokens], device=self.text.model.device))
        self.fed += len(tokens)
        return self._run(x, Span(start, start + len(tokens)))

    def keep(self) -> None:
        """Gives the keys and values of prompt and text to the store."""
        if self.text.prefixes is not None:
            ids = (*self.text.rows.sequence.ids, *self.text.ids[: self.fed])
            self.text.prefixes.keep(ids, self.text.rows, self.cache, 0, kind=TEXT, request=self.prompt)

    def _run(self, x: torch.Tensor, span: Span) -> torch.Tensor:
        def between_layers(layer: int, stream: torch.Tensor) -> None:
            self.text.check_cancelled()
            if self.text.on_layer is not None:
                self.text.on_layer(layer, stream)

        rope = (self.rope[0][span.start : span.stop], self.rope[1][span.start : span.stop])
        plan = plan_attention(span, self.text.rows.full_spans)
        out = self.text.model(x, rope, plan, self.cache, between_layers)
        return self.text.model.logits(out[:, -1])[0]
