"""Rows of token ids as inference lays them out, with what is to be learned from them, in batches of one geometry."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch

from hunyuan3.conditioning import make_conditioning
from hunyuan3.folder import ModelFolder
from hunyuan3.generate.rows import SequenceRows
from hunyuan3.text.special_tokens import SpecialTokens

NO_TARGET = -100


@dataclass(frozen=True)
class Lesson:
    """One picture with the words that ask for it. `scene`: its number; `trace`: what is written first, "" for none."""

    scene: int
    prompt: str
    trace: str
    ratio: int
    system_prompt: str = "auto"


@dataclass(frozen=True)
class Row:
    """A lesson laid out. `rows`: its conditional and unconditional branch and their geometry."""

    scene: int
    rows: SequenceRows

    @property
    def geometry(self) -> tuple[object, ...]:
        """What the rows of a batch must have in common."""
        return (len(self.rows.sequence), self.rows.full_spans, self.rows.grids)


@dataclass(frozen=True)
class Batch:
    """R rows of one geometry.

    Attributes:
        scenes: R numbers of the pictures.
        rows: the geometry; its ids are those of the first row.
        ids: (R, N) int64.
        targets: (R, N) int64, the token to be predicted at each position, NO_TARGET where there is none.
        shared: length of the beginning that all rows have in common, before anything is to be learned.
    """

    scenes: tuple[int, ...]
    rows: SequenceRows
    ids: torch.Tensor
    targets: torch.Tensor
    shared: int


def lay_out(folder: ModelFolder, lesson: Lesson) -> Row:
    """The row of a lesson, exactly as the package draws from it."""
    conditioning = make_conditioning(
        folder,
        lesson.prompt,
        folder.resolutions.row(lesson.ratio),
        trace=lesson.trace,
        system_prompt=lesson.system_prompt,
    )
    return Row(lesson.scene, conditioning.rows)


def in_batches(rows: Iterable[Row], size: int, least: int, rng: random.Random) -> list[list[Row]]:
    """Rows sorted into batches of one geometry, in random order: `size` rows each, at the end of a geometry fewer.

    Batches of less than `least` rows are dropped.
    """
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.geometry].append(row)
    batches = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    batches = [batch for batch in batches if len(batch) >= least]
    rng.shuffle(batches)
    return batches


def collate(rows: Sequence[Row], tokens: SpecialTokens, dropout: float, rng: random.Random) -> Batch:
    """A batch; with probability `dropout` a row becomes its unconditional branch, from which no words are learned."""
    ids, targets = [], []
    for row in rows:
        conditional, unconditional = row.rows.branches
        if rng.random() < dropout:
            ids.append(unconditional.ids)
            targets.append([NO_TARGET] * len(unconditional))
        else:
            ids.append(conditional.ids)
            targets.append(next_tokens(conditional.ids, tokens))
    columns = enumerate(zip(*ids, strict=True))
    learned = {position for row in targets for position, target in enumerate(row) if target != NO_TARGET}
    shared = sum(1 for _ in takewhile(lambda item: len(set(item[1])) == 1 and item[0] not in learned, columns))
    return Batch(
        scenes=tuple(row.scene for row in rows),
        rows=rows[0].rows,
        ids=torch.tensor(ids),
        targets=torch.tensor(targets),
        shared=shared,
    )


def next_tokens(ids: Sequence[int], tokens: SpecialTokens) -> list[int]:
    """What the model itself would have to write: traces with their closing tags, and the ratio; else NO_TARGET."""
    targets = [NO_TARGET] * len(ids)
    closing = {tokens.think: tokens.think_end, tokens.recaption: tokens.recaption_end}
    until = None  # the closing tag of the body we are in
    for position, (token, following) in enumerate(pairwise(ids)):
        until = closing.get(token, until)
        if until is not None or token == tokens.size:
            targets[position] = following
        if following == until:
            until = None
    return targets
