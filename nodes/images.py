"""Hunyuan3ImageConditioning: input pictures, encoded once per graph."""

from collections.abc import Sequence

import torch
from PIL import Image

from ..hunyuan3.errors import RequestError
from ..hunyuan3.pictures import EncodedPicture, require_room_for
from ..hunyuan3.placement.estimate import decode_bytes
from ..hunyuan3.placement.out_of_memory import raised_in
from ..hunyuan3.types import ImageSize
from ..hunyuan3.vision import siglip2
from .compat import io, require_choice, schema
from .convert import pictures_of
from .io_types import HunyuanImages, HunyuanModel, ModelHandle, PictureSet
from .memory import bring_to_device
from .out_of_memory import EVERYTHING_ELSE, smaller_vae, with_one_retry
from .progress import NodeProgress, check_cancelled
from .vae import smaller_tile
from .writing import TRAINED_FOR

_SOCKETS = tuple(f"image_{index}" for index in range(1, 7))
POSTERIORS = ("fixed", "reference")


class Hunyuan3ImageConditioning(io.ComfyNode):
    """Encodes pictures to look at, edit or fuse: with the VAE and with the vision tower."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3ImageConditioning",
            display_name="Hunyuan3 Image Conditioning",
            category="Hunyuan3",
            description=(
                "Encodes input pictures, once, for thinking, asking and drawing. The prompt can speak of them as the "
                "first, the second ... picture. The model was trained with up to three."
            ),
            search_aliases=["hunyuan edit", "hunyuan reference image", "image to image"],
            inputs=[
                HunyuanModel.Input("model", tooltip="From the Hunyuan3 Loader (Instruct or Instruct-Distil)."),
                *(
                    io.Image.Input(socket, optional=True, tooltip="A picture, or a batch of pictures, in this order.")
                    for socket in _SOCKETS
                ),
                io.Boolean.Input(
                    "align",
                    default=False,
                    optional=True,
                    tooltip=(
                        "Stretch each picture to the nearest trained shape instead of cropping it. Connect the images "
                        "to Hunyuan3 VAE Decode, too, and the result gets its input's own shape back."
                    ),
                ),
                io.Combo.Input(
                    "posterior",
                    options=list(POSTERIORS),
                    default="fixed",
                    optional=True,
                    tooltip=(
                        "'fixed': what is computed for a picture serves every image seed. 'reference': drawn anew from "
                        "the image seed, as the official pipeline does."
                    ),
                ),
            ],
            outputs=[HunyuanImages.Output("images", display_name="images", tooltip="For think, ask, conditioning.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: ModelHandle, align: bool = False, posterior: str = "fixed", **images: torch.Tensor | None
    ) -> io.NodeOutput:
        require_choice("posterior", posterior, POSTERIORS)
        pictures = [
            picture
            for socket in _SOCKETS
            if images.get(socket) is not None
            for picture in pictures_of(images[socket], socket)
        ]
        if not pictures:
            raise RequestError("No picture is connected: connect at least image_1, or leave this node out.")
        progress = NodeProgress(cls.hidden.unique_id)
        core = model.model
        require_room_for(core.folder, [ImageSize(picture.height, picture.width) for picture in pictures])
        encoded = encode(model, pictures, align, progress)
        warning = f" (trained for up to {TRAINED_FOR})" if len(encoded) > TRAINED_FOR else ""
        progress.report(f"{len(encoded)} {'picture' if len(encoded) == 1 else 'pictures'}{warning}")
        return io.NodeOutput(PictureSet(encoded, align, posterior, core.folder.fingerprint))


def encode(
    model: ModelHandle, pictures: Sequence[Image.Image], align: bool, progress: NodeProgress
) -> tuple[EncodedPicture, ...]:
    """Encodes pictures with both networks brought to their device.

    If memory runs out they are encoded anew: where it was the VAE, in tiles. The vision tower sees a picture whole.
    """
    core, parts = model.model, (model.vae, model.vision)
    table = core.folder.resolutions
    fitted = [table.row(table.nearest(picture.height, picture.width)).size for picture in pictures]
    largest = max(fitted, key=lambda size: size.height * size.width)
    work = decode_bytes(core.folder.config.vae, *largest, core.options.vae_dtype)

    def attempt(tile_size: int | None) -> tuple[EncodedPicture, ...]:
        bring_to_device(parts, work, progress, advice=smaller_vae(model))
        progress.text(f"encode {len(pictures)} pictures")
        return core.encode_pictures(pictures, align=align, tile_size=tile_size, check_cancelled=check_cancelled)

    def smaller(_whole: None, error: Exception) -> tuple[int | None, str]:
        tile = None if raised_in(error, siglip2) else smaller_tile(model, largest, None)
        return tile, EVERYTHING_ELSE if tile is None else f"in tiles of {tile} pixels, {EVERYTHING_ELSE}"

    return with_one_retry(
        "encoding pictures",
        attempt,
        None,
        smaller,
        parts=parts,
        expected=lambda _tile: work,
        advice=lambda _tile: smaller_vae(model),
        tell=progress.text,
    )
