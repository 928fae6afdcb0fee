"""The training pass: words and pictures of a batch through the package's transformer, with gradients."""

import torch

from hunyuan3.generate.schedule import TIME_SCALE
from hunyuan3.ops.attention import plan_attention
from hunyuan3.ops.rope import rope_positions, rope_table
from hunyuan3.transformer.model import Hunyuan3Transformer
from hunyuan3.types import Span

from .growing_cache import GrowingCache
from .rows import NO_TARGET, Batch


def joint_pass(
    model: Hunyuan3Transformer, batch: Batch, noisy: torch.Tensor, sigmas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Velocities of R * S noisy pictures, S for each row of the batch, and the logits of the words to be learned.

    The words before a picture do not depend on it, so they run once for all S pictures of a row, and what all rows
    begin with (the system prompt) runs once for the batch. Every number equals that of a whole row by itself.

    Args:
        noisy: (R * S, C, h, w) latents at the noise levels `sigmas` (R * S,) in 0..1, those of a row together.

    Returns velocities (R * S, C, h, w) float32, logits (M, V) float32 and their targets (M,).
    """
    config, rows = model.config, batch.rows
    sequence = rows.sequence
    assert sequence.gen_timestep is not None
    picture = sequence.gen_run
    window = Span(sequence.gen_timestep, picture.span.stop)
    cos, sin = rope_table(rope_positions(len(sequence), rows.grids), config.head_dim, config.rope_theta)
    cache = GrowingCache(config.num_layers)

    def run(x: torch.Tensor, span: Span) -> torch.Tensor:
        rope = (cos[span.start : span.stop], sin[span.start : span.stop])
        return model(x, rope, plan_attention(span, rows.full_spans), cache)

    shared = min(batch.shared, window.start - 1)
    run(model.wte(batch.ids[:1, :shared]), Span(0, shared))
    words = run(model.wte(batch.ids[:, shared : window.start]), Span(shared, window.start))
    times = sigmas * TIME_SCALE
    drawn = torch.cat((model.timestep_emb(times)[:, None], model.embed_latents(noisy, times)), dim=1)
    out = run(drawn, window)
    velocity = model.velocity(out[:, 1:], times, picture.grid)
    targets = batch.targets[:, shared : window.start]
    learned = targets != NO_TARGET
    return velocity, model.logits(words[learned]), targets[learned]
