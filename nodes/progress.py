"""What a running node shows: its progress bar, a line of text under it; and how it notices Cancel."""

import logging
import time
from typing import Any

import comfy.model_management as mm
import comfy.utils
from server import PromptServer

_log = logging.getLogger(__name__)
TEXT_EVENT = "hunyuan3.text"
_INTERVAL = 0.1  # seconds between two updates: messages queue up without back-pressure


class NodeProgress:
    """The bar and the text of one node during one execution.

    extra_pnginfo: what the page sends along for PNG files; it tells which workflow the node is in.
    """

    def __init__(self, node_id: str | None, extra_pnginfo: dict[str, Any] | None = None) -> None:
        self.node_id = node_id
        self.workflow = ((extra_pnginfo or {}).get("workflow") or {}).get("id")
        self._last = 0.0
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """A `Progress` of the core. Raises ComfyUI's interrupt exception when the user pressed Cancel."""
        now = time.monotonic()
        if stage == self._stage and done < total and now - self._last < _INTERVAL:
            mm.throw_exception_if_processing_interrupted()
            return
        self._stage, self._last = stage, now
        self.text(f"{stage}: {100 * done // max(total, 1)} %")
        comfy.utils.ProgressBar(total, node_id=self.node_id).update_absolute(done)

    def step(self, stage: str, done: int, total: int, preview: Any = None) -> None:
        """Moves the bar by a step and shows the preview, if there is one. Never skipped, unlike a mere count."""
        self.text(f"{stage}: step {done} of {total}")
        comfy.utils.ProgressBar(total, node_id=self.node_id).update_absolute(done, total, preview)

    def text(self, text: str) -> None:
        """Shows a line of text on the node."""
        server = self._listening()
        if server is not None:
            server.send_progress_text(text, self.node_id, server.client_id)

    def stream(self, stage: str, text: str) -> None:
        """Shows text while it is written, and tells the page's own view of it. Always the whole text: a page that was
        away misses nothing.
        """
        mm.throw_exception_if_processing_interrupted()
        self.text(text or stage)
        server = self._listening()
        if server is None:
            return
        told = {"node": self.node_id, "stage": stage, "text": text, "workflow": self.workflow}
        told["prompt_id"] = getattr(server, "last_prompt_id", None)
        server.send_sync(TEXT_EVENT, told, server.client_id)

    def _listening(self) -> PromptServer | None:
        """The server, if somebody asked to be told: a message without a client would go to every open page."""
        server = getattr(PromptServer, "instance", None)
        return None if server is None or server.client_id is None or self.node_id is None else server

    def shown(self, text: str) -> dict[str, list[str]]:
        """The text as the node's output, with the workflow that it belongs to where that is known."""
        return {"text": [text]} | ({"hunyuan3_workflow": [self.workflow]} if self.workflow else {})

    def log(self, text: str) -> None:
        """Writes a line to the log."""
        _log.info("Hunyuan Image 3: %s", text)

    def report(self, text: str) -> None:
        """Shows a line of text on the node and writes it to the log."""
        self.log(text)
        self.text(text)


def check_cancelled() -> None:
    """Raises ComfyUI's interrupt exception when the user pressed Cancel."""
    mm.throw_exception_if_processing_interrupted()
