"""Hunyuan3Resolution: a width and a height that the model was trained on."""

from ..hunyuan3.image.resolution import ResolutionTable
from .compat import io, require_choice, schema
from .io_types import HunyuanModel, ModelHandle

_CUSTOM = "custom"
_PRESETS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "21:9", "9:21", "2:1", "1:2", "3:1", "1:3", "4:1", "1:4")
_MAX_SIDE = 8192


class Hunyuan3Resolution(io.ComfyNode):
    """Presets by ratio, from the checkpoint's own table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3Resolution",
            display_name="Hunyuan3 Resolution",
            category="Hunyuan3",
            description=(
                "Chooses a picture size. A ratio gives the nearest size that the model was trained on (1024 pixel base "
                "unless a model with another one is connected); 'custom' takes width and height."
            ),
            search_aliases=["hunyuan size", "hunyuan aspect ratio"],
            inputs=[
                io.Combo.Input(
                    "ratio",
                    options=[*_PRESETS, _CUSTOM],
                    default="1:1",
                    tooltip="Width to height. The nearest trained size is taken.",
                ),
                io.Int.Input(
                    "width",
                    default=1024,
                    min=16,
                    max=_MAX_SIDE,
                    step=16,
                    optional=True,
                    tooltip="For 'custom': width in pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "height",
                    default=1024,
                    min=16,
                    max=_MAX_SIDE,
                    step=16,
                    optional=True,
                    tooltip="For 'custom': height in pixels, a multiple of 16.",
                ),
                io.Boolean.Input(
                    "snap",
                    default=False,
                    optional=True,
                    tooltip=(
                        "For 'custom': take the trained size of the nearest ratio, as the reference does. Off: exactly "
                        "this width and height, which may be a size that the model never saw."
                    ),
                ),
                HunyuanModel.Input(
                    "model", optional=True, tooltip="Optional: take the sizes of this checkpoint's own table."
                ),
            ],
            outputs=[
                io.Int.Output("width_out", display_name="width", tooltip="Width in pixels."),
                io.Int.Output("height_out", display_name="height", tooltip="Height in pixels."),
            ],
        )

    @classmethod
    def execute(
        cls, ratio: str, width: int = 1024, height: int = 1024, snap: bool = False, model: ModelHandle | None = None
    ) -> io.NodeOutput:
        require_choice("ratio", ratio, (*_PRESETS, _CUSTOM))
        table = ResolutionTable.build(1024, 37) if model is None else model.model.folder.resolutions
        if ratio != _CUSTOM:
            resolution = table.parse(ratio)
        elif snap:
            resolution = table.parse((height, width))
        else:
            resolution = table.free(height, width)
        return io.NodeOutput(resolution.size.width, resolution.size.height)
