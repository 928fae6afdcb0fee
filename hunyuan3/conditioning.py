"""What to draw, as the network will read it: prompt, texts and size -> token rows. Needs no weights."""

from dataclasses import dataclass, replace

from .errors import RequestError
from .folder import ModelFolder
from .generate.rows import SequenceRows
from .image.resolution import Resolution
from .pictures import EncodedPicture, PosteriorMode
from .text.sequence import REFERENCE, SAFE, ControlTokens, conditional_pair, full_attention_spans, rope_grids
from .text.template import InputPicture, Message, OutputPicture, request_messages
from .text.trace import is_complete, recaption_only, thinks, tidy_trace
from .types import ImageSize, TokenSequence


@dataclass(frozen=True)
class Conditioning:
    """One request, ready for the denoise loop: plain data, cheap to keep, bound to one checkpoint.

    size: of the picture. rows: conditional and, unless the model is distilled, unconditional sequence, their input
    pictures not filled in yet. pictures, posterior: the input pictures, and how their latents are drawn. system_prompt
    and trace: the texts as used. checkpoint: fingerprint of the folder it was made for.
    """

    size: ImageSize
    rows: SequenceRows
    prompt: str
    system_prompt: str
    trace: str
    checkpoint: str
    pictures: tuple[EncodedPicture, ...] = ()
    posterior: PosteriorMode = "fixed"


def make_conditioning(
    folder: ModelFolder,
    prompt: str,
    resolution: Resolution,
    *,
    pictures: tuple[EncodedPicture, ...] = (),
    posterior: PosteriorMode = "fixed",
    system_prompt: str = "auto",
    custom_system_prompt: str = "",
    trace: str = "",
    bot_task: str = "image",
    history: tuple[Message, ...] = (),
    system: str | None = None,
    reference: bool = False,
) -> Conditioning:
    """Lays out a request to draw.

    Args:
        prompt: any text, the empty one included.
        resolution: the picture's size, from `folder.resolutions`.
        pictures: input pictures, those of the history first. posterior: "fixed" or "reference" (see pictures.py).
        system_prompt: "auto" (the checkpoint's own default), "None", "dynamic", "en_vanilla", "en_recaption",
            "en_think_recaption", "en_unified" or "custom".
        custom_system_prompt: the text of "custom".
        trace: thinking or rewritten prompt to draw from, with its tags; a text without tags counts as a rewrite, a
            tag left open is closed. Empty for none.
        bot_task: what "dynamic" goes by.
        history: earlier turns of the conversation.
        system: the system prompt's very text, instead of a choice.
        reference: reproduce the reference where this package knows better: control tokens in a prompt, open traces,
            the "dynamic" choice.

    Raises RequestError (too long, unknown choice) or CheckpointError (the folder lacks that system prompt).
    """
    if resolution.grid.height * resolution.grid.width > folder.max_length:  # before so many tokens are laid out
        raise RequestError(
            f"A picture of {resolution.size.width}x{resolution.size.height} takes "
            f"{resolution.grid.height * resolution.grid.width} tokens, the limit is {folder.max_length}. "
            "Choose a smaller size."
        )
    given = system is not None
    if system is None:
        system = system_text(folder, system_prompt, custom_system_prompt, bot_task, reference)
    if not trace.strip():
        trace = ""
    if trace and not reference:
        trace = tidy_trace(trace)
        if not is_complete(trace):
            trace = f"<recaption>{trace}</recaption>"
        # A system prompt in the user's own words stays; the reference would replace it, too.
        trace, system = drawable(folder, trace, system, keep_system=given or system_prompt == "custom")
    messages = conversation(prompt, system, pictures, trace, history)
    messages = (*messages, Message("assistant", OutputPicture(grid=resolution.grid, ratio=resolution.ratio)))
    sections = folder.template.image_sections(messages, drop_think=folder.generation.drop_think)
    pair = conditional_pair(
        sections,
        folder.tokens,
        folder.tokenizer,
        control_tokens=control_tokens(system_prompt, system, custom_system_prompt, reference),
        max_length=folder.max_length,
    )
    rows = rows_of(folder, pair[:1] if folder.config.cfg_distilled else pair)
    return Conditioning(resolution.size, rows, prompt, system, trace, folder.fingerprint, pictures, posterior)


def system_text(folder: ModelFolder, choice: str, custom: str, bot_task: str, reference: bool = False) -> str:
    """The system prompt of a request, "" for none. "auto" is the checkpoint's own default."""
    choice = folder.generation.use_system_prompt if choice == "auto" else choice
    return folder.system_prompts.for_request(choice, bot_task, custom, reference)


def drawable(folder: ModelFolder, trace: str, system: str, keep_system: bool = False) -> tuple[str, str]:
    """(trace, system prompt) to draw with: under `drop_think` only the rewrite of a trace that thinks is kept.

    One that has no rewrite then gives none. The system prompt, if there is one, becomes the one for rewriting, as the
    reference does (unstripped), unless `keep_system`.
    """
    if not folder.generation.drop_think or not thinks(trace):
        return trace, system
    if system and not keep_system:
        system = folder.system_prompts.text("en_recaption")
    return recaption_only(trace), system


def control_tokens(choice: str, system: str, custom: str, reference: bool) -> ControlTokens:
    """Which control tokens each text of a request may hold. `custom`: the user's own text."""
    if reference:
        return REFERENCE
    # The user's words, unlike the checkpoint's own; "dynamic" passes them on, too.
    is_users = not choice.startswith("en_") and system == custom.strip()
    return replace(SAFE, system="text") if is_users else SAFE


def conversation(
    prompt: str, system: str, pictures: tuple[EncodedPicture, ...], trace: str, history: tuple[Message, ...]
) -> tuple[Message, ...]:
    """All messages so far: system text, earlier turns, then this turn's pictures, prompt and trace."""
    shown_before = sum(isinstance(message.content, InputPicture) for message in history)
    if shown_before > len(pictures):
        raise RequestError(
            f"The conversation shows {shown_before} pictures, but only {len(pictures)} are given; `pictures` must hold "
            "those of the history first, then this turn's."
        )
    if history and history[-1].role == "user" and isinstance(history[-1].content, str):
        prompt = f"\n{prompt}"  # nothing was answered: both texts stand in one turn
    fresh = [picture.in_template() for picture in pictures[shown_before:]]
    turn = request_messages(prompt, system=system if not history else "", pictures=fresh, trace=trace)
    opening = (Message("system", system),) if history and system else ()
    return (*opening, *history, *turn)


def rows_of(folder: ModelFolder, branches: tuple[TokenSequence, ...]) -> SequenceRows:
    """Rows with the geometry that this checkpoint's attention type gives them."""
    attention = folder.config.cond_token_attn_type
    return SequenceRows(
        branches=branches,
        full_spans=tuple(full_attention_spans(branches[0], attention)),
        grids=tuple(rope_grids(branches[0], attention)),
    )


def require_made_for(conditioning: Conditioning, folder: ModelFolder) -> None:
    """Raises RequestError if the conditioning was laid out for another checkpoint: its token ids would mean nothing."""
    if conditioning.checkpoint != folder.fingerprint:
        raise RequestError(
            f"This conditioning was made for another checkpoint than {folder.path.name}. "
            "Connect the same model to the conditioning and to the sampler."
        )
