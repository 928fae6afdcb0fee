"""Writes the model card of a checkpoint: what it is, its scores, and the logs of its training.

python -m training.card checkpoints/hunyuan3-tiny-instruct --logs vae.csv transformer.csv --scores table.md
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from hunyuan3.errors import Hunyuan3Error, RequestError
from hunyuan3.folder import ModelFolder

from .markdown import row_of
from .scene import BASIC_SHAPES
from .words import COLOUR_WORDS, PLACE_PHRASES, SHAPE_WORDS

_LINES = 16  # of each log
_TEXT = """---
license: apache-2.0
library_name: hunyuan-image-3
pipeline_tag: text-to-image
language: [en, zh]
---

# {name}

A tiny model with the architecture, file layout, tokens and stages of HunyuanImage-3.0, trained from nothing on a small
world drawn by a program: one to three shapes, letters or digits in nine colours on plain and patterned backgrounds,
around 128x128 pixels. It is made to be tried and tested on any machine, and knows nothing but this world. Weights, data
and texts are our own.{how}

    python -m hunyuan3 draw --model {path} --prompt "a red circle in the middle on a white background"

Its words, besides small and big, all letters (but O) and digits, and plain, striped, checked, dotted and gradient
backgrounds; anything else gives a picture that means nothing:

{words}

{parts}

Data, stages, losses and the commands that train it again are described in `training/README.md`.

## Scores

By a detector that uses no network, on held-out arrangements of objects. "all": the count is right, and every object's
colour, shape and place. What the VAE allows (true scenes, encoded and decoded): {ceiling}.

{scores}

## Training

{notes}{logs}
"""

_DISTILLED = """

Distilled: a picture takes 8 single passes, where its teacher, the Instruct model, takes 20 of two branches each."""


def card(folder: Path, logs: Sequence[Path], scores: str = "", ceiling: str = "", notes: str = "") -> str:
    """The card's text. scores, ceiling: what `training.score` printed, without and with `--vae`.

    notes: what is to be said about the run, before its logs.
    """
    return _TEXT.format(
        name=folder.name,
        path=folder.as_posix(),
        how=_DISTILLED if ModelFolder.open(folder).config.cfg_distilled else "",
        words=_words(),
        parts=_parts(folder),
        scores=scores.strip() or "Not scored yet.",
        ceiling=ceiling.strip().removeprefix("ceiling: ") or "not measured yet",
        notes=f"{notes.strip()}\n\n" if notes.strip() else "",
        logs="\n\n".join(_log(log) for log in logs),
    )


def _words() -> str:
    """A list of the words that it knows, English and Chinese."""
    lines = []
    for language, called in (("en", "English"), ("zh", "Chinese")):
        shapes = ", ".join(SHAPE_WORDS[language][name] for name in (*BASIC_SHAPES, "A", "7"))
        colours = ", ".join(COLOUR_WORDS[language].values())
        places = ", ".join(phrases[0] for phrases in PLACE_PHRASES[language].values())
        lines.append(f"* {called}: {shapes}; {colours};\n  {places}")
    return "\n".join(lines)


def _parts(folder: Path) -> str:
    """A sentence with the number of weights of each network."""
    counts = {"transformer": 0, "VAE": 0, "vision tower": 0}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                part = {"vae": "VAE", "vision_model": "vision tower", "vision_aligner": "vision tower"}
                shape = shard.get_slice(name).get_shape()
                size = 1
                for side in shape:
                    size *= side
                counts[part.get(name.split(".")[0], "transformer")] += size
    listed = ", ".join(f"{part} {count / 1e6:.2f} M" for part, count in counts.items())
    return f"Weights: {listed} (of the VAE's kernels only the middle temporal tap is used, the others are zero)."


def _log(path: Path) -> str:
    """A log as a table, thinned out evenly, its last line kept."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *lines = [*csv.reader(file)] or [[]]
    if "seconds" not in header:
        raise RequestError(f"{path} is no log of training.run: its first line names no column 'seconds'.")
    if not lines:
        raise RequestError(f"{path} has no line besides its header.")
    seconds = float(lines[-1][header.index("seconds")])
    every = max(1, -(-len(lines) // _LINES))
    kept = lines[::-1][::every][::-1]
    table = "\n".join(row_of(cells) for cells in (header, ["---"] * len(header), *kept))
    return f"`{path.stem}`: {lines[-1][0]} steps in {seconds / 60:.0f} minutes.\n\n{table}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.card", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder; the card becomes its README.md")
    parser.add_argument("--logs", type=Path, nargs="*", default=[], help="CSV logs of the stages, in order")
    parser.add_argument("--scores", type=Path, help="what training.score printed (its --dump has it as table.md)")
    parser.add_argument("--ceiling", type=Path, help="what training.score --vae printed")
    parser.add_argument("--notes", type=Path, help="what to say about the run, before its logs")
    args = parser.parse_args()
    try:
        texts = [
            "" if file is None else file.read_text(encoding="utf-8") for file in (args.scores, args.ceiling, args.notes)
        ]
        text = card(args.folder, args.logs, *texts)
        (args.folder / "README.md").write_text(text, encoding="utf-8")
    except (Hunyuan3Error, OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
