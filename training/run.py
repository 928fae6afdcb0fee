"""Trains a stage for some minutes, from where its state file left off.

    python -m training.run vae --minutes 60 --state vae.pt
    python -m training.run transformer --minutes 60 --state transformer.pt --from vae.pt
    python -m training.run instruct --minutes 60 --state instruct.pt --from transformer.pt
    python -m training.run polish --minutes 60 --state polish.pt --from instruct.pt
    python -m training.run turns --minutes 60 --state turns.pt --from polish.pt
    python -m training.run edits --minutes 60 --state edits.pt --from turns.pt
    python -m training.run distil --minutes 60 --state distil.pt --from checkpoints/hunyuan3-tiny-instruct
    python -m training.run compact --state instruct.pt --out instruct-compact.pt
    python -m training.run export --state instruct.pt --out checkpoints/hunyuan3-tiny-instruct

    torchrun --standalone --nproc-per-node 2 -m training.run instruct ...    # the transformer's stages on two cores

The run may be killed at any time: it goes on from the last state that was written. A line of averages is added to a
CSV beside the state every half minute.
"""

import argparse
import csv
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from hunyuan3.errors import Hunyuan3Error

from .crew import Crew
from .distil import DistilStage, DistilStageConfig
from .finished import start_of
from .lessons import Curriculum
from .optimiser import OptimiserConfig
from .state import compact, load_state, save_state
from .tokenizer import train_tokenizer
from .transformer import TransformerStage, TransformerStageConfig
from .vae import VAEStage, VAEStageConfig

LOG_SECONDS = 30.0
SAVE_SECONDS = 180.0

_log = logging.getLogger(__name__)


class Stage(Protocol):
    """What a stage is to this loop. `measures`: what its steps may return; `done`: steps so far, of `config.steps`."""

    name: str
    measures: tuple[str, ...]
    config: Any
    done: int

    def step(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


def train(stage: Stage, path: Path, minutes: float, crew: Crew | None = None, name: str = "") -> None:
    """Steps until the stage or the time is over, whichever comes first, and leaves the state in `path`.

    Of a crew only the first process writes, and its clock counts. name: of the stage, which the state keeps.
    """
    crew, name = crew or Crew(), name or stage.name
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = 0.0
    if path.exists():
        saved = saved_as(name, path)
        length = saved.get("steps", 0)
        if saved["stage"]["done"] < length != stage.config.steps:
            raise SystemExit(
                f"{path} is at step {saved['stage']['done']} of {length}; go on with --steps {length} first."
            )
        stage.restore(saved["stage"])
        seconds = saved["seconds"]
        if length and stage.config.steps < stage.done:
            raise SystemExit(f"{path} is at step {stage.done} already, beyond --steps {stage.config.steps}.")
        _log.info("%s: goes on from step %d of %d", name, stage.done, stage.config.steps)
    if crew.rank == 0:
        _keep_lines(path.with_suffix(".csv"), stage.done)

    def saving(time_taken: float) -> dict[str, Any]:
        return {"name": name, "stage": stage.state(), "seconds": time_taken, "steps": stage.config.steps}

    started = last = saved_at = time.monotonic()
    records: list[dict[str, float]] = []
    while stage.done < stage.config.steps and crew.agreed(time.monotonic() - started < 60 * minutes):
        record = stage.step()
        if crew.rank:
            continue
        records.append(record)
        now = time.monotonic()
        if now - last >= LOG_SECONDS:
            _write_line(path.with_suffix(".csv"), stage, seconds + now - started, records)
            records, last = [], now
        if now - saved_at >= SAVE_SECONDS:
            save_state(path, saving(seconds + now - started))
            saved_at = now
    if crew.rank:
        return
    now = time.monotonic()
    if records:
        _write_line(path.with_suffix(".csv"), stage, seconds + now - started, records)
    save_state(path, saving(seconds + now - started))
    over = stage.done >= stage.config.steps
    then = "it is over" if over else "the same command goes on with it"
    _log.info("%s: step %d of %d, %s", path, stage.done, stage.config.steps, then)


def saved_as(name: str, path: Path) -> dict[str, Any]:
    """The state in `path`, which must be that of the stage of this name: another's would be overwritten."""
    saved = load_state(path)
    if saved["name"] != name:
        raise SystemExit(f"{path} is a state of the stage {saved['name']!r}, not of {name!r}; name another --state.")
    return saved


def _keep_lines(path: Path, done: int) -> None:
    """Drops the lines of a log that speak of steps after `done`: a killed run does those again."""
    if not done:
        path.unlink(missing_ok=True)
    if not path.exists():
        return
    header, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([header, *(line for line in lines if int(line.split(",")[0]) <= done)]), encoding="utf-8")


def _write_line(path: Path, stage: Stage, seconds: float, records: list[dict[str, float]]) -> None:
    """Appends the means of some steps to the log, the column names first where the file is new."""
    line: dict[str, float | str] = {"step": stage.done, "seconds": round(seconds)}
    for key in stage.measures:
        values = [record[key] for record in records if key in record]
        line[key] = round(sum(values) / len(values), 5) if values else ""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, line)
        if is_new:
            writer.writeheader()
        writer.writerow(line)
    _log.info("%s", " ".join(f"{key} {value}" for key, value in line.items() if value != ""))


INSTRUCT = TransformerStageConfig(
    curriculum=Curriculum(edits=0.4, fusions=0.06, questions=0.2, complete=0.5, rewritten=0.3, thought=0.25),
    steps=3000,
    decay_share=0.5,
    lessons=49152,
    repeats=4,
    seed=1,
)

POLISH = TransformerStageConfig(
    curriculum=Curriculum(
        edits=0.3, fusions=0.06, questions=0.16, characters=0.3, complete=0.5, rewritten=0.3, thought=0.25
    ),
    optimiser=OptimiserConfig(rate=1e-3, muon_rate=2e-3, ema=0.998),
    steps=2000,
    warmup=50,
    decay_share=0.8,
    lessons=24576,
    repeats=4,
    shift=2.5,
    uniform=0.5,
    seed=5,
)

TURNS = replace(
    POLISH,
    curriculum=replace(POLISH.curriculum, edits=0.234, second_turns=0.22, fusions=0.047, questions=0.125),
    steps=1400,
    lessons=31488,
)


EDITS = replace(
    POLISH,
    curriculum=replace(POLISH.curriculum, edits=0.46, several=0.7, second_turns=0.1, fusions=0.04, questions=0.12),
    steps=2200,
    lessons=40960,
    words=0.3,
)


_INSTRUCTIONS = {"instruct": INSTRUCT, "polish": POLISH, "turns": TURNS, "edits": EDITS}
_STAGES = ("vae", "transformer", *_INSTRUCTIONS, "distil")


def transformer_stage(
    config: TransformerStageConfig, state: Path, vae: Path | None = None, crew: Crew | None = None
) -> TransformerStage:
    """A stage beside the VAE that its state file brings; where there is none, beside that of `vae`.

    vae: the state of the first stage, or a finished folder.
    """
    if state.exists():
        return _stage_of(config, load_state(state)["stage"], crew)
    if vae is None or not vae.exists():
        raise SystemExit("A new transformer needs --from, the state of the VAE's stage or a finished folder.")
    before = start_of(vae)
    scaling = tuple(before["scaling"]) if "scaling" in before else None
    _log.info("learns the vocabulary")
    average = before.get("vae") or before["optimiser"]["average"]
    return TransformerStage(config, train_tokenizer(), average, scaling, crew=crew)


def instruct_stage(
    config: TransformerStageConfig, state: Path, start: Path | None, crew: Crew | None = None
) -> TransformerStage:
    """The third stage or one of its ends; without a state file it starts from the averaged weights of another."""
    if state.exists():
        return transformer_stage(config, state, crew=crew)
    if start is None or not start.exists():
        raise SystemExit("A new stage needs --from, the state or the folder of the one before.")
    before = _undistilled(start)
    stage = _stage_of(config, before, crew)
    stage.start_from(before)
    return stage


DISTIL = DistilStageConfig(curriculum=replace(TURNS.curriculum, several=0.6), lessons=20992, repeats=5, seed=2)


def distil_stage(config: DistilStageConfig, start: Path | None, crew: Crew | None = None) -> DistilStage:
    """The fourth stage, beside its teacher, which no state file holds."""
    if start is None or not start.exists():
        raise SystemExit("The distil stage needs --from, the state or the folder of its teacher, every time.")
    before = _undistilled(start)
    teacher = _stage_of(TransformerStageConfig(), before, crew)
    teacher.start_from(before)
    stage = DistilStage(config, teacher)
    stage.start_from(before)
    return stage


def _undistilled(start: Path) -> Mapping[str, Any]:
    before = start_of(start)
    if "tokenizer" not in before:
        raise SystemExit(f"{start} is a state of the VAE's stage; --from takes one of the stage before, or its folder.")
    if before.get("distilled"):
        raise SystemExit(f"{start} is a distilled model; --from takes the stage before that.")
    return before


def _stage_of(config: TransformerStageConfig, saved: Mapping[str, Any], crew: Crew | None = None) -> TransformerStage:
    tokenizer = Tokenizer.from_str(saved["tokenizer"])
    return TransformerStage(config, tokenizer, saved["vae"], tuple(saved["scaling"]), crew=crew)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.run", description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=(*_STAGES, "compact", "export"))
    parser.add_argument("--minutes", type=float, default=60.0, help="after which to stop and save")
    parser.add_argument("--state", type=Path, help="state file (default: STAGE.pt); its log lies beside it")
    parser.add_argument("--from", dest="start", type=Path, help="state or folder of the stage before, where one begins")
    parser.add_argument("--out", type=Path, help="what to write: a state, or a folder")
    parser.add_argument("--steps", type=int, default=0, help="of the whole stage, for its schedule (0: its config's)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    args = parser.parse_args()
    if args.steps < 0:
        parser.error("--steps must not be negative")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.threads:
        torch.set_num_threads(args.threads)
    state = args.state or Path(f"{args.stage}.pt")
    try:
        _run(args, state)
    except Hunyuan3Error as error:
        raise SystemExit(f"error: {error}") from None


def _run(args: argparse.Namespace, state: Path) -> None:
    """Trains the stage that was named, or rewrites its state."""
    if args.stage in _STAGES and state.exists():
        saved_as(args.stage, state)
    steps = {"steps": args.steps} if args.steps else {}
    match args.stage:
        case "vae" if Crew.joined().size > 1:
            raise SystemExit("The VAE is trained by one process: start it without torchrun.")
        case "vae":
            train(VAEStage(replace(VAEStageConfig(), **steps)), state, args.minutes)
        case "transformer":
            crew = Crew.joined()
            stage = transformer_stage(replace(TransformerStageConfig(), **steps), state, args.start, crew)
            train(stage, state, args.minutes, crew, args.stage)
        case "instruct" | "polish" | "turns" | "edits":
            crew = Crew.joined()
            stage = instruct_stage(replace(_INSTRUCTIONS[args.stage], **steps), state, args.start, crew)
            train(stage, state, args.minutes, crew, args.stage)
        case "distil":
            crew = Crew.joined()
            train(distil_stage(replace(DISTIL, **steps), args.start, crew), state, args.minutes, crew, args.stage)
        case _ if args.state is None or args.out is None:
            raise SystemExit("--state and --out say what to read, and what to write.")
        case _ if not state.exists():
            raise SystemExit(f"{state} does not exist.")
        case "compact":
            saved = load_state(state)
            save_state(args.out, {**saved, "stage": compact(saved["stage"])})
        case "export":
            whole = load_state(state)
            saved = whole["stage"]
            if "tokenizer" not in saved:
                raise SystemExit(f"{state} is a state of the VAE's stage, which is no model yet.")
            stage = _stage_of(TransformerStageConfig(distilled=saved.get("distilled", False)), saved)
            stage.restore(saved, plan=False)
            length = whole.get("steps", stage.done)
            if stage.done < length:
                _log.warning(
                    "%s is at step %d of %d: the folder is that of an unfinished stage.", state, stage.done, length
                )
            _log.info("%s: step %d", stage.export(args.out), stage.done)


if __name__ == "__main__":
    main()
