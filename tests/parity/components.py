"""Recorded parts of the reference, each computed by the part of this package that does the same.

A component is a generator: it asks its recording for inputs and yields what it computed, a `Value` under a tensor key
of the recording or a `Fact` of its json. To add one, write it and put it into `COMPONENTS`.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hunyuan3.config import vae_config
from hunyuan3.folder import ModelFolder
from hunyuan3.generate.sampling import SamplingOptions, TokenSampler, pick_among
from hunyuan3.generate.schedule import TIME_SCALE, Schedule
from hunyuan3.generate.taylor import TaylorCache, TaylorOptions, split_bands
from hunyuan3.image.preprocess import fit_picture, load_picture, patch_grid, size_of, vision_patches
from hunyuan3.image.resolution import ResolutionTable
from hunyuan3.moe.capacity import drop_over_capacity, expert_capacity
from hunyuan3.moe.dispatch import Dispatch
from hunyuan3.moe.layer import MoELayer
from hunyuan3.ops.attention import plan_attention
from hunyuan3.ops.rope import rope_positions, rope_table
from hunyuan3.text.sequence import REFERENCE, build_sequence, conditional_pair
from hunyuan3.text.special_tokens import BASE_RATIOS, EXTRA_RATIOS
from hunyuan3.text.template import InputPicture, OutputPicture, Section, TextSection
from hunyuan3.transformer.layers import sinusoid
from hunyuan3.types import Grid, ImageSize, Span
from hunyuan3.vae.autoencoder import AutoencoderKLConv3D
from hunyuan3.writing import choosing_ratio, thinking
from tests.core.golden_requests import template_sections

from . import layout
from .bench import Bench
from .recording import MissingFeatureError, Recording
from .report import BFLOAT16, COMPONENT, IDENTICAL, Computed, Difference, Report, Rule, compare


class Value(NamedTuple):
    """A computed tensor under its key. Without a rule: integers must be identical, floats within COMPONENT."""

    key: str
    tensor: torch.Tensor
    rule: Rule | None = None


class Fact(NamedTuple):
    """A computed value of the json, beside the recorded one; `kind` heads the line that it is counted in."""

    kind: str
    key: str
    computed: Any
    recorded: Any


class Note(NamedTuple):
    """A word about what was left out, shown with the lines."""

    text: str


Component = Callable[[Bench, Recording], Iterator[Value | Fact | Note]]

# What a json says about itself.
ABOUT = {"note", "checkpoint"}


def check(bench: Bench, recording: Recording, report: Report) -> None:
    """Computes one component and reports it: a line for what must be identical, one for the rest, one per table."""
    if recording.name not in COMPONENTS:
        raise MissingFeatureError("a component that nothing here computes")
    computed = Computed()
    kinds: dict[str, list[Difference]] = {}
    problem: MissingFeatureError | None = None
    try:
        for item in COMPONENTS[recording.name](bench, recording):
            if isinstance(item, Note):
                computed.notes.append(item.text)
            elif isinstance(item, Fact):
                difference = compare(item.key, item.computed, item.recorded, IDENTICAL)
                kinds.setdefault(item.kind, []).append(difference)
            else:
                computed.tensors[item.key] = item.tensor
                if item.key in recording.tensors:
                    put_value(kinds, item, recording.tensors[item.key])
    except MissingFeatureError as error:
        problem = error
    finally:
        report.dump(recording.name, computed.tensors, recording.tensors)
    for kind, differences in kinds.items():
        report.compared(recording.name, kind, differences, "; ".join(computed.notes))
    if problem is not None:
        raise problem
    unread = [key for key in recording.not_read() if key not in ABOUT]
    if unknown := [*recording.not_computed(set(computed.tensors)), *unread]:
        report.lacks(recording.name, "recorded, but nothing here computes it", unknown)
    if not kinds and not unknown:
        raise MissingFeatureError("the recording holds nothing to compare")


def put_value(kinds: dict[str, list[Difference]], value: Value, recorded: torch.Tensor) -> None:
    rule = value.rule or (COMPONENT if recorded.is_floating_point() else IDENTICAL)
    kind = "identical tensors" if rule == IDENTICAL else "tensors"
    kinds.setdefault(kind, []).append(compare(value.key, value.tensor, recorded, rule))


def sinusoid_rule(t: torch.Tensor) -> Rule:
    """COMPONENT, and what a unit in the last place of a frequency makes of the angle t; for the embedders behind, too.

    Processors round float32 exponentials differently: on some, several frequencies are not those of the recording, and
    of what the embedders' two linear layers may differ by half is used up then.
    """
    return replace(COMPONENT, absolute=COMPONENT.absolute + t.abs().max().item() * torch.finfo(torch.float32).eps)


def embedders(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    main = bench.model(recording.setting("checkpoint")).transformer()
    distilled = main
    if other := recording.setting("checkpoint_for_guidance_emb_and_timestep_r_emb", None):
        try:
            distilled = bench.model(other).transformer()
        except MissingFeatureError:
            pass  # main has no such embedders: their values are then reported as not computed
    t = recording.input("embedder.t")
    rule = sinusoid_rule(t)
    yield Value("embedder.sinusoid", sinusoid(t), rule)
    for name in ("time_embed", "time_embed_2", "timestep_emb"):
        yield Value(f"embedder.{name}", getattr(main, name)(t), rule)
    for name in ("guidance_emb", "timestep_r_emb"):
        if (embedder := getattr(distilled, name)) is not None:
            yield Value(f"embedder.{name}", embedder(t), rule)
    # Which guidances these are stands in a note only. Scenarios compare the value that the loop itself feeds.
    if listed := re.search(r"\[([\d., ]+)\]", recording.setting("guidance_value_used_note", "")):
        scaled = [float(guidance) * TIME_SCALE for guidance in listed[1].split(",")]
        yield Value("embedder.guidance_value_used", torch.tensor(scaled, dtype=torch.bfloat16).float())
    grid = Grid(*recording.setting("token_hw"))
    x, t = recording.input("patch_embed.x"), recording.input("patch_embed.t")
    yield Value("patch_embed.out", main.embed_latents(x, t))
    h, t = recording.input("final_layer.h"), recording.input("final_layer.t")
    yield Value("final_layer.out", main.velocity(h, t, grid))
    x = recording.input("rmsnorm.x")
    for match in recording.matching(r"rmsnorm\.input_layernorm_(\d+)"):
        yield Value(match[0], main.layers[int(match[1])].input_layernorm(x))
    yield Value("rmsnorm.ln_f", main.ln_f(x))


def moe(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    layer = bench.model(recording.setting("checkpoint")).transformer().layers[recording.setting("layer")].mlp
    yield Fact("settings", "topk", layer.router.top_k, recording.setting("topk", layer.router.top_k))
    x = recording.input("x")
    flat = x.reshape(-1, x.shape[-1])
    routing = layer.router(flat)
    yield Value("router_logits", layer.router.logits(flat))
    yield Value("topk_index", routing.ids)
    yield Value("topk_weight", routing.weights)
    yield Value("shared_out", layer.shared_mlp(x))
    for match in recording.matching(r"expert(\d+)_out"):
        everyone = Dispatch.sort(torch.full((len(flat), 1), int(match[1])), layer.num_experts)
        out = torch.empty_like(flat)
        for experts in layer.experts.chunks():
            layer.backend(flat, everyone, experts, out)
        yield Value(match[0], out.view_as(x))
    for match in recording.matching(r"\w+_drop_(False|True)"):
        dropping = match[1] == "True"
        most = Dispatch.sort(routing.ids, layer.num_experts).ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).max()
        kept = routing
        if dropping:
            most = torch.tensor(
                expert_capacity(len(flat), layer.router.top_k, layer.num_experts, layer.capacity_factor)
            )
            kept = drop_over_capacity(routing, layer.num_experts, layer.capacity_factor)
        combine = per_expert(kept.ids, kept.weights, layer)
        yield Value(f"capacity_drop_{dropping}", most.long())
        yield Value(f"combine_per_expert_drop_{dropping}", combine)
        yield Value(f"kept_drop_{dropping}", (combine > 0).to(torch.uint8))
        configured, layer.drop_tokens = layer.drop_tokens, dropping
        out = layer(x)
        layer.drop_tokens = configured
        yield Value(f"out_drop_{dropping}", out)


def moe_bf16(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    layer = (
        bench.model(recording.setting("checkpoint"), "bfloat16").transformer().layers[recording.setting("layer")].mlp
    )
    recorded_dtype = recording.setting("router_weight_dtype", "torch.float32")
    yield Fact("settings", "router_weight_dtype", str(layer.router.weight.dtype), recorded_dtype)
    x = recording.input("x")
    flat = x.reshape(-1, x.shape[-1])
    routing = layer.router(flat)
    yield Value("router_logits", layer.router.logits(flat), BFLOAT16)
    yield Value("topk_index", routing.ids)
    yield Value("topk_weight", routing.weights, BFLOAT16)
    yield Value("combine_per_expert", per_expert(routing.ids, routing.weights, layer), BFLOAT16)
    yield Value("out_eager", layer(x), BFLOAT16)
    layer.router.precision = "fp32"
    logits = layer.router.logits(flat)
    layer.router.precision = "reference"
    yield Value("router_logits_float32", logits, BFLOAT16)


def per_expert(ids: torch.Tensor, weights: torch.Tensor, layer: MoELayer) -> torch.Tensor:
    """Combine weights (T, K) spread over the experts: (T, E) float32."""
    return torch.zeros(len(ids), layer.num_experts).scatter_(1, ids, weights.float())


def attention(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    model = bench.model(recording.setting("checkpoint")).transformer()
    block = model.layers[recording.setting("layer")]
    x = recording.input("x")
    length = x.shape[1]
    plan = plan_attention(Span(0, length), [Span(*span) for span in recording.setting("full_attention_slices")])
    grids = [(Span(start, stop), Grid(h, w)) for start, stop, h, w in recording.setting("rope_images")]
    rope = rope_table(rope_positions(length, grids), model.config.head_dim, model.config.rope_theta)
    yield Value("mask", layout.dense_mask(plan).to(torch.uint8))
    yield Value("cos", rope[0])
    yield Value("sin", rope[1])
    q, k, v = block.self_attn.project(x, rope)
    yield Value("q_after_rope_norm", q)
    yield Value("k_after_rope_norm", k)
    yield Value("v", v)
    cache = model.new_cache(rows=len(x), length=length)
    yield Value("attn_out", block.self_attn(x, rope, plan, cache))
    yield Value("layer_out", block(x, rope, plan, cache))


def rope(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    for index, said in enumerate(recording.setting("layouts")):
        grids = [(Span(start, stop), Grid(h, w)) for start, stop, h, w in said["images"]]
        positions = rope_positions(said["seq_len"], grids)
        cos, sin = rope_table(positions, said["n_elem"], said["base"])
        yield Value(f"layout{index}.pos_yx", positions.to(torch.int32))
        yield Value(f"layout{index}.cos", cos)
        yield Value(f"layout{index}.sin", sin)


def vae(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    """Weights are those of the checkpoint that the recording names, or lie in the recording itself."""
    weights = {match[1]: recording.input(match[0]).float() for match in recording.matching(r"weight\.(.+)")}
    config = vae_config(recording.setting("config"), recording.name)
    if weights:
        with torch.device("meta"):
            model = AutoencoderKLConv3D(config)
        model.load_state_dict(weights, assign=True)
    else:
        model = bench.model(recording.setting("checkpoint")).vae()
        yield Fact("settings", "config", repr(model.config), repr(config))
    for match in recording.matching(r"encode(\d+)\.(?:pixels|mean|logvar)"):
        posterior = model.encode(recording.input(f"encode{match[1]}.pixels"))
        yield Value(f"encode{match[1]}.mean", posterior.mean.unsqueeze(2))
        yield Value(f"encode{match[1]}.logvar", posterior.logvar.unsqueeze(2))
    for match in recording.matching(r"decode(\d+)\.(?:latents|pixels)"):
        latents = recording.input(f"decode{match[1]}.latents")
        yield Value(f"decode{match[1]}.pixels", model.decode(latents[:, :, 0]).unsqueeze(2))
    traced = [match[1] for match in recording.matching(r"trace\.((?:encoder|decoder)\..+)")]
    outputs: dict[str, torch.Tensor] = {}
    hooks = []
    for path in traced:

        def keep(_module: torch.nn.Module, _args: Any, output: torch.Tensor, path: str = path) -> None:
            outputs[path] = output.clone()

        hooks.append(model.get_submodule(path).register_forward_hook(keep))
    try:
        if any(path.startswith("encoder") for path in traced):
            model.encode(recording.input("trace.pixels"))
        if any(path.startswith("decoder") for path in traced):
            model.decode(recording.input("trace.latents")[:, :, 0])
    finally:
        for hook in hooks:
            hook.remove()
    for path, output in outputs.items():
        yield Value(f"trace.{path}", output)


def scheduler(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    recording.setting("shifts", None), recording.setting("steps", None)
    left_out = 0
    for match in recording.matching(r"(shift([\d.]+)_steps(\d+)\.)\w+"):
        prefix, steps = match[1], int(match[3])
        schedule = Schedule.flow_matching(steps, float(match[2]))
        yield Value(f"{prefix}sigmas", schedule.sigmas)
        yield Value(f"{prefix}timesteps", schedule.times[:-1])
        yield Value(f"{prefix}timesteps_full", schedule.times)
        yield Value(f"{prefix}timestep_r", schedule.times[1:])
        if f"{prefix}sample_end" not in recording.tensors:
            continue
        if f"{prefix}preds" in recording.tensors:
            sample, velocities = recording.input(f"{prefix}sample0"), recording.input(f"{prefix}preds")
            for step in range(steps):
                sample = schedule.euler(sample, velocities[step], step)
            yield Value(f"{prefix}sample_end", sample)
        else:
            recording.inputs |= {f"{prefix}sample0", f"{prefix}sample_end"}
            left_out += 1
    if left_out:
        yield Note(f"{left_out} Euler end points left out, their predictions were not recorded")


def taylor(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    said = recording.setting("seq")
    low, high = said[0]["low_freqs_order"], said[0]["high_freqs_order"]
    options = TaylorOptions(
        enable_first_enhance=False, order=max(low, high), low_freqs_order=low, high_freqs_order=high
    )
    yield from taylor_sequence(recording, "", options, [row["full_step"] for row in said])


def taylor_orders(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    for index, said in enumerate(recording.setting("cases")):
        if said.get("error"):
            yield Note(f"case {index} left out: the reference raised {said['error']}")
            continue
        orders = {key: said[key] for key in ("low_freqs_order", "high_freqs_order")}
        options = TaylorOptions(enable_first_enhance=False, order=said["max_order"], **orders)
        yield from taylor_sequence(recording, f"case{index}.", options, said["full_steps"])


def taylor_sequence(
    recording: Recording, prefix: str, options: TaylorOptions, full_steps: list[int]
) -> Iterator[Value | Fact | Note]:
    """Feeds outputs at full steps to a cache; after each, extrapolates as far as was recorded."""
    cache = TaylorCache(options, num_steps=full_steps[-1] + options.interval)
    for index, step in enumerate(full_steps):
        x = recording.input(f"{prefix}x{index}")
        low, high = split_bands(x)
        yield Value(f"{prefix}low{index}", low)
        yield Value(f"{prefix}high{index}", high)
        cache.update(step, x)
        matches = recording.matching(rf"{prefix}predict{index}_distance(\d+)")
        for distance in range(1, 1 + max((int(match[1]) for match in matches), default=0)):
            yield Value(f"{prefix}predict{index}_distance{distance}", cache.extrapolate())


def resolutions(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    every = BASE_RATIOS + EXTRA_RATIOS
    for name, rows in recording.setting("groups", {}).items():
        base, _, without = name.partition("_without_")
        table = ResolutionTable.build(int(base), BASE_RATIOS if without else every)
        yield Fact("tables", f"groups.{name}", table.rows, rows)
    for base, rows in recording.setting("target", {}).items():
        table = ResolutionTable.build(int(base), every)
        for row in rows:
            ratio = table.nearest(row["h"], row["w"])
            found = {"target_wh": table.rows[ratio][::-1], "ratio_index": ratio}
            recorded = {key: value for key, value in row.items() if key not in ("w", "h")}
            yield Fact("nearest rows", f"{base}: {row['w']}x{row['h']}", found, recorded)
    for key in recording.meta:
        if key.startswith("build_gen_image_info_base"):
            table = ResolutionTable.build(int(key.removeprefix("build_gen_image_info_base")), every)
            for row in recording.setting(key):
                made = table.parse(row["image_size"])
                found = {
                    "image_height": made.size.height,
                    "image_width": made.size.width,
                    "token_height": made.grid.height,
                    "token_width": made.grid.width,
                    "base_size": table.base_size,
                    "ratio_index": made.ratio,
                }
                recorded = {key: value for key, value in row.items() if key != "image_size"}
                yield Fact("parsed sizes", str(row["image_size"]), found, recorded)


def tokenizer(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    folder = bench.folder(recording.setting("checkpoint", None) or bench.any_checkpoint())
    for row in recording.setting("encode", []):
        yield Fact("encodings", repr(row["text"]), folder.tokenizer.encode(row["text"]), row["ids"])
    for text, token_id in recording.setting("special", {}).items():
        yield Fact("special ids", text, folder.tokenizer.token_id(text), token_id)
    ratios = folder.tokens.ratios
    if (recorded := recording.setting("all_ratio_ids", None)) is not None:
        yield Fact("ratio ids", "all_ratio_ids", ratios, recorded)
    if (recorded := recording.setting("ratio_other_slices", None)) is not None:
        extra = ratios[BASE_RATIOS:]
        yield Fact("ratio ids", "ratio_other_slices", [[extra[0], extra[-1] + 1]] if extra else [], recorded)


def ratio_logits(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    """Both ways to the ratio: after thinking, where a token triggers it, and as a pass of its own."""
    folder = bench.folder(recording.setting("checkpoint", None) or bench.any_checkpoint())
    plan, alone = thinking(folder, "recaption", need_ratio=True, reference=True), choosing_ratio(folder)
    extra = plan.ratios[BASE_RATIOS:]
    found = {
        "size_token_id": plan.ratio_after,
        "start_ratio_id": plan.ratios[0],
        "end_ratio_id": plan.ratios[BASE_RATIOS - 1],
        "other_slices": [[extra[0], extra[-1] + 1]] if extra else [],
    }
    for key, ours in found.items():
        yield Fact("ratio ids", key, ours, recording.setting(key, ours))
    greedy = TokenSampler(SamplingOptions(do_sample=False), seed=0, device=torch.device("cpu"))
    scores, ids = recording.input("scores"), recording.input("input_ids")
    picked = [
        pick_among(row, plan.ratios) if so_far[-1] == plan.ratio_after else greedy.pick(row, so_far)
        for row, so_far in zip(scores, ids.tolist(), strict=True)
    ]
    yield Value("conditional_argmax", torch.tensor(picked))
    yield Value("sliced", scores[:, list(alone.ratios)])
    yield Value("sliced_argmax", torch.tensor([alone.ratios.index(pick_among(row, alone.ratios)) for row in scores]))


def system_prompts(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    prompts = bench.folder(recording.setting("checkpoint", None) or bench.any_checkpoint()).system_prompts
    refused = 0
    for row in recording.setting("rows"):
        if row.get("error"):
            refused += 1
            continue
        choice, task, custom = row["use_system_prompt"], row["bot_task"], row["system_prompt"]
        found = prompts.select(choice, task, custom, reference=True)
        yield Fact("selections", f"{choice} for {task}", found, row["result"])
    if refused:
        yield Note(f"{refused} rows left out: the reference raised an error")


def chat_templates(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    refused, absent = 0, 0
    for row in recording.setting("rows"):
        if row.get("error"):
            refused += 1
            continue
        try:
            name = row.get("checkpoint") or template_checkpoint(bench, row["name"])
            facts = list(template_facts(TemplateSide(bench, bench.folder(name)), row))
        except MissingFeatureError:
            absent += 1
            continue
        for kind, key, found in facts:
            yield Fact(kind, f"{row['name']} {key}", found, row[key])
    if refused:
        yield Note(f"{refused} rows left out: the reference raised an error")
    if absent:
        yield Note(f"{absent} rows left out: their checkpoint or picture is not in the folder")


def template_checkpoint(bench: Bench, row: str) -> str:
    """Rows are recorded with the base, the distilled or (all others) the Instruct checkpoint, by their name."""
    kinds = {"pretrain_": ("base", "tiny-base"), "distil_": ("distil", "tiny-distil")}
    return bench.checkpoint_of(*next((v for k, v in kinds.items() if row.startswith(k)), ("instruct", "tiny-instruct")))


def template_facts(at: "TemplateSide", row: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(kind, key, computed) for everything recorded of a row; `stop_token_id` is about the reference's own loop."""
    sections = template_sections(row, at)  # type: ignore[arg-type]
    folder = at.folder
    options = {"control_tokens": REFERENCE}
    if row["input"].get("cfg_factor", 1) == 2:
        rows = conditional_pair(sections, folder.tokens, folder.tokenizer, **options)
    else:
        rows = (build_sequence(sections, folder.tokens, folder.tokenizer, **options),)
    found = {
        "tokens": [row.ids for row in rows],
        "real_pos": [[len(row)] for row in rows],
        "decoded": layout.decoded(rows, folder.tokenizer),
        "sections": [[at.described(section) for section in sections]] * len(rows),
        **layout.slices(rows),
        **layout.scattered(rows),
    }
    about = {"name", "input", "stop_token_id", "checkpoint", "error"}
    for key in (key for key in row if key not in about):
        kind = {"tokens": "token ids", "decoded": "texts", "sections": "sections"}.get(key, "places")
        yield kind, key, found.get(key)


class TemplateSide:
    """What `template_sections` needs to know of a checkpoint; pictures are measured in the folder's own files."""

    def __init__(self, bench: Bench, folder: ModelFolder) -> None:
        self.bench = bench
        self.folder = folder
        self.config = folder.config
        self.template = folder.template

    def input_picture(self, file_name: str, vit_grid: Grid) -> InputPicture:
        """A picture of the folder, or what its name says of one that is not there; the recorded grid is not used."""
        path = self.bench.image(file_name)
        if path is not None:
            size = size_of(load_picture(path, reference=True))
        elif named := re.search(r"_(\d+)x(\d+)_", file_name):
            size = ImageSize(int(named[2]), int(named[1]))
        else:
            raise MissingFeatureError(f"the folder has no picture {file_name}")
        vision = self.config.vision
        row = self.folder.resolutions.row(self.folder.resolutions.nearest(*size))
        grid = patch_grid(size, max_num_patches=vision.max_num_patches, patch_size=vision.patch_size)
        return InputPicture(row.ratio, row.grid, grid, vision.max_num_patches)

    def output_picture(self, size: Any) -> OutputPicture:
        resolution = self.folder.resolutions.parse(size)
        return OutputPicture(resolution.ratio, resolution.grid)

    def described(self, section: Section) -> dict[str, Any]:
        """A section as the recordings have it."""
        base = self.config.image_base_size
        if isinstance(section, TextSection):
            before, after = section.affixes
            return {"type": "text", "text": before + section.text + after}
        if isinstance(section, OutputPicture):
            return {
                "type": "gen_image",
                "token_length": section.grid.height * section.grid.width,
                "base_size": base,
                "ratio_idx": section.ratio,
                "token_height": section.grid.height,
                "token_width": section.grid.width,
            }
        vae_grid, vit_grid = section.vae_grid, section.vit_grid
        return {
            "type": "cond_joint_image",
            "token_length": [vae_grid.height * vae_grid.width, section.vit_tokens],
            "base_size": base,
            "ratio_idx": section.ratio,
            "token_height": [vae_grid.height, vit_grid.height],
            "token_width": [vae_grid.width, vit_grid.width],
        }


def cond_images(bench: Bench, recording: Recording) -> Iterator[Value | Fact | Note]:
    folder = bench.folder(recording.setting("checkpoint"))
    vision, table, factor = folder.config.vision, folder.resolutions, folder.config.vae_downsample
    absent = 0
    for index, said in enumerate(recording.setting("images")):
        path = bench.image(said["file"])
        if path is None:
            absent += 1
            continue
        picture = load_picture(path, reference=True)
        size = size_of(picture)
        bucket = table.row(table.nearest(*size))
        for how, stretch in (("center", False), ("resize", True)):
            pixels = fit_picture(picture, ImageSize(*bucket.size), stretch=stretch)
            yield Value(f"img{index}.vae_image_{how}_uint8", pixels)
            found = {
                "image_width": pixels.shape[2],
                "image_height": pixels.shape[1],
                "token_width": pixels.shape[2] // factor,
                "token_height": pixels.shape[1] // factor,
                "base_size": folder.config.image_base_size,
                "ratio_index": bucket.ratio,
                "ori_image_width": size.width,
                "ori_image_height": size.height,
                "image_token_length": bucket.grid.height * bucket.grid.width,
            }
            if recorded := said.get(f"vae_{how}"):
                yield Fact("sizes", f"{said['file']} {how}", {key: found.get(key) for key in recorded}, recorded)
        patches = vision_patches(picture, max_num_patches=vision.max_num_patches, patch_size=vision.patch_size)
        keys = {name: f"img{index}.{name}" for name in ("vit_embeddings", "vit_last_hidden", "aligned")}
        if recording.tensors.keys() & set(keys.values()):
            vision_model = bench.model(recording.setting("checkpoint")).vision()
            pixels, grids = patches.pixels[None], [patches.grid]
            features = vision_model.tower(pixels, patches.mask[None], grids)
            yield Value(keys["vit_embeddings"], vision_model.tower.embed(pixels, grids))
            yield Value(keys["vit_last_hidden"], features)
            yield Value(keys["aligned"], vision_model.aligner(features))
        yield Value(f"img{index}.vit_pixel_values", patches.pixels)
        yield Value(f"img{index}.vit_mask", patches.mask)
        yield Value(f"img{index}.vit_spatial_shape", torch.tensor(patches.grid))
        if recorded := said.get("vit"):
            found = {
                "image_width": patches.grid.width * vision.patch_size,
                "image_height": patches.grid.height * vision.patch_size,
                "token_width": patches.grid.width,
                "token_height": patches.grid.height,
                "image_token_length": vision.max_num_patches,
            }
            yield Fact("sizes", f"{said['file']} vit", {key: found.get(key) for key in recorded}, recorded)
    if absent:
        yield Note(f"{absent} pictures left out: not in the folder")


COMPONENTS: dict[str, Component] = {
    "attention": attention,
    "chat_templates": chat_templates,
    "cond_images": cond_images,
    "cond_images_extra": cond_images,
    "embedders": embedders,
    "moe": moe,
    "moe_bf16": moe_bf16,
    "ratio_logits": ratio_logits,
    "resolutions": resolutions,
    "rope": rope,
    "scheduler": scheduler,
    "system_prompts": system_prompts,
    "taylor": taylor,
    "taylor_orders": taylor_orders,
    "tokenizer": tokenizer,
    "vae": vae,
    "vae_wide": vae,
}
