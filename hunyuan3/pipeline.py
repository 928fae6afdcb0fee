"""The model handle: one checkpoint folder, its networks, and what one does with them.

Example::

    from hunyuan3.pipeline import Hunyuan3

    model = Hunyuan3.load("models/hunyuan3/HunyuanImage-3.0-Instruct-Distil")
    conditioning = model.conditioning("a red fox asleep in tall grass", width=1024, height=1024)
    for step in (run := model.sample(conditioning, seed=1)):
        print(f"{step.step + 1}/{step.steps}")
    model.pictures(run.latents)[0].save("fox.png")
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .callbacks import CheckCancelled, Progress, never_cancelled, no_progress
from .checkpoint.index import open_shard
from .conditioning import Conditioning, make_conditioning
from .errors import RequestError
from .folder import ModelFolder
from .generate.prefix import PrefixStore
from .generate.stages import StagePlan
from .image.preprocess import align_output
from .parts import LoadOptions, ResolvedOptions, host_room_for, place_transformer, place_vae, place_vision, room_for
from .pictures import EncodedPicture, encode_pictures
from .run import SamplingRun, require_latents
from .transformer.model import Hunyuan3Transformer
from .types import ImageSize
from .vae.autoencoder import AutoencoderKLConv3D
from .vision.siglip2 import Vision
from .writing import TextRequest, WritingRun


class Hunyuan3:
    """A checkpoint folder and its networks, each loaded when first used and released on demand."""

    def __init__(self, folder: ModelFolder, options: ResolvedOptions) -> None:
        self.folder = folder
        self.options = options
        self.placed_transformer = place_transformer(folder, options)
        self.placed_vae = place_vae(folder, options)
        self.placed_vision = place_vision(folder, options)
        self.prefixes = PrefixStore()

    @classmethod
    def open(cls, folder: str | Path, *, variant: str = "auto", **options: Any) -> "Hunyuan3":
        """Opens and checks a folder; the networks follow when they are first used.

        `options`: device, dtype, format, vram, ...; see `LoadOptions`.

        Raises CheckpointError, UnsupportedConfigError or RequestError, each naming the file or input at fault.
        """
        opened = ModelFolder.open(folder, variant)
        return cls(opened, LoadOptions(**options).resolved(opened.stored_format))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        progress: Progress = no_progress,
        check_cancelled: CheckCancelled = never_cancelled,
        **options: Any,
    ) -> "Hunyuan3":
        """`open`, with the transformer's weights loaded at once."""
        model = cls.open(folder, **options)
        model._load_transformer(progress, check_cancelled)
        return model

    def transformer(self) -> Hunyuan3Transformer:
        """The transformer, loaded if it is not."""
        return self._load_transformer()

    def _load_transformer(
        self, progress: Progress = no_progress, check_cancelled: CheckCancelled = never_cancelled
    ) -> Hunyuan3Transformer:
        placed = self.placed_transformer
        return placed.load(
            room=room_for(placed, self.options),
            host_has_room=host_room_for(placed, self.options),
            progress=progress,
            check_cancelled=check_cancelled,
        )

    def vae(self) -> AutoencoderKLConv3D:
        """The VAE, loaded if it is not."""
        return self.placed_vae.load()

    def vision(self) -> Vision:
        """The vision tower, loaded if it is not."""
        return self.placed_vision.load()

    def release(self) -> None:
        """Drops the weights and the kept prompts; they are read and computed again when next used."""
        self.prefixes.clear()
        for part in (self.placed_transformer, self.placed_vae, self.placed_vision):
            part.drop()

    def encode_pictures(
        self,
        pictures: Sequence[Image.Image],
        *,
        align: bool = False,
        tile_size: int | None = None,
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> tuple[EncodedPicture, ...]:
        """Encodes input pictures (upright RGB, see `image.preprocess.load_picture`) for conditionings and texts.

        `align` stretches each to the nearest trained shape instead of cropping it; `restore_shape` undoes that on the
        drawn picture.
        """
        return encode_pictures(
            self.folder,
            self.vae(),
            self.vision(),
            pictures,
            align=align,
            tile_size=tile_size,
            check_cancelled=check_cancelled,
        )

    def write(self, request: TextRequest, plan: StagePlan, **settings: Any) -> WritingRun:
        """Prepares a text pass; iterate over it to write. `plan`: from `writing.thinking` and the like.

        `settings`: sampling, seed, max_new_tokens, check_cancelled; see `WritingRun`.
        """
        return WritingRun(self.folder, self.transformer(), request, plan, prefixes=self.prefixes, **settings)

    def conditioning(self, prompt: str, *, width: int = 0, height: int = 0, **others: Any) -> Conditioning:
        """Lays out a request for a picture of `width` x `height` pixels (multiples of 16; 0: the base size).

        `others`: pictures, system_prompt, custom_system_prompt, trace, ...; see `make_conditioning`.
        """
        base = self.folder.config.image_base_size
        resolution = self.folder.resolutions.free(height or base, width or base)
        return make_conditioning(self.folder, prompt, resolution, **others)

    def sample(self, conditioning: Conditioning, **settings: Any) -> SamplingRun:
        """Prepares a run; iterate over it to draw, then take its `latents`.

        `settings`: seed, steps, guidance, shift, batch_size, noise, latent, denoise, taylor, one_branch_at_a_time,
        check_cancelled; see `SamplingRun.prepare`. Raises RequestError naming the argument at fault.
        """
        return SamplingRun.prepare(self.folder, self.transformer(), conditioning, prefixes=self.prefixes, **settings)

    def decode(
        self,
        latents: torch.Tensor,
        *,
        tile_size: int | None = None,
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> torch.Tensor:
        """Unscaled latents (B, C, h, w) -> pixels (B, H, W, 3) in [0, 1], float32 on the CPU.

        `tile_size`: decode in tiles of so many pixels, for small cards; None decodes each picture whole.
        Raises RequestError for latents of another model or with numbers that are not finite.
        """
        require_latents(latents, self.folder.config.vae, "latents")
        pixels = self.vae().decode(
            latents.to(self.options.device, torch.float32), tile_size=tile_size, check_cancelled=check_cancelled
        )
        pixels = pixels.float()
        if not torch.isfinite(pixels).all():
            raise RequestError(
                f"The VAE overflowed in {self.options.vae_dtype}: the picture would be black. "
                "Load with vae_dtype float32."
            )
        return (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous().cpu()

    def encode(
        self,
        pixels: torch.Tensor,
        *,
        tile_size: int | None = None,
        check_cancelled: CheckCancelled = never_cancelled,
    ) -> torch.Tensor:
        """Pixels (B, H, W, 3) in [0, 1] -> unscaled latents (B, C, H/16, W/16), float32 on the CPU.

        The mean of the VAE's posterior, so the same picture always gives the same latent. Raises RequestError for
        sizes that are no multiple of 16, among them 0.
        """
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or not pixels.numel():
            raise RequestError(
                f"pixels has the shape {list(pixels.shape)}; it must be [B, height, width, 3], not empty."
            )
        if not torch.isfinite(pixels).all():
            raise RequestError("pixels holds numbers that are not finite (NaN or infinity).")
        scaled = (pixels.permute(0, 3, 1, 2).float() * 2 - 1).to(self.options.device)
        posterior = self.vae().encode(scaled, tile_size=tile_size, check_cancelled=check_cancelled)
        return posterior.mode().float().cpu()

    def restore_shape(self, pixels: torch.Tensor, originals: Sequence[ImageSize]) -> torch.Tensor:
        """Drawn pixels (B, H, W, 3) in [0, 1] -> the shape of the input picture that they belong to (spec 5.5).

        `originals`: sizes of the input pictures, encoded with `align`. Unchanged where none belongs to this size.
        """
        table = self.folder.resolutions
        restored = [
            align_output(
                (picture * 255).round().to(torch.uint8),
                originals,
                lambda size: table.rows[table.nearest(*size)],
                table.base_size,
            )
            for picture in pixels
        ]
        return torch.stack(restored).float() / 255

    def vae_fingerprint(self) -> str:
        """Sixteen hex digits that tell this folder's VAE from another; reads three small tensors, not the VAE."""
        names = ("vae.encoder.conv_in.weight", "vae.encoder.conv_out.weight", "vae.decoder.conv_out.weight")
        digest = hashlib.sha256()
        for name in names:
            with open_shard(self.folder.index[name].file) as file:
                digest.update(file.get_tensor(name).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def pictures(self, latents: torch.Tensor, *, tile_size: int | None = None) -> list[Image.Image]:
        """Unscaled latents (B, C, h, w) -> PIL pictures."""
        pixels = (self.decode(latents, tile_size=tile_size) * 255).round().to(torch.uint8)
        return [Image.fromarray(picture.numpy()) for picture in pixels]
