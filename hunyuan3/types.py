"""Small values that travel between the layers.

Positions are indices into a token sequence, spans are half open, sizes are pixels unless a name says otherwise.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class ImageSize(NamedTuple):
    """Height and width in pixels, in this order (as the checkpoint's own "HxW" strings)."""

    height: int
    width: int


class Grid(NamedTuple):
    """Height and width of an image in tokens."""

    height: int
    width: int


class Span(NamedTuple):
    """Positions `start <= i < stop` of a sequence."""

    start: int
    stop: int


@dataclass(frozen=True)
class ImageRun:
    """One run of `<img>` placeholders: the picture to draw, or one of the two faces of an input picture.

    `grid` covers the first `grid.height * grid.width` positions of `span`, row by row; a vision run may be longer
    (its padding patches), those positions count as ordinary text positions.
    """

    kind: Literal["gen", "vae", "vit"]
    span: Span
    grid: Grid


@dataclass(frozen=True)
class TokenSequence:
    """One row of model input: token ids and where everything lies in them.

    Attributes:
        ids: N token ids.
        text_spans: every text section in order, empty ones included, as the tokens they became.
        runs: every image run in sequence order (an input picture gives "vae" then "vit").
        joint_spans: per input picture, from its first VAE token to its last vision token, separator included.
        gen_timestep, guidance, timestep_r: position of that control token before the picture to draw, or None.
        cond_timesteps: position of the `<timestep>` token of each input picture.
    """

    ids: tuple[int, ...]
    text_spans: tuple[Span, ...]
    runs: tuple[ImageRun, ...]
    joint_spans: tuple[Span, ...] = ()
    gen_timestep: int | None = None
    guidance: int | None = None
    timestep_r: int | None = None
    cond_timesteps: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def spans(self, kind: str) -> tuple[Span, ...]:
        """Spans of the runs of one kind ("gen", "vae" or "vit"), in sequence order."""
        return tuple(run.span for run in self.runs if run.kind == kind)

    @property
    def gen_run(self) -> ImageRun:
        """The run of the picture to draw; AssertionError in a text-only sequence."""
        runs = [run for run in self.runs if run.kind == "gen"]
        assert len(runs) == 1, f"a drawing sequence holds one picture to draw, this one {len(runs)}"
        return runs[0]
