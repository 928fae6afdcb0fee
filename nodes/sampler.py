"""Hunyuan3Sampler: from a conditioning to a latent."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..hunyuan3.conditioning import Conditioning
from ..hunyuan3.errors import RequestError
from ..hunyuan3.generate.noise import NOISE_SOURCES
from ..hunyuan3.generate.taylor import TaylorOptions
from ..hunyuan3.placement.estimate import activation_bytes, cache_bytes
from ..hunyuan3.run import SamplingRun
from .budget import Work
from .compat import io, require_choice, schema
from .io_types import HunyuanConditioning, HunyuanModel, HunyuanStepCache, ModelHandle
from .memory import bring_to_device
from .out_of_memory import EVERYTHING_ELSE, smaller_weights, with_one_retry
from .png import note_in_png
from .preview import PREVIEW_MODES, StepPreviewer, previewer_for
from .progress import NodeProgress, check_cancelled
from .vae import require_room_to_decode

CFG_MODES = ("batched", "sequential")


class Hunyuan3Sampler(io.ComfyNode):
    """Draws: runs the denoise loop on the whole mixture-of-experts transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="Hunyuan3Sampler",
            display_name="Hunyuan3 Sampler",
            category="Hunyuan3",
            description=(
                "Draws the picture as a latent. For steps, guidance and shift 0 means the checkpoint's own default "
                "(base 50 steps, guidance 5; Instruct 50, 2.5; Instruct-Distil 8, 2.5)."
            ),
            search_aliases=["hunyuan ksampler", "hunyuan generate", "hunyuan draw"],
            inputs=[
                HunyuanModel.Input("model", tooltip="From the Hunyuan3 Loader."),
                HunyuanConditioning.Input("conditioning", tooltip="From Hunyuan3 Conditioning."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Decides the noise. The same seed draws the same picture.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="Denoise steps; 0: the checkpoint's own default.",
                ),
                io.Float.Input(
                    "guidance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip=(
                        "How closely the prompt is followed; 0: the checkpoint's own default. 1 or less (not "
                        "distilled): no guidance, twice as fast."
                    ),
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="How much of the schedule is spent at high noise; 0: the checkpoint's own default.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, optional=True, tooltip="Pictures drawn at once."),
                io.Combo.Input(
                    "noise",
                    options=list(NOISE_SOURCES),
                    default="comfy",
                    optional=True,
                    tooltip=(
                        "'comfy': noise as ComfyUI's samplers make it, the same on every machine. 'device': made on "
                        "the GPU. 'reference': as the official pipeline makes it (bfloat16, seed + 1 for the next "
                        "picture)."
                    ),
                ),
                io.Latent.Input("latent", optional=True, tooltip="Optional: a latent to start from, see denoise."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="With a latent: how much of it is drawn anew. 1: all of it, 0: nothing.",
                ),
                HunyuanStepCache.Input(
                    "step_cache", optional=True, tooltip="Optional: from Hunyuan3 Step Cache, for long runs."
                ),
                io.Combo.Input(
                    "preview",
                    options=list(PREVIEW_MODES),
                    default="auto",
                    optional=True,
                    tooltip="'auto': show the picture while it is drawn, with ComfyUI's preview method if one is set.",
                ),
                io.Combo.Input(
                    "cfg_mode",
                    options=list(CFG_MODES),
                    default="batched",
                    optional=True,
                    tooltip=(
                        "How the two branches of guidance run: together, or one after the other, which needs less "
                        "memory and gives the same picture. Distil has one branch."
                    ),
                ),
            ],
            outputs=[
                io.Latent.Output("latent_out", display_name="latent", tooltip="For Hunyuan3 VAE Decode."),
                io.String.Output("info", display_name="info", tooltip="What was used: steps, guidance, shift, seed."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def execute(
        cls,
        model: ModelHandle,
        conditioning: Conditioning,
        seed: int,
        steps: int = 0,
        guidance: float = 0.0,
        shift: float = 0.0,
        batch_size: int = 1,
        noise: str = "comfy",
        latent: dict[str, Any] | None = None,
        denoise: float = 1.0,
        step_cache: TaylorOptions | None = None,
        preview: str = "auto",
        cfg_mode: str = "batched",
    ) -> io.NodeOutput:
        core = model.model
        require_choice("preview", preview, PREVIEW_MODES)
        require_choice("cfg_mode", cfg_mode, CFG_MODES)
        if latent is not None and "noise_mask" in latent:
            raise RequestError(
                "latent carries a noise mask; drawing inside a mask is not supported yet. Remove the mask."
            )

        def prepare(one_branch_at_a_time: bool) -> SamplingRun:
            return SamplingRun.prepare(
                core.folder,
                core.placed_transformer.module,
                conditioning,
                seed=seed,
                steps=steps,
                guidance=guidance,
                shift=shift,
                batch_size=batch_size,
                noise=noise,
                latent=None if latent is None else latent["samples"],
                denoise=denoise,
                taylor=step_cache,
                one_branch_at_a_time=one_branch_at_a_time,
                prefixes=core.prefixes,
                check_cancelled=check_cancelled,
            )

        prepare(cfg_mode == "sequential")  # every setting is checked before any weight is loaded
        progress = NodeProgress(cls.hidden.unique_id)
        require_room_to_decode(model, conditioning.size)
        previewer = previewer_for(model, preview, progress)
        run, remark = draw(model, prepare, cfg_mode, previewer, progress)
        info = describe(model, run) + remark
        progress.report(info)
        note_in_png(cls.hidden.extra_pnginfo, cls.hidden.unique_id, used_by(model, run))
        return io.NodeOutput({"samples": run.latents}, info, ui={"text": [info]})


def draw(
    model: ModelHandle,
    prepare: Callable[[bool], SamplingRun],
    cfg_mode: str,
    previewer: StepPreviewer | None,
    progress: NodeProgress,
) -> tuple[SamplingRun, str]:
    """Draws with the weights brought to their device; returns the run that ended, and what to remark on it.

    If memory runs out, in whichever step, it is drawn anew from the first one, with the guidance branches one after
    the other. `prepare(one_branch_at_a_time)` gives a fresh run.
    """
    asked = prepare(cfg_mode == "sequential")
    batch_size, size = asked.settings.batch_size, asked.conditioning.size
    tried: list[bool] = []

    def attempt(one_branch_at_a_time: bool) -> SamplingRun:
        tried.append(one_branch_at_a_time)
        run = prepare(one_branch_at_a_time)
        bring_to_device(model.transformer, work(one_branch_at_a_time), progress, advice=smaller_weights(model))
        for step in run:
            picture = None if previewer is None else previewer(step.predicted_clean)
            progress.step("draw", step.step + 1, step.steps, picture)
        return run

    def work(one_branch_at_a_time: bool) -> Work:
        """Keys and values of every row, activations of those that are computed together."""
        rows, config, dtype = asked.conditioning.rows, model.model.folder.config, model.model.options.dtype
        num_rows, length = batch_size * len(rows.branches), len(rows.sequence)
        together = batch_size if one_branch_at_a_time else num_rows
        return Work(activation_bytes(config, together, length, dtype), cache_bytes(config, num_rows, length, dtype))

    def smaller(one_branch_at_a_time: bool, _error: Exception) -> tuple[bool, str]:
        if one_branch_at_a_time or not _can_take_turns(asked):
            return one_branch_at_a_time, f"from the first step, {EVERYTHING_ELSE}"
        return (
            True,
            f"from the first step, guidance one branch after the other (cfg_mode sequential), {EVERYTHING_ELSE}",
        )

    def advice(_one_branch_at_a_time: bool) -> list[str]:
        return [
            *([f"draw fewer pictures at once (batch_size; it was {batch_size})"] if batch_size > 1 else []),
            f"draw a smaller picture (width and height of the conditioning; it was {size.width}x{size.height})",
            *(["use fewer input pictures"] if asked.conditioning.pictures else []),
            *smaller_weights(model),
        ]

    run = with_one_retry(
        "drawing",
        attempt,
        asked.settings.one_branch_at_a_time,
        smaller,
        parts=[model.transformer],
        expected=lambda one_branch_at_a_time: work(one_branch_at_a_time).total,
        advice=advice,
        tell=progress.text,
    )
    if tried == [False, True]:
        return run, ", memory ran out once: guidance one branch after the other"
    return run, ", memory ran out once" if len(tried) > 1 else ""


def _can_take_turns(run: SamplingRun) -> bool:
    """Whether a run has two branches of guidance that may be computed one after the other."""
    # With capacity dropping they compete for experts: one at a time would give another picture.
    transformer, rows = run.transformer, run.conditioning.rows
    two = len(rows.branches) == 2 and run.settings.guidance > 1 and not transformer.config.cfg_distilled
    return two and not transformer.drops_tokens


def describe(model: ModelHandle, run: SamplingRun) -> str:
    """One line: what a run used, the checkpoint's defaults filled in."""
    used, size = run.settings, run.conditioning.size
    parts = [
        f"{used.steps} steps",
        f"guidance {used.guidance:g}",
        f"shift {used.shift:g}",
        f"seed {used.seed}",
        f"{size.width}x{size.height}",
        f"{used.noise} noise",
    ]
    if used.batch_size > 1:
        parts.append(f"batch of {used.batch_size}")
    if used.taylor is not None:
        parts.append(f"step cache every {used.taylor.interval}")
    if used.denoise < 1:
        parts.append(f"denoise {used.denoise:g}")
    parts.append(f"{model.name} ({model.model.folder.variant})")
    return ", ".join(parts)


def used_by(model: ModelHandle, run: SamplingRun) -> dict[str, Any]:
    """What a run used, for the PNG file."""
    used = asdict(run.settings) | {"width": run.conditioning.size.width, "height": run.conditioning.size.height}
    used |= {"checkpoint": model.name, "variant": model.model.folder.variant, "format": model.model.options.format}
    return used | {"prompt": run.conditioning.prompt, "trace": run.conditioning.trace}
