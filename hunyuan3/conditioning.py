"""What to draw, as the network will read it: prompt, texts and size -> token rows. Needs no weights."""

from dataclasses import dataclass, replace

from .errors import RequestError
from .folder import ModelFolder
from .generate.rows import SequenceRows
from .image.resolution import Resolution
from .text.sequence import REFERENCE, SAFE, conditional_pair, full_attention_spans, rope_grids
from .text.template import OutputPicture, request_messages
from .text.trace import close_trace, is_complete
from .types import ImageSize


@dataclass(frozen=True)
class Conditioning:
    """One request, ready for the denoise loop: plain data, cheap to keep, bound to one checkpoint.

    size: of the picture. rows: conditional and, unless the model is distilled, unconditional sequence. system_prompt
    and trace: the texts as used. checkpoint: fingerprint of the folder it was made for.
    """

    size: ImageSize
    rows: SequenceRows
    prompt: str
    system_prompt: str
    trace: str
    checkpoint: str


def make_conditioning(
    folder: ModelFolder,
    prompt: str,
    resolution: Resolution,
    *,
    system_prompt: str = "auto",
    custom_system_prompt: str = "",
    trace: str = "",
    bot_task: str = "image",
    reference: bool = False,
) -> Conditioning:
    """Lays out a text-to-image request.

    Args:
        prompt: any text, the empty one included.
        resolution: the picture's size, from `folder.resolutions`.
        system_prompt: "auto" (the checkpoint's own default), "None", "dynamic", "en_vanilla", "en_recaption",
            "en_think_recaption", "en_unified" or "custom".
        custom_system_prompt: the text of "custom".
        trace: thinking or rewritten prompt to draw from, with its tags; a text without tags counts as a rewrite, a
            tag left open is closed. Empty for none.
        bot_task: what "dynamic" goes by.
        reference: reproduce the reference where this package knows better: control tokens in a prompt, open traces,
            the "dynamic" choice.

    Raises RequestError (too long, unknown choice) or CheckpointError (the folder lacks that system prompt).
    """
    if trace and not reference:
        trace = close_trace(trace)
        if not is_complete(trace):
            trace = f"<recaption>{trace}</recaption>"
    control_tokens = REFERENCE if reference else SAFE
    if system_prompt == "custom" and not reference:
        control_tokens = replace(control_tokens, system="text")  # the user's words, unlike the checkpoint's prompts
    choice = folder.generation.use_system_prompt if system_prompt == "auto" else system_prompt
    system = folder.system_prompts.for_request(choice, bot_task, custom_system_prompt, reference)
    picture = OutputPicture(grid=resolution.grid, ratio=resolution.ratio)
    messages = request_messages(prompt, system=system, trace=trace, draw=picture)
    sections = folder.template.image_sections(messages, drop_think=folder.generation.drop_think)
    limit = min(folder.generation.max_length, folder.config.max_position_embeddings)
    pair = conditional_pair(sections, folder.tokens, folder.tokenizer, control_tokens=control_tokens, max_length=limit)
    attention = folder.config.cond_token_attn_type
    rows = SequenceRows(
        branches=pair[:1] if folder.config.cfg_distilled else pair,
        full_spans=tuple(full_attention_spans(pair[0], attention)),
        grids=tuple(rope_grids(pair[0], attention)),
    )
    return Conditioning(resolution.size, rows, prompt, system, trace, folder.fingerprint)


def require_made_for(conditioning: Conditioning, folder: ModelFolder) -> None:
    """Raises RequestError if the conditioning was laid out for another checkpoint: its token ids would mean nothing."""
    if conditioning.checkpoint != folder.fingerprint:
        raise RequestError(
            f"This conditioning was made for another checkpoint than {folder.path.name}. "
            "Connect the same model to the conditioning and to the sampler."
        )
