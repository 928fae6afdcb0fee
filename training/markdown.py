"""Tables in Markdown."""

from collections.abc import Iterable


def row_of(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
