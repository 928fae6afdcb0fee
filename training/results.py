"""What a candidate reached: one row per task and mode, averaged into tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .markdown import row_of
from .marks import Marks, mean

_DRAWN = ("count", "colour", "shape", "place", "all", "size", "background")


@dataclass(frozen=True)
class Result:
    """One task, done in one mode.

    Attributes:
        mode: "direct", "rewrite" or "think"; "answer" for a question.
        marks: of a picture, None for an answer.
        preserved: of an edit, the share of the rest that it left alone; else None.
        text: whether the rewrite, or the answer, says the right thing; None where none was written.
        ratio: whether the right shape of picture was chosen; None where that is not asked.
    """

    kind: str
    mode: str
    marks: Marks | None = None
    preserved: float | None = None
    text: bool | None = None
    ratio: bool | None = None

    @property
    def success(self) -> bool:
        """Whether it was done: of an answer the words, of a picture all objects, of an edit the background, too."""
        if self.marks is None:
            return bool(self.text)
        return bool(self.marks.all and (self.preserved is None or self.marks.background))


@dataclass(frozen=True)
class Results:
    """All results of an exam."""

    rows: tuple[Result, ...]

    @property
    def table(self) -> str:
        """Markdown: drawings, edits and fusions, answers; shares from 0 to 1, "-" for what does not apply."""
        drawn = self._lines(lambda row: row.marks is not None and row.preserved is None, self._drawing)
        edited = self._lines(lambda row: row.preserved is not None, self._edit)
        asked = self._lines(lambda row: row.mode == "answer", lambda rows: [mean(row.text for row in rows)])
        tables = (
            ("kind", "mode", "n", *_DRAWN, "rewrite", "ratio"),
            ("kind", "mode", "n", "success", "rest preserved", "rewrite"),
            ("kind", "mode", "n", "right"),
        )
        return "\n\n".join(
            "\n".join((row_of(heads), row_of(["---"] * len(heads)), *lines))
            for heads, lines in zip(tables, (drawn, edited, asked), strict=True)
            if lines
        )

    @property
    def last_line(self) -> str:
        """The four numbers that sum the exam up. Pictures count in direct mode."""
        drawn = [row for row in self.rows if row.marks and row.mode == "direct"]
        parts = {
            "one-object": [row.success for row in drawn if row.kind == "one"],
            "two-object": [row.success for row in drawn if row.kind == "two"],
            "edit": [row.success for row in drawn if row.kind.startswith("edit ")],
            "ask": [row.success for row in self.rows if row.mode == "answer"],
        }
        return "score: " + " ".join(f"{name} {_shown(mean(values))}" for name, values in parts.items())

    def _lines(
        self, wanted: Callable[[Result], bool], columns: Callable[[Sequence[Result]], Sequence[float | None]]
    ) -> list[str]:
        rows = [row for row in self.rows if wanted(row)]
        groups = dict.fromkeys((row.kind, row.mode) for row in rows)
        lines = []
        for kind, mode in groups:
            group = [row for row in rows if (row.kind, row.mode) == (kind, mode)]
            lines.append(row_of([kind, mode, str(len(group)), *map(_shown, columns(group))]))
        return lines

    @staticmethod
    def _drawing(rows: Sequence[Result]) -> list[float | None]:
        marks = [mean(getattr(row.marks, name) for row in rows) for name in _DRAWN]
        return [*marks, mean(row.text for row in rows), mean(row.ratio for row in rows)]

    @staticmethod
    def _edit(rows: Sequence[Result]) -> list[float | None]:
        return [mean(row.success for row in rows), mean(row.preserved for row in rows), mean(row.text for row in rows)]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
