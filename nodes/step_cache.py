"""Hunyuan3StepCache: skip most of the transformer's work in long runs."""

from ..hunyuan3.generate.taylor import TaylorOptions
from .compat import io, schema
from .io_types import HunyuanStepCache


class Hunyuan3StepCache(io.ComfyNode):
    """Settings of the Taylor step cache, for the sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3StepCache",
            display_name="Hunyuan3 Step Cache",
            category="Hunyuan3",
            description=(
                "Speeds up long runs: most steps extrapolate the transformer's output instead of computing it (Taylor "
                "cache). The picture changes a little. Meant for about 50 steps; leave it off for the 8 of Distil."
            ),
            search_aliases=["taylor cache", "teacache"],
            inputs=[
                io.Int.Input(
                    "interval",
                    default=5,
                    min=1,
                    max=100,
                    tooltip="At least every so many steps is computed in full. 1: every step, no saving.",
                ),
                io.Int.Input("order", default=2, min=0, max=4, tooltip="Highest derivative that is kept."),
                io.Int.Input(
                    "first_steps",
                    default=3,
                    min=0,
                    max=100,
                    tooltip="So many steps at the start are computed in full; 0: no special treatment.",
                ),
                io.Int.Input(
                    "last_steps",
                    default=1,
                    min=0,
                    max=100,
                    tooltip="So many steps at the end are computed in full; 0: no special treatment.",
                ),
                io.Int.Input(
                    "low_order", default=2, min=0, max=4, tooltip="Highest derivative used for low frequencies."
                ),
                io.Int.Input(
                    "high_order", default=2, min=0, max=4, tooltip="Highest derivative used for high frequencies."
                ),
            ],
            outputs=[HunyuanStepCache.Output("step_cache", display_name="step_cache", tooltip="For the sampler.")],
        )

    @classmethod
    def execute(
        cls,
        interval: int = 5,
        order: int = 2,
        first_steps: int = 3,
        last_steps: int = 1,
        low_order: int = 2,
        high_order: int = 2,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            TaylorOptions(
                interval=interval,
                order=order,
                enable_first_enhance=first_steps > 0,
                first_enhance_steps=max(first_steps, 1),
                enable_tailing_enhance=last_steps > 0,
                tailing_enhance_steps=last_steps,
                low_freqs_order=low_order,
                high_freqs_order=high_order,
            )
        )
