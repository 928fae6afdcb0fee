"""Hunyuan3Conditioning: what to draw."""

from ..hunyuan3.text.trace import task_of
from .compat import io, schema
from .io_types import (
    Conversation,
    HunyuanConditioning,
    HunyuanConversation,
    HunyuanImages,
    HunyuanModel,
    ModelHandle,
    PictureSet,
)
from .writing import SYSTEM_PROMPTS, pictures_for

_MAX_SIDE = 8192


class Hunyuan3Conditioning(io.ComfyNode):
    """Prompt, texts and size, laid out as the model reads them. Needs no weights, so mistakes show at once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3Conditioning",
            display_name="Hunyuan3 Conditioning",
            category="Hunyuan3",
            description="Says what to draw: the prompt, the picture's size, and the texts around the prompt.",
            search_aliases=["hunyuan prompt", "hunyuan text encode"],
            inputs=[
                HunyuanModel.Input("model", tooltip="From the Hunyuan3 Loader."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip=(
                        "What to draw, in English or Chinese. May be empty. Words that look like control tokens "
                        "(<img>, <think> ...) stay words."
                    ),
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=_MAX_SIDE,
                    step=16,
                    tooltip=(
                        "Width in pixels, a multiple of 16. Trained sizes have about a megapixel; Hunyuan3 Resolution "
                        "lists them."
                    ),
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=_MAX_SIDE,
                    step=16,
                    tooltip="Height in pixels, a multiple of 16.",
                ),
                io.Combo.Input(
                    "system_prompt",
                    options=SYSTEM_PROMPTS,
                    default="auto",
                    optional=True,
                    tooltip=(
                        "Instruction before the prompt, read from the checkpoint folder's system_prompt.py. 'auto': "
                        "the checkpoint's own default (base: none, Instruct: en_unified). 'custom': the text below."
                    ),
                ),
                io.String.Input(
                    "custom_system_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Your own system prompt, used when system_prompt is 'custom'. Empty: none.",
                ),
                io.String.Input(
                    "trace",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip=(
                        "Thinking or a rewritten prompt to draw from: <think>...</think><recaption>...</recaption>. "
                        "Text without tags counts as a rewritten prompt. Empty: draw from the prompt alone."
                    ),
                ),
                HunyuanImages.Input("images", optional=True, tooltip="From Hunyuan3 Image Conditioning."),
                HunyuanConversation.Input(
                    "conversation", optional=True, tooltip="Earlier turns; the prompt above is the next one."
                ),
            ],
            outputs=[
                HunyuanConditioning.Output("conditioning", display_name="conditioning", tooltip="For the sampler.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelHandle,
        prompt: str,
        width: int,
        height: int,
        system_prompt: str = "auto",
        custom_system_prompt: str = "",
        trace: str = "",
        images: PictureSet | None = None,
        conversation: Conversation | None = None,
    ) -> io.NodeOutput:
        # 0 would mean "the base size" to the core; in a node it is a mistake, and free() says so.
        resolution = model.model.folder.resolutions.free(height, width)
        shown, earlier = pictures_for(model, images, conversation)
        conditioning = model.model.conditioning(
            prompt,
            width=resolution.size.width,
            height=resolution.size.height,
            system_prompt=system_prompt,
            custom_system_prompt=custom_system_prompt,
            trace=trace,
            bot_task=task_of(trace),
            pictures=shown.pictures,
            posterior=shown.posterior,
            history=earlier.messages,
        )
        return io.NodeOutput(conditioning)
