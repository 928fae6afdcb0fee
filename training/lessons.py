"""What is taught: pictures to draw, to change, to fuse and to answer about, made at random from seeds."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .captions import PromptKind, random_prompt
from .edits import PICKING_KINDS, Edit, random_edit
from .fusion import random_fusion
from .questions import random_question
from .scene import DIGITS, LETTERS, Scene
from .thoughts import rewrite, thought
from .turns import random_turns
from .world import is_habitual, split_scene

Mode = Literal["direct", "rewrite", "think"]  # what is written before a picture


@dataclass(frozen=True)
class Lesson:
    """One request and what should come of it. Scenes are numbers in the list that the lessons came with.

    Attributes:
        prompt: the user's words.
        scene: the picture to draw, None for an answer in words.
        inputs: the pictures that the user shows, or that were drawn in the first turn.
        trace: what is written before the picture, with its tags; "" for nothing.
        answer: the words that answer; "" for a picture.
        system_prompt: "auto" or "None".
        first: what the user said in a turn before this one, which drew inputs[0]; "" where this is the first turn.
        first_trace: what was written before that picture.
    """

    prompt: str
    scene: int | None
    inputs: tuple[int, ...] = ()
    trace: str = ""
    answer: str = ""
    system_prompt: str = "auto"
    first: str = ""
    first_trace: str = ""

    @property
    def scenes(self) -> tuple[int, ...]:
        """The numbers of all its scenes."""
        return self.inputs if self.scene is None else (*self.inputs, self.scene)


@dataclass(frozen=True)
class Curriculum:
    """How often what is taught.

    Attributes:
        edits, fusions, questions: shares of the lessons; the others draw from words alone.
        several: share of the edits that recolour, remove or move one of two or three objects; the others are any.
        second_turns: share of the lessons that edit in the second turn what the first one drew. Their rows have so many
            lengths that batches leave most of them out.
        repeats: prompts for each scene that is drawn from words alone.
        characters: share of those scenes that show letters and digits in any case; of the others some do.
        habitual: share of the others whose objects are where nobody has to say it (`world.HABITS`).
        complete: share of prompts that leave neither colour nor place open; of edits that are drawn at once, all do so.
        short: share of the other prompts about habitual places that name no place and no background.
        rewritten: share of drawings with a rewrite before them. thought: with a thought and a rewrite.
        without_system: share of lessons without the system prompt.
    """

    edits: float = 0.0
    fusions: float = 0.0
    questions: float = 0.0
    several: float = 0.0
    second_turns: float = 0.0
    repeats: int = 6
    characters: float = 0.0
    habitual: float = 0.3
    complete: float = 0.7
    short: float = 0.5
    rewritten: float = 0.25
    thought: float = 0.05
    without_system: float = 0.1


def make_lessons(
    rng: random.Random, count: int, curriculum: Curriculum
) -> tuple[tuple[Scene, ...], tuple[Lesson, ...]]:
    """`count` lessons of the training split, a few more at the most, and the scenes that they speak of."""
    scenes: list[Scene] = []
    lessons: list[Lesson] = []
    while len(lessons) < count:
        system = "None" if rng.random() < curriculum.without_system else "auto"
        shown, made = _some(rng, curriculum, len(scenes), system)
        scenes += shown
        lessons += made
    return tuple(scenes), tuple(lessons)


def _some(rng: random.Random, curriculum: Curriculum, first: int, system: str) -> tuple[list[Scene], list[Lesson]]:
    """The next scenes, numbered from `first`, and the lessons about them."""
    shares = (curriculum.questions, curriculum.edits, curriculum.second_turns, curriculum.fusions)
    weights = (*shares, (1 - sum(shares)) / curriculum.repeats)
    match rng.choices(("question", "edit", "second", "fusion", "drawing"), weights)[0]:
        case "question":
            question = random_question(rng, "train", several=True)
            lesson = Lesson(question.text, None, (first,), answer=question.answer, system_prompt=system)
            return [question.scene], [lesson]
        case "edit":
            stage = _stage(rng, curriculum)
            complete = stage == "direct" or rng.random() < curriculum.complete
            edit = _edit(rng, curriculum, complete)
            trace = _trace(stage, edit.summary, edit.rewrite)
            return [edit.before, edit.after], [Lesson(edit.text, first + 1, (first,), trace, system_prompt=system)]
        case "second":
            edit, lesson = _second_turn(rng, first, system)
            return [edit.before, edit.after], [lesson]
        case "fusion":
            fusion = random_fusion(rng, "train")
            last = first + len(fusion.inputs)
            trace = _trace(_stage(rng, curriculum), fusion.summary, fusion.rewrite)
            lesson = Lesson(fusion.text, last, tuple(range(first, last)), trace, system_prompt=system)
            return [*fusion.inputs, fusion.after], [lesson]
        case _:
            shapes = LETTERS + DIGITS if rng.random() < curriculum.characters else None
            habitual = shapes is None and rng.random() < curriculum.habitual
            scene = split_scene(rng, "train", shapes=shapes, habitual=habitual)
            return [scene], list(_drawings(rng, curriculum, scene, first, system))


def _drawings(rng: random.Random, curriculum: Curriculum, scene: Scene, number: int, system: str) -> Iterator[Lesson]:
    """Prompts for one scene. Before a rewrite they leave any place open, which it decides; else only habitual ones."""
    for _ in range(curriculum.repeats):
        stage = _stage(rng, curriculum)
        kind: PromptKind = "complete" if rng.random() < curriculum.complete else "open"
        if kind == "open" and is_habitual(scene) and rng.random() < curriculum.short:
            kind = "short"
        prompt = random_prompt(rng, scene, kind=kind, habitual=stage == "direct")
        trace = _trace(stage, thought(prompt, scene), rewrite(scene, prompt.language))
        yield Lesson(prompt.text, number, (), trace, system_prompt=system)


def _edit(rng: random.Random, curriculum: Curriculum, complete: bool) -> Edit:
    """Any edit, or one of several objects. Where none of these are taught no number is drawn: stages repeat."""
    if curriculum.several and rng.random() < curriculum.several:
        return random_edit(rng, "train", rng.choice(PICKING_KINDS), complete=complete, start=_several)
    return random_edit(rng, "train", complete=complete)


def _several(rng: random.Random) -> Scene:
    """Two objects, at times three."""
    return split_scene(rng, "train", rng.choice((2, 2, 2, 3)))


def _second_turn(rng: random.Random, first: int, system: str) -> tuple[Edit, Lesson]:
    """An edit of what the turn before drew. In both turns the same is written before the picture, and never nothing."""
    stage: Mode = rng.choice(("rewrite", "think"))
    turns = random_turns(rng, "train")
    edit, prompt = turns.edit, turns.first
    lesson = Lesson(
        edit.text,
        first + 1,
        (first,),
        _trace(stage, edit.summary, edit.rewrite),
        system_prompt=system,
        first=prompt.text,
        first_trace=_trace(stage, thought(prompt, edit.before), rewrite(edit.before, edit.language)),
    )
    return edit, lesson


def _stage(rng: random.Random, curriculum: Curriculum) -> Mode:
    """What is written before a picture."""
    kind = rng.random()
    if kind < curriculum.thought:
        return "think"
    return "rewrite" if kind < curriculum.thought + curriculum.rewritten else "direct"


def _trace(stage: Mode, thinking: str, full: str) -> str:
    """Nothing, a rewrite, or a thought and a rewrite."""
    thought_of = f"<think>{thinking}</think>" if stage == "think" else ""
    return "" if stage == "direct" else f"{thought_of}<recaption>{full}</recaption>"
