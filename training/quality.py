"""What formats, precisions, step caches and fewer steps cost, on pictures that mean something: docs/quality.md.

    python -m training.quality checkpoints/hunyuan3-tiny-instruct --distil checkpoints/hunyuan3-tiny-distil \\
        --out docs/quality.md

Each setting draws the same held-out prompts from the same seeds as the reference (the weights as published, float32
arithmetic, the checkpoint's own steps). A setting can cost likeness (the picture is another one) without costing score
(it is as right).
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from hunyuan3.errors import Hunyuan3Error
from hunyuan3.generate.taylor import TaylorOptions
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.quant.policy import FORMATS

from .candidate import Candidate
from .exam import QuestionTask, Task, exam
from .likeness import psnr, ssim
from .markdown import row_of
from .marks import answer_right, mean
from .results import Result
from .score import judge

_KINDS = ("one", "two", "edit", "ask")  # what the exam's kinds begin with
_HEADS = (
    "setting",
    "one object",
    "two objects",
    "edits",
    "answers",
    "background",
    "PSNR, median",
    "SSIM, median",
    "equal",
)


@dataclass(frozen=True)
class Setting:
    """A way to draw. load: arguments of `Hunyuan3.open`. sampling: of a run. folder: another checkpoint's."""

    name: str
    load: dict[str, str] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Drawn:
    """Pictures uint8 [H, W, 3] by task, and what was right: of each of `_KINDS`, and of the backgrounds."""

    pictures: tuple[np.ndarray, ...]
    right: dict[str, float | None]
    background: float | None


def settings(steps: int, distil: Path | None = None) -> list[Setting]:
    """All of them, the reference first. steps: the checkpoint's own. distil: the distilled checkpoint's folder."""
    found = [
        Setting(f"bf16 weights, float32 arithmetic, {steps} steps (reference)"),
        Setting("bfloat16 arithmetic", {"dtype": "bfloat16"}),
    ]
    found += [Setting(name, {"format": name}) for name in FORMATS if name != "bf16"]
    for interval, ordinal in ((2, "2nd"), (3, "3rd"), (4, "4th")):
        taylor = TaylorOptions(interval=interval)
        found.append(Setting(f"step cache: every {ordinal} step computed", sampling={"taylor": taylor}))
    found += [Setting(f"{count} steps", sampling={"steps": count}) for count in (50, 20, 8) if count != steps]
    if distil is not None:
        found.append(Setting("distilled", folder=distil))
    return found


def quality(
    folder: Path, tasks: Sequence[Task], wanted: Sequence[Setting], seed: int = 0
) -> Iterator[tuple[Setting, Drawn]]:
    """Does the tasks in every setting, pictures drawn at once.

    Each setting is opened once before the first drawing, so that none fails late.
    """

    def opened(setting: Setting) -> Hunyuan3:
        return Hunyuan3.open(setting.folder or folder, **({"dtype": "float32"} | setting.load))

    for setting in wanted:
        opened(setting)  # reads no weights, and nothing is kept
    for setting in tqdm(wanted, desc="quality", unit="setting"):
        candidate = Candidate(opened(setting), setting.sampling, seed)
        pictures, rows = [], []
        for task in tasks:
            if isinstance(task, QuestionTask):
                rows.append(Result(task.kind, "answer", text=answer_right(candidate.answer(task), task.answer)))
            else:
                drawing = candidate.draw(task, "direct")
                pictures.append(np.asarray(drawing.picture))
                rows.append(judge(task, "direct", drawing, candidate.rows))
        right = {kind: mean(row.success for row in rows if row.kind.startswith(kind)) for kind in _KINDS}
        said = [row for row in rows if row.marks and (row.preserved is None or row.kind == "edit background")]
        background = mean(row.marks.background for row in said)  # None where the prompt does not name it
        yield setting, Drawn(tuple(pictures), right, background)


def some_of_each(count: int, number: int) -> list[Task]:
    """`count` tasks of each of `_KINDS` from an exam, of an edit's and a question's kinds in turn."""
    tasks = exam(10 * count, number)  # so many that it has `count` of each
    found: list[Task] = []
    for beginning in _KINDS:
        groups: dict[str, list[Task]] = defaultdict(list)
        for task in tasks:
            if task.kind.startswith(beginning):
                groups[task.kind].append(task)
        in_turn = [task for some in zip_longest(*groups.values()) for task in some if task is not None]
        found += in_turn[:count]
    return found


def table(done: Sequence[tuple[Setting, Drawn]]) -> str:
    """Markdown, each setting compared with the first one's pictures."""
    reference = done[0][1].pictures
    lines = [row_of(_HEADS), row_of(["---"] * len(_HEADS))]
    for index, (setting, drawn) in enumerate(done):
        pairs = list(zip(drawn.pictures, reference, strict=True))
        likeness = ["-", "-", "-"]
        if index:
            decibels = median(psnr(one, other) for one, other in pairs)
            same = sum(np.array_equal(one, other) for one, other in pairs)
            alike = median(ssim(one, other) for one, other in pairs)
            likeness = [f"{decibels:.1f} dB", f"{alike:.3f}", f"{same} of {len(pairs)}"]
        shares = [drawn.right[kind] for kind in _KINDS] + [drawn.background]
        shown = ["-" if share is None else f"{share:.2f}" for share in shares]
        lines.append(row_of([setting.name, *shown, *likeness]))
    return "\n".join(lines)


def page(folder: Path, done: Sequence[tuple[Setting, Drawn]], prompts: int, number: int, command: str) -> str:
    """docs/quality.md. prompts: of each kind. number: of the exam."""
    return f"""# What formats, step caches and fewer steps cost

Measured with the tiny checkpoint [{folder.name}](../{folder.as_posix()}/README.md), which draws a small world:
{prompts} held-out prompts for one object, as many for two, as many edits and as many questions (of exam {number}, see
[training](../training/README.md)), with the same seeds in every setting, judged by a detector that uses no network.
Written by

    {command}

"One object" and "two objects": share of pictures in which every object has the colour, shape and place that was
asked for; "edits": those that show what the edit should leave; "background": of the pictures whose words name one, the
share that has it. PSNR and SSIM compare with the reference's picture of the same seed: a setting can cost likeness
(it is another picture) without costing score (it is as right). Of {prompts} of a kind one counts {1 / prompts:.2f}:
scores that differ by less than about 0.15 do not differ; likeness tells the order. Formats and step caches compute in
float32, so that nothing else differs; what bfloat16 arithmetic costs is its own line. The distilled model is another
one: its likeness says how near it comes to its teacher. And a model of five million numbers is not one of eighty
billion.

{table(done)}
"""


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.quality", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--distil", type=Path, help="the distilled checkpoint's folder")
    parser.add_argument("--prompts", type=int, default=20, help="tasks of each kind (default: 20)")
    parser.add_argument("--exam", type=int, default=1, help="of which exam (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write; default: the table is printed")
    args = parser.parse_args(argv)
    if args.prompts < 1:
        parser.error("--prompts must be at least 1")
    tasks = some_of_each(args.prompts, args.exam)
    try:
        steps = Hunyuan3.open(args.folder).folder.generation.steps
        command = " ".join(["python -m training.quality", *(sys.argv[1:] if argv is None else argv)])
        done: list[tuple[Setting, Drawn]] = []
        partial = None  # until all is done, for those who want to look
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            partial = args.out.with_name(f"{args.out.name}.part")
        for line in quality(args.folder, tasks, settings(steps, args.distil), args.seed):
            done.append(line)
            if partial is not None:
                partial.write_text(page(args.folder, done, args.prompts, args.exam, command), encoding="utf-8")
        if partial is not None:
            partial.replace(args.out)
    except (Hunyuan3Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(table(done) if args.out is None else f"{args.out}: {len(done)} settings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
