"""Fusion: the shape of one picture, the colour of another, the background of a third."""

import random
from dataclasses import dataclass, replace

from .captions import random_language
from .scene import Scene
from .wanted import Wanted
from .words import COLOUR_WORDS, SHAPE_WORDS, Language, article, background_phrases, description
from .world import Split, fits, is_held_out, split_scene


@dataclass(frozen=True)
class Fusion:
    """Two or three scenes of one format and one object each, the instruction, and the scene that should come of them.

    The result has the first scene's object, size and place; of two pictures it keeps the first one's background.
    """

    inputs: tuple[Scene, ...]
    after: Scene
    text: str
    language: Language

    @property
    def wanted(self) -> Wanted:
        """What the picture must show."""
        return Wanted.whole(self.after)

    @property
    def summary(self) -> str:
        """What comes from which picture, in a few words: the thought behind the fusion."""
        item = self.after.objects[0]
        shape, colour = SHAPE_WORDS[self.language][item.shape], COLOUR_WORDS[self.language][item.colour]
        background = background_phrases(self.after.background, self.language)[0] if len(self.inputs) == 3 else ""
        if self.language == "zh":
            behind = f"，第三张：{background}" if background else ""
            return f"第一张：{shape}，第二张：{colour}{behind}。"
        behind = f" Third picture: {article(background)}." if background else ""
        return f"First picture: {article(shape)}. Second picture: {colour}.{behind}"

    @property
    def rewrite(self) -> str:
        """The result in full."""
        return description(self.after, self.language)


def random_fusion(rng: random.Random, split: Split, pictures: int | None = None) -> Fusion:
    """A fusion of 2 or 3 pictures (None: either) whose result is a scene of the split."""
    count = pictures or rng.choice((2, 3))
    language = random_language(rng)
    while True:
        inputs = _alike(rng, count)
        after = inputs[0].with_object(0, colour=inputs[1].objects[0].colour)
        if count == 3:
            after = replace(after, background=inputs[2].background)
        if after != inputs[0] and fits(after) and is_held_out(after) == (split == "held-out"):
            return Fusion(inputs, after, _text(rng, count, language), language)


def _alike(rng: random.Random, count: int) -> tuple[Scene, ...]:
    """Scenes of one object each, of one format: rows of different geometries don't share a batch."""
    first = split_scene(rng, "train", 1)
    inputs = [first]
    while len(inputs) < count:
        scene = split_scene(rng, "train", 1)
        if (scene.height, scene.width) == (first.height, first.width):
            inputs.append(scene)
    return tuple(inputs)


def _text(rng: random.Random, count: int, language: Language) -> str:
    if language == "zh":
        behind = "，第三张的背景" if count == 3 else ""
        return rng.choice((f"第一张的形状，第二张的颜色{behind}。", f"用第一张的形状，第二张的颜色{behind}。"))
    if count == 3:
        return rng.choice(
            (
                "The shape of the first picture in the color of the second on the background of the third.",
                "Draw the first shape in the second color on the third background.",
            )
        )
    return rng.choice(
        ("The shape of the first picture in the color of the second.", "Draw the first shape in the second color.")
    )
