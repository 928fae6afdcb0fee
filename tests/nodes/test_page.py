"""This package on ComfyUI's page, in a real browser, in both of the page's renderers: canvas and Nodes 2.0."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.nodes import shipped
from tools.browser_setup import BrowserError, find_browser
from tools.comfy_server import PACKAGE, ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tools.comfy_page import ComfyPage

pytestmark = [pytest.mark.comfy, pytest.mark.browser]

# What ComfyUI's page itself complains of where there is no internet and no user folder yet; nothing of it is ours:
NOISE = re.compile(
    r"Failed to load resource: the server responded with a status of 404"  # its optional files
    r"|net::ERR_INTERNET_DISCONNECTED|net::ERR_NAME_NOT_RESOLVED|net::ERR_CONNECTION|net::ERR_BLOCKED"
    r"|Connecting to 'https://[a-z.]*comfy\.org/"  # it asks the registry what package a node is from
)
NODES = ("Hunyuan3Loader", "Hunyuan3Resolution", "Hunyuan3Conditioning", "Hunyuan3Sampler", "Hunyuan3VAEDecode")
PICTURE = [{"width": 256, "height": 256}]  # the tiny checkpoints' base size


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser without a window. Without one the tests fail: what they look at is nowhere else looked at."""
    try:
        program = find_browser()
        from tools.comfy_page import open_browser
    except (BrowserError, ImportError) as error:
        pytest.fail(f"{error}\n`python3 tools/test.py` sets up what is missing where it can.", pytrace=False)
    with open_browser(program) as browser:
        yield browser


@pytest.fixture(scope="module", params=["canvas", "nodes2"])
def opened(request: pytest.FixtureRequest, comfy_server: ComfyServer, browser: Browser) -> Iterator[ComfyPage]:
    """The page, opened once per renderer, on a ComfyUI in which the shipped workflows can run as they are."""
    from tools.comfy_page import ComfyPage

    shipped.furnish(comfy_server)
    with ComfyPage.open(browser, comfy_server, nodes2=request.param == "nodes2") as page:
        yield page


@pytest.fixture
def page(opened: ComfyPage, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ComfyPage]:
    """The page; after the test it must not have reported any error but ComfyUI's own. Leaves a screenshot."""
    seen = len(opened.errors)
    yield opened
    opened.screenshot(tmp_path / "page.png")
    assert [error for error in opened.errors[seen:] if not NOISE.search(error)] == []


def test_page_starts_without_an_error_of_ours(page: ComfyPage):
    """Errors while the page starts count if they name this package or a node of it; the page has several of its own."""
    ours = re.compile(f"{re.escape(PACKAGE)}|hunyuan", re.IGNORECASE)
    assert [error for error in page.errors if ours.search(error) and not NOISE.search(error)] == []


def test_nodes_added_and_wired_by_hand_draw_a_picture(page: ComfyPage):
    page.clear()
    loader, size, conditioning, sampler, decode = (page.add_node(name, (450 * i, 0)) for i, name in enumerate(NODES))
    save = page.add_node("SaveImage", (2250, 0))
    for target in (size, conditioning, sampler, decode):
        page.connect(loader, "model", target, "model")
    page.connect(size, "width", conditioning, "width")
    page.connect(size, "height", conditioning, "height")
    page.connect(conditioning, "conditioning", sampler, "conditioning")
    page.connect(sampler, "latent", decode, "samples")
    page.connect(decode, "image", save, "images")
    page.set_widget(loader, "checkpoint", "HunyuanImage-3.0-Instruct")
    page.set_widget(conditioning, "prompt", f"A lighthouse, drawn with nodes2={page.nodes2}")
    for name, value in {"ratio": "custom", "width": 96, "height": 64}.items():
        page.set_widget(size, name, value)
    page.set_widget(sampler, "steps", 2)
    page.settle()
    prompt = page.prompt()
    assert prompt[conditioning]["inputs"]["width"] == [size, 0]
    assert prompt[sampler]["inputs"]["steps"] == 2
    page.run()
    assert page.pictures(save) == [{"width": 96, "height": 64}]


@pytest.mark.parametrize("name", shipped.NAMES)
def test_shipped_workflow_loads_whole(page: ComfyPage, name: str):
    workflow, prompt = shipped.for_page(name), shipped.for_api(name)
    page.load(workflow)
    # It is the workflow that is shipped for the API ...
    assert page.prompt() == prompt
    # ... each value in its field, and a save gives them back ...
    fields = page.widgets()
    for node_id, node in prompt.items():
        values = {key: value for key, value in node["inputs"].items() if not isinstance(value, list)}
        assert values.items() <= fields[node_id].items()
    saved = {node["id"]: node["widgets_values"] for node in page.serialized()["nodes"]}
    assert saved == {node["id"]: node["widgets_values"] for node in workflow["nodes"]}
    # ... and no node covers another.
    assert len(page.boxes()) == len(workflow["nodes"])
    assert overlaps(page) == []


def test_shipped_workflow_draws_a_picture(page: ComfyPage):
    workflow = shipped.for_page("text_to_image")
    page.load(workflow)
    ids = {node["type"]: str(node["id"]) for node in workflow["nodes"]}
    seed = 20 + page.nodes2  # a seed of its own, or ComfyUI would answer from its cache
    page.set_widget(ids["Hunyuan3Sampler"], "seed", seed)
    page.run()
    assert page.pictures(ids["SaveImage"]) == PICTURE
    assert page.widgets()[ids["Hunyuan3Sampler"]]["seed"] != seed  # drawn anew, for the next run
    assert overlaps(page) == []  # though nodes have grown: a picture, a preview, lines of text


def test_mistake_is_told_on_the_page(page: ComfyPage):
    from tools.comfy_page import PageError

    workflow = shipped.for_page("text_to_image")
    page.load(workflow)
    (loader,) = (str(node["id"]) for node in workflow["nodes"] if node["type"] == "Hunyuan3Loader")
    page.set_widget(loader, "variant", "base")  # the folder holds another one
    with pytest.raises(PageError, match="variant is 'base'"):
        page.run()
    page.wait_for_text("variant is 'base'")


def overlaps(page: ComfyPage) -> list[tuple[str, str]]:
    """Return the pairs of nodes that cover each other on the screen."""
    boxes = page.boxes()
    return [
        (a, b)
        for (a, one), (b, two) in combinations(boxes.items(), 2)
        if one.left < two.right and two.left < one.right and one.top < two.bottom and two.top < one.bottom
    ]
