"""A checkpoint that sits the exam, through the package's own pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from hunyuan3.image.resolution import ResolutionTable
from hunyuan3.pictures import EncodedPicture
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.text.template import Message
from hunyuan3.writing import TextRequest, answering, choosing_ratio, thinking

from .draw import draw
from .exam import DrawingTask, QuestionTask
from .lessons import Mode

MODES: tuple[Mode, ...] = ("direct", "rewrite", "think")
_STAGES = {"rewrite": "recaption", "think": "think_recaption"}
_MOST_TOKENS = 160  # the longest thought with its rewrite has about 125


@dataclass(frozen=True)
class Drawing:
    """What a candidate made of a task.

    `trace` is what it wrote first, "" in direct mode; `ratio` the row that it would have chosen, None for no choice.
    """

    picture: Image.Image
    trace: str
    ratio: int | None


class Candidate:
    """Answers tasks one by one; task and seed decide everything."""

    def __init__(self, model: Hunyuan3, sampling: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        """`sampling`: steps, guidance, shift, taylor; what is missing is the checkpoint's own."""
        self.model = model
        self.sampling = dict(sampling or {})
        self.seed = seed

    @property
    def rows(self) -> ResolutionTable:
        """The sizes that its ratio tokens stand for."""
        return self.model.folder.resolutions

    def draw(self, task: DrawingTask, mode: Mode) -> Drawing:
        """The picture, of the size of the task's scene whatever ratio the candidate would have chosen."""
        pictures = self.model.encode_pictures([draw(scene) for scene in task.inputs])
        history = self._history(task, pictures, mode) if task.first else ()
        trace, ratio = "", None
        if mode != "direct" or not pictures:  # a picture that is shown gives the ratio
            trace, ratio = self._write(TextRequest(task.text, pictures=pictures, history=history), mode)
        conditioning = self.model.conditioning(
            task.text,
            width=task.scene.width,
            height=task.scene.height,
            pictures=pictures,
            trace=trace,
            history=history,
        )
        run = self.model.sample(conditioning, seed=self.seed, **self.sampling)
        return Drawing(self.model.pictures(run.latents)[0], trace, ratio)

    def answer(self, task: QuestionTask) -> str:
        """The answer in words."""
        request = TextRequest(task.text, pictures=self.model.encode_pictures([draw(task.scene)]))
        run = self.model.write(request, answering(self.model.folder), seed=self.seed, max_new_tokens=_MOST_TOKENS)
        for _step in run:
            pass
        return run.answer

    def round_trip(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 pictures [count, height, width, 3] through the VAE and back."""
        latents = self.model.encode(torch.from_numpy(pictures).float() / 255)
        return (self.model.decode(latents) * 255).round().to(torch.uint8).numpy()

    def _history(self, task: DrawingTask, pictures: tuple[EncodedPicture, ...], mode: Mode) -> tuple[Message, ...]:
        """The turn before: what was asked, what the candidate writes to that, and the picture, drawn as asked."""
        trace = "" if mode == "direct" else self._write(TextRequest(task.first), mode)[0]
        written = [Message("assistant", trace)] if trace else []
        return (Message("user", task.first), *written, Message("assistant", pictures[0].in_template()))

    def _write(self, request: TextRequest, mode: Mode) -> tuple[str, int | None]:
        """(trace, ratio) of the text pass before a drawing."""
        folder = self.model.folder
        plan = choosing_ratio(folder) if mode == "direct" else thinking(folder, _STAGES[mode], need_ratio=True)
        run = self.model.write(request, plan, seed=self.seed, max_new_tokens=_MOST_TOKENS)
        for _step in run:
            pass
        ratio = None if run.resolution is None else run.resolution.ratio
        return "" if mode == "direct" else run.trace, ratio
