"""Second stage: the transformer learns to write and to draw, pictures by flow matching, words by the next token."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from hunyuan3.config import ModelConfig
from hunyuan3.folder import ModelFolder
from hunyuan3.moe.layer import MoELayer

from .attention import attend_products
from .captions import random_prompt
from .experts import Balance, run_experts
from .export import Sizes, config_json, parameters_of, write_folder
from .flat_vae import FlatVAE, volumetric
from .initial import initial_transformer, initial_vision
from .joint import joint_pass
from .latents import Shard, encode_shard, scaling_of
from .optimiser import Optimiser, OptimiserConfig, trapezoid
from .rows import Batch, Lesson, collate, in_batches, lay_out
from .thoughts import rewrite, thought
from .vae import TINY_VAE


@dataclass(frozen=True)
class TransformerStageConfig:
    """Lengths, shares and weights of the stage.

    Attributes:
        rows, samples: R texts per step, and how many noise levels of its picture each of them sees.
        shard: scenes that are encoded at a time. lessons: rows laid out of a shard, each scene several times.
        shards_reused: epochs, of `lessons` rows each, before new scenes are encoded.
        complete: share of prompts that leave neither colour nor place open.
        rewritten, thought: shares of lessons with a rewrite, and with a thought before it.
        without_system: share of lessons without the system prompt.
        dropout: share of rows that are their unconditional branch (Ho and Salimans 2022).
        shift, uniform: noise levels are logit-normal, shifted towards noise (Esser et al. 2024), a share uniform.
        words, balance: weights of the next-token and the load-balancing loss beside the flow matching loss.
    """

    sizes: Sizes = field(default_factory=Sizes)
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(rate=1.5e-3, muon_rate=3e-3))
    steps: int = 5500
    warmup: int = 150
    decay_share: float = 0.4
    rows: int = 24
    samples: int = 4
    shard: int = 8192
    lessons: int = 24576
    shards_reused: int = 2
    complete: float = 0.5
    rewritten: float = 0.25
    thought: float = 0.05
    without_system: float = 0.1
    dropout: float = 0.1
    shift: float = 2.0
    uniform: float = 0.2
    words: float = 0.1
    balance: float = 0.01
    seed: int = 0


class TransformerStage:
    """Trains the transformer beside a finished VAE. A step's data and noise depend on its number alone.

    compute: the dtype of the network itself; its float32 masters are the optimiser's. The VAE travels with the state.
    """

    name = "transformer"

    def __init__(
        self,
        config: TransformerStageConfig,
        tokenizer: Tokenizer,
        vae_state: Mapping[str, torch.Tensor],
        scaling: tuple[float, float] | None = None,
        compute: torch.dtype = torch.bfloat16,
    ) -> None:
        """vae_state: of a `FlatVAE`. scaling: (shift, scaling) of its latents, measured where it is None."""
        self.config = config
        self.tokenizer = tokenizer
        self.vae_state = {name: tensor.to(torch.bfloat16) for name, tensor in vae_state.items()}
        self.vae = FlatVAE(TINY_VAE, compute).requires_grad_(False)
        self.vae.load_state_dict({name: tensor.float() for name, tensor in self.vae_state.items()})
        self.scaling = scaling or scaling_of(self.vae, config.seed)
        self.vae_config = replace(TINY_VAE, shift_factor=self.scaling[0], scaling_factor=self.scaling[1])
        self.json = config_json(tokenizer, self.vae_config, config.sizes)
        model_config = ModelConfig.from_json(self.json)
        model = initial_transformer(model_config, config.seed)
        self.vision_state = parameters_of(initial_vision(model_config, config.seed))
        self.optimiser = Optimiser(dict(model.named_parameters()), _matrices(model), config.optimiser)
        self.model = model.to(compute)
        for layer in self.model.layers:
            assert isinstance(layer.mlp, MoELayer)
            layer.mlp.backend = run_experts
            layer.self_attn.attend = attend_products
        self.balance = Balance(self.model)
        self.optimiser.parameters = dict(self.model.named_parameters())
        self.folder = self._folder()
        self.done = 0
        self._shard: tuple[int, Shard] | None = None
        self._epoch: tuple[int, list[Any]] | None = None
        self._first_step = 0

    def step(self) -> dict[str, float]:
        """One update; returns what the log records."""
        config = self.config
        batch, clean = self._batch()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.done)
        samples = min(2 * config.samples, config.rows * config.samples // len(batch.ids))  # fewer rows are seen oftener
        clean = clean.float().repeat_interleave(samples, 0)
        sigmas = noise_levels(len(batch.ids), samples, config.shift, config.uniform, generator)
        noise = torch.randn(clean.shape, generator=generator)
        level = sigmas[:, None, None, None]
        velocity, logits, targets = joint_pass(self.model, batch, (1 - level) * clean + level * noise, sigmas)
        flow = (velocity - (noise - clean)).square().mean()
        loss = flow + config.balance * self.balance.take()
        record = {"flow": flow.item()}
        if len(targets):
            words = F.cross_entropy(logits, targets)
            loss = loss + config.words * words
            record["words"] = words.item()
        loss.backward()
        record["norm"] = self.optimiser.step(trapezoid(self.done, config.steps, config.warmup, config.decay_share))
        self.done += 1
        return record

    def state(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "tokenizer": self.tokenizer.to_str(),
            "optimiser": self.optimiser.state(),
            "vae": self.vae_state,
            "scaling": list(self.scaling),
            "vision": self.vision_state,
            "epoch": [self._epoch[0] if self._epoch else 0, self._first_step],
        }

    def restore(self, state: Mapping[str, Any], plan: bool = True) -> None:
        """Goes on from a state. plan: lay out the epoch's lessons as well, which an export does not need."""
        self.done = int(state["done"])
        self.optimiser.restore(state["optimiser"])
        epoch, self._first_step = state["epoch"]
        if plan:
            self._epoch = (epoch, self._plan(epoch))

    def export(self, out: Path, average: bool = True) -> Path:
        """Writes the checkpoint folder, with the averaged weights or the last ones."""
        weights = self.optimiser.average if average else self.optimiser.masters
        return self._write(out, weights)

    def _write(self, out: Path, weights: Mapping[str, torch.Tensor]) -> Path:
        states = {"transformer": weights, "vae": volumetric(self.vae_state), "vision": self.vision_state}
        return write_folder(out, self.tokenizer, self.json, states)

    def _folder(self) -> ModelFolder:
        """The opened checkpoint, for the package's own code that lays out requests; it needs no weights any more."""
        with TemporaryDirectory() as place:
            folder = ModelFolder.open(self._write(Path(place), self.optimiser.masters))
            assert folder.fingerprint  # reads the files' times, once
            return folder

    def _batch(self) -> tuple[Batch, torch.Tensor]:
        """This step's rows and their clean latents (R, C, h, w)."""
        if self._epoch is None:
            self._epoch = (0, self._plan(0))
        number, batches = self._epoch
        if self.done - self._first_step >= len(batches):
            number, self._first_step = number + 1, self.done
            batches = self._plan(number)
            self._epoch = (number, batches)
        rows = batches[self.done - self._first_step]
        rng = random.Random(f"rows:{self.config.seed}:{self.done}")
        batch = collate(rows, self.folder.tokens, self.config.dropout, rng)
        latents = self._shard_of(number).latents
        return batch, torch.stack([latents[scene] for scene in batch.scenes])

    def _plan(self, epoch: int) -> list[Any]:
        """The batches of an epoch, in their order."""
        config = self.config
        rng = random.Random(f"lessons:{config.seed}:{epoch}")
        scenes = self._shard_of(epoch).scenes
        lessons = [self._lesson(rng, index % len(scenes), scenes) for index in range(config.lessons)]
        rows = (lay_out(self.folder, lesson) for lesson in lessons)
        return in_batches(rows, config.rows, max(1, config.rows // 4), rng)

    def _lesson(self, rng: random.Random, index: int, scenes: Any) -> Lesson:
        config, scene = self.config, scenes[index]
        prompt = random_prompt(rng, scene, complete=rng.random() < config.complete)
        trace, kind = "", rng.random()
        if kind < config.thought:
            trace = f"<think>{thought(prompt, scene)}</think>"
        if kind < config.thought + config.rewritten:
            trace += f"<recaption>{rewrite(scene, prompt.language)}</recaption>"
        return Lesson(
            scene=index,
            prompt=prompt.text,
            trace=trace,
            ratio=self.folder.resolutions.nearest(scene.height, scene.width),
            system_prompt="None" if rng.random() < config.without_system else "auto",
        )

    def _shard_of(self, epoch: int) -> Shard:
        config = self.config
        number = epoch // config.shards_reused
        if self._shard is None or self._shard[0] != number:
            seed = config.seed * 1_000_003 + number
            self._shard = (number, encode_shard(self.vae, self.vae_config, seed, config.shard))
        return self._shard[1]


def noise_levels(rows: int, samples: int, shift: float, uniform: float, generator: torch.Generator) -> torch.Tensor:
    """(rows * samples,) noise levels in 0..1; those of a row lie in as many equal parts of the distribution.

    A share `uniform` is uniform, the others are logit-normal, then shifted: `k s / (1 + (k - 1) s)`.
    """
    part = (torch.arange(samples) + torch.rand(rows, samples, generator=generator)) / samples
    normal = torch.sigmoid(torch.special.ndtri(part.clamp(1e-4, 1 - 1e-4)))
    shifted = shift * normal / (1 + (shift - 1) * normal)
    is_uniform = torch.rand(rows, samples, generator=generator) < uniform
    return torch.where(is_uniform, part, shifted).flatten()


def _matrices(model: torch.nn.Module) -> list[str]:
    """The parameters that Muon steps: matrices inside the stack, and the convolutions beside it but for the last."""
    inside = ("qkv_proj", "o_proj", "experts", "shared_mlp", ".conv1.", ".conv2.", ".skip.")
    return [n for n, p in model.named_parameters() if p.ndim > 1 and any(part in n for part in inside)]
