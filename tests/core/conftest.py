"""Tiny checkpoints and models, made once per run; tests that change one take a copy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan3.config import VARIANTS
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.tiny import make_tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from more threads, and on a busy machine these wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Variant -> tiny checkpoint folder. Read only."""
    root = tmp_path_factory.mktemp("tiny")
    return {variant: make_tiny(root / f"tiny-{variant}", variant) for variant in VARIANTS}


@pytest.fixture(scope="session")
def models(folders: dict[str, Path]) -> dict[str, Hunyuan3]:
    """Variant -> loaded tiny model, float32 on the CPU. Read only: load your own to change it."""
    return {variant: Hunyuan3.load(folder, device="cpu") for variant, folder in folders.items()}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """`copied("distil")`: a folder of its own to break."""

    def copy(variant: str = "instruct", name: str = "copy") -> Path:
        return shutil.copytree(folders[variant], tmp_path / name)

    return copy


@pytest.fixture(scope="session")
def edit_json() -> Callable[..., None]:
    """`edit_json(path, key=value, ...)` sets keys of a JSON file; a key set to `...` is removed."""

    def edit(path: Path, **changes: Any) -> None:
        data = json.loads(path.read_text(encoding="utf-8"))
        data.update(changes)
        kept = {key: value for key, value in data.items() if value is not ...}
        path.write_text(json.dumps(kept), encoding="utf-8")

    return edit
