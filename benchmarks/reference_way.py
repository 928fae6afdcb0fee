"""One later denoise step the way the reference computes it, restated in our words (spec 6.2, 7.2, 7.4, 8.6).

Where the two ways differ, this file does what the reference does: one-hot dispatch and combine, every expert on a
buffer of equal length, repeated keys and values, a dense mask, a rotary table for every possible position in every
forward pass, latents embedded once per guidance branch. Where they do not differ (norms, projections, router, MLPs,
embedders) it calls our modules, so both run on the same weights and any difference in time comes from the ways alone.
Choices that the description leaves open are made in its favour, above all the masks: they are written by index.

S tokens, K choices each, E experts, C slots per expert, D hidden size.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from hunyuan3.generate.rows import SequenceRows
from hunyuan3.moe.capacity import expert_capacity
from hunyuan3.moe.layer import MoELayer
from hunyuan3.moe.router import Routing
from hunyuan3.ops.rope import rope_positions, rope_table
from hunyuan3.transformer.attention import SelfAttention
from hunyuan3.transformer.kv_cache import KVCache
from hunyuan3.transformer.model import Hunyuan3Transformer
from hunyuan3.types import Span


class Masks(NamedTuple):
    """Which slot of which expert each token takes. Both (S, E, C): `dispatch` ones, `combine` router weights."""

    dispatch: torch.Tensor
    combine: torch.Tensor


def build_masks(routing: Routing, num_experts: int, slots: int | None = None) -> Masks:
    """Gives out the slots: first choices of all tokens in order, then second choices, and so on.

    `slots`: how many an expert has, pairs beyond that are dropped; None: as many as the busiest expert needs.
    """
    ids, weights = routing.ids.t(), routing.weights.t()  # (K, S): rank is the major key
    chosen = F.one_hot(ids.flatten(), num_experts)
    slot = (chosen.cumsum(0) - 1).gather(1, ids.flatten().unsqueeze(1)).view_as(ids)
    if slots is None:
        slots = int(chosen.sum(0).max())
    rank, token = (slot < slots).nonzero(as_tuple=True)
    place = (token, ids[rank, token], slot[rank, token])
    combine = weights.new_zeros(ids.shape[1], num_experts, slots)
    combine[place] = weights[rank, token]
    dispatch = torch.zeros_like(combine)
    dispatch[place] = 1
    return Masks(dispatch, combine)


def dispatch_tokens(masks: Masks, x: torch.Tensor) -> torch.Tensor:
    """Tokens (S, D) -> the experts' buffers (E, C, D), empty slots zero."""
    return torch.einsum("sec,sm->ecm", masks.dispatch, x)


def combine_outputs(masks: Masks, outputs: torch.Tensor) -> torch.Tensor:
    """The experts' results (E, C, D) -> each token's weighted sum (S, D)."""
    return torch.einsum("sec,ecm->sm", masks.combine, outputs)


def mixture_of_experts(layer: MoELayer, x: torch.Tensor) -> torch.Tensor:
    """(B, T, D) -> (B, T, D) with the weights of one of our layers; honours its `drop_tokens`."""
    flat = x.reshape(-1, x.shape[-1])
    routing = layer.router(flat)
    slots = None
    if layer.drop_tokens:
        slots = expert_capacity(*routing.ids.shape, layer.num_experts, layer.capacity_factor)
    masks = build_masks(routing, layer.num_experts, slots)
    buffers = dispatch_tokens(masks, flat)
    outputs = torch.stack([_expert(layer, index, buffer) for index, buffer in enumerate(buffers)])
    return (layer.shared_mlp(flat) + combine_outputs(masks, outputs)).view_as(x)


class ReferenceWay:
    """Later steps of one request: all branches in one pass, against a cache that a first step of ours has filled."""

    def __init__(self, model: Hunyuan3Transformer, rows: SequenceRows, cache: KVCache) -> None:
        sequence = rows.sequence
        assert sequence.gen_timestep is not None
        self.model = model
        self.rows = rows
        self.cache = cache
        self.window = Span(sequence.gen_timestep, sequence.gen_run.span.stop)
        mask = torch.ones(len(sequence), len(sequence), dtype=torch.bool, device=model.device).tril()
        for start, stop in rows.full_spans:
            mask[start:stop, start:stop] = True
        self.mask = mask[self.window.start : self.window.stop].repeat(len(rows.branches), 1, 1, 1)

    @torch.no_grad()
    def velocity(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Latents (1, C, h, w) at time t (0-dim, in 0..1000) -> velocities (branches, C, h, w), float32."""
        model = self.model
        branches = len(self.rows.branches)
        picture = model.embed_latents(latents.repeat(branches, 1, 1, 1), t.repeat(branches))
        x = torch.cat((model.timestep_emb(t.repeat(branches)).unsqueeze(1), picture), dim=1)
        rope = self._rope()
        for layer in model.layers:
            x = x + self._attention(layer.self_attn, layer.input_layernorm(x), rope)
            x = x + mixture_of_experts(layer.mlp, layer.post_attention_layernorm(x))
        return model.velocity(x[:, 1:], t.repeat(branches), self.rows.sequence.gen_run.grid)

    def _rope(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at the window's positions, out of a table for all positions, made anew each time."""
        config = self.model.config
        positions = rope_positions(config.max_position_embeddings, self.rows.grids).to(self.model.device)
        cos, sin = rope_table(positions, config.head_dim, config.rope_theta)
        return cos[self.window.start : self.window.stop], sin[self.window.start : self.window.stop]

    def _attention(
        self, attention: SelfAttention, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """(B, T, D) -> (B, T, D): over the whole cache, keys and values repeated for each query head, masked."""
        q, k, v = attention.project(x, rope)
        keys, values = self.cache.keys[attention.layer], self.cache.values[attention.layer]
        keys[:, :, self.window.start : self.window.stop] = k
        values[:, :, self.window.start : self.window.stop] = v
        keys = keys.repeat_interleave(attention.groups, dim=1)
        values = values.repeat_interleave(attention.groups, dim=1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        return attention.o_proj(out.transpose(1, 2).flatten(2))


def _expert(layer: MoELayer, index: int, buffer: torch.Tensor) -> torch.Tensor:
    value, gate = F.linear(buffer, layer.experts.gate_up[index]).chunk(2, dim=-1)
    return F.linear(value * F.silu(gate), layer.experts.down[index])
