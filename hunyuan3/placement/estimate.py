"""How many bytes the work needs beside the weights: upper estimates, for whoever hands out memory."""

import torch

from ..config import ModelConfig, VAEConfig

_STREAM_COPIES = 8  # residual stream, its norm, queries, keys and values, attention's output and their float32 passes
_VAE_COPIES = 6  # input, normed, convolved and residual pictures of the widest level, at most so many at once


def sampling_bytes(config: ModelConfig, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Key-value cache and activations of a denoise run of `rows` sequences of `tokens` tokens."""
    size = dtype.itemsize
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * rows * tokens * size
    stream = _STREAM_COPIES * config.hidden_size * rows * tokens * 4
    pairs = rows * tokens * max(config.moe.top_k)
    # Gathered input, both halves, their product, output: what the grouped backend holds at once.
    experts = pairs * (2 * config.hidden_size + 3 * max(config.moe.intermediate_size)) * size
    return cache + stream + experts


def decode_bytes(vae: VAEConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """Decoding one picture, or one tile, of height x width pixels. The decoder's residual stream is float32."""
    values = vae.ffactor_temporal * height * width * vae.block_out_channels[0]
    return _VAE_COPIES * values * max(dtype.itemsize, 4)
