"""A recorded call of the reference, drawn again by this package's pipeline from the call and the checkpoint alone.

What the networks are really fed is read off with module hooks, so that the comparison sees the pipeline as it runs
and not a second version of it.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from hunyuan3.conditioning import Conditioning, make_conditioning
from hunyuan3.config import GenerationConfig, read_json
from hunyuan3.folder import ModelFolder
from hunyuan3.generate.schedule import Schedule
from hunyuan3.generate.taylor import TaylorOptions
from hunyuan3.ops.attention import AttentionPlan
from hunyuan3.ops.rope import rope_positions
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.run import SamplingRun
from hunyuan3.transformer.model import Hunyuan3Transformer

from . import layout
from .bench import Bench
from .recording import MissingFeatureError, Recording
from .report import (
    COMPONENT,
    GREY_LEVEL,
    IDENTICAL,
    LATENTS,
    PICTURE,
    PREDICTIONS,
    ROUNDING,
    Computed,
    Difference,
    Report,
    Rule,
    compare,
)

# Kind of comparison of every key, tensors and json alike (keys of a stage are prefixed "stageK.").
KINDS: tuple[tuple[str, str, Rule], ...] = (
    (r"stage\d+\.(tokens|real_pos|decoded)", "token ids", IDENTICAL),
    (r"stage\d+\.(\w+_image_mask|\w+_scatter_index)", "places of tokens", IDENTICAL),
    (r"stage\d+\.(\w+_slices|rope_image_info|gen_image_info)|output_size_wh", "sections and sizes", IDENTICAL),
    (r"stage\d+\.(rope_pos_yx|cos_sin_rows_equal)|later_step_position_ids", "positions", IDENTICAL),
    (r"stage\d+\.(cos|sin)", "rotary tables", COMPONENT),
    (r"first_step_attention_mask_\w+|later_step_mask_shape", "attention masks", IDENTICAL),
    (r"noise", "noise", IDENTICAL),
    (r"sched\.\w+|step_timestep(_r)?|guidance_value", "schedule", ROUNDING),
    (r"taylor_full_steps", "steps that ran", IDENTICAL),
    (r"hidden_probe", "hidden states", LATENTS),
    (r"step_raw_prediction|step_prediction", "predictions", PREDICTIONS),
    (r"step_latents|latents_std|decode_input_latents", "latents", LATENTS),
    (r"image_float|image_float_minmax", "decoded picture", PICTURE),
    (r"image_\w*uint8", "final picture", GREY_LEVEL),
)

# Parts of the json that are the request, or about the recording itself.
REQUEST = {
    "name",
    "checkpoint",
    "images",
    "call",
    "generation_config_overrides",
    "python_random_seed",
    "moe_drop_tokens",
    "seconds",
    "forward_seconds",
    "cot_text",
    "stages",
}
STAGE_REQUEST = {
    "mode",
    "bot_task",
    "image_size",
    "seed_argument",
    "generator_seed",
    "eos_token_id",
    "max_new_tokens",
    "cond_rows",
}

# With a router gap below the first, a tie may go the other way; our own gap must then be below the second.
RECORDED_TIE = 3e-6
OWN_TIE = 1e-5

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


def check(bench: Bench, recording: Recording, report: Report) -> None:
    """Draws one scenario and reports it: a line per kind of value."""
    computed = Computed()
    try:
        own_gaps = compute(bench, recording, computed)
    finally:
        report.dump(recording.name, computed.tensors, recording.tensors)
    judge(recording, computed, own_gaps, report)


def compute(bench: Bench, recording: Recording, out: Computed) -> dict[int, float]:
    """Draws the scenario into `out`; returns the router gap of each step, where the recording names a tie."""
    if not recording.meta:
        raise MissingFeatureError("the recording has no json, so its call is unknown")
    folder = bench.folder(recording.meta["checkpoint"])
    folder = overridden(folder, recording.meta.get("generation_config_overrides") or {})
    if features := missing_features(recording.meta, folder):
        raise MissingFeatureError(", ".join(features))
    watch = Watch(gaps=bench.router_gaps.get(recording.name, 1.0) < RECORDED_TIE)
    draw(bench, recording, folder, out, watch)
    return watch.smallest_gap


def missing_features(meta: dict[str, Any], folder: ModelFolder) -> list[str]:
    """What a recorded call needs that the package cannot do yet, in words."""
    call = meta["call"]
    task = call.get("bot_task") or folder.generation.bot_task
    prompts = call.get("prompt")
    needed = {
        "message lists": bool(call.get("message_list")),
        "several requests at once": isinstance(prompts, list) and len(prompts) > 1,
        "input pictures": bool(meta.get("images") or call.get("image")),
        "automatic size": call.get("image_size", "auto") == "auto" or task == "img_ratio",
        "text generation": task in ("think", "recaption", "think_recaption"),
    }
    found = [feature for feature, is_needed in needed.items() if is_needed]
    if not found and any(stage["mode"] != "gen_image" for stage in meta["stages"]):
        found.append("text generation")
    return found


def overridden(folder: ModelFolder, overrides: dict[str, Any]) -> ModelFolder:
    """The folder with fields of its generation config replaced."""
    settings = read_json(folder.path / "generation_config.json") | overrides
    return replace(folder, generation=GenerationConfig.from_json(settings))


def requested_conditioning(folder: ModelFolder, call: dict[str, Any]) -> Conditioning:
    """The call's prompt and texts, laid out as the reference does."""
    prompt, trace = (value[0] if isinstance(value, list) else value for value in (call["prompt"], call.get("cot_text")))
    size = call["image_size"]
    return make_conditioning(
        folder,
        prompt,
        folder.resolutions.parse(size),
        system_prompt=call.get("use_system_prompt") or "auto",
        custom_system_prompt=call.get("system_prompt") or "",
        trace=trace or "",
        bot_task=call.get("bot_task") or folder.generation.bot_task,
        reference=True,
    )


def requested_taylor(call: dict[str, Any]) -> TaylorOptions | None:
    """The call's step cache."""
    if not call.get("use_taylor_cache"):
        return None
    given = {name: call.get(f"taylor_cache_{name}") for name in REFERENCE_TAYLOR}
    return TaylorOptions(**REFERENCE_TAYLOR | {name: value for name, value in given.items() if value is not None})


def draw(bench: Bench, recording: Recording, folder: ModelFolder, out: Computed, watch: "Watch") -> None:
    """Runs the pipeline and fills `out`, as far as it gets.

    1. lay out the request
    2. draw, reading off what the networks are fed
    3. decode
    """
    meta, call = recording.meta, recording.meta["call"]
    model: Hunyuan3 = bench.model(meta["checkpoint"])
    number = len(meta["stages"]) - 1
    seeds = meta["stages"][number]["generator_seed"]
    if isinstance(seeds, list) and len(seeds) > 1:
        raise MissingFeatureError("several requests at once")

    conditioning = requested_conditioning(folder, call)
    put_layout(out, f"stage{number}.", conditioning, folder)

    transformer = model.transformer()
    dropping = meta.get("moe_drop_tokens")
    for layer in transformer.layers:
        layer.mlp.drop_tokens = folder.config.moe.drop_tokens if dropping is None else dropping
    run = SamplingRun.prepare(
        folder,
        transformer,
        conditioning,
        seed=seeds[0] if isinstance(seeds, list) else seeds,
        noise="reference",
        taylor=requested_taylor(call),
    )
    probe_key = f"stage{number}.probe_index"
    watch.probe = recording.input(probe_key) if probe_key in recording.tensors else None
    steps = []
    with watch.transformer(transformer):
        for step in run:
            steps.append(step)
            watch.step += 1
    put_schedule(out, Schedule.flow_matching(run.settings.steps, run.settings.shift), watch, folder)
    put_watched(out, f"stage{number}.", watch, rows=steps[0].raw_prediction.shape[0])
    out.tensors["step_raw_prediction"] = torch.stack([step.raw_prediction for step in steps])
    out.tensors["step_prediction"] = torch.stack([step.prediction for step in steps])
    out.tensors["step_latents"] = torch.stack([step.latents for step in steps])
    out.facts["latents_std"] = [step.latents.std().item() for step in steps]
    out.facts["taylor_full_steps"] = [step.step for step in steps if step.full]
    out.tensors["decode_input_latents"] = run.latents.unsqueeze(2)
    out.rules["decode_input_latents"] = Rule(LATENTS.absolute / min(1.0, folder.config.vae.scaling_factor))

    pictured = any(key.startswith("image_") for key in (*recording.tensors, *meta))
    out.facts["output_size_wh"] = [conditioning.size.width, conditioning.size.height]
    if pictured or bench.dumping:
        with watch.decoder(model):
            picture = model.pictures(run.latents)[0]
        assert watch.decoded is not None
        pixels = watch.decoded[:, :, -1]
        out.facts["output_size_wh"] = list(picture.size)
        out.tensors["image_float"] = pixels
        out.facts["image_float_minmax"] = [pixels.min().item(), pixels.max().item()]
        flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        out.tensors["image_uint8"] = flat.view(1, picture.height, picture.width, 3)


def put_layout(out: Computed, stage: str, conditioning: Conditioning, folder: ModelFolder) -> None:
    """Token rows and places of a stage."""
    rows = conditioning.rows
    put = {**layout.row_tensors(rows.branches)}
    positions = rope_positions(len(rows.sequence), rows.grids).to(torch.int32)
    put["rope_pos_yx"] = positions.expand(len(rows.branches), -1, -1)
    out.tensors |= {stage + key: tensor for key, tensor in put.items()}
    facts = layout.slices(rows.branches)
    facts["full_attention_slices"] = [rows.full_spans] * len(rows.branches)
    facts["rope_image_info"] = [rows.grids] * len(rows.branches)
    facts["gen_image_info"] = layout.drawn_picture(rows.sequence, folder)
    facts["decoded"] = layout.decoded(rows.branches, folder.tokenizer)
    facts["cos_sin_rows_equal"] = True  # the branches of a request share one table
    out.facts |= {stage + key: fact for key, fact in facts.items()}


def put_schedule(out: Computed, schedule: Schedule, watch: "Watch", folder: ModelFolder) -> None:
    """The schedule, and the values that the embedders were fed (steps that the cache skips feed only some)."""
    times = schedule.times
    out.tensors["sched.sigmas"] = schedule.sigmas
    out.tensors["sched.timesteps"] = times[:-1]
    out.tensors["sched.timesteps_full"] = times
    steps = range(schedule.steps)
    out.tensors["step_timestep"] = torch.stack([watch.fed["time"][step] for step in steps])
    if folder.config.use_meanflow:
        out.tensors["step_timestep_r"] = torch.stack([watch.fed["time_r"].get(i, times[i + 1]) for i in steps])
    if folder.config.cfg_distilled:
        out.tensors["guidance_value"] = watch.fed["guidance"][0].view(1)


def put_watched(out: Computed, stage: str, watch: "Watch", rows: int) -> None:
    """What the first and the second full step fed to the stack."""
    assert watch.noise is not None and watch.first_plan is not None
    out.tensors["noise"] = watch.noise
    length = watch.first_plan[-1].stop
    out.facts["first_step_attention_mask_shape"] = [rows, length, length]
    if length <= LONGEST_MASK:
        mask = layout.dense_mask(watch.first_plan)
        out.tensors["first_step_attention_mask_packed"] = layout.packed(mask).expand(rows, -1, -1)
    out.facts["later_step_mask_shape"] = None
    if watch.later_plan is not None:
        positions = torch.arange(watch.later_plan[0].start, watch.later_plan[-1].stop)
        out.tensors["later_step_position_ids"] = positions
        out.facts["later_step_mask_shape"] = [rows, 1, len(positions), length]
    if watch.probe is not None:
        cos, sin = watch.rope
        out.tensors[f"{stage}cos"], out.tensors[f"{stage}sin"] = cos[watch.probe], sin[watch.probe]
        out.tensors["hidden_probe"] = torch.stack(watch.hidden)


class Watch:
    """What the pipeline feeds its networks and gets from them, through module hooks.

    The caller counts `step` up. probe: positions whose hidden states are kept. gaps: also measure, for every step, the
    smallest distance between the logits of the last chosen and the first rejected expert.
    """

    def __init__(self, gaps: bool) -> None:
        self.gaps = gaps
        self.probe: torch.Tensor | None = None
        self.step = 0
        self.noise: torch.Tensor | None = None
        self.rope: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        self.first_plan: AttentionPlan | None = None
        self.later_plan: AttentionPlan | None = None
        self.hidden: list[torch.Tensor] = []
        self.fed: dict[str, dict[int, torch.Tensor]] = {"time": {}, "time_r": {}, "guidance": {}}
        self.smallest_gap: dict[int, float] = {}
        self.decoded: torch.Tensor | None = None

    def transformer(self, model: Hunyuan3Transformer) -> "_Hooks":
        """Watches a transformer while the context lasts."""
        handles = [
            model.patch_embed.register_forward_pre_hook(self._see_latents),
            model.layers[0].register_forward_pre_hook(self._see_first_layer),
            model.time_embed_2.register_forward_pre_hook(self._see("time")),
        ]
        handles += [layer.register_forward_hook(self._see_layer) for layer in model.layers]
        if model.guidance_emb is not None:
            handles.append(model.guidance_emb.register_forward_pre_hook(self._see("guidance")))
        if model.timestep_r_emb is not None:
            handles.append(model.timestep_r_emb.register_forward_pre_hook(self._see("time_r")))
        if self.gaps:
            handles += [layer.mlp.router.register_forward_hook(self._see_router) for layer in model.layers]
        return _Hooks(handles)

    def decoder(self, model: Hunyuan3) -> "_Hooks":
        """Watches the VAE's decoder while the context lasts."""

        def see(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
            self.decoded = output

        return _Hooks([model.vae().decoder.register_forward_hook(see)])

    def _see(self, name: str) -> Callable[..., None]:
        def see(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.fed[name][self.step] = args[0][0].clone()

        return see

    def _see_latents(self, _module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self.step == 0:
            self.noise = args[0].clone()

    def _see_first_layer(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        x, rope, plan, _cache = args
        if self.step == 0:
            self.first_plan, self.rope = plan, rope
            self._keep(x)
        elif self.later_plan is None:
            self.later_plan = plan

    def _see_layer(self, _module: torch.nn.Module, _args: Any, output: torch.Tensor) -> None:
        if self.step == 0:
            self._keep(output)

    def _see_router(self, router: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: Any) -> None:
        logits = router.logits(args[0])
        if router.top_k < logits.shape[-1]:
            best = logits.float().topk(router.top_k + 1, dim=-1).values
            gap = (best[:, -2] - best[:, -1]).min().item()
            self.smallest_gap[self.step] = min(gap, self.smallest_gap.get(self.step, gap))

    def _keep(self, x: torch.Tensor) -> None:
        if self.probe is not None:
            self.hidden.append(x[:, self.probe].clone())


class _Hooks:
    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def judge(recording: Recording, computed: Computed, own_gaps: dict[int, float], report: Report) -> None:
    """Compares everything recorded with everything computed, a line per kind."""
    recorded: dict[str, Any] = {**recording.tensors}
    for key, value in recording.meta.items():
        if key not in REQUEST:
            recorded[key] = value
    for number, stage in enumerate(recording.meta["stages"]):
        recorded |= {f"stage{number}.{key}": value for key, value in stage.items() if key not in STAGE_REQUEST}
    ours = {**computed.tensors, **computed.facts}

    comparable = {key: value for key, value in recorded.items() if key in ours and key not in recording.inputs}
    flip = flipped_step(comparable, ours, own_gaps)
    for title, differences in by_kind(comparable, ours, computed.rules, flip).items():
        report.compared(recording.name, title, differences, _flip_note(title, flip, own_gaps))
    if unknown := [key for key in recorded if key not in comparable and key not in recording.inputs]:
        report.lacks(recording.name, "recorded, but nothing here computes it", unknown)


def by_kind(
    recorded: dict[str, Any], ours: dict[str, Any], rules: dict[str, Rule], flip: int | None
) -> dict[str, list[Difference]]:
    """Differences by kind of comparison; with a flipped tie in step `flip`, of what was computed before it."""
    found: dict[str, list[Difference]] = {title: [] for _, title, _ in KINDS}
    for key, theirs in recorded.items():
        title, rule = kind_of(key)
        mine = ours[key]
        if flip is not None and title in _AFTER_FLIP:
            if title == "hidden states":
                mine, theirs = _before_flip_in_stack(mine, theirs, rule, flip)
            elif key.startswith(("step_", "latents_std")):
                mine, theirs = mine[:flip], theirs[:flip]
            else:
                continue
            if not len(theirs):
                continue
        found[title].append(compare(key, mine, theirs, rules.get(key, rule)))
    return {title: differences for title, differences in found.items() if differences}


def kind_of(key: str) -> tuple[str, Rule]:
    """The kind of comparison and the rule of a recorded key."""
    for pattern, title, rule in KINDS:
        if re.fullmatch(pattern, key):
            return title, rule
    raise AssertionError(f"{key} is computed, but KINDS has no rule for it")


_AFTER_FLIP = ("hidden states", "predictions", "latents", "decoded picture", "final picture")


def flipped_step(recorded: dict[str, Any], ours: dict[str, Any], own_gaps: dict[int, float]) -> int | None:
    """The first step that is off, if a flipped tie explains it; else None.

    `own_gaps` is filled only where the recording names a tie; that step must hold one in our own run as well.
    """
    if not own_gaps:
        return None
    for step in sorted(own_gaps):
        for key in ("step_raw_prediction", "step_prediction", "step_latents"):
            rule = kind_of(key)[1]
            if key in recorded and not compare(key, ours[key][step], recorded[key][step], rule).passed:
                return step if own_gaps[step] < OWN_TIE else None
    return None


def _before_flip_in_stack(
    mine: torch.Tensor, theirs: torch.Tensor, rule: Rule, flip: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states are those of step 0: all of them, or those before the layer in which that step's tie flips."""
    if flip > 0 or mine.shape != theirs.shape:
        return mine, theirs
    depth = next((i for i in range(len(theirs)) if not compare("", mine[i], theirs[i], rule).passed), len(theirs))
    return mine[: max(depth, 1)], theirs[: max(depth, 1)]  # no router comes before the first


def _flip_note(title: str, flip: int | None, own_gaps: dict[int, float]) -> str:
    if flip is None or title not in _AFTER_FLIP:
        return ""
    return f"only before step {flip}, where a router tie flips (gap {own_gaps[flip]:.1e})"
