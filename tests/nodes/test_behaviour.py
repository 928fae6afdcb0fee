"""How the nodes behave in a running ComfyUI: what the page is told, Cancel, caches, memory given back."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hunyuan3 import tiny
from tests.nodes.graphs import decoding, drawing, node
from tests.nodes.listener import Event, Listener, Told
from tools.comfy_server import MODELS, PACKAGE, ComfyServer, Prompt, PromptError, PromptInterruptedError

pytestmark = pytest.mark.comfy

NODES = {
    "Hunyuan3Loader",
    "Hunyuan3Conditioning",
    "Hunyuan3Resolution",
    "Hunyuan3Sampler",
    "Hunyuan3StepCache",
    "Hunyuan3VAEDecode",
    "Hunyuan3VAEEncode",
}
MIB = 2**20


@pytest.fixture
def server(probed_server: ComfyServer) -> ComfyServer:
    """A ComfyUI that holds nothing of earlier tests."""
    emptied(probed_server)
    return probed_server


@pytest.fixture
def page(server: ComfyServer) -> Iterator[Listener]:
    """What the page is told."""
    with Listener(server) as listener:
        yield listener


@pytest.fixture(scope="module")
def big_checkpoint(probed_server: ComfyServer) -> str:
    """Name of a checkpoint that takes a second to load: 6 layers, 400 MB.

    Its banks of experts are over 32 MiB, as real ones are: memory of that size glibc gives back when it is freed.
    """
    with pytest.MonkeyPatch.context() as patch:
        config_of = tiny._config
        patch.setattr(tiny, "_config", lambda *args: config_of(*args) | BIG)
        patch.setattr(tiny, "_random_weight", repeated_weight)
        tiny.make_tiny(probed_server.base / "models" / MODELS / "big")
    return "big"


BIG = {
    "num_hidden_layers": 6,
    "hidden_size": 512,
    "moe_intermediate_size": [320] * 6,
    "num_shared_expert": [1] * 6,
    "num_experts": 64,
    "moe_topk": [2] * 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "attention_head_dim": 64,
    "vit_aligner": {"projector_type": "mlp_gelu", "input_dim": 48, "n_embed": 512, "depth": 2},
}


# --- what is there and what is told ---------------------------------------------------------------------------------


def test_all_nodes_are_listed_with_help_for_every_field(server: ComfyServer):
    info = server.get("/object_info")
    ours = {name: known for name, known in info.items() if known["python_module"] == f"custom_nodes.{PACKAGE}"}
    assert ours.keys() >= NODES
    for known in ours.values():
        assert known["description"]
        fields = {**known["input"].get("required", {}), **known["input"].get("optional", {})}
        assert [name for name, (_kind, options) in fields.items() if not options.get("tooltip")] == []
        assert all(known["output_tooltips"])


def test_page_sees_stages_progress_and_previews(page: Listener):
    """With ComfyUI's default flags, which ask for no previews."""
    told = page.run(drawing(sampler={"steps": 3}))

    stages = [text.split(":")[0] for text in told.texts("sampler")]
    order = [stage for i, stage in enumerate(stages) if stage not in stages[:i]]
    assert order[-3:-1] == ["load transformer", "draw"]
    assert set(order[:-3]) <= {"load VAE", "prepare previews (once per VAE)"}
    assert [text for text in told.texts("sampler") if text.startswith("draw")] == [
        f"draw: step {step} of 3" for step in (1, 2, 3)
    ]
    assert told.progress("sampler")[-3:] == [(1, 3), (2, 3), (3, 3)]
    assert "decode" in told.texts("decode")

    previews = told.previews("sampler")
    assert len(previews) == len(told.previews()) == 3
    for preview in previews:
        picture = Image.open(io.BytesIO(preview.picture))
        assert picture.format == "JPEG"
        assert (picture.width, picture.height) == (512, 256)
        assert len(picture.getcolors(maxcolors=2**24)) > 1


def test_previews_reach_a_page_without_metadata(server: ComfyServer):
    with Listener(server, metadata=False) as page:
        told = page.run(drawing(sampler={"steps": 3, "seed": 2}))
    assert told.previews() == []
    assert len([event for event in told.events if event.kind == "old preview"]) == 3


def test_no_previews_when_off(page: Listener):
    told = page.run(drawing(sampler={"preview": "off"}))
    assert told.previews() == []
    assert told.progress("sampler")[-1] == (2, 2)
    assert not [text for text in told.texts("sampler") if "VAE" in text or "preview" in text]


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"weight": 1}', '{"weight": [[1]], "bias": "x"}', '{"weight": [[1, 1, 1]], "bias": [0, 0, 0]}'],
)
def test_damaged_preview_file_counts_as_none(comfy_pack: Any, tmp_path: Path, content: str):
    preview = sys.modules[f"{comfy_pack.module.__name__}.nodes.preview"]
    (tmp_path / "kept.json").write_text(content, encoding="utf-8")
    assert preview._read(tmp_path / "kept.json", channels=16) is None


def test_texts_are_in_the_history(server: ComfyServer):
    prompt_id = server.submit(drawing(sampler={"seed": 77}))
    server.wait(prompt_id)
    outputs = server.history(prompt_id)["outputs"]
    loaded, planned = outputs["loader"]["text"]
    assert "s per step" in planned
    for said in ("tiny-instruct", "float32 on cpu", "experts: loop", "router reference", "attention sdpa"):
        assert said in loaded
    (info,) = outputs["sampler"]["text"]
    for said in ("tiny-instruct", "128x64", "2 steps", "guidance 2.5", "shift 3", "seed 77", "comfy noise"):
        assert said in info


def test_info_names_what_is_not_usual(server: ComfyServer):
    prompt = drawing(
        sampler={"batch_size": 2, "step_cache": ["cache", 0], "latent": ["latent", 0], "denoise": 0.5, "seed": 3}
    )
    prompt["cache"] = node(
        "Hunyuan3StepCache", interval=3, order=1, first_steps=1, last_steps=1, low_order=1, high_order=1
    )
    prompt["latent"] = node("Hunyuan3TestLatent", shape="1,16,4,8", fill="noise", seed=1)
    outputs = server.queue(prompt)
    assert "batch of 2, step cache every 3, denoise 0.5" in outputs["sampler"]["text"][0]
    assert len(outputs["show"]["images"]) == 2


# --- Cancel -----------------------------------------------------------------------------------------------------------


def test_cancel_while_loading(page: Listener, big_checkpoint: str):
    prompt = drawing(big_checkpoint, sampler={"preview": "off"})
    stopped = cancel(page, prompt, told_text("sampler", "load transformer"))
    assert stopped["node_type"] == "Hunyuan3Sampler"
    rest = page.run(prompt)
    assert any("load transformer" in text for text in rest.texts("sampler"))
    # What came in two goes draws what comes in one.
    emptied(page.server)
    np.testing.assert_array_equal(picture(page.server, rest), picture(page.server, page.run(prompt)))


def test_cancel_while_drawing(page: Listener):
    stopped = cancel(page, drawing(sampler={"steps": 1000}), told_text("sampler", "draw: step 3 of 1000"))
    assert stopped["node_type"] == "Hunyuan3Sampler"
    told = page.run(drawing())
    assert not any("load" in text for text in told.texts("sampler"))  # the weights stayed


def test_cancel_while_decoding(page: Listener):
    many = node("Hunyuan3TestLatent", shape="32,16,24,24", fill="noise", seed=1)
    stopped = cancel(page, decoding(many), told_text("decode", "decode"))
    assert stopped["node_type"] == "Hunyuan3VAEDecode"
    page.run(decoding(node("Hunyuan3TestLatent", shape="1,16,4,4", fill="noise", seed=1)))


def test_cancel_while_previews_are_prepared(page: Listener):
    """Once per VAE, when it is first met."""
    tiny.make_tiny(page.server.base / "models" / MODELS / "fresh", seed=7)
    prepared = page.server.base / "user" / "hunyuan3" / "previews"
    before = list(prepared.glob("*"))
    stopped = cancel(page, drawing("fresh"), told_text("sampler", "prepare previews"))
    assert stopped["node_type"] == "Hunyuan3Sampler"
    assert list(prepared.glob("*")) == before
    page.run(drawing("fresh", sampler={"preview": "off"}))


def test_cancel_of_a_waiting_prompt_leaves_the_running_one(page: Listener):
    running = page.server.submit(drawing(sampler={"steps": 30, "seed": 5}))
    waiting = page.server.submit(drawing(sampler={"seed": 6}))
    page.server.interrupt(waiting)  # of a prompt that does not run: nothing to stop
    page.server.post("/queue", {"delete": [waiting]})
    assert page.follow(running).outputs["show"]["images"]


# --- what is kept and what is given back ------------------------------------------------------------------------------


def test_another_seed_draws_again_and_loads_nothing(page: Listener):
    page.run(drawing())
    told = page.run(drawing(sampler={"seed": 2}))
    assert told.cached >= {"loader", "conditioning"}
    assert told.executed == ["sampler", "decode", "show"]
    texts = told.texts("sampler") + told.texts("decode")
    assert not [text for text in texts if "load" in text or "prepare" in text]


def test_the_same_prompt_runs_nothing(page: Listener):
    first = page.run(drawing())
    told = page.run(drawing())
    assert told.executed == []
    assert told.outputs["show"] == first.outputs["show"]


def test_free_lets_the_weights_die(server: ComfyServer):
    prompt = watching("freed")
    before = server.queue(prompt)
    alive = watched(server, "freed")
    assert len(alive) == 5
    assert all(alive.values())
    assert not any(freed(server, "freed").values())
    assert server.get("/hunyuan3_probe")["mapped"] == []
    after = server.queue(prompt)
    np.testing.assert_array_equal(*(pixels(server, run["show"]["images"][0]) for run in (before, after)))


def test_unload_alone_keeps_the_handle(page: Listener):
    """ComfyUI's "Unload models": what is loaded goes, what is cached stays, and the next drawing is the same."""
    first = page.run(watching("unloaded"))
    page.server.post("/free", {"unload_models": True})
    prompt = watching("unloaded")
    prompt["sampler"]["inputs"]["steps"] = 3
    page.run(prompt)
    prompt["sampler"]["inputs"]["steps"] = 2
    again = page.run(prompt)
    assert "loader" in again.cached
    np.testing.assert_array_equal(picture(page.server, first), picture(page.server, again))


def test_model_that_no_prompt_uses_any_more_dies(server: ComfyServer):
    """Another choice in the loader: the old weights make room for the new ones."""
    server.queue(watching("old", sampler={"preview": "off"}))
    server.queue(watching("new", loader={"dtype": "bfloat16"}, sampler={"preview": "off"}))
    assert not any(watched(server, "old").values())
    assert all(watched(server, "new").values())


def test_free_gives_the_memory_back(server: ComfyServer, big_checkpoint: str):
    server.queue(watching("big", big_checkpoint, sampler={"preview": "off"}))
    loaded = resident(server)
    assert not any(freed(server, "big").values())
    until = time.monotonic() + 20  # the objects go first, and then their memory, which another thread may be freeing
    while (given_back := loaded - resident(server)) < 600 and time.monotonic() < until:
        time.sleep(0.1)
    assert given_back > 600, f"of {loaded:.0f}"  # weights: 750


def test_cancelled_and_failed_prompts_keep_nothing_alive(page: Listener):
    server = page.server
    server.queue(watching("troubled"))
    cancel(page, drawing(sampler={"steps": 1000}), told_text("sampler", "draw: step 3 of 1000"))
    failing = decoding(node("Hunyuan3TestLatent", shape="1,16,4,4", fill="nan", seed=0))
    with pytest.raises(PromptError, match="not finite"):
        server.queue(failing)
    assert not any(freed(server, "troubled").values())


def test_memory_stays_flat_over_twenty_prompts(server: ComfyServer, capsys: pytest.CaptureFixture[str]):
    curve = []
    for seed in range(100, 120):
        small = {"prompt": f"fox number {seed}", "width": 64}
        server.queue(drawing(conditioning=small, sampler={"seed": seed}))
        curve.append(resident(server))
    shown = "RSS in MiB after each of 20 prompts: " + " ".join(f"{value:.1f}" for value in curve)
    with capsys.disabled():
        print(f"\n{shown}")  # noqa: T201 (the curve is to be seen in every run)
    assert curve[-1] - curve[-11] < 4, shown


# --- inputs at their limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 - 1])
def test_seeds_up_to_the_limit(server: ComfyServer, seed: int):
    outputs = server.queue(drawing(sampler={"seed": seed, "steps": 1}))
    assert f"seed {seed}," in outputs["sampler"]["text"][0]


@pytest.mark.parametrize("noise", ["device", "reference"])
def test_other_noise_at_the_limit(server: ComfyServer, noise: str):
    outputs = server.queue(drawing(sampler={"seed": 2**64 - 1, "noise": noise, "batch_size": 2, "steps": 1}))
    assert len(outputs["show"]["images"]) == 2


def test_smallest_tile_and_tiles_larger_than_the_picture(server: ComfyServer):
    latent = node("Hunyuan3TestLatent", shape="1,16,4,8", fill="noise", seed=1)
    whole = server.queue(decoding(latent))["show"]["images"][0]
    tiled = server.queue(decoding(latent, tile_size=32))["show"]["images"][0]
    larger = server.queue(decoding(latent, tile_size=4096))["show"]["images"][0]
    assert pixels(server, tiled).shape == (64, 128, 3)
    np.testing.assert_array_equal(pixels(server, whole), pixels(server, larger))


def test_denoise_zero_gives_the_latent_back(server: ComfyServer):
    latent = node("Hunyuan3TestLatent", shape="1,16,4,8", fill="noise", seed=1)
    prompt = drawing(sampler={"latent": ["latent", 0], "denoise": 0.0})
    prompt["latent"] = latent
    same = pixels(server, server.queue(prompt)["show"]["images"][0])
    np.testing.assert_array_equal(same, pixels(server, server.queue(decoding(latent))["show"]["images"][0]))


def test_picture_to_latent_to_picture(server: ComfyServer):
    """A picture whose sides are no multiples of 16, as people's are: cropped, encoded, drawn on."""
    prompt = drawing(sampler={"latent": ["encode", 0], "denoise": 0.5})
    prompt["picture"] = node("EmptyImage", width=135, height=75, batch_size=1, color=0x3366CC)
    prompt["encode"] = node("Hunyuan3VAEEncode", model=["loader", 0], pixels=["picture", 0])
    assert pixels(server, server.queue(prompt)["show"]["images"][0]).shape == (64, 128, 3)


def test_two_checkpoints_in_one_prompt(server: ComfyServer):
    tiny.make_tiny(server.base / "models" / MODELS / "second", "distil", seed=1)
    settings = {"seed": 9, "preview": "off"}
    first, second = drawing(sampler=settings), drawing("second", sampler=settings)
    alone = [server.queue(prompt)["show"]["images"][0] for prompt in (first, second)]
    emptied(server)
    outputs = server.queue({**renamed(first, "a"), **renamed(second, "b")})
    for own, name in zip(alone, ("a show", "b show"), strict=True):
        np.testing.assert_array_equal(pixels(server, own), pixels(server, outputs[name]["images"][0]))
    assert "(instruct)" in outputs["a sampler"]["text"][0]
    assert "(distil)" in outputs["b sampler"]["text"][0]


def test_prompt_saved_before_newer_fields_still_runs(server: ComfyServer):
    """The fields that the nodes require, and nothing else: whatever comes later has a default."""
    prompt = drawing()
    for name, given in prompt.items():
        known = server.get(f"/object_info/{given['class_type']}")[given["class_type"]]["input"]
        if name != "show":
            given["inputs"] = {key: value for key, value in given["inputs"].items() if key in known["required"]}
            assert given["inputs"].keys() == known["required"].keys()
    server.queue(prompt)


def test_replaced_files_are_opened_again(page: Listener):
    folder = page.server.base / "models" / MODELS / "replaced"
    tiny.make_tiny(folder, "instruct", seed=1)
    prompt = drawing("replaced", sampler={"preview": "off"})
    before = picture(page.server, page.run(prompt))
    tiny.make_tiny(folder, "instruct", seed=2)
    told = page.run(prompt)
    assert "loader" in told.executed
    assert (picture(page.server, told) != before).any()


# --- helpers ----------------------------------------------------------------------------------------------------------


def free(server: ComfyServer) -> None:
    """The page's "Unload models and execution cache". Does not wait: see `freed`, `emptied`."""
    server.post("/free", {"unload_models": True, "free_memory": True})


def freed(server: ComfyServer, name: str) -> dict[str, bool]:
    """Free, and return which of the watched objects `name` live on. No prompt is run: that would drop them, too."""
    free(server)
    until = time.monotonic() + 20
    while any((alive := watched(server, name)).values()) and time.monotonic() < until:
        time.sleep(0.1)
    return alive


def emptied(server: ComfyServer) -> None:
    """Free, and wait until that is done: before it takes a second prompt the worker has seen to it."""
    free(server)
    for colour in (1, 2):
        show = node("PreviewImage", images=["empty", 0])
        server.queue({"empty": node("EmptyImage", width=8, height=8, batch_size=1, color=colour), "show": show})


def watched(server: ComfyServer, name: str) -> dict[str, bool]:
    return server.get("/hunyuan3_probe")["alive"][name]


def resident(server: ComfyServer) -> float:
    """The server's memory (RSS) in MiB."""
    return server.get("/hunyuan3_probe")["rss"] / MIB


def watching(name: str, checkpoint: str = "tiny-instruct", **inputs: Any) -> Prompt:
    """A drawing whose model is watched under `name` from when its weights are there."""
    watch = node("Hunyuan3TestWatch", model=["loader", 0], name=name, after=["decode", 0])
    return {**drawing(checkpoint, **inputs), "watch": watch}


def cancel(page: Listener, prompt: Prompt, when: Callable[[Event], bool]) -> dict[str, Any]:
    """Queue a prompt, cancel it as soon as the page is told `when`; return where it stopped."""
    prompt_id = page.server.submit(prompt)
    page.wait_for(when)
    page.server.interrupt()
    with pytest.raises(PromptInterruptedError) as caught:
        page.server.wait(prompt_id)
    assert page.server.history(prompt_id)["status"]["status_str"] == "error"  # ComfyUI's word for it
    return caught.value.details["execution_interrupted"]


def told_text(name: str, beginning: str) -> Callable[[Event], bool]:
    return lambda event: event.kind == "text" and event.node == name and event.data["text"].startswith(beginning)


def renamed(prompt: Prompt, prefix: str) -> Prompt:
    """The prompt with other node names, for a place beside another one."""
    text = json.dumps(prompt)
    for name in prompt:
        text = text.replace(json.dumps(name) + ": {", json.dumps(f"{prefix} {name}") + ": {")
        text = text.replace(f"[{json.dumps(name)}, ", f"[{json.dumps(f'{prefix} {name}')}, ")
    return json.loads(text)


def picture(server: ComfyServer, told: Told) -> np.ndarray:
    return pixels(server, told.outputs["show"]["images"][0])


def pixels(server: ComfyServer, image: dict[str, str]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(server.view(**image))).convert("RGB"))


def repeated_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """As hunyuan3.tiny makes weights, from a short run of random numbers, for speed."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    count = torch.Size(shape).numel()
    values = torch.randn(4096 + 1, generator=torch.Generator().manual_seed(seed)) / torch.Size(shape[1:]).numel() ** 0.5
    values = values.repeat(count // len(values) + 1)[:count].reshape(shape)
    return values if name.endswith("gate.wg.weight") else values.to(torch.bfloat16)
