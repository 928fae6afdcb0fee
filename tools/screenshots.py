"""The README's pictures of ComfyUI's page: shipped workflows after a run, to docs/images/.

    python3 tools/screenshots.py [--only NAME ...] [--front-end-root FOLDER]

The trained tiny checkpoints stand in for the published ones, asked for what they can draw (see showcase.py).
--front-end-root is passed to ComfyUI: another page than the test bed's, such as the newest one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import browser_setup, testbed
from tools.comfy_server import ComfyServer
from tools.testbed import REPO, say
from tools.workflows import FOLDER

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
    from tools.showcase import TRAINED

    with ComfyServer(bed.comfyui, bed.python, checkpoints=TRAINED, arguments=page_of_its_own) as server:
        take(server, program, arguments.only)
    return 0


def take(server: ComfyServer, program: Path, names: list[str]) -> None:
    """Load each workflow, run it and take its picture, in each renderer that is wanted."""
    from PIL import Image

    from tools.comfy_page import ComfyPage, open_browser
    from tools.showcase import asked

    with open_browser(program) as browser:
        for name in names:
            workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
            prompt = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
            fields = asked(name, prompt, server.base / "input")
            for renderer in SHOTS[name]:
                with ComfyPage.open(browser, server, nodes2=renderer == NODES2, wide=renderer == CANVAS) as page:
                    page.load(workflow)
                    for node, given in fields.items():
                        for field, value in given.items():
                            page.set_widget(node, field, value)
                    if renderer == NODES2:  # another picture, not the canvas's from ComfyUI's cache
                        for node, given in prompt.items():
                            if given["class_type"] == "Hunyuan3Sampler":
                                page.set_widget(node, "seed", given["inputs"]["seed"] + 1)
                    page.run(timeout=600)
                    page.page.wait_for_timeout(6000)  # until messages about the run are gone
                    path = page.screenshot(TARGET / f"{name}_{renderer}.png", around_nodes=True)
                picture = Image.open(path).convert("RGB")
                picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
                # 256 colours are enough for a screenshot, and a quarter of the size.
                picture.quantize(dither=Image.Dither.NONE).save(path, optimize=True)
                say(f"{path.relative_to(REPO).as_posix()}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    sys.exit(main())
