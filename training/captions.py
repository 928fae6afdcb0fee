"""Scenes -> what somebody might ask for: prompts, short and long, that may leave things open."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .scene import Object, Scene
from .wanted import Wanted, WantedObject
from .words import (
    COLOUR_WORDS,
    FORMAT_PHRASES,
    LANGUAGES,
    NUMBERS,
    PLACE_PHRASES,
    SHAPE_WORDS,
    Language,
    article,
    background_phrases,
    capital,
    size_word,
)
from .world import format_of, is_habitual, suited_format

PromptKind = Literal["complete", "open", "short"]

_CHINESE_SHARE = 0.3
_SAID: dict[PromptKind, dict[str, float]] = {  # how often a prompt says it
    "complete": {"colour": 1.0, "place": 1.0, "background": 0.5, "format": 0.2},
    "open": {"colour": 0.75, "place": 0.6, "background": 0.5, "format": 0.2},
    "short": {"colour": 1.0, "place": 0.0, "background": 0.0, "format": 0.0},
}


@dataclass(frozen=True)
class Prompt:
    """A request for a picture: the text, its language, and what it asks for; the rest it leaves open."""

    text: str
    language: Language
    wanted: Wanted


def random_language(rng: random.Random) -> Language:
    """Mostly English."""
    return LANGUAGES[rng.random() < _CHINESE_SHARE]


def random_prompt(
    rng: random.Random,
    scene: Scene,
    language: Language | None = None,
    *,
    kind: PromptKind = "open",
    habitual: bool = False,
) -> Prompt:
    """A prompt that the scene answers.

    kind: "complete" names every object's colour and place, "short" every colour and no place, "open" says either, or
    not. A background may be named or not, but by a short one. All name sizes that are worth a word; the format where
    that is not the one that suits the places, and at times where it is.
    habitual: leave places open only where they are the habitual ones (`world.HABITS`).
    """
    language = language or random_language(rng)
    words = _English(rng) if language == "en" else _Chinese(rng)
    sizes = [size_word(item.size, language) for item in scene.objects]
    silent = not habitual or is_habitual(scene)  # whether places may go unsaid
    says = _SAID[kind] if silent else {**_SAID[kind], "place": 1.0}
    plural = kind != "complete" and silent and len(scene.objects) > 1 and rng.random() < 0.4
    if kind == "short":
        plural = plural and len({item.colour for item in scene.objects}) == 1
    if plural and len({item.shape for item in scene.objects}) == 1 and not any(sizes):
        wanted, phrases = _several(words, scene)
    else:
        pairs = list(zip(scene.objects, scene.places, strict=True))
        wishes = [_wish(rng, item, where, says) for item, where in pairs]
        phrases = [words.object(*args) for args in zip(scene.objects, wishes, strict=True)]
        wanted = tuple(wishes)
    background = scene.background if rng.random() < says["background"] else None
    backdrop = None if background is None else rng.choice(background_phrases(background, language))
    format_name = format_of(scene)
    is_suited = format_name == suited_format(scene.places)
    named = None
    if not is_suited or rng.random() < says["format"]:
        named = FORMAT_PHRASES[language][format_name]
    return Prompt(words.sentence(phrases, backdrop, named), language, Wanted(wanted, background))


def _wish(rng: random.Random, item: Object, where: str, says: Mapping[str, float]) -> WantedObject:
    colour = item.colour if says["colour"] == 1 or rng.random() < says["colour"] else None
    place = where if says["place"] == 1 or rng.random() < says["place"] else None
    return WantedObject(item.shape, colour, place, size_word(item.size, "en"))


def _several(words: "_English | _Chinese", scene: Scene) -> tuple[tuple[WantedObject, ...], list[str]]:
    """Objects of one shape as a number of them, with the colour where it is the same."""
    colours = {item.colour for item in scene.objects}
    colour = colours.pop() if len(colours) == 1 else None
    shape = scene.objects[0].shape
    wanted = (WantedObject(shape, colour, size=""),) * len(scene.objects)
    return wanted, [words.several(len(scene.objects), colour, shape)]


class _English:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def object(self, item: Object, wish: WantedObject) -> str:
        size = [word] if (word := size_word(item.size, "en")) else []
        shape = SHAPE_WORDS["en"][item.shape]
        if wish.colour and self.rng.random() < 0.12:
            phrase = f"{article(' '.join([*size, shape]))} in {wish.colour}"
        else:
            phrase = article(" ".join([*size, *([wish.colour] if wish.colour else []), shape]))
        return phrase if wish.place is None else f"{phrase} {self.rng.choice(PLACE_PHRASES['en'][wish.place])}"

    def several(self, count: int, colour: str | None, shape: str) -> str:
        words = [NUMBERS["en"][count], *([colour] if colour else []), f"{SHAPE_WORDS['en'][shape]}s"]
        return " ".join(words)

    def sentence(self, phrases: list[str], background: str | None, named: str | None) -> str:
        choose = self.rng.choice
        if self.rng.random() < 0.3:
            return self._long(phrases, background, named)
        joined = _joined(phrases, choose((" and ", ", ")))
        behind = ""
        if background is not None:
            behind = choose((f" on {article(background)}", f", {background}", f", with {article(background)}"))
        if named is not None:
            opening = choose((f"{named} of ", f"{article(named)} of ", f"draw {article(named)} of ", f"{named}: "))
        else:
            opening = choose(("", "", "", "draw ", "draw ", "a picture of ", "please draw ", "paint ", "I want "))
        text = f"{opening}{joined}{behind}"
        return capital(text) + choose((".", "")) if self.rng.random() < 0.5 else text

    def _long(self, phrases: list[str], background: str | None, named: str | None) -> str:
        choose = self.rng.choice
        picture = named or "picture"
        parts = [
            choose(
                (
                    f"There is {_joined(phrases, ' and ')} in the {picture}.",
                    f"The {picture} shows {_joined(phrases, ' and ')}.",
                    f"I would like {article(picture)} with {_joined(phrases, ' and ')}.",
                    f"Please make {article(picture)} that shows {_joined(phrases, ' and also ')}.",
                )
            )
        ]
        if background is not None:
            backdrop = article(background)
            parts.append(choose((f"It has {backdrop}.", f"Behind it is {backdrop}.", f"Use {backdrop}.")))
        return " ".join(parts)


class _Chinese:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def object(self, item: Object, wish: WantedObject) -> str:
        size = size_word(item.size, "zh")
        colour = ""
        if wish.colour:
            colour = COLOUR_WORDS["zh"][wish.colour] + self.rng.choice(("", "的"))
        phrase = f"一个{size}{colour}{SHAPE_WORDS['zh'][item.shape]}"
        if wish.place is None:
            return phrase
        place = self.rng.choice(PLACE_PHRASES["zh"][wish.place])
        return self.rng.choice((f"{place}{phrase}", f"{place}有{phrase}", f"{phrase}在{place}"))

    def several(self, count: int, colour: str | None, shape: str) -> str:
        return f"{NUMBERS['zh'][count]}个{COLOUR_WORDS['zh'][colour] if colour else ''}{SHAPE_WORDS['zh'][shape]}"

    def sentence(self, phrases: list[str], background: str | None, named: str | None) -> str:
        choose = self.rng.choice
        joined = choose(("，", "和")).join(phrases)
        behind = ""
        if background is not None:
            behind = choose((f"，{background}", f"，{background}", f"，配{background}"))
        if named is not None:
            opening = choose((f"{named}：", f"画一个{named}，", f"{named}，"))
        elif any("有一" in phrase for phrase in phrases):
            opening = choose(("", "画一张图："))
        else:
            opening = choose(("", "", "画", "请画", "画面上有", "画一张图："))
        return f"{opening}{joined}{behind}{choose(('。', ''))}"


def _joined(phrases: list[str], last: str) -> str:
    return last.join((", ".join(phrases[:-1]), phrases[-1])) if len(phrases) > 1 else phrases[0]
