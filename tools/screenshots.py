"""The README's pictures of ComfyUI's page: a shipped workflow after a run, in both renderers, to docs/images/.

    python3 tools/screenshots.py [--front-end-root FOLDER]

Tiny checkpoints of random weights stand in for the published ones, so what is drawn is coloured noise.
--front-end-root is passed to ComfyUI: another page than the test bed's, such as the newest one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import browser_setup, testbed
from tools.comfy_server import ComfyServer
from tools.testbed import REPO, say
from tools.workflows import FOLDER, VARIANTS

TARGET = REPO / "docs" / "images"
WORKFLOW = "text_to_image"


def main() -> int:
    """Set up what is needed and take the pictures."""
    parser = argparse.ArgumentParser(description="Takes the README's pictures of ComfyUI's page.")
    parser.add_argument("--front-end-root", type=Path, help="the page to use, see ComfyUI's option of that name")
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
            take(server, program)
    return 0


def take(server: ComfyServer, program: Path) -> None:
    """Load the workflow, run it and take its picture, in each renderer."""
    from PIL import Image

    from tools.comfy_page import ComfyPage, open_browser

    workflow = json.loads((FOLDER / f"{WORKFLOW}.json").read_text(encoding="utf-8"))
    ids = {node["type"]: str(node["id"]) for node in workflow["nodes"]}
    with open_browser(program) as browser:
        for nodes2, name in ((False, "canvas"), (True, "nodes2")):
            with ComfyPage.open(browser, server, nodes2=nodes2) as page:
                page.load(workflow)
                page.set_widget(ids["Hunyuan3Sampler"], "seed", 1 + nodes2)
                page.run()
                page.pictures(ids["SaveImage"])
                page.page.wait_for_timeout(6000)  # until messages about the run are gone
                path = page.screenshot(TARGET / f"{WORKFLOW}_{name}.png", around_nodes=True)
            # 256 colours are enough for a screenshot, and a quarter of the size.
            Image.open(path).convert("RGB").quantize(dither=Image.Dither.NONE).save(path, optimize=True)
            say(f"{path.relative_to(REPO).as_posix()}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    sys.exit(main())
