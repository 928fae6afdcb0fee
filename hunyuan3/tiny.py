"""A complete tiny checkpoint in the official layout, made on the spot: seeded random weights, a small tokenizer.

    python -m hunyuan3.tiny OUT --variant instruct

It draws in a second on any machine, so everything around the weights can be tried and tested. Its pictures are
abstract: nothing was trained.
"""

import argparse
import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from .checkpoint.index import INDEX_NAME
from .config import VARIANTS, ModelConfig, Variant
from .folder import Networks

_LAYERS = 3
_BASE_SIZE = 256
_SHARDS = 2
_MERGED_VOCABULARY = 512

_CORPUS = (
    "User: Draw a red fox asleep in tall grass, soft evening light, photo.\n\nAssistant: ",
    "You draw what the user describes. Think about the picture, then write it down in full.",
    "a small boat on a quiet lake in the morning, mist, mountains, watercolour painting of the sea and the sky",
    "the cat sits on the table near the window; a blue vase with yellow flowers stands to the left of it",
    "一只橘猫坐在窗边的木桌上, 旁边有一个蓝色花瓶和黄色的花. 清晨的湖面上有一条小船.",
    "What is in the picture? There are two circles and one square; the larger circle is green.",
)

_SYSTEM_PROMPTS = '''"""System prompts of the tiny checkpoint: the published names, words of our own."""

t2i_system_prompt_en_vanilla = """
You draw the picture that the user describes.
"""

t2i_system_prompt_en_recaption = """
You help a painter. Write the user's wish as one full description of the picture, leaving nothing out.
"""

t2i_system_prompt_en_think_recaption = """
You help a painter. First think about what is wanted and what was left open.
Then write one full description of the picture, leaving nothing out.
"""

unified_system_prompt_en = """
You read and write text and pictures. Think when you are asked to, then draw or answer.
"""
'''


def make_tiny(out: Path, variant: Variant = "instruct", seed: int = 0) -> Path:
    """Writes a checkpoint folder of a few megabytes to `out` (made if missing) and returns it.

    The same variant and seed give the same bytes. Weights are bfloat16, the routers float32, in two shards with an
    index, as the published folders have them.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(variant)
    config = _config(tokenizer, variant)
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", _generation_config(variant, config))
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", _tokenizer_config())
    (out / "system_prompt.py").write_text(_SYSTEM_PROMPTS, encoding="utf-8")
    _write_weights(out, ModelConfig.from_json(config), seed)
    return out


def _tokenizer(variant: Variant) -> Tokenizer:
    """Byte-level BPE trained on a few sentences, then the family's control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MERGED_VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _controls(variant)])
    return tokenizer


def _controls(variant: Variant) -> list[str]:
    """Control tokens in vocabulary order. As published, base lacks the last four ratios and <timestep_r>."""
    pairs = ("ref", "recaption", "quad", "think", "answer")
    tokens = ["<|endoftext|>", "<|startoftext|>", "<boi>", "<eoi>", "<img>", "<pad>", "<cfg>", "<timestep>"]
    tokens += ["<guidance>", "<joint_img_sep>"]
    tokens += [tag for name in pairs for tag in (f"<{name}>", f"</{name}>")]
    tokens += [f"<img_size_{size}>" for size in (256, 512, 768, 1024)]
    tokens += [f"<img_ratio_{i}>" for i in range(33)]
    if variant != "base":
        tokens += [f"<img_ratio_{i}>" for i in range(33, 37)] + ["<timestep_r>"]
    return tokens


def _config(tokenizer: Tokenizer, variant: Variant) -> dict[str, Any]:
    ids = {name: tokenizer.token_to_id(token) for name, token in _CONFIG_TOKENS.items()}
    config: dict[str, Any] = {
        "architectures": ["HunyuanImage3ForCausalMM"],
        "model_type": "hunyuan_image_3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": math.ceil(tokenizer.get_vocab_size() / 64) * 64,
        "hidden_size": 64,
        "intermediate_size": 32,
        "moe_intermediate_size": [32] * _LAYERS,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 22800,
        "rms_norm_eps": 1e-5,
        **ids,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "custom"},
        "rope_type": "2d",
        "use_qk_norm": True,
        "norm_type": "rms",
        "num_experts": 8,
        "use_mixed_mlp_moe": True,
        "num_shared_expert": [1] * _LAYERS,
        "moe_topk": [2] * _LAYERS,
        "moe_layer_num_skipped": 0,
        "moe_drop_tokens": False,
        "norm_topk_prob": True,
        "vae_downsample_factor": [16, 16],
        "img_proj_type": "unet",
        "patch_size": 1,
        "patch_embed_hidden_dim": 32,
        "image_base_size": _BASE_SIZE,
        "cond_token_attn_type": "joint_full",
        "cond_image_type": "vae_vit",
        "vae_type": "hunyuan-image-vae-v1",
        "vae": {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 16,
            "block_out_channels": [32] * 5,
            "layers_per_block": 1,
            "ffactor_spatial": 16,
            "ffactor_temporal": 4,
            "sample_size": 384,
            "sample_tsize": 96,
            "scaling_factor": 0.562679178327931,
            "shift_factor": None,
            "downsample_match_channel": True,
            "upsample_match_channel": True,
        },
        "vit_type": "siglip2-so400m-patch16-naflex",
        "vit": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_channels": 3,
            "patch_size": 16,
            "num_patches": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
        "vit_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "max_num_patches": 64},
        "vit_aligner": {"projector_type": "mlp_gelu", "input_dim": 48, "n_embed": 64, "depth": 2},
    }
    if variant == "distil":
        config |= {"cfg_distilled": True, "use_meanflow": True}
    return config


_CONFIG_TOKENS = {
    "bos_token_id": "<|startoftext|>",
    "eos_token_id": "<|endoftext|>",
    "pad_token_id": "<pad>",
    "image_token_id": "<img>",
    "im_start_id": "<boi>",
    "im_end_id": "<eoi>",
}


def _generation_config(variant: Variant, config: dict[str, Any]) -> dict[str, Any]:
    is_base = variant == "base"
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"]],
        "pad_token_id": config["pad_token_id"],
        "do_sample": True,
        "top_k": 1024,
        "top_p": 0.95,
        "temperature": 0.6,
        "max_length": 12800 if is_base else 22800,
        "diff_infer_steps": 8 if variant == "distil" else 50,
        "diff_guidance_scale": 5.0 if is_base else 2.5,
        "flow_shift": 3.0,
        "drop_think": False,
        "bot_task": "image" if is_base else "think_recaption",
        "use_system_prompt": "None" if is_base else "en_unified",
        "sequence_template": "pretrain" if is_base else "instruct",
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": True,
        "model_max_length": 1048576,
    }


def _write_weights(out: Path, config: ModelConfig, seed: int) -> None:
    tensors = {name: _random_weight(name, slot.shape, seed) for name, slot in Networks(config).all_slots.items()}
    names = sorted(tensors)
    weight_map = {}
    for shard in range(_SHARDS):  # membership is arbitrary in the published folders, too: experts straddle shards
        file = f"model-{shard + 1:04d}-of-{_SHARDS:04d}.safetensors"
        part = names[shard::_SHARDS]
        save_file({name: tensors[name] for name in part}, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _random_weight(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Unit-variance-preserving normals; ones for norms, zeros for biases. Each tensor has its own generator."""
    router = name.endswith("gate.wg.weight")
    if name.endswith(".bias"):
        values = torch.zeros(shape)
    elif len(shape) == 1:
        values = torch.ones(shape)
    else:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))  # it takes 32 bits, no more
        is_table = name.endswith(("wte.weight", "position_embedding.weight"))
        scale = 1.0 if is_table else 1 / math.sqrt(math.prod(shape[1:]))
        values = torch.randn(shape, generator=generator) * scale
    return values if router else values.to(torch.bfloat16)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hunyuan3.tiny", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--variant", choices=VARIANTS, default="instruct")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args()
    folder = make_tiny(args.out, args.variant, args.seed)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB, variant {args.variant}, random weights (its pictures are abstract)")


if __name__ == "__main__":
    main()
