"""Weights to start from: the package's modules are built without any, as they are filled from files."""

import math

import torch
from torch import nn

from hunyuan3.config import ModelConfig
from hunyuan3.moe.router import Router
from hunyuan3.moe.weights import ExpertBank
from hunyuan3.transformer.layers import RMSNorm
from hunyuan3.transformer.model import Hunyuan3Transformer
from hunyuan3.transformer.patch import TimeResBlock
from hunyuan3.vision.siglip2 import Vision


def initial_transformer(config: ModelConfig, seed: int) -> Hunyuan3Transformer:
    """A float32 transformer that begins as nearly the identity and predicts no velocity at all.

    Matrices preserve variance, those that write to the residual stream are smaller by `1 / (2 sqrt(layers))`; norms
    are ones; the last convolution and the time modulation are zero.
    """
    torch.manual_seed(seed)
    model = Hunyuan3Transformer(config)
    small = 0.5 / math.sqrt(config.num_layers)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, ExpertBank):
            nn.init.normal_(module.gate_up, std=module.gate_up.shape[2] ** -0.5)
            nn.init.normal_(module.down, std=small * module.down.shape[2] ** -0.5)
        elif isinstance(module, TimeResBlock):
            nn.init.zeros_(module.modulation.weight)
            nn.init.zeros_(module.modulation.bias)
    for layer in model.layers:
        attention, shared = layer.self_attn, layer.mlp.shared_mlp
        for linear, scale in (
            (attention.qkv_proj, 1.0),
            (attention.o_proj, small),
            (shared.gate_and_up_proj, 1.0),
            (shared.down_proj, small),
        ):
            nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)
    nn.init.normal_(model.wte.weight, std=0.5)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    nn.init.zeros_(model.final_layer.conv_out.weight)
    nn.init.zeros_(model.final_layer.conv_out.bias)
    return model


def initial_vision(config: ModelConfig, seed: int) -> Vision:
    """A vision tower and aligner with torch's own starting weights, positions small."""
    torch.manual_seed(seed)
    vision = Vision(config.vision, config.hidden_size)
    nn.init.normal_(vision.tower.position_embedding.weight, std=0.1)
    return vision
