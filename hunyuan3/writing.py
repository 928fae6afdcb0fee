"""Text stages of a request: think, rewrite, choose a ratio, answer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .callbacks import CheckCancelled, never_cancelled
from .conditioning import control_tokens, conversation, rows_of, system_text
from .folder import ModelFolder
from .generate.prefix import PrefixStore
from .generate.rows import SequenceRows
from .generate.sampling import SamplingOptions, TokenSampler
from .generate.stages import StagePlan, answer_plan, opening_tag, ratio_plan, trace_plan
from .generate.text import Finish, TextPass, TextStep
from .image.resolution import Resolution
from .pictures import EncodedPicture, show_pictures
from .text.sequence import build_sequence
from .text.template import Message
from .transformer.model import Hunyuan3Transformer


@dataclass(frozen=True)
class TextRequest:
    """What the model reads before it writes. The fields are those of `make_conditioning`."""

    prompt: str
    pictures: tuple[EncodedPicture, ...] = ()
    system_prompt: str = "auto"
    custom_system_prompt: str = ""
    trace: str = ""
    bot_task: str = "auto"
    history: tuple[Message, ...] = ()
    reference: bool = False


class WritingRun:
    """One text pass of a request. Iterating writes, a `TextStep` at a time; the results are there afterwards."""

    def __init__(
        self,
        folder: ModelFolder,
        transformer: Hunyuan3Transformer,
        request: TextRequest,
        plan: StagePlan,
        *,
        sampling: SamplingOptions | None = None,
        seed: int = 0,
        max_new_tokens: int = 0,
        picture_generator: torch.Generator | None = None,
        prefixes: PrefixStore | None = None,
        check_cancelled: CheckCancelled = never_cancelled,
        device: torch.device | None = None,
    ) -> None:
        """Args:
        plan: what to write, see generate.stages.
        sampling: None means the checkpoint's own defaults; likewise max_new_tokens 0.
        picture_generator: draws the input pictures' latents from the request's generator, as the reference does; None
            draws them in the fixed way.
        device: where the transformer will be, if its weights are not loaded yet.
        """
        self.folder = folder
        self.request = request
        self.plan = plan
        self.sequence = text_rows(folder, request, plan)
        shown = show_pictures(folder.config.vae, request.pictures, picture_generator)
        self._pass = TextPass(
            transformer,
            self.sequence.showing(shown),
            plan,
            TokenSampler(sampling or default_sampling(folder), seed, device or transformer.device),
            max_new_tokens=max_new_tokens or folder.generation.max_new_tokens,
            max_length=folder.max_length,
            prefixes=prefixes,
            check_cancelled=check_cancelled,
        )

    def __iter__(self) -> Iterator[TextStep]:
        return iter(self._pass)

    @property
    def ids(self) -> list[int]:
        """The tokens written so far, forced ones included."""
        return self._pass.ids

    @property
    def finish(self) -> Finish | None:
        """How the pass ended: "stop" as it should, "length" or "end_of_text" cut off; None while it runs."""
        return self._pass.finish

    @property
    def trace(self) -> str:
        """The text so far with its tags: what a drawing starts from. Without the tokens that lead to the ratio."""
        ids, tokens = self.ids, self.folder.tokens
        lead = self.plan.to_ratio
        if ids and ids[-1] in self.plan.ratios and not self.request.reference:
            ids = ids[:-1]  # also where it came in the middle of the text
        for at in range(len(ids)):
            if lead and tuple(ids[at : at + len(lead)]) == lead[: len(ids) - at]:
                ids = ids[:at]
                break
        for closing in (tokens.recaption_end, tokens.think_end):
            # As the reference: up to the first closing tag of what was asked for.
            if closing in self.plan.last_tags and closing in ids:
                ids = ids[: ids.index(closing) + 1]
                break
        return opening_tag(self.plan) + self.folder.tokenizer.decode(ids)

    @property
    def answer(self) -> str:
        """The text of an answer, without thinking and without control tokens; "" for none.

        A model that answers a request for a caption between rewrite tags has answered, too.
        """
        tokens = self.folder.tokens
        said = _without(self.ids, tokens.think, tokens.think_end)
        plain = self._words(_without(said, tokens.recaption, tokens.recaption_end))
        return plain or self._words(said)

    def _words(self, ids: list[int]) -> str:
        tokens = self.folder.tokens
        drop = {tokens.answer, tokens.answer_end, tokens.boi, tokens.eoi, tokens.size, tokens.img, *tokens.ratios}
        drop |= {tokens.think, tokens.think_end, tokens.recaption, tokens.recaption_end}
        return self.folder.tokenizer.decode([token for token in ids if token not in drop]).strip()

    @property
    def resolution(self) -> Resolution | None:
        """The size that the model chose; None if it was not asked to."""
        return None if self._pass.ratio is None else self.folder.resolutions.row(self._pass.ratio)


def thinking(folder: ModelFolder, task: str, *, need_ratio: bool, reference: bool = False) -> StagePlan:
    """The plan of a think, recaption or think_recaption task on this checkpoint."""
    return trace_plan(
        task,
        folder.tokens,
        instruct=folder.variant != "base",
        need_ratio=need_ratio,
        stop_at_end=not reference,
    )


def choosing_ratio(folder: ModelFolder) -> StagePlan:
    """The plan of a pass that only chooses the picture's shape."""
    return ratio_plan(folder.tokens)


def answering(folder: ModelFolder) -> StagePlan:
    """The plan of a pass that answers in words."""
    return answer_plan(folder.tokens)


def text_rows(folder: ModelFolder, request: TextRequest, plan: StagePlan) -> SequenceRows:
    """The one row that a text pass reads, up to where the model is to write on."""
    system = system_text(
        folder, request.system_prompt, request.custom_system_prompt, request.bot_task, request.reference
    )
    messages = conversation(request.prompt, system, request.pictures, request.trace, request.history)
    sections = folder.template.text_sections(
        messages, plan.opening, folder.config.image_base_size, drop_think=folder.generation.drop_think
    )
    sequence = build_sequence(
        sections,
        folder.tokens,
        folder.tokenizer,
        control_tokens=control_tokens(request.system_prompt, system, request.custom_system_prompt, request.reference),
        max_length=folder.max_length,
    )
    return rows_of(folder, (sequence,))


def default_sampling(folder: ModelFolder) -> SamplingOptions:
    """The checkpoint's own sampling settings."""
    own = folder.generation
    return SamplingOptions(own.do_sample, own.temperature, own.top_k, own.top_p, own.repetition_penalty)


def _without(ids: list[int], opening: int, closing: int) -> list[int]:
    """Tokens outside of such a pair, which may be open at the end."""
    kept, inside = [], False
    for token in ids:
        if token == opening:
            inside = True
        elif token == closing and inside:
            inside = False
        elif not inside:
            kept.append(token)
    return kept
