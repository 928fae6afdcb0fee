"""Writes a checkpoint in the official layout: published names and files, bfloat16 weights, float32 routers."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from hunyuan3.checkpoint.index import INDEX_NAME
from hunyuan3.checkpoint.keymap import ROUTER_SUFFIX, Slot
from hunyuan3.config import ModelConfig, VAEConfig
from hunyuan3.folder import Networks

SYSTEM_PROMPTS = '''"""System prompts of the tiny checkpoint: the published names, words of our own."""

t2i_system_prompt_en_vanilla = """
Draw what the user describes.
"""

t2i_system_prompt_en_recaption = """
Write the user's wish as one full description of the picture.
"""

t2i_system_prompt_en_think_recaption = """
Think about what is wanted and what was left open. Then write one full description of the picture.
"""

unified_system_prompt_en = """
Read and write text and pictures.
"""
'''


@dataclass(frozen=True)
class Sizes:
    """The transformer and the vision tower of a tiny checkpoint; keys as in config.json."""

    hidden_size: int = 160
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    patch_embed_hidden_dim: int = 128
    image_base_size: int = 128
    vision_size: int = 64
    vision_layers: int = 2
    vision_patches: int = 64


def config_json(tokenizer: Tokenizer, vae: VAEConfig, sizes: Sizes, distilled: bool = False) -> dict[str, Any]:
    """`config.json` of an Instruct, or Instruct-Distil, checkpoint with this vocabulary, VAE and these sizes."""
    layers = sizes.layers
    return {
        "architectures": ["HunyuanImage3ForCausalMM"],
        "model_type": "hunyuan_image_3_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": math.ceil(tokenizer.get_vocab_size() / 32) * 32,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.expert_width,
        "moe_intermediate_size": [sizes.expert_width] * layers,
        "num_hidden_layers": layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "attention_head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        **{key: tokenizer.token_to_id(token) for key, token in _CONFIG_TOKENS.items()},
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "custom"},
        "rope_type": "2d",
        "use_qk_norm": True,
        "norm_type": "rms",
        "num_experts": sizes.experts,
        "use_mixed_mlp_moe": True,
        "num_shared_expert": [1] * layers,
        "moe_topk": [sizes.top_k] * layers,
        "moe_layer_num_skipped": 0,
        "moe_drop_tokens": False,
        "norm_topk_prob": True,
        "vae_downsample_factor": [16, 16],
        "img_proj_type": "unet",
        "patch_size": 1,
        "patch_embed_hidden_dim": sizes.patch_embed_hidden_dim,
        "image_base_size": sizes.image_base_size,
        **({"cfg_distilled": True, "use_meanflow": True} if distilled else {}),
        "cond_token_attn_type": "joint_full",
        "cond_image_type": "vae_vit",
        "vae_type": "hunyuan-image-vae-v1",
        "vae": {
            "in_channels": vae.in_channels,
            "out_channels": vae.out_channels,
            "latent_channels": vae.latent_channels,
            "block_out_channels": list(vae.block_out_channels),
            "layers_per_block": vae.layers_per_block,
            "ffactor_spatial": vae.ffactor_spatial,
            "ffactor_temporal": vae.ffactor_temporal,
            "sample_size": vae.sample_size,
            "sample_tsize": vae.ffactor_temporal,
            "scaling_factor": vae.scaling_factor,
            "shift_factor": vae.shift_factor,
            "downsample_match_channel": True,
            "upsample_match_channel": True,
        },
        "vit_type": "siglip2-so400m-patch16-naflex",
        "vit": {
            "hidden_size": sizes.vision_size,
            "intermediate_size": 2 * sizes.vision_size,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": 4,
            "num_channels": 3,
            "patch_size": 16,
            "num_patches": 64,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "vision_use_head": False,
        },
        "vit_processor": {
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 2,
            "max_num_patches": sizes.vision_patches,
        },
        "vit_aligner": {
            "projector_type": "mlp_gelu",
            "input_dim": sizes.vision_size,
            "n_embed": sizes.hidden_size,
            "depth": 2,
        },
    }


def write_folder(
    out: Path, tokenizer: Tokenizer, config: Mapping[str, Any], states: Mapping[str, Mapping[str, torch.Tensor]]
) -> Path:
    """Writes the folder `out` (made if missing) and returns it.

    states: the parameters of "transformer", "vae" (three-dimensional) and "vision", by our names.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", _TOKENIZER_CONFIG)
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", _generation_config(config))
    (out / "system_prompt.py").write_text(SYSTEM_PROMPTS, encoding="utf-8")
    networks = Networks(ModelConfig.from_json(config))
    tensors: dict[str, torch.Tensor] = {}
    for part, slots in (
        ("transformer", networks.transformer_slots),
        ("vae", networks.vae_slots),
        ("vision", networks.vision_slots),
    ):
        tensors |= {name: _published(states[part], slot) for name, slot in slots.items()}
    file = "model-0001-of-0001.safetensors"
    save_file(tensors, out / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        out / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(sorted(tensors), file)}
    )
    return out


def _published(state: Mapping[str, torch.Tensor], slot: Slot) -> torch.Tensor:
    """The tensor of a slot, as the published folders store it."""
    tensor = state[slot.parameter] if slot.expert is None else state[slot.parameter][slot.expert]
    assert tuple(tensor.shape) == slot.shape, (slot, tensor.shape)
    dtype = torch.float32 if slot.parameter.endswith(ROUTER_SUFFIX) else torch.bfloat16
    return tensor.detach().to(dtype).contiguous().clone()


def _generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"]],
        "pad_token_id": config["pad_token_id"],
        "do_sample": True,
        "top_k": 20,
        "top_p": 0.95,
        "temperature": 0.6,
        "max_length": 4096,
        "diff_infer_steps": 8 if config.get("cfg_distilled") else 20,
        "diff_guidance_scale": 3.0,
        "flow_shift": 4.0,
        "drop_think": False,
        "bot_task": "image",
        "use_system_prompt": "en_unified",
        "sequence_template": "instruct",
    }


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


_CONFIG_TOKENS = {
    "bos_token_id": "<|startoftext|>",
    "eos_token_id": "<|endoftext|>",
    "pad_token_id": "<pad>",
    "image_token_id": "<img>",
    "im_start_id": "<boi>",
    "im_end_id": "<eoi>",
}
_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<pad>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
}
