"""What the shipped workflows are asked where the trained tiny checkpoints stand in for the published ones.

For the pictures of them: screenshots in the README, thumbnails among ComfyUI's templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from tools.testbed import REPO
from tools.workflows import BASE, DISTIL, INSTRUCT
from training.draw import draw
from training.scene import Background, Object, Scene
from training.world import put

TRAINED = {
    BASE: REPO / "checkpoints" / "hunyuan3-tiny-instruct",  # there is no tiny base model
    INSTRUCT: REPO / "checkpoints" / "hunyuan3-tiny-instruct",
    DISTIL: REPO / "checkpoints" / "hunyuan3-tiny-distil",
}


@dataclass(frozen=True)
class Show:
    """Texts for the nodes of a workflow that take some, in the order of the nodes, and pictures for those that load."""

    texts: tuple[str, ...]
    pictures: tuple[Scene, ...] = ()
    thinks: bool = True  # before it rewrites; what the tiny ones think of pictures that they see is often wrong


def scene(background: str, *objects: Object) -> Scene:
    """Objects on a plain background, as large as the model's own square."""
    return Scene(128, 128, Background("plain", background), objects)


def at(where: str, shape: str, colour: str, size: int = 52) -> Object:
    """An object where training puts those of a named place in such a scene."""
    item = put(Random(0), shape, colour, size, where, 128, 128)
    assert item is not None, f"{size} pixels are too large for {where}"
    return item


_CIRCLE = scene("yellow", at("middle", "circle", "red"))
_FUSED = (
    scene("pink", at("middle", "heart", "purple", 68)),
    scene("yellow", at("middle", "square", "red")),
    scene("blue", at("middle", "ring", "black")),
)
_FUSION = "Draw the first shape in the second color on the third background."
_DRAWN = "a blue circle at the top left and a red heart at the bottom right on a white background"
SHOWS = {
    "text_to_image": Show((_DRAWN,)),
    "text_to_image_instruct": Show((_DRAWN,)),
    "text_to_image_base": Show((_DRAWN,)),
    "latent_to_latent": Show(("a blue star in the middle on a yellow background",)),
    "think_and_draw": Show(("a star",)),
    "think_and_draw_distil": Show(("a star",)),
    "edit_picture": Show(("Turn the red circle blue.",), (_CIRCLE,)),
    "edit_picture_distil": Show(("Turn the red circle blue.",), (_CIRCLE,)),
    "fuse_three": Show((_FUSION,), _FUSED, thinks=False),
    "fuse_three_distil": Show((_FUSION,), _FUSED, thinks=False),
    "ask_picture": Show(("What does it show?",), (_CIRCLE,)),
    "multi_turn_edit": Show(("a red circle on a yellow background", "Turn the red circle blue."), thinks=False),
}
_TEXTS = {"PrimitiveStringMultiline": "value", "Hunyuan3Conditioning": "prompt", "Hunyuan3Ask": "prompt"}
_WRITERS = ("Hunyuan3Think", "Hunyuan3Ask")
_MOST_TOKENS = 200


def asked(name: str, prompt: Mapping[str, Mapping[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """The inputs to set in a shipped workflow (API format), by node: {node id: {input: value}}.

    Writes the pictures that it loads into `folder`, ComfyUI's input folder.
    """
    show = SHOWS[name]
    texts, pictures = list(show.texts), list(show.pictures)
    changes: dict[str, dict[str, Any]] = {}
    for number, node in sorted(prompt.items(), key=lambda item: int(item[0])):
        kind = node["class_type"]
        given = changes.setdefault(number, {})
        if kind in _TEXTS and isinstance(node["inputs"][_TEXTS[kind]], str):
            given[_TEXTS[kind]] = texts.pop(0)
        if kind in _WRITERS:
            given["max_new_tokens"] = _MOST_TOKENS
        if kind == "Hunyuan3Think" and not show.thinks:
            given["task"] = "recaption"
        if kind == "LoadImage":
            file = f"{name}_{number}.png"
            draw(pictures.pop(0)).save(folder / file)
            given["image"] = file
    assert not texts, f"{name} has no node for {texts}"
    assert not pictures, f"{name} loads fewer pictures"
    return {number: given for number, given in changes.items() if given}
