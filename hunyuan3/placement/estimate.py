"""How many bytes the work needs beside the weights: upper estimates, for whoever hands out memory."""

import torch

from ..config import ModelConfig, VAEConfig
from ..errors import OutOfBudgetError

_STREAM_COPIES = 8  # residual stream, its norm, queries, keys and values, attention's output and their float32 passes
_SMALLEST_TILE = 96
# Peak of live activations in float32 pictures of the widest level, by the size of the weights' dtype: counted on the
# meta device at 1024x1024 (3.25 in float32, 2.5 in float16), and a fifth more for the convolutions' workspace.
_VAE_COPIES = {4: 4.0, 2: 3.0}


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
    return int(_VAE_COPIES[dtype.itemsize] * values * 4)


def decode_tile_size(vae: VAEConfig, height: int, width: int, dtype: torch.dtype, free_bytes: int) -> int | None:
    """How to decode a picture of height x width pixels in `free_bytes`: None for whole, else the tile's side.

    Tiles start at the VAE's own sample size and shrink. Raises OutOfBudgetError if not even the smallest fits.
    """
    needed = decode_bytes(vae, height, width, dtype)
    if needed <= free_bytes:
        return None
    tile = vae.sample_size
    while tile >= _SMALLEST_TILE:
        if decode_bytes(vae, min(tile, height), min(tile, width), dtype) <= free_bytes:
            return tile
        tile //= 2
    smallest = decode_bytes(vae, _SMALLEST_TILE, _SMALLEST_TILE, dtype)
    raise OutOfBudgetError(
        f"Decoding {width}x{height} needs {needed / 2**30:.1f} GiB whole and {smallest / 2**30:.2f} GiB in the "
        f"smallest tiles; {max(free_bytes, 0) / 2**30:.2f} GiB are free. Close other programs that use the card."
    )
