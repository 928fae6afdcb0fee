"""Sections -> token ids and the places of everything that is not a plain word embedding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import RequestError
from ..types import Grid, ImageRun, Span, TokenSequence
from .special_tokens import SpecialTokens
from .template import InputPicture, OutputPicture, Section, TextSection
from .tokenizer import ControlMode, Tokenizer


@dataclass(frozen=True)
class ControlTokens:
    """Which control tokens a text may hold, by who wrote it (see `Tokenizer.encode`).

    The defaults keep a prompt's `<img>` or `<|endoftext|>` the characters they are. System prompts are the checkpoint's
    own and may name tags, so they are read as the reference reads them.
    """

    prompt: ControlMode = "text"
    trace: ControlMode = "trace"
    system: ControlMode = "reference"


SAFE = ControlTokens()
REFERENCE = ControlTokens(prompt="reference", trace="reference", system="reference")


def build_sequence(
    sections: Sequence[Section],
    tokens: SpecialTokens,
    tokenizer: Tokenizer,
    *,
    control_tokens: ControlTokens = SAFE,
    max_length: int | None = None,
) -> TokenSequence:
    """The (conditional) row of a request: bos, then every section; no eos, no padding.

    Raises RequestError when it is longer than `max_length`, CheckpointError for a token the vocabulary lacks.
    """
    row = _Row(tokens)
    for section in sections:
        if isinstance(section, TextSection):
            row.add_text(_encode(section, tokenizer, control_tokens))
        elif isinstance(section, InputPicture):
            row.add_input(section)
        else:
            row.add_output(section)
    sequence = row.finish()
    if max_length is not None and len(sequence) > max_length:
        words = sum(span.stop - span.start for span in sequence.text_spans)
        raise RequestError(
            f"the request takes {len(sequence)} tokens ({words} text, {len(sequence) - words} pictures), the limit is "
            f"{max_length}. Shorten the text, or use fewer input pictures or a smaller size."
        )
    return sequence


def conditional_pair(
    sections: Sequence[Section],
    tokens: SpecialTokens,
    tokenizer: Tokenizer,
    *,
    control_tokens: ControlTokens = SAFE,
    max_length: int | None = None,
) -> tuple[TokenSequence, TokenSequence]:
    """(conditional, unconditional) rows for classifier-free guidance: equal length, spans and runs.

    The unconditional row has `<cfg>` for each token of a replaceable text; system text, affixes, tags, pictures stay.
    """
    cond = build_sequence(sections, tokens, tokenizer, control_tokens=control_tokens, max_length=max_length)
    texts = [section for section in sections if isinstance(section, TextSection)]
    ids = list(cond.ids)
    for section, (start, stop) in zip(texts, cond.text_spans, strict=True):
        if section.replaceable:
            ids[start:stop] = [tokens.cfg] * (stop - start)
    return cond, replace(cond, ids=tuple(ids))


def full_attention_spans(sequence: TokenSequence, cond_token_attn_type: str) -> list[Span]:
    """Spans that attend to all of themselves, in sequence order; everything else is causal.

    An input picture's spans follow `cond_token_attn_type`; the picture to draw always is one.
    """
    match cond_token_attn_type:
        case "joint_full":
            spans = sequence.joint_spans
        case "full":
            spans = sequence.spans("vae") + sequence.spans("vit")
        case "full_causal":
            spans = sequence.spans("vae")
        case "causal":
            spans = ()
        case _:
            raise AssertionError(f"cond_token_attn_type {cond_token_attn_type!r}")
    return sorted(spans + sequence.spans("gen"))


def rope_grids(sequence: TokenSequence, cond_token_attn_type: str) -> list[tuple[Span, Grid]]:
    """Image runs with two-dimensional positions, in sequence order; all other tokens count along the sequence.

    The span is the whole run; the grid covers its first `height * width` positions.
    """
    kinds = {
        "joint_full": ("vae", "vit", "gen"),
        "full": ("vae", "vit", "gen"),
        "full_causal": ("vae", "gen"),
        "causal": ("gen",),
    }[cond_token_attn_type]
    return [(run.span, run.grid) for run in sequence.runs if run.kind in kinds]


class _Row:
    """A sequence under construction."""

    def __init__(self, tokens: SpecialTokens) -> None:
        self.tokens = tokens
        self.ids = [tokens.bos]
        self.texts: list[Span] = []
        self.runs: list[ImageRun] = []
        self.joints: list[Span] = []
        self.cond_timesteps: list[int] = []
        self.slots: dict[str, int] = {}

    def add_text(self, ids: list[int]) -> None:
        start = len(self.ids)
        self.ids += ids
        self.texts.append(Span(start, len(self.ids)))

    def add_input(self, picture: InputPicture) -> None:
        """`<boi> size ratio <timestep> <img>*n_vae <joint_img_sep> <img>*n_vit <eoi>`"""
        tokens = self.tokens
        separator = tokens.require_joint_img_sep()
        self.ids += [tokens.boi, tokens.size, tokens.ratio(picture.ratio)]
        self.cond_timesteps.append(self._add(tokens.timestep))
        vae = self._add_run("vae", picture.vae_grid)
        self._add(separator)
        vit = self._add_run("vit", picture.vit_grid, picture.vit_tokens)
        self._add(tokens.eoi)
        self.joints.append(Span(vae.start, vit.stop))

    def add_output(self, picture: OutputPicture) -> None:
        """`<boi> size ratio <timestep> [<guidance>] [<timestep_r>] <img>*n <eoi>`"""
        tokens = self.tokens
        assert not self.slots, "a sequence draws one picture"
        self.ids += [tokens.boi, tokens.size, tokens.ratio(picture.ratio)]
        self.slots["gen_timestep"] = self._add(tokens.timestep)
        if tokens.guidance is not None:
            self.slots["guidance"] = self._add(tokens.guidance)
        if tokens.timestep_r is not None:
            self.slots["timestep_r"] = self._add(tokens.timestep_r)
        self._add_run("gen", picture.grid)
        self._add(tokens.eoi)

    def finish(self) -> TokenSequence:
        return TokenSequence(
            ids=tuple(self.ids),
            text_spans=tuple(self.texts),
            runs=tuple(self.runs),
            joint_spans=tuple(self.joints),
            cond_timesteps=tuple(self.cond_timesteps),
            **self.slots,
        )

    def _add(self, token_id: int) -> int:
        self.ids.append(token_id)
        return len(self.ids) - 1

    def _add_run(self, kind: Literal["gen", "vae", "vit"], grid: Grid, length: int | None = None) -> Span:
        start = len(self.ids)
        self.ids += [self.tokens.img] * (grid.height * grid.width if length is None else length)
        span = Span(start, len(self.ids))
        self.runs.append(ImageRun(kind, span, grid))
        return span


def _encode(section: TextSection, tokenizer: Tokenizer, control_tokens: ControlTokens) -> list[int]:
    mode: ControlMode = "reference" if section.source == "template" else getattr(control_tokens, section.source)
    before, after = section.affixes
    return tokenizer.encode(before) + tokenizer.encode(section.text, mode) + tokenizer.encode(after)
