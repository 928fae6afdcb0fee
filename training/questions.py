"""Questions about a scene, and their answers."""

import random
from dataclasses import dataclass
from typing import Literal

from .captions import random_language
from .scene import BASIC_SHAPES, Object, Scene
from .words import COLOUR_WORDS, NUMBERS, PLACE_PHRASES, SHAPE_WORDS, Language, article, capital, description
from .world import Split, split_scene

QuestionKind = Literal["count", "colour", "place", "shape", "caption"]
QUESTION_KINDS: tuple[QuestionKind, ...] = ("count", "colour", "place", "shape", "caption")


@dataclass(frozen=True)
class Question:
    """A picture to look at, a text to answer, and the answer."""

    kind: QuestionKind
    scene: Scene
    text: str
    answer: str
    language: Language


def random_question(
    rng: random.Random, split: Split, kind: QuestionKind | None = None, *, several: bool = False
) -> Question:
    """A question about a scene of the split that has exactly one answer. Counts are balanced: one, two or three.

    several: mostly about scenes of two or three objects, where more has to be told apart.
    """
    kind = kind or rng.choice(QUESTION_KINDS)
    language = random_language(rng)
    if kind == "count":
        return _counting(rng, split, language)
    while True:
        scene = split_scene(rng, split, rng.choice((1, 2, 2, 3)) if several else None)
        made = _MAKERS[kind](rng, scene, language)
        if made is not None:
            return Question(kind, scene, *made, language)


def _counting(rng: random.Random, split: Split, language: Language) -> Question:
    """How many objects there are, or how many of one shape: either number is one, two or three equally often."""
    number, of_shape = rng.randint(1, 3), rng.random() < 0.5
    while True:
        shapes = rng.sample(BASIC_SHAPES, 2) if of_shape or rng.random() < 0.5 else None
        scene = split_scene(rng, split, rng.randint(number, 3) if of_shape else number, shapes=shapes)
        if not of_shape or sum(item.shape == shapes[0] for item in scene.objects) == number:
            break
    if language == "zh":
        text = f"有几个{SHAPE_WORDS['zh'][shapes[0]] if of_shape else '物体'}？"
        return Question("count", scene, text, f"{NUMBERS['zh'][number]}个。", language)
    text = f"How many {f'{shapes[0]}s' if of_shape else 'objects'} are there?"
    return Question("count", scene, text, f"{capital(NUMBERS['en'][number])}.", language)


def _colour(rng: random.Random, scene: Scene, language: Language) -> tuple[str, str] | None:
    item = _only_one(rng, scene)
    if item is None:
        return None
    answer = COLOUR_WORDS[language][item.colour]
    if language == "zh":
        return f"{SHAPE_WORDS['zh'][item.shape]}是什么颜色？", f"{answer}。"
    return f"What color is the {SHAPE_WORDS['en'][item.shape]}?", f"{capital(answer)}."


def _place(rng: random.Random, scene: Scene, language: Language) -> tuple[str, str] | None:
    item = _only_one(rng, scene)
    if item is None:
        return None
    where = scene.places[scene.objects.index(item)]
    answer = PLACE_PHRASES[language][where][0]
    if language == "zh":
        return f"{SHAPE_WORDS['zh'][item.shape]}在哪里？", f"{answer}。"
    return f"Where is the {SHAPE_WORDS['en'][item.shape]}?", f"{capital(answer)}."


def _shape(rng: random.Random, scene: Scene, language: Language) -> tuple[str, str]:
    index = rng.randrange(len(scene.objects))
    item, where = scene.objects[index], PLACE_PHRASES[language][scene.places[index]][0]
    colour, shape = COLOUR_WORDS[language][item.colour], SHAPE_WORDS[language][item.shape]
    if language == "zh":
        return f"{where}是什么？", f"{colour}{shape}。"
    return f"What is {where}?", f"{capital(article(f'{colour} {shape}'))}."


def _caption(rng: random.Random, scene: Scene, language: Language) -> tuple[str, str]:
    texts = ("描述这张图。", "图里有什么？") if language == "zh" else ("Describe the picture.", "What does it show?")
    return rng.choice(texts), description(scene.read(), language)


def _only_one(rng: random.Random, scene: Scene) -> Object | None:
    """An object whose shape no other has; None where there is none."""
    shapes = [item.shape for item in scene.objects]
    alone = [item for item in scene.objects if shapes.count(item.shape) == 1]
    return rng.choice(alone) if alone else None


_MAKERS = {"colour": _colour, "place": _place, "shape": _shape, "caption": _caption}
