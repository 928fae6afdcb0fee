import json

import pytest
import torch

from hunyuan3.config import GenerationConfig, ModelConfig, detect_variant, read_json, vae_config
from hunyuan3.errors import CheckpointError, UnsupportedConfigError


@pytest.fixture
def data(folders):
    """The parsed config.json of the tiny Instruct checkpoint, to be changed at will."""
    return json.loads((folders["instruct"] / "config.json").read_text(encoding="utf-8"))


UNSUPPORTED = {
    "model_type": "llama",
    "hidden_act": "gelu",
    "norm_type": "layer",
    "use_qk_norm": False,
    "use_rotary_pos_emb": False,
    "use_cla": True,
    "use_mla": True,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": True,
    "rope_type": "default",
    "use_mixed_mlp_moe": False,
    "moe_layer_num_skipped": 1,
    "norm_topk_prob": False,
    "group_limited_greedy": True,
    "patch_size": 2,
    "img_proj_type": "linear",
    "vae_type": "kl",
    "vit_type": "clip",
    "cond_image_type": "vit",
    "cond_token_attn_type": "sparse",
    "vae_downsample_factor": [8, 8],
    "use_meanflow": True,  # without cfg_distilled
    "num_key_value_heads": 3,
    "attention_head_dim": 18,
    "moe_topk": 9,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_value_this_package_does_not_implement_is_refused_by_name(data, key):
    value = UNSUPPORTED[key]
    with pytest.raises(UnsupportedConfigError) as refused:
        ModelConfig.from_json(data | {key: value}, "/models/x/config.json")
    assert "/models/x/config.json" in str(refused.value)
    assert repr(key) in str(refused.value)
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vae", "downsample_match_channel", False),
        ("vae", "upsample_match_channel", False),
        ("vit", "hidden_act", "relu"),
        ("vit_processor", "image_mean", [0.48, 0.46, 0.41]),
        ("vit_processor", "image_std", [0.2, 0.2, 0.2]),
        ("vit_processor", "resample", 3),
        ("vit_aligner", "projector_type", "linear"),
        ("vit_aligner", "depth", 1),
        ("vit_aligner", "n_embed", 65),
    ],
)
def test_sections_are_checked_too_and_named(data, section, key, value):
    data[section] = data[section] | {key: value}
    with pytest.raises(UnsupportedConfigError, match=rf"{section}: '{key}'"):
        ModelConfig.from_json(data)


def test_a_rope_scaling_of_another_type_is_refused(data):
    assert ModelConfig.from_json(data | {"rope_scaling": {"type": "custom", "alpha": 4.0}})
    with pytest.raises(UnsupportedConfigError, match=r"rope_scaling\.type"):
        ModelConfig.from_json(data | {"rope_scaling": {"type": "yarn"}})


def test_no_quantisation_is_the_same_as_none(data):
    assert ModelConfig.from_json(data | {"quantization_config": None}) == ModelConfig.from_json(data)


def test_unknown_keys_are_ignored(data):
    """Published files carry leftovers that describe nothing."""
    leftovers = {"vit_mapping_type": "resampler", "anyres_pooling_size": 2, "vit_token": None, "mask_init_id": 12}
    nested = {**leftovers, "vae": data["vae"] | {"_class_name": "X"}, "vit": data["vit"] | {"use_return_dict": True}}
    assert ModelConfig.from_json(data | nested) == ModelConfig.from_json(data)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts", "vae", "vit"]
)
def test_a_missing_key_without_a_default_is_named(data, key):
    del data[key]
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        ModelConfig.from_json(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("rope_theta", None),
        ("rms_norm_eps", "1e-5"),
        ("num_experts", True),
        ("vae", []),
        ("moe_topk", [2, 2]),
        ("moe_topk", "2"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(data, key, value):
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        ModelConfig.from_json(data | {key: value})


def test_missing_keys_mean_what_the_reference_means_by_them(data):
    for key in (
        "attention_head_dim",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "moe_drop_tokens",
        "image_base_size",
        "patch_embed_hidden_dim",
        "cond_token_attn_type",
        "moe_intermediate_size",
    ):
        data.pop(key, None)
    config = ModelConfig.from_json(data | {"intermediate_size": 40})
    assert config.head_dim == 16
    assert config.num_kv_heads == config.num_heads == 4
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 10000.0)
    assert (config.image_base_size, config.patch_embed_hidden_dim) == (1024, 1024)
    assert config.cond_token_attn_type == "full"  # published files say joint_full
    assert config.moe.intermediate_size == (40, 40, 40)
    assert (config.moe.drop_tokens, config.moe.capacity_factor) == (False, 1.0)
    assert (config.cfg_distilled, config.use_meanflow, config.model_version) == (False, False, None)


def test_settings_per_layer_may_be_one_number_or_a_list(data):
    one = ModelConfig.from_json(data | {"moe_topk": 3, "num_shared_expert": 2})
    assert (one.moe.top_k, one.moe.num_shared_experts) == ((3, 3, 3), (2, 2, 2))
    longer = ModelConfig.from_json(data | {"moe_topk": [1, 2, 3, 4]})
    assert longer.moe.top_k == (1, 2, 3)


def test_the_older_name_of_the_head_size_is_read(data):
    del data["attention_head_dim"]
    assert ModelConfig.from_json(data | {"head_dim": 32}).head_dim == 32


def test_scaling_latents_and_back_is_the_identity_with_and_without_a_shift(data):
    z = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    for shift in (None, 0.25):
        config = vae_config(data["vae"] | {"shift_factor": shift}, "x")
        scaled = config.scale(z)
        assert torch.allclose(scaled, (z - (shift or 0)) * 0.562679178327931)
        assert (config.unscale(scaled) - z).abs().max() < 1e-6


def test_generation_defaults_are_those_of_the_reference():
    defaults = GenerationConfig.from_json({})
    assert (defaults.steps, defaults.guidance, defaults.flow_shift) == (50, 5.0, 3.0)
    assert (defaults.use_system_prompt, defaults.bot_task) == ("None", "image")
    with pytest.raises(UnsupportedConfigError, match="'sequence_template' is 'chat'"):
        GenerationConfig.from_json({"sequence_template": "chat"})


@pytest.mark.parametrize("key", ["diff_guidance_scale", "flow_shift", "top_p"])
@pytest.mark.parametrize("value", [None, "3.0", True])
def test_a_generation_default_that_is_no_number_is_named(key, value):
    with pytest.raises(CheckpointError, match=f"'{key}' should be a number"):
        GenerationConfig.from_json({key: value})


def test_a_system_prompt_of_null_means_none():
    assert GenerationConfig.from_json({"use_system_prompt": None}).use_system_prompt == "None"


@pytest.mark.parametrize(
    ("changes", "template", "names", "variant"),
    [
        ({}, "pretrain", [], "base"),
        ({}, "instruct", [], "instruct"),
        ({"cfg_distilled": True}, "instruct", [], "distil"),
        ({"cfg_distilled": True}, "pretrain", [], "distil"),
        ({}, "instruct", ["lm_head.weight", "guidance_emb.mlp.0.weight"], "distil"),
        ({}, "instruct", ["model.guidance_emb_of_something.weight"], "instruct"),
        ({"model_version": "HunyuanImage-3.0-Instruct"}, "pretrain", [], "base"),  # the version decides nothing
    ],
)
def test_the_variant_follows_distillation_then_the_template(data, changes, template, names, variant):
    config = ModelConfig.from_json(data | changes)
    generation = GenerationConfig.from_json({"sequence_template": template})
    assert detect_variant(config, generation, names) == variant


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "not valid JSON"), (b"[1]", "JSON object"), (b"\xff\xfe{}", "not valid JSON")]
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{message}"):
        read_json(path)
    with pytest.raises(CheckpointError, match=r"other\.json is missing"):
        read_json(tmp_path / "other.json")


def test_json_nested_too_deeply_is_a_damaged_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a":' + "[" * 200_000, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(path)
