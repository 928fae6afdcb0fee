"""What the nodes that write text share: their inputs, and one text pass with its progress."""

import logging
import time
from collections.abc import Callable

from ..hunyuan3.errors import RequestError
from ..hunyuan3.generate.sampling import SamplingOptions
from ..hunyuan3.generate.stages import StagePlan
from ..hunyuan3.placement.estimate import sampling_bytes
from ..hunyuan3.text.system_prompts import CHOICES
from ..hunyuan3.writing import TextRequest, WritingRun
from .compat import io, require_choice
from .io_types import Conversation, ModelHandle, PictureSet
from .memory import bring_to_device
from .progress import NodeProgress, check_cancelled

_log = logging.getLogger(__name__)
_INTERVAL = 0.1  # seconds between two updates of the text on the node

TRAINED_FOR = 3  # input pictures
SAMPLINGS = ("checkpoint", "greedy", "custom")
SYSTEM_PROMPTS = ["auto", *CHOICES]


def sampling_inputs() -> list[io.Input]:
    """Seed and sampling, alike on every node that writes."""
    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=True,
            tooltip="Decides the words. Keep it fixed: a new image seed then never thinks again.",
        ),
        io.Combo.Input(
            "sampling",
            options=list(SAMPLINGS),
            default="checkpoint",
            optional=True,
            tooltip="'checkpoint': its own settings. 'greedy': always the likeliest word. 'custom': the four below.",
        ),
        io.Float.Input(
            "temperature", default=0.6, min=0.01, max=5.0, step=0.05, optional=True, tooltip="For 'custom'."
        ),
        io.Int.Input("top_k", default=1024, min=0, max=100000, optional=True, tooltip="For 'custom'; 0: all."),
        io.Float.Input("top_p", default=0.95, min=0.01, max=1.0, step=0.01, optional=True, tooltip="For 'custom'."),
        io.Float.Input(
            "repetition_penalty", default=1.0, min=0.1, max=5.0, step=0.05, optional=True, tooltip="For 'custom'."
        ),
        io.Int.Input(
            "max_new_tokens",
            default=0,
            min=0,
            max=22800,
            optional=True,
            tooltip="Longest text in tokens; 0: the checkpoint's own default (2048).",
        ),
    ]


def sampling_options(
    sampling: str, temperature: float, top_k: int, top_p: float, repetition_penalty: float
) -> SamplingOptions | None:
    """The settings that the inputs ask for; None for the checkpoint's own."""
    require_choice("sampling", sampling, SAMPLINGS)
    if sampling == "checkpoint":
        return None
    if sampling == "greedy":
        return SamplingOptions(do_sample=False)
    return SamplingOptions(True, temperature, top_k, top_p, repetition_penalty)


def pictures_for(
    model: ModelHandle, images: PictureSet | None, conversation: Conversation | None
) -> tuple[PictureSet, Conversation]:
    """All input pictures of a request, those of the conversation first, and the conversation (an empty one for None).

    Raises RequestError for values that were made with another checkpoint.
    """
    fingerprint = model.model.folder.fingerprint
    for name, value in (("images", images), ("conversation", conversation)):
        if value is not None and value.checkpoint != fingerprint:
            raise RequestError(f"{name} was made with another checkpoint than {model.name}. Connect the same model.")
    images = images or PictureSet((), False, "fixed", fingerprint)
    conversation = conversation or Conversation((), (), fingerprint)
    count = len(conversation.pictures) + len(images.pictures)
    if count > TRAINED_FOR:
        _log.warning("Hunyuan Image 3: %d input pictures; the model was trained with up to %d.", count, TRAINED_FOR)
    together = PictureSet((*conversation.pictures, *images.pictures), images.align, images.posterior, fingerprint)
    return together, conversation


def write(
    model: ModelHandle,
    request: TextRequest,
    plan: StagePlan,
    progress: NodeProgress,
    show: Callable[[WritingRun, str], str],
    *,
    sampling: SamplingOptions | None,
    seed: int,
    max_new_tokens: int,
) -> WritingRun:
    """Runs one text pass on a node: weights, streaming text, Cancel between layers and tokens.

    `show(run, stage)` is the text to show so far.
    """
    core = model.model
    run = WritingRun(
        core.folder,
        core.placed_transformer.module,
        request,
        plan,
        sampling=sampling,
        seed=seed,
        max_new_tokens=max_new_tokens,
        prefixes=core.prefixes,
        check_cancelled=check_cancelled,
        device=core.options.device,
    )
    length = len(run.sequence.sequence) + (max_new_tokens or core.folder.generation.max_new_tokens)
    bring_to_device(model.transformer, sampling_bytes(core.folder.config, 1, length, core.options.dtype), progress)
    last = 0.0
    for step in run:
        check_cancelled()
        now = time.monotonic()
        if now - last >= _INTERVAL:
            last = now
            progress.stream(step.stage, show(run, step.stage))
    return run


def cut_off(run: WritingRun, at_end_of_text: str = "") -> str:
    """What to say of a pass that did not end by itself; "" if it did. `at_end_of_text`: where that is too early."""
    if run.finish == "length":
        return " (cut off by max_new_tokens: raise it for the whole text)"
    return f" ({at_end_of_text})" if run.finish == "end_of_text" and at_end_of_text else ""
