"""Chat templates: messages -> ordered sections, each of which is tokenised on its own.

Byte pair encoding never merges across a section's border, so the cut is part of the format: joining `"User: "` with the
prompt before encoding gives other ids than the model was trained on. Affixes are sections even where they are empty.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, TypeAlias

from ..errors import RequestError
from ..types import Grid
from .trace import RECAPTION, THINK, is_complete, split_trace

Role = Literal["system", "user", "assistant"]
TextTask = Literal["auto", "image", "think", "recaption", "img_ratio"]
TextSource = Literal["template", "system", "prompt", "trace"]


@dataclass(frozen=True)
class InputPicture:
    """An input picture as the sequence sees it.

    Attributes:
        ratio: row of the resolution table it was fitted to.
        vae_grid: its latent grid.
        vit_grid: its vision patches, `vit_grid.height * vit_grid.width <= vit_tokens`.
        vit_tokens: length of its vision run, padding patches included (always the processor's `max_num_patches`).
    """

    ratio: int
    vae_grid: Grid
    vit_grid: Grid
    vit_tokens: int

    def __post_init__(self) -> None:
        assert 0 < self.vit_grid.height * self.vit_grid.width <= self.vit_tokens
        assert self.vae_grid.height * self.vae_grid.width > 0


@dataclass(frozen=True)
class OutputPicture:
    """The picture to draw: row of the resolution table for its ratio token, and its latent grid."""

    ratio: int
    grid: Grid


@dataclass(frozen=True)
class TextSection:
    """Text that is tokenised on its own.

    Attributes:
        text: the words; may be empty.
        replaceable: whether the unconditional branch has `<cfg>` in place of each of its tokens (affixes included).
        source: who wrote it; decides which control tokens may be recognised in it. "template" is ours: all.
        affixes: template text encoded with it, before and after (the answer tags around an assistant's plain text).
    """

    text: str
    replaceable: bool = False
    source: TextSource = "template"
    affixes: tuple[str, str] = ("", "")


Section: TypeAlias = TextSection | InputPicture | OutputPicture


@dataclass(frozen=True)
class Message:
    """One turn's text or picture. The role counts for pictures too: an input picture belongs to the user.

    (The reference files pictures of a message list under the assistant; give that role to reproduce it.)
    """

    role: Role
    content: str | InputPicture | OutputPicture

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant"):
            raise RequestError(f"a message has the role {self.role!r}; use system, user or assistant")
        if isinstance(self.content, OutputPicture) and self.role != "assistant":
            raise RequestError(f"the picture to draw is the assistant's, not the {self.role}'s")


@dataclass(frozen=True)
class Template:
    """Affixes of one `sequence_template`: (before, after) a run of messages of one role, and around an answer."""

    roles: Mapping[str, tuple[str, str]]
    answer: tuple[str, str]

    def image_sections(self, messages: Iterable[Message], drop_think: bool = False) -> tuple[Section, ...]:
        """Sections of a whole conversation; `messages` end with the assistant's OutputPicture when it is to draw.

        `drop_think` leaves the think part out of assistant texts.
        """
        sections: list[Section] = []
        for role, run in groupby(messages, key=lambda message: message.role):
            prefix, suffix = self.roles[role]
            sections.append(TextSection(prefix))
            for message in run:
                sections += self._message_sections(message, drop_think)
            sections.append(TextSection(suffix))
        return tuple(sections)

    def text_sections(
        self, messages: Sequence[Message], task: TextTask, base_size: int, drop_think: bool = False
    ) -> tuple[Section, ...]:
        """Sections up to the point where the model is to write on.

        The last section opens the assistant's turn and, depending on the task, a tag (`base_size` is the number in the
        `<img_size_N>` token before the ratio). If the assistant spoke last its turn is continued instead.
        """
        sections = list(self.image_sections(messages, drop_think))
        start = self.roles["assistant"][0]
        if messages and messages[-1].role == "assistant":
            sections.pop()
            start = ""
        match task:
            case "auto":
                final = start
            case "image":
                final = ""
            case "think":
                final = start + THINK[0]
            case "recaption":
                final = start + RECAPTION[0]
            case "img_ratio":
                final = f"{start}{self.answer[0]}<boi><img_size_{base_size}>"
            case _:
                raise RequestError(f"text task {task!r} does not exist; use auto, image, think, recaption or img_ratio")
        return (*sections, TextSection(final))

    def _message_sections(self, message: Message, drop_think: bool) -> list[Section]:
        content = message.content
        if isinstance(content, InputPicture):
            return [content]
        if isinstance(content, OutputPicture):
            return [TextSection(self.answer[0]), content, TextSection(self.answer[1])]
        if message.role == "system":
            return [TextSection(content, source="system")]
        if message.role == "user":
            return [TextSection(content, replaceable=True, source="prompt")]
        if not is_complete(content):
            return [TextSection(content, replaceable=True, source="trace", affixes=self.answer)]
        return [
            TextSection(part.text) if part.is_tag else TextSection(part.text, replaceable=True, source="trace")
            for part in split_trace(content, drop_think)
        ]


TEMPLATES: Mapping[str, Template] = {
    "pretrain": Template(roles={"system": ("", ""), "user": ("", ""), "assistant": ("", "")}, answer=("", "")),
    "instruct": Template(
        roles={"system": ("", "\n\n"), "user": ("User: ", "\n\n"), "assistant": ("Assistant: ", "\n\n")},
        answer=("<answer>", "</answer>"),
    ),
}


def request_messages(
    prompt: str,
    *,
    system: str = "",
    pictures: Iterable[InputPicture] = (),
    trace: str = "",
    draw: OutputPicture | None = None,
) -> tuple[Message, ...]:
    """Messages of a single request: system text, input pictures, prompt, what the model wrote, the picture to draw.

    An empty `system` or `trace` gives no message; an empty prompt does (it is a legal one).
    """
    messages = [Message("system", system)] if system else []
    messages += [Message("user", picture) for picture in pictures]
    messages.append(Message("user", prompt))
    if trace:
        messages.append(Message("assistant", trace))
    if draw is not None:
        messages.append(Message("assistant", draw))
    return tuple(messages)
