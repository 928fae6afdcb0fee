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
from .progress import NodeProgress
from .writing import SYSTEM_PROMPTS, cut_off, pictures_for, sampling_inputs, sampling_options, write


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
                HunyuanImages.Input("images", optional=True, tooltip="From Hunyuan3 Image Conditioning."),
                HunyuanConversation.Input("conversation", optional=True, tooltip="Earlier turns, to go on from."),
                io.Combo.Input(
                    "system_prompt",
                    options=SYSTEM_PROMPTS,
                    default="auto",
                    optional=True,
                    tooltip="Instruction before the conversation; 'auto': the checkpoint's own default.",
                ),
                io.String.Input(
                    "custom_system_prompt",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Your own system prompt, used when system_prompt is 'custom'.",
                ),
            ],
            outputs=[
                io.String.Output("answer", display_name="answer", tooltip="The answer."),
                HunyuanConversation.Output(
                    "conversation_out", display_name="conversation", tooltip="With this turn added, for the next one."
                ),
            ],
            hidden=[io.Hidden.unique_id],
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
        folder = model.model.folder
        shown, earlier = pictures_for(model, images, conversation)
        request = TextRequest(
            prompt,
            shown.pictures,
            system_prompt=system_prompt,
            custom_system_prompt=custom_system_prompt,
            history=earlier.messages,
        )
        progress = NodeProgress(cls.hidden.unique_id)
        run = write(
            model,
            request,
            answering(folder),
            progress,
            lambda run, _stage: run.answer,
            sampling=sampling_options(sampling, temperature, top_k, top_p, repetition_penalty),
            seed=seed,
            max_new_tokens=max_new_tokens,
        )
        answer, shown_text = run.answer, f"{run.answer}{cut_off(run)}"
        progress.stream("done", shown_text)
        progress.log(f"answered in {len(run.ids)} tokens{cut_off(run)}")
        turn = [Message("user", picture.in_template()) for picture in shown.pictures[len(earlier.pictures) :]]
        turn += [Message("user", prompt), Message("assistant", answer)]
        later = Conversation((*earlier.messages, *turn), shown.pictures, folder.fingerprint)
        return io.NodeOutput(answer, later, ui={"text": [shown_text]})


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
        return io.NodeOutput(Conversation((*earlier.messages, *drawn), shown.pictures, model.model.folder.fingerprint))
