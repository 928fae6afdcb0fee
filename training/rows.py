"""Rows of token ids as inference lays them out, with what is to be learned from them, in batches of one geometry."""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile

import torch

from hunyuan3.conditioning import make_conditioning
from hunyuan3.folder import ModelFolder
from hunyuan3.generate.rows import SequenceRows
from hunyuan3.image.preprocess import patch_grid
from hunyuan3.pictures import EncodedPicture
from hunyuan3.text.special_tokens import SpecialTokens
from hunyuan3.text.template import Message
from hunyuan3.types import ImageSize
from hunyuan3.vae.autoencoder import Posterior
from hunyuan3.writing import TextRequest, answering, text_rows

from .lessons import Lesson
from .scene import Scene

NO_TARGET = -100


@dataclass(frozen=True)
class Row:
    """A lesson laid out. `branches`: the ids with and without the words; of an answer only the former."""

    lesson: Lesson
    rows: SequenceRows

    @property
    def geometry(self) -> tuple[object, ...]:
        """What the rows of a batch must have in common."""
        sequence = self.rows.sequence
        return (len(sequence), sequence.gen_timestep, self.rows.full_spans, self.rows.grids)


@dataclass(frozen=True)
class Batch:
    """R rows of one geometry.

    Attributes:
        lessons: R of them.
        rows: the geometry; its ids are those of the first row.
        ids: (R, N) int64.
        targets: (R, N) int64, the token to be predicted at each position, NO_TARGET where there is none.
        shared: length of the beginning that all rows have in common, before anything is to be learned or seen.
    """

    lessons: tuple[Lesson, ...]
    rows: SequenceRows
    ids: torch.Tensor
    targets: torch.Tensor
    shared: int


def lay_out(folder: ModelFolder, lesson: Lesson, scenes: Sequence[Scene]) -> Row:
    """The row of a lesson, exactly as the package draws or answers from it."""
    pictures = tuple(_placeholder(folder, scenes[number]) for number in lesson.inputs)
    if lesson.scene is None:
        request = TextRequest(lesson.prompt, pictures=pictures, system_prompt=lesson.system_prompt)
        return Row(lesson, _answered(folder, text_rows(folder, request, answering(folder)), lesson.answer))
    scene = scenes[lesson.scene]
    conditioning = make_conditioning(
        folder,
        lesson.prompt,
        folder.resolutions.free(scene.height, scene.width),
        pictures=pictures,
        trace=lesson.trace,
        system_prompt=lesson.system_prompt,
        history=_history(lesson, pictures),
    )
    return Row(lesson, conditioning.rows)


def _history(lesson: Lesson, pictures: Sequence[EncodedPicture]) -> tuple[Message, ...]:
    """The turn before this one: what the user said, what was written and drawn. Nothing where there was none."""
    if not lesson.first:
        return ()
    written = [Message("assistant", lesson.first_trace)] if lesson.first_trace else []
    return (Message("user", lesson.first), *written, Message("assistant", pictures[0].in_template()))


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


def collate(rows: Sequence[Row], tokens: SpecialTokens, dropped: Sequence[bool]) -> Batch:
    """A batch. A `dropped` row becomes its unconditional branch, if it has one; no words are learned from it."""
    ids, targets = [], []
    for row, is_dropped in zip(rows, dropped, strict=True):
        conditional, *unconditional = row.rows.branches
        if unconditional and is_dropped:
            ids.append(unconditional[0].ids)
            targets.append([NO_TARGET] * len(conditional))
        else:
            ids.append(conditional.ids)
            targets.append(next_tokens(conditional.ids, tokens))
    columns = enumerate(zip(*ids, strict=True))
    own = {position for row in targets for position, target in enumerate(row) if target != NO_TARGET}
    own |= set(rows[0].rows.sequence.cond_timesteps)
    shared = sum(1 for _ in takewhile(lambda item: len(set(item[1])) == 1 and item[0] not in own, columns))
    return Batch(
        lessons=tuple(row.lesson for row in rows),
        rows=rows[0].rows,
        ids=torch.tensor(ids),
        targets=torch.tensor(targets),
        shared=shared,
    )


def next_tokens(ids: Sequence[int], tokens: SpecialTokens) -> list[int]:
    """What the model itself would have to write, NO_TARGET elsewhere.

    Traces and answers with their closing tags; an answer's opening tag; the ratio of a picture to draw.
    """
    targets = [NO_TARGET] * len(ids)
    closing = {tokens.think: tokens.think_end, tokens.recaption: tokens.recaption_end, tokens.answer: tokens.answer_end}
    until = None  # the closing tag of the body we are in
    for position, (token, following) in enumerate(pairwise(ids)):
        until = closing.get(token, until)
        if until == tokens.answer_end and following == tokens.boi:  # the answer is a picture
            until = None
        draws = position > 1 and ids[position - 2] == tokens.answer and token == tokens.size
        answers = following == tokens.answer and position + 2 < len(ids) and ids[position + 2] != tokens.boi
        if until is not None or draws or answers:
            targets[position] = following
        if following == until:
            until = None
    return targets


def _answered(folder: ModelFolder, rows: SequenceRows, answer: str) -> SequenceRows:
    """The row of a question with the answer after it."""
    words = (folder.tokens.answer, *folder.tokenizer.encode(answer, "text"), folder.tokens.answer_end)
    return replace(rows, branches=(replace(rows.sequence, ids=(*rows.sequence.ids, *words)),))


def _placeholder(folder: ModelFolder, scene: Scene) -> EncodedPicture:
    """An input picture of which only the place in the sequence is known yet."""
    size = ImageSize(scene.height, scene.width)
    vision, nothing = folder.config.vision, torch.empty(0)
    return EncodedPicture(
        size=size,
        resolution=folder.resolutions.row(folder.resolutions.nearest(*size)),
        vision_grid=patch_grid(size, max_num_patches=vision.max_num_patches, patch_size=vision.patch_size),
        posterior=Posterior(nothing, nothing),
        tokens=torch.empty(vision.max_num_patches, 0),
        key="",
    )
