"""The README's pictures of ComfyUI's page: shipped workflows after a run, to docs/images/.

    python3 tools/screenshots.py [--only NAME ...] [--front-end-root FOLDER]

Tiny checkpoints of random weights stand in for the published ones, so what is drawn is coloured noise, in few steps.
--front-end-root is passed to ComfyUI: another page than the test bed's, such as the newest one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import browser_setup, testbed
from tools.comfy_server import ComfyServer
from tools.testbed import REPO, say
from tools.workflows import EXAMPLE, FOLDER, VARIANTS

if TYPE_CHECKING:
    from tools.comfy_page import ComfyPage

TARGET = REPO / "docs" / "images"
CANVAS, NODES2 = "canvas", "nodes2"
SHOTS = {
    "text_to_image": (CANVAS, NODES2),
    "think_and_draw": (CANVAS,),
    "edit_picture_distil": (CANVAS,),
    "fuse_three_distil": (CANVAS,),
    "ask_picture": (CANVAS,),
    "multi_turn_edit": (CANVAS,),
}
WIDTH = 2000  # pixels, at most
STEPS = 8  # drawn at most
TOKENS = 120  # written at most: the words of random weights are no reading


def main() -> int:
    """Set up what is needed and take the pictures."""
    parser = argparse.ArgumentParser(description="Takes the README's pictures of ComfyUI's page.")
    parser.add_argument("--front-end-root", type=Path, help="the page to use, see ComfyUI's option of that name")
    parser.add_argument("--only", nargs="+", choices=list(SHOTS), default=list(SHOTS), help="these workflows")
    arguments = parser.parse_args()
    testbed.end_cleanly_on_sigterm()
    try:
        bed = testbed.prepare(tests=True)
        program = browser_setup.ensure_browser()
    except (testbed.TestbedError, browser_setup.BrowserError) as error:
        say(f"error: {error}")
        return 1
    if Path(sys.prefix) != bed.python.parent.parent:  # what follows needs the test bed's packages
        os.execv(bed.python, [str(bed.python), *sys.argv])
    page_of_its_own = ["--front-end-root", str(arguments.front_end_root.resolve())] if arguments.front_end_root else []
    with tempfile.TemporaryDirectory() as temporary:
        checkpoints = {
            name: testbed.make_tiny_checkpoint(bed.python, Path(temporary) / name, variant)
            for name, variant in VARIANTS.items()
        }
        with ComfyServer(bed.comfyui, bed.python, checkpoints=checkpoints, arguments=page_of_its_own) as server:
            take(server, program, arguments.only)
    return 0


def take(server: ComfyServer, program: Path, names: list[str]) -> None:
    """Load each workflow, run it and take its picture, in each renderer that is wanted."""
    from PIL import Image

    from tools.comfy_page import ComfyPage, open_browser

    Image.radial_gradient("L").resize((480, 360)).convert("RGB").save(server.base / "input" / EXAMPLE)
    with open_browser(program) as browser:
        for number, name in enumerate(names):
            workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
            for renderer in SHOTS[name]:
                with ComfyPage.open(browser, server, nodes2=renderer == NODES2, wide=renderer == CANVAS) as page:
                    page.load(workflow)
                    shorten(page, seed=2 * number + (renderer == NODES2))
                    page.run(timeout=600)
                    page.page.wait_for_timeout(6000)  # until messages about the run are gone
                    path = page.screenshot(TARGET / f"{name}_{renderer}.png", around_nodes=True)
                picture = Image.open(path).convert("RGB")
                picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
                # 256 colours are enough for a screenshot, and a quarter of the size.
                picture.quantize(dither=Image.Dither.NONE).save(path, optimize=True)
                say(f"{path.relative_to(REPO).as_posix()}: {path.stat().st_size // 1024} KiB")


def shorten(page: ComfyPage, seed: int) -> None:
    """Ask for few steps and words, and for a picture that is not in ComfyUI's cache."""
    for node_id, fields in page.widgets().items():
        if "steps" in fields:
            page.set_widget(node_id, "steps", STEPS)
            page.set_widget(node_id, "seed", seed)
        if "max_new_tokens" in fields:
            page.set_widget(node_id, "max_new_tokens", TOKENS)


if __name__ == "__main__":
    sys.exit(main())
