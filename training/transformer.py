"""Second stage: the transformer learns to write and to draw, pictures by flow matching, words by the next token."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from hunyuan3.config import ModelConfig
from hunyuan3.folder import ModelFolder
from hunyuan3.image.preprocess import vision_patches
from hunyuan3.moe.layer import MoELayer
from hunyuan3.transformer.model import Hunyuan3Transformer

from .attention import attend_products
from .crew import Crew
from .draw import draw
from .experts import Balance, run_experts
from .export import Sizes, config_json, write_folder
from .flat_vae import FlatVAE, volumetric
from .initial import initial_transformer, initial_vision
from .joint import JointPass, Noisy, Shown
from .latents import encode_scenes, scaling_of
from .lessons import Curriculum, make_lessons
from .optimiser import Optimiser, OptimiserConfig, trapezoid
from .rows import Batch, Row, collate, in_batches, lay_out
from .scene import Scene
from .vae import TINY_VAE


@dataclass(frozen=True)
class TransformerStageConfig:
    """Lengths, shares and weights of the stage.

    Attributes:
        curriculum: what is taught.
        rows, samples: R texts per step, and how many noise levels of its picture each of them sees.
        lessons: of an epoch; each epoch has its own scenes, which are encoded at its beginning.
        repeats: how often an epoch's lessons are gone through.
        dropout: share of rows that are their unconditional branch (Ho and Salimans 2022).
        shift, uniform: noise levels are logit-normal, a share uniform, all shifted towards noise (Esser et al. 2024).
        words, balance: weights of the next-token and the load-balancing loss beside the flow matching loss.
        posterior: deviation of the noise on input pictures' latents, which inference draws from their posterior.
        distilled: whether the model is told guidance and the end of its step, and draws without a second branch.
    """

    sizes: Sizes = field(default_factory=Sizes)
    curriculum: Curriculum = field(default_factory=Curriculum)
    optimiser: OptimiserConfig = field(default_factory=lambda: OptimiserConfig(rate=1.5e-3, muon_rate=3e-3))
    steps: int = 2600
    warmup: int = 150
    decay_share: float = 0.4
    rows: int = 64
    samples: int = 1
    lessons: int = 49152
    repeats: int = 2
    dropout: float = 0.1
    shift: float = 4.0
    uniform: float = 0.4
    words: float = 0.1
    balance: float = 0.01
    posterior: float = 0.05
    distilled: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """Lessons laid out in batches, with what they speak of.

    number: from 0. first: the step that it begins with. latents: of each scene of a batch, scaled, bfloat16.
    """

    number: int
    first: int
    scenes: tuple[Scene, ...]
    latents: Mapping[int, torch.Tensor]
    batches: tuple[list[Row], ...]


class TransformerStage:
    """Trains transformer and vision tower beside a finished VAE. A step's data and noise depend on its number alone.

    compute: the dtype of the networks themselves; their float32 masters are the optimiser's. The VAE and the
    vocabulary travel with the state.
    """

    name = "transformer"
    measures = ("flow", "flow_shown", "words", "answer", "norm")

    def __init__(
        self,
        config: TransformerStageConfig,
        tokenizer: Tokenizer,
        vae_state: Mapping[str, torch.Tensor],
        scaling: tuple[float, float] | None = None,
        compute: torch.dtype = torch.bfloat16,
        crew: Crew | None = None,
    ) -> None:
        """vae_state: of a `FlatVAE`. scaling: (shift, scaling) of its latents, measured where it is None.

        crew: the processes that train together; None for this one alone.
        """
        self.config = config
        self.compute = compute
        self.crew = crew or Crew()
        if self.crew.size > max(1, config.rows // 4):  # the rows of the smallest batch
            raise ValueError(f"{self.crew.size} processes for {config.rows} rows a step; a batch may have a quarter.")
        self.tokenizer = tokenizer
        self.vae_state = {name: tensor.to(torch.bfloat16) for name, tensor in vae_state.items()}
        self.vae = FlatVAE(TINY_VAE, compute).requires_grad_(False)
        self.vae.load_state_dict({name: tensor.float() for name, tensor in self.vae_state.items()})
        self.scaling = scaling or scaling_of(self.vae, config.seed)
        self.vae_config = replace(TINY_VAE, shift_factor=self.scaling[0], scaling_factor=self.scaling[1])
        self.json = config_json(tokenizer, self.vae_config, config.sizes, config.distilled)
        model_config = ModelConfig.from_json(self.json)
        self.model = initial_transformer(model_config, config.seed)
        self.vision = initial_vision(model_config, config.seed)
        self.optimiser = Optimiser(self._parameters(), _matrices(self.model, self.vision), config.optimiser, self.crew)
        self.vision.to(compute)
        for_training(self.model.to(compute))
        self.balance = Balance(self.model)
        self.folder = self._folder()
        self.done = 0
        self._epoch: Epoch | None = None

    def step(self) -> dict[str, float]:
        """One update; returns what the log records, of this process's rows."""
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + self.done + self.crew.rank * 10**12)
        epoch = self._current_epoch()
        rows = self._rows(epoch)
        rng = random.Random(f"rows:{config.seed}:{self.done}")
        dropped = [rng.random() < config.dropout for _ in rows]
        batch = collate(self.crew.share(rows), self.folder.tokens, self.crew.share(dropped))
        shown = [self._shown(epoch, batch, place, generator) for place in range(len(batch.lessons[0].inputs))]
        read = JointPass(self.model, self.vision, batch, shown)
        record: dict[str, float] = {}
        loss = 0.0
        if batch.lessons[0].scene is not None:
            loss = self._flow(epoch, batch, shown, read, generator)
            record["flow_shown" if shown else "flow"] = loss.item()
        loss = loss + config.balance * self.balance.take()
        if len(read.targets):
            words = F.cross_entropy(read.logits, read.targets)
            loss = loss + config.words * words
            record["answer" if batch.lessons[0].scene is None else "words"] = words.item()
        loss.backward()
        self.crew.average(self.optimiser.parameters.values())
        record["norm"] = self.optimiser.step(trapezoid(self.done, config.steps, config.warmup, config.decay_share))
        self.done += 1
        return record

    def _flow(
        self, epoch: Epoch, batch: Batch, shown: Sequence[Shown], read: JointPass, generator: torch.Generator
    ) -> torch.Tensor:
        """The flow matching loss of a batch's pictures: `x = (1 - s) z + s n`, target `n - z`."""
        samples = self._samples(batch)
        clean = self._clean(epoch, batch, samples)
        sigmas = noise_levels(len(batch.ids), samples, self.config.shift, self.config.uniform, generator)
        noise = torch.randn(clean.shape, generator=generator)
        return (read.velocity(Noisy(mixed(clean, noise, sigmas), sigmas)) - (noise - clean)).square().mean()

    def _samples(self, batch: Batch) -> int:
        """How many noise levels each row of a batch sees: more, to a limit, where there are fewer rows."""
        config = self.config
        return max(1, min(2 * config.samples, config.rows * config.samples // (len(batch.ids) * self.crew.size)))

    def _clean(self, epoch: Epoch, batch: Batch, samples: int) -> torch.Tensor:
        """(R * samples, C, h, w) float32: the latents to be drawn, scaled."""
        return (
            torch.stack([epoch.latents[lesson.scene] for lesson in batch.lessons]).float().repeat_interleave(samples, 0)
        )

    def state(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "distilled": self.config.distilled,
            "tokenizer": self.tokenizer.to_str(),
            "optimiser": self.optimiser.state(),
            "vae": self.vae_state,
            "scaling": list(self.scaling),
            "epoch": [0, 0] if self._epoch is None else [self._epoch.number, self._epoch.first],
        }

    def restore(self, state: Mapping[str, Any], plan: bool = True) -> None:
        """Goes on from a state. plan: lay out the epoch's lessons as well, which an export does not need."""
        self.done = int(state["done"])
        self.optimiser.restore(state["optimiser"])
        if plan:
            self._epoch = self._plan(*state["epoch"])

    def start_from(self, state: Mapping[str, Any]) -> None:
        """Begins a stage with the averaged weights that another one ended with; moments and steps start anew."""
        self.optimiser.restore({"average": state["optimiser"]["average"], "steps": 0})

    def export(self, out: Path, average: bool = True) -> Path:
        """Writes the checkpoint folder, with the averaged weights or the last ones."""
        return self._write(out, self.optimiser.average if average else self.optimiser.masters)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """The transformer's by their names, the vision tower's below `vision.`."""
        seeing = {f"{_VISION}{name}": parameter for name, parameter in self.vision.named_parameters()}
        return {**dict(self.model.named_parameters()), **seeing}

    def _write(self, out: Path, weights: Mapping[str, torch.Tensor]) -> Path:
        seeing = {name.removeprefix(_VISION): tensor for name, tensor in weights.items() if name.startswith(_VISION)}
        states = {"transformer": weights, "vae": volumetric(self.vae_state), "vision": seeing}
        return write_folder(out, self.tokenizer, self.json, states)

    def _folder(self) -> ModelFolder:
        """The opened checkpoint, for the package's own code that lays out requests; it needs no weights any more."""
        with TemporaryDirectory() as place:
            folder = ModelFolder.open(self._write(Path(place), self.optimiser.masters))
            assert folder.fingerprint  # reads the files' times, once
            return folder

    def _current_epoch(self) -> Epoch:
        """The epoch of this step, made anew where the last one is over."""
        if self._epoch is None:
            self._epoch = self._plan(0, 0)
        if self.done - self._epoch.first >= len(self._epoch.batches) * self.config.repeats:
            self._epoch = self._plan(self._epoch.number + 1, self.done)
        return self._epoch

    def _plan(self, number: int, first: int) -> Epoch:
        config = self.config
        rng = random.Random(f"lessons:{config.seed}:{number}")
        scenes, lessons = make_lessons(rng, config.lessons, config.curriculum)
        rows = (lay_out(self.folder, lesson, scenes) for lesson in lessons)
        batches = in_batches(rows, config.rows, max(1, config.rows // 4), rng)
        seen = sorted({number for batch in batches for row in batch for number in row.lesson.scenes})
        if self.crew.rank == 0:
            _log.info("encodes the %d scenes of an epoch of %d lessons", len(seen), len(lessons))
        shared = self.crew.share([scenes[number] for number in seen])
        latents = self.crew.gathered(encode_scenes(self.vae, self.vae_config, shared))
        return Epoch(number, first, scenes, dict(zip(seen, latents, strict=True)), tuple(batches))

    def _rows(self, epoch: Epoch) -> list[Row]:
        """This step's rows. Each time through, the batches come in another order."""
        turn, place = divmod(self.done - epoch.first, len(epoch.batches))
        order = list(range(len(epoch.batches)))
        random.Random(f"order:{epoch.number}:{turn}").shuffle(order)
        return epoch.batches[order[place]]

    def _shown(self, epoch: Epoch, batch: Batch, place: int, generator: torch.Generator) -> Shown:
        """The input pictures at one place of a batch's rows."""
        settings = self.folder.config.vision
        numbers = [lesson.inputs[place] for lesson in batch.lessons]
        latents = torch.stack([epoch.latents[number] for number in numbers]).float()
        deviation = self.config.posterior * self.vae_config.scaling_factor
        patches = [
            vision_patches(
                draw(epoch.scenes[number]),
                max_num_patches=settings.max_num_patches,
                patch_size=settings.patch_size,
            )
            for number in numbers
        ]
        return Shown(latents + deviation * torch.randn(latents.shape, generator=generator), patches)


def for_training(model: Hunyuan3Transformer) -> Hunyuan3Transformer:
    """The model, with attention and experts that have gradients and are fast on a CPU."""
    for layer in model.layers:
        assert isinstance(layer.mlp, MoELayer)
        layer.mlp.backend = run_experts
        layer.self_attn.attend = attend_products
    return model


def mixed(clean: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """(n, C, h, w) pictures at the noise levels `sigmas` (n,) in 0..1."""
    level = sigmas[:, None, None, None]
    return (1 - level) * clean + level * noise


def shifted(s: torch.Tensor, shift: float) -> torch.Tensor:
    """Places 0..1 of a schedule -> noise levels 0..1 (Esser et al. 2024): `k s / (1 + (k - 1) s)`."""
    return shift * s / (1 + (shift - 1) * s)


def noise_levels(rows: int, samples: int, shift: float, uniform: float, generator: torch.Generator) -> torch.Tensor:
    """(rows * samples,) noise levels in 0..1, those of a row together, spread evenly over the distribution.

    Those of a row lie in as many equal parts of it, and in each part the rows' lie in as many equal parts again.
    Before the shift they are logit-normal, a share `uniform` uniform.
    """
    within = torch.rand(rows, samples, generator=generator).argsort(dim=0)
    within = (within + torch.rand(rows, samples, generator=generator)) / rows
    part = (torch.arange(samples) + within) / samples
    normal = torch.sigmoid(torch.special.ndtri(part.clamp(1e-4, 1 - 1e-4)))
    is_uniform = torch.rand(rows, samples, generator=generator) < uniform
    s = torch.where(is_uniform, part, normal)
    return shifted(s, shift).flatten()


def _matrices(model: torch.nn.Module, vision: torch.nn.Module) -> list[str]:
    """The parameters that Muon steps: matrices inside the stacks, and the convolutions beside them but for the last."""
    inside = ("qkv_proj", "o_proj", "experts", "shared_mlp", ".conv1.", ".conv2.", ".skip.")
    found = [n for n, p in model.named_parameters() if p.ndim > 1 and any(part in n for part in inside)]
    return found + [f"{_VISION}{n}" for n, p in vision.named_parameters() if p.ndim > 1 and ".layers." in n]


_VISION = "vision."
_log = logging.getLogger(__name__)
