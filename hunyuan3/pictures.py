"""Input pictures: read once, encoded once, shown to the model as often as wanted."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image

from .callbacks import CheckCancelled, never_cancelled
from .config import VAEConfig
from .errors import RequestError
from .folder import ModelFolder
from .generate.rows import ShownPicture
from .image.preprocess import fit_picture, size_of, to_vae_range, vision_patches
from .image.resolution import Resolution
from .text.template import InputPicture
from .types import Grid, ImageSize
from .vae.autoencoder import AutoencoderKLConv3D, Posterior
from .vision.siglip2 import Vision

PosteriorMode = Literal["fixed", "reference"]
_FIXED_SEED = 0
_TOKENS_AROUND = 6  # <boi>, size, ratio, <timestep>, separator, <eoi>


@dataclass(frozen=True)
class EncodedPicture:
    """One input picture in both of its faces; all tensors on the CPU.

    size: of the picture as given. resolution: the row of the table it was fitted to. vision_grid: its patches.
    posterior: of its latent, mean and logvar (1, C, h, w). tokens (P, D): its vision tokens. key: tells its pixels and
    its fitting from any other's.
    """

    size: ImageSize
    resolution: Resolution
    vision_grid: Grid
    posterior: Posterior
    tokens: torch.Tensor
    key: str

    def in_template(self) -> InputPicture:
        """Its place in a conversation."""
        return InputPicture(self.resolution.ratio, self.resolution.grid, self.vision_grid, len(self.tokens))


@torch.no_grad()
def encode_pictures(
    folder: ModelFolder,
    vae: AutoencoderKLConv3D,
    vision: Vision,
    pictures: Sequence[Image.Image],
    *,
    align: bool = False,
    tile_size: int | None = None,
    check_cancelled: CheckCancelled = never_cancelled,
) -> tuple[EncodedPicture, ...]:
    """Encodes upright RGB pictures (see image.preprocess.load_picture) with loaded networks.

    `align` stretches a picture to its row of the table instead of cropping it (`infer_align_image_size`).
    """
    encoded: dict[str, EncodedPicture] = {}
    keys = []
    for picture in pictures:
        check_cancelled()
        keys.append(f"{picture.size} {hashlib.sha256(picture.tobytes()).hexdigest()}")
        if keys[-1] not in encoded:  # the same picture twice is encoded once
            encoded[keys[-1]] = _encode(folder, vae, vision, picture, align, tile_size, check_cancelled)
    return tuple(encoded[key] for key in keys)


def require_room_for(folder: ModelFolder, sizes: Sequence[ImageSize]) -> None:
    """Raises RequestError if pictures of these sizes alone take more tokens than a sequence may have."""
    table, patches = folder.resolutions, folder.config.vision.max_num_patches
    grids = [table.row(table.nearest(*size)).grid for size in sizes]
    tokens = sum(grid.height * grid.width + patches + _TOKENS_AROUND for grid in grids)
    if tokens > folder.max_length:
        raise RequestError(
            f"{len(sizes)} input pictures take {tokens} tokens, the limit is {folder.max_length}. Use fewer pictures."
        )


def show_pictures(
    vae: VAEConfig, pictures: Sequence[EncodedPicture], generator: torch.Generator | None = None
) -> tuple[ShownPicture, ...]:
    """Draws each picture's latent from its posterior.

    Without a generator the draw is fixed: it depends on nothing but the picture's place, so whatever was computed for
    it can be used again. With one (the request's own, as the reference does) it is drawn in order, before the noise.
    """
    shown = []
    for index, picture in enumerate(pictures):
        source = generator or torch.Generator().manual_seed(_FIXED_SEED + index)
        latent = vae.scale(picture.posterior.sample(source))[0]
        # By its numbers: a generator's seed does not tell how much was drawn from it before.
        drawn = hashlib.sha256(latent.cpu().numpy().tobytes()).hexdigest()[:16]
        shown.append(ShownPicture(latent, picture.tokens, f"{picture.key}/{drawn}"))
    return tuple(shown)


def _encode(
    folder: ModelFolder,
    vae: AutoencoderKLConv3D,
    vision: Vision,
    picture: Image.Image,
    align: bool,
    tile_size: int | None,
    check_cancelled: CheckCancelled,
) -> EncodedPicture:
    settings = folder.config.vision
    size = size_of(picture)
    resolution = folder.resolutions.row(folder.resolutions.nearest(*size))
    fitted = fit_picture(picture, resolution.size, stretch=align)
    pixels = to_vae_range(fitted)[None].to(next(vae.parameters()).device)
    posterior = vae.encode(pixels, tile_size=tile_size, check_cancelled=check_cancelled)
    seen = vision_patches(picture, max_num_patches=settings.max_num_patches, patch_size=settings.patch_size)
    device = next(vision.parameters()).device
    tokens = vision(seen.pixels[None].to(device), seen.mask[None].to(device), [seen.grid])[0]
    digest = hashlib.sha256(fitted.numpy().tobytes())
    digest.update(seen.pixels.numpy().tobytes())
    return EncodedPicture(
        size=size,
        resolution=resolution,
        vision_grid=seen.grid,
        posterior=Posterior(posterior.mean.cpu(), posterior.logvar.cpu()),
        tokens=tokens.cpu(),
        key=f"{digest.hexdigest()[:32]}{'-stretched' if align else ''}",
    )
