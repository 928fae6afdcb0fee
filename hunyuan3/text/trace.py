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


def tidy_trace(trace: str) -> str:
    """A trace that `split_trace` reads without losing a word: each kind of tag once, opened and closed.

    A tag left open is closed (the token budget ran out, a hand deleted it), where the other kind begins or at the end.
    A tag inside a body and a closing tag without its opening one are dropped, their words stay. A second body of the
    same kind joins the first. A trace that needs none of this comes back as it is.

    The reference reads such traces as they stand: an open tag has the whole text wrapped in answer tags and replaces
    even the tags in the unconditional branch (the picture then hardly follows it), words after a second closing tag are
    lost.
    """
    parts: list[tuple[tuple[str, str] | None, str]] = []  # (tags or None for loose words, text)
    while trace:
        at, tags = min(
            ((trace.find(kind[0]), kind) for kind in (THINK, RECAPTION) if kind[0] in trace), default=(-1, None)
        )
        if tags is None:
            parts.append((None, trace))
            break
        parts.append((None, trace[:at]))
        body = trace[at + len(tags[0]) :]
        other = RECAPTION if tags is THINK else THINK
        stop = next((mark for mark in (tags[1], other[0]) if mark in body), "")
        if stop == tags[1]:
            _, beyond, later = body.partition(stop)[0].partition(other[0])
            if beyond and tags[0] in later:  # what closes here was opened again, after the other kind
                stop = other[0]
        body, _, rest = body.partition(stop) if stop else (body, "", "")
        _join(parts, tags, body)
        trace = rest if stop == tags[1] else stop + rest
    return "".join(
        text if tags is None else tags[0] + text + tags[1]
        for tags, text in ((tags, _without_tags(text)) for tags, text in parts)
    )


def _join(parts: list[tuple[tuple[str, str] | None, str]], tags: tuple[str, str], body: str) -> None:
    """Adds a body, to the one of the same kind if there is one."""
    for index, (kind, text) in enumerate(parts):
        if kind is tags:
            parts[index] = (tags, f"{text}\n{body}")
            return
    parts.append((tags, body))


def _without_tags(text: str) -> str:
    before = None
    while text != before:  # what is left around a tag may be a tag
        before = text
        for tag in (*THINK, *RECAPTION):
            text = text.replace(tag, "")
    return text


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
