"""The checkpoint's `config.json` and `generation_config.json` as frozen dataclasses.

Only keys that change the computation are read; published files carry leftovers (`vit_mapping_type`, `anyres_*`, legacy
token ids) that describe nothing and are ignored. A known key with a value that this package does not implement is
refused by name: a silently ignored one would draw a wrong picture. Defaults are those of the reference's
configuration class, so a missing key means what it means there.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .errors import CheckpointError, UnsupportedConfigError

Variant = Literal["base", "instruct", "distil"]
VARIANTS: tuple[Variant, ...] = ("base", "instruct", "distil")


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts block. The tuples hold one value per layer."""

    num_experts: int
    top_k: tuple[int, ...]
    intermediate_size: tuple[int, ...]
    num_shared_experts: tuple[int, ...]
    drop_tokens: bool = False
    capacity_factor: float = 1.0


@dataclass(frozen=True)
class VAEConfig:
    """`AutoencoderKLConv3D`: spatial factor 16, one latent frame for a picture repeated `ffactor_temporal` times."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    ffactor_spatial: int
    ffactor_temporal: int
    sample_size: int
    scaling_factor: float
    shift_factor: float | None = None

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE encodes them -> as the transformer sees them: `(z - shift) * scaling` (spec 8.10)."""
        return (latents - (self.shift_factor or 0.0)) * self.scaling_factor

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `scale`: `z / scaling + shift`."""
        return latents / self.scaling_factor + (self.shift_factor or 0.0)


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP2 NaFlex tower and the processor values that feed it."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_channels: int
    patch_size: int
    num_positions: int
    max_num_patches: int
    layer_norm_eps: float
    use_head: bool


@dataclass(frozen=True)
class ModelConfig:
    """Everything the networks and the sequence builder need to know of `config.json`."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    moe: MoEConfig
    vae: VAEConfig
    vision: VisionConfig
    patch_embed_hidden_dim: int
    image_base_size: int
    vae_downsample: int
    cond_token_attn_type: str
    cfg_distilled: bool
    use_meanflow: bool
    model_version: str | None
    token_ids: Mapping[str, int]

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Reads `folder/config.json`. Raises CheckpointError or UnsupportedConfigError."""
        path = folder / "config.json"
        return cls.from_json(read_json(path), path)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: Path | str = "config.json") -> "ModelConfig":
        """Builds the config from the parsed file; `source` is named in errors."""
        read = _Reader(data, str(source))
        read.require_supported(_SUPPORTED)
        layers = read.integer("num_hidden_layers")
        heads = read.integer("num_attention_heads")
        hidden = read.integer("hidden_size")
        vae_downsample = read.value("vae_downsample_factor", [16, 16])
        if vae_downsample not in ([16, 16], 16):
            read.refuse("vae_downsample_factor", vae_downsample, "[16, 16]")
        head_dim = read.value("attention_head_dim", None) or read.value("head_dim", None) or hidden // heads
        config = cls(
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=read.integer("num_key_value_heads", heads),
            head_dim=int(head_dim),
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            rope_theta=read.number("rope_theta", 10000.0),
            max_position_embeddings=read.integer("max_position_embeddings"),
            moe=MoEConfig(
                num_experts=read.integer("num_experts"),
                top_k=read.per_layer("moe_topk", layers),
                intermediate_size=read.per_layer("moe_intermediate_size", layers, data.get("intermediate_size")),
                num_shared_experts=read.per_layer("num_shared_expert", layers),
                drop_tokens=bool(read.value("moe_drop_tokens", False)),
                capacity_factor=float(read.value("capacity_factor", None) or 1.0),
            ),
            vae=vae_config(read.section("vae"), f"{source} vae"),
            vision=_vision_config(read, hidden),
            patch_embed_hidden_dim=read.integer("patch_embed_hidden_dim", 1024),
            image_base_size=read.integer("image_base_size", 1024),
            vae_downsample=16,
            cond_token_attn_type=str(read.value("cond_token_attn_type", "full")),
            cfg_distilled=bool(read.value("cfg_distilled", False)),
            use_meanflow=bool(read.value("use_meanflow", False)),
            model_version=read.value("model_version", None),
            token_ids={key: int(data[key]) for key in _TOKEN_ID_KEYS if isinstance(data.get(key), int)},
        )
        if config.use_meanflow and not config.cfg_distilled:
            read.refuse("use_meanflow", True, "false unless cfg_distilled is true")
        if config.num_heads % config.num_kv_heads:
            read.refuse("num_key_value_heads", config.num_kv_heads, f"a divisor of num_attention_heads ({heads})")
        if config.head_dim % 4:
            read.refuse("attention_head_dim", config.head_dim, "a multiple of 4 (two rotary axes, two halves)")
        for top_k in config.moe.top_k:
            if not 1 <= top_k <= config.moe.num_experts:
                read.refuse("moe_topk", top_k, f"1..{config.moe.num_experts} (num_experts)")
        return config


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of a run, from `generation_config.json`."""

    sequence_template: str
    steps: int
    guidance: float
    flow_shift: float
    use_system_prompt: str
    bot_task: str
    drop_think: bool
    max_length: int
    max_new_tokens: int
    do_sample: bool
    top_k: int
    top_p: float
    temperature: float
    repetition_penalty: float

    @classmethod
    def from_folder(cls, folder: Path) -> "GenerationConfig":
        """Reads `folder/generation_config.json`. Raises CheckpointError or UnsupportedConfigError."""
        path = folder / "generation_config.json"
        return cls.from_json(read_json(path), path)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], source: Path | str = "generation_config.json") -> "GenerationConfig":
        """Builds the config from the parsed file; `source` is named in errors."""
        read = _Reader(data, str(source))
        template = read.value("sequence_template", "instruct")
        if template not in ("pretrain", "instruct"):
            read.refuse("sequence_template", template, "pretrain or instruct")
        return cls(
            sequence_template=template,
            steps=read.integer("diff_infer_steps", 50),
            guidance=read.number("diff_guidance_scale", 5.0),
            flow_shift=read.number("flow_shift", 3.0),
            use_system_prompt=str(read.value("use_system_prompt", None)),
            bot_task=str(read.value("bot_task", "image")),
            drop_think=bool(read.value("drop_think", False)),
            max_length=read.integer("max_length", 22800),
            max_new_tokens=read.integer("max_new_tokens", 2048),
            do_sample=bool(read.value("do_sample", True)),
            top_k=read.integer("top_k", 1024),
            top_p=read.number("top_p", 0.95),
            temperature=read.number("temperature", 0.6),
            repetition_penalty=read.number("repetition_penalty", 1.0),
        )


def detect_variant(config: ModelConfig, generation: GenerationConfig, tensor_names: Collection[str]) -> Variant:
    """Which of the three checkpoints a folder is.

    base and Instruct share every tensor name and `model_version` may be absent, so the sequence template decides.
    """
    if config.cfg_distilled or any(name.startswith("guidance_emb.") for name in tensor_names):
        return "distil"
    return "base" if generation.sequence_template == "pretrain" else "instruct"


def vae_config(data: Mapping[str, Any], source: str) -> VAEConfig:
    """The `vae` section of `config.json`. Raises UnsupportedConfigError."""
    read = _Reader(data, source)
    read.require_supported({"downsample_match_channel": (True,), "upsample_match_channel": (True,)})
    shift = read.value("shift_factor", None)
    return VAEConfig(
        in_channels=read.integer("in_channels", 3),
        out_channels=read.integer("out_channels", 3),
        latent_channels=read.integer("latent_channels"),
        block_out_channels=tuple(int(c) for c in read.value("block_out_channels")),
        layers_per_block=read.integer("layers_per_block"),
        ffactor_spatial=read.integer("ffactor_spatial"),
        ffactor_temporal=read.integer("ffactor_temporal"),
        sample_size=read.integer("sample_size", 384),
        scaling_factor=read.number("scaling_factor"),
        shift_factor=None if shift is None else float(shift),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint folder. Raises CheckpointError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} is missing from {path.parent}. Is this the whole checkpoint folder, as downloaded?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download this file again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, it holds a {type(data).__name__}.")
    return data


_TOKEN_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "im_start_id", "im_end_id", "image_token_id")

# Known keys and the values this package implements; a missing key is fine, its class default is among them.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("hunyuan_image_3_moe", "Hunyuan"),
    "hidden_act": ("silu",),
    "norm_type": ("rms",),
    "use_qk_norm": (True,),
    "use_rotary_pos_emb": (True,),
    "use_cla": (False,),
    "use_mla": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_type": ("2d",),
    "position_embedding_xdrope": (False,),
    "use_mixed_mlp_moe": (True,),
    "moe_layer_num_skipped": (0,),
    "norm_topk_prob": (True,),
    "group_limited_greedy": (False,),
    "patch_size": (1,),
    "img_proj_type": ("unet",),
    "vae_type": ("hunyuan-image-vae-v1",),
    "vit_type": ("siglip2-so400m-patch16-naflex",),
    "cond_image_type": ("vae_vit",),
    "cond_token_attn_type": ("joint_full", "full", "full_causal", "causal"),
    "quantization_config": (None,),
}


def _vision_config(read: "_Reader", hidden_size: int) -> VisionConfig:
    vit = _Reader(read.section("vit"), f"{read.source} vit")
    processor = _Reader(read.section("vit_processor"), f"{read.source} vit_processor")
    aligner = _Reader(read.section("vit_aligner"), f"{read.source} vit_aligner")
    vit.require_supported({"hidden_act": ("gelu_pytorch_tanh",)})
    processor.require_supported({"image_mean": ([0.5] * 3,), "image_std": ([0.5] * 3,), "resample": (2,)})
    aligner.require_supported({"projector_type": ("mlp_gelu",), "depth": (2,), "n_embed": (hidden_size,)})
    use_head = vit.value("vision_use_head", read.value("vision_use_head", True))
    return VisionConfig(
        hidden_size=vit.integer("hidden_size"),
        intermediate_size=vit.integer("intermediate_size"),
        num_layers=vit.integer("num_hidden_layers"),
        num_heads=vit.integer("num_attention_heads"),
        num_channels=vit.integer("num_channels", 3),
        patch_size=vit.integer("patch_size", 16),
        num_positions=vit.integer("num_patches"),
        max_num_patches=processor.integer("max_num_patches"),
        layer_norm_eps=vit.number("layer_norm_eps", 1e-6),
        use_head=bool(use_head),
    )


class _Reader:
    """Typed access to one JSON object; every error names the file and the key."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data = data
        self.source = source

    def value(self, key: str, *default: Any) -> Any:
        if key in self.data:
            return self.data[key]
        if default:
            return default[0]
        raise CheckpointError(f"{self.source} has no '{key}'. Is it the file that came with the weights?")

    def integer(self, key: str, *default: Any) -> int:
        value = self.value(key, *default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.source}: '{key}' should be a whole number, it is {value!r}.")
        return value

    def number(self, key: str, *default: Any) -> float:
        value = self.value(key, *default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.source}: '{key}' should be a number, it is {value!r}.")
        return float(value)

    def per_layer(self, key: str, layers: int, default: Any = None) -> tuple[int, ...]:
        value = self.data.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool):
            return (value,) * layers
        if isinstance(value, list) and len(value) >= layers and all(isinstance(v, int) for v in value):
            return tuple(value[:layers])
        raise CheckpointError(f"{self.source}: '{key}' should be a number or a list of {layers}, it is {value!r}.")

    def section(self, key: str) -> Mapping[str, Any]:
        value = self.value(key)
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.source}: '{key}' should be an object, it is {value!r}.")
        return value

    def require_supported(self, table: Mapping[str, tuple[Any, ...]]) -> None:
        for key, allowed in table.items():
            if key in self.data and self.data[key] not in allowed:
                self.refuse(key, self.data[key], " or ".join(repr(a) for a in allowed))
        scaling = self.data.get("rope_scaling")
        if isinstance(scaling, Mapping) and scaling.get("type", "custom") != "custom":
            self.refuse("rope_scaling.type", scaling["type"], "'custom'")

    def refuse(self, key: str, value: Any, supported: str) -> None:
        raise UnsupportedConfigError(f"{self.source}: '{key}' is {value!r}; this package supports {supported}.")
