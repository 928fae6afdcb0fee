"""A recorded call of the reference, answered again by this package's pipeline from the call and the checkpoint alone.

`stages.py` runs it, `judging.py` compares.
"""

from dataclasses import replace
from typing import Any

from hunyuan3.config import GenerationConfig, read_json
from hunyuan3.folder import ModelFolder
from hunyuan3.image.preprocess import load_picture
from hunyuan3.pictures import EncodedPicture
from hunyuan3.pipeline import Hunyuan3

from .bench import Bench
from .formats import judge_format
from .judging import RECORDED_TIE, judge
from .recording import MissingFeatureError, Recording
from .report import Computed, Report
from .stages import Asked, Stage, Written, draw, encoded_sizes, write


def check(bench: Bench, recording: Recording, report: Report) -> None:
    """Answers one scenario and reports it: a line per kind of value."""
    computed = Computed()
    try:
        compute(bench, recording, computed)
    finally:
        report.dump(recording.name, computed.tensors, recording.tensors)
    if bench.way.weight_format != "bf16":
        judge_format(bench.way.weight_format, recording, computed, report)
    else:
        judge(recording, computed, report)


def compute(bench: Bench, recording: Recording, out: Computed) -> None:
    """Answers the scenario into `out`, as far as it gets; router gaps too, where the recording names a tie.

    1. read the request, encode its pictures
    2. write
    3. draw
    """
    if not recording.meta:
        raise MissingFeatureError("the recording has no json, so its call is unknown")
    meta, call = recording.meta, recording.meta["call"]
    folder = bench.folder(meta["checkpoint"])
    folder = overridden(folder, meta.get("generation_config_overrides") or {})
    if features := missing_features(call):
        raise MissingFeatureError(", ".join(features))
    asked = Asked.of(call, folder)
    if len(meta["stages"]) != asked.stages:
        raise MissingFeatureError(f"{len(meta['stages'])} stages, where this package makes {asked.stages}")

    model: Hunyuan3 = bench.model(meta["checkpoint"])
    dropping = meta.get("moe_drop_tokens")
    for layer in model.transformer().layers:
        layer.mlp.drop_tokens = folder.config.moe.drop_tokens if dropping is None else dropping
    pictures = input_pictures(bench, model, meta.get("images") or [], align=asked.align)
    if pictures:
        out.facts["cond_image_vae_sizes_hw"] = encoded_sizes(folder, pictures)

    gaps = bench.router_gaps.get(recording.name, 1.0) < RECORDED_TIE
    stage = Stage(0, recording, folder, model, asked, pictures, out, gaps)
    if asked.stages == 2:
        written = write(stage)
        stage = replace(stage, number=1)
    else:
        written = Written(folder.resolutions.parse(asked.size), asked.trace)
    draw(stage, written, pictured=bench.dumping or any(key.startswith("image_") for key in (*recording.tensors, *meta)))


def missing_features(call: dict[str, Any]) -> list[str]:
    """What a recorded call needs that this comparison does not do, in words."""
    prompts = call.get("prompt")
    needed = {
        "message lists": bool(call.get("message_list")),
        "several requests at once": isinstance(prompts, list) and len(prompts) > 1,
    }
    return [feature for feature, is_needed in needed.items() if is_needed]


def overridden(folder: ModelFolder, overrides: dict[str, Any]) -> ModelFolder:
    """The folder with fields of its generation config replaced."""
    settings = read_json(folder.path / "generation_config.json") | overrides
    return replace(folder, generation=GenerationConfig.from_json(settings))


def input_pictures(bench: Bench, model: Hunyuan3, names: list[str], *, align: bool) -> tuple[EncodedPicture, ...]:
    """The scenario's input pictures, encoded."""
    paths = {name: bench.image(name) for name in names}
    if absent := [name for name, path in paths.items() if path is None]:
        raise MissingFeatureError(f"the folder has no picture {', '.join(absent)}")
    return model.encode_pictures([load_picture(paths[name], reference=True) for name in names], align=align)
