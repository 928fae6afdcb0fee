"""A real ComfyUI server, started for one demo or one test session and stopped at its end.

    with ComfyServer(bed.comfyui, bed.python, checkpoints={"tiny": folder}) as server:
        outputs = server.queue(prompt)
        png = server.view(**outputs["9"]["images"][0])

The server gets a base directory of its own: models, custom nodes, input, output, temp and user folders, all empty but
for this package and the given checkpoints, so that whatever else lives in that ComfyUI takes no part and is not
touched. Talks to it with urllib: standard library only, see testbed.py.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.testbed import REPO, clean_env, standins_for

PACKAGE = "comfyui-hunyuan-image-3"
MODELS = "hunyuan3"  # the folder in ComfyUI's models folder
NOT_THE_PACKAGE = (".*", "__pycache__", "node_modules", "output", "tests", "benchmarks", "*.egg-info")

Json = Any
Prompt = dict[str, dict[str, Any]]


class ServerError(Exception):
    """The server did not start, ended, or did not answer in time; the message ends with the last lines of its log."""


class PromptError(Exception):
    """The server refused a prompt or a node raised. `details` is what the server sent."""

    def __init__(self, message: str, details: Json = None) -> None:
        super().__init__(message)
        self.details = details


class PromptInterruptedError(PromptError):
    """The prompt was stopped before its end."""


class ComfyServer:
    """Starts on entering the `with` block, when it returns the server answers; stops on leaving it.

    comfyui, python: the ComfyUI folder and the Python that runs it (testbed.Bed).
    checkpoints: name -> folder, shown to the nodes as models/hunyuan3/<name>.
    package: what to place in custom_nodes under the name PACKAGE; None for a ComfyUI without it.
    packs: name -> folder of further custom nodes to place beside it.
    arguments: further command line arguments of ComfyUI's main.py.
    port: 0 takes a free one.
    deadline: seconds until the server must answer.
    """

    def __init__(
        self,
        comfyui: Path,
        python: Path,
        *,
        checkpoints: Mapping[str, Path] | None = None,
        package: Path | None = REPO,
        packs: Mapping[str, Path] | None = None,
        arguments: Sequence[str] = (),
        port: int = 0,
        deadline: float = 240.0,
    ) -> None:
        self.comfyui = comfyui
        self.python = python
        self.checkpoints = dict(checkpoints or {})
        self.package = package
        self.packs = dict(packs or {})
        self.arguments = list(arguments)
        self.port = port
        self.deadline = deadline
        self.client_id = uuid.uuid4().hex
        self.startup_log = ""  # what the server had written when it first answered
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        # ProxyHandler({}): a proxy set for the internet must not be asked for 127.0.0.1.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @property
    def url(self) -> str:
        """The address of the page and of the HTTP API."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def base(self) -> Path:
        """The server's base directory (there while the server runs)."""
        return self._base

    @property
    def placed(self) -> Path:
        """Where this package lies for the server, and so the path that its log and tracebacks show."""
        return self.base / "custom_nodes" / PACKAGE

    # --- life ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> ComfyServer:
        with contextlib.ExitStack() as stack:
            # The server may hold a file a moment longer than its process lives (Windows): leave it to the system then.
            temporary = tempfile.TemporaryDirectory(prefix="hunyuan3-comfy-", ignore_cleanup_errors=True)
            self._base = Path(stack.enter_context(temporary)).resolve()
            self._furnish()
            self.port = self.port or _free_port()
            self._process = self._start(stack)
            stack.callback(self._stop)
            self._wait_until_ready()
            self.startup_log = self.log_text()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _furnish(self) -> None:
        for name in ("models", "custom_nodes", "input", "output", "temp", "user"):
            (self.base / name).mkdir()
        (self.base / "models" / MODELS).mkdir()
        for name, folder in self.checkpoints.items():
            _place(Path(folder).resolve(), self.base / "models" / MODELS / name)
        if self.package is not None:
            _place(self.package.resolve(), self.placed, shutil.ignore_patterns(*NOT_THE_PACKAGE))
        for name, folder in self.packs.items():
            _place(folder.resolve(), self.base / "custom_nodes" / name)

    def _start(self, stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        # --base-directory moves models, custom_nodes, input, output, temp and user. The whitelist matters where the
        # ComfyUI has an extra_model_paths.yaml that names further folders of custom nodes. --disable-api-nodes keeps
        # the page and the start free of calls to the internet.
        command = [self.python, self.comfyui / "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", self.base, "--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
        command += ["--disable-api-nodes", "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACKAGE]
        command += self.packs
        command += self.arguments
        # Nothing here may reach for a model hub: a checkpoint is complete or it is an error.
        env = clean_env(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", DO_NOT_TRACK="1")
        standins = standins_for(self.python)
        if standins:
            env["PYTHONPATH"] = os.pathsep.join(map(str, standins))
        log = stack.enter_context((self.base / "server.log").open("wb"))
        return subprocess.Popen(
            command, cwd=self.comfyui, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )

    def _wait_until_ready(self) -> None:
        until = time.monotonic() + self.deadline
        while True:
            self._check_alive()
            try:
                self.get("/system_stats", timeout=5)
                return
            except ServerError:
                if time.monotonic() > until:
                    raise ServerError(
                        f"ComfyUI did not answer within {self.deadline:.0f} s.\n{self.log_tail()}"
                    ) from None
                time.sleep(0.2)

    def _stop(self) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        # An interrupt lets ComfyUI clean up; Windows has none for a single process.
        process.terminate() if os.name == "nt" else process.send_signal(signal.SIGINT)
        for last_resort in (process.terminate, process.kill):
            try:
                process.wait(timeout=10)
                return
            except subprocess.TimeoutExpired:
                last_resort()
        process.wait()

    def _check_alive(self) -> None:
        code = self._process.poll() if self._process is not None else None
        if self._process is None or code is not None:
            raise ServerError(f"ComfyUI is not running (exit code {code}).\n{self.log_tail()}")

    def log_text(self) -> str:
        """Return everything the server has written so far."""
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        """Return the last lines of the log, with a heading."""
        return "\n".join(["--- end of the server's log ---", *self.log_text().splitlines()[-lines:]])

    # --- HTTP ---------------------------------------------------------------------------------------------------

    def get(self, path: str, *, timeout: float = 30.0, **query: str) -> Json:
        """GET `path` and return the JSON answer."""
        return json.loads(self.get_bytes(path, timeout=timeout, **query))

    def get_bytes(self, path: str, *, timeout: float = 30.0, **query: str) -> bytes:
        """GET `path` and return the answer as it is."""
        question = f"?{urllib.parse.urlencode(query)}" if query else ""
        return self._ask(urllib.request.Request(self.url + path + question), timeout)

    def post(self, path: str, body: Json = None, *, timeout: float = 30.0) -> Json:
        """POST `body` as JSON to `path` and return the JSON answer, None for an empty one."""
        data = json.dumps({} if body is None else body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        text = self._ask(request, timeout)
        return json.loads(text) if text else None

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """Return a file the server wrote; takes one entry of a node's `images` as keyword arguments."""
        return self.get_bytes("/view", filename=filename, subfolder=subfolder, type=type)

    def _ask(self, request: urllib.request.Request, timeout: float) -> bytes:
        """Send a request. An answer that says no is an HTTPError; no answer at all is a ServerError."""
        try:
            with self._opener.open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:  # refused, reset, timed out: URLError is one too
            what = f"{request.get_method()} {request.full_url}"
            raise ServerError(f"No answer to {what}: {error}\n{self.log_tail()}") from error

    # --- prompts ------------------------------------------------------------------------------------------------

    def queue(
        self, prompt: Prompt, *, timeout: float = 600.0, extra_data: Mapping[str, Json] | None = None
    ) -> dict[str, Json]:
        """Queue a prompt in the API format, wait for its end and return the outputs by node id."""
        return self.wait(self.submit(prompt, extra_data), timeout=timeout)

    def submit(self, prompt: Prompt, extra_data: Mapping[str, Json] | None = None) -> str:
        """Queue a prompt in the API format and return its id. Raises PromptError if the server finds fault with it."""
        try:
            body = {"prompt": prompt, "client_id": self.client_id, "extra_data": dict(extra_data or {})}
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            answer = json.loads(error.read())
        # With several output nodes the server runs those that are valid and still reports the others.
        if answer.get("error") or answer.get("node_errors"):
            raise PromptError(_refusal(answer), answer)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, *, timeout: float = 600.0) -> dict[str, Json]:
        """Wait for the end of a queued prompt and return the outputs by node id. Raises what went wrong in a node."""
        until = time.monotonic() + timeout
        while True:
            self._check_alive()
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                break
            if time.monotonic() > until:
                raise ServerError(f"Prompt {prompt_id} did not end within {timeout:.0f} s.\n{self.log_tail()}")
            time.sleep(0.1)
        messages = dict(entry["status"]["messages"])
        if "execution_interrupted" in messages:
            raise PromptInterruptedError(f"interrupted in {_where(messages['execution_interrupted'])}", messages)
        if "execution_error" in messages:
            error = messages["execution_error"]
            text = f"{_where(error)}: {error['exception_type']}: {error['exception_message']}"
            raise PromptError(f"{text}\n{''.join(error.get('traceback', []))}", error)
        return entry["outputs"]

    def history(self, prompt_id: str) -> Json:
        """Return what the server keeps of a prompt that has ended: prompt, outputs, status with its messages."""
        return self.get(f"/history/{prompt_id}")[prompt_id]

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stop the running prompt, or only if it is `prompt_id`."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})


def with_inputs(prompt: Prompt, changes: Mapping[str, Mapping[str, Any]]) -> Prompt:
    """Return a copy of `prompt` with inputs set in every node of the named classes: {class_type: {input: value}}.

    A class or an input which the prompt does not have is an error, so that a renamed input cannot go unnoticed.
    """
    changed = copy.deepcopy(prompt)
    for class_type, inputs in changes.items():
        nodes = [node for node in changed.values() if node["class_type"] == class_type]
        if not nodes:
            raise KeyError(f"the prompt has no {class_type}")
        for node in nodes:
            unknown = inputs.keys() - node["inputs"].keys()
            if unknown:
                raise KeyError(f"{class_type} has no input {', '.join(sorted(unknown))} in the prompt")
            node["inputs"].update(inputs)
    return changed


def _refusal(answer: Json) -> str:
    """Say in one line per fault why the server refused a prompt."""
    lines = []
    error = answer.get("error")
    if error:
        lines.append(": ".join(filter(None, (error.get("message"), error.get("details")))))
    for node_id, node in (answer.get("node_errors") or {}).items():
        for fault in node["errors"]:
            text = ": ".join(filter(None, (fault["message"], fault.get("details"))))
            lines.append(f"node {node_id} ({node['class_type']}): {text}")
    return "\n".join(lines)


def _where(message: Json) -> str:
    return f"node {message.get('node_id')} ({message.get('node_type')})"


def _place(source: Path, target: Path, ignore: Any = None) -> None:
    """Put the folder `source` at `target`: as a link, or as a copy where links are not allowed (Windows)."""
    try:
        target.symlink_to(source, target_is_directory=True)
    except (OSError, NotImplementedError):
        shutil.copytree(source, target, ignore=ignore)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
