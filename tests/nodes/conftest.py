"""A real ComfyUI for the tests in this folder: as a server (`comfy_server`) or in this process (`comfy_pack`).

Tests that use either carry the marker `comfy`. Without a ComfyUI they fail; `-m "not comfy"` leaves them out.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from tools import testbed
from tools.comfy_server import MODELS, PACKAGE, ComfyServer


class ComfyPack(NamedTuple):
    """This package, loaded as ComfyUI loads it, and the ComfyUI that it sees."""

    module: ModuleType
    extension: Any  # our comfy_api.latest.ComfyExtension
    nodes: dict[str, Any]  # node id -> node class
    comfy_nodes: ModuleType  # ComfyUI's own nodes.py
    base: Path  # ComfyUI's base directory in this process: models, input, output, ...


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The folder of the ComfyUI to test in."""
    folder = testbed.comfyui_dir()
    if not (folder / "main.py").is_file():
        pytest.fail(
            f"There is no ComfyUI at {folder}. Run `python3 tools/test.py`, which sets one up and runs all tests, or "
            'name yours with COMFYUI_PATH, or leave these tests out with -m "not comfy".',
            pytrace=False,
        )
    return folder


@pytest.fixture(scope="session")
def comfy_server(comfyui: Path, tiny_checkpoint: Path) -> Iterator[ComfyServer]:
    """A running ComfyUI with this package in it and a tiny checkpoint at models/hunyuan3/tiny-instruct."""
    checkpoints = {tiny_checkpoint.name: tiny_checkpoint}
    with ComfyServer(comfyui, Path(sys.executable), checkpoints=checkpoints) as server:
        yield server


@pytest.fixture(scope="session")
def probed_server(comfyui: Path, tiny_checkpoint: Path) -> Iterator[ComfyServer]:
    """As `comfy_server`, another one, with the nodes of probe_pack/ beside the package, for looking inside."""
    checkpoints = {tiny_checkpoint.name: tiny_checkpoint}
    packs = {"hunyuan3-test-probe": Path(__file__).parent / "probe_pack"}
    with ComfyServer(comfyui, Path(sys.executable), checkpoints=checkpoints, packs=packs) as server:
        yield server


@pytest.fixture(scope="session")
def comfy_pack(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> ComfyPack:
    """This package loaded into a ComfyUI inside this process (on the CPU), for tests of schemas and single nodes.

    Stays loaded for the rest of the session: ComfyUI's modules keep global state and cannot be imported twice.
    """
    # ComfyUI has a package `tests` too: ours must be known before its root comes first on the path.
    importlib.import_module("tests")
    for standin in testbed.standins_for(Path(sys.executable)):
        sys.path.append(str(standin))
    # First, or `import nodes` would find our folder nodes/ instead of ComfyUI's nodes.py.
    sys.path.insert(0, str(comfyui))

    base = tmp_path_factory.mktemp("comfy-base")
    (base / "models" / MODELS).mkdir(parents=True)
    from comfy.cli_args import args  # reads no command line unless told to

    args.cpu = True
    args.base_directory = str(base)
    # As main.py does before nodes.py puts ComfyUI's folder comfy/ on the path, with another `utils` in it.
    importlib.import_module("utils.install_util")
    comfy_nodes = importlib.import_module("nodes")

    module = _load_package(testbed.REPO, f"custom_nodes.{PACKAGE}")
    extension = asyncio.run(module.comfy_entrypoint())
    nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    return ComfyPack(module, extension, nodes, comfy_nodes, base)


def _load_package(folder: Path, name: str) -> ModuleType:
    """Import a package by its path, as ComfyUI's nodes.load_custom_node does."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mm(comfy_pack: ComfyPack) -> ModuleType:
    """ComfyUI's memory manager."""
    import comfy.model_management as mm

    return mm


@pytest.fixture
def stand_in_cards(mm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes the memory manager believe in made-up cards, and hold nothing.

    Called with `get_free_memory`, `get_total_memory`, the first card, and what it keeps free beside its own minimum.
    """

    def believe(
        free: Callable[..., Any], total: Callable[..., int], first: torch.device, reserved: int | None = None
    ) -> None:
        believed = {
            "get_free_memory": free,
            "get_total_memory": total,
            "get_torch_device": lambda: first,
            "is_device_cpu": lambda device: device == torch.device("cpu"),
            "vram_state": mm.VRAMState.NORMAL_VRAM,
            "lowvram_available": True,
            "MIN_WEIGHT_MEMORY_RATIO": 0.0,  # as for a card of NVIDIA's
            "EXTRA_RESERVED_VRAM": mm.EXTRA_RESERVED_VRAM if reserved is None else reserved,
            "current_loaded_models": [],
            "soft_empty_cache": lambda *_a, **_k: None,
        }
        for name, value in believed.items():
            monkeypatch.setattr(mm, name, value)

    yield believe
    mm.current_loaded_models.clear()
