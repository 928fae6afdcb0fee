"""The exam: prompts, edits, fusions and questions about held-out scenes, which training has never seen."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from .captions import random_prompt
from .edits import EDIT_KINDS, PICKING_KINDS, Edit, EditKind, random_edit
from .fusion import random_fusion
from .questions import QUESTION_KINDS, QuestionKind, random_question
from .scene import DIGITS, LETTERS, Scene
from .turns import random_turns
from .wanted import Wanted
from .words import Language
from .world import split_scene, stream

# Of a hundred prompts, how many are of which kind; short ones, edits, fusions and questions come on top.
_PROMPTS = {"one": 35, "two": 35, "three": 10, "letter": 20}
_OBJECTS = {"one": (1,), "two": (2,), "three": (3,), "letter": (1,), "short": (1, 2, 2, 2)}
_SHORT, _EDITS, _PICKS, _TURNS, _FUSIONS, _QUESTIONS = 20, 25, 15, 10, 10, 50


@dataclass(frozen=True)
class DrawingTask:
    """A picture to draw.

    Attributes:
        kind: of a prompt "one", "two", "three" (objects), "letter" or "short"; "edit recolour" and so on; "pick
            recolour" and so on, edits of one of two objects; "turn 2"; "fuse 2", "fuse 3".
        scene: one right result: the picture is to have its size, and a rewrite describes it.
        inputs: the scenes of the input pictures, or of the one that was drawn in the turn before.
        first: what that turn asked for, "" where there is none.
    """

    kind: str
    text: str
    language: Language
    wanted: Wanted
    scene: Scene
    inputs: tuple[Scene, ...] = ()
    first: str = ""

    @property
    def is_decided(self) -> bool:
        """Whether every place is asked for: `scene` is then the only right one but for its background and sizes."""
        return all(wish.place for wish in self.wanted.objects)

    @property
    def is_edit(self) -> bool:
        """Whether one picture is to be changed; its rest is to stay."""
        return self.kind.startswith(("edit ", "pick ")) or bool(self.first)


@dataclass(frozen=True)
class QuestionTask:
    """A question to answer about a scene's picture; the kind is "ask count" and so on."""

    kind: str
    text: str
    scene: Scene
    answer: str


Task: TypeAlias = DrawingTask | QuestionTask


def exam(prompts: int = 200, seed: int = 0) -> list[Task]:
    """The tasks for so many prompts, the same for the same numbers: half as many questions, a quarter as many edits.

    Every prompt names the colour and the place of each object, so what is right is certain, and an arrangement that
    training did not see is in its words. Short ones, a fifth on top, name one object or, mostly, two with their colours
    (and sizes, if not the usual ones) and no place; any is right. They are few: other exams ask some of the same.
    """
    tasks: list[Task] = []

    def add(kind: str, count: float, make: Callable[[random.Random], Task]) -> None:
        rng = stream("held-out", f"{kind}:{seed}")
        made: dict[tuple[object, ...], Task] = {}
        while len(made) < max(1, round(count)):
            task = make(rng)
            made.setdefault((task.text, None if kind == "short" else task.scene), task)
        tasks.extend(made.values())

    for kind, share in (*_PROMPTS.items(), ("short", _SHORT)):
        add(kind, prompts * share / 100, lambda rng, kind=kind: _prompt(rng, kind))
    for kind in EDIT_KINDS:
        add(f"edit {kind}", prompts * _EDITS / 100 / len(EDIT_KINDS), lambda rng, kind=kind: _edit(rng, kind))
    for kind in PICKING_KINDS:
        count = prompts * _PICKS / 100 / len(PICKING_KINDS)
        add(f"pick {kind}", count, lambda rng, kind=kind: _pick(rng, kind))
    add("turn 2", prompts * _TURNS / 100, _second_turn)
    for pictures in (2, 3):
        add(f"fuse {pictures}", prompts * _FUSIONS / 200, lambda rng, pictures=pictures: _fusion(rng, pictures))
    for kind in QUESTION_KINDS:
        add(f"ask {kind}", prompts * _QUESTIONS / 100 / len(QUESTION_KINDS), lambda rng, kind=kind: _ask(rng, kind))
    return tasks


def _prompt(rng: random.Random, kind: str) -> DrawingTask:
    shapes = LETTERS + DIGITS if kind == "letter" else None
    numbers = _OBJECTS[kind]
    number = numbers[0] if len(numbers) == 1 else rng.choice(numbers)
    scene = split_scene(rng, "held-out", number, shapes=shapes, habitual=kind == "short")
    prompt = random_prompt(rng, scene, kind="short" if kind == "short" else "complete")
    return DrawingTask(kind, prompt.text, prompt.language, prompt.wanted, scene)


def _edit(rng: random.Random, kind: EditKind) -> DrawingTask:
    edit = random_edit(rng, "held-out", kind, complete=True)
    return _task(f"edit {kind}", edit)


def _pick(rng: random.Random, kind: EditKind) -> DrawingTask:
    """An edit of one of two objects; those of any kind are of any number."""
    edit = random_edit(rng, "held-out", kind, complete=True, start=lambda rng: split_scene(rng, "held-out", 2))
    return _task(f"pick {kind}", edit)


def _second_turn(rng: random.Random) -> DrawingTask:
    turns = random_turns(rng, "held-out")
    return _task("turn 2", turns.edit, turns.first.text)


def _task(kind: str, edit: Edit, first: str = "") -> DrawingTask:
    return DrawingTask(kind, edit.text, edit.language, edit.wanted, edit.after, (edit.before,), first=first)


def _fusion(rng: random.Random, pictures: int) -> DrawingTask:
    fusion = random_fusion(rng, "held-out", pictures)
    return DrawingTask(f"fuse {pictures}", fusion.text, fusion.language, fusion.wanted, fusion.after, fusion.inputs)


def _ask(rng: random.Random, kind: QuestionKind) -> QuestionTask:
    question = random_question(rng, "held-out", kind)
    return QuestionTask(f"ask {kind}", question.text, question.scene, question.answer)
