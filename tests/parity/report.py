"""Tolerances, the lines that are printed, the totals, and the dump of what was computed."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Rule:
    """How far off a value may be: `absolute`, or `relative` times the recording's largest, whichever is more."""

    absolute: float = 0.0
    relative: float = 0.0

    def limit(self, largest: float) -> float:
        return max(self.absolute, self.relative * largest)


IDENTICAL = Rule()
COMPONENT = Rule(absolute=2e-5, relative=1e-5)
ROUNDING = Rule(relative=1e-6)
PREDICTIONS = Rule(absolute=3e-4)
LATENTS = Rule(absolute=1e-4)
PICTURE = Rule(absolute=1 / 255)
GREY_LEVEL = Rule(absolute=1)
BFLOAT16 = Rule(relative=2e-2)


@dataclass(frozen=True)
class Difference:
    """One compared value. `absolute` is infinite where the two cannot be subtracted; `why` says why."""

    key: str
    absolute: float
    relative: float
    limit: float
    why: str = ""

    @property
    def passed(self) -> bool:
        return self.absolute <= self.limit  # not the other way round: NaN must fail

    @property
    def severity(self) -> float:
        if not self.passed:
            return float("inf")
        return self.absolute / self.limit if self.limit else 0.0


def compare(key: str, computed: Any, recorded: Any, rule: Rule) -> Difference:
    """Compares tensors, or values of a json (numbers and lists of them by the rule, everything else by equality)."""
    if not isinstance(recorded, torch.Tensor):
        computed, recorded = plain(computed), plain(recorded)
        if computed == recorded:
            return Difference(key, 0.0, 0.0, rule.limit(0.0))
        if rule == IDENTICAL or computed is None or recorded is None:
            return Difference(key, float("inf"), float("inf"), 0.0, "differs")
        computed, recorded = (torch.tensor(value, dtype=torch.float64) for value in (computed, recorded))
    if computed.shape != recorded.shape:
        why = f"shape {list(computed.shape)} instead of {list(recorded.shape)}"
        return Difference(key, float("inf"), float("inf"), 0.0, why)
    if not recorded.numel():
        return Difference(key, 0.0, 0.0, rule.limit(0.0))
    ours, theirs = computed.double(), recorded.double()
    absolute = torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max().item()
    largest = theirs.abs().max().item()
    return Difference(key, absolute, absolute / largest if largest else absolute, rule.limit(largest))


def plain(value: Any) -> Any:
    """A value as it reads when it comes back from a json file (tuples as lists)."""
    return json.loads(json.dumps(value))


@dataclass
class Computed:
    """What this package computed for one recording: `tensors` under the recording's keys, `facts` of its json.

    rules: exceptions from the rule that a key otherwise has. notes: shown with the lines. implied: what a recording
    says without holding it. gaps: "steps" or "stageK" -> step or row of logits -> our own router's smallest gap there.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    implied: dict[str, Any] = field(default_factory=dict)
    gaps: dict[str, dict[int, float]] = field(default_factory=dict)


class Report:
    """Prints a line per comparison as it is made and keeps count."""

    def __init__(self, dump: Path | None = None) -> None:
        self.dump_folder = dump
        self.passed = self.failed = self.missing = 0
        self.errors: dict[str, list[float]] = {}  # relative errors in another weight format, by what was compared

    def compared(self, name: str, what: str, differences: Sequence[Difference], note: str = "") -> None:
        """One line for values of a kind: the worst of them, and the names of those that fail."""
        worst = max(differences, key=lambda difference: difference.severity)
        failing = [d for d in differences if not d.passed]
        self.passed += not failing
        self.failed += bool(failing)
        if failing:
            named = ", ".join(f"{d.key} {d.why}".strip() for d in failing[:4])
            note = "; ".join(filter(None, (f"{len(failing)} off: {named}", note)))
        number = worst.key
        if len(differences) > 1:
            number = f"{len(differences)} values" + (f", worst {worst.key}" if worst.severity else "")
        self._line(
            name,
            f"{what} ({number})",
            f"abs {worst.absolute:7.1e}  rel {worst.relative:7.1e}  tol {worst.limit:7.1e}",
            "FAIL" if failing else "pass",
            note,
        )

    def broke(self, name: str, error: Exception) -> None:
        """A line for a recording that this package could not compute because of an error."""
        self.failed += 1
        self._line(name, "error", "", "FAIL", f"{type(error).__name__}: {error}".splitlines()[0])

    def lacks(self, name: str, feature: str, keys: Iterable[str] = ()) -> None:
        """A line for what cannot be compared, naming the feature that is missing."""
        self.missing += 1
        self._line(name, feature, "", "missing", ", ".join(keys))

    def dump(self, name: str, tensors: Mapping[str, torch.Tensor], recorded: Mapping[str, torch.Tensor]) -> None:
        """Writes what was computed under the recording's keys and in its dtypes, if a dump was asked for."""
        if self.dump_folder is None or not tensors:
            return
        written = {
            key: tensor.detach().cpu().to(recorded[key].dtype if key in recorded else tensor.dtype).contiguous().clone()
            for key, tensor in tensors.items()
        }
        save_file(written, self.dump_folder / f"{name}.safetensors")

    @property
    def summary(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.missing} missing"

    def _line(self, name: str, what: str, numbers: str, verdict: str, note: str) -> None:
        line = f"{name:<44} {what:<64} {numbers:<44} {verdict}"
        print(f"{line}  {note}" if note else line, flush=True)
