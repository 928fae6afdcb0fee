"""The shipped workflows: made from their one source, known to ComfyUI, and running."""

from __future__ import annotations

import io
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.nodes import shipped
from tools import workflows
from tools.comfy_server import PACKAGE, ComfyServer, with_inputs
from tools.workflows import DISTIL

pytestmark = pytest.mark.comfy

QUICK = {
    "Hunyuan3Resolution": {"ratio": "custom", "width": 96, "height": 64},
    "Hunyuan3Sampler": {"steps": 2},
    "Hunyuan3Think": {"max_new_tokens": 12},
    "Hunyuan3Ask": {"max_new_tokens": 12},
}
WRITE = ("Hunyuan3Think", "Hunyuan3Ask")


@pytest.fixture(scope="module")
def server(comfy_server: ComfyServer) -> ComfyServer:
    """A ComfyUI that has all published folders, each with a tiny checkpoint in it."""
    shipped.furnish(comfy_server)
    return comfy_server


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, Any]:
    return server.get("/object_info")


def test_files_are_what_the_source_gives(object_info: dict[str, Any]):
    wrong = workflows.differences(workflows.render(object_info))
    assert wrong == [], "run: python3 tools/workflows.py"


def test_changed_missing_and_extra_files_are_noticed(tmp_path: Path):
    files = {"one.json": "1\n", "api/one.json": "2\n", "api/two.json": "3\n"}
    workflows.write(files, tmp_path)
    assert workflows.differences(files, tmp_path) == []
    (tmp_path / "one.json").write_text("0\n", encoding="utf-8")
    (tmp_path / "api" / "one.json").unlink()
    (tmp_path / "mine.json").touch()
    assert workflows.differences(files, tmp_path) == ["missing: api/one.json", "other: one.json", "extra: mine.json"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"filename_prefix": "x", "images": 0, "colour": "red"}, "no input colour"),
        ({"filename_prefix": "x"}, "needs images"),
    ],
)
def test_source_that_does_not_fit_the_nodes_is_an_error(
    object_info: dict[str, Any], inputs: dict[str, Any], message: str
):
    graph = workflows.Graph("wrong")
    empty = graph.node("EmptyImage", 0)
    if "images" in inputs:
        inputs = {**inputs, "images": empty["IMAGE"]}
    graph.node("SaveImage", 1, **inputs)
    with pytest.raises(workflows.WorkflowError, match=message):
        workflows.api_format(graph, object_info)


def test_link_between_types_that_do_not_fit_is_an_error(object_info: dict[str, Any]):
    graph = workflows.Graph("wrong")
    size = graph.node("Hunyuan3Resolution", 0)
    graph.node("SaveImage", 1, images=size["width"])
    with pytest.raises(workflows.WorkflowError, match="takes IMAGE"):
        workflows.page_format(graph, object_info)


@pytest.mark.parametrize("name", shipped.NAMES)
def test_page_format_has_only_what_the_nodes_have(object_info: dict[str, Any], name: str):
    """Counted in /object_info itself, without the generator."""
    for node in shipped.for_page(name)["nodes"]:
        if node["type"] == "MarkdownNote":  # the page's own
            continue
        info = object_info[node["type"]]
        known = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert {given["name"] for given in node["inputs"]} == known.keys()
        assert [output["name"] for output in node["outputs"]] == info["output_name"]
        fields = [given["name"] for given in node["inputs"] if "widget" in given]
        # The page puts a field of its own behind a seed, and a button behind a picture's name.
        more = [name for name in fields if {"control_after_generate", "image_upload"} & known[name][1].keys()]
        assert len(node["widgets_values"]) == len(fields) + len(more)


def test_comfyui_offers_the_workflows_as_templates(server: ComfyServer):
    assert set(server.get("/workflow_templates")[PACKAGE]) == set(shipped.NAMES)


@pytest.mark.parametrize("name", shipped.NAMES)
def test_each_template_has_a_picture(server: ComfyServer, name: str):
    """Served where the template browser looks for it; a square that shows something."""
    with urllib.request.urlopen(f"{server.url}/api/workflow_templates/{PACKAGE}/{name}.jpg", timeout=30) as answer:
        picture = Image.open(io.BytesIO(answer.read()))
    assert picture.width == picture.height >= 256
    assert len(picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=8).getcolors()) > 2


def test_there_is_no_picture_without_a_workflow():
    assert {path.stem for path in workflows.FOLDER.glob("*.jpg")} == set(shipped.NAMES)


@pytest.mark.parametrize("name", shipped.NAMES)
def test_seeds_of_texts_stay(name: str):
    for node in shipped.for_page(name)["nodes"]:
        if node["type"] in WRITE:
            fields = [given["name"] for given in node["inputs"] if "widget" in given]
            assert node["widgets_values"][fields.index("seed") + 1] == "fixed"


@pytest.mark.parametrize("name", shipped.NAMES)
def test_workflow_runs_and_gives_pictures_and_texts(server: ComfyServer, name: str):
    prompt = shipped.for_api(name)
    if name == "fuse_three_distil":  # one of its pictures will do: encoding takes seconds, and its twin has all three
        _leave_out(prompt, "image_2", "image_3")
    classes = {node["class_type"] for node in prompt.values()}
    outputs = server.queue(with_inputs(prompt, {key: inputs for key, inputs in QUICK.items() if key in classes}))
    texts = [outputs[node_id]["text"][0] for node_id, node in prompt.items() if node["class_type"] in WRITE]
    assert all(texts)
    saved = [node_id for node_id, node in prompt.items() if node["class_type"] == "SaveImage"]
    assert saved or texts
    for node_id in saved:
        (image,) = outputs[node_id]["images"]
        picture = Image.open(io.BytesIO(server.view(**image)))
        assert len(picture.getcolors(maxcolors=2**24)) > 100  # not blank
        if not texts:
            assert picture.size == (96, 64)
        elif not _aligns(prompt):  # the size that the model chose
            assert any("{}x{}".format(*picture.size) in text for text in texts)


@pytest.mark.parametrize("name", [name for name in shipped.NAMES if name.endswith("_distil")])
def test_distil_workflow_is_its_twin_with_another_checkpoint(name: str):
    twin = with_inputs(shipped.for_api(name.removesuffix("_distil")), {"Hunyuan3Loader": {"checkpoint": DISTIL}})
    assert shipped.for_api(name) == twin


def _leave_out(prompt: dict[str, Any], *inputs: str) -> None:
    """Disconnect inputs of Image Conditioning."""
    for node in prompt.values():
        if node["class_type"] == "Hunyuan3ImageConditioning":
            for name in inputs:
                del node["inputs"][name]


def _aligns(prompt: dict[str, Any]) -> bool:
    """Whether a workflow gives its result the shape of its input picture."""
    return any(node["inputs"].get("align") for node in prompt.values())
