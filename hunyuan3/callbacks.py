"""What a long job asks of its caller: a word of progress, and leave to go on.

The loops of this package are generators, so the caller already owns the pace between steps. Inside one step there
are many layers; `CheckCancelled` is how the caller stops there. It raises whatever exception the host uses for
"stop" (ComfyUI: `InterruptProcessingException`); the core never catches it.
"""

from collections.abc import Callable

CheckCancelled = Callable[[], None]
"""Called between layers, tiles and tensors; returns to go on, raises to stop."""

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`: `stage` is a short name such as "load"; `done` counts from 0 to `total`."""


def never_cancelled() -> None:
    """The `CheckCancelled` of a caller that never stops."""


def no_progress(stage: str, done: int, total: int) -> None:
    """The `Progress` of a caller that does not look."""
