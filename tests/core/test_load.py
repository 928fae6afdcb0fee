"""Weights into modules: values, dtypes, what a failure or a stop leaves behind, and how much memory it takes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hunyuan3.checkpoint.index import INDEX_NAME, CheckpointIndex
from hunyuan3.checkpoint.load import load_parameters
from hunyuan3.config import VARIANTS, ModelConfig
from hunyuan3.folder import ModelFolder, Networks
from hunyuan3.parts import LoadOptions, place_vae
from hunyuan3.pipeline import Hunyuan3
from tests.core.golden_paths import REPOSITORY

CPU = torch.device("cpu")


class HaltError(Exception):
    pass


def published_tensors(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


def expected_parameter(published, name):
    """The tensor(s) of one parameter, by the names in spec 2.2 and not by the key map."""
    fixed = {
        "wte.weight": "model.wte.weight",
        "lm_head.weight": "lm_head.weight",
        "ln_f.weight": "model.ln_f.weight",
        "layers.1.mlp.router.weight": "model.layers.1.mlp.gate.wg.weight",
        "layers.2.self_attn.qkv_proj.weight": "model.layers.2.self_attn.qkv_proj.weight",
        "layers.0.mlp.shared_mlp.down_proj.weight": "model.layers.0.mlp.shared_mlp.down_proj.weight",
        "time_embed.fc1.weight": "time_embed.mlp.0.weight",
        "time_embed_2.fc2.weight": "time_embed_2.mlp.2.weight",
        "timestep_emb.fc1.weight": "timestep_emb.mlp.0.weight",
        "patch_embed.conv_in.weight": "patch_embed.model.0.weight",
        "patch_embed.block.conv1.weight": "patch_embed.model.1.in_layers.2.weight",
        "patch_embed.block.modulation.weight": "patch_embed.model.1.emb_layers.1.weight",
        "patch_embed.block.conv2.weight": "patch_embed.model.1.out_layers.3.weight",
        "patch_embed.block.skip.weight": "patch_embed.model.1.skip_connection.weight",
        "final_layer.block.conv1.weight": "final_layer.model.0.in_layers.2.weight",
        "final_layer.block.norm2.weight": "final_layer.model.0.out_layers.0.weight",
        "final_layer.norm_out.weight": "final_layer.model.1.0.weight",
        "final_layer.conv_out.weight": "final_layer.model.1.2.weight",
        "guidance_emb.fc2.weight": "guidance_emb.mlp.2.weight",
        "timestep_r_emb.fc1.weight": "timestep_r_emb.mlp.0.weight",
    }
    if name in fixed:
        return published[fixed[name]]
    layer, kind = name.removeprefix("layers.").split(".mlp.experts.")
    published_kind = {"gate_up": "gate_and_up_proj", "down": "down_proj"}[kind]
    names = [f"model.layers.{layer}.mlp.experts.{expert}.{published_kind}.weight" for expert in range(8)]
    return torch.stack([published[name] for name in names])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_lands_where_its_published_name_says(folders, dtype):
    published = published_tensors(folders["distil"])
    parameters = dict(Hunyuan3.load(folders["distil"], device="cpu", dtype=dtype).transformer().named_parameters())
    for name in (
        *("wte.weight", "lm_head.weight", "ln_f.weight", "layers.1.mlp.router.weight"),
        *("layers.2.self_attn.qkv_proj.weight", "layers.0.mlp.shared_mlp.down_proj.weight"),
        *("layers.0.mlp.experts.gate_up", "layers.2.mlp.experts.down"),
        *("time_embed.fc1.weight", "time_embed_2.fc2.weight", "timestep_emb.fc1.weight"),
        *("patch_embed.conv_in.weight", "patch_embed.block.conv1.weight", "patch_embed.block.modulation.weight"),
        *("patch_embed.block.conv2.weight", "patch_embed.block.skip.weight", "final_layer.block.conv1.weight"),
        *("final_layer.block.norm2.weight", "final_layer.norm_out.weight", "final_layer.conv_out.weight"),
        *("guidance_emb.fc2.weight", "timestep_r_emb.fc1.weight"),
    ):
        assert torch.equal(parameters[name].float(), expected_parameter(published, name).float()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_published_tensor_has_one_place_and_each_parameter_is_filled(folders, variant):
    folder = ModelFolder.open(folders[variant])
    for slots, module in (
        (folder.networks.transformer_slots, folder.networks.transformer()),
        (folder.networks.vae_slots, folder.networks.vae()),
        (folder.networks.vision_slots, folder.networks.vision()),
    ):
        places = Counter((slot.parameter, slot.expert) for slot in slots.values())
        assert set(places.values()) == {1}
        assert {slot.parameter for slot in slots.values()} == set(dict(module.named_parameters()))
        assert set(slots) <= set(folder.index)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_router_stays_float32_and_all_else_has_the_dtype_asked_for(folders, dtype):
    model = Hunyuan3.load(folders["instruct"], device="cpu", dtype=dtype)
    dtypes = {name: parameter.dtype for name, parameter in model.transformer().named_parameters()}
    routers = {name for name in dtypes if "router" in name}
    assert len(routers) == 3
    assert {dtypes[name] for name in routers} == {torch.float32}
    assert {dtypes[name] for name in dtypes if name not in routers} == {getattr(torch, dtype)}
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.transformer().parameters())
    assert not model.transformer().training


def test_a_router_stored_in_bfloat16_is_widened(copied):
    folder = copied()
    for file in folder.glob("*.safetensors"):
        tensors = published_tensors_of(file)
        save_file({name: t.bfloat16() for name, t in tensors.items()}, file)
    router = Hunyuan3.load(folder, device="cpu", dtype="bfloat16").transformer().layers[0].mlp.router
    assert router.weight.dtype == torch.float32
    assert torch.equal(router.weight, published_tensors(folder)["model.layers.0.mlp.gate.wg.weight"].float())


def published_tensors_of(file):
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_vae_has_the_dtype_asked_for_and_in_float16_went_through_bfloat16(copied, dtype):
    folder = copied()
    exact = 1 + 2**-10  # float16 keeps it, bfloat16 rounds it to 1
    for file in folder.glob("*.safetensors"):
        tensors = {name: t.float() for name, t in published_tensors_of(file).items()}
        for name in tensors:
            if name == "vae.decoder.conv_in.bias":
                tensors[name].fill_(exact)
        save_file(tensors, file)
    vae = place_vae(ModelFolder.open(folder), LoadOptions(device="cpu", vae_dtype=dtype).resolved()).load()
    assert {parameter.dtype for parameter in vae.parameters()} == {getattr(torch, dtype)}
    assert vae.decoder.conv_in.bias[0].item() == (exact if dtype == "float32" else 1)


def test_a_transform_sees_every_tensor_and_what_it_yields_is_stored(folders):
    folder = ModelFolder.open(folders["instruct"])
    seen = []

    def double(name, tensor):
        seen.append(name)
        yield name, 2 * tensor.float()

    plain, doubled = (folder.networks.transformer() for _ in range(2))
    where = {"device": torch.device("cpu"), "dtype_of": lambda _name: torch.float32}
    load_parameters(plain, folder.index, folder.networks.transformer_slots, **where)
    load_parameters(doubled, folder.index, folder.networks.transformer_slots, **where, transform=double)
    assert sorted(seen) == sorted(folder.networks.transformer_slots)
    for one, other in zip(plain.parameters(), doubled.parameters(), strict=True):
        assert torch.equal(2 * one, other)


def test_progress_counts_up_to_the_total(folders):
    calls = []
    model = Hunyuan3.load(folders["base"], device="cpu", progress=lambda *call: calls.append(call))
    stages, done, totals = zip(*calls, strict=True)
    assert set(stages) == {"load transformer"}
    assert list(done) == sorted(set(done))
    assert set(totals) == {done[-1]}
    assert done[-1] == sum(parameter.nbytes for parameter in model.transformer().parameters())


@pytest.mark.parametrize("stop_at", [1, 2, 30, 100])
def test_a_stop_while_loading_is_obeyed_and_the_next_load_completes(folders, models, stop_at):
    model = Hunyuan3.open(folders["instruct"], device="cpu")
    asked = []

    def check_cancelled():
        asked.append(1)
        if len(asked) == stop_at:
            raise HaltError

    with pytest.raises(HaltError):
        model.placed_transformer.load(check_cancelled=check_cancelled)
    assert len(asked) == stop_at
    expected = dict(models["instruct"].transformer().named_parameters())
    for name, parameter in model.transformer().named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_what_is_released_is_read_again_when_it_is_needed(folders, models):
    model = Hunyuan3.load(folders["instruct"], device="cpu")
    conditioning = model.conditioning("a fox", width=64, height=64)
    model.release()
    assert all(parameter.is_meta for parameter in model.placed_transformer.module.parameters())
    latents = model.sample(conditioning, seed=2, steps=2).latents
    assert torch.equal(latents, models["instruct"].sample(conditioning, seed=2, steps=2).latents)


def test_a_file_that_shrank_after_it_was_checked_is_an_error_not_a_picture(copied):
    folder = copied()
    model = Hunyuan3.open(folder, device="cpu")
    shard = folder / "model-0001-of-0002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)header|incomplete|safetensor"):
        model.transformer()


def test_only_the_parameters_asked_for_are_filled(folders):
    folder = ModelFolder.open(folders["instruct"])
    module = folder.networks.transformer()
    wanted = {name: slot for name, slot in folder.networks.transformer_slots.items() if slot.parameter == "ln_f.weight"}
    load_parameters(module, folder.index, wanted, device=CPU, dtype_of=lambda _name: torch.float32)
    assert torch.equal(module.ln_f.weight, torch.ones(64))
    assert module.wte.weight.is_meta


MEASURE = """
import sys
from hunyuan3.pipeline import Hunyuan3

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def measure(folder, dtype):
    global peak
    model = Hunyuan3.open(folder, device="cpu", dtype=dtype)
    before = peak = anonymous()
    model.placed_transformer.load(progress=lambda *_: sample(), check_cancelled=sample)
    sample()
    return sum(parameter.nbytes for parameter in model.transformer().parameters()), peak - before

def sample():
    global peak
    peak = max(peak, anonymous())

measure(sys.argv[2], "float32")  # what loading needs once, whatever the size
print(*measure(sys.argv[1], "bfloat16"), *measure(sys.argv[1], "float32"))
"""


@pytest.fixture(scope="module")
def mid_size(folders, tmp_path_factory):
    """An instruct folder of about 300 MB in bfloat16: as the tiny one, with wider layers and more experts."""
    folder = tmp_path_factory.mktemp("mid-size")
    for file in folders["instruct"].iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    data |= {"hidden_size": 512, "attention_head_dim": 128, "num_hidden_layers": 6, "num_experts": 32}
    data |= {"moe_intermediate_size": 512, "moe_topk": 2, "num_shared_expert": 1}
    data["vit_aligner"]["n_embed"] = 512
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    config = ModelConfig.from_folder(folder)
    shapes = {name: slot.shape for name, slot in Networks(config).all_slots.items()}
    pool = torch.randn(max(torch.Size(shape).numel() for shape in shapes.values())).bfloat16()
    shards = {f"model-{i}.safetensors": sorted(shapes)[i::3] for i in range(3)}
    for name, members in shards.items():
        sizes = {member: torch.Size(shapes[member]) for member in members}
        tensors = {member: pool[: size.numel()].view(size).clone() for member, size in sizes.items()}
        save_file(tensors, folder / name)
    weight_map = {member: name for name, members in shards.items() for member in members}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory through /proc")
def test_loading_holds_one_copy_of_the_weights(folders, mid_size):
    """Anonymous memory: pages of the mapped files, which the system may drop at any time, are not counted."""
    command = [sys.executable, "-c", MEASURE, mid_size, folders["instruct"]]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True).stdout
    narrow, narrow_peak, wide, wide_peak = map(int, out.split())
    assert narrow > 280e6
    assert wide > 1.9 * narrow
    assert 0.9 * narrow < narrow_peak < 1.1 * narrow
    assert wide_peak < 1.1 * wide


def test_the_index_of_a_mid_size_folder_is_the_whole_of_it(mid_size):
    folder = ModelFolder.open(mid_size)
    assert set(CheckpointIndex.from_folder(mid_size)) == set(folder.networks.all_slots)
