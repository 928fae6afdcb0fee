"""Hunyuan3VAEDecode and Hunyuan3VAEEncode: between latents and pictures, whole or in tiles as memory allows."""

from typing import Any

import comfy.model_management as mm
import torch

from ..hunyuan3.placement.estimate import decode_bytes, decode_tile_size
from ..hunyuan3.run import require_latents
from ..hunyuan3.types import ImageSize
from .compat import io, schema
from .io_types import HunyuanImages, HunyuanModel, ModelHandle, PictureSet
from .memory import bring_to_device, most_free_memory
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
        tile = _prepare(model, size, tile_size, progress)
        progress.text("decode" if tile is None else f"decode in tiles of {tile} pixels")
        image = model.model.decode(latents, tile_size=tile, check_cancelled=check_cancelled)
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
        tile = _prepare(model, size, tile_size, progress)
        progress.text("encode" if tile is None else f"encode in tiles of {tile} pixels")
        return io.NodeOutput({"samples": model.model.encode(cropped, tile_size=tile, check_cancelled=check_cancelled)})


def require_room_to_decode(model: ModelHandle, size: ImageSize) -> None:
    """Raises OutOfBudgetError if a picture of this size could not be decoded here, not even in tiles.

    Asked before the first step is drawn, so that no finished drawing is lost to a decode that cannot be.
    """
    core = model.model
    room = most_free_memory(core.options.device) - model.vae.model_size()
    decode_tile_size(core.folder.config.vae, size.height, size.width, core.options.vae_dtype, int(room))


def _prepare(model: ModelHandle, size: ImageSize, tile_size: int, progress: NodeProgress) -> int | None:
    """Brings the VAE to its device with room for the work; returns the tile size to work in, None for whole."""
    core = model.model
    vae, dtype, device = core.folder.config.vae, core.options.vae_dtype, core.options.device
    if tile_size == 0:
        room = most_free_memory(device) - model.vae.model_size()
        tile_size = decode_tile_size(vae, size.height, size.width, dtype, int(room)) or 0
    height, width = (min(side, tile_size or side) for side in size)
    bring_to_device(model.vae, decode_bytes(vae, height, width, dtype), progress)
    if tile_size == 0:  # others may hold memory that is not ComfyUI's to free
        tile_size = decode_tile_size(vae, size.height, size.width, dtype, int(mm.get_free_memory(device))) or 0
    return tile_size or None


def _crop(pixels: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) -> the middle part whose sides are multiples of 16."""
    height, width = (side // _ALIGN * _ALIGN for side in pixels.shape[1:3])
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]
