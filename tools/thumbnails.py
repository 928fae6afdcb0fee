"""The pictures that ComfyUI's template browser shows: `workflows/<name>.jpg`, each made by its workflow.

    python3 tools/thumbnails.py [--only NAME ...]

Runs the shipped workflows through the HTTP API with the trained tiny checkpoints in place of the published ones, asked
for what these can draw (see showcase.py). Input pictures stand on the left, what was made of them on the right.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import testbed
from tools.comfy_server import ComfyServer
from tools.testbed import REPO, say
from tools.workflows import FOLDER, WORKFLOWS

SIZE = (512, 512)  # the browser shows squares
MARGIN = 24
PAPER, INK = (236, 236, 240), (40, 40, 48)


def main() -> int:
    """Run the workflows and write their pictures."""
    names = [build.__name__ for build in WORKFLOWS]
    parser = argparse.ArgumentParser(description="Makes the thumbnails of the shipped workflows.")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these workflows")
    arguments = parser.parse_args()
    testbed.end_cleanly_on_sigterm()
    try:
        bed = testbed.prepare(tests=True)
    except testbed.TestbedError as error:
        say(f"error: {error}")
        return 1
    if Path(sys.prefix) != bed.python.parent.parent:  # what follows needs the test bed's packages
        os.execv(bed.python, [str(bed.python), *sys.argv])
    from tools.showcase import TRAINED

    with ComfyServer(bed.comfyui, bed.python, checkpoints=TRAINED) as server:
        for name in arguments.only:
            path = FOLDER / f"{name}.jpg"
            thumbnail(*run(server, name)).save(path, quality=88, optimize=True)
            say(f"{path.relative_to(REPO).as_posix()}: {path.stat().st_size // 1024} KiB")
    return 0


def run(server: ComfyServer, name: str) -> tuple[list, list, str]:
    """(pictures that a workflow loaded, pictures that it saved, the answer that it gave in words)."""
    from PIL import Image

    from tools.showcase import asked

    prompt = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    inputs = server.base / "input"
    for number, given in asked(name, prompt, inputs).items():
        prompt[number]["inputs"].update(given)
    outputs = server.queue(prompt)
    nodes = sorted(prompt.items(), key=lambda item: int(item[0]))
    loaded = [Image.open(inputs / node["inputs"]["image"]) for _, node in nodes if node["class_type"] == "LoadImage"]
    saved = [
        Image.open(io.BytesIO(server.view(**picture)))
        for number, node in nodes
        if node["class_type"] == "SaveImage"
        for picture in outputs[number]["images"]
    ]
    answers = [
        f"{node['inputs']['prompt']}\n{outputs[number]['text'][0]}"
        for number, node in nodes
        if node["class_type"] == "Hunyuan3Ask"
    ]
    return loaded, saved, "\n".join(answers)


def thumbnail(loaded: Sequence, saved: Sequence, answer: str):
    """One picture: the loaded ones in a column, the saved ones in a row, an answer below what it is about."""
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("RGB", SIZE, PAPER)
    width, height = SIZE
    if answer:
        side = height // 2
        _paste(page, loaded[0], (MARGIN, MARGIN, side, side))
        pen = ImageDraw.Draw(page)
        font = ImageFont.load_default(24)
        for index, line in enumerate(_wrapped(answer, font, width - 2 * MARGIN)):
            pen.text((MARGIN, side + 2 * MARGIN + 32 * index), line, fill=INK, font=font)
        return page
    left = MARGIN
    if loaded:
        side = (height - (len(loaded) + 1) * MARGIN) // max(2, len(loaded))
        top = (height - len(loaded) * side - (len(loaded) - 1) * MARGIN) // 2
        for index, picture in enumerate(loaded):
            _paste(page, picture, (left, top + index * (side + MARGIN), side, side))
        left += side + MARGIN
    room = (width - left - len(saved) * MARGIN) // len(saved)
    for index, picture in enumerate(saved):
        _paste(page, picture, (left + index * (room + MARGIN), MARGIN, room, height - 2 * MARGIN))
    return page


def _paste(page, picture, box: tuple[int, int, int, int]) -> None:
    """Put a picture into the middle of a box (left, top, width, height), as large as fits."""
    from PIL import Image

    left, top, width, height = box
    scale = min(width / picture.width, height / picture.height)
    size = (round(picture.width * scale), round(picture.height * scale))
    scaled = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    page.paste(scaled, (left + (width - size[0]) // 2, top + (height - size[1]) // 2))


def _wrapped(text: str, font, width: int) -> list[str]:
    """The text in lines that are not wider than `width`."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


if __name__ == "__main__":
    sys.exit(main())
