"""Opening a checkpoint folder: what is checked before any weight is read."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hunyuan3.config import VARIANTS, ModelConfig
from hunyuan3.errors import CheckpointError, Hunyuan3Error, RequestError, UnsupportedConfigError
from hunyuan3.folder import ModelFolder, Networks
from hunyuan3.pipeline import Hunyuan3
from tests.core.golden_paths import checkpoints, golden_root

TABLE = "model.wte.weight"


def refused(folder, error=CheckpointError, **options):
    with pytest.raises(error) as caught:
        ModelFolder.open(folder, **options)
    return str(caught.value)


def change_tensors(folder, change):
    """Rewrites the shard that holds the embedding table; `change` gets and may alter its tensors."""
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text(encoding="utf-8"))
    shard = data["weight_map"][TABLE]
    tensors = load_file(folder / shard)
    change(tensors)
    save_file(tensors, folder / shard)
    data["weight_map"] = {k: v for k, v in data["weight_map"].items() if v != shard} | dict.fromkeys(tensors, shard)
    index.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_knows_its_variant(folders, variant):
    folder = ModelFolder.open(folders[variant])
    assert folder.variant == variant
    assert (folder.tokens.guidance is not None) == (variant == "distil")


@pytest.mark.parametrize("path", checkpoints(), ids=lambda path: path.name)
def test_the_reference_made_folders_open(path):
    folder = ModelFolder.open(path)
    assert folder.variant == path.name.removeprefix("tiny-")
    assert set(folder.networks.all_slots) <= set(folder.index)


@pytest.mark.parametrize("name", ["v1.0", "HunyuanImage-3.0-Instruct", "a.b.c", "snap/0a1b.2c", "名前 with spaces"])
def test_folder_names_with_dots_and_the_like_are_no_problem(folders, tmp_path, name):
    """The reference's loader, which makes a Python module of the folder, stumbles over a dot."""
    folder = shutil.copytree(folders["instruct"], tmp_path / name)
    assert ModelFolder.open(str(folder)).variant == "instruct"


def test_a_hub_cache_of_links_loads_and_draws(folders, models, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    shutil.copytree(folders["instruct"], blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    linked = Hunyuan3.load(snapshot, device="cpu")
    one, other = (
        model.sample(model.conditioning("a fox", width=64, height=64), seed=1, steps=1).latents
        for model in (linked, models["instruct"])
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_missing_file_is_named(copied, file):
    folder = copied()
    (folder / file).unlink()
    assert f"{file} is missing" in refused(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_named(copied, file):
    folder = copied()
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    assert str(folder / file) in refused(folder)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "system_prompt.py"])
def test_files_that_can_be_done_without_may_be_missing(copied, file):
    folder = copied()
    (folder / file).unlink()
    assert ModelFolder.open(folder).variant == "instruct"


def test_what_is_no_folder_is_named(folders, tmp_path):
    for path in (tmp_path / "nowhere", folders["instruct"] / "config.json"):
        assert f"{path} is not a folder" in refused(path)


def test_the_only_shard_missing_is_named_with_the_way_out(copied):
    folder = copied()
    (folder / "model-0002-of-0002.safetensors").unlink()
    assert "model-0002-of-0002.safetensors is missing. Download this file again." in refused(folder)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed_at_once(copied):
    folder = copied()

    def change(tensors):
        tensors["model.layers.9.strange.weight"] = tensors.pop("model.layers.1.mlp.gate.wg.weight")
        tensors[TABLE] = tensors[TABLE][:-1].contiguous()

    change_tensors(folder, change)
    message = refused(folder)
    assert "1 missing: model.layers.1.mlp.gate.wg.weight" in message
    assert "1 unexpected: model.layers.9.strange.weight" in message
    rows = ModelConfig.from_folder(folder).vocab_size
    assert f"1 of the wrong shape: {TABLE}: [{rows - 1}, 64] in the file, [{rows}, 64] by config.json" in message


def test_a_long_list_of_missing_tensors_is_cut(copied, edit_json):
    folder = copied()
    edit_json(folder / "config.json", num_hidden_layers=5, moe_topk=2, num_shared_expert=1, moe_intermediate_size=32)
    message = refused(folder)
    assert "missing" in message
    assert "more" in message
    assert len(message) < 2000


def test_the_vision_towers_pooling_head_may_be_there_and_is_not_wanted(copied):
    folder = copied()
    change_tensors(folder, lambda tensors: tensors.update({"vision_model.head.probe": torch.zeros(1, 1, 48)}))
    opened = ModelFolder.open(folder)
    assert "vision_model.head.probe" in opened.index
    assert "vision_model.head.probe" not in opened.networks.all_slots


def test_a_missing_vision_tensor_is_noticed_though_nothing_loads_it_yet(copied):
    folder = copied()
    name = "vision_aligner.layers.0.bias"
    index = folder / "model.safetensors.index.json"
    shard = folder / json.loads(index.read_text(encoding="utf-8"))["weight_map"][name]
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard)
    assert name in refused(folder)


def test_a_quantised_checkpoint_is_refused_by_the_key(copied, edit_json):
    folder = copied()
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    assert "'quantization_config'" in refused(folder, UnsupportedConfigError)


def test_a_tokenizer_of_another_checkpoint_is_refused(copied, folders, edit_json):
    mixed = copied("distil")
    shutil.copy(folders["base"] / "tokenizer.json", mixed)  # lacks <timestep_r>
    assert "tokenizer.json has no token '<timestep_r>'" in refused(mixed)
    shifted = copied("instruct", "shifted")
    edit_json(shifted / "config.json", image_token_id=3)
    message = refused(shifted)
    assert "'<img>'" in message
    assert "image_token_id" in message


def test_a_vocabulary_larger_than_the_embedding_table_is_refused(copied):
    folder = copied()
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    highest = max(token["id"] for token in data["added_tokens"])
    data["added_tokens"] += [{**data["added_tokens"][0], "id": highest + i, "content": f"<x{i}>"} for i in range(1, 65)]
    path.write_text(json.dumps(data), encoding="utf-8")
    message = refused(folder, UnsupportedConfigError)
    assert "tokenizer.json" in message
    assert "vocab_size" in message


@pytest.mark.parametrize(
    ("found", "asked", "result"),
    [
        ("base", "auto", "base"),
        ("base", "base", "base"),
        ("base", "instruct", "instruct"),
        ("instruct", "base", "base"),
        ("distil", "distil", "distil"),
    ],
)
def test_the_variant_can_be_overridden_where_only_the_layout_differs(folders, found, asked, result):
    folder = ModelFolder.open(folders[found], asked)
    assert folder.variant == result
    assert (folder.template.roles["user"][0] == "User: ") == (result != "base")


@pytest.mark.parametrize(
    ("found", "asked"), [("base", "distil"), ("instruct", "distil"), ("distil", "base"), ("distil", "instruct")]
)
def test_distillation_cannot_be_overridden(folders, found, asked):
    message = refused(folders[found], RequestError, variant=asked)
    assert repr(asked) in message
    assert repr(found) in message


def test_an_unknown_variant_is_refused_with_the_choices(folders):
    message = refused(folders["base"], RequestError, variant="turbo")
    assert "'turbo'" in message
    assert "base, instruct, distil" in message


def test_no_python_of_the_folder_is_executed(folders, models, copied, tmp_path, monkeypatch):
    """Not the prompts, which are parsed, nor anything that sits there as remote code."""
    folder = copied()
    monkeypatch.chdir(folder)
    prompts = (folder / "system_prompt.py").read_text(encoding="utf-8")
    trap = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).write_text('x')\n"
    (folder / "system_prompt.py").write_text(trap + prompts + "\nraise RuntimeError('executed')\n", encoding="utf-8")
    remote = ("__init__", "modeling_hunyuan", "hunyuan", "configuration_hunyuan", "tokenizer_wrapper", "sitecustomize")
    for name in remote:
        (folder / f"{name}.py").write_text(trap + "raise RuntimeError('executed')\n", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "configuration_hunyuan.Config", "AutoModelForCausalLM": "hunyuan.Model"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = Hunyuan3.load(folder, device="cpu")
    conditioning = model.conditioning("a fox", width=64, height=64, system_prompt="en_unified")
    assert conditioning.system_prompt == models["instruct"].conditioning("x", system_prompt="en_unified").system_prompt
    assert model.pictures(model.sample(conditioning, steps=1).latents)
    assert not (tmp_path / "ran").exists()
    assert not list(folder.rglob("__pycache__"))


def test_opening_leaves_the_folder_as_it_was(copied):
    folder = copied()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for file in (*folder.iterdir(), folder):
        file.chmod(0o555 if file.is_dir() else 0o444)
    Hunyuan3.load(folder, device="cpu")
    folder.chmod(0o755)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_the_fingerprint_tells_folders_apart_and_stays(folders, copied):
    prints = {variant: ModelFolder.open(path).fingerprint for variant, path in folders.items()}
    assert len(set(prints.values())) == 3
    assert ModelFolder.open(folders["base"]).fingerprint == prints["base"]
    assert ModelFolder.open(folders["base"], "instruct").fingerprint != prints["base"], "the layout is another"
    changed = copied("base")
    change_tensors(changed, lambda tensors: tensors[TABLE].add_(1))
    assert ModelFolder.open(changed).fingerprint != prints["base"]


def test_every_error_of_opening_is_one_a_host_can_catch():
    for error in (CheckpointError, UnsupportedConfigError, RequestError):
        assert issubclass(error, Hunyuan3Error)
        assert issubclass(error, ValueError)


PUBLISHED = {
    "vocab_size": 133120,
    "hidden_size": 4096,
    "intermediate_size": 3072,
    "moe_intermediate_size": [3072] * 32,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "attention_head_dim": 128,
    "max_position_embeddings": 22800,
    "num_experts": 64,
    "num_shared_expert": [1] * 32,
    "moe_topk": [8] * 32,
    "cond_token_attn_type": "joint_full",
    "vae": {
        "latent_channels": 32,
        "block_out_channels": [128, 256, 512, 1024, 1024],
        "layers_per_block": 2,
        "ffactor_spatial": 16,
        "ffactor_temporal": 4,
        "scaling_factor": 0.562679178327931,
    },
    "vit": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_patches": 256,
    },
    "vit_processor": {"max_num_patches": 1024},
    "vit_aligner": {"projector_type": "mlp_gelu", "n_embed": 4096, "depth": 2},
}
# sha256 over the sorted lines "name [shape]" of the published architectures, without the unused vision_model.head.*
PUBLISHED_NAMES = {
    False: (5150, "cf35041d838fea03cb437719c911b1bf3970fa7c09350f06b6c9783689ff605e"),
    True: (5158, "d6eff8d6e1e4a0fdb584c23ef865417e6b31d13fa4e3c9a176332084b8546965"),
}


def full_size_shapes(distilled):
    config = ModelConfig.from_json(PUBLISHED | {"cfg_distilled": distilled, "use_meanflow": distilled})
    networks = Networks(config)
    shapes = {name: slot.shape for name, slot in networks.all_slots.items()}
    return shapes, sum(torch.Size(slot.shape).numel() for slot in networks.transformer_slots.values())


def digest(shapes):
    lines = sorted(f"{name} {list(shape)}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_at_full_size_every_tensor_has_its_published_name_and_shape():
    for distilled, (count, expected) in PUBLISHED_NAMES.items():
        shapes, parameters = full_size_shapes(distilled)
        for recorded in published_tensor_lists(distilled):
            assert shapes == recorded
        assert len(shapes) == count
        assert digest(shapes) == expected
        assert shapes["model.layers.31.mlp.experts.63.gate_and_up_proj.weight"] == (6144, 4096)
        assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (6144, 4096)
        assert shapes["model.layers.7.mlp.gate.wg.weight"] == (64, 4096)
        assert 80e9 < parameters < 84e9
        assert sum(name.startswith("vae.") for name in shapes) == 280


def published_tensor_lists(distilled) -> list[dict[str, tuple[int, ...]]]:
    """The recorded list where it is there (for a readable difference), else none: the digest holds either way."""
    found = []
    for path in Path(golden_root()).glob("full_size_tensor_names.json"):
        data = json.loads(path.read_text(encoding="utf-8"))
        names = data["base_and_instruct"] | (data["instruct_distil_additional"] if distilled else {})
        unused = set(data["optional_vit_head"])
        found.append({name: tuple(entry[0]) for name, entry in names.items() if name not in unused})
    return found
