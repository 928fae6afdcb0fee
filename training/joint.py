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
class Noisy:
    """R * S pictures on their way from noise, S for each row of a batch, those of a row together.

    Attributes:
        latents: (R * S, C, h, w), scaled.
        sigmas: (R * S,) their noise levels in 0..1.
        ends: (R * S,) the noise levels that a distilled model is to step to; None for another model.
        guidance: (R * S,) the strength of guidance that it is to imitate; None for another model.
    """

    latents: torch.Tensor
    sigmas: torch.Tensor
    ends: torch.Tensor | None = None
    guidance: torch.Tensor | None = None


class JointPass:
    """The words and input pictures of a batch, read once, to draw from at any noise level.

    The words before a picture do not depend on it, so they run once for all S pictures of a row, and what all rows
    begin with (the system prompt) runs once for the batch. Every number equals that of a whole row by itself.

    Attributes:
        logits: (M, V) float32, of the M words to be learned.
        targets: (M,) int64, what they should have been.
    """

    def __init__(self, model: Hunyuan3Transformer, vision: Vision, batch: Batch, shown: Sequence[Shown] = ()) -> None:
        """shown: the input pictures, in sequence order."""
        self.model = model
        self.rows = batch.rows
        sequence = batch.rows.sequence
        self.cache = GrowingCache(model.config.num_layers)
        self.rope = rope_table(
            rope_positions(len(sequence), batch.rows.grids), model.config.head_dim, model.config.rope_theta
        )
        self.end = len(sequence) if sequence.gen_timestep is None else sequence.gen_timestep
        text = Span(min(batch.shared, self.end - 1), self.end)
        self._run(model.wte(batch.ids[:1, : text.start]), Span(0, text.start), self.cache)
        words = self._run(_embedded(model, vision, batch, shown)[:, text.start : self.end], text, self.cache)
        targets = batch.targets[:, text.start : self.end]
        learned = targets != NO_TARGET
        self.logits, self.targets = model.logits(words[learned]), targets[learned]

    def velocity(self, noisy: Noisy) -> torch.Tensor:
        """(R * S, C, h, w) float32. May be called again and again; no call sees anything of another."""
        model, picture = self.model, self.rows.sequence.gen_run
        times = noisy.sigmas * TIME_SCALE
        control = [model.timestep_emb(times)]
        if model.guidance_emb is not None:
            assert noisy.guidance is not None, "a distilled model is told the guidance"
            control.append(model.guidance_emb((noisy.guidance * TIME_SCALE).bfloat16().float()))  # as in inference
        if model.timestep_r_emb is not None:
            assert noisy.ends is not None, "a distilled model is told where to step"
            control.append(model.timestep_r_emb(noisy.ends * TIME_SCALE))
        x = torch.cat((torch.stack(control, dim=1), model.embed_latents(noisy.latents, times)), dim=1)
        out = self._run(x, Span(self.end, picture.span.stop), self.cache.fork())
        return model.velocity(out[:, len(control) :], times, picture.grid)

    def _run(self, x: torch.Tensor, span: Span, cache: GrowingCache) -> torch.Tensor:
        cos, sin = self.rope
        rope = (cos[span.start : span.stop], sin[span.start : span.stop])
        return self.model(x, rope, plan_attention(span, self.rows.full_spans), cache)


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
