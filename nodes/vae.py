"""Hunyuan3VAEDecode: from a latent to a picture."""

from typing import Any

from ..hunyuan3.placement.estimate import decode_bytes
from ..hunyuan3.run import require_latents
from .compat import io, schema
from .io_types import HunyuanModel, ModelHandle
from .memory import bring_to_device
from .progress import NodeProgress, check_cancelled


class Hunyuan3VAEDecode(io.ComfyNode):
    """Decodes a latent, whole or in tiles."""

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
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=16,
                    optional=True,
                    tooltip="Decode in tiles of so many pixels, for small cards (at least 32); 0: whole.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The picture.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: ModelHandle, samples: dict[str, Any], tile_size: int = 0) -> io.NodeOutput:
        core, latents = model.model, samples["samples"]
        require_latents(latents, core.folder.config.vae, "samples")
        progress = NodeProgress(cls.hidden.unique_id)
        height, width = (min(16 * side, tile_size or 16 * side) for side in latents.shape[2:])
        work = decode_bytes(core.folder.config.vae, height, width, core.options.vae_dtype)
        bring_to_device(model.vae, work, progress)
        progress.text("decode")
        return io.NodeOutput(core.decode(latents, tile_size=tile_size or None, check_cancelled=check_cancelled))
