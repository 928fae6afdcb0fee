"""Think, Ask and Image Conditioning in a real ComfyUI: their text in the history, Cancel, missing and many pictures."""

from __future__ import annotations

import io
import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.nodes.graphs import node
from tests.nodes.listener import Listener
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


# --- text on its way --------------------------------------------------------------------------------------------------


def test_text_streams_to_whoever_listens(comfy_server: ComfyServer, loader: dict):
    """Without a page: the messages of the websocket, each with the whole text so far and the prompt it belongs to."""
    many = {"sampling": "custom", "top_k": 1, "repetition_penalty": 0.3, "max_new_tokens": 400}
    with Listener(comfy_server) as page:
        prompt_id = comfy_server.submit(thinking(loader, seed=21, **many))
        told = page.follow(prompt_id)
    streamed = [event.data for event in told.events if event.kind == "hunyuan3.text"]
    assert {message["node"] for message in streamed} == {"think"}
    assert {message["prompt_id"] for message in streamed} == {prompt_id}
    stages = [message["stage"] for message in streamed]
    assert stages[0] == "think"
    assert stages[-1] == "done"
    texts = [message["text"] for message in streamed]
    assert len(texts) > 3
    assert len(set(texts)) > 2, "the text grows"
    for earlier, later in itertools.pairwise(texts[:-1]):
        assert later.startswith(earlier)
    assert texts[-1] == told.outputs["think"]["text"][0]


def test_text_of_a_prompt_without_a_client_goes_to_nobody(comfy_server: ComfyServer, loader: dict):
    """Sent to all, it would appear on any open page that has a node of the same number."""
    with Listener(comfy_server) as page:
        prompt_id = comfy_server.post("/prompt", {"prompt": thinking(loader, seed=25)})["prompt_id"]
        assert comfy_server.wait(prompt_id)["think"]["text"]
        page.run(thinking(loader, seed=26))  # its messages come after all of the other's
        told = [event.data["prompt_id"] for event in page._events if event.kind == "hunyuan3.text"]
        own = next(i for i, event in enumerate(page._events) if event.data.get("prompt_id") not in (None, prompt_id))
        lines = [event for event in page._events[:own] if event.kind == "text"]
    assert told
    assert prompt_id not in told
    assert not lines, "nor as ComfyUI's own progress text"


def test_a_new_image_seed_leaves_what_was_thought(comfy_server: ComfyServer, loader: dict):
    def drawing(seed: int) -> Prompt:
        size = {"width": 64, "height": 64, "trace": ["think", 2]}
        return thinking(loader, seed=31) | {
            "conditioning": node("Hunyuan3Conditioning", model=["loader", 0], prompt="a fox", **size),
            "sampler": node(
                "Hunyuan3Sampler", model=["loader", 0], conditioning=["conditioning", 0], seed=seed, steps=1
            ),
            "decode": node("Hunyuan3VAEDecode", model=["loader", 0], samples=["sampler", 0]),
            "show": node("PreviewImage", images=["decode", 0]),
        }

    with Listener(comfy_server) as page:
        first = page.run(drawing(1))
        second = page.run(drawing(2))
    assert "think" in first.executed
    assert "sampler" in second.executed
    assert {"loader", "think", "conditioning"} <= second.cached


def test_what_was_thought_is_in_the_png(comfy_server: ComfyServer, loader: dict):
    """Also where no sampler of ours is in the graph."""
    prompt = thinking(loader, seed=41) | {
        "picture": node("EmptyImage", width=["think", 3], height=["think", 4], batch_size=1, color=7),
        "save": node("SaveImage", images=["picture", 0], filename_prefix="said"),
    }
    outputs = comfy_server.queue(prompt, extra_data={"extra_pnginfo": {"workflow": {"nodes": []}}})
    saved = comfy_server.view(**outputs["save"]["images"][0])
    said = json.loads(Image.open(io.BytesIO(saved)).text["hunyuan3"])["think"]
    assert said["text"] == outputs["think"]["text"][0].rsplit("\n\n", 1)[0]
    assert (said["seed"], said["prompt"], said["checkpoint"]) == (41, "a fox", loader["inputs"]["checkpoint"])


# --- hard inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "🦊🎨 in the snow",
        "雪地里的狐狸",
        "ثعلب في الثلج",
        "a sign: <img><think></recaption><|endoftext|>",
        "fox " * 5000,
    ],
    ids=["empty", "emoji", "Chinese", "right to left", "control tokens", "20,000 characters"],
)
def test_any_words_can_be_thought_about(comfy_server: ComfyServer, loader: dict, prompt: str):
    text = comfy_server.queue(thinking(loader, prompt=prompt, max_new_tokens=4, seed=51))["think"]["text"][0]
    assert text.startswith("<think>")


def test_a_prompt_past_the_limit_is_refused_with_both_numbers(comfy_server: ComfyServer, loader: dict):
    with pytest.raises(PromptError, match=r"\d{5} tokens.* 22800"):
        comfy_server.queue(thinking(loader, prompt="fox in the tall grass " * 20000))


def test_hard_pictures_are_looked_at(comfy_server: ComfyServer, loader: dict):
    """As ComfyUI's LoadImage gives them: transparent, grey, palette, 16 bits, rotated, very tall, one pixel."""
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    plain = Image.fromarray(colours)
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "plain.png": (plain, {}),
        "transparent.png": (plain.convert("RGBA"), {}),
        "grey.png": (plain.convert("L"), {}),
        "palette.png": (plain.convert("P"), {}),
        "as palette.png": (plain.convert("P").convert("RGB"), {}),
        "sixteen.png": (Image.fromarray(colours[:, :, 0].astype(np.uint16) * 257), {}),
        "turned.png": (plain, {"exif": turned}),
        "as turned.png": (plain.transpose(Image.Transpose.ROTATE_270), {}),
        "tall.png": (plain.resize((4, 900)), {}),
        "pixel.png": (plain.resize((1, 1)), {}),
    }
    texts = {}
    for name, (picture, options) in files.items():
        picture.save(comfy_server.base / "input" / name, **options)
        graph = thinking(loader, images=["images", 0], max_new_tokens=24, seed=61, sampling="greedy") | {
            "load": node("LoadImage", image=name),
            "images": node("Hunyuan3ImageConditioning", model=["loader", 0], image_1=["load", 0]),
        }
        texts[name] = comfy_server.queue(graph)["think"]["text"][0]
    # Seen alike where they look alike, and not where they do not.
    assert texts["turned.png"] == texts["as turned.png"]
    assert texts["palette.png"] == texts["as palette.png"]
    assert texts["transparent.png"] == texts["plain.png"]
    assert len({texts[name] for name in ("plain.png", "turned.png", "tall.png", "pixel.png")}) == 4, texts


def test_an_unreadable_picture_is_an_error_and_the_next_prompt_runs(comfy_server: ComfyServer, loader: dict):
    (comfy_server.base / "input" / "broken.png").write_bytes(b"no picture")
    graph = thinking(loader, images=["images", 0], seed=71) | {
        "load": node("LoadImage", image="broken.png"),
        "images": node("Hunyuan3ImageConditioning", model=["loader", 0], image_1=["load", 0]),
    }
    with pytest.raises(PromptError, match="LoadImage"):
        comfy_server.queue(graph)
    assert comfy_server.queue(thinking(loader, seed=71))["think"]["text"][0].startswith("<think>")


def test_more_pictures_than_it_was_trained_with_are_warned_of(comfy_server: ComfyServer, loader: dict):
    graph = thinking(loader, images=["images", 0], max_new_tokens=2, seed=81) | {
        "batch": node("EmptyImage", width=64, height=64, batch_size=4, color=255),
        "images": node("Hunyuan3ImageConditioning", model=["loader", 0], image_1=["batch", 0]),
    }
    with Listener(comfy_server) as page:
        told = page.run(graph)
    assert "4 pictures (trained for up to 3)" in told.texts("images")
    assert "4 input pictures; the model was trained with up to 3" in comfy_server.log_text()


# --- several turns ----------------------------------------------------------------------------------------------------


def test_a_drawn_picture_is_the_models_turn(probed_server: ComfyServer, loader: dict):
    """The reference files every picture of a message list under the assistant; here each belongs to who showed it."""
    graph = thinking(loader, seed=91, images=["given", 0], max_new_tokens=6) | {
        "photo": node("EmptyImage", width=64, height=64, batch_size=1, color=9),
        "given": node("Hunyuan3ImageConditioning", model=["loader", 0], image_1=["photo", 0]),
        "picture": node("EmptyImage", width=64, height=96, batch_size=1, color=99),
        "drawn": node("Hunyuan3ImageConditioning", model=["loader", 0], image_1=["picture", 0]),
        "continue": node("Hunyuan3Continue", model=["loader", 0], conversation=["think", 5], images=["drawn", 0]),
        "again": node(
            "Hunyuan3Think", model=["loader", 0], prompt="now at night", seed=1, conversation=["continue", 0],
            max_new_tokens=6,
        ),
        "turns": node("Hunyuan3TestTurns", conversation=["again", 5]),
    }  # fmt: skip
    outputs = probed_server.queue(graph)
    lines = outputs["turns"]["text"]
    thought, thought_again = (outputs[name]["text"][0].rsplit("\n\n", 1)[0] for name in ("think", "again"))
    assert lines == [
        "user: InputPicture",
        "user: a fox",
        f"assistant: {thought}",
        "assistant: InputPicture",
        "user: now at night",
        f"assistant: {thought_again}",
    ]


def test_reference_posterior_reaches_the_text_and_stays_with_the_conversation(comfy_server: ComfyServer, loader: dict):
    """Drawn from the text's own seed: greedy words about a picture then differ by seed, with the fixed one never."""

    def ask(posterior: str, seed: int) -> str:
        greedy = {"sampling": "greedy", "max_new_tokens": 24, "prompt": "what is it?", "images": ["images", 0]}
        graph = {
            "loader": loader,
            "photo": node("EmptyImage", width=64, height=64, batch_size=1, color=5000),
            "images": node("Hunyuan3ImageConditioning", model=["loader", 0], image_1=["photo", 0], posterior=posterior),
            "ask": node("Hunyuan3Ask", model=["loader", 0], seed=seed, **greedy),
        }
        return comfy_server.queue(graph)["ask"]["text"][0]

    assert len({ask("fixed", seed) for seed in range(4)}) == 1
    assert len({ask("reference", seed) for seed in range(4)}) > 1
