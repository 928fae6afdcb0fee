"""What ComfyUI's page is told while a prompt runs: the messages of the websocket, taken down in order."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tools.comfy_server import ComfyServer

# The first word of a binary message.
OLD_PREVIEW, TEXT, PREVIEW = 1, 3, 4


@dataclass(frozen=True)
class Event:
    """One message. `kind`: its type; "text" and "preview" (with `picture`, a JPEG or PNG) are the binary ones."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)
    picture: bytes = b""

    @property
    def node(self) -> str | None:
        """The node it is about."""
        return self.data.get("node") or self.data.get("node_id")


class Listener:
    """Connected while the `with` block runs, as the client whose prompts `server` queues.

    metadata: says, as the real page does, that it understands previews with metadata.
    """

    def __init__(self, server: ComfyServer, *, metadata: bool = True) -> None:
        self.server = server
        self.metadata = metadata
        self._events: list[Event] = []
        self._news = threading.Condition()
        self._connected = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        assert self._connected.wait(60), "no websocket"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(60)

    def wait_for(self, wanted: Callable[[Event], bool], timeout: float = 120.0) -> Event:
        """Return the first message, past or to come, that is `wanted`."""
        seen = 0

        def found() -> Event | None:
            nonlocal seen
            fresh, seen = self._events[seen:], len(self._events)
            return next(filter(wanted, fresh), None)

        with self._news:
            event = self._news.wait_for(found, timeout)
        assert event is not None, f"not among the {seen} messages of {timeout} s: {[e.kind for e in self._events]}"
        return event

    def run(self, prompt: dict[str, Any]) -> Told:
        """Queue a prompt, wait for its end and return what was told of it. Raises as `ComfyServer.queue` does."""
        return self.follow(self.server.submit(prompt))

    def follow(self, prompt_id: str) -> Told:
        """Wait for the end of a queued prompt and return what was told of it."""
        outputs = self.server.wait(prompt_id)
        # The last message: the history has the prompt a moment earlier.
        self.wait_for(lambda e: e.kind == "executing" and e.node is None and e.data["prompt_id"] == prompt_id)
        with self._news:
            start = next(i for i, e in enumerate(self._events) if is_of(prompt_id, "execution_start")(e))
            return Told(outputs, self._events[start:])

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._listen())
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        finally:
            self._loop.close()

    async def _listen(self) -> None:
        url = f"{self.server.url.replace('http', 'ws', 1)}/ws?clientId={self.server.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            flags = {"supports_preview_metadata": self.metadata}
            await socket.send_json({"type": "feature_flags", "data": flags})
            async for message in socket:
                event = _parsed(message.data)
                if event.kind == "feature_flags":  # the server has read ours
                    self._connected.set()
                with self._news:
                    self._events.append(event)
                    self._news.notify_all()


@dataclass(frozen=True)
class Told:
    """What a finished prompt gave and what was told of it, in order."""

    outputs: dict[str, Any]
    events: list[Event]

    def texts(self, node: str) -> list[str]:
        """The lines of text that a node showed."""
        return [e.data["text"] for e in self.events if e.kind == "text" and e.node == node]

    def progress(self, node: str) -> list[tuple[int, int]]:
        """(value, max) of a node's bar."""
        return [(e.data["value"], e.data["max"]) for e in self.events if e.kind == "progress" and e.node == node]

    def previews(self, node: str | None = None) -> list[Event]:
        """Previews with metadata, of one node or of all."""
        return [e for e in self.events if e.kind == "preview" and node in (None, e.node)]

    @property
    def executed(self) -> list[str]:
        """The nodes that ran, in order."""
        return [e.node for e in self.events if e.kind == "executing" and e.node is not None]

    @property
    def cached(self) -> set[str]:
        """The nodes whose outputs were still there."""
        return {node for e in self.events if e.kind == "execution_cached" for node in e.data["nodes"]}


def is_of(prompt_id: str, kind: str) -> Callable[[Event], bool]:
    """Whether a message is of that kind and prompt."""
    return lambda event: event.kind == kind and event.data.get("prompt_id") == prompt_id


def _parsed(message: str | bytes) -> Event:
    if isinstance(message, str):
        content = json.loads(message)
        return Event(content["type"], content["data"])
    (kind,) = struct.unpack_from(">I", message)
    if kind == OLD_PREVIEW:
        return Event("old preview", {}, message[8:])
    (length,) = struct.unpack_from(">I", message, 4)
    head, rest = message[8 : 8 + length], message[8 + length :]
    if kind == TEXT:
        return Event("text", {"node": head.decode(), "text": rest.decode()})
    if kind == PREVIEW:
        return Event("preview", json.loads(head), rest)
    return Event(f"binary {kind}")
