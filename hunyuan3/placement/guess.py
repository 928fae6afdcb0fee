"""Guess the experts of a layer before its attention has run, so that their copies start earlier.

A layer adds little to the residual stream, so its router, asked about its input instead of what its attention will have
made of it, mostly names the experts that it will choose. A wrong guess costs a copy and changes no number.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..transformer.block import Block
from .streaming import ExpertStreaming


def guess_ahead(layers: Sequence[Block], streaming: ExpertStreaming) -> None:
    """Has each layer tell the ring which experts it will probably need, in passes over few tokens."""
    for index, layer in enumerate(layers):
        # A hook is handed its layer and does not hold it: weights must die with their model at once.
        def before(block: nn.Module, inputs: tuple[Any, ...], index: int = index) -> None:
            x = inputs[0]
            tokens = x.shape[0] * x.shape[1]
            if streaming.wants_guesses(index, tokens * block.mlp.router.top_k):
                streaming.guess(index, _likely(block, x.reshape(tokens, -1)))

        layer.register_forward_pre_hook(before)


def _likely(block: Block, x: torch.Tensor) -> list[int]:
    """Experts that tokens (T, D) will probably choose, all first choices first. Waits for the device."""
    with torch.no_grad():
        ids = block.mlp.router(block.post_attention_layernorm(x)).ids
    return list(dict.fromkeys(ids.t().reshape(-1).tolist()))
