"""This package in a real ComfyUI, seen from outside: the log, the node list, prompts through the HTTP API."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.comfy_server import PACKAGE, ComfyServer, Prompt, PromptError, with_inputs
from tools.testbed import REPO

pytestmark = pytest.mark.comfy

NODES = {"Hunyuan3Loader", "Hunyuan3Conditioning", "Hunyuan3Resolution", "Hunyuan3Sampler", "Hunyuan3VAEDecode"}
PROMPT = "A red fox in fresh snow at dawn"
SEED = 20260131
STEPS = 4


@pytest.fixture(scope="module")
def workflow(tiny_checkpoint: Path) -> Prompt:
    """The shipped workflow, set to the tiny checkpoint and to this test's prompt, seed and number of steps."""
    path = REPO / "workflows" / "api" / "text_to_image.json"
    return with_inputs(
        json.loads(path.read_text(encoding="utf-8")),
        {
            "Hunyuan3Loader": {"checkpoint": tiny_checkpoint.name, "dtype": "float32"},
            "Hunyuan3Conditioning": {"prompt": PROMPT},
            "Hunyuan3Sampler": {"seed": SEED, "steps": STEPS},
        },
    )


def test_server_makes_a_picture_with_comfyuis_own_nodes(comfy_server: ComfyServer):
    """Says, when everything below fails, whether ComfyUI itself is at fault."""
    prompt = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 4, "batch_size": 1, "color": 0x0080FF}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "own"}},
    }
    pixels = pictures(comfy_server, comfy_server.queue(prompt))[0]
    assert pixels.shape == (4, 8, 3)
    assert (pixels == (0x00, 0x80, 0xFF)).all()


def test_package_loads_without_an_error_in_the_log(comfy_server: ComfyServer):
    lines = comfy_server.startup_log.splitlines()
    assert any(re.search(r"^ *\d+\.\d seconds", line) and str(comfy_server.placed) in line for line in lines)
    assert log_errors(comfy_server) == []


def test_object_info_lists_our_nodes(comfy_server: ComfyServer):
    info = comfy_server.get("/object_info")
    ours = {name for name, node in info.items() if node["python_module"] == f"custom_nodes.{PACKAGE}"}
    assert ours >= NODES


def test_object_info_offers_the_checkpoint_folder(comfy_server: ComfyServer, tiny_checkpoint: Path):
    loader = comfy_server.get("/object_info/Hunyuan3Loader")["Hunyuan3Loader"]
    assert tiny_checkpoint.name in json.dumps(loader["input"])


def test_shipped_workflow_gives_the_cores_own_picture(
    comfy_server: ComfyServer, workflow: Prompt, tiny_checkpoint: Path
):
    got = pictures(comfy_server, comfy_server.queue(workflow))
    assert len(got) == 1
    np.testing.assert_array_equal(got[0], picture_of_the_core(tiny_checkpoint, workflow))


def test_the_png_tells_what_was_used(comfy_server: ComfyServer, workflow: Prompt, tiny_checkpoint: Path):
    """As the page sends it: with the dictionary whose entries ComfyUI writes into PNG files."""
    prompt = with_seed(with_inputs(workflow, {"Hunyuan3Conditioning": {"trace": "a fox, rewritten"}}), SEED + 7)
    outputs = comfy_server.queue(prompt, extra_data={"extra_pnginfo": {"workflow": {"nodes": []}}})
    image = next(image for node in outputs.values() for image in node.get("images", []))
    text = Image.open(io.BytesIO(comfy_server.view(**image))).text
    (used,) = json.loads(text["hunyuan3"]).values()
    assert (used["steps"], used["seed"], used["checkpoint"]) == (STEPS, SEED + 7, tiny_checkpoint.name)
    assert (used["guidance"], used["shift"]) == (2.5, 3.0), (
        "the checkpoint's own defaults, not the 0 that was asked for"
    )
    assert (used["prompt"], used["trace"]) == (PROMPT, "<recaption>a fox, rewritten</recaption>")
    assert json.loads(text["workflow"]) == {"nodes": []}


def test_next_prompt_works_after_a_refused_one(comfy_server: ComfyServer, workflow: Prompt):
    refused = with_inputs(workflow, {"Hunyuan3Loader": {"checkpoint": "no-such-folder"}})
    with pytest.raises(PromptError, match="no-such-folder"):
        comfy_server.queue(refused)
    assert len(pictures(comfy_server, comfy_server.queue(with_seed(workflow, SEED + 1)))) == 1


def test_next_prompt_works_after_a_failing_one(comfy_server: ComfyServer, workflow: Prompt, tiny_checkpoint: Path):
    """The loader accepts the folder by its files' names; a damaged index shows only when it reads them."""
    broken = comfy_server.base / "models" / "hunyuan3" / "broken"
    broken.mkdir()
    for file in tiny_checkpoint.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    with pytest.raises(PromptError, match="Hunyuan3Loader"):
        comfy_server.queue(with_inputs(workflow, {"Hunyuan3Loader": {"checkpoint": "broken"}}))
    assert len(pictures(comfy_server, comfy_server.queue(with_seed(workflow, SEED + 2)))) == 1


# --- helpers ---------------------------------------------------------------------------------------------------------


def picture_of_the_core(folder: Path, workflow: Prompt) -> np.ndarray:
    """Return the picture (height, width, 3; uint8) that the core makes with the workflow's inputs, without ComfyUI."""
    from hunyuan3.pipeline import Hunyuan3

    sampler = next(node["inputs"] for node in workflow.values() if node["class_type"] == "Hunyuan3Sampler")
    model = Hunyuan3.load(folder, device="cpu", dtype="float32")
    # The workflow asks for the square size of the connected checkpoint's own table: the base size.
    run = model.sample(model.conditioning(PROMPT), seed=SEED, steps=sampler["steps"])
    image = model.decode(run.latents)[0].numpy()  # (height, width, 3), 0 to 1
    return (image * 255.0).clip(0, 255).astype(np.uint8)  # as ComfyUI's SaveImage does


def pictures(server: ComfyServer, outputs: dict) -> list[np.ndarray]:
    """Return the pixels of every picture in a prompt's outputs."""
    images = [image for node in outputs.values() for image in node.get("images", [])]
    return [np.asarray(Image.open(io.BytesIO(server.view(**image))).convert("RGB")) for image in images]


def with_seed(workflow: Prompt, seed: int) -> Prompt:
    """Another seed, so that ComfyUI's cache cannot answer in our place."""
    return with_inputs(workflow, {"Hunyuan3Sampler": {"seed": seed}})


def log_errors(server: ComfyServer) -> list[str]:
    """Return what the log of the start tells of trouble with this package: lines, and tracebacks through its files.

    Other parts of ComfyUI may fail to import for lack of a package; that is known and not looked at.
    """
    ours = str(server.placed)
    trouble = r"IMPORT FAILED|Cannot import|Error while calling|skipping|^Skip "
    found = [line for line in server.startup_log.splitlines() if ours in line and re.search(trouble, line)]
    traceback = r"^Traceback \(most recent call last\):\n(?:[ \t].*\n)*.*$"
    return found + [text for text in re.findall(traceback, server.startup_log, re.MULTILINE) if ours in text]
