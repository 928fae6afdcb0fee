"""A browser for the tests that look at ComfyUI's page: Chromium, or a Chrome or Edge that is there already.

    python3 tools/browser_setup.py      installs one if need be (Debian and Ubuntu, as root) and prints where it is

Environment:
    CHROMIUM_PATH   the browser to use; nothing is looked for or installed then

The tests themselves only look for it (`find_browser`). The Python package that drives it, playwright, is one of
tools/requirements-testbed.txt; its own download of browsers is not used. Standard library only, see testbed.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.testbed import say

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)
PACKAGES = ("chromium", "fonts-dejavu-core")  # a browser without any font draws no text
HOW = (
    "Install Chromium or Chrome (Debian and Ubuntu: apt install chromium), or name one with CHROMIUM_PATH, or leave "
    'the tests of the page out with -m "not browser".'
)


class BrowserError(Exception):
    """There is no usable browser; the message says what to do."""


def find_browser() -> Path:
    """Return the browser's program, or raise BrowserError."""
    named = os.environ.get("CHROMIUM_PATH")
    if named:
        program = shutil.which(Path(named).expanduser())
        if program is None:
            raise BrowserError(f"CHROMIUM_PATH is {named}, but there is no such program.")
        return Path(program)
    for candidate in (*NAMES, *PLACES):
        program = shutil.which(candidate)
        if program is not None and _starts(Path(program)):
            return Path(program)
    raise BrowserError(f"There is no browser for the tests of the page. {HOW}")


def ensure_browser() -> Path:
    """Return the browser's program; install Chromium if there is none and this is a Debian or Ubuntu run by root."""
    try:
        return find_browser()
    except BrowserError:
        can_install = shutil.which("apt-get") is not None and hasattr(os, "geteuid") and os.geteuid() == 0
        if os.environ.get("CHROMIUM_PATH") or not can_install:
            raise
    say("installing Chromium with apt-get (a minute or two)")
    _apt_get("update")
    _apt_get("install", "--yes", "--no-install-recommends", *PACKAGES)
    return find_browser()


def _apt_get(*arguments: str) -> None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-q", *arguments]
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, check=False)
    if out.returncode != 0:
        end = "\n".join(out.stdout.splitlines()[-15:])
        raise BrowserError(f"{' '.join(command)} failed:\n{end}\n{HOW}")


def _starts(program: Path) -> bool:
    """Whether it is a browser and not what Ubuntu has under its name, a hint to install a snap."""
    if os.name == "nt":  # there --version opens a window
        return True
    try:
        out = subprocess.run([program, "--version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return out.returncode == 0


def main() -> int:
    """Install a browser if need be and print where it is."""
    try:
        print(ensure_browser())
    except BrowserError as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
