"""The stages of a recorded call, run by this package's pipeline: writing, then drawing.

Each fills a `Computed` with everything that the recordings hold of such a stage, under their keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hunyuan3.conditioning import Conditioning, drawable, make_conditioning, system_text
from hunyuan3.folder import ModelFolder
from hunyuan3.generate.denoise import DenoiseStep
from hunyuan3.generate.rows import SequenceRows
from hunyuan3.generate.schedule import Schedule
from hunyuan3.generate.stages import TASKS
from hunyuan3.generate.taylor import TaylorOptions
from hunyuan3.generate.text import TextStep
from hunyuan3.image.resolution import Resolution
from hunyuan3.ops.rope import rope_positions
from hunyuan3.pictures import EncodedPicture
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.run import SamplingRun
from hunyuan3.text.special_tokens import BASE_RATIOS, EXTRA_RATIOS
from hunyuan3.types import ImageSize
from hunyuan3.writing import TextRequest, WritingRun, choosing_ratio, thinking

from . import layout
from .recording import MissingFeatureError, Recording
from .report import LATENTS, Computed, Rule
from .watch import Watch

# The reference records its dense mask up to this length only.
LONGEST_MASK = 1200

# The reference's defaults (its command line's; spec 11.4).
REFERENCE_TAYLOR = {
    "interval": 5,
    "order": 2,
    "enable_first_enhance": False,
    "first_enhance_steps": 3,
    "enable_tailing_enhance": False,
    "tailing_enhance_steps": 1,
    "low_freqs_order": 2,
    "high_freqs_order": 2,
}


@dataclass(frozen=True)
class Asked:
    """A recorded call, the checkpoint's defaults filled in. size: as the reference takes it, "auto" included."""

    prompt: str
    size: Any
    task: str
    system_prompt: str
    custom_system_prompt: str
    trace: str
    max_new_tokens: int
    align: bool
    taylor: TaylorOptions | None

    @classmethod
    def of(cls, call: dict[str, Any], folder: ModelFolder) -> "Asked":
        """Reads the arguments of `generate_image`; those that were lists hold one request."""
        prompt, trace = (
            value[0] if isinstance(value, list) else value for value in (call["prompt"], call.get("cot_text"))
        )
        return cls(
            prompt=prompt,
            size=call.get("image_size", "auto"),
            task=call.get("bot_task") or folder.generation.bot_task,
            system_prompt=call.get("use_system_prompt") or "auto",
            custom_system_prompt=call.get("system_prompt") or "",
            trace=trace or "",
            max_new_tokens=call.get("max_new_tokens") or 0,
            align=bool(call.get("infer_align_image_size")),
            taylor=requested_taylor(call),
        )

    @property
    def thinks(self) -> bool:
        return self.task in TASKS

    @property
    def chooses_size(self) -> bool:
        return self.size == "auto" or self.task == "img_ratio"

    @property
    def stages(self) -> int:
        """How many prepared inputs this makes: a text stage if there is anything to write, then the image stage."""
        return 2 if self.thinks or self.chooses_size else 1


@dataclass(frozen=True)
class Written:
    """What the image stage starts from. system: None where the request's own choice stands."""

    resolution: Resolution
    trace: str
    system: str | None = None


@dataclass(frozen=True)
class Stage:
    """One recorded stage and what it is run with."""

    number: int
    recording: Recording
    folder: ModelFolder
    model: Hunyuan3
    asked: Asked
    pictures: tuple[EncodedPicture, ...]
    out: Computed
    gaps: bool

    def put(self, values: dict[str, Any]) -> None:
        """Tensors and facts of this stage under the recording's keys."""
        for key, value in values.items():
            kept = self.out.tensors if isinstance(value, torch.Tensor) else self.out.facts
            kept[f"stage{self.number}.{key}"] = value

    @property
    def seed(self) -> int:
        """Of the generator that the reference made for this stage."""
        seeds = self.recording.meta["stages"][self.number]["generator_seed"]
        if isinstance(seeds, list) and len(seeds) > 1:
            raise MissingFeatureError("several requests at once")
        return seeds[0] if isinstance(seeds, list) else seeds

    @property
    def probe(self) -> torch.Tensor | None:
        key = f"stage{self.number}.probe_index"
        return self.recording.input(key) if key in self.recording.tensors else None

    def watch(self, outputs: bool = False) -> Watch:
        return Watch(probe=self.probe, gaps=self.gaps, outputs=outputs)


def requested_taylor(call: dict[str, Any]) -> TaylorOptions | None:
    """The call's step cache."""
    if not call.get("use_taylor_cache"):
        return None
    given = {name: call.get(f"taylor_cache_{name}") for name in REFERENCE_TAYLOR}
    return TaylorOptions(**REFERENCE_TAYLOR | {name: value for name, value in given.items() if value is not None})


def write(stage: Stage) -> Written:
    """The text stage: thinks, rewrites and chooses the size, or chooses the size alone."""
    asked, folder, transformer = stage.asked, stage.folder, stage.model.transformer()
    if asked.thinks:
        plan = thinking(folder, asked.task, need_ratio=asked.chooses_size, reference=True)  # type: ignore[arg-type]
    else:
        plan = choosing_ratio(folder)
    request = TextRequest(
        prompt=asked.prompt,
        pictures=stage.pictures,
        system_prompt=asked.system_prompt,
        custom_system_prompt=asked.custom_system_prompt,
        trace=asked.trace,
        bot_task=asked.task,
        reference=True,
    )
    run = WritingRun(
        folder,
        transformer,
        request,
        plan,
        max_new_tokens=asked.max_new_tokens,
        picture_generator=torch.Generator().manual_seed(stage.seed),
    )
    put_layout(stage, run.sequence)
    stage.put({"mode": "gen_text", "bot_task": plan.opening})
    watch = stage.watch(outputs=True)
    with watch.transformer(transformer):
        steps = list(run)
    put_fed(stage, watch)
    put_text(stage, watch, run, steps)
    stage.put({"stops": sorted(plan.stops), "finish": run.finish})
    stage.out.implied |= {f"stage{stage.number}.{key}": value for key, value in implied_ending(stage).items()}

    resolution, trace, system = run.resolution, asked.trace, None
    if asked.thinks:
        system = system_text(folder, asked.system_prompt, asked.custom_system_prompt, asked.task, reference=True)
        trace, system = drawable(folder, run.trace, system)
        stage.out.facts["cot_text"] = [trace]
    if not asked.chooses_size:
        resolution = folder.resolutions.parse(asked.size)
    assert resolution is not None, "the pass ended without a ratio"
    return Written(resolution, trace, system)


def put_text(stage: Stage, watch: Watch, run: WritingRun, steps: Sequence[TextStep]) -> None:
    """What was written, and a row of logits for each new token.

    Forced tokens run as one chunk, of which the pipeline computes the last row only; the others are made here from the
    stack's output at their positions.
    """
    streams, positions, gaps = [], [], {}
    for number, seen in enumerate(watch.passes):
        assert seen.output is not None
        first = seen.start if number else seen.stop - 1  # of the prompt, the last position only
        streams.append(seen.output[0, first - seen.start :])
        if seen.gap is not None:  # the first row depends on the whole prompt
            rows = seen.gap.tolist() if number else [seen.gap.min().item()]
            gaps |= {len(positions) + row: gap for row, gap in enumerate(rows)}
        positions += range(first, seen.stop)
    logits = stage.model.transformer().logits(torch.cat(streams))
    for step in steps:
        if step.logits is not None:
            logits[step.index] = step.logits
    tokens, ids = stage.folder.tokens, run.ids
    ranked = logits.argmax(dim=-1).tolist()
    free = [index for index, token in enumerate(ids) if token == ranked[index]]
    chosen: list[int] = ids
    if not stage.asked.thinks:
        # There the reference samples from a vocabulary of ratios, and its token is an index into them.
        assert run.resolution is not None
        chosen, free = [run.resolution.ratio], []
    top = logits.topk(2, dim=-1).values
    ratios = logits[-1, list(tokens.ratios)].topk(2).values
    stage.put(
        {
            "logits": logits,
            "decode_position_ids": torch.tensor(positions),
            "n_forward": len(positions),
            "generated_tokens": chosen,
            "generated_text": stage.folder.tokenizer.decode(ids) if stage.asked.thinks else None,
            "raw_argmax": ranked,
            "free_steps": free,
            "forced_steps": [index for index in range(len(ids)) if index not in free],
            "free_margin_min": (top[free, 0] - top[free, 1]).min().item() if free else None,
            "last_step_ratio_margin": (ratios[0] - ratios[1]).item(),
        }
    )
    if not stage.asked.thinks:
        stage.put({"eos_token_id": sorted(run.plan.stops)})
    stage.out.gaps[f"stage{stage.number}"] = gaps


def implied_ending(stage: Stage) -> dict[str, Any]:
    """How a recorded text stage ends, as the README of the recordings says it: the json holds an earlier stop list."""
    asked, token_id = stage.asked, stage.folder.tokenizer.token_id
    if asked.chooses_size:
        stops = [f"<img_ratio_{index}>" for index in range(BASE_RATIOS + EXTRA_RATIOS)]
    else:
        stops = ["</think>", "</recaption>"] if asked.task == "think" else ["</recaption>"]
    ids = [token_id(token) for token in stops]
    return {"stops": sorted(found for found in ids if found is not None), "finish": "stop"}


def draw(stage: Stage, written: Written, *, pictured: bool) -> None:
    """The image stage. pictured: decode the drawing, too."""
    asked, folder, out = stage.asked, stage.folder, stage.out
    conditioning = make_conditioning(
        folder,
        asked.prompt,
        written.resolution,
        pictures=stage.pictures,
        posterior="reference",
        system_prompt=asked.system_prompt,
        custom_system_prompt=asked.custom_system_prompt,
        trace=written.trace,
        bot_task=asked.task,
        system=written.system,
        reference=True,
    )
    put_layout(stage, conditioning.rows)
    stage.put(
        {
            "mode": "gen_image",
            "image_size": list(written.resolution.size) if asked.chooses_size else asked.size,
            "gen_image_info": layout.drawn_picture(conditioning.rows.sequence, folder),
        }
    )
    transformer = stage.model.transformer()
    run = SamplingRun.prepare(
        folder, transformer, conditioning, seed=stage.seed, noise="reference", taylor=asked.taylor
    )
    watch = stage.watch()
    with watch.transformer(transformer):
        steps = list(run)
    put_fed(stage, watch)
    put_steps(stage, watch, run, steps)
    put_picture(stage, conditioning, run.latents, pictured=pictured)
    out.tensors["decode_input_latents"] = run.latents.unsqueeze(2)
    out.rules["decode_input_latents"] = Rule(LATENTS.absolute / min(1.0, folder.config.vae.scaling_factor))


def put_layout(stage: Stage, rows: SequenceRows) -> None:
    """Token rows and places of a stage."""
    branches = rows.branches
    positions = rope_positions(len(rows.sequence), rows.grids).to(torch.int32)
    stage.put(layout.row_tensors(branches))
    stage.put(layout.slices(branches))
    stage.put(
        {
            "rope_pos_yx": positions.expand(len(branches), -1, -1),
            "full_attention_slices": [rows.full_spans] * len(branches),
            "rope_image_info": [rows.grids] * len(branches),
            "decoded": layout.decoded(branches, stage.folder.tokenizer),
            "cos_sin_rows_equal": True,  # the branches of a request share one table
        }
    )
    if stage.pictures:
        stage.put({"cond_rows": len(branches)})


def put_fed(stage: Stage, watch: Watch) -> None:
    """What the stage's first pass was fed: input pictures and rotary tables."""
    if watch.probe is not None:
        cos, sin = watch.passes[0].rope
        stage.put({"cos": cos[watch.probe], "sin": sin[watch.probe]})
    for index, (latent, picture) in enumerate(zip(watch.shown, stage.pictures, strict=True)):
        stage.put(
            {
                f"cond_latent_{index}": latent,
                f"cond_vae_mean_{index}": picture.posterior.mean.unsqueeze(2),
                f"cond_vae_logvar_{index}": picture.posterior.logvar.unsqueeze(2),
            }
        )
    if watch.shown:
        stage.put({"cond_timesteps": torch.stack(watch.shown_times)})


def put_steps(stage: Stage, watch: Watch, run: SamplingRun, steps: Sequence[DenoiseStep]) -> None:
    """Noise, schedule, masks, and what every step gave."""
    out, config, rows = stage.out, stage.folder.config, steps[0].raw_prediction.shape[0]
    assert watch.noise is not None
    out.tensors["noise"] = watch.noise
    full = [step.step for step in steps if step.full]

    schedule = Schedule.flow_matching(run.settings.steps, run.settings.shift)
    out.tensors["sched.sigmas"] = schedule.sigmas
    out.tensors["sched.timesteps"] = schedule.times[:-1]
    out.tensors["sched.timesteps_full"] = schedule.times
    out.tensors["step_timestep"] = torch.stack(watch.fed["time"])
    if config.use_meanflow:  # steps that the cache skips feed none
        fed = dict(zip(full, watch.fed["time_r"], strict=True))
        times = [fed.get(step, schedule.times[step + 1]) for step in range(schedule.steps)]
        out.tensors["step_timestep_r"] = torch.stack(times)
    if config.cfg_distilled:
        out.tensors["guidance_value"] = watch.fed["guidance"][0].view(1)

    first, later = watch.passes[0], watch.passes[1] if len(watch.passes) > 1 else None
    out.facts["first_step_attention_mask_shape"] = [rows, first.stop, first.stop]
    if first.stop <= LONGEST_MASK:
        mask = layout.packed(layout.dense_mask(first.plan))
        out.tensors["first_step_attention_mask_packed"] = mask.expand(rows, -1, -1)
    out.facts["later_step_mask_shape"] = None
    if later is not None:
        out.tensors["later_step_position_ids"] = torch.arange(later.start, later.stop)
        out.facts["later_step_mask_shape"] = [rows, 1, later.stop - later.start, first.stop]
    if first.hidden:
        out.tensors["hidden_probe"] = torch.stack(first.hidden)

    out.tensors["step_raw_prediction"] = torch.stack([step.raw_prediction for step in steps])
    out.tensors["step_prediction"] = torch.stack([step.prediction for step in steps])
    out.tensors["step_latents"] = torch.stack([step.latents for step in steps])
    out.facts["latents_std"] = [step.latents.std().item() for step in steps]
    out.facts["taylor_full_steps"] = full
    gaps = {step: seen.gap.min().item() for step, seen in zip(full, watch.passes, strict=True) if seen.gap is not None}
    out.gaps["steps"] = gaps


def put_picture(stage: Stage, conditioning: Conditioning, latents: torch.Tensor, *, pictured: bool) -> None:
    """The final picture, or where it is not wanted its size alone."""
    model, out, originals = stage.model, stage.out, [picture.size for picture in stage.pictures]
    pixels = torch.zeros(1, *conditioning.size, 3)
    if pictured:
        watch = Watch(probe=None, gaps=False)
        with watch.decoder(model):
            pixels = model.decode(latents)
        assert watch.decoded is not None
        decoded = watch.decoded[:, :, -1]
        out.tensors["image_float"] = decoded
        out.facts["image_float_minmax"] = [decoded.min().item(), decoded.max().item()]
        out.tensors["image_uint8"] = grey_levels(pixels)
    final = model.restore_shape(pixels, originals) if stage.asked.align else pixels
    out.facts["output_size_wh"] = [final.shape[2], final.shape[1]]
    if pictured and final.shape != pixels.shape:
        out.tensors["image_postprocessed_uint8"] = grey_levels(final)[0]


def grey_levels(pixels: torch.Tensor) -> torch.Tensor:
    """[0, 1] -> uint8."""
    return (pixels * 255).round().to(torch.uint8)


def encoded_sizes(folder: ModelFolder, pictures: Sequence[EncodedPicture]) -> list[ImageSize]:
    """Sizes of the pictures as the VAE saw them."""
    factor = folder.config.vae_downsample
    return [ImageSize(*(side * factor for side in picture.posterior.mean.shape[2:])) for picture in pictures]
