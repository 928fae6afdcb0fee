"""Edits: a scene, an instruction, and the scene that should come of it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from .captions import random_language
from .scene import COLOURS, PLACES, Object, Scene
from .wanted import Wanted
from .words import (
    COLOUR_WORDS,
    PLACE_PHRASES,
    SHAPE_WORDS,
    Language,
    article,
    background_phrases,
    capital,
    description,
    named,
)
from .world import Split, fits, is_held_out, put, random_background, random_object, split_scene, stands_out

EditKind = Literal["recolour", "add", "remove", "move", "background"]
EDIT_KINDS: tuple[EditKind, ...] = ("recolour", "add", "remove", "move", "background")
PICKING_KINDS: tuple[EditKind, ...] = ("recolour", "remove", "move")  # their words pick one of the objects


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        before, after: scenes of one size.
        text: the instruction.
        summary: what changes, in a few words: the thought behind the edit.
        wanted: what the picture must show afterwards.
        changed: the objects concerned, as they were and as they are.
    """

    kind: EditKind
    before: Scene
    after: Scene
    text: str
    summary: str
    language: Language
    wanted: Wanted
    changed: tuple[Object, ...]

    @property
    def rewrite(self) -> str:
        """The result in full, the objects in reading order."""
        return description(self.after.read(), self.language)


def random_edit(
    rng: random.Random,
    split: Split,
    kind: EditKind | None = None,
    *,
    complete: bool = False,
    start: Callable[[random.Random], Scene] | None = None,
) -> Edit:
    """An edit whose result is a scene of the split, and whose scene before is one, too.

    `complete`: one that leaves nothing open; otherwise something may be added without a word of where.
    `start`: makes scenes before the edit that the kind can change, where not any will do.
    """
    kind = kind or rng.choice(EDIT_KINDS)
    while True:
        before = start(rng) if start else split_scene(rng, split)
        edit = _MAKERS[kind](rng, before, random_language(rng))
        if edit is None or (complete and edit.wanted != Wanted.whole(edit.after)):
            continue
        if fits(edit.after) and is_held_out(edit.after) == (split == "held-out"):
            return edit


def _recolour(rng: random.Random, scene: Scene, language: Language) -> Edit | None:
    index = rng.randrange(len(scene.objects))
    item = scene.objects[index]
    colours = [name for name in COLOURS if name != item.colour and stands_out(name, scene.background)]
    subject = _subject(rng, scene, index, language)
    if subject is None or not colours:
        return None
    colour = rng.choice(colours)
    after = scene.with_object(index, colour=colour)
    word = COLOUR_WORDS[language][colour]
    if language == "en":
        text = rng.choice((f"make the {subject} {word}", f"turn the {subject} {word}", f"color the {subject} {word}"))
        summary = f"The {subject} becomes {word}."
    else:
        text = rng.choice((f"把{subject}变成{word}", f"把{subject}改成{word}"))
        summary = f"{subject}变成{word}。"
    return _edit("recolour", scene, after, _ended(rng, text, language), summary, language, (item, after.objects[index]))


def _add(rng: random.Random, scene: Scene, language: Language) -> Edit | None:
    if len(scene.objects) > 2:
        return None
    item = random_object(rng, len(scene.objects) + 1, scene.width, scene.height)
    if item is None:
        return None
    after = replace(scene, objects=(*scene.objects, item))
    where = after.places[-1]
    if where in scene.places:
        return None
    placed = rng.random() < 0.7
    thing, place = named(item, language), rng.choice(PLACE_PHRASES[language][where])
    if language == "en":
        thing = article(thing)
        text = f"{rng.choice(('add', 'put', 'also draw'))} {thing}" + (f" {place}" if placed else "")
        summary = f"{capital(thing)} is added {PLACE_PHRASES['en'][where][0]}."
    else:
        text = (f"在{place}" if placed else "") + rng.choice(("加", "添加")) + f"一个{thing}"
        summary = f"{PLACE_PHRASES['zh'][where][0]}加一个{thing}。"
    wanted = Wanted.whole(after)
    if not placed:
        wanted = replace(wanted, objects=(*wanted.objects[:-1], replace(wanted.objects[-1], place=None)))
    return Edit("add", scene, after, _ended(rng, text, language), summary, language, wanted, (item,))


def _remove(rng: random.Random, scene: Scene, language: Language) -> Edit | None:
    if len(scene.objects) < 2:
        return None
    index = rng.randrange(len(scene.objects))
    item = scene.objects[index]
    subject = _subject(rng, scene, index, language)
    if subject is None:
        return None
    after = replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])
    if language == "en":
        text = rng.choice((f"remove the {subject}", f"take the {subject} away", f"delete the {subject}"))
        summary = f"The {subject} goes."
    else:
        text = rng.choice((f"去掉{subject}", f"删除{subject}", f"把{subject}去掉"))
        summary = f"{subject}去掉。"
    return _edit("remove", scene, after, _ended(rng, text, language), summary, language, (item,))


def _move(rng: random.Random, scene: Scene, language: Language) -> Edit | None:
    index = rng.randrange(len(scene.objects))
    item = scene.objects[index]
    subject = _subject(rng, scene, index, language)
    where = rng.choice([name for row in PLACES for name in row if name not in scene.places])
    moved = put(rng, item.shape, item.colour, item.size, where, scene.width, scene.height)
    if subject is None or moved is None:
        return None
    after = scene.with_object(index, x=moved.x, y=moved.y)
    place = rng.choice(PLACE_PHRASES[language][where])
    if language == "en":
        to = place.replace("at the", "to the").replace("in the", "to the").replace("on the", "to the")
        text = f"{rng.choice(('move', 'shift'))} the {subject} {to}"
        summary = f"The {subject} moves: {where}."
    else:
        text = rng.choice((f"把{subject}移到{place}", f"把{subject}放到{place}"))
        summary = f"{subject}移到{PLACE_PHRASES['zh'][where][0]}。"
    return _edit("move", scene, after, _ended(rng, text, language), summary, language, (item, after.objects[index]))


def _background(rng: random.Random, scene: Scene, language: Language) -> Edit | None:
    background = random_background(rng)
    if background == scene.background:
        return None
    after = replace(scene, background=background)
    phrase = rng.choice(background_phrases(background, language))
    if language == "en":
        opening = rng.choice(("change the background to", "use", "give it"))
        text = f"{opening} {article(phrase)}"
        summary = f"New background: {background_phrases(background, 'en')[0]}."
    else:
        text = rng.choice((f"换成{phrase}", f"把背景换成{phrase}"))
        summary = f"背景换成{background_phrases(background, 'zh')[0]}。"
    return _edit("background", scene, after, _ended(rng, text, language), summary, language, ())


_MAKERS = {"recolour": _recolour, "add": _add, "remove": _remove, "move": _move, "background": _background}


def _edit(
    kind: EditKind,
    before: Scene,
    after: Scene,
    text: str,
    summary: str,
    language: Language,
    changed: tuple[Object, ...],
) -> Edit:
    return Edit(kind, before, after, text, summary, language, Wanted.whole(after), changed)


def _subject(rng: random.Random, scene: Scene, index: int, language: Language) -> str | None:
    """Words that mean this object and no other of the scene; None if shape and colour do not tell it."""
    item = scene.objects[index]
    shape = SHAPE_WORDS[language][item.shape]
    alike = [other for other in scene.objects if other.shape == item.shape]
    if len(alike) == 1 and rng.random() < 0.6:
        return shape
    if sum(other.colour == item.colour for other in alike) > 1:
        return None
    colour = COLOUR_WORDS[language][item.colour]
    return f"{colour} {shape}" if language == "en" else f"{colour}{shape}"


def _ended(rng: random.Random, text: str, language: Language) -> str:
    if language == "zh":
        return text + rng.choice(("。", ""))
    return capital(text) + "." if rng.random() < 0.6 else text
