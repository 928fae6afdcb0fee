"""What a text asks for."""

from dataclasses import dataclass

from .scene import Background, Object, Scene
from .words import size_word


@dataclass(frozen=True)
class WantedObject:
    """An object that a text asked for; None where it left the choice open.

    size: "small", "" (the usual one) or "big".
    """

    shape: str | None = None
    colour: str | None = None
    place: str | None = None
    size: str | None = None

    @classmethod
    def whole(cls, item: Object, where: str) -> "WantedObject":
        """Everything about an object at a named place."""
        return cls(item.shape, item.colour, where, size_word(item.size, "en"))


@dataclass(frozen=True)
class Wanted:
    """What a text asked for; `background` is None where the text left it open."""

    objects: tuple[WantedObject, ...]
    background: Background | None = None

    @classmethod
    def whole(cls, scene: Scene) -> "Wanted":
        """Everything that a scene shows."""
        pairs = zip(scene.objects, scene.places, strict=True)
        return cls(tuple(WantedObject.whole(item, where) for item, where in pairs), scene.background)
