"""Pictures on their way in (for the VAE and for the vision tower) and on their way out (spec 5.3-5.5, 9.6).

An input picture has two faces. The VAE sees it fitted to a resolution bucket, the vision tower sees the uncropped
original, scaled to as many 16x16 patches as fit. Both are bit-exact with the reference; each of the three resizing
methods in this file is the one that is needed there, none can stand in for another.

Which bucket belongs to a picture is `resolution`'s business; here it is an argument. Fetching pictures from the
network and data URIs, which the reference also loads, is left to the caller.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import RequestError
from ..types import Grid, ImageSize

# Aspect ratios closer than this are not worth another resampling (spec 5.5).
SAME_RATIO = 0.01


class VisionPatches(NamedTuple):
    """One picture for the vision tower.

    Attributes:
        pixels: `(max_num_patches, patch * patch * 3)` float32 in [-1, 1]; row-major patches, inside a patch
            (row, column, channel); zeros after the last one.
        mask: `(max_num_patches,)` int32, 1 for a patch, 0 for padding.
        grid: patches per column and row.
    """

    pixels: Tensor
    mask: Tensor
    grid: Grid


def load_picture(source: str | Path | Image.Image, *, reference: bool = False) -> Image.Image:
    """A file or an opened picture -> RGB, upright.

    EXIF orientation is applied first. Transparency is dropped (the colours underneath show), 16-bit grey is scaled to
    8 bits; the `reference` clips it at 255, which leaves little but white. Raises RequestError.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, reference)
    try:
        with Image.open(source) as picture:
            return _to_rgb(picture, reference)
    except FileNotFoundError:
        raise RequestError(f"There is no picture {source}.") from None
    except Exception as error:  # Pillow's readers raise all sorts: OSError, SyntaxError, ValueError, RuntimeError ...
        raise RequestError(f"{source} cannot be read as a picture ({error}).") from error


def _to_rgb(picture: Image.Image, reference: bool) -> Image.Image:
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I") and not reference:  # I;16 and its byte orders; older Pillow reads them as I
        values = np.asarray(upright).astype(np.float64)
        if upright.mode != "I" or values.max() > 255:
            upright = Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
    return upright.convert("RGB")


def picture_of(pixels: Tensor) -> Image.Image:
    """`(H, W, 3)` uint8 -> RGB picture."""
    return Image.fromarray(pixels.cpu().numpy())


def size_of(picture: Image.Image) -> ImageSize:
    """Height and width of a picture, in the order of this package."""
    return ImageSize(picture.height, picture.width)


def fit_picture(picture: Image.Image, target: ImageSize, *, stretch: bool = False) -> Tensor:
    """The VAE's face of a picture: RGB -> `(3, target.height, target.width)` uint8 (spec 5.3).

    Args:
        picture: upright RGB picture.
        target: the picture's bucket.
        stretch: resize to the bucket and distort (the reference's `infer_align_image_size`), instead of keeping the
            aspect, covering the bucket and cropping the centre.
    """
    if stretch:
        return to_channels_first(picture.resize((target.width, target.height), Image.Resampling.LANCZOS))
    height, width = picture.height, picture.width
    if height / width < target.height / target.width:
        cover = ImageSize(target.height, round(target.height / height * width))
    else:
        cover = ImageSize(round(target.width / width * height), target.width)
    resized = picture.resize((cover.width, cover.height), Image.Resampling.LANCZOS)
    top = round((cover.height - target.height) / 2)
    left = round((cover.width - target.width) / 2)
    return to_channels_first(resized.crop((left, top, left + target.width, top + target.height)))


def to_vae_range(pixels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return (pixels.float() / 255 - 0.5) / 0.5


def vision_patches(picture: Image.Image, *, max_num_patches: int, patch_size: int) -> VisionPatches:
    """The vision tower's face of a picture: SigLIP2 NaFlex preprocessing of the upright RGB original (spec 5.4).

    1. Largest size in whole patches that fits; 2. bilinear, antialiased resize in uint8; 3. to [-1, 1]; 4. cut into
    patches; 5. pad to `max_num_patches`.
    """
    grid = patch_grid(size_of(picture), max_num_patches=max_num_patches, patch_size=patch_size)
    # A float resize, or Pillow's, differs in every sixth value: torch rounds its uint8 weights in its own way, on CPU.
    resized = F.interpolate(
        to_channels_first(picture)[None],
        size=(grid.height * patch_size, grid.width * patch_size),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )[0]
    pixels = (resized.float() - 127.5) / 127.5
    patches = rearrange(pixels, "c (h ph) (w pw) -> (h w) (ph pw c)", ph=patch_size, pw=patch_size)
    padding = max_num_patches - len(patches)
    mask = torch.ones(len(patches), dtype=torch.int32)
    return VisionPatches(F.pad(patches, (0, 0, 0, padding)), F.pad(mask, (0, padding)), grid)


def patch_grid(size: ImageSize, *, max_num_patches: int, patch_size: int) -> Grid:
    """Patches per column and row: the largest scale (up or down) whose rounded-up sides still fit.

    A bisection on the scale, in the reference's interval and to its precision, because the scale that it ends with
    decides the rounding.
    """

    def grid_at(scale: float) -> Grid:
        return Grid(*(max(1, math.ceil(side * scale / patch_size)) for side in size))

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        grid = grid_at(middle)
        if grid.height * grid.width <= max_num_patches:
            low = middle
        else:
            high = middle
    return grid_at(low)


def to_uint8(pixels: Tensor) -> Tensor:
    """The VAE's output `(B, 3, H, W)`, nominally in [-1, 1] -> `(B, H, W, 3)` uint8 on the CPU (spec 9.6).

    Denormalised and clamped in the dtype of the input, as the reference does for its float16 output.
    """
    unit = (pixels * 0.5 + 0.5).clamp(0, 1)
    return (rearrange(unit, "b c h w -> b h w c").float() * 255).round().to(torch.uint8).cpu()


def align_output(
    picture: Tensor, originals: Sequence[ImageSize], bucket_of: Callable[[ImageSize], ImageSize], base_size: int
) -> Tensor:
    """Gives a drawn picture the aspect of the input picture it belongs to (spec 5.5).

    The first input picture with the same bucket counts. If its aspect differs from the bucket's by 0.01 or more, the
    drawing is resized to that aspect and an area of `base_size ** 2`; otherwise it stays as it is.

    Args:
        picture: `(H, W, 3)` uint8, as drawn.
        originals: sizes of the input pictures, upright; may be empty.
        bucket_of: the bucket of a size.
        base_size: `image_base_size` of the checkpoint.

    Returns:
        `(H', W', 3)` uint8.
    """
    bucket = bucket_of(ImageSize(*picture.shape[:2]))
    original = next((size for size in originals if bucket_of(size) == bucket), None)
    if original is None or abs(original.height / original.width - bucket.height / bucket.width) < SAME_RATIO:
        return picture
    scale = math.sqrt(base_size**2 / (original.width * original.height))
    size = (round(original.width * scale), round(original.height * scale))
    resized = picture_of(picture).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized))


def to_channels_first(picture: Image.Image) -> Tensor:
    """RGB picture -> `(3, H, W)` uint8."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
