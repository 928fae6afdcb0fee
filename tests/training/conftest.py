"""A second stage small enough for tests: few and narrow layers, a vocabulary of bytes, a VAE with random weights."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from training.distil import DistilStage, DistilStageConfig
from training.export import Sizes
from training.flat_vae import FlatVAE
from training.tokenizer import control_tokens
from training.transformer import TransformerStage, TransformerStageConfig
from training.vae import TINY_VAE

SMALL = TransformerStageConfig(
    sizes=Sizes(hidden_size=64, layers=2, heads=4, head_dim=16, expert_width=32, patch_embed_hidden_dim=32),
    steps=40,
    warmup=4,
    rows=6,
    samples=2,
    lessons=30,
)


_ALIKE = ("sizes", "steps", "warmup", "rows", "samples", "lessons")


@pytest.fixture(scope="session")
def vocabulary() -> Tokenizer:
    return bytes_vocabulary()


def bytes_vocabulary() -> Tokenizer:
    """Bytes and control tokens, no merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control_tokens()])
    return tokenizer


@pytest.fixture(scope="session")
def small_stage(vocabulary: Tokenizer) -> Callable[..., TransformerStage]:
    """Makes the stage; equal arguments give equal stages."""
    torch.manual_seed(0)
    vae = FlatVAE(TINY_VAE).state_dict()

    def make(compute: torch.dtype = torch.float32, **changes: object) -> TransformerStage:
        config = replace(SMALL, **changes)
        return TransformerStage(config, vocabulary, vae, scaling=(0.0, 1.0), compute=compute)

    return make


@pytest.fixture(scope="session")
def small_distil(small_stage: Callable[..., TransformerStage]) -> Callable[..., DistilStage]:
    """Makes the stage beside a teacher that is stirred, so that it has something to teach."""

    def make(compute: torch.dtype = torch.float32, **changes: object) -> DistilStage:
        teacher = small_stage(compute)
        stir(teacher)
        config = replace(DistilStageConfig(**{name: getattr(SMALL, name) for name in _ALIKE}), **changes)
        stage = DistilStage(config, teacher)
        stage.start_from(teacher.state())
        return stage

    return make


def stir(stage: TransformerStage) -> None:
    """Noise on all weights, so that nothing is zero, and bfloat16 values where the exported folder holds such."""
    generator = torch.Generator().manual_seed(1)
    for name, master in stage.optimiser.masters.items():
        master += 0.05 * torch.randn(master.shape, generator=generator)
        if not name.endswith("router.weight"):
            master.copy_(master.bfloat16())
        stage.optimiser.average[name].copy_(master)
        stage.optimiser.parameters[name].data.copy_(master)
