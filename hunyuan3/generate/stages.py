"""The stages of a text pass as data: think -> recaption -> answer and size -> ratio (spec 4.8).

A task says which token triggers which forced tokens, which tokens end the pass, and where the choice is restricted to
the ratio tokens. Each trigger fires once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..errors import RequestError
from ..text.special_tokens import SpecialTokens
from ..text.template import TextTask
from ..text.trace import RECAPTION, THINK

Task = Literal["think", "recaption", "think_recaption"]
TASKS: tuple[Task, ...] = ("think_recaption", "recaption", "think")


@dataclass(frozen=True)
class StagePlan:
    """One text pass.

    opening: the task whose tag ends the prompt ("think", "recaption"; "auto" and "img_ratio" open nothing).
    forced: after this token, these follow without being sampled.
    stops: these end the pass.
    stage_after: name of the stage that a token begins.
    ratios: when the last token is `ratio_after`, only these may follow, and the most likely one is taken.
    closing: stage -> tokens that close it properly where the pass is cut off; `to_ratio` leads on to the ratio.
    last_tags: tags that end the trace.
    end_of_text: token that ends the pass early, None where it does not.
    """

    opening: TextTask
    first_stage: str
    forced: Mapping[int, tuple[int, ...]]
    stops: frozenset[int]
    stage_after: Mapping[int, str]
    ratio_after: int | None = None
    ratios: tuple[int, ...] = ()
    to_ratio: tuple[int, ...] = ()
    closing: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    last_tags: tuple[int, ...] = ()
    end_of_text: int | None = None


def trace_plan(task: Task, tokens: SpecialTokens, *, instruct: bool, need_ratio: bool, stop_at_end: bool) -> StagePlan:
    """The pass that thinks, rewrites, and chooses the ratio if the size is automatic.

    instruct: whether the template wraps answers in tags. stop_at_end: whether end-of-text ends the pass (the reference
    runs on).
    """
    if task not in TASKS:
        raise RequestError(f"task is {task!r}; it must be one of {', '.join(TASKS)}.")
    rewrites = "recaption" in task
    forced: dict[int, tuple[int, ...]] = {}
    if task == "think_recaption":
        forced[tokens.think_end] = (tokens.recaption,)
    to_ratio = (*((tokens.answer,) if instruct else ()), tokens.boi, tokens.size)
    last = tokens.recaption_end if rewrites else tokens.think_end
    stops = {tokens.recaption_end} if rewrites else {tokens.think_end, tokens.recaption_end}
    if need_ratio:
        forced[last] = to_ratio
        stops = set(tokens.ratios)
    return StagePlan(
        opening="recaption" if task == "recaption" else "think",
        first_stage="recaption" if task == "recaption" else "think",
        forced=forced,
        stops=frozenset(stops),
        stage_after={tokens.recaption: "recaption", tokens.size: "ratio"},
        ratio_after=tokens.size if need_ratio else None,
        ratios=tokens.ratios if need_ratio else (),
        to_ratio=to_ratio if need_ratio else (),
        last_tags=(last,),
        closing={"think": (tokens.think_end,), "recaption": (tokens.recaption_end,)},
        end_of_text=tokens.eos if stop_at_end else None,
    )


def ratio_plan(tokens: SpecialTokens) -> StagePlan:
    """The pass of one token that only chooses the ratio."""
    return StagePlan(
        opening="img_ratio",
        first_stage="ratio",
        forced={},
        stops=frozenset(tokens.ratios),
        stage_after={},
        ratio_after=tokens.size,
        ratios=tokens.ratios,
    )


def answer_plan(tokens: SpecialTokens) -> StagePlan:
    """The pass that answers in words: until end-of-text, the end of an answer, or the start of a picture."""
    return StagePlan(
        opening="auto",
        first_stage="answer",
        forced={},
        stops=frozenset((tokens.answer_end, tokens.boi)),
        stage_after={tokens.think: "think", tokens.recaption: "recaption", tokens.answer: "answer"},
        end_of_text=tokens.eos,
    )


def opening_tag(plan: StagePlan) -> str:
    """The tag that the prompt of this pass ends in, and that its text therefore begins with."""
    return {"think": THINK[0], "recaption": RECAPTION[0]}.get(plan.opening, "")
