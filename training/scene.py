"""A scene: what a picture of the small world shows, as data."""

from dataclasses import dataclass, replace

PLACES = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
BASIC_SHAPES = ("circle", "square", "triangle", "star", "ring", "heart")
LETTERS = tuple("ABCDEFGHIJKLMNPQRSTUVWXYZ")  # no O: here that is a ring
DIGITS = tuple("0123456789")
SHAPES = BASIC_SHAPES + LETTERS + DIGITS
COLOURS = {
    "red": (216, 24, 36),
    "green": (24, 150, 62),
    "blue": (24, 100, 230),
    "yellow": (252, 230, 50),
    "orange": (250, 136, 12),
    "purple": (124, 24, 140),
    "pink": (250, 150, 200),
    "black": (18, 18, 20),
    "white": (250, 250, 248),
}
BACKGROUND_KINDS = ("plain", "striped", "checked", "dotted", "gradient")


@dataclass(frozen=True)
class Object:
    """One shape.

    Attributes:
        shape: one of SHAPES.
        colour: a key of COLOURS.
        x, y: the centre of its bounding box, in pixels from the left and the top.
        size: the longer side of its bounding box in pixels, even.
    """

    shape: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """A square around it: left, top, right, bottom in pixels, the ends exclusive."""
        half = self.size // 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Background:
    """What is behind the objects. `second` is None if, and only if, the kind is "plain".

    Stripes are vertical; a gradient runs from `colour` at the top to `second` at the bottom; dots of `second` lie on
    `colour`.
    """

    kind: str
    colour: str
    second: str | None = None


@dataclass(frozen=True)
class Scene:
    """A picture of `width` by `height` pixels with one to three objects that do not touch."""

    width: int
    height: int
    background: Background
    objects: tuple[Object, ...]

    @property
    def places(self) -> tuple[str, ...]:
        """The name of each object's place."""
        return tuple(place(item.x, item.y, self.width, self.height) for item in self.objects)

    def read(self) -> "Scene":
        """The scene with its objects in reading order, which can be seen; the order that they were made in cannot."""
        placed = sorted(zip(self.places, self.objects, strict=True), key=lambda pair: row_and_column(pair[0]))
        return replace(self, objects=tuple(item for _, item in placed))

    def with_object(self, index: int, **changes: str | int) -> "Scene":
        """The scene with one object changed; nothing is checked."""
        objects = list(self.objects)
        objects[index] = replace(objects[index], **changes)
        return replace(self, objects=tuple(objects))


def place(x: float, y: float, width: int, height: int) -> str:
    """The name of the third of the picture, across and down, in which a point lies."""
    column = min(max(int(x * 3 / width), 0), 2)
    row = min(max(int(y * 3 / height), 0), 2)
    return PLACES[row][column]


def row_and_column(name: str) -> tuple[int, int]:
    """The row and the column, 0 to 2, of a place's name. Raises StopIteration for any other word."""
    return next((row, names.index(name)) for row, names in enumerate(PLACES) if name in names)
