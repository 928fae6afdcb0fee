"""The trained tiny checkpoint in a real ComfyUI: pictures and words that mean what was asked, by a detector that uses
no network (training/detect.py).

Seeds are fixed. What is asked for is bounded by what the model card says it can do, generously.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools.comfy_server import ComfyServer, with_inputs
from tools.testbed import REPO
from training.detect import Found, detect

pytestmark = pytest.mark.comfy

TRAINED = REPO / "checkpoints" / "hunyuan3-tiny-instruct"
WORKFLOWS = REPO / "workflows" / "api"
ASKED = (  # one object each: (prompt, colour, shape)
    ("a red circle on a white background", "red", "circle"),
    ("a blue square on a yellow background", "blue", "square"),
    ("a big purple triangle on a white background", "purple", "triangle"),
    ("a green star in the middle on a white background", "green", "star"),
    ("a black square on a white background", "black", "square"),
    ("a blue circle in the middle on a white background", "blue", "circle"),
)


@pytest.fixture(scope="module")
def server(comfyui: Path) -> Iterator[ComfyServer]:
    import sys

    with ComfyServer(comfyui, Path(sys.executable), checkpoints={TRAINED.name: TRAINED}) as server:
        yield server


def run(server: ComfyServer, name: str, **inputs: dict[str, Any]) -> tuple[dict[str, Any], Found]:
    """(outputs by node type, what the picture shows) of a shipped workflow with some inputs replaced."""
    prompt = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    prompt = with_inputs(prompt, {"Hunyuan3Loader": {"checkpoint": TRAINED.name}, **inputs})
    outputs = server.queue(prompt)
    by_type = {prompt[number]["class_type"]: output for number, output in outputs.items()}
    (image,) = by_type["SaveImage"]["images"]
    return by_type, detect(Image.open(io.BytesIO(server.view(**image))).convert("RGB"))


def drawn(server: ComfyServer, text: str, seed: int = 1) -> Found:
    wanted = {"prompt": text, "width": 128, "height": 128}
    found = run(server, "text_to_image_instruct", Hunyuan3Conditioning=wanted, Hunyuan3Sampler={"seed": seed})
    return found[1]


def test_drawings_show_what_was_asked_for(server: ComfyServer):
    right = {"colour": 0, "shape": 0}
    for text, colour, shape in ASKED:
        (largest, *_others) = drawn(server, text).objects
        right["colour"] += largest.colour == colour
        right["shape"] += largest.shape == shape
    assert right["colour"] >= len(ASKED) - 1, right
    assert right["shape"] >= len(ASKED) - 2, right


def test_the_background_is_the_one_asked_for(server: ComfyServer):
    for colour in ("white", "yellow", "blue"):
        background = drawn(server, f"a red square on a {colour} background").background
        assert (background.kind, background.colour) == ("plain", colour)


def test_a_rewrite_names_what_was_asked_for_and_is_drawn(server: ComfyServer):
    outputs, found = run(
        server,
        "think_and_draw",
        PrimitiveStringMultiline={"value": "a red circle"},
        Hunyuan3Think={"task": "recaption", "max_new_tokens": 160, "seed": 1},
        Hunyuan3Sampler={"seed": 1},
    )
    (text,) = outputs["Hunyuan3Think"]["text"]
    assert "<recaption>" in text
    assert "red" in text
    assert "circle" in text
    assert found.objects[0].colour == "red"
    assert found.objects[0].shape == "circle"


def test_a_seed_gives_the_same_picture_again(server: ComfyServer):
    text = "a blue square on a yellow background"
    first, other, again = (drawn(server, text, seed) for seed in (1, 2, 1))
    assert first == again != other
