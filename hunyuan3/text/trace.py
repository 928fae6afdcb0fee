"""The text that a model writes before it draws: `<think>..</think>`, `<recaption>..</recaption>` and loose words."""

from typing import NamedTuple

THINK = ("<think>", "</think>")
RECAPTION = ("<recaption>", "</recaption>")


class TracePart(NamedTuple):
    """One separately tokenised piece; a tag is kept in the unconditional branch, other text is replaced there."""

    text: str
    is_tag: bool


def is_complete(trace: str) -> bool:
    """Whether the trace holds a think or recaption pair, opened and closed."""
    return _pair(trace, THINK) is not None or _pair(trace, RECAPTION) is not None


def split_trace(trace: str, drop_think: bool = False) -> tuple[TracePart, ...]:
    """Tags, bodies and loose text in order; without the think pair if `drop_think`.

    As the reference does: text after a second closing tag of the same kind is lost. Empty loose text gives nothing,
    an empty body gives an empty part.
    """
    for tags in (THINK, RECAPTION):
        body = _pair(trace, tags)
        if body is None:
            continue
        opening, closing = tags
        inner = (TracePart(opening, True), TracePart(body, False), TracePart(closing, True))
        if drop_think and tags is THINK:
            inner = ()
        before = trace.split(opening)[0]
        after = trace.split(closing)[1]
        return (*split_trace(before, drop_think), *inner, *split_trace(after, drop_think))
    return (TracePart(trace, False),) if trace else ()


def close_trace(trace: str) -> str:
    """Adds the closing tags that a trace lacks, because the token budget ran out or a hand deleted them.

    The reference leaves it open, which wraps the whole text in answer tags and replaces even the tags in the
    unconditional branch: the picture then hardly follows it. A think tag inside a rewrite is one of its words.
    """
    thinking, rewrite, rest = trace.partition(RECAPTION[0])
    if rewrite and THINK[1] not in rest:
        if thinking.rfind(THINK[0]) > thinking.rfind(THINK[1]):
            thinking += THINK[1]
        return thinking + rewrite + rest + ("" if RECAPTION[1] in rest else RECAPTION[1])
    for opening, closing in (RECAPTION, THINK):
        if trace.rfind(opening) > trace.rfind(closing):
            return trace + closing
    return trace


def thinks(trace: str) -> bool:
    """Whether the trace holds a think part, which may be open at its end."""
    return _pair(trace, THINK) is not None or trace.lstrip().startswith(THINK[0])


def recaption_only(trace: str) -> str:
    """The recaption pair alone, "" where there is none (what the drop_think switch keeps of a trace that thinks)."""
    body = _pair(trace, RECAPTION)
    return "" if body is None else RECAPTION[0] + body + RECAPTION[1]


def task_of(trace: str) -> str:
    """The task that writes a trace like this: what a "dynamic" system prompt goes by. "image" for none."""
    thinks, rewrites = THINK[0] in trace, RECAPTION[0] in trace
    if thinks and rewrites:
        return "think_recaption"
    if thinks:
        return "think"
    return "recaption" if rewrites or trace.strip() else "image"


def think_body(trace: str) -> str:
    """What stands between the think tags, "" without them; up to the end if the tag was left open."""
    return _body(trace, THINK)


def recaption_body(trace: str) -> str:
    """What stands between the recaption tags, "" without them; up to the end if the tag was left open."""
    return _body(trace, RECAPTION)


def _body(trace: str, tags: tuple[str, str]) -> str:
    return trace.partition(tags[0])[2].partition(tags[1])[0].strip()


def _pair(trace: str, tags: tuple[str, str]) -> str | None:
    """The body between the first opening tag and the next closing tag, None without such a pair."""
    _, opened, rest = trace.partition(tags[0])
    body, closed, _ = rest.partition(tags[1])
    return body if opened and closed else None
