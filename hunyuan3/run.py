"""One drawing: a request with its settings checked and its defaults filled in, drawn step by step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .callbacks import CheckCancelled, never_cancelled
from .conditioning import Conditioning, require_made_for
from .config import VAEConfig
from .errors import RequestError
from .folder import ModelFolder
from .generate.denoise import DenoiseStep, denoise
from .generate.noise import NOISE_SOURCES, NoiseSource, draw_noise, reference_generators
from .generate.prefix import PrefixStore
from .generate.rows import SequenceRows
from .generate.schedule import Schedule
from .generate.taylor import TaylorOptions
from .pictures import show_pictures
from .transformer.model import Hunyuan3Transformer


@dataclass(frozen=True)
class SamplingSettings:
    """What a run uses, the checkpoint's defaults filled in."""

    seed: int
    steps: int
    guidance: float
    shift: float
    batch_size: int
    noise: NoiseSource
    denoise: float
    taylor: TaylorOptions | None = None
    one_branch_at_a_time: bool = False


class SamplingRun:
    """Iterating draws, a `DenoiseStep` at a time; `latents` holds the result afterwards."""

    def __init__(
        self,
        vae: VAEConfig,
        transformer: Hunyuan3Transformer,
        conditioning: Conditioning,
        settings: SamplingSettings,
        start: torch.Tensor | None,
        prefixes: PrefixStore | None,
        check_cancelled: CheckCancelled,
    ) -> None:
        self.vae = vae
        self.transformer = transformer
        self.conditioning = conditioning
        self.settings = settings
        self.prefixes = prefixes
        self.check_cancelled = check_cancelled
        self._start = start
        self._result: torch.Tensor | None = None

    @classmethod
    def prepare(
        cls,
        folder: ModelFolder,
        transformer: Hunyuan3Transformer,
        conditioning: Conditioning,
        *,
        seed: int = 0,
        steps: int = 0,
        guidance: float = 0.0,
        shift: float = 0.0,
        batch_size: int = 1,
        noise: NoiseSource = "comfy",
        latent: torch.Tensor | None = None,
        denoise: float = 1.0,
        taylor: TaylorOptions | None = None,
        one_branch_at_a_time: bool = False,
        prefixes: PrefixStore | None = None,
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> "SamplingRun":
        """Checks the settings and fills in the checkpoint's defaults.

        Args:
            seed: 0 <= seed < 2**64; the same seed draws the same picture.
            steps, guidance, shift: 0 means the checkpoint's own default; negative is an error.
            batch_size: pictures drawn at once.
            noise: "comfy", "device" or "reference" (see generate.noise).
            latent: unscaled latents (B, C, h, w) to start from, of the conditioning's size; with `denoise` below 1
                they shape the picture, at 1 they are replaced by noise altogether. One is repeated to the batch size.
            denoise: share of the schedule that is run, from its end; 0 returns the latent as it came.
            taylor: step cache.
            one_branch_at_a_time: less memory for two-branch guidance.
            prefixes: prompts that were computed before, used and added to.

        Raises RequestError naming the argument at fault.
        """
        require_made_for(conditioning, folder)
        for name, value in (("steps", steps), ("guidance", guidance), ("shift", shift)):
            if not 0 <= value < float("inf"):
                raise RequestError(
                    f"{name} is {value}; it must not be negative, and finite (0 means the checkpoint's default)."
                )
        if not 0 <= seed < 2**64:
            raise RequestError(f"seed is {seed}; it must be from 0 to 2**64 - 1.")
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; it must be at least 1.")
        if noise not in NOISE_SOURCES:
            raise RequestError(f"noise is {noise!r}; it must be one of {', '.join(NOISE_SOURCES)}.")
        if not 0 <= denoise <= 1:
            raise RequestError(f"denoise is {denoise}; it must be from 0 to 1.")
        vae = folder.config.vae
        if latent is not None:
            latent = _checked_start(latent, vae, conditioning, batch_size)
            batch_size = latent.shape[0]
        elif denoise < 1:
            raise RequestError(f"denoise is {denoise}, but no latent is given to start from. Set it to 1 or give one.")
        if transformer.drops_tokens and batch_size > 1:
            raise RequestError("With drop_tokens the pictures of a batch compete for experts; draw one at a time.")
        defaults = folder.generation
        settings = SamplingSettings(
            seed=seed,
            steps=steps or defaults.steps,
            guidance=guidance or defaults.guidance,
            shift=shift or defaults.flow_shift,
            batch_size=batch_size,
            noise=noise,
            denoise=denoise,
            taylor=taylor,
            one_branch_at_a_time=one_branch_at_a_time,
        )
        return cls(vae, transformer, conditioning, settings, latent, prefixes, check_cancelled)

    def __iter__(self) -> Iterator[DenoiseStep]:
        settings = self.settings
        if settings.denoise == 0:
            self._result = self._start
            return
        schedule = Schedule.flow_matching(settings.steps, settings.shift, settings.denoise)
        rows, latents = self._start_of(schedule)
        for step in denoise(
            self.transformer,
            rows,
            latents,
            schedule,
            settings.guidance,
            taylor=settings.taylor,
            one_branch_at_a_time=settings.one_branch_at_a_time,
            prefixes=self.prefixes,
            check_cancelled=self.check_cancelled,
        ):
            latents = step.latents
            yield step
        if not torch.isfinite(latents).all():
            raise RequestError(
                "The drawing ran into numbers that are not finite: the picture would be black. "
                "Try dtype float32; if that fails too, the weights may be damaged."
            )
        self._result = self.vae.unscale(latents).cpu()

    @property
    def latents(self) -> torch.Tensor:
        """The drawn pictures: unscaled latents (B, C, h, w), float32, on the CPU. Draws first if nobody iterated."""
        if self._result is None:
            for _step in self:
                pass
        assert self._result is not None
        return self._result

    def _start_of(self, schedule: Schedule) -> tuple[SequenceRows, torch.Tensor]:
        """The rows with their input pictures, and the starting latents: noise, mixed with the given latent at the
        schedule's first level.
        """
        settings, device = self.settings, self.transformer.device
        conditioning = self.conditioning
        generators = reference_generators(settings.seed, settings.batch_size, device)
        # The reference draws the pictures' latents from the first picture's generator, before its noise.
        source = generators[0] if conditioning.posterior == "reference" else None
        rows = conditioning.rows.showing(show_pictures(self.vae, conditioning.pictures, source))
        grid = rows.sequence.gen_run.grid
        shape = (settings.batch_size, self.vae.latent_channels, grid.height, grid.width)
        noise = draw_noise(settings.noise, settings.seed, shape, device, generators)
        if self._start is None or schedule.sigmas[0] == 1:
            return rows, noise
        sigma = schedule.sigmas[0].to(device)
        return rows, sigma * noise + (1 - sigma) * self.vae.scale(self._start.to(device))


def require_latents(latents: torch.Tensor, vae: VAEConfig, what: str) -> None:
    """Raises RequestError unless these are finite latents (B, C, h, w) with this model's number of channels."""
    if latents.ndim != 4 or latents.shape[1] != vae.latent_channels or not latents.numel():
        raise RequestError(
            f"{what} has the shape {list(latents.shape)}; this model's are [B, {vae.latent_channels}, height/16, "
            "width/16]. Is it from another model?"
        )
    if not torch.isfinite(latents).all():
        raise RequestError(f"{what} holds numbers that are not finite (NaN or infinity).")


def _checked_start(latent: torch.Tensor, vae: VAEConfig, conditioning: Conditioning, batch_size: int) -> torch.Tensor:
    require_latents(latent, vae, "latent")
    if tuple(latent.shape[2:]) != tuple(conditioning.rows.sequence.gen_run.grid):
        height, width = (16 * side for side in latent.shape[2:])
        raise RequestError(
            f"The latent is of a {width}x{height} picture, the conditioning asks for "
            f"{conditioning.size.width}x{conditioning.size.height}. Make the two equal."
        )
    if batch_size not in (1, latent.shape[0]) and latent.shape[0] != 1:
        raise RequestError(f"batch_size is {batch_size}, but the latent holds {latent.shape[0]} pictures.")
    repeats = batch_size if latent.shape[0] == 1 else 1
    return latent.float().cpu().repeat(repeats, 1, 1, 1)
