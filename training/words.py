"""The words for what a scene shows, in English and Chinese."""

from typing import Literal

from .scene import BASIC_SHAPES, COLOURS, DIGITS, LETTERS, Background, Object, Scene
from .world import format_of

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

# Place -> where something is; the first is the one that descriptions and answers use.
PLACE_PHRASES: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "top left": ("at the top left", "in the top left corner", "in the upper left"),
        "top": ("at the top", "at the top center"),
        "top right": ("at the top right", "in the top right corner", "in the upper right"),
        "left": ("on the left", "on the left side"),
        "middle": ("in the middle", "in the center"),
        "right": ("on the right", "on the right side"),
        "bottom left": ("at the bottom left", "in the bottom left corner", "in the lower left"),
        "bottom": ("at the bottom", "at the bottom center"),
        "bottom right": ("at the bottom right", "in the bottom right corner", "in the lower right"),
    },
    "zh": {
        "top left": ("左上角", "左上方"),
        "top": ("上方", "顶部"),
        "top right": ("右上角", "右上方"),
        "left": ("左边", "左侧"),
        "middle": ("中间", "中央"),
        "right": ("右边", "右侧"),
        "bottom left": ("左下角", "左下方"),
        "bottom": ("下方", "底部"),
        "bottom right": ("右下角", "右下方"),
    },
}
COLOUR_WORDS: dict[Language, dict[str, str]] = {
    "en": {name: name for name in COLOURS},
    "zh": {
        "red": "红色",
        "green": "绿色",
        "blue": "蓝色",
        "yellow": "黄色",
        "orange": "橙色",
        "purple": "紫色",
        "pink": "粉色",
        "black": "黑色",
        "white": "白色",
    },
}
SHAPE_WORDS: dict[Language, dict[str, str]] = {
    "en": {
        **{name: name for name in BASIC_SHAPES},
        **{name: f"letter {name}" for name in LETTERS},
        **{name: f"digit {name}" for name in DIGITS},
    },
    "zh": {
        **dict(zip(BASIC_SHAPES, ("圆形", "正方形", "三角形", "五角星", "圆环", "爱心"), strict=True)),
        **{name: f"字母{name}" for name in LETTERS},
        **{name: f"数字{name}" for name in DIGITS},
    },
}
NUMBERS: dict[Language, tuple[str, ...]] = {
    "en": ("no", "one", "two", "three"),
    "zh": ("零", "一", "两", "三"),
}
FORMAT_PHRASES: dict[Language, dict[str, str]] = {
    "en": {
        "square": "square picture",
        "wide": "wide picture",
        "tall": "tall picture",
        "very wide": "very wide picture",
        "very tall": "very tall picture",
    },
    "zh": {
        "square": "方形画面",
        "wide": "宽画面",
        "tall": "高画面",
        "very wide": "超宽画面",
        "very tall": "超高画面",
    },
}

_BACKGROUNDS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "plain": ("plain {0} background", "{0} background"),
        "striped": ("{0} and {1} striped background", "striped {0} and {1} background"),
        "checked": ("{0} and {1} checked background", "checked {0} and {1} background"),
        "dotted": ("{0} background with {1} dots",),
        "gradient": ("{0} to {1} gradient background", "background that fades from {0} to {1}"),
    },
    "zh": {
        "plain": ("纯{0}背景", "{0}背景", "{0}的背景"),
        "striped": ("{0}和{1}条纹背景", "{0}和{1}的条纹背景"),
        "checked": ("{0}和{1}格子背景", "{0}和{1}的格子背景"),
        "dotted": ("{0}背景带{1}圆点",),
        "gradient": ("从{0}到{1}的渐变背景", "{0}到{1}渐变背景"),
    },
}
_SMALL, _BIG = 46, 60  # pixels: below the one an object is called small, from the other on big


def article(words: str) -> str:
    """English words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def capital(text: str) -> str:
    """The text with its first letter upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


def size_word(size: float, language: Language) -> str:
    """How large an object of `size` pixels is called; "" for a size that is not worth a word."""
    if _SMALL <= size < _BIG:
        return ""
    return {"en": ("small", "big"), "zh": ("小的", "大的")}[language][size >= _BIG]


def named(item: Object, language: Language) -> str:
    """An object with size and colour, without an article."""
    words = (size_word(item.size, language), COLOUR_WORDS[language][item.colour], SHAPE_WORDS[language][item.shape])
    return (" " if language == "en" else "").join(word for word in words if word)


def background_phrases(background: Background, language: Language) -> tuple[str, ...]:
    """Ways to name a background, without an article; the first is the one that descriptions use."""
    colours = COLOUR_WORDS[language]
    names = (colours[background.colour], colours[background.second or background.colour])
    return tuple(phrase.format(*names) for phrase in _BACKGROUNDS[language][background.kind])


def object_phrase(item: Object, where: str, language: Language) -> str:
    """An object with size, colour and place, as descriptions have it."""
    place = PLACE_PHRASES[language][where][0]
    if language == "en":
        return f"{article(named(item, language))} {place}"
    return f"{place}一个{named(item, language)}"


def description(scene: Scene, language: Language) -> str:
    """Everything there is to a scene, always in the same words: the format unless square, objects, background."""
    format_name = format_of(scene)
    shape = "" if format_name == "square" else FORMAT_PHRASES[language][format_name]
    pairs = zip(scene.objects, scene.places, strict=True)
    objects = [object_phrase(item, where, language) for item, where in pairs]
    background = background_phrases(scene.background, language)[0]
    if language == "en":
        return capital(", ".join([f"{shape}: {objects[0]}" if shape else objects[0], *objects[1:], background])) + "."
    return "，".join([f"{shape}：{objects[0]}" if shape else objects[0], *objects[1:], background]) + "。"
