"""How many bytes the work needs beside the weights: upper estimates, for whoever hands out memory."""

import torch

from ..config import ModelConfig, VAEConfig
from ..errors import OutOfBudgetError

# The busiest chunk of experts has so many times the average's pairs. In the published shapes anything below 1.8 is
# hidden behind `combine`, which follows, and random models reach 1.8.
_IMBALANCE = 2.0
SMALLEST_TILE = 96
# Peak of live activations in float32 pictures of the widest level, by the size of the weights' dtype: counted on the
# meta device at 1024x1024 (3.25 in float32, 2.5 in float16), and a fifth more for the convolutions' workspace.
_VAE_COPIES = {4: 4.0, 2: 3.0}


def cache_bytes(config: ModelConfig, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of `rows` sequences of `tokens` tokens in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * rows * tokens * dtype.itemsize


def activation_bytes(
    config: ModelConfig,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    at_once: int | None = None,
    experts_at_once: int | None = None,
    scratch: int = 0,
) -> int:
    """The most that is alive at once while `rows` sequences of `tokens` tokens go through the stack, without the cache.

    Counted in the code (generate.denoise, transformer, moe) tensor by tensor; `tests/core/test_plan.py` counts the
    living storages of real runs and compares.

    Args:
        at_once: tokens of a row that go through the stack together; fewer than all where the prompt is a pass of its
            own (a prefix store). None: all.
        experts_at_once: of a layer; None: all (the grouped backend on a resident bank).
        scratch: bytes for reading that many experts' stored weights back (see `placement.plan.PartSizes`).
    """
    size, width = dtype.itemsize, config.hidden_size
    queries = config.num_heads * config.head_dim
    projected = queries + 2 * config.num_kv_heads * config.head_dim
    n = rows * (tokens if at_once is None else at_once)
    # The embedded sequence, what goes into the stack and the picture in it; then the layer's input.
    stream = (rows * tokens + 3 * n) * width * size
    # The norm's output, the projection, the queries cut out of it, three float32 passes over them.
    attention = n * ((width + projected + queries) * size + 3 * queries * 4)
    moe = 0
    for top_k, inner, shared in zip(
        config.moe.top_k, config.moe.intermediate_size, config.moe.num_shared_experts, strict=True
    ):
        share = 1.0
        if experts_at_once is not None and experts_at_once < config.moe.num_experts:
            share = min(1.0, _IMBALANCE * experts_at_once / config.moe.num_experts)
        # Per pair: gathered input and both halves; or both halves, gate, product; or these but the gate, and output.
        run = int(n * top_k * share * max(width + 2 * inner, 4 * inner, width + 3 * inner) * size) + scratch
        mlp = n * max(4 * inner * shared, width + 3 * inner * shared) * size
        # The shared MLP's output, a choice's rows, and two float32 passes: the sum and the choice or its product.
        combine = n * width * (size + (8 if size == 4 else 8 + size))
        # The residual stream after attention, its norm, every pair's output; the router's tables are small.
        held = n * (2 * width + top_k * width) * size + n * (12 * config.moe.num_experts + 40 * top_k)
        moe = max(moe, held + max(run, mlp, combine))
    return stream + max(attention, moe)


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
    while tile >= SMALLEST_TILE:
        if decode_bytes(vae, min(tile, height), min(tile, width), dtype) <= free_bytes:
            return tile
        tile //= 2
    smallest = decode_bytes(vae, SMALLEST_TILE, SMALLEST_TILE, dtype)
    raise OutOfBudgetError(
        f"Decoding {width}x{height} needs {needed / 2**30:.1f} GiB whole and {smallest / 2**30:.2f} GiB in the "
        f"smallest tiles; {max(free_bytes, 0) / 2**30:.2f} GiB are free. Close other programs that use the card."
    )
