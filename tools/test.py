"""All checks of this package, on a machine that has only Python 3.10 or newer.

    python3 tools/test.py [arguments for pytest]

Sets up the test bed (see testbed.py) and runs ruff, the checks of js/ (see js_check.py), the parity check against the
reference's recorded tensors, and pytest. The tests in a real ComfyUI run beside the other checks, which wait for
nothing; what they print comes last. With arguments for pytest it runs once, with these. Every check runs even if one
before it failed; the exit code is the worst one. The settings of the checks are in pyproject.toml.

Environment: see testbed.py; HUNYUAN3_GOLDEN names the folder of recorded tensors for the parity check.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import browser_setup, testbed
from tools.testbed import REPO, say


class Result(NamedTuple):
    """How one check ended; `line` is the last line it printed."""

    name: str
    code: int
    seconds: float
    line: str


def main(pytest_arguments: Sequence[str]) -> int:
    """Run every check, print a summary and return the worst exit code."""
    testbed.end_cleanly_on_sigterm()
    try:
        bed = testbed.prepare(tests=True)
    except testbed.TestbedError as error:
        say(f"error: {error}")
        return 1
    browser = _browser()
    module = [str(bed.python), "-m"]
    checks = {
        "ruff check": [*module, "ruff", "check", "--extend-exclude", ".cache", "."],
        "ruff format": [*module, "ruff", "format", "--check", "--extend-exclude", ".cache", "."],
        "js": [str(bed.python), str(REPO / "tools" / "js_check.py")],
        "parity": [*module, "tests.parity", str(golden_dir())],
    }
    beside: dict[str, list[str]] = {}
    if pytest_arguments:
        checks["pytest"] = [*module, "pytest", *pytest_arguments]
    else:
        checks["tests"] = [*module, "pytest", "--ignore", "tests/nodes"]
        beside["node tests"] = [*module, "pytest", "tests/nodes"]
    env = testbed.clean_env(COMFYUI_PATH=str(bed.comfyui), HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", **browser)
    # Tiny tensors gain nothing from threads, and threads that wait for each other cost a multiple.
    env.setdefault("OMP_NUM_THREADS", "1")
    started = [_Check(name, command, env) for name, command in beside.items()]
    try:
        results = [_Check(name, command, env).show() for name, command in checks.items()]
        results += [check.show() for check in started]
    finally:
        for check in started:
            check.stop()
    print("\nSummary")
    for result in results:
        verdict = "ok    " if result.code == 0 else "FAILED"
        print(f"  {verdict} {result.name:<12} {result.seconds:6.1f} s  {result.line}")
    return max(result.code for result in results)


def _browser() -> dict[str, str]:
    """Where the browser is, for the tests that drive one; without one those tests fail and say so."""
    try:
        return {"CHROMIUM_PATH": str(browser_setup.ensure_browser())}
    except browser_setup.BrowserError as error:
        say(f"no browser: {error}")
        return {}


def golden_dir() -> Path:
    """Return the recorded tensors to compare with: HUNYUAN3_GOLDEN, a full set beside the checkout, or our subset."""
    named = os.environ.get("HUNYUAN3_GOLDEN")
    if named:
        return Path(named).expanduser().resolve()
    beside = REPO.parent / "shared" / "golden"
    return beside if beside.is_dir() else REPO / "tests" / "golden"


class _Check:
    """One check, running; what it prints waits until it is shown."""

    def __init__(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self.name = name
        self._started = time.monotonic()
        self._seconds = 0.0
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            command,
            cwd=REPO,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._process.wait()
        self._seconds = time.monotonic() - self._started
        self._lines.put(None)

    def show(self) -> Result:
        """Shows what it printed and what it prints as it comes, and keeps its last line for the summary."""
        print(f"\n=== {self.name}", flush=True)
        last = ""
        try:
            while (line := self._lines.get()) is not None:
                print(line, end="", flush=True)
                last = line.strip() or last
        except KeyboardInterrupt:  # Ctrl-C went to the check as well, which now tidies up
            raise
        except BaseException:
            self.stop()
            raise
        # A process ended by a signal has a negative code on POSIX: that must not pass for better than 0.
        return Result(self.name, abs(self._process.wait()), self._seconds, last.strip("= "))

    def stop(self) -> None:
        """Ends it if it still runs, as Ctrl-C would, and waits until it has tidied up."""
        if self._process.poll() is None:
            self._process.terminate() if os.name == "nt" else self._process.send_signal(signal.SIGINT)
        self._process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
