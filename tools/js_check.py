"""Checks of the page's scripts in js/: types (tsc, strict) and the tests in tests/js/ (node's own test runner).

    python3 tools/js_check.py

Needs Node.js 18 or newer with npm. On Debian and Ubuntu, as root, it installs them where they are missing; elsewhere
that is an error. What package-lock.json names goes to node_modules/ in the checkout. Standard library only, see
testbed.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.testbed import REPO, say

PACKAGES = REPO / "node_modules"
STAMP = PACKAGES / ".hunyuan3-stamp"
HOW = "Install Node.js 18 or newer with npm (Debian and Ubuntu: apt install npm)."


class JsError(Exception):
    """The scripts cannot be checked; the message says what to do."""


def main() -> int:
    """Set up what is missing, then run both checks; the exit code is the worse one."""
    try:
        ensure_packages(ensure_npm())
    except JsError as error:
        say(f"error: {error}")
        return 1
    node = shutil.which("node") or "node"
    tests = sorted((REPO / "tests" / "js").glob("*.test.js"))
    types = subprocess.run([node, PACKAGES / "typescript" / "bin" / "tsc"], cwd=REPO, check=False).returncode
    units = subprocess.run([node, "--test", "--test-reporter=dot", *tests], cwd=REPO, check=False).returncode
    say(f"types: {'ok' if types == 0 else 'FAILED'}, tests of {len(tests)} files: {'ok' if units == 0 else 'FAILED'}")
    return max(abs(types), abs(units))


def ensure_npm() -> str:
    """Return the program npm; install it if it is missing and this is a Debian or Ubuntu run by root."""
    npm = shutil.which("npm")
    if npm and shutil.which("node"):
        return npm
    can_install = shutil.which("apt-get") is not None and hasattr(os, "geteuid") and os.geteuid() == 0
    if not can_install:
        raise JsError(f"There is no npm, so the scripts in js/ cannot be checked. {HOW}")
    say("installing npm with apt-get")
    for arguments in (["update"], ["install", "--yes", "--no-install-recommends", "npm"]):
        _run(["apt-get", "-q", *arguments], {"DEBIAN_FRONTEND": "noninteractive"})
    npm = shutil.which("npm")
    if npm is None:
        raise JsError(f"apt-get has installed npm, but it is not found. {HOW}")
    return npm


def ensure_packages(npm: str) -> None:
    """Install what package-lock.json names, unless that was done. The stamp is written last."""
    wanted = hashlib.sha256((REPO / "package-lock.json").read_bytes()).hexdigest()
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8") == wanted:
        return
    say("installing the packages of package-lock.json")
    _run([npm, "ci", "--no-audit", "--no-fund"], {})
    STAMP.write_text(wanted, encoding="utf-8")


def _run(command: list[str], env: dict[str, str]) -> None:
    out = subprocess.run(
        command,
        cwd=REPO,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if out.returncode != 0:
        end = "\n".join(out.stdout.splitlines()[-15:])
        raise JsError(f"{' '.join(command)} failed:\n{end}\n{HOW}")


if __name__ == "__main__":
    sys.exit(main())
