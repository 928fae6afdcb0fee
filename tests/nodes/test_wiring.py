"""That each input of a node reaches what it is for. Probe nodes look at what comes out; a cut wire changes it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.nodes.graphs import drawing, node
from tools.comfy_server import ComfyServer, Prompt, PromptInterruptedError

pytestmark = pytest.mark.comfy

SHORT = {"sampling": "greedy", "max_new_tokens": 24}


@pytest.fixture(scope="module")
def loader(tiny_checkpoint: Path) -> dict[str, Any]:
    return node("Hunyuan3Loader", checkpoint=tiny_checkpoint.name, dtype="float32")


def picture(width: int, height: int, color: int = 5000) -> dict[str, Any]:
    return node("EmptyImage", width=width, height=height, batch_size=1, color=color)


def encoded(**inputs: Any) -> dict[str, Any]:
    return node("Hunyuan3ImageConditioning", model=["loader", 0], **inputs)


def text_of(server: ComfyServer, graph: Prompt, name: str) -> str:
    return server.queue(graph)[name]["text"][0]


def rows(server: ComfyServer, loader: dict[str, Any], more: Prompt | None = None, **inputs: Any) -> list[str]:
    """What the conditioning node lays out: text, posterior, sizes of its pictures."""
    defaults = {"model": ["loader", 0], "prompt": "a fox", "width": 64, "height": 64}
    graph = {
        "loader": loader,
        "conditioning": node("Hunyuan3Conditioning", **defaults | inputs),
        "rows": node("Hunyuan3TestRows", model=["loader", 0], conditioning=["conditioning", 0]),
    }
    return server.queue(graph | (more or {}))["rows"]["text"]


# --- Conditioning -----------------------------------------------------------------------------------------------------


def test_conditioning_lays_out_what_it_is_given(probed_server: ComfyServer, loader: dict):
    text, posterior = rows(
        probed_server, loader, trace="a red fox", system_prompt="custom", custom_system_prompt="Be kind."
    )
    assert text.startswith(
        "<|startoftext|>Be kind.\n\nUser: a fox\n\nAssistant: <recaption>a red fox</recaption><answer>"
    )
    assert posterior == "fixed"
    assert "Be kind" not in rows(probed_server, loader, system_prompt="None", custom_system_prompt="Be kind.")[0]


def test_dynamic_system_prompt_goes_by_the_trace(probed_server: ComfyServer, loader: dict):
    traces = ("", "<recaption>a</recaption>", "<think>a</think><recaption>b</recaption>")
    systems = {
        rows(probed_server, loader, trace=trace, system_prompt="dynamic")[0].split("User:")[0] for trace in traces
    }
    assert len(systems) == 3


def test_conditioning_goes_on_from_a_conversation(probed_server: ComfyServer, loader: dict):
    ask = node("Hunyuan3Ask", model=["loader", 0], prompt="who are you?", seed=1, max_new_tokens=3)
    text = rows(probed_server, loader, {"ask": ask}, conversation=["ask", 1])[0]
    assert "User: who are you?\n\nAssistant: <answer>" in text
    assert text.index("who are you?") < text.index("User: a fox")


@pytest.mark.parametrize("posterior", ["fixed", "reference"])
def test_pictures_come_in_the_order_of_their_sockets(probed_server: ComfyServer, loader: dict, posterior: str):
    more = {
        "one": picture(64, 48),
        "two": picture(48, 80),
        "three": picture(96, 32),
        "images": encoded(image_1=["one", 0], image_2=["two", 0], image_3=["three", 0], posterior=posterior),
    }
    told = rows(probed_server, loader, more, images=["images", 0])
    assert told[1:] == [posterior, "64x48", "48x80", "96x32"]


def test_aligned_picture_gets_its_shape_back(probed_server: ComfyServer, loader: dict):
    """The drawn picture has a trained shape; with `align` the decoder gives it that of its input."""
    sizes = {}
    for align in (True, False):
        graph = drawing(
            loader["inputs"]["checkpoint"], conditioning={"images": ["images", 0], "width": 288, "height": 224}
        )
        graph |= {"one": picture(300, 240), "images": encoded(image_1=["one", 0], align=align)}
        graph["decode"]["inputs"]["images"] = ["images", 0]
        graph["sampler"]["inputs"]["steps"] = 1
        (image,) = probed_server.queue(graph)["show"]["images"]
        sizes[align] = Image.open(io.BytesIO(probed_server.view(**image))).size
    assert sizes[False] == (288, 224)
    assert sizes[True] != (288, 224)
    assert abs(sizes[True][0] / sizes[True][1] - 300 / 240) < 0.02


# --- Think and Ask ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Hunyuan3Think", "Hunyuan3Ask"])
def test_texts_depend_on_all_that_is_read(probed_server: ComfyServer, loader: dict, kind: str):
    """Greedy words of random weights: any other beginning gives other words."""
    more = {
        "loader": loader,
        "one": picture(64, 48),
        "images": encoded(image_1=["one", 0]),
        "before": node("Hunyuan3Ask", model=["loader", 0], prompt="who?", seed=1, max_new_tokens=3),
    }
    said = []
    for inputs in (
        {},
        {"prompt": "a hare"},
        {"system_prompt": "custom", "custom_system_prompt": "Be kind."},
        {"system_prompt": "custom", "custom_system_prompt": "Be brief."},
        {"images": ["images", 0]},
        {"conversation": ["before", 1]},
    ):
        graph = more | {"text": node(kind, **{"model": ["loader", 0], "prompt": "a fox", "seed": 1} | SHORT | inputs)}
        if "images" not in inputs:
            graph = {name: graph[name] for name in graph if name not in ("one", "images")}
        if "conversation" not in inputs:
            del graph["before"]
        said.append(text_of(probed_server, graph, "text"))
    assert len(set(said)) == len(said), said


# --- what was computed once -------------------------------------------------------------------------------------------


def counted(loader: dict[str, Any], seed: int) -> Prompt:
    graph = drawing(loader["inputs"]["checkpoint"], sampler={"seed": seed, "steps": 2})
    graph["count"] = node("Hunyuan3TestCount", model=["loader", 0], cancel_after=0)
    graph["sampler"]["inputs"]["model"] = ["count", 0]
    graph["watch"] = node("Hunyuan3TestWatch", model=["loader", 0], name="reuse", after=["decode", 0])
    return graph


def test_new_seed_computes_no_prompt_again_and_what_is_kept_is_counted(probed_server: ComfyServer, loader: dict):
    """128x64 pixels are 4x8 picture tokens, before them <timestep>, after them <eoi>, </answer> and two line ends."""
    probed_server.post("/free", {"unload_models": True, "free_memory": True})
    tokens = []
    for seed in (1, 2, 3):
        graph = counted(loader, seed)
        before = probed_server.get("/hunyuan3_probe")["counts"]["tokens"] if tokens else 0
        probed_server.queue(graph)
        told = probed_server.get("/hunyuan3_probe")
        tokens.append(told["counts"]["tokens"] - before)
        kept, beside_weights = told["kept"]["reuse"]
        assert kept > 0
        assert kept == beside_weights, "the patcher counts it"
    drawing_alone = 2 * (
        2 * (1 + 4 * 8) + 4
    )  # branches * (steps * (control + picture) + what stands after the picture)
    assert tokens[0] > drawing_alone + 20, "the first drawing reads its prompt"
    assert tokens[1] == tokens[2] == drawing_alone


def test_cancel_while_writing_stops_before_the_next_layer(probed_server: ComfyServer, loader: dict):
    """Pressed inside a layer, by the probe: not one layer more may run, neither of the prompt nor of a token."""
    for cancel_after in (2, 40):
        graph = {
            "loader": loader,
            "count": node("Hunyuan3TestCount", model=["loader", 0], cancel_after=cancel_after),
            "think": node("Hunyuan3Think", model=["count", 0], prompt=f"cancel {cancel_after}", seed=1),
        }
        with pytest.raises(PromptInterruptedError):
            probed_server.queue(graph)
        counts = probed_server.get("/hunyuan3_probe")["counts"]
        assert counts["calls"] == cancel_after
        assert counts["after_cancel"] == 0
