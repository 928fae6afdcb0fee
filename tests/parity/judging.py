"""Compares everything that a scenario recorded with everything that was computed, a line per kind of value."""

import re
from typing import Any

from .recording import Recording
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
    (r"stage\d+\.(mode|bot_task|image_size|stops|finish|eos_token_id)", "stages", IDENTICAL),
    (r"stage\d+\.(tokens|real_pos|decoded|cond_rows)", "token ids", IDENTICAL),
    (r"stage\d+\.(\w+_image_mask|\w+_scatter_index)", "places of tokens", IDENTICAL),
    (
        r"stage\d+\.(\w+_slices|rope_image_info|gen_image_info)|output_size_wh|cond_image_vae_sizes_hw",
        "sections and sizes",
        IDENTICAL,
    ),
    (
        r"stage\d+\.(rope_pos_yx|cos_sin_rows_equal|decode_position_ids)|later_step_position_ids",
        "positions",
        IDENTICAL,
    ),
    (r"stage\d+\.(cos|sin)", "rotary tables", COMPONENT),
    (r"stage\d+\.cond_timesteps", "times of input pictures", IDENTICAL),
    (r"stage\d+\.cond_vae_(mean|logvar)_\d+", "encoded input pictures", COMPONENT),
    (r"stage\d+\.cond_latent_\d+", "latents of input pictures", LATENTS),
    (r"stage\d+\.logits", "logits", LATENTS),
    (r"stage\d+\.(free_margin_min|last_step_ratio_margin)", "margins of logits", Rule(2 * LATENTS.absolute)),
    (
        r"stage\d+\.(generated_\w+|raw_argmax|free_steps|forced_steps|n_forward)|cot_text",
        "written text",
        IDENTICAL,
    ),
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

# Parts of the json that are the request, or about the recording itself. Those that were computed are compared.
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
    "eos_token_id",  # as prepared; what ends a stage is compared as "stops"
    "max_new_tokens",
}

# With a router gap below the first, a tie may go the other way; our own gap must then be below the second.
RECORDED_TIE = 3e-6
OWN_TIE = 1e-5

# What a flipped tie changes: by kind of the denoise steps, by key of a text stage (its tokens must stay the same).
_AFTER_STEP = ("hidden states", "predictions", "latents", "decoded picture", "final picture")
_AFTER_ROW = ("raw_argmax", "free_steps", "forced_steps", "free_margin_min", "last_step_ratio_margin")


def judge(recording: Recording, computed: Computed, report: Report) -> None:
    """Prints a line per kind of value, and one for what is recorded but not computed."""
    ours = {**computed.tensors, **computed.facts}
    recorded: dict[str, Any] = {**recording.tensors, **computed.implied}
    for key, value in recording.meta.items():
        if key not in REQUEST or key in ours:
            recorded[key] = value
    for number, stage in enumerate(recording.meta["stages"]):
        for key, value in stage.items():
            if key not in STAGE_REQUEST or f"stage{number}.{key}" in ours:
                recorded[f"stage{number}.{key}"] = value

    comparable = {key: value for key, value in recorded.items() if key in ours and key not in recording.inputs}
    flips = Flips(comparable, ours, computed.gaps)
    for title, differences in by_kind(comparable, ours, computed.rules, flips).items():
        report.compared(recording.name, title, differences, flips.note(title))
    if unknown := [key for key in recorded if key not in comparable and key not in recording.inputs]:
        report.lacks(recording.name, "recorded, but nothing here computes it", unknown)


def by_kind(
    recorded: dict[str, Any], ours: dict[str, Any], rules: dict[str, Rule], flips: "Flips"
) -> dict[str, list[Difference]]:
    """Differences by kind of comparison; where a router tie flips, of what was computed before it."""
    found: dict[str, list[Difference]] = {title: [] for _, title, _ in KINDS}
    for key, theirs in recorded.items():
        title, rule = kind_of(key)
        kept = flips.before(key, title, ours[key], theirs, rule)
        if kept is not None:
            found[title].append(compare(key, *kept, rules.get(key, rule)))
    return {title: differences for title, differences in found.items() if differences}


def kind_of(key: str) -> tuple[str, Rule]:
    """The kind of comparison and the rule of a recorded key."""
    for pattern, title, rule in KINDS:
        if re.fullmatch(pattern, key):
            return title, rule
    raise AssertionError(f"{key} is computed, but KINDS has no rule for it")


class Flips:
    """Where our own run chose another expert than the reference because two were tied.

    step: the denoise step, None without one. rows: text stage ("stageK") -> row of logits.
    """

    def __init__(self, recorded: dict[str, Any], ours: dict[str, Any], gaps: dict[str, dict[int, float]]) -> None:
        self.gaps = gaps
        steps = ("step_raw_prediction", "step_prediction", "step_latents")
        self.step = _first_off(recorded, ours, gaps.get("steps", {}), steps)
        found = {
            stage: _first_off(recorded, ours, of_rows, (f"{stage}.logits",))
            for stage, of_rows in gaps.items()
            if stage != "steps"
        }
        self.rows = {stage: row for stage, row in found.items() if row is not None}

    def before(self, key: str, title: str, mine: Any, theirs: Any, rule: Rule) -> tuple[Any, Any] | None:
        """What of a value can still be compared: (ours, recorded), or None for nothing."""
        stage, _, name = key.partition(".")
        if stage in self.rows and name in _AFTER_ROW:
            return None
        if stage in self.rows and name == "logits":
            kept = self.rows[stage]
        elif self.step is None or title not in _AFTER_STEP:
            return mine, theirs
        elif title == "hidden states":
            return _before_flip_in_stack(mine, theirs, rule, self.step)
        elif key.startswith(("step_", "latents_std")):
            kept = self.step
        else:
            return None
        return (mine[:kept], theirs[:kept]) if kept else None

    def note(self, title: str) -> str:
        """A word on a line that was cut short."""
        if self.step is not None and title in _AFTER_STEP:
            return f"only before step {self.step}, where a router tie flips ({self._gap('steps', self.step)})"
        if self.rows and title in ("logits", "margins of logits", "written text"):
            said = [f"row {row} of {stage} ({self._gap(stage, row)})" for stage, row in self.rows.items()]
            return f"only before {', '.join(said)}, where a router tie flips"
        return ""

    def _gap(self, where: str, index: int) -> str:
        return f"gap {_tie(self.gaps[where], index):.1e}"


def _first_off(
    recorded: dict[str, Any], ours: dict[str, Any], gaps: dict[int, float], keys: tuple[str, ...]
) -> int | None:
    """The first step (or row) that is off, if a flipped tie explains it; else None.

    `gaps` is filled only where the recording names a tie; our own run must hold one there as well.
    """
    compared = [key for key in keys if key in recorded and len(recorded[key]) == len(ours[key])]
    for index in sorted(gaps):
        for key in compared:
            if not compare(key, ours[key][index], recorded[key][index], kind_of(key)[1]).passed:
                return index if _tie(gaps, index) < OWN_TIE else None
    return None


def _tie(gaps: dict[int, float], index: int) -> float:
    """The nearest tie of a step (or row), or of the first one, whose prompt all others look back at."""
    return min(gaps[index], gaps[min(gaps)])


def _before_flip_in_stack(mine: Any, theirs: Any, rule: Rule, flip: int) -> tuple[Any, Any]:
    """Hidden states are those of step 0: all of them, or those before the layer in which that step's tie flips."""
    if flip > 0 or mine.shape != theirs.shape:
        return mine, theirs
    depth = next((i for i in range(len(theirs)) if not compare("", mine[i], theirs[i], rule).passed), len(theirs))
    return mine[: max(depth, 1)], theirs[: max(depth, 1)]  # no router comes before the first
