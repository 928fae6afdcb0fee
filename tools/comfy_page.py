"""ComfyUI's page in a real browser, as a user has it: opens it, adds nodes, loads a workflow, presses Run, looks.

    with open_browser(find_browser()) as browser, ComfyPage.open(browser, server, nodes2=True) as page:
        page.load(json.loads(path.read_text()))
        page.run()
        page.screenshot(Path("graph.png"))

`nodes2` chooses the page's renderer: Nodes 2.0 (each node is HTML) or the canvas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Browser, ConsoleMessage, Error, Page, sync_playwright

from tools.comfy_server import ComfyServer

# No sandbox: root may not use it, and the page is ComfyUI's own. The rest keeps the browser from calling anywhere.
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking")
ARGUMENTS += ("--disable-component-update", "--disable-sync", "--no-first-run", "--force-device-scale-factor=1")
VIEW = {"width": 1920, "height": 1080}
WIDE = {"width": 3000, "height": 1500}
RUN_BUTTON = '[data-testid="queue-button"]'

Json = Any


class PageError(Exception):
    """A run on the page failed; the message is what the server or the page said."""


class Box(NamedTuple):
    """Where a node is on the screen, in pixels, its title included."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass
class ComfyPage:
    """One open page. `errors` grows by what the page reports as an error, with the file that it came from."""

    page: Page
    server: ComfyServer
    nodes2: bool
    errors: list[str] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def open(cls, browser: Browser, server: ComfyServer, *, nodes2: bool, wide: bool = False) -> Iterator[ComfyPage]:
        """Open the page afresh (no cookies, no last workflow) and wait until it can be used.

        `wide`: in a window that shows a whole workflow large enough to be read.
        """
        # Settings live on the server; the page opens with them as it does for a user who chose so.
        settings = {
            "Comfy.VueNodes.Enabled": nodes2,
            "Comfy.TutorialCompleted": True,  # else the templates' dialog covers the page
            "Comfy.Minimap.Visible": False,
            "Comfy.Graph.CanvasInfo": False,
            "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0 if wide else 0.6,
            "LiteGraph.Canvas.MinFontSizeForLOD": 0 if wide else 8,
        }
        server.post("/settings", settings)
        context = browser.new_context(viewport=WIDE if wide else VIEW, locale="en-US")
        with contextlib.closing(context):
            context.add_init_script(_NO_ADVERTISEMENTS)
            self = cls(context.new_page(), server, nodes2)
            self.page.on("console", self._heard)
            self.page.on("pageerror", lambda error: self.errors.append(_text_of(error)))
            self.page.goto(server.url)
            self.page.wait_for_function(_IS_READY, timeout=90_000)
            self.page.wait_for_selector(RUN_BUTTON, timeout=30_000)
            yield self

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(f"{message.location.get('url', '')}: {message.text}")

    def js(self, code: str, argument: Json = None) -> Json:
        """Evaluate JavaScript in the page: an expression, or a function that is called with `argument`."""
        return self.page.evaluate(code, argument)

    # --- the graph ----------------------------------------------------------------------------------------------

    def add_node(self, class_type: str, at: tuple[float, float]) -> str:
        """Add a node with its defaults, as the node library does, and return its id."""
        return self.js(_ADD_NODE, [class_type, list(at)])

    def connect(self, source: str, output: str, target: str, name: str) -> None:
        """Wire an output to an input, both by the names that the page shows."""
        self.js(_CONNECT, [source, output, target, name])

    def set_widget(self, node_id: str, name: str, value: Json) -> None:
        """Put a value into a node's field."""
        self.js(_SET_WIDGET, [node_id, name, value])

    def clear(self) -> None:
        """Remove everything from the graph."""
        self.js("() => app.graph.clear()")

    def load(self, workflow: Json) -> None:
        """Load a workflow in the page's format, as dropping its file on the page does, and show all of it."""
        self.js(_LOAD, workflow)
        self.settle()

    def settle(self) -> None:
        """Fit the graph into the window and wait until it is drawn."""
        self.js(_SETTLE)

    def serialized(self) -> Json:
        """Return the graph in the page's format, as saving it does."""
        return self.js("() => app.graph.serialize()")

    def prompt(self) -> Json:
        """Return the graph in the API format, as the page sends it to the server."""
        return self.js("async () => (await app.graphToPrompt()).output")

    def widgets(self) -> dict[str, dict[str, Json]]:
        """Return what the fields hold: node id -> name -> value."""
        return self.js(_WIDGETS)

    def boxes(self) -> dict[str, Box]:
        """Return where the nodes are drawn: node id -> box."""
        return {key: Box(*sides) for key, sides in self.js(_BOXES, self.nodes2).items()}

    # --- runs ---------------------------------------------------------------------------------------------------

    def run(self, *, timeout: float = 120.0) -> None:
        """Press Run and wait for the end. Raises PageError with what went wrong."""
        self.js(_WATCH_RUN)
        self.page.click(RUN_BUTTON)
        try:
            self.page.wait_for_function("() => !!window.hunyuan3Run.end", timeout=1000 * timeout)
        except Error:
            text = self.js("() => document.body.innerText")
            raise PageError(
                f"No end within {timeout:.0f} s. The page shows:\n{text}\n{self.server.log_tail(20)}"
            ) from None
        end = self.js("() => window.hunyuan3Run.end")
        if end["type"] != "execution_success":
            raise PageError(f"{end['type']}: {end['detail']}")
        self.settle()

    def pictures(self, node_id: str) -> list[dict[str, int]]:
        """Return width and height of every picture that a node shows, waiting until they are loaded."""
        code = _PICTURES_IN_HTML if self.nodes2 else _PICTURES_ON_CANVAS
        handle = self.page.wait_for_function(code, arg=node_id, timeout=20_000)
        return handle.json_value()

    def wait_for_text(self, text: str) -> None:
        """Wait until the page shows a text, in a dialog for example."""
        self.page.get_by_text(text).first.wait_for(state="visible", timeout=15_000)

    def screenshot(self, path: Path, *, around_nodes: bool = False) -> Path:
        """Write what the page shows; with `around_nodes` only the part of it with the graph, without the menus."""
        clip = None
        if around_nodes:
            boxes, margin = self.boxes().values(), 32
            left, top = (min(box[i] for box in boxes) - margin for i in (0, 1))
            right, bottom = (max(box[i] for box in boxes) + margin for i in (2, 3))
            clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path, clip=clip)
        return path


@contextlib.contextmanager
def open_browser(program: Path) -> Iterator[Browser]:
    """Start the browser, without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        with contextlib.closing(browser):
            yield browser


def _text_of(error: Error) -> str:
    return error.stack or str(error)


_NO_ADVERTISEMENTS = "localStorage.setItem('vueNodesBannerDismissed', 'true')"

_IS_READY = """() => !!(window.app?.graph && window.app.canvas && window.app.extensionManager?.setting
    && window.LiteGraph?.registered_node_types?.SaveImage)"""

_ADD_NODE = """([type, at]) => {
    const node = LiteGraph.createNode(type)
    if (!node) throw new Error(`the page does not know ${type}`)
    node.pos = at
    app.graph.add(node)
    return String(node.id)
}"""

_CONNECT = """([source, output, target, input]) => {
    const [from, to] = [app.graph.getNodeById(source), app.graph.getNodeById(target)]
    const [out, into] = [from.findOutputSlot(output), to.findInputSlot(input)]
    if (out < 0 || into < 0) throw new Error(`no ${out < 0 ? output : input} to connect`)
    if (!from.connect(out, to, into)) throw new Error(`${output} cannot be connected to ${input}`)
}"""

_SET_WIDGET = """([id, name, value]) => {
    const node = app.graph.getNodeById(id)
    const widget = node.widgets.find(widget => widget.name === name)
    widget.value = value
    widget.callback?.(value, app.canvas, node)
}"""

_WIDGETS = """() => Object.fromEntries(app.graph._nodes.map(node =>
    [node.id, Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value]))]))"""

# First as in a fresh window: Nodes 2.0 of 1.32.9 spreads a loaded graph by a factor that depends on the zoom before.
_LOAD = """async workflow => {
    app.canvas.ds.reset()
    await app.loadGraphData(workflow)
}"""

_SETTLE = """async () => {
    const frames = count => new Promise(done => {
        const next = () => count-- > 0 ? requestAnimationFrame(next) : done()
        next()
    })
    await frames(5)
    const boxes = app.graph._nodes.map(node => node.boundingRect)
    const left = Math.min(...boxes.map(box => box[0])), right = Math.max(...boxes.map(box => box[0] + box[2]))
    const top = Math.min(...boxes.map(box => box[1])), bottom = Math.max(...boxes.map(box => box[1] + box[3]))
    // The part of the window that no menu covers.
    const [x, y, width, height] = [90, 150, window.innerWidth - 120, window.innerHeight - 220]
    const view = app.canvas.ds
    view.scale = Math.min(1, width / (right - left), height / (bottom - top))
    view.offset[0] = x / view.scale - left
    view.offset[1] = y / view.scale - top
    app.canvas.setDirty(true, true)
    await frames(10)
}"""

_BOXES = """nodes2 => Object.fromEntries(app.graph._nodes.map(node => {
    if (nodes2) {
        const box = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect()
        return [node.id, [box.left, box.top, box.right, box.bottom]]
    }
    const [x, y, width, height] = node.boundingRect
    const {scale, offset} = app.canvas.ds
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const left = canvas.left + (x + offset[0]) * scale, top = canvas.top + (y + offset[1]) * scale
    return [node.id, [left, top, left + width * scale, top + height * scale]]
}))"""

_WATCH_RUN = """() => {
    const run = window.hunyuan3Run = {end: null}
    for (const type of ['execution_success', 'execution_error', 'execution_interrupted']) {
        const end = event => { run.end ??= {type, detail: JSON.stringify(event.detail)} }
        app.api.addEventListener(type, end, {once: true})
    }
}"""

_PICTURES_ON_CANVAS = """id => {
    const images = app.graph.getNodeById(id).imgs ?? []
    return images.length && images.every(image => image.naturalWidth)
        && images.map(image => ({width: image.naturalWidth, height: image.naturalHeight}))
}"""

_PICTURES_IN_HTML = """id => {
    const images = [...document.querySelectorAll(`[data-node-id="${id}"] img`)]
    return images.length && images.every(image => image.naturalWidth)
        && images.map(image => ({width: image.naturalWidth, height: image.naturalHeight}))
}"""
