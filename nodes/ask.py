"""Hunyuan3Ask and Hunyuan3Continue: text answers, and pictures that join a conversation."""

from ..hunyuan3.errors import RequestError
from ..hunyuan3.text.template import Message
from ..hunyuan3.writing import TextRequest, answering
from .compat import io, schema
from .io_types import (
    Conversation,
    HunyuanConversation,
    HunyuanImages,
    HunyuanModel,
    ModelHandle,
    PictureSet,
)
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


class Hunyuan3Ask(io.ComfyNode):
    """A question, with or without pictures, answered in text."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3Ask",
            display_name="Hunyuan3 Ask",
            category="Hunyuan3",
            description="Asks the model: about pictures, for a caption, or anything else. The answer is text.",
            search_aliases=["hunyuan caption", "hunyuan vqa", "hunyuan chat", "describe image"],
            inputs=[
                HunyuanModel.Input("model", tooltip="From the Hunyuan3 Loader (Instruct or Instruct-Distil)."),
                io.String.Input("prompt", multiline=True, default="", tooltip="The question."),
                *sampling_inputs(),
                *reading_inputs("Instruction before the conversation; 'auto': the checkpoint's own default."),
            ],
            outputs=[
                io.String.Output("answer", display_name="answer", tooltip="The answer."),
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
        shown, earlier = pictures_for(model, images, conversation)
        request = TextRequest(
            prompt,
            shown.pictures,
            system_prompt=system_prompt,
            custom_system_prompt=custom_system_prompt,
            history=earlier.messages,
        )
        progress = NodeProgress(cls.hidden.unique_id, cls.hidden.extra_pnginfo)
        run = write(
            model,
            request,
            answering(model.model.folder),
            progress,
            lambda run, _stage: run.answer,
            sampling=sampling_options(sampling, temperature, top_k, top_p, repetition_penalty),
            seed=seed,
            max_new_tokens=max_new_tokens,
            posterior=shown.posterior,
        )
        answer = run.answer
        remark = cut_off(run) or ("" if answer else " (the model gave no answer)")
        shown_text = f"{answer}{remark}".strip()
        progress.stream("done", shown_text)
        progress.log(f"answered in {len(run.ids)} tokens{remark}")
        note_in_png(cls.hidden.extra_pnginfo, cls.hidden.unique_id, used_by(model, run, seed, answer))
        later = conversation_after(model, earlier, shown, Message("user", prompt), Message("assistant", answer))
        return io.NodeOutput(answer, later, ui=progress.shown(shown_text))


class Hunyuan3Continue(io.ComfyNode):
    """Adds a drawn picture to a conversation, so that the next turn can speak of it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3Continue",
            display_name="Hunyuan3 Continue",
            category="Hunyuan3",
            description=(
                "Adds the picture that was drawn to the conversation as the model's turn. Encode it with Hunyuan3 "
                "Image Conditioning first; then think, ask or draw on from the conversation."
            ),
            search_aliases=["hunyuan multi-turn", "hunyuan conversation"],
            inputs=[
                HunyuanModel.Input("model", tooltip="From the Hunyuan3 Loader."),
                HunyuanConversation.Input("conversation", tooltip="From Hunyuan3 Think or Ask."),
                HunyuanImages.Input("images", tooltip="The drawn picture, from Hunyuan3 Image Conditioning."),
            ],
            outputs=[
                HunyuanConversation.Output(
                    "conversation_out", display_name="conversation", tooltip="For the next turn."
                )
            ],
        )

    @classmethod
    def execute(cls, model: ModelHandle, conversation: Conversation, images: PictureSet) -> io.NodeOutput:
        if not images.pictures:
            raise RequestError("images holds no picture; connect the drawn one through Hunyuan3 Image Conditioning.")
        shown, earlier = pictures_for(model, images, conversation)
        drawn = [Message("assistant", picture.in_template()) for picture in images.pictures]
        later = (*earlier.messages, *drawn)
        return io.NodeOutput(Conversation(later, shown.pictures, images.checkpoint, images.posterior))
