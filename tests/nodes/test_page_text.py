"""The text of Think and Ask on ComfyUI's page, in both renderers: it streams, stays, is saved; and without our script.

The script itself is in js/; its parts that need no page are tested in tests/js/.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from tests.nodes import shipped
from tests.nodes.test_page import NOISE
from tools.browser_setup import BrowserError, find_browser
from tools.comfy_server import PACKAGE, ComfyServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext

    from tools.comfy_page import ComfyPage

pytestmark = [pytest.mark.comfy, pytest.mark.browser]

RENDERERS = ["canvas", "nodes2"]
# A reward for repeating itself keeps the tiny model from stopping by chance: it writes until it is cut off.
WRITING = {"sampling": "custom", "top_k": 1, "repetition_penalty": 0.5, "max_new_tokens": 150}
OURS = re.compile(f"{re.escape(PACKAGE)}|hunyuan", re.IGNORECASE)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    try:
        program = find_browser()
        from tools.comfy_page import open_browser
    except (BrowserError, ImportError) as error:
        pytest.fail(f"{error}\n`python3 tools/test.py` sets up what is missing where it can.", pytrace=False)
    with open_browser(program) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(comfy_server: ComfyServer) -> ComfyServer:
    shipped.furnish(comfy_server)
    return comfy_server


@pytest.fixture(scope="module", params=RENDERERS)
def opened(request: pytest.FixtureRequest, server: ComfyServer, browser: Browser) -> Iterator[ComfyPage]:
    from tools.comfy_page import ComfyPage

    with ComfyPage.open(browser, server, nodes2=request.param == "nodes2") as page:
        yield page


@pytest.fixture
def page(opened: ComfyPage) -> Iterator[ComfyPage]:
    """The page; after the test it must not have reported any error but ComfyUI's own."""
    seen = len(opened.errors)
    yield opened
    assert [error for error in opened.errors[seen:] if not NOISE.search(error)] == []


@pytest.fixture
def think(page: ComfyPage, server: ComfyServer) -> str:
    """Load think_and_draw, set to be quick, and empty the server's cache; return the id of its Think node."""
    server.post("/free", {"free_memory": True})
    return load(page, "think_and_draw")["Hunyuan3Think"]


def test_text_streams_and_stays(page: ComfyPage, think: str):
    page.js(WATCH, think)
    page.run()
    *during, last = page.js("() => window.hunyuan3Watch")
    texts = [text for text, _ in during]
    # It grew while it was written, with what was being done below it ...
    assert len(set(texts)) >= 3
    grown = [text for text in texts if text.startswith("Thinking")]
    # (but for a character of which only the first bytes were there)
    assert all(after.startswith(before.rstrip("\ufffd")) for before, after in pairwise(grown))
    assert any("thinking …" in status for _, status in during)
    # ... and stays, in sections, with nothing below it.
    assert last == [shown(page, think), ""]
    assert headings(page, think) == ["Thinking", "Size"]
    assert kept(page, think).startswith("<think>")
    # Once: the page's own widget for progress texts shows nothing.
    body = page.js(f"id => ({FIELD})(id).querySelector('p').textContent", think)
    piece = max(re.split(r"[\n<>]", body), key=len)  # the page would take what looks like a tag for one
    assert len(piece) > 20
    assert page.js(COUNT, piece) == 1
    # It goes neither to the server nor among the values.
    assert "hunyuan3_text" not in page.prompt()[think]["inputs"]
    saved = {str(node["id"]): node for node in page.serialized()["nodes"]}[think]
    assert body not in str(saved["widgets_values"])


def test_text_is_there_after_reload_save_and_load_and_copy(page: ComfyPage, think: str):
    page.run()
    text, whole = shown(page, think), kept(page, think)
    assert text
    seen = len(page.errors)
    reload(page)
    assert kept(page, think) == whole
    assert shown(page, think) == text
    assert [error for error in page.errors[seen:] if OURS.search(error) and not NOISE.search(error)] == []
    del page.errors[seen:]  # the page's own, as it starts
    page.load(page.serialized())
    assert shown(page, think) == text
    copy = page.js(COPY, think)
    assert copy != think
    assert shown(page, copy) == text


def test_new_image_seed_does_not_think_again(page: ComfyPage, think: str):
    page.run()
    text = shown(page, think)
    page.js(WATCH_NODES)
    (sampler,) = (id_ for id_, node in page.prompt().items() if node["class_type"] == "Hunyuan3Sampler")
    page.set_widget(sampler, "seed", 12345)
    page.run()
    seen = page.js("() => window.hunyuan3Nodes")
    assert think in seen["cached"]
    assert think not in seen["executing"]
    assert sampler in seen["executing"]
    assert shown(page, think) == text


def test_text_of_a_node_in_a_subgraph(page: ComfyPage, think: str):
    outer = page.js(TO_SUBGRAPH, think)
    page.run()
    inside = f"{outer}:{think}"
    assert shown(page, inside).startswith("Thinking")
    assert kept(page, inside).startswith("<think>")


def test_long_text_scrolls_and_follows_its_end(page: ComfyPage, think: str):
    before = page.boxes()[think]
    text = "<think>" + " ".join(f"word {number}" for number in range(2000))
    page.js(SEND, [think, "think", text])
    page.settle()
    box = page.js(MEASURE, think)
    assert box["scrollHeight"] > 2 * box["clientHeight"] > 100
    assert box["scrollTop"] + box["clientHeight"] >= box["scrollHeight"] - 2
    assert page.boxes()[think] == pytest.approx(before, abs=2)
    # A reader who scrolled back is left there.
    page.js(f"id => {{ ({FIELD})(id).scrollTop = 10 }}", think)
    page.js(SEND, [think, "think", f"{text} and more"])
    assert page.js(MEASURE, think)["scrollTop"] == 10


def test_stopped_run_leaves_what_was_written(page: ComfyPage, think: str):
    page.js(SEND, [think, "think", "<think>Half a thou"])
    assert page.js(STATUS, think) == "thinking …"
    page.js("() => app.api.dispatchCustomEvent('execution_interrupted', {prompt_id: '', node_id: '', executed: []})")
    assert page.js(STATUS, think) == ""
    assert shown(page, think) == "ThinkingHalf a thou"


def test_text_of_another_workflow_stays_away(page: ComfyPage, think: str):
    """Another workflow may have a node of the same number, and be the one that runs while this one is open."""
    page.js(SEND, [think, "think", "<think>ours"])
    for workflow, expected in (("another-id", "Thinkingours"), (page.js("() => app.graph.id"), "Thinkingtheirs")):
        event = {"node": think, "stage": "think", "text": "<think>theirs", "workflow": workflow}
        page.js("event => app.api.dispatchCustomEvent('hunyuan3.text', event)", event)
        assert shown(page, think) == expected
    output = {"text": ["<think>elsewhere"], "hunyuan3_workflow": ["another-id"]}
    page.js(f"([id, output]) => ({NODE})(id).onExecuted(output)", [think, output])
    assert kept(page, think) == "<think>theirs"
    # What the server sends names the workflow that was queued.
    page.run()
    assert kept(page, think) not in ("", "<think>theirs")


def test_answer_is_shown_on_ask(page: ComfyPage):
    page.clear()
    loader = page.add_node("Hunyuan3Loader", (0, 0))
    ask = page.add_node("Hunyuan3Ask", (450, 0))
    page.connect(loader, "model", ask, "model")
    page.set_widget(loader, "checkpoint", "HunyuanImage-3.0-Instruct")
    for name, value in {"prompt": f"What is a fox? nodes2={page.nodes2}", **WRITING}.items():
        page.set_widget(ask, name, value)
    page.settle()
    page.run()
    assert shown(page, ask)
    assert headings(page, ask) == [""]


@pytest.mark.parametrize("renderer", RENDERERS)
def test_without_our_script_the_page_shows_the_text_itself(server: ComfyServer, browser: Browser, renderer: str):
    from tools.comfy_page import ComfyPage

    server.post("/free", {"free_memory": True})
    with ComfyPage.open(_WithoutScripts(browser), server, nodes2=renderer == "nodes2") as page:
        seen = len(page.errors)
        think = load(page, "think_and_draw")["Hunyuan3Think"]
        assert not page.js("id => app.graph.getNodeById(id).widgets.some(w => w.name === 'hunyuan3_text')", think)
        page.js(WATCH_PREVIEW, think)
        page.run()
        texts = page.js("() => window.hunyuan3Watch")
        assert any(text.startswith("<think>") and len(text) > 20 for text in texts)
        assert page.widgets()[think]["sampling"] == "custom"
        assert [error for error in page.errors[seen:] if not NOISE.search(error)] == []


class _WithoutScripts:
    """A browser whose pages get an empty file for each script of this package."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def new_context(self, **options: Any) -> BrowserContext:
        context = self._browser.new_context(**options)
        context.route(f"**/extensions/{PACKAGE}/**", lambda route: route.fulfill(content_type="text/javascript"))
        return context


def load(page: ComfyPage, name: str) -> dict[str, str]:
    """Load a shipped workflow, set to be quick; return the ids of its nodes by class."""
    workflow = shipped.for_page(name)
    page.load(workflow)
    ids = {node["type"]: str(node["id"]) for node in workflow["nodes"]}
    for field, value in WRITING.items():
        page.set_widget(ids["Hunyuan3Think"], field, value)
    # The size that the tiny model chooses may be a large one: draw a small picture instead.
    page.js(DISCONNECT, [ids["Hunyuan3Conditioning"], ["width", "height"]])
    for field in ("width", "height"):
        page.set_widget(ids["Hunyuan3Conditioning"], field, 64)
    page.set_widget(ids["Hunyuan3Sampler"], "steps", 1)
    return ids


def reload(page: ComfyPage) -> None:
    """Reload the page, which then opens the workflow as it was."""
    from tools.comfy_page import RUN_BUTTON

    page.page.wait_for_timeout(1500)  # newer pages write their draft a moment later
    page.page.reload()
    page.page.wait_for_function(
        "() => window.app?.graph?._nodes?.some(node => /Think/.test(node.type))", timeout=90_000
    )
    page.page.wait_for_selector(RUN_BUTTON, timeout=30_000)
    page.settle()


def shown(page: ComfyPage, node_id: str) -> str:
    """Return what the field on a node shows, headings and all."""
    return page.js(
        f"id => [...({FIELD})(id).querySelectorAll('section')].map(part => part.textContent).join('')", node_id
    )


def headings(page: ComfyPage, node_id: str) -> list[str]:
    """Return the headings in the field on a node."""
    return page.js(f"id => [...({FIELD})(id).querySelectorAll('h4')].map(heading => heading.textContent)", node_id)


def kept(page: ComfyPage, node_id: str) -> str:
    """Return the text that is saved with a node."""
    return page.js(f"id => ({NODE})(id).properties.hunyuan3_text", node_id)


DISCONNECT = """([id, names]) => {
    const node = app.graph.getNodeById(id)
    for (const name of names) node.disconnectInput(node.findInputSlot(name))
}"""

NODE = """id => id.split(':').reduce((node, part) =>
    (node ? node.subgraph : app.graph).getNodeById(part), undefined)"""

FIELD = f"id => ({NODE})(id).widgets.find(widget => widget.name === 'hunyuan3_text').element"

STATUS = f"id => ({FIELD})(id).querySelector('.hunyuan3-status').textContent"

WATCH = f"""id => {{
    const field = ({FIELD})(id), seen = window.hunyuan3Watch = []
    const look = () => {{
        const text = [...field.querySelectorAll('section')].map(part => part.textContent).join('')
        const status = field.querySelector('.hunyuan3-status').textContent
        const [lastText, lastStatus] = seen.at(-1) ?? []
        if (text !== lastText || status !== lastStatus) seen.push([text, status])
    }}
    new MutationObserver(look).observe(field, {{childList: true, characterData: true, subtree: true}})
}}"""

WATCH_PREVIEW = f"""id => {{
    const node = ({NODE})(id), seen = window.hunyuan3Watch = []
    setInterval(() => {{
        const value = node.widgets.find(widget => widget.name === '$$node-text-preview')?.value
        if (value && value !== seen.at(-1)) seen.push(value)
    }}, 10)
}}"""

WATCH_NODES = """() => {
    const seen = window.hunyuan3Nodes = {cached: [], executing: []}
    app.api.addEventListener('execution_cached', event => seen.cached.push(...event.detail.nodes))
    app.api.addEventListener('executing', event => seen.executing.push(event.detail?.node ?? event.detail))
}"""

COUNT = """text => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    let count = 0
    while (walker.nextNode()) {
        count += walker.currentNode.data.includes(text) && walker.currentNode.parentElement.checkVisibility()
    }
    return count
}"""

COPY = """id => {
    const before = new Set(app.graph._nodes.map(node => node.id))
    app.canvas.copyToClipboard([app.graph.getNodeById(id)])
    app.canvas.pasteFromClipboard()
    return String(app.graph._nodes.find(node => !before.has(node.id)).id)
}"""

TO_SUBGRAPH = """id => String(app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)])).node.id)"""

SEND = "([node, stage, text]) => app.api.dispatchCustomEvent('hunyuan3.text', {node, stage, text})"

MEASURE = f"""id => {{
    const {{scrollTop, scrollHeight, clientHeight}} = ({FIELD})(id)
    return {{scrollTop, scrollHeight, clientHeight}}
}}"""
