"""What happens when memory runs out in the middle of the work: one retry with a smaller plan, then a clear error."""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import comfy.model_management as mm
import torch

from ..hunyuan3.errors import OutOfBudgetError
from ..hunyuan3.placement.out_of_memory import (
    asked_bytes,
    asked_device,
    is_out_of_host_memory,
    is_out_of_memory,
    let_go,
)

if TYPE_CHECKING:
    from .io_types import ModelHandle
    from .memory import PartPatcher

_log = logging.getLogger(__name__)

EVERYTHING_ELSE = "with everything else evicted"

_HOST = torch.device("cpu")
_Plan = TypeVar("_Plan")
_Result = TypeVar("_Result")


def with_one_retry(
    stage: str,
    attempt: Callable[[_Plan], _Result],
    plan: _Plan,
    smaller: Callable[[_Plan, Exception], tuple[_Plan, str]],
    *,
    parts: "Sequence[PartPatcher]",
    expected: Callable[[_Plan], int],
    advice: Callable[[_Plan], Sequence[str]],
    tell: Callable[[str], None],
) -> _Result:
    """`attempt(plan)`; if memory runs out, once more with a smaller plan and everything else evicted.

    Args:
        stage: what is being done, to go on "while": "drawing".
        attempt: starts from the beginning each time and leaves nothing behind when it fails.
        smaller: the plan to try next, and in words what is tried; may be the same plan, when evicting is all there is.
        parts: networks that the work needs; they stay, but for the prompts that they keep.
        expected: bytes that a plan was estimated to need, for the message where the error tells no number.
        advice: which settings would make a plan need less, those that were tried in vain left out.
        tell: shows the user a line of text.

    Raises OutOfBudgetError if memory runs out again. Every other error, Cancel among them, passes through.
    """
    how = ""
    for again in (False, True):
        try:
            return attempt(plan)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            host = is_out_of_host_memory(error)
            shortage = _shortage(asked_bytes(error), expected(plan), _HOST if host else _where(error, parts))
            if not again:
                plan, how = smaller(plan, error)
            let_go(error)
        # Only here, when the error is gone, are the tensors of the failed attempt.
        if not again:
            text = f"out of memory while {stage}; trying once more, {how}"
            _log.warning("Hunyuan Image 3: %s. %s", text, shortage)
            tell(text)
            mm.throw_exception_if_processing_interrupted()
            _make_room(parts, host)
    gc.collect()
    mm.soft_empty_cache()
    ways = [*advice(plan), "close other programs that use this memory"]
    raise OutOfBudgetError(f"Out of memory while {stage}, also at the second try ({how}). {shortage} {_one_of(ways)}")


def smaller_weights(model: "ModelHandle") -> list[str]:
    """What to set in the loader for a smaller transformer; nothing if it is the smallest already."""
    formats = {"bf16": "int8 or int4", "int4": ""}.get(model.model.options.format, "int4")
    return [f"set format to {formats} in Hunyuan3 Loader (it is {model.model.options.format})"] if formats else []


def smaller_vae(model: "ModelHandle") -> list[str]:
    """What to set in the loader for a VAE that works in half the bytes; nothing if it does, or where that is slow."""
    options = model.model.options
    if options.vae_dtype != torch.float32 or mm.is_device_cpu(options.device):
        return []
    return ["set vae_dtype to float16 in Hunyuan3 Loader (it is float32)"]


def _make_room(parts: "Sequence[PartPatcher]", host: bool) -> None:
    """Evicts everything but these parts from their device and gives up the prompts that they keep.

    `host`: it is the host's memory that ran out. Then our other weights are dropped, to be read again from the files
    when needed, and nothing is moved there from a card.
    """
    parts = [patcher for part in parts for patcher in (part, *part.beside)]
    for part in parts:
        part.give_up_kept()
    gc.collect()
    if host:
        for model in mm.loaded_models():
            if hasattr(model, "drop") and model not in parts:
                model.drop()
    for device in {part.load_device for part in parts}:
        if not host or mm.is_device_cpu(device):
            keep = [loaded for loaded in mm.current_loaded_models if loaded.model in parts]
            with parts[0].budget.own_turns():
                mm.free_memory(1e30, device, keep_loaded=keep)
    mm.soft_empty_cache()


def _where(error: Exception, parts: "Sequence[PartPatcher]") -> torch.device:
    """The device whose memory ran out, as far as the error tells; else the home of the parts."""
    index = asked_device(error)
    found = [device for part in parts for device in part.placed.devices if device.index == index is not None]
    return found[0] if found else parts[0].load_device


def _shortage(asked: int | None, expected: int, device: torch.device) -> str:
    """What was asked for and what was free, as a sentence. Called before anything of the failed attempt is freed."""
    free = mm.get_free_memory(device)
    where = "of the host's memory" if mm.is_device_cpu(device) else f"on {device}"
    if asked is None:
        return f"The work needs about {_amount(expected)} (estimated); {_amount(free)} were free {where}."
    return f"{_amount(asked)} more were asked for; {_amount(free)} were free {where}."


def _one_of(ways: Sequence[str]) -> str:
    if len(ways) == 1:
        return f"To make it fit, {ways[0]}."
    return f"To make it fit, {', '.join(ways[:-1])}, or {ways[-1]}."


def _amount(nbytes: float) -> str:
    gib = max(nbytes, 0) / 2**30
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.2f} MiB"
