"""Scores a checkpoint of the small world: pictures by colours and masks, answers by their words.

    python -m training.score FOLDER --dump DIR

Prints the table of its model card and ends with one line: `score: one-object 0.NN two-object 0.NN edit 0.NN ask 0.NN`.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hunyuan3.errors import Hunyuan3Error
from hunyuan3.generate.taylor import TaylorOptions
from hunyuan3.image.resolution import ResolutionTable
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.quant.policy import FORMATS
from hunyuan3.text.trace import recaption_body

from .candidate import MODES, Candidate, Drawing, Mode
from .ceiling import Gate, flat_round_trip, gate
from .detect import detect
from .draw import draw, draw_array
from .exam import DrawingTask, QuestionTask, Task, exam
from .finished import vae_of
from .marks import answer_right, preservation, rewrite_right, score_scene
from .results import Result, Results

_GREY = (128, 128, 128)


def score(candidate: Candidate, tasks: Sequence[Task], modes: Sequence[Mode], dump: Path | None = None) -> Results:
    """Has every task done, drawings once per mode.

    `dump`: a folder for what was drawn and written, made if missing: prompts.jsonl (with what was found in pictures),
    the pictures, and a sheet for each kind and mode, where the input pictures stand before what was made of them.
    What an earlier dump left there is replaced.
    """
    work = [(task, mode) for task in tasks for mode in (modes if isinstance(task, DrawingTask) else modes[:1])]
    record = None if dump is None else _Dump(dump)
    rows = []
    for task, mode in tqdm(work, desc="score", unit="task"):
        if isinstance(task, QuestionTask):
            answer = candidate.answer(task)
            rows.append(Result(task.kind, "answer", text=answer_right(answer, task.answer)))
            pictures: list[Image.Image] = [draw(task.scene)]
            written: dict[str, Any] = {"answer": answer, "expected": task.answer}
        else:
            drawing = candidate.draw(task, mode)
            rows.append(judge(task, mode, drawing, candidate.rows))
            pictures, written = [*map(draw, task.inputs), drawing.picture], {"trace": drawing.trace}
            if record is not None:
                written["found"] = asdict(detect(drawing.picture))
        if record is not None:
            record.add(task, rows[-1], pictures, **written)
    results = Results(tuple(rows))
    if record is not None:
        record.finish()
    return results


def judge(task: DrawingTask, mode: Mode, drawing: Drawing, rows: ResolutionTable) -> Result:
    """The result of a drawing. The ratio is asked for where neither input pictures nor a choice of places give it."""
    preserved = ratio = text = None
    if task.is_edit:
        preserved = preservation(draw_array(task.inputs[0]), draw_array(task.scene), np.asarray(drawing.picture))
    if not task.inputs and task.is_decided:
        ratio = drawing.ratio == rows.nearest(task.scene.height, task.scene.width)
    if mode != "direct" and task.is_decided:
        text = rewrite_right(recaption_body(drawing.trace), task.scene, task.language, task.wanted.background)
    return Result(task.kind, mode, score_scene(detect(drawing.picture), task.wanted), preserved, text, ratio)


class _Dump:
    """What was asked, written and drawn, in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.prompts = folder / "prompts.jsonl"
        if self.prompts.exists():  # a dump of before
            names = re.findall(r'^\{"file": "([\w-]+\.png)"', self.prompts.read_text(encoding="utf-8"), re.MULTILINE)
            for old in (*(folder / name for name in names), *folder.glob("sheet-*.png"), folder / "table.md"):
                old.unlink(missing_ok=True)
        self.prompts.write_text("", encoding="utf-8")
        self.strips: dict[str, list[Image.Image]] = {}

    def add(self, task: Task, result: Result, pictures: Sequence[Image.Image], **written: Any) -> None:
        """`pictures`: those of the input, then the one drawn."""
        name = f"{task.kind}-{result.mode}".replace(" ", "-")
        strips = self.strips.setdefault(name, [])
        file = f"{name}-{len(strips):03}.png"
        pictures[-1].save(self.folder / file)
        strips.append(_side_by_side(pictures))
        before = {"first": task.first} if isinstance(task, DrawingTask) and task.first else {}
        line = {"file": file, **before, "prompt": task.text, **written, **asdict(result)}
        with self.prompts.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        for name, strips in self.strips.items():
            _sheet(strips).save(self.folder / f"sheet-{name}.png")


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    strip = Image.new("RGB", (sum(p.width + 4 for p in pictures), max(p.height for p in pictures)), _GREY)
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + 4
    return strip


def _sheet(strips: Sequence[Image.Image]) -> Image.Image:
    width, height = max(strip.width for strip in strips) + 8, max(strip.height for strip in strips) + 8
    columns = max(1, min(len(strips), 1600 // width))
    sheet = Image.new("RGB", (columns * width, -(-len(strips) // columns) * height), _GREY)
    for index, strip in enumerate(strips):
        sheet.paste(strip, (index % columns * width, index // columns * height))
    return sheet


def _say(ceilings: Gate) -> int:
    """Prints the ceilings; returns the exit code, 1 where they miss the gate."""
    print(ceilings.line)
    return 0 if ceilings.reached else 1


def main(argv: list[str] | None = None) -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.score", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model", type=Path, metavar="FOLDER", help="checkpoint folder; with --vae also the state of the VAE's stage")
    add("--dump", type=Path, help="folder for the pictures and prompts")
    add(
        "--prompts",
        type=int,
        default=200,
        help="prompts, the other tasks come on top; with --vae scenes of each kind (default: 200)",
    )
    add("--exam", type=int, default=1, help="which tasks: each number has others of its own (default: 1, the cards')")
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help="ways to draw (default: all)")
    add("--kinds", nargs="+", help="tasks to do, by the beginnings of their kinds: one, edit, ask ... (default: all)")
    add("--vae", action="store_true", help="score only the VAE: true scenes, encoded and decoded")
    add("--seed", type=int, default=0, help="of noise and sampled words; the tasks stay the same")
    add("--steps", type=int, default=0, help="0: the checkpoint's own default")
    add("--guidance", type=float, default=0.0, help="0: the checkpoint's own default")
    add("--shift", type=float, default=0.0, help="of the noise levels; 0: the checkpoint's own default")
    add("--taylor", type=int, default=0, help="compute every so many steps, extrapolate between (default: all)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--format", choices=("auto", *FORMATS), default="auto", help="how the large matrices are stored")
    args = parser.parse_args(argv)
    if args.prompts < 1:
        parser.error("--prompts must be at least 1")
    try:
        if args.vae and args.model.is_file():
            return _say(gate(flat_round_trip(vae_of(args.model)), args.prompts))
        model = Hunyuan3.open(args.model, device=args.device, format=args.format)
        taylor = TaylorOptions(interval=args.taylor) if args.taylor else None
        sampling = {"steps": args.steps, "guidance": args.guidance, "shift": args.shift, "taylor": taylor}
        candidate = Candidate(model, sampling, args.seed)
        if args.vae:
            return _say(gate(candidate.round_trip, args.prompts))
        every = exam(args.prompts, args.exam)
        for kind in args.kinds or ():
            if not any(task.kind.startswith(kind) for task in every):
                kinds = ", ".join(dict.fromkeys(task.kind for task in every))
                parser.error(f"--kinds {kind} begins none of {kinds}")
        tasks = [task for task in every if not args.kinds or task.kind.startswith(tuple(args.kinds))]
        results = score(candidate, tasks, args.modes, args.dump)
        command = " ".join(["python -m training.score", *(sys.argv[1:] if argv is None else argv)])
        report = f"`{command}`\n\n{results.table}\n\n{results.last_line}"
        if args.dump is not None:
            (args.dump / "table.md").write_text(f"{report}\n", encoding="utf-8")
    except (Hunyuan3Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
