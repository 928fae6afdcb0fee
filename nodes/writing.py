"""What the nodes that write text share: their inputs, and one text pass with its progress."""

import logging
import time
from collections.abc import Callable
from typing import Any

from ..hunyuan3.errors import RequestError
from ..hunyuan3.generate.noise import reference_generators
from ..hunyuan3.generate.sampling import SamplingOptions
from ..hunyuan3.generate.stages import StagePlan
from ..hunyuan3.pictures import PosteriorMode
from ..hunyuan3.placement.estimate import activation_bytes, cache_bytes
from ..hunyuan3.text.system_prompts import CHOICES
from ..hunyuan3.text.template import Message
from ..hunyuan3.writing import TextRequest, WritingRun, text_rows
from .budget import Work
from .compat import io, require_choice
from .io_types import Conversation, HunyuanConversation, HunyuanImages, ModelHandle, PictureSet
from .memory import bring_to_device
from .out_of_memory import EVERYTHING_ELSE, smaller_weights, with_one_retry
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


def reading_inputs(about_system_prompt: str) -> list[io.Input]:
    """What a text is written about besides the prompt, alike on every node that writes."""
    return [
        HunyuanImages.Input("images", optional=True, tooltip="From Hunyuan3 Image Conditioning."),
        HunyuanConversation.Input("conversation", optional=True, tooltip="Earlier turns, to go on from."),
        io.Combo.Input(
            "system_prompt", options=SYSTEM_PROMPTS, default="auto", optional=True, tooltip=about_system_prompt
        ),
        io.String.Input(
            "custom_system_prompt",
            multiline=True,
            default="",
            optional=True,
            tooltip="Your own system prompt, used when system_prompt is 'custom'.",
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
    conversation = conversation or Conversation((), (), fingerprint)
    images = images or PictureSet((), False, conversation.posterior, fingerprint)
    count = len(conversation.pictures) + len(images.pictures)
    if count > TRAINED_FOR:
        _log.warning("Hunyuan Image 3: %d input pictures; the model was trained with up to %d.", count, TRAINED_FOR)
    together = PictureSet((*conversation.pictures, *images.pictures), images.align, images.posterior, fingerprint)
    return together, conversation


def conversation_after(model: ModelHandle, earlier: Conversation, shown: PictureSet, *said: Message) -> Conversation:
    """`earlier` with this turn: those pictures of `shown` that it has not yet, as the user's, then what was said."""
    pictures = [Message("user", picture.in_template()) for picture in shown.pictures[len(earlier.pictures) :]]
    messages = (*earlier.messages, *pictures, *said)
    return Conversation(messages, shown.pictures, model.model.folder.fingerprint, shown.posterior)


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
    posterior: PosteriorMode,
) -> WritingRun:
    """Runs one text pass on a node: weights, streaming text, Cancel between layers and tokens.

    `show(run, stage)` is the text to show so far. `posterior`: how the input pictures' latents are drawn; "reference"
    draws them from this pass's own seed. If memory runs out it is written anew, from the same seed the same text.
    """
    core = model.model
    device = core.options.device
    longest = max_new_tokens or core.folder.generation.max_new_tokens
    length = len(text_rows(core.folder, request, plan).sequence) + longest
    config, dtype = core.folder.config, core.options.dtype
    work = Work(activation_bytes(config, 1, length, dtype), cache_bytes(config, 1, length, dtype))

    def attempt(_plan: None) -> WritingRun:
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
            device=device,
            picture_generator=reference_generators(seed, 1, device)[0] if posterior == "reference" else None,
        )
        bring_to_device(model.transformer, work, progress, advice=smaller_weights(model))
        streams = core.placed_transformer.streams
        if streams is not None:
            streams.reset_statistics()
        last, started = 0.0, time.monotonic()
        for step in run:
            check_cancelled()
            now = time.monotonic()
            if now - last >= _INTERVAL:
                last = now
                progress.stream(step.stage, show(run, step.stage))
        if streams is not None and streams.statistics.tokens:
            progress.log(streams.statistics.text(time.monotonic() - started))
        return run

    return with_one_retry(
        "writing",
        attempt,
        None,
        lambda _plan, _error: (None, f"from the first word, {EVERYTHING_ELSE}"),
        parts=[model.transformer],
        expected=lambda _plan: work.total,
        advice=lambda _plan: [
            f"set a smaller max_new_tokens (it was {longest})",
            *(["use fewer input pictures"] if request.pictures else []),
            *smaller_weights(model),
        ],
        tell=progress.text,
    )


def used_by(model: ModelHandle, run: WritingRun, seed: int, text: str) -> dict[str, Any]:
    """What a text pass used and wrote, for the PNG file."""
    return {
        "seed": seed,
        "prompt": run.request.prompt,
        "text": text,
        "tokens": len(run.ids),
        "ended": run.finish,
        "checkpoint": model.name,
        "variant": model.model.folder.variant,
        "format": model.model.options.format,
    }


def cut_off(run: WritingRun, at_end_of_text: str = "") -> str:
    """What to say of a pass that did not end by itself; "" if it did. `at_end_of_text`: where that is too early."""
    if run.finish == "length":
        return " (cut off by max_new_tokens: raise it for the whole text)"
    return f" ({at_end_of_text})" if run.finish == "end_of_text" and at_end_of_text else ""
