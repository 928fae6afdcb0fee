"""Mistakes and damage, one after the other, in one running ComfyUI: each says in its node what is wrong and what to do.

After every one of them the next drawing succeeds, in the same server.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.nodes.graphs import decoding, drawing, node
from tools.comfy_server import MODELS, ComfyServer, Prompt, PromptError

pytestmark = pytest.mark.comfy

SHARDS = ("model-0001-of-0002.safetensors", "model-0002-of-0002.safetensors")
_seeds = count(1000)


@pytest.fixture
def server(probed_server: ComfyServer) -> Iterator[ComfyServer]:
    """A ComfyUI that still draws after the test."""
    yield probed_server
    outputs = probed_server.queue(drawing(sampler={"seed": next(_seeds), "steps": 1, "preview": "off"}))
    assert outputs["show"]["images"]


@pytest.fixture
def folder(probed_server: ComfyServer, tiny_checkpoint: Path) -> Path:
    """A sound checkpoint of this test's own, to be damaged."""
    folder = probed_server.base / "models" / MODELS / f"damaged-{next(_seeds)}"
    return shutil.copytree(tiny_checkpoint, folder, copy_function=shutil.copyfile)


# --- damaged folders --------------------------------------------------------------------------------------------------


def header(content: Any, length: int | None = None, data: bytes = b"") -> Callable[[Path], object]:
    """Puts a safetensors file with this header in a shard's place; `length` says how long it claims to be."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: (folder / SHARDS[1]).write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + data
    )


def edit_json(name: str, **changes: Any) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")

    return damage


def truncate(folder: Path) -> None:
    shard = folder / SHARDS[1]
    shard.write_bytes(shard.read_bytes()[:-1000])


def dangling_link(folder: Path) -> None:
    (folder / SHARDS[1]).unlink()
    try:
        (folder / SHARDS[1]).symlink_to(folder / "blobs" / "gone")
    except OSError:
        pytest.skip("links are not allowed here")


def change_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SHARDS[1])
        name = next(name for name in sorted(tensors) if name.startswith("model.layers") and tensors[name].ndim == 2)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, folder / SHARDS[1])

    return damage


def forget_token(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<boi>"]
    content["model"]["vocab"].pop("<boi>", None)
    path.write_text(json.dumps(content), encoding="utf-8")


AGAIN = "Download this file again"
HUGE = {"w": {"dtype": "BF16", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}
OVERLAP = {
    "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
}
DAMAGES = {
    "missing shard": (lambda folder: (folder / SHARDS[1]).unlink(), [SHARDS[1], "is missing", AGAIN]),
    "dangling link": (dangling_link, [SHARDS[1], "link to a file that does not exist", AGAIN]),
    "truncated shard": (truncate, [SHARDS[1], "damaged", AGAIN]),
    "empty shard": (lambda folder: (folder / SHARDS[1]).write_bytes(b""), [SHARDS[1], "damaged", AGAIN]),
    "git lfs pointer": (
        lambda folder: (folder / SHARDS[1]).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        [SHARDS[1], "damaged or not a safetensors file", AGAIN],
    ),
    "header longer than the file": (header({}, length=2**62), [SHARDS[1], "damaged", AGAIN]),
    "header that is no JSON": (header(b"{" * 5000), [SHARDS[1], "damaged", AGAIN]),
    "header that is no text": (header(b"\xff\xfe{}"), [SHARDS[1], "damaged", AGAIN]),
    "tensors past the end": (
        header({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
        [SHARDS[1], "damaged", AGAIN],
    ),
    "shape that overflows": (header(HUGE), [SHARDS[1], "damaged", AGAIN]),
    "overlapping tensors": (header(OVERLAP, data=b"\0" * 4), [SHARDS[1], "damaged", AGAIN]),
    "sound shard of something else": (
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, data=b"\0" * 4),
        ["not in their shards", SHARDS[1], "Download that shard again"],
    ),
    "wrong shape": (change_tensor(lambda tensor: tensor[:-1]), ["1 of the wrong shape", "model.layers", "in the file"]),
    "eight-bit weights": (
        change_tensor(lambda tensor: tensor.to(torch.float8_e4m3fn)),
        ["1 in a format that is not read", "model.layers", "F8_E4M3"],
    ),
    "index that is no JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors.index.json"],
    ),
    "index that is a list": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        ["model.safetensors.index.json"],
    ),
    "index that leads out of the folder": (
        edit_json("model.safetensors.index.json", weight_map={"w": "../tiny-instruct/" + SHARDS[0]}),
        ["model.safetensors.index.json", "outside its folder"],
    ),
    "config that is no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), ["config.json"]),
    "unknown value in the config": (edit_json("config.json", hidden_act="relu"), ["config.json", "hidden_act", "relu"]),
    "unknown attention in the config": (
        edit_json("config.json", cond_token_attn_type="sideways"),
        ["config.json", "cond_token_attn_type", "sideways"],
    ),
    "text for a number in the config": (
        edit_json("config.json", num_hidden_layers="three"),
        ["config.json", "num_hidden_layers"],
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ["tokenizer.json", "missing"]),
    "tokenizer of something else": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        ["tokenizer.json", "not a usable tokenizer"],
    ),
    "tokenizer without a token": (forget_token, ["<boi>", "tokenizer.json"]),
    "no generation config": (
        lambda folder: (folder / "generation_config.json").unlink(),
        ["generation_config.json"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folder(server: ComfyServer, folder: Path, name: str):
    damage, parts = DAMAGES[name]
    damage(folder)
    message = failure(server, drawing(folder.name), "loader")
    assert [part for part in parts if part not in message] == []


def test_folder_repaired_after_the_error(server: ComfyServer, folder: Path):
    """The way out that the message names is one: no restart, no other field to touch."""
    whole = (folder / SHARDS[1]).read_bytes()
    truncate(folder)
    failure(server, drawing(folder.name), "loader")
    (folder / SHARDS[1]).write_bytes(whole)
    server.queue(drawing(folder.name, sampler={"preview": "off"}))


def test_shard_that_breaks_after_the_loader_ran(server: ComfyServer, folder: Path):
    """The folder was sound when it was opened; the error comes while the weights are read, and leaves none behind."""
    server.queue(only_loaded(folder.name))
    whole = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).unlink()  # not written over: the old file may be mapped
    (folder / SHARDS[1]).write_bytes(whole[:-1000])
    message = failure(server, drawing(folder.name, sampler={"preview": "off"}), "sampler")
    assert SHARDS[1] in message
    assert AGAIN in message
    (folder / SHARDS[1]).unlink()
    message = failure(server, drawing(folder.name, sampler={"preview": "off"}), "sampler")
    assert SHARDS[1] in message
    (folder / SHARDS[1]).write_bytes(whole)
    assert server.queue(drawing(folder.name, sampler={"preview": "off"}))["show"]["images"]


def test_folder_that_goes_away(server: ComfyServer, folder: Path):
    server.queue(only_loaded(folder.name))
    folder.rename(folder.with_name(folder.name + "-moved"))
    with pytest.raises(PromptError, match=folder.name):
        server.queue(drawing(folder.name, sampler={"preview": "off"}))


# --- mistakes in the graph --------------------------------------------------------------------------------------------


def through_links(prompt: Prompt, target: str, **numbers: str) -> Prompt:
    """Gives inputs their values through links, past the limits that ComfyUI checks in fields."""
    for name, number in numbers.items():
        whole = number.lstrip("-").isdigit()
        source = node("PrimitiveInt", value=int(number)) if whole else node("Hunyuan3TestNumber", number=number)
        prompt[f"{name} source"] = source
        prompt[target]["inputs"][name] = [f"{name} source", 0]
    return prompt


LINKED = [
    ("conditioning", "width", "0", ["width is 0", "multiple of 16"]),
    ("conditioning", "width", "-64", ["width is -64", "multiple of 16"]),
    ("conditioning", "height", "100", ["height is 100", "multiple of 16", "like 96"]),
    ("sampler", "steps", "-1", ["steps is -1", "must not be negative"]),
    ("sampler", "seed", "-1", ["seed is -1", "2**64 - 1"]),
    ("sampler", "batch_size", "0", ["batch_size is 0", "at least 1"]),
    ("sampler", "guidance", "nan", ["guidance is nan"]),
    ("sampler", "shift", "-1.5", ["shift is -1.5", "must not be negative"]),
    ("sampler", "denoise", "1.5", ["denoise is 1.5", "from 0 to 1"]),
    ("decode", "tile_size", "16", ["tile", "at least 32", "16"]),
    ("decode", "tile_size", "-64", ["tile", "at least 32", "-64"]),
]


@pytest.mark.parametrize(("target", "name", "number", "parts"), LINKED)
def test_number_out_of_range_through_a_link(server: ComfyServer, target: str, name: str, number: str, parts: list[str]):
    message = failure(server, through_links(drawing(), target, **{name: number}), target)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"conditioning": {"width": 0}}, ["width"]),
        ({"sampler": {"steps": -1}}, ["steps"]),
        ({"sampler": {"seed": 2**64}}, ["seed"]),
        ({"sampler": {"noise": "loud"}}, ["noise", "loud"]),
        ({"loader": {"variant": "small"}}, ["variant", "small"]),
    ],
)
def test_field_out_of_range_is_refused_before_anything_runs(
    server: ComfyServer, changes: dict[str, dict[str, Any]], parts: list[str]
):
    with pytest.raises(PromptError) as caught:
        server.queue(drawing(**changes))
    assert [part for part in parts if part not in str(caught.value)] == []


WRONG_LATENTS = [
    ("1,16,4,8", "nan", ["not finite"]),
    ("1,16,4,8", "inf", ["not finite"]),
    ("1,4,4,8", "noise", ["[1, 4, 4, 8]", "another model"]),
    ("1,16,1,4,8", "noise", ["[1, 16, 1, 4, 8]", "another model"]),
    ("0,16,4,8", "noise", ["[0, 16, 4, 8]"]),
    ("1,16,0,8", "noise", ["[1, 16, 0, 8]"]),
]


@pytest.mark.parametrize(("shape", "fill", "parts"), WRONG_LATENTS)
def test_latent_that_cannot_be_decoded(server: ComfyServer, shape: str, fill: str, parts: list[str]):
    message = failure(server, decoding(node("Hunyuan3TestLatent", shape=shape, fill=fill, seed=0)), "decode")
    assert [part for part in ["samples", *parts] if part not in message] == []


@pytest.mark.parametrize(
    ("shape", "fill", "parts"),
    [*WRONG_LATENTS, ("1,16,8,8", "noise", ["128x128", "128x64"]), ("3,16,4,8", "noise", ["batch_size is 2", "3"])],
)
def test_latent_that_cannot_be_drawn_from(server: ComfyServer, shape: str, fill: str, parts: list[str]):
    prompt = drawing(sampler={"latent": ["latent", 0], "denoise": 0.5, "batch_size": 2})
    prompt["latent"] = node("Hunyuan3TestLatent", shape=shape, fill=fill, seed=0)
    message = failure(server, prompt, "sampler")
    assert [part for part in ["latent", *parts] if part not in message] == []


@pytest.mark.parametrize("other", ["EmptyLatentImage", "EmptySD3LatentImage", "EmptyHunyuanLatentVideo"])
def test_latent_of_comfyuis_own_models(server: ComfyServer, other: str):
    known = server.get(f"/object_info/{other}")[other]["input"]["required"]
    fields = {name: options["default"] for name, (_kind, options) in known.items()}
    fields |= {"width": 128, "height": 64}
    prompt = decoding(node(other, **fields))
    if other == "EmptySD3LatentImage":  # 16 channels, as the tiny checkpoint has: no shape can tell them apart
        server.queue(prompt)
    else:
        assert "another model" in failure(server, prompt, "decode")


def test_part_of_the_latent_to_draw_without_the_latent(server: ComfyServer):
    message = failure(server, drawing(sampler={"denoise": 0.5}), "sampler")
    assert "no latent is given" in message
    assert "Set it to 1" in message


def test_conditioning_of_another_checkpoint(server: ComfyServer, folder: Path):
    prompt = drawing(sampler={"model": ["other", 0]})
    prompt["other"] = node("Hunyuan3Loader", checkpoint=folder.name)
    message = failure(server, prompt, "sampler")
    assert "another checkpoint" in message
    assert "Connect the same model" in message


def test_prompt_longer_than_the_model_reads(server: ComfyServer):
    message = failure(server, drawing(conditioning={"prompt": "fox " * 50_000}), "conditioning")
    assert "22800" in message
    assert len(message) < 1000


def test_prompt_that_is_no_text(server: ComfyServer):
    """Half of a surrogate pair, as a cut-off emoji leaves it."""
    message = failure(server, drawing(conditioning={"prompt": "a fox \ud83e"}), "conditioning")
    assert "half of a character" in message


@pytest.mark.parametrize(("width", "height"), [(8, 64), (64, 15)])
def test_picture_too_small_to_encode(server: ComfyServer, width: int, height: int):
    prompt = drawing(sampler={"latent": ["encode", 0], "denoise": 0.5})
    prompt["picture"] = node("EmptyImage", width=width, height=height, batch_size=1, color=0)
    prompt["encode"] = node("Hunyuan3VAEEncode", model=["loader", 0], pixels=["picture", 0])
    message = failure(server, prompt, "encode")
    assert "pixels" in message


@pytest.mark.parametrize("side", [8192, 2**24])
def test_size_past_what_the_model_reads(server: ComfyServer, side: int):
    """Refused before it is laid out: no memory is asked for."""
    prompt = through_links(drawing(), "conditioning", width=str(side), height=str(side))
    message = failure(server, prompt, "conditioning")
    assert f"{side}x{side}" in message
    assert "smaller size" in message


# --- helpers ----------------------------------------------------------------------------------------------------------


def failure(server: ComfyServer, prompt: Prompt, where: str) -> str:
    """Queue a prompt that must fail in the node `where`, by an error of ours; return its message."""
    with pytest.raises(PromptError) as caught:
        server.queue(prompt)
    error = caught.value.details
    assert error["node_id"] == where, caught.value
    assert error["exception_type"].rsplit(".", 1)[-1] in ERRORS, caught.value
    return error["exception_message"]


ERRORS = {"CheckpointError", "UnsupportedConfigError", "RequestError", "OutOfBudgetError"}


def only_loaded(checkpoint: str) -> Prompt:
    """Runs the loader and what needs no weights."""
    prompt = drawing(checkpoint)
    size = node("Hunyuan3Resolution", ratio="1:1", model=["loader", 0])
    return {"loader": prompt["loader"], "size": size, "show": node("PreviewAny", source=["size", 0])}
