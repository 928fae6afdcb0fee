"""`python -m tests.parity FOLDER [--allow-missing] [--dump OUT] [--only GLOB]`, and in which way the model is held:
`[--format F] [--packed] [--streaming SLOTS [--disk]] [--split]`.
"""

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import components, scenarios
from .bench import Bench
from .formats import LIMITS, judge_medians
from .recording import MissingFeatureError
from .report import Report
from .way import Way

PASSED, FAILED, NOTHING_COMPARED, MISSING = 0, 1, 2, 3
_PLAIN = Way()
CHECKS = {"components": components.check, "scenarios": scenarios.check}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares a folder, prints a line per comparison and the totals; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("folder", type=Path, help="recordings: ckpt/, components/, scenarios/, images/")
    parser.add_argument("--allow-missing", action="store_true", help="exit 0 although features are missing")
    parser.add_argument("--dump", type=Path, metavar="OUT", help="write what was computed to OUT/NAME.safetensors")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only recordings of such names")
    parser.add_argument(
        "--format",
        choices=["bf16", *LIMITS],
        default="bf16",
        help="scenarios in a weight format, within its stated error",
    )
    parser.add_argument(
        "--streaming",
        type=int,
        default=0,
        metavar="SLOTS",
        help="two thirds of the experts by such a ring",
    )
    parser.add_argument("--disk", action="store_true", help="with --streaming: these experts from their files")
    parser.add_argument("--split", action="store_true", help="the layers on two devices (stand-ins on the CPU)")
    parser.add_argument("--packed", action="store_true", help="from packs of the checkpoints, made for it")
    asked = parser.parse_args(arguments)
    if asked.disk and not asked.streaming:
        parser.error("--disk is about experts that are streamed: add --streaming 3")
    if asked.dump:
        asked.dump.mkdir(parents=True, exist_ok=True)
    way = Way(asked.format, asked.streaming, asked.disk, asked.split, asked.packed)
    report = run(asked.folder, only=asked.only, dump=asked.dump, way=way)
    if not report.passed and not report.failed:
        print(f"Nothing was compared: is {asked.folder} a folder of recordings?", file=sys.stderr)
    print(report.summary)
    return exit_code(report, asked.allow_missing)


@torch.no_grad()
def run(folder: Path, *, only: str = "*", dump: Path | None = None, way: Way = _PLAIN) -> Report:
    """Checks every recording in the folder; in another weight format the scenarios alone."""
    bench, weight_format = Bench(folder, dumping=dump is not None, way=way), way.weight_format
    report = Report(dump)
    for kind, check in CHECKS.items():
        if weight_format != "bf16" and kind == "components":
            continue
        for name in bench.names(kind):
            if not fnmatch.fnmatchcase(name, only):
                continue
            try:
                check(bench, bench.read(kind, name), report)
            except MissingFeatureError as missing:
                report.lacks(name, str(missing))
            except Exception as error:  # one broken recording must not hide the others
                report.broke(name, error)
    if weight_format != "bf16":
        judge_medians(weight_format, report)
    return report


def exit_code(report: Report, allow_missing: bool) -> int:
    """0 if all is well; a FAIL weighs more than nothing compared, and that more than a missing feature."""
    if report.failed:
        return FAILED
    if not report.passed:
        return NOTHING_COMPARED
    return PASSED if allow_missing or not report.missing else MISSING


if __name__ == "__main__":
    sys.exit(main())
