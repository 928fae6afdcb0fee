"""The shipped workflows from one source: `workflows/<name>.json` for the page, `workflows/api/<name>.json` for the API.

    python3 tools/workflows.py             writes the files
    python3 tools/workflows.py --check     writes nothing; fails if a file is not what would be written
    ... --url http://127.0.0.1:8188        asks a running ComfyUI about the nodes instead of starting one

A workflow is a function below that adds nodes to a `Graph`. It names inputs and outputs and gives only the values that
matter; order, types and all other values come from ComfyUI's own description of the nodes (`/object_info`), so a file
can hold nothing that the nodes do not have. Run this again after a node's inputs have changed.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import testbed
from tools.comfy_server import ComfyServer
from tools.testbed import REPO, say

FOLDER = REPO / "workflows"

# The published folders, and the kind of model in each (as hunyuan3.tiny names it).
BASE = "HunyuanImage-3.0"
INSTRUCT = "HunyuanImage-3.0-Instruct"
DISTIL = "HunyuanImage-3.0-Instruct-Distil"
VARIANTS = {BASE: "base", INSTRUCT: "instruct", DISTIL: "distil"}

PROMPT = "A red fox asleep in tall grass, soft evening light, photograph"
SHORT_PROMPT = "A poster for a lighthouse that has become a library"
EXAMPLE = "example.png"  # the picture that ComfyUI has in its input folder

Json = Any
ObjectInfo = Mapping[str, Json]


class WorkflowError(Exception):
    """A workflow below asks for something that the nodes do not have."""


# --- the workflows ---------------------------------------------------------------------------------------------------


def text_to_image(graph: Graph) -> None:
    """Instruct-Distil: 8 steps, the quickest."""
    _one_picture(graph, DISTIL, "Draws a picture from a prompt in 8 steps.")


def text_to_image_instruct(graph: Graph) -> None:
    """Instruct: 50 steps with guidance."""
    _one_picture(graph, INSTRUCT, "Draws a picture from a prompt in 50 steps.")


def text_to_image_base(graph: Graph) -> None:
    """The base model: 50 steps with guidance, no instruction before the prompt."""
    _one_picture(graph, BASE, "Draws a picture from a prompt in 50 steps.")


def latent_to_latent(graph: Graph) -> None:
    """Draws a picture, then draws it again from its own latent."""
    model, conditioning = _start(
        graph,
        DISTIL,
        "Draws a picture, then draws 60 % of it anew from its latent, with another seed (**denoise** of the second "
        "sampler; less stays closer to the first picture). The first seed is fixed, so the first picture is drawn "
        "only once.",
    )
    first = _picture(graph, 2, model, conditioning, "first", seed=1, after_generate="fixed")
    latent = first.inputs["samples"]
    _picture(graph, 4, model, conditioning, "second", seed=2, latent=latent, denoise=0.6)


def think_and_draw(graph: Graph) -> None:
    """Instruct thinks about a short prompt, rewrites it, chooses the size, then draws."""
    _think_and_draw(graph, INSTRUCT)


def think_and_draw_distil(graph: Graph) -> None:
    """The same with Instruct-Distil: 8 steps."""
    _think_and_draw(graph, DISTIL)


def edit_picture(graph: Graph) -> None:
    """Instruct changes a picture as the prompt says."""
    _edit_picture(graph, INSTRUCT)


def edit_picture_distil(graph: Graph) -> None:
    """The same with Instruct-Distil: 8 steps."""
    _edit_picture(graph, DISTIL)


def fuse_three(graph: Graph) -> None:
    """Instruct makes one picture of three."""
    _fuse_three(graph, INSTRUCT)


def fuse_three_distil(graph: Graph) -> None:
    """The same with Instruct-Distil: 8 steps."""
    _fuse_three(graph, DISTIL)


def ask_picture(graph: Graph) -> None:
    """Instruct answers a question about a picture, or describes it."""
    loader = graph.node("Hunyuan3Loader", 0, size=(360, 0), checkpoint=INSTRUCT)
    picture = graph.node("LoadImage", 0, size=(360, 360), image=EXAMPLE)
    images = graph.node("Hunyuan3ImageConditioning", 1, size=(360, 0), model=loader["model"], image_1=picture["IMAGE"])
    graph.node(
        "Hunyuan3Ask",
        2,
        size=(460, 960),
        prompt="Describe this picture in one paragraph.",
        seed=1,
        after_generate="fixed",
        model=loader["model"],
        images=images["images"],
    )
    does = "Answers a question about a picture, in text; here it asks for a caption. More pictures can be connected."
    graph.note(1, size=(360, 330), text=_NOTE.format(does=does, after="", checkpoint=INSTRUCT))


def multi_turn_edit(graph: Graph) -> None:
    """Instruct draws a picture, then changes it in a second turn of the same conversation."""
    loader = graph.node("Hunyuan3Loader", 0, size=(360, 0), checkpoint=INSTRUCT)
    model = loader["model"]
    first = graph.node("PrimitiveStringMultiline", 0, title=" (first turn)", size=(360, 160), value=SHORT_PROMPT)
    think, conditioning = _think_then(graph, 1, model, first["STRING"], " (first turn)")
    decode = _picture(graph, 3, model, conditioning, "first", seed=1, after_generate="fixed")
    drawn = graph.node("Hunyuan3ImageConditioning", 5, size=(360, 0), model=model, image_1=decode["image"])
    turns = graph.node(
        "Hunyuan3Continue",
        5,
        size=(360, 0),
        model=model,
        conversation=think["conversation"],
        images=drawn["images"],
    )
    second = graph.node(
        "PrimitiveStringMultiline", 5, title=" (second turn)", size=(360, 160), value="Now the same at night, in snow."
    )
    _, conditioning = _think_then(
        graph, 6, model, second["STRING"], " (second turn)", conversation=turns["conversation"]
    )
    _picture(graph, 8, model, conditioning, "second", seed=1)
    does = (
        "Draws a picture, then goes on from it in a second turn: the conversation with the first picture in it leads "
        "to **Think** and **Conditioning** of the second. For a third turn, copy the second."
    )
    after = "The first turn's seeds are fixed, so it is computed only once."
    graph.note(0, size=(360, 330), text=_NOTE.format(does=does, after=after + _DEFAULTS, checkpoint=INSTRUCT))


WORKFLOWS: tuple[Callable[[Graph], None], ...] = (
    text_to_image,
    text_to_image_instruct,
    text_to_image_base,
    latent_to_latent,
    think_and_draw,
    edit_picture,
    fuse_three,
    ask_picture,
    multi_turn_edit,
    think_and_draw_distil,
    edit_picture_distil,
    fuse_three_distil,
)


def _think_and_draw(graph: Graph, checkpoint: str) -> None:
    loader = graph.node("Hunyuan3Loader", 0, size=(360, 0), checkpoint=checkpoint)
    prompt = graph.node("PrimitiveStringMultiline", 0, title=" (prompt)", size=(360, 160), value=SHORT_PROMPT)
    _, conditioning = _think_then(graph, 1, loader["model"], prompt["STRING"])
    _picture(graph, 3, loader["model"], conditioning, seed=1)
    does = "Thinks about the prompt, writes it anew as a full description, chooses the size, and draws that."
    graph.note(0, size=(360, 360), text=_NOTE.format(does=does, after=_THINKS_ONCE + _DEFAULTS, checkpoint=checkpoint))


def _edit_picture(graph: Graph, checkpoint: str) -> None:
    does = (
        "Changes a picture as the prompt says. With **align** the picture is seen whole, and the result gets its shape."
    )
    prompt = "Turn this picture into a watercolour painting. Keep the composition."
    _from_pictures(graph, checkpoint, 1, prompt, does, align=True)


def _fuse_three(graph: Graph, checkpoint: str) -> None:
    does = "Makes one picture of three. The prompt speaks of them as the first, the second and the third."
    prompt = "Put what the first picture shows beside what the second shows, in the style of the third picture."
    _from_pictures(graph, checkpoint, 3, prompt, does, align=False)


def _from_pictures(graph: Graph, checkpoint: str, count: int, text: str, does: str, *, align: bool) -> None:
    """Think about some pictures and draw another one."""
    pictures = [
        graph.node("LoadImage", 0, title=f" ({index + 1})" if count > 1 else "", size=(320, 340), image=EXAMPLE)
        for index in range(count)
    ]
    loader = graph.node("Hunyuan3Loader", 1, size=(360, 0), checkpoint=checkpoint)
    model = loader["model"]
    images = graph.node(
        "Hunyuan3ImageConditioning",
        1,
        size=(360, 0),
        model=model,
        align=align,
        **{f"image_{index + 1}": picture["IMAGE"] for index, picture in enumerate(pictures)},
    )
    prompt = graph.node("PrimitiveStringMultiline", 1, title=" (prompt)", size=(360, 160), value=text)
    _, conditioning = _think_then(graph, 2, model, prompt["STRING"], images=images["images"])
    _picture(graph, 4, model, conditioning, seed=1, images=images["images"] if align else None)
    note = _NOTE.format(does=does, after=_THINKS_ONCE + _DEFAULTS, checkpoint=checkpoint)
    graph.note(1 if count > 1 else 0, size=(360 if count > 1 else 320, 380), text=note)


def _think_then(graph: Graph, column: int, model: Out, prompt: Out, title: str = "", **given: Out) -> tuple[Node, Out]:
    """Add a Think node and a conditioning that follows it, in two columns; return the node and the conditioning.

    given: pictures and earlier turns, for both.
    """
    think = graph.node(
        "Hunyuan3Think",
        column,
        title=title,
        size=(440, 960),
        seed=1,
        after_generate="fixed",  # or a new image seed would think again
        model=model,
        prompt=prompt,
        **given,
    )
    conditioning = graph.node(
        "Hunyuan3Conditioning",
        column + 1,
        title=title,
        size=(320, 440),
        model=model,
        prompt=prompt,
        width=think["width"],
        height=think["height"],
        trace=think["trace"],
        **given,
    )
    return think, conditioning["conditioning"]


def _one_picture(graph: Graph, checkpoint: str, does: str) -> None:
    model, conditioning = _start(graph, checkpoint, does)
    _picture(graph, 2, model, conditioning, seed=1)


def _start(graph: Graph, checkpoint: str, does: str) -> tuple[Out, Out]:
    """Add what every workflow begins with, in the first two columns; return the model and the conditioning."""
    loader = graph.node("Hunyuan3Loader", 0, size=(360, 0), checkpoint=checkpoint)
    resolution = graph.node("Hunyuan3Resolution", 0, size=(360, 0), ratio="1:1", model=loader["model"])
    conditioning = graph.node(
        "Hunyuan3Conditioning",
        1,
        size=(400, 400),
        prompt=PROMPT,
        model=loader["model"],
        width=resolution["width"],
        height=resolution["height"],
    )
    graph.note(1, size=(400, 230), text=_NOTE.format(does=does, after=_DEFAULTS.strip(), checkpoint=checkpoint))
    return loader["model"], conditioning["conditioning"]


def _picture(
    graph: Graph,
    column: int,
    model: Out,
    conditioning: Out,
    which: str = "",
    after_generate: str = "randomize",
    images: Out | None = None,
    **sampler_inputs: Any,
) -> Node:
    """Add a sampler and what shows its picture, in two columns; return the node that decodes.

    images: input pictures, for the decoder.
    """
    title = f" ({which})" if which else ""
    sampler = graph.node(
        "Hunyuan3Sampler",
        column,
        title=title,
        size=(380, 700),  # with room for the preview
        after_generate=after_generate,
        model=model,
        conditioning=conditioning,
        **sampler_inputs,
    )
    shape = {} if images is None else {"images": images}
    decode = graph.node(
        "Hunyuan3VAEDecode", column + 1, title=title, size=(440, 0), model=model, samples=sampler["latent"], **shape
    )
    prefix = f"hunyuan3_{which}" if which else "hunyuan3"
    graph.node("SaveImage", column + 1, title=title, size=(440, 520), images=decode["image"], filename_prefix=prefix)
    return decode


_NOTE = """{does}

**Weights**: the whole folder [tencent/{checkpoint}](https://huggingface.co/tencent/{checkpoint}), as it is there, \
belongs in

**ComfyUI/models/hunyuan3/{checkpoint}**

Then press **R** and choose it as *checkpoint* in Hunyuan3 Loader.

{after}
"""
_DEFAULTS = " Steps, guidance and shift of **0** mean the checkpoint's own defaults."
_THINKS_ONCE = "Think's seed is fixed: a new seed of the sampler draws anew without thinking again."


# --- what a workflow is made of --------------------------------------------------------------------------------------


class Out(NamedTuple):
    """An output of a node, to be given as another node's input."""

    node: Node
    name: str


@dataclass(eq=False)
class Node:
    """A node to be: its class, the inputs that are not left at their defaults, and where it stands."""

    id: int
    class_type: str
    column: int
    title: str  # follows the node's display name
    size: tuple[int, int]  # at least this
    inputs: dict[str, Any]  # name -> a value, or the Out of another node
    after_generate: str  # what the page does to a seed after a run

    def __getitem__(self, output: str) -> Out:
        return Out(self, output)


@dataclass
class Note:
    """A text on the canvas; the page alone knows it."""

    column: int
    size: tuple[int, int]
    text: str


@dataclass
class Graph:
    """A workflow under construction: nodes and notes in columns, each below the one added before."""

    name: str
    nodes: list[Node] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def node(
        self,
        class_type: str,
        column: int,
        *,
        title: str = "",
        size: tuple[int, int] = (0, 0),
        after_generate: str = "randomize",
        **inputs: Any,
    ) -> Node:
        """Add a node."""
        node = Node(len(self.nodes) + 1, class_type, column, title, size, inputs, after_generate)
        self.nodes.append(node)
        return node

    def note(self, column: int, *, size: tuple[int, int], text: str) -> None:
        """Add a note. Notes stand below the nodes of their column."""
        self.notes.append(Note(column, size, text))


# --- what the nodes say of themselves --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """One input as `/object_info` describes it."""

    name: str
    type: str
    optional: bool
    options: Mapping[str, Json]

    @property
    def is_widget(self) -> bool:
        """Whether the page shows a field for it, beside the socket."""
        widgets = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
        return self.type in widgets and not self.options.get("forceInput")

    @property
    def is_seed(self) -> bool:
        """Whether the page adds the field "control after generate" behind it, which takes a place among the values."""
        return bool(self.options.get("control_after_generate"))

    @property
    def is_multiline(self) -> bool:
        """Whether the field is a text area."""
        return bool(self.options.get("multiline"))


@dataclass(frozen=True)
class Schema:
    """One node class as `/object_info` describes it."""

    class_type: str
    display_name: str
    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]  # name, type

    @classmethod
    def of(cls, class_type: str, object_info: ObjectInfo) -> Schema:
        """Read the description of a class."""
        info = object_info.get(class_type)
        if info is None:
            raise WorkflowError(f"there is no node {class_type}")
        inputs = []
        for kind in ("required", "optional"):
            for name, (type_, *rest) in info["input"].get(kind, {}).items():
                options = dict(rest[0]) if rest else {}
                if isinstance(type_, list):  # the older way to write a combo
                    type_, options = "COMBO", {"options": type_, **options}
                inputs.append(Input(name, type_, kind == "optional", options))
        outputs = tuple(zip(info["output_name"], info["output"], strict=True))
        return cls(class_type, info["display_name"] or class_type, tuple(inputs), outputs)

    @property
    def slots(self) -> list[Input]:
        """The inputs in the order in which the page makes sockets of them: fields follow the others."""
        return sorted(self.inputs, key=lambda entry: entry.is_widget)

    @property
    def widgets(self) -> list[Input]:
        """The inputs that have fields, in the order of the page's `widgets_values`."""
        return [entry for entry in self.inputs if entry.is_widget]

    def output(self, name: str) -> int:
        """Return the number of an output."""
        names = [output for output, _ in self.outputs]
        if name not in names:
            raise WorkflowError(f"{self.class_type} has no output {name!r}, only {', '.join(names)}")
        return names.index(name)


class _Resolved(NamedTuple):
    """A node with its schema and all of its inputs."""

    node: Node
    schema: Schema
    values: dict[str, Json]  # of every field, connected or not
    links: dict[str, Out]

    @property
    def title(self) -> str:
        return self.schema.display_name + self.node.title


def _resolve(graph: Graph, object_info: ObjectInfo) -> list[_Resolved]:
    """Look up the nodes of a graph, check what they are given and fill in the rest."""
    resolved = []
    for node in graph.nodes:
        schema = Schema.of(node.class_type, object_info)
        known = {entry.name: entry for entry in schema.inputs}
        unknown = node.inputs.keys() - known.keys()
        if unknown:
            raise WorkflowError(f"{node.class_type} has no input {', '.join(sorted(unknown))}")
        links = {name: value for name, value in node.inputs.items() if isinstance(value, Out)}
        for name, (source, output) in links.items():
            origin = Schema.of(source.class_type, object_info)
            given = origin.outputs[origin.output(output)][1]
            if given != known[name].type:
                raise WorkflowError(f"{node.class_type}.{name} takes {known[name].type}, {output!r} is {given}")
        missing = {e.name for e in schema.inputs if not e.optional and not e.is_widget} - links.keys()
        if missing:
            raise WorkflowError(f"{node.class_type} needs {', '.join(sorted(missing))}")
        values = {e.name: _value(node, e) for e in schema.widgets}
        resolved.append(_Resolved(node, schema, values, links))
    return resolved


def _value(node: Node, entry: Input) -> Json:
    """Return what a field holds: the given value or the default. A choice among files has no default."""
    given = node.inputs.get(entry.name)
    if given is not None and not isinstance(given, Out):
        return given
    if "default" not in entry.options:
        raise WorkflowError(f"{node.class_type}.{entry.name} has no default: the workflow must give a value")
    return entry.options["default"]


# --- API format ------------------------------------------------------------------------------------------------------


def api_format(graph: Graph, object_info: ObjectInfo) -> Json:
    """Return what `POST /prompt` takes: the fields' values and the links, by input name."""
    prompt = {}
    for entry in _resolve(graph, object_info):
        inputs = {}
        for given in entry.schema.inputs:
            if given.name in entry.links:
                source, output = entry.links[given.name]
                inputs[given.name] = [str(source.id), Schema.of(source.class_type, object_info).output(output)]
            elif given.name in entry.values:
                inputs[given.name] = entry.values[given.name]
        node = entry.node
        prompt[str(node.id)] = {"class_type": node.class_type, "inputs": inputs, "_meta": {"title": entry.title}}
    return prompt


# --- the page's format -----------------------------------------------------------------------------------------------

# Heights as the page computes them (pixels).
_TITLE, _SLOT, _WIDGET, _TEXT, _MARGIN = 30, 20, 24, 54, 14
_COLUMN_GAP, _ROW_GAP = 60, 110  # a run adds a line or two of text to a node


def page_format(graph: Graph, object_info: ObjectInfo) -> Json:
    """Return what the page saves and loads (version 0.4): places, sizes, and the fields' values by position."""
    resolved = _resolve(graph, object_info)
    boxes = dict(_layout(graph, resolved))
    outputs = {entry.node.id: entry.schema for entry in resolved}
    links = []
    nodes = []
    for order, entry in enumerate(resolved):
        node, schema = entry.node, entry.schema
        inputs = []
        for slot, given in enumerate(schema.slots):
            link = None
            if given.name in entry.links:
                source, output = entry.links[given.name]
                link = len(links) + 1
                links.append([link, source.id, outputs[source.id].output(output), node.id, slot, given.type])
            shape = {"shape": 7} if given.optional else {}  # drawn as a ring
            widget = {"widget": {"name": given.name}} if given.is_widget else {}
            inputs.append({"name": given.name, "type": given.type, **shape, **widget, "link": link})
        title = {"title": entry.title} if node.title else {}
        nodes.append(
            {
                "id": node.id,
                "type": node.class_type,
                **boxes[node.id],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": inputs,
                "outputs": [{"name": name, "type": type_, "links": None} for name, type_ in schema.outputs],
                **title,
                "properties": {"Node name for S&R": node.class_type},
                "widgets_values": list(_widgets_values(entry)),
            }
        )
    for link, source, slot, *_ in links:
        output = nodes[source - 1]["outputs"][slot]
        output["links"] = [*(output["links"] or []), link]
    for note_id, note in enumerate(graph.notes, start=len(nodes) + 1):
        nodes.append(
            {
                "id": note_id,
                "type": "MarkdownNote",
                **boxes[note_id],
                "flags": {},
                "order": note_id - 1,
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "properties": {},
                "widgets_values": [note.text],
            }
        )
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hunyuan-image-3/workflows/{graph.name}")),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        # The sizes above are those of the canvas; for Nodes 2.0 the page scales such a workflow by itself.
        "extra": {"workflowRendererVersion": "LG"},
        "version": 0.4,
    }


def _widgets_values(entry: _Resolved) -> Iterator[Json]:
    """Yield a node's values as the page counts them."""
    for given in entry.schema.widgets:
        yield entry.values[given.name]
        if given.is_seed:
            yield entry.node.after_generate
        if given.options.get("image_upload"):
            yield "image"  # the button below the field has a place too


def _layout(graph: Graph, resolved: list[_Resolved]) -> Iterator[tuple[int, Json]]:
    """Yield place and size by id: columns from left to right, as wide as their widest node and filled from the top."""
    placed = [(entry.node.id, entry.node.column, _size(entry)) for entry in resolved]
    placed += [(id_, note.column, note.size) for id_, note in enumerate(graph.notes, start=len(resolved) + 1)]
    x = 0
    for column in sorted({column for _, column, _ in placed}):
        members = [(id_, size) for id_, where, size in placed if where == column]
        y = 0
        for id_, (width, height) in members:
            yield id_, {"pos": [x, y], "size": [width, height]}
            y += height + _TITLE + _ROW_GAP
        x += max(width for _, (width, _) in members) + _COLUMN_GAP


def _size(entry: _Resolved) -> tuple[int, int]:
    """Return a node's size: what was asked for, and at least what the page needs for its slots and fields."""
    schema = entry.schema
    sockets = max(len(schema.inputs) - len(schema.widgets), len(schema.outputs))
    texts = sum(given.is_multiline for given in schema.widgets)
    fields = sum(1 + given.is_seed for given in schema.widgets) - texts
    width, height = entry.node.size
    return max(width, 270), max(height, _SLOT * sockets + _WIDGET * fields + _TEXT * texts + _MARGIN)


# --- files -----------------------------------------------------------------------------------------------------------


def render(object_info: ObjectInfo) -> dict[str, str]:
    """Return every shipped file's text by its path in the workflows folder."""
    files = {}
    for build in WORKFLOWS:
        graph = Graph(build.__name__)
        build(graph)
        files[f"{graph.name}.json"] = _text(page_format(graph, object_info))
        files[f"api/{graph.name}.json"] = _text(api_format(graph, object_info))
    return files


def write(files: Mapping[str, str], folder: Path = FOLDER) -> None:
    """Write what `render` returned."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def differences(files: Mapping[str, str], folder: Path = FOLDER) -> list[str]:
    """Return how a folder differs from what `render` returned, a line for each file that is missing, other or extra."""
    there = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.json"))}
    missing = [f"missing: {name}" for name in files if name not in there]
    other = [f"other: {name}" for name in files if name in there and there[name].read_text("utf-8") != files[name]]
    return missing + other + [f"extra: {name}" for name in there if name not in files]


def _text(data: Json) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _object_info(url: str | None) -> ObjectInfo:
    if url:
        with urllib.request.urlopen(f"{url.rstrip('/')}/object_info", timeout=60) as answer:
            return json.load(answer)
    bed = testbed.prepare()
    say("starting ComfyUI to ask it about the nodes")
    with ComfyServer(bed.comfyui, bed.python) as server:
        return server.get("/object_info")


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description="Writes the shipped workflows.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file would change")
    parser.add_argument("--url", help="a running ComfyUI to ask about the nodes, instead of starting one")
    arguments = parser.parse_args()
    testbed.end_cleanly_on_sigterm()
    try:
        files = render(_object_info(arguments.url))
    except (testbed.TestbedError, WorkflowError) as error:
        say(f"error: {error}")
        return 1
    if not arguments.check:
        write(files)
        say(f"wrote {len(files)} files to {FOLDER}")
        return 0
    wrong = differences(files)
    for line in wrong:
        say(line)
    say("run tools/workflows.py" if wrong else "the workflows are as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
