"""Prompts -> what a model should write before it draws: the thought, and the rewrite that decides what is open."""

from .captions import Prompt
from .scene import Object, Scene
from .wanted import WantedObject
from .words import (
    COLOUR_WORDS,
    FORMAT_PHRASES,
    NUMBERS,
    SHAPE_WORDS,
    Language,
    background_phrases,
    capital,
    description,
)
from .world import format_of

_BARE_PLACES = {  # shorter than the phrases: a thought is notes
    "top left": "左上",
    "top": "上",
    "top right": "右上",
    "left": "左",
    "middle": "中",
    "right": "右",
    "bottom left": "左下",
    "bottom": "下",
    "bottom right": "右下",
}


def rewrite(scene: Scene, language: Language) -> str:
    """The full description that decides everything: colours, sizes, places, background, format."""
    return description(scene, language)


def thought(prompt: Prompt, scene: Scene) -> str:
    """Notes in the prompt's language: each object's colour and place, the background, the format, and who decided.

    `scene` answers the prompt, its objects in the prompt's order.
    """
    language = prompt.language
    pairs = zip(scene.objects, scene.places, prompt.wanted.objects, strict=True)
    lines = [_object_line(item, where, wish, language) for item, where, wish in pairs]
    background = background_phrases(scene.background, language)[0]
    asked = prompt.wanted.background is not None
    count = NUMBERS[language][len(scene.objects)]
    named = FORMAT_PHRASES[language][format_of(scene)]
    if language == "en":
        noun = "object" if len(scene.objects) == 1 else "objects"
        backdrop = f"{capital(background)} {_mark(asked, language)}."
        return " ".join([f"{capital(count)} {noun}.", *lines, backdrop, f"{capital(named)}."])
    return "".join([f"{count}个物体。", *lines, f"{background}{_mark(asked, language)}。", f"{named}。"])


def _object_line(item: Object, where: str, wish: WantedObject, language: Language) -> str:
    shape, colour = SHAPE_WORDS[language][item.shape], COLOUR_WORDS[language][item.colour]
    colour_mark, place_mark = _mark(wish.colour is not None, language), _mark(wish.place is not None, language)
    if language == "en":
        return f"{capital(shape)}: {colour} {colour_mark}, {where} {place_mark}."
    return f"{shape}：{colour}{colour_mark}，{_BARE_PLACES[where]}{place_mark}。"


def _mark(asked: bool, language: Language) -> str:
    if language == "en":
        return "(asked)" if asked else "(my choice)"
    return "" if asked else "（自定）"  # characters are tokens here: what goes without saying is not said
