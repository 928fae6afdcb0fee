"""What one request puts through the transformer: token rows of equal geometry and the pictures shown in them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..transformer.model import Hunyuan3Transformer
from ..types import Grid, Span, TokenSequence


@dataclass(frozen=True)
class ShownPicture:
    """An input picture as the transformer takes it, twice: as a clean latent and as vision tokens.

    latent: (C, h, w) float32, scaled. tokens: (P, D), padding slots included. key: tells this picture, its fitting and
    its posterior sample from any other.
    """

    latent: torch.Tensor
    tokens: torch.Tensor
    key: str


@dataclass(frozen=True)
class SequenceRows:
    """The branches of one request: rows of equal geometry, with what the network must know of it.

    branches: the conditional row, and the unconditional one where there is guidance by two branches.
    full_spans: spans whose tokens see each other both ways. grids: what lies on the two rotary axes.
    pictures: the input pictures, in sequence order; every branch shows them all.
    """

    branches: tuple[TokenSequence, ...]
    full_spans: tuple[Span, ...]
    grids: tuple[tuple[Span, Grid], ...]
    pictures: tuple[ShownPicture, ...] = ()

    def __post_init__(self) -> None:
        first = self.branches[0]
        for other in self.branches[1:]:
            assert len(other) == len(first) and other.runs == first.runs, "branches must share their geometry"

    @property
    def sequence(self) -> TokenSequence:
        """The conditional row; its geometry is every row's."""
        return self.branches[0]

    def showing(self, pictures: tuple[ShownPicture, ...]) -> "SequenceRows":
        """The same rows with their input pictures filled in."""
        return replace(self, pictures=pictures)


def embed_rows(
    model: Hunyuan3Transformer, ids: torch.Tensor, sequence: TokenSequence, pictures: Sequence[ShownPicture]
) -> torch.Tensor:
    """Token ids (R, N) -> embeddings (R, N, D), the input pictures' slots filled (spec 6.1).

    1. word embeddings
    2. each picture's latent, clean (time 0), and its <timestep> token
    3. each picture's vision tokens
    """
    x = model.wte(ids)
    if not sequence.cond_timesteps:
        return x
    zero = torch.zeros(1, device=model.device)
    for picture, vae, vit in zip(pictures, sequence.spans("vae"), sequence.spans("vit"), strict=True):
        latent = picture.latent.to(model.device)[None]
        x[:, vae.start : vae.stop] = model.embed_latents(latent, zero)
        x[:, vit.start : vit.stop] = picture.tokens.to(x)
    x[:, list(sequence.cond_timesteps)] = model.timestep_emb(zero)
    return x
