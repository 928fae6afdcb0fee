"""System prompts: which one a request gets, and its words from the checkpoint folder.

The words live in `system_prompt.py`, remote code next to the weights. They are checkpoint data: the module's string
constants are read from its syntax tree, the file is never imported or executed and its texts are never shipped here.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, RequestError

CHOICES = ("None", "dynamic", "en_vanilla", "en_recaption", "en_think_recaption", "en_unified", "custom")


@dataclass(frozen=True)
class SystemPrompts:
    """The folder's prompts by choice ("en_vanilla" ...), unstripped; `texts` is empty where the folder has no file.

    present: whether the file was there when the folder was opened.
    """

    source: Path
    texts: Mapping[str, str] = field(default_factory=dict)
    present: bool = False

    @classmethod
    def from_folder(cls, folder: Path) -> "SystemPrompts":
        """Reads `folder/system_prompt.py`, which may be absent. Raises CheckpointError if it does not parse."""
        path = folder / "system_prompt.py"
        if not path.is_file():
            return cls(path)
        try:
            constants = _string_constants(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise CheckpointError(f"{path} is not valid Python ({error}). Download this file again.") from error
        return cls(path, {choice: constants[name] for choice, name in _CONSTANTS.items() if name in constants}, True)

    def text(self, choice: str) -> str:
        """The folder's own prompt, exactly as written there. Raises CheckpointError if the folder lacks it."""
        if choice not in self.texts:
            found = f"has no text '{_CONSTANTS[choice]}'" if self.present else f"is missing ({self.source})"
            raise CheckpointError(
                f"system prompt '{choice}': {self.source.name} {found}. "
                "Choose 'None', or 'custom' with your own text, or complete the checkpoint folder."
            )
        return self.texts[choice]

    def select(self, choice: str, bot_task: str, custom_text: str | None = None, reference: bool = False) -> str | None:
        """The prompt of a request before stripping; None for none.

        "dynamic" goes by the task: image, recaption and think have a prompt each. The reference forgets
        think_recaption there and falls back to the caller's text, usually nothing; that is reproduced with `reference`
        and otherwise mended (en_think_recaption, the prompt written for it). Other tasks get the caller's text.

        Raises RequestError for an unknown choice, CheckpointError for a prompt that the folder lacks.
        """
        if choice not in CHOICES:
            raise RequestError(f"system prompt {choice!r} does not exist; choose one of {', '.join(CHOICES)}")
        if choice == "None":
            return None
        if choice == "custom":
            return custom_text
        if choice != "dynamic":
            return self.text(choice)
        if bot_task == "image":
            return self.text("en_vanilla").strip("\n")
        by_task = {"recaption": "en_recaption", "think": "en_think_recaption"}
        if not reference:
            by_task["think_recaption"] = "en_think_recaption"
        return self.text(by_task[bot_task]) if bot_task in by_task else custom_text

    def for_request(self, choice: str, bot_task: str, custom_text: str | None = None, reference: bool = False) -> str:
        """`select`, stripped of surrounding whitespace as the newer `generate_image` does; "" for none.

        The base release's own code did not strip (two tokens more); after dropping a think part the newer code goes on
        with the unstripped `text("en_recaption")`.
        """
        return (self.select(choice, bot_task, custom_text, reference) or "").strip()


def _string_constants(source: bytes) -> dict[str, str]:
    """Module-level `name = "literal"` assignments, the last one winning, as when the file runs."""
    constants: dict[str, str] = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        value = statement.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            constants |= {target.id: value.value for target in targets if isinstance(target, ast.Name)}
    return constants


_CONSTANTS = {
    "en_vanilla": "t2i_system_prompt_en_vanilla",
    "en_recaption": "t2i_system_prompt_en_recaption",
    "en_think_recaption": "t2i_system_prompt_en_think_recaption",
    "en_unified": "unified_system_prompt_en",
}
