"""Published tensor names <-> our parameter names: one table per part, readable in both directions.

Our modules carry the published names except where a readable one serves the reader of the forward pass, and except
for the routed experts: the published folder holds one matrix per expert, a layer of ours holds one bank per layer.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

ROUTER_SUFFIX = "mlp.router.weight"


class Slot(NamedTuple):
    """Where one published tensor goes: a parameter, or row `expert` of a stacked one; with the shape it must have."""

    parameter: str
    expert: int | None
    shape: tuple[int, ...]


# (published fragment, our fragment), applied in order from left to right, undone from right to left.
_TRANSFORMER_FRAGMENTS = (
    (".mlp.gate.wg.", ".mlp.router."),
    ("patch_embed.model.0.", "patch_embed.conv_in."),
    ("patch_embed.model.1.", "patch_embed.block."),
    ("final_layer.model.0.", "final_layer.block."),
    ("final_layer.model.1.0.", "final_layer.norm_out."),
    ("final_layer.model.1.2.", "final_layer.conv_out."),
    (".in_layers.0.", ".norm1."),
    (".in_layers.2.", ".conv1."),
    (".emb_layers.1.", ".modulation."),
    (".out_layers.0.", ".norm2."),
    (".out_layers.3.", ".conv2."),
    (".skip_connection.", ".skip."),
    ("time_embed.mlp.0.", "time_embed.fc1."),
    ("time_embed.mlp.2.", "time_embed.fc2."),
    ("time_embed_2.mlp.0.", "time_embed_2.fc1."),
    ("time_embed_2.mlp.2.", "time_embed_2.fc2."),
    ("_emb.mlp.0.", "_emb.fc1."),
    ("_emb.mlp.2.", "_emb.fc2."),
)
_VISION_FRAGMENTS = (
    ("vision_model.embeddings.patch_embedding.", "tower.patch_embedding."),
    ("vision_model.embeddings.position_embedding.", "tower.position_embedding."),
    ("vision_model.encoder.layers.", "tower.layers."),
    ("vision_model.post_layernorm.", "tower.post_layernorm."),
    (".self_attn.q_proj.", ".q_proj."),
    (".self_attn.k_proj.", ".k_proj."),
    (".self_attn.v_proj.", ".v_proj."),
    (".self_attn.out_proj.", ".out_proj."),
    (".mlp.fc1.", ".fc1."),
    (".mlp.fc2.", ".fc2."),
    ("vision_aligner.layers.0.", "aligner.fc1."),
    ("vision_aligner.layers.2.", "aligner.fc2."),
)
_UNDER_MODEL = ("wte.", "layers.", "ln_f.")
_EXPERT_BANKS = {"gate_up": "gate_and_up_proj", "down": "down_proj"}
_EXPERT_NAME = re.compile(r"(layers\.\d+\.mlp\.experts\.\d+)\.(gate_up|down)((?:_scale_\d)?)")  # a bank of one
_STACKED_NAME = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)((?:gate_and_up|down)_proj\.weight(?:_scale_\d)?)")
_BANK_NAME = re.compile(r"(layers\.\d+\.mlp\.experts)\.(gate_up|down)((?:_scale_\d)?)")


def transformer_slots(parameters: Mapping[str, torch.Tensor], *, stacked: bool = False) -> dict[str, Slot]:
    """Published name -> slot, for every parameter of a (meta) `Hunyuan3Transformer`.

    `stacked`: as a pack has it, the experts of a layer in one tensor `...mlp.experts.gate_and_up_proj.weight`.
    """
    slots: dict[str, Slot] = {}
    for parameter, tensor in parameters.items():
        alone = _EXPERT_NAME.fullmatch(parameter)
        if alone is not None:
            name = f"model.{alone[1]}.{_EXPERT_BANKS[alone[2]]}.weight{alone[3]}"
            slots[name] = Slot(parameter, 0, tuple(tensor.shape[1:]))
            continue
        bank = _BANK_NAME.fullmatch(parameter)
        if bank is None:
            name = _published_name(parameter, _TRANSFORMER_FRAGMENTS)
            name = f"model.{name}" if name.startswith(_UNDER_MODEL) else name
            slots[name] = Slot(parameter, None, tuple(tensor.shape))
            continue
        if stacked:
            name = f"model.{bank[1]}.{_EXPERT_BANKS[bank[2]]}.weight{bank[3]}"
            slots[name] = Slot(parameter, None, tuple(tensor.shape))
            continue
        for expert in range(tensor.shape[0]):
            name = f"model.{bank[1]}.{expert}.{_EXPERT_BANKS[bank[2]]}.weight{bank[3]}"
            slots[name] = Slot(parameter, expert, tuple(tensor.shape[1:]))
    return slots


def unstacked(name: str) -> tuple[str, str] | None:
    """(before, after) the expert's number in the name of each expert of a stacked tensor, None for any other tensor."""
    match = _STACKED_NAME.fullmatch(name)
    return (match[1], match[2]) if match else None


def vae_slots(parameters: Mapping[str, torch.Tensor]) -> dict[str, Slot]:
    """Published name -> slot, for every parameter of a (meta) VAE."""
    return {f"vae.{name}": Slot(name, None, tuple(tensor.shape)) for name, tensor in parameters.items()}


def vision_slots(parameters: Mapping[str, torch.Tensor]) -> dict[str, Slot]:
    """Published name -> slot, for every parameter of a (meta) `Vision`, tower and aligner."""
    return {
        _published_name(name, _VISION_FRAGMENTS): Slot(name, None, tuple(tensor.shape))
        for name, tensor in parameters.items()
    }


def is_unused(name: str) -> bool:
    """Tensors that published folders may carry and nobody reads: the vision tower's pooling head."""
    return name.startswith("vision_model.head.")


def _published_name(parameter: str, fragments: tuple[tuple[str, str], ...]) -> str:
    for published, ours in reversed(fragments):
        parameter = parameter.replace(ours, published)
    return parameter
