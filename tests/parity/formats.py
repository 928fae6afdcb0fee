"""How far a weight format takes a scenario from its recording: relative errors, against limits stated here.

The recordings are of the published weights, so nothing can be identical. Compared is what a format may change a little:
the first logits of a text, the first prediction of a drawing, its last latents, the picture. A text that goes another
way than the recorded one has its own continuation, which is then not compared.
"""

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from .recording import Recording
from .report import Computed, Difference, Report


@dataclass(frozen=True)
class Limits:
    """Most that |ours - recorded| / |recorded| may be: about one and a half times the worst of all recordings.

    logits: of the first token that is written. prediction: of the first step, one pass over all that is read. end: of
    the last latents and the picture, what many steps with guidance make of it, experts that were chosen otherwise
    included (tiny models of random weights have many near-ties). typical_prediction, typical_end: of the median over
    all recordings, which a tie in one of them does not move.
    """

    logits: float
    prediction: float
    end: float
    typical_prediction: float
    typical_end: float


LIMITS = {
    "fp8": Limits(0.26, 0.21, 0.62, 0.18, 0.18),
    "fp8_dynamic": Limits(0.33, 0.26, 0.73, 0.21, 0.21),
    "int8": Limits(0.26, 0.10, 0.54, 0.072, 0.116),
    "int8_dynamic": Limits(0.26, 0.13, 0.56, 0.086, 0.133),
    "int4": Limits(0.20, 0.20, 0.62, 0.165, 0.165),
}
_PICTURE = "image_float"
_ENOUGH = 4  # recordings whose median says something


def judge_format(weight_format: str, recording: Recording, computed: Computed, report: Report) -> None:
    """A line per compared value; a recording that has none of them is named as such."""
    limits = LIMITS[weight_format]
    recorded, ours = recording.tensors, computed.tensors
    compared = 0
    first = next((key for key in sorted(recorded) if key.endswith(".logits") and key in ours), None)
    if first is not None:
        _compare(recording.name, first, ours[first][0], recorded[first][0], limits.logits, report)
        compared += 1
    same_text = all(_same(key, recorded, ours) for key in recorded if key.endswith(".tokens"))
    if first is not None and not same_text:
        print(f"{recording.name:<44} the text went another way: its picture is not compared")
    for key, index, limit in (("step_raw_prediction", 0, limits.prediction), ("step_latents", -1, limits.end)):
        if same_text and key in recorded and key in ours:
            what = f"{key} of the {'first' if index == 0 else 'last'} step"
            error = _compare(recording.name, what, ours[key][index], recorded[key][index], limit, report)
            report.errors.setdefault(key, []).append(error)
            compared += 1
    if same_text and _PICTURE in recorded and _PICTURE in ours:
        _compare(recording.name, _PICTURE, ours[_PICTURE], recorded[_PICTURE], limits.end, report)
    if not compared:
        report.lacks(recording.name, "a value that a format may change")


def judge_medians(weight_format: str, report: Report) -> None:
    """A line per quantity: the median over all recordings that were compared, if these are enough."""
    limits = LIMITS[weight_format]
    for key, limit in (("step_raw_prediction", limits.typical_prediction), ("step_latents", limits.typical_end)):
        errors = report.errors.get(key, [])
        if len(errors) >= _ENOUGH:
            middle = median(errors)
            report.compared("all", f"median of {len(errors)}", [Difference(key, middle, middle, limit)])


def _same(key: str, recorded: dict[str, Any], ours: dict[str, Any]) -> bool:
    return key in ours and recorded[key].shape == ours[key].shape and bool((recorded[key] == ours[key]).all())


def _compare(name: str, key: str, mine: torch.Tensor, theirs: torch.Tensor, limit: float, report: Report) -> float:
    if mine.shape != theirs.shape:
        why = f"shape {list(mine.shape)} instead of {list(theirs.shape)}"
        report.compared(name, "relative error", [Difference(key, float("inf"), float("inf"), limit, why)])
        return float("inf")
    error = ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item()
    report.compared(name, "relative error", [Difference(key, error, error, limit)])
    return error
