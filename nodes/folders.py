"""Where checkpoint folders are looked for: `models/hunyuan3/`, and what extra_model_paths.yaml adds to it."""

from pathlib import Path

import folder_paths

from ..hunyuan3.checkpoint.index import INDEX_NAME, SINGLE_NAME
from ..hunyuan3.errors import RequestError

KIND = "hunyuan3"
_DEPTH = 3  # a hub cache keeps a snapshot three folders deep


def register() -> None:
    """Tells ComfyUI of `models/hunyuan3`. Paths from extra_model_paths.yaml are kept, whichever came first."""
    folder_paths.add_model_folder_path(KIND, str(Path(folder_paths.models_dir) / KIND))


def checkpoint_names() -> list[str]:
    """Folders that hold a configuration and weights, relative to their root, with forward slashes, sorted."""
    return sorted({folder.relative_to(root).as_posix() for root in _roots() for folder in _checkpoints_in(root)})


def checkpoint_path(name: str) -> Path:
    """The folder of a name that `checkpoint_names` gave. Raises RequestError if there is none."""
    for root in _roots():
        folder = root / name
        if _is_checkpoint(folder):
            return folder
    roots = ", ".join(str(root) for root in _roots())
    raise RequestError(
        f"checkpoint {name!r} is not in {roots}. Put the official folder (config.json, tokenizer.json, the safetensors "
        "files) there and press R in ComfyUI to refresh."
    )


def _roots() -> list[Path]:
    return [Path(root) for root in folder_paths.get_folder_paths(KIND)]


def _checkpoints_in(root: Path, depth: int = _DEPTH) -> list[Path]:
    """Checkpoints below a folder; folders that may not be read hold none."""
    try:
        folders = [entry for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    except OSError:
        return []
    found = []
    for folder in folders:
        if _is_checkpoint(folder):
            found.append(folder)
        elif depth > 1:
            found += _checkpoints_in(folder, depth - 1)
    return found


def _is_checkpoint(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file() and any(
            (folder / name).is_file() for name in (INDEX_NAME, SINGLE_NAME)
        )
    except OSError:
        return False
