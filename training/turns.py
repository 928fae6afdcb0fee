"""Conversations of two turns: a picture is asked for, then changed."""

import random
from dataclasses import dataclass

from .captions import Prompt, PromptKind, random_prompt
from .edits import Edit, EditKind, random_edit
from .scene import Scene
from .world import Split, is_habitual, split_scene

_KINDS: tuple[EditKind, ...] = ("recolour", "add", "move", "background")  # what a scene of one object allows


@dataclass(frozen=True)
class Turns:
    """`first` asks for the scene that `edit` changes, in the same language."""

    first: Prompt
    edit: Edit


def random_turns(rng: random.Random, split: Split) -> Turns:
    """Two turns whose scenes are of the split. The first names the place, or leaves the habitual one open."""
    edit = random_edit(rng, split, rng.choice(_KINDS), complete=True, start=lambda rng: _opening(rng, split))
    kind: PromptKind = rng.choice(("complete", "short")) if is_habitual(edit.before) else "complete"
    return Turns(random_prompt(rng, edit.before, edit.language, kind=kind), edit)


def _opening(rng: random.Random, split: Split) -> Scene:
    """What conversations begin with: one object on a plain background in a square, so that lessons have few lengths."""
    while True:
        scene = split_scene(rng, split, 1, habitual=rng.random() < 0.5)
        if scene.background.kind == "plain" and scene.width == scene.height:
            return scene
