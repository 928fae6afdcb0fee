"""Recorded requests as this package's messages: what the reference was asked, without what it answered."""

import re
from typing import Any

from hunyuan3.config import GenerationConfig, ModelConfig
from hunyuan3.image.resolution import ResolutionTable
from hunyuan3.text.special_tokens import SpecialTokens
from hunyuan3.text.system_prompts import SystemPrompts
from hunyuan3.text.template import TEMPLATES, InputPicture, Message, OutputPicture, Section, request_messages
from hunyuan3.text.tokenizer import Tokenizer
from hunyuan3.types import Grid
from tests.core.golden_paths import checkpoint, component


class Checkpoint:
    """The text side of one tiny checkpoint."""

    def __init__(self, name: str) -> None:
        folder = checkpoint(name)
        assert folder is not None
        self.config = ModelConfig.from_folder(folder)
        self.generation = GenerationConfig.from_folder(folder)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.tokens = SpecialTokens.from_tokenizer(self.tokenizer, self.config)
        self.table = ResolutionTable.build(self.config.image_base_size, len(self.tokens.ratios))
        self.template = TEMPLATES[self.generation.sequence_template]
        self.prompts = SystemPrompts.from_folder(folder)

    def input_picture(self, file_name: str, vit_grid: Grid) -> InputPicture:
        """A recorded picture; its size is in its name, its vision grid comes from the recording."""
        width, height = map(int, re.search(r"(\d+)x(\d+)", file_name).groups())
        row = self.table.row(self.table.nearest(height, width))
        return InputPicture(row.ratio, row.grid, vit_grid, self.config.vision.max_num_patches)

    def output_picture(self, size: Any) -> OutputPicture:
        resolution = self.table.parse(size)
        return OutputPicture(resolution.ratio, resolution.grid)


def template_rows() -> list[dict[str, Any]]:
    """Rows of chat_templates that the reference could make and whose checkpoint is here."""
    rows = [row for row in component("chat_templates")["rows"] if not row.get("error")]
    return [row for row in rows if checkpoint(checkpoint_name(row)) is not None]


def checkpoint_name(row: dict[str, Any]) -> str:
    for prefix, name in (("pretrain_", "tiny-base"), ("distil_", "tiny-distil")):
        if row["name"].startswith(prefix):
            return name
    return "tiny-instruct"


def template_sections(row: dict[str, Any], at: Checkpoint) -> tuple[Section, ...]:
    asked = row["input"]
    recorded = [section for section in row["sections"][0] if section["type"] == "cond_joint_image"]
    vit_grids = iter([Grid(section["token_height"][1], section["token_width"][1]) for section in recorded])
    draw = at.output_picture(asked["image_size"]) if asked["mode"] == "gen_image" else None
    if "message_list" in asked:
        messages = []
        for message in asked["message_list"]:
            content = message["content"]
            for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if item["type"] == "text":
                    messages.append(Message(message["role"], item["text"]))
                else:
                    # The reference files pictures of a message list under the assistant.
                    messages.append(Message("assistant", at.input_picture(item["image"], next(vit_grids))))
        if draw is not None:
            messages.append(Message("assistant", draw))
    else:
        messages = request_messages(
            asked["prompt"],
            system=asked.get("system_prompt") or "",
            pictures=[at.input_picture(name, next(vit_grids)) for name in asked.get("images", [])],
            trace=asked.get("cot_text") or "",
            draw=draw,
        )
    drop_think = asked.get("drop_think", False)
    if draw is not None:
        return at.template.image_sections(messages, drop_think)
    return at.template.text_sections(messages, asked["bot_task"], at.config.image_base_size, drop_think)


def scenario_sections(recording: dict[str, Any], index: int, at: Checkpoint) -> tuple[Section, ...]:
    """Sections of stage `index` of a scenario, from what was asked and (for the trace) what the model had written."""
    call, stage = recording["call"], recording["stages"][index]
    drawing = stage["mode"] == "gen_image"
    task = call.get("bot_task", at.generation.bot_task)
    choice = call.get("use_system_prompt", at.generation.use_system_prompt)
    drop_think = recording["generation_config_overrides"].get("drop_think", at.generation.drop_think)
    system = at.prompts.for_request(choice, task, call.get("system_prompt"), reference=True)
    trace = call.get("cot_text") or ""
    if index and isinstance(recording["cot_text"], list):
        trace = recording["cot_text"][0]
        if drop_think and "think" in task and system:
            system = at.prompts.text("en_recaption")
    gen = {tuple(span) for span in stage["gen_image_slices"][0]}
    runs = [grid for span, grid in stage["rope_image_info"][0] if tuple(span) not in gen]
    vit_grids = [Grid(*grid) for grid in runs[1::2]]
    messages = request_messages(
        call["prompt"],
        system=system,
        pictures=[at.input_picture(name, grid) for name, grid in zip(recording["images"], vit_grids, strict=True)],
        trace=trace,
        draw=at.output_picture(stage["image_size"]) if drawing else None,
    )
    if drawing:
        return at.template.image_sections(messages, drop_think)
    return at.template.text_sections(messages, stage["bot_task"], at.config.image_base_size, drop_think)
