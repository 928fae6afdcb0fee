"""Hunyuan3VAEDecode and Hunyuan3VAEEncode: between latents and pictures, whole or in tiles as memory allows."""

from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import torch

from ..hunyuan3.errors import OutOfBudgetError
from ..hunyuan3.placement.estimate import decode_bytes, decode_tile_size
from ..hunyuan3.run import require_latents
from ..hunyuan3.types import ImageSize
from .budget import most_free_memory
from .compat import io, schema
from .io_types import HunyuanImages, HunyuanModel, ModelHandle, PictureSet
from .memory import bring_to_device
from .out_of_memory import EVERYTHING_ELSE, smaller_vae, with_one_retry
from .progress import NodeProgress, check_cancelled

_ALIGN = 16

_TILE_INPUT = {
    "default": 0,
    "min": 0,
    "max": 4096,
    "step": _ALIGN,
    "optional": True,
    "tooltip": (
        "Work in tiles of so many pixels (at least 32); 0: whole if memory allows, else in the largest tiles that fit."
    ),
}


class Hunyuan3VAEDecode(io.ComfyNode):
    """Decodes a latent."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3VAEDecode",
            display_name="Hunyuan3 VAE Decode",
            category="Hunyuan3",
            description="Turns a latent into a picture.",
            search_aliases=["hunyuan decode"],
            inputs=[
                HunyuanModel.Input("model", tooltip="From the Hunyuan3 Loader."),
                io.Latent.Input("samples", tooltip="From the Hunyuan3 Sampler."),
                io.Int.Input("tile_size", **_TILE_INPUT),
                HunyuanImages.Input(
                    "images",
                    optional=True,
                    tooltip="Optional: pictures encoded with 'align'; the result gets its input's own shape back.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The picture.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: ModelHandle, samples: dict[str, Any], tile_size: int = 0, images: PictureSet | None = None
    ) -> io.NodeOutput:
        latents = samples["samples"]
        require_latents(latents, model.model.folder.config.vae, "samples")
        size = ImageSize(_ALIGN * latents.shape[2], _ALIGN * latents.shape[3])
        progress = NodeProgress(cls.hidden.unique_id)
        image, tile = in_tiles(
            model,
            size,
            tile_size,
            "decode",
            lambda tile: model.model.decode(latents, tile_size=tile, check_cancelled=check_cancelled),
            progress,
        )
        if images is not None and images.align:
            image = model.model.restore_shape(image, [picture.size for picture in images.pictures])
        progress.text(f"{image.shape[2]}x{image.shape[1]}" + ("" if tile is None else f", in tiles of {tile} pixels"))
        return io.NodeOutput(image)


class Hunyuan3VAEEncode(io.ComfyNode):
    """Encodes a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3VAEEncode",
            display_name="Hunyuan3 VAE Encode",
            category="Hunyuan3",
            description=(
                "Turns a picture into a latent, for the sampler's latent input. Sides that are no multiple of 16 are "
                "cropped evenly, as ComfyUI's own VAE Encode does. The mean of the posterior is taken: no randomness."
            ),
            search_aliases=["hunyuan encode"],
            inputs=[
                HunyuanModel.Input("model", tooltip="From the Hunyuan3 Loader."),
                io.Image.Input("pixels", tooltip="The picture to encode."),
                io.Int.Input("tile_size", **_TILE_INPUT),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="For the sampler's latent input.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: ModelHandle, pixels: torch.Tensor, tile_size: int = 0) -> io.NodeOutput:
        cropped = _crop(pixels[..., :3])
        size = ImageSize(cropped.shape[1], cropped.shape[2])
        progress = NodeProgress(cls.hidden.unique_id)
        latents, _tile = in_tiles(
            model,
            size,
            tile_size,
            "encode",
            lambda tile: model.model.encode(cropped, tile_size=tile, check_cancelled=check_cancelled),
            progress,
        )
        return io.NodeOutput({"samples": latents})


def require_room_to_decode(model: ModelHandle, size: ImageSize) -> None:
    """Raises OutOfBudgetError if a picture of this size could not be decoded here, not even in tiles.

    Asked before the first step is drawn, so that no finished drawing is lost to a decode that cannot be.
    """
    core = model.model
    decode_tile_size(core.folder.config.vae, size.height, size.width, core.options.vae_dtype, _most_room(model))


def in_tiles(
    model: ModelHandle,
    size: ImageSize,
    tile_size: int,
    what: str,
    work: Callable[[int | None], torch.Tensor],
    progress: NodeProgress,
) -> tuple[torch.Tensor, int | None]:
    """`work(tile size)` with the VAE brought to its device; returns its result and the tile size, None for whole.

    tile_size: as the nodes take it, 0: whole if memory allows. what: "decode" or "encode". If memory runs out it is
    done anew in the next smaller tiles.
    """
    used: int | None = None

    def attempt(asked: int) -> torch.Tensor:
        nonlocal used
        used = _prepare(model, size, asked, progress)
        progress.text(what if used is None else f"{what} in tiles of {used} pixels")
        return work(used)

    def smaller(asked: int, _error: Exception) -> tuple[int, str]:
        tile = smaller_tile(model, size, used)
        if tile is None:
            return asked, EVERYTHING_ELSE
        return tile, f"in tiles of {tile} pixels, {EVERYTHING_ELSE}"

    result = with_one_retry(
        f"{what.removesuffix('e')}ing",
        attempt,
        tile_size,
        smaller,
        parts=[model.vae],
        expected=lambda _asked: _work(model, size, used),
        advice=lambda _asked: [
            *([] if (tile := smaller_tile(model, size, used)) is None else [f"set tile_size to {tile} or less"]),
            *smaller_vae(model),
        ],
        tell=progress.text,
    )
    return result, used


def smaller_tile(model: ModelHandle, size: ImageSize, tile_size: int | None) -> int | None:
    """The largest usual tile that needs less memory than this one (None: than the whole); None if there is none."""
    core = model.model
    try:
        less = _work(model, size, tile_size) - 1
        return decode_tile_size(core.folder.config.vae, size.height, size.width, core.options.vae_dtype, less)
    except OutOfBudgetError:
        return None


def _work(model: ModelHandle, size: ImageSize, tile_size: int | None) -> int:
    """Bytes that a tile needs, or the whole picture."""
    height, width = (min(side, tile_size or side) for side in size)
    return decode_bytes(model.model.folder.config.vae, height, width, model.model.options.vae_dtype)


def _prepare(model: ModelHandle, size: ImageSize, tile_size: int, progress: NodeProgress) -> int | None:
    """Brings the VAE to its device with room for the work; returns the tile size to work in, None for whole."""
    core = model.model
    vae, dtype, device = core.folder.config.vae, core.options.vae_dtype, core.options.device
    if tile_size == 0:
        tile_size = decode_tile_size(vae, size.height, size.width, dtype, _most_room(model)) or 0
    bring_to_device(model.vae, _work(model, size, tile_size), progress, advice=smaller_vae(model))
    if tile_size == 0:  # others may hold memory that is not ComfyUI's to free
        room = min(int(mm.get_free_memory(device)), _most_room(model))
        tile_size = decode_tile_size(vae, size.height, size.width, dtype, room) or 0
    return tile_size or None


def _most_room(model: ModelHandle) -> int:
    """Bytes that ComfyUI and the loader's budget could give to the VAE's work."""
    device = model.model.options.device
    limit = model.vae.budget.device_bytes(device)
    most = most_free_memory(device)
    return int((most if limit is None else min(most, limit)) - model.vae.model_size())


def _crop(pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) -> the middle part whose sides are multiples of 16."""
    height, width = (side // _ALIGN * _ALIGN for side in pixels.shape[1:3])
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]
