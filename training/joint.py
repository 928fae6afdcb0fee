"""The training pass: words and pictures of a batch through the package's networks, with gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hunyuan3.generate.schedule import TIME_SCALE
from hunyuan3.image.preprocess import VisionPatches
from hunyuan3.ops.attention import plan_attention
from hunyuan3.ops.rope import rope_positions, rope_table
from hunyuan3.transformer.model import Hunyuan3Transformer
from hunyuan3.types import Span
from hunyuan3.vision.siglip2 import Vision

from .growing_cache import GrowingCache
from .rows import NO_TARGET, Batch


@dataclass(frozen=True)
class Shown:
    """One input picture of each of R rows. latents: (R, C, h, w), scaled. patches: R pictures for the vision tower."""

    latents: torch.Tensor
    patches: Sequence[VisionPatches]


@dataclass(frozen=True)
class Predicted:
    """What a pass gave: velocity (R * S, C, h, w) float32 or None, logits (M, V) float32 and their targets (M,)."""

    velocity: torch.Tensor | None
    logits: torch.Tensor
    targets: torch.Tensor


def joint_pass(
    model: Hunyuan3Transformer,
    vision: Vision,
    batch: Batch,
    shown: Sequence[Shown] = (),
    noisy: torch.Tensor | None = None,
    sigmas: torch.Tensor | None = None,
) -> Predicted:
    """Velocities of R * S noisy pictures, S for each row of the batch, and the logits of the words to be learned.

    The words before a picture do not depend on it, so they run once for all S pictures of a row, and what all rows
    begin with (the system prompt) runs once for the batch. Every number equals that of a whole row by itself.

    Args:
        shown: the input pictures, in sequence order.
        noisy: (R * S, C, h, w) latents at the noise levels `sigmas` (R * S,) in 0..1, those of a row together; None
            where the rows end in words.
    """
    config, rows = model.config, batch.rows
    sequence = rows.sequence
    cos, sin = rope_table(rope_positions(len(sequence), rows.grids), config.head_dim, config.rope_theta)
    cache = GrowingCache(config.num_layers)

    def run(x: torch.Tensor, span: Span) -> torch.Tensor:
        rope = (cos[span.start : span.stop], sin[span.start : span.stop])
        return model(x, rope, plan_attention(span, rows.full_spans), cache)

    end = len(sequence) if sequence.gen_timestep is None else sequence.gen_timestep
    text = Span(min(batch.shared, end - 1), end)
    run(model.wte(batch.ids[:1, : text.start]), Span(0, text.start))
    words = run(_embedded(model, vision, batch, shown)[:, text.start : end], text)
    targets = batch.targets[:, text.start : end]
    learned = targets != NO_TARGET
    velocity = None
    if noisy is not None and sigmas is not None:
        picture = sequence.gen_run
        times = sigmas * TIME_SCALE
        drawn = torch.cat((model.timestep_emb(times)[:, None], model.embed_latents(noisy, times)), dim=1)
        out = run(drawn, Span(end, picture.span.stop))
        velocity = model.velocity(out[:, 1:], times, picture.grid)
    return Predicted(velocity, model.logits(words[learned]), targets[learned])


def _embedded(model: Hunyuan3Transformer, vision: Vision, batch: Batch, shown: Sequence[Shown]) -> torch.Tensor:
    """Embeddings (R, N, D), as `generate.rows.embed_rows` makes them of one picture for all rows."""
    x = model.wte(batch.ids)
    sequence = batch.rows.sequence
    zero = torch.zeros(1)
    for picture, vae, vit in zip(shown, sequence.spans("vae"), sequence.spans("vit"), strict=True):
        x[:, vae.start : vae.stop] = model.embed_latents(picture.latents, zero)
        pixels = torch.stack([patches.pixels for patches in picture.patches])
        mask = torch.stack([patches.mask for patches in picture.patches])
        seen = vision.tower(pixels, mask, [patches.grid for patches in picture.patches])
        x[:, vit.start : vit.stop] = vision.aligner(seen).to(x)
    if sequence.cond_timesteps:
        x[:, list(sequence.cond_timesteps)] = model.timestep_emb(zero)
    return x
