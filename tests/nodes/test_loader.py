"""The loader's formats, packs, budgets and plan in a real ComfyUI."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.nodes.graphs import drawing, node
from tools.comfy_server import MODELS, ComfyServer, Prompt, PromptError
from tools.testbed import REPO

if TYPE_CHECKING:
    from tests.nodes.conftest import ComfyPack

pytestmark = pytest.mark.comfy


def only(checkpoint: str, **inputs: object) -> Prompt:
    return {"loader": node("Hunyuan3Loader", checkpoint=checkpoint, **inputs)} | {
        "size": node("Hunyuan3Resolution", model=["loader", 0], ratio="1:1", width=64, height=64, snap=False),
        "show": node("PreviewAny", source=["size", 0]),
    }


@pytest.fixture(scope="module")
def int8_pack(comfy_server: ComfyServer, tiny_checkpoint: Path) -> str:
    """The tiny checkpoint as a pack beside it, made by the command."""
    name = f"{tiny_checkpoint.name}.int8"  # a dot in its name
    command = [sys.executable, "-m", "hunyuan3.pack", tiny_checkpoint, comfy_server.base / "models" / MODELS / name]
    subprocess.run([*command, "--format", "int8"], cwd=REPO, check=True, capture_output=True)
    return name


def test_plan_is_shown(comfy_server: ComfyServer, tiny_checkpoint: Path):
    chosen, planned = comfy_server.queue(only(tiny_checkpoint.name))["loader"]["text"]
    assert chosen.startswith("instruct, bf16, float32 on cpu")
    assert planned.startswith("Everything fits on cpu.")
    assert "s per step" in planned
    assert "weights" in planned


def test_what_cannot_run_is_refused_with_numbers(comfy_server: ComfyServer, tiny_checkpoint: Path):
    """The tiny transformer takes 1.7 MiB, its VAE and a drawing some more."""
    with pytest.raises(
        PromptError, match=r"cpu has 1\.0 MiB; 3 layers at 1 x 256x256 \(2 rows .* need \d+\.\d MiB there"
    ):
        comfy_server.queue(only(tiny_checkpoint.name, ram_budget=1 / 1024))
    assert comfy_server.queue(only(tiny_checkpoint.name))["loader"]["text"], "the next prompt works"


def test_plan_of_a_smaller_picture_where_the_base_size_does_not_fit(comfy_pack: ComfyPack, tiny_checkpoint: Path):
    modules = {name: sys.modules[f"{comfy_pack.module.__name__}.{name}"] for name in ("nodes.budget", "nodes.plan")}
    core = sys.modules[f"{comfy_pack.module.__name__}.hunyuan3.folder"].ModelFolder.open(tiny_checkpoint)
    folder = replace(core, config=replace(core.config, image_base_size=2048))
    options = sys.modules[f"{comfy_pack.module.__name__}.hunyuan3.parts"].LoadOptions(device="cpu").resolved()
    texts = [
        modules["nodes.plan"].planned(folder, options, modules["nodes.budget"].Budget(ram=mib * 2**20))[1]
        for mib in (8000, 60)
    ]
    assert texts[0].startswith("Everything fits on cpu.")
    assert re.match(r"2048x2048 does not fit, (1024x1024|768x768|512x512) does\.", texts[1])


def test_budget_is_kept_while_drawing(comfy_server: ComfyServer, tiny_checkpoint: Path):
    graph = drawing(tiny_checkpoint.name, loader={"ram_budget": 0.03}, conditioning={"width": 1024, "height": 1024})
    with pytest.raises(PromptError, match=r"the loader's budget\s+allows 0\.03 GiB|cannot be drawn|do(es)? not fit"):
        comfy_server.queue(graph)
    assert comfy_server.queue(drawing(tiny_checkpoint.name))["show"]["images"]


def test_numbers_that_are_no_budget_are_refused(comfy_server: ComfyServer, tiny_checkpoint: Path):
    with pytest.raises(PromptError, match="vram_budget"):
        comfy_server.queue(only(tiny_checkpoint.name, vram_budget=-1.0))


def test_a_pack_is_taken_like_a_folder_and_draws_the_same(
    comfy_server: ComfyServer, tiny_checkpoint: Path, int8_pack: str
):
    pictures = []
    for checkpoint, weight_format in ((int8_pack, "auto"), (tiny_checkpoint.name, "int8")):
        outputs = comfy_server.queue(drawing(checkpoint, loader={"format": weight_format}))
        pictures.append(comfy_server.view(**outputs["show"]["images"][0]))
        assert outputs["loader"]["text"][0].startswith("instruct, int8,")
    assert pixels(pictures[0]) == pixels(pictures[1])


def test_a_pack_in_another_format_is_refused(comfy_server: ComfyServer, int8_pack: str):
    with pytest.raises(PromptError, match="is a pack of 'int8'"):
        comfy_server.queue(only(int8_pack, format="int4"))


@pytest.mark.parametrize("weight_format", ["fp8", "fp8_dynamic", "int8_dynamic", "int4"])
def test_each_format_draws(comfy_server: ComfyServer, tiny_checkpoint: Path, weight_format: str):
    outputs = comfy_server.queue(drawing(tiny_checkpoint.name, loader={"format": weight_format}))
    assert outputs["show"]["images"]
    assert f"instruct, {weight_format}," in outputs["loader"]["text"][0]


def pixels(png: bytes) -> bytes:
    """Of a PNG file, without the graph that is written into it."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).tobytes()
