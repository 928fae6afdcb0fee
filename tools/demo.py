"""Make a picture with this package in a real ComfyUI, on a machine that has only Python 3.10 or newer.

    python3 tools/demo.py [--prompt TEXT] [--seed N] [--random instruct] [--keep-open]

Sets up a ComfyUI beside nothing you have (see testbed.py), starts the server with this package in it, queues
workflows/api/think_and_draw.json through the HTTP API with a tiny checkpoint that was trained on simple shapes (see
checkpoints/), prints how the model rewrote the prompt, and writes the picture to `output/` in the current folder.
With --random the checkpoint is made on the spot with random weights: its pictures are abstract noise, and show that
every part is in place.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import testbed
from tools.comfy_server import MODELS, PACKAGE, ComfyServer, PromptError, ServerError, with_inputs
from tools.testbed import REPO, say

WORKFLOW = REPO / "workflows" / "api" / "think_and_draw.json"
TRAINED = REPO / "checkpoints" / "hunyuan3-tiny-instruct"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    options = _parse(argv)
    testbed.end_cleanly_on_sigterm()
    try:
        _demo(options)
    except (testbed.TestbedError, ServerError, PromptError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    bed = testbed.prepare()
    with tempfile.TemporaryDirectory(prefix="hunyuan3-demo-") as temporary:
        checkpoint = TRAINED
        if options.random:
            say(f"writing a tiny checkpoint ({options.random}, random weights)")
            checkpoint = Path(temporary) / f"tiny-{options.random}"
            testbed.make_tiny_checkpoint(bed.python, checkpoint, options.random)
        name = checkpoint.name
        say(f"starting ComfyUI ({bed.comfyui})")
        with ComfyServer(bed.comfyui, bed.python, checkpoints={name: checkpoint}, port=options.port) as server:
            say(f"ComfyUI answers at {server.url}; queueing {WORKFLOW.relative_to(REPO).as_posix()}")
            path, rewritten = _make_picture(server, name, options)
            print(f"\nThe prompt:  {options.prompt}\nRewritten:   {rewritten}\nThe picture: {path}")
            if options.random:
                print("(babble and noise: the weights are random; they show that the parts work together)")
            print()
            _print_what_next(server, keep_open=options.keep_open)
            if options.keep_open:
                _wait_for_ctrl_c()


def _make_picture(server: ComfyServer, checkpoint: str, options: argparse.Namespace) -> tuple[Path, str]:
    """Queues the shipped workflow and saves its picture in the current folder's output/; (path, rewritten prompt)."""
    workflow = with_inputs(
        json.loads(WORKFLOW.read_text(encoding="utf-8")),
        {
            "Hunyuan3Loader": {"checkpoint": checkpoint},
            "PrimitiveStringMultiline": {"value": options.prompt},
            "Hunyuan3Think": {"task": "recaption", "seed": options.seed, "max_new_tokens": 160},
            "Hunyuan3Sampler": {"seed": options.seed},
        },
    )
    outputs = server.queue(workflow)
    images = [image for node in outputs.values() for image in node.get("images", [])]
    (think,) = (number for number, node in workflow.items() if node["class_type"] == "Hunyuan3Think")
    path = _new_file(Path.cwd() / "output")
    path.write_bytes(server.view(**images[0]))
    return path, re.sub(r"</?recaption>", "", outputs[think]["text"][0]).replace("\n\n", " ")


def _new_file(folder: Path) -> Path:
    """Return the first unused name in `folder`: a picture made before is never overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := folder / f"hunyuan3_demo_{number:03d}.png").exists():
        number += 1
    return path


def _print_what_next(server: ComfyServer, *, keep_open: bool) -> None:
    command = f'python3 "{Path(__file__).resolve()}" --keep-open'
    if keep_open:
        print(f"The page: open {server.url} in a browser; Ctrl-C here stops the server.")
    else:
        print(f"The page: {command}, then open the address it prints in a browser.")
    print(
        f"The workflows are there under Templates > {PACKAGE}. Their prompts are meant for the real weights; ask the\n"
        "tiny ones for circles, squares, triangles, stars, rings, hearts, letters and digits in plain colors (their\n"
        "words: checkpoints/hunyuan3-tiny-instruct/README.md), and in edits name what changes by color and\n"
        "shape: turn the red circle blue.\n\n"
        "The real weights, in your own ComfyUI:\n"
        f"  1. put this package into custom_nodes/{PACKAGE} and run, with the Python that runs your ComfyUI,\n"
        f"     python -m pip install -r custom_nodes/{PACKAGE}/requirements.txt\n"
        f"  2. put the official checkpoint folder, as it was published, at models/{MODELS}/<folder>\n"
        "  3. restart ComfyUI and choose <folder> in the loader node"
    )


def _wait_for_ctrl_c() -> None:
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        print()
        say("stopping the server")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a red circle", help="what the picture shows")
    parser.add_argument("--seed", type=int, default=3, help="of the text and of the picture")
    parser.add_argument("--random", choices=("instruct", "distil"), help="random weights (see hunyuan3/tiny.py)")
    parser.add_argument("--keep-open", action="store_true", help="leave the server running until Ctrl-C")
    parser.add_argument("--port", type=int, default=0, help="the server's port (default: a free one)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
