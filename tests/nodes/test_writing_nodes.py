"""Think, Ask and Image Conditioning in a real ComfyUI: their text in the history, Cancel, missing and many pictures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tools.comfy_server import ComfyServer, Prompt, PromptError, PromptInterruptedError

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def loader(tiny_checkpoint: Path) -> dict:
    return {"class_type": "Hunyuan3Loader", "inputs": {"checkpoint": tiny_checkpoint.name, "dtype": "float32"}}


def thinking(loader: dict, **inputs: object) -> Prompt:
    defaults = {"model": ["loader", 0], "prompt": "a fox", "task": "think_recaption", "seed": 3, "max_new_tokens": 30}
    return {"loader": loader, "think": {"class_type": "Hunyuan3Think", "inputs": defaults | inputs}}


def test_what_was_thought_is_in_the_history_with_its_size(comfy_server: ComfyServer, loader: dict):
    outputs = comfy_server.queue(thinking(loader))
    text = outputs["think"]["text"][0]
    assert text.startswith("<think>")
    assert "x" in text.splitlines()[-1]
    again = comfy_server.queue(thinking(loader, seed=4))["think"]["text"][0]
    assert again != text


def test_a_text_that_was_cut_off_says_so(comfy_server: ComfyServer, loader: dict):
    endless = {"sampling": "custom", "repetition_penalty": 0.5, "max_new_tokens": 8}
    assert "cut off by max_new_tokens" in comfy_server.queue(thinking(loader, **endless))["think"]["text"][0]
    ask = {"class_type": "Hunyuan3Ask", "inputs": {"model": ["loader", 0], "prompt": "what?", "seed": 1, **endless}}
    assert "cut off by max_new_tokens" in comfy_server.queue({"loader": loader, "ask": ask})["ask"]["text"][0]


def test_cancel_stops_thinking_and_the_next_prompt_thinks(comfy_server: ComfyServer, loader: dict):
    again = {"sampling": "custom", "top_k": 1, "repetition_penalty": 0.3}  # the words that stand there, over and over
    long = again | {"max_new_tokens": 12000, "prompt": "an endless story"}
    prompt_id = comfy_server.submit(thinking(loader, **long))
    time.sleep(3)
    assert comfy_server.get("/queue")["queue_running"], "it ended before it could be stopped: ask for more tokens"
    asked = time.monotonic()
    comfy_server.interrupt()
    with pytest.raises(PromptInterruptedError):
        comfy_server.wait(prompt_id, timeout=60)
    assert time.monotonic() - asked < 15
    assert comfy_server.queue(thinking(loader, seed=11))["think"]["text"][0].startswith("<think>")


def test_no_picture_where_one_is_needed_is_an_error(comfy_server: ComfyServer, loader: dict):
    images = {"class_type": "Hunyuan3ImageConditioning", "inputs": {"model": ["loader", 0]}}
    prompt = thinking(loader, images=["images", 0], seed=5) | {"images": images}
    with pytest.raises(PromptError, match="connect at least image_1"):
        comfy_server.queue(prompt)


def test_more_pictures_than_fit_are_refused_with_numbers_before_any_is_encoded(comfy_server: ComfyServer, loader: dict):
    batch = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 400, "color": 255}}
    images = {"class_type": "Hunyuan3ImageConditioning", "inputs": {"model": ["loader", 0], "image_1": ["batch", 0]}}
    prompt = thinking(loader, images=["images", 0], seed=6) | {"images": images, "batch": batch}
    with pytest.raises(PromptError, match=r"400 input pictures take \d+ tokens, the limit is 22800"):
        comfy_server.queue(prompt)
