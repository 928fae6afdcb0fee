"""Hunyuan3Think: the model reasons about a prompt, rewrites it and chooses the picture's shape."""

from ..hunyuan3.text.template import Message
from ..hunyuan3.text.trace import recaption_body, think_body, tidy_trace
from ..hunyuan3.writing import TextRequest, choosing_ratio, thinking
from .compat import io, require_choice, schema
from .io_types import Conversation, HunyuanConversation, HunyuanModel, ModelHandle, PictureSet
from .png import note_in_png
from .progress import NodeProgress
from .writing import (
    conversation_after,
    cut_off,
    pictures_for,
    reading_inputs,
    sampling_inputs,
    sampling_options,
    used_by,
    write,
)

_TASKS = ["think_recaption", "recaption", "think", "img_ratio"]


class Hunyuan3Think(io.ComfyNode):
    """One text pass. Its text can be read, edited and used again; a new image seed does not run it again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3Think",
            display_name="Hunyuan3 Think",
            category="Hunyuan3",
            description=(
                "Lets the model think about the prompt, rewrite it as a full description and choose the picture's "
                "size. Connect trace, width and height to Hunyuan3 Conditioning."
            ),
            search_aliases=["hunyuan rewrite", "hunyuan recaption", "prompt enhancer"],
            inputs=[
                HunyuanModel.Input("model", tooltip="From the Hunyuan3 Loader."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, default="", tooltip="What is wanted."),
                io.Combo.Input(
                    "task",
                    options=_TASKS,
                    default="think_recaption",
                    optional=True,
                    tooltip=(
                        "Think and rewrite, only rewrite, only think, or (img_ratio) only choose the picture's shape. "
                        "The shape is chosen in each case."
                    ),
                ),
                *sampling_inputs(),
                *reading_inputs("As in Hunyuan3 Conditioning; use the same choice in both."),
            ],
            outputs=[
                io.String.Output("thinking", display_name="thinking", tooltip="What it thought."),
                io.String.Output("rewritten", display_name="rewritten prompt", tooltip="The full description."),
                io.String.Output("trace", display_name="trace", tooltip="All of it with tags, for the conditioning."),
                io.Int.Output("width", display_name="width", tooltip="Width of the shape that it chose."),
                io.Int.Output("height", display_name="height", tooltip="Height of the shape that it chose."),
                HunyuanConversation.Output(
                    "conversation_out", display_name="conversation", tooltip="With this turn added, for the next one."
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelHandle,
        prompt: str,
        task: str = "think_recaption",
        seed: int = 0,
        sampling: str = "checkpoint",
        temperature: float = 0.6,
        top_k: int = 1024,
        top_p: float = 0.95,
        repetition_penalty: float = 1.0,
        max_new_tokens: int = 0,
        images: PictureSet | None = None,
        conversation: Conversation | None = None,
        system_prompt: str = "auto",
        custom_system_prompt: str = "",
    ) -> io.NodeOutput:
        require_choice("task", task, _TASKS)
        folder = model.model.folder
        shown, earlier = pictures_for(model, images, conversation)
        request = TextRequest(
            prompt,
            shown.pictures,
            system_prompt=system_prompt,
            custom_system_prompt=custom_system_prompt,
            bot_task=task,
            history=earlier.messages,
        )
        only_ratio = task == "img_ratio"
        plan = choosing_ratio(folder) if only_ratio else thinking(folder, task, need_ratio=True)
        progress = NodeProgress(cls.hidden.unique_id, cls.hidden.extra_pnginfo)
        run = write(
            model,
            request,
            plan,
            progress,
            lambda run, _stage: "" if only_ratio else run.trace,
            sampling=sampling_options(sampling, temperature, top_k, top_p, repetition_penalty),
            seed=seed,
            max_new_tokens=max_new_tokens,
            posterior=shown.posterior,
        )
        trace = "" if only_ratio else tidy_trace(run.trace)
        size = run.resolution.size
        remark = cut_off(run, "the model ended its text early")
        if not remark and "recaption" in task and not recaption_body(trace):
            remark = " (the model wrote no rewritten prompt)"
        text = f"{trace}\n\n{size.width}x{size.height}{remark}".strip()
        progress.stream("done", text)
        progress.log(f"thought {len(run.ids)} tokens, {size.width}x{size.height}{remark}")
        note_in_png(cls.hidden.extra_pnginfo, cls.hidden.unique_id, used_by(model, run, seed, trace))
        said = [Message("user", prompt), *([Message("assistant", trace)] if trace else [])]
        later = conversation_after(model, earlier, shown, *said)
        return io.NodeOutput(
            think_body(trace), recaption_body(trace), trace, size.width, size.height, later, ui=progress.shown(text)
        )
