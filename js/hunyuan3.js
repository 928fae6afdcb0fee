// Hunyuan Image 3 on ComfyUI's page: the text of Think and Ask appears on the node while it is written, stays there,
// and is saved with the workflow. Everything works without this file; the page then shows the text only during a run.
//
// The page imports every .js file of this folder. Only this one does anything then. (Not .mjs: ComfyUI has the browser
// ask for .js anew each time, but lets it keep an outdated .mjs.)

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { divertProgressText } from "./progress_text.js"
import { nodeOf } from "./lookup.js"
import { STAGES } from "./sections.js"
import { colorSockets } from "./socket_colors.js"
import { TextView } from "./text_view.js"

/** @typedef {Parameters<NonNullable<import("@comfyorg/comfyui-frontend-types").ComfyExtension["nodeCreated"]>>[0]} Node */
/** @typedef {{node: string, stage: string, text: string, workflow?: string | null}} TextEvent */
/**
 * What the published types leave out of a node.
 * @typedef {object} MoreOfNode
 * @property {(name: string, type: string, element: HTMLElement, options: DomWidgetOptions) => {serialize?: boolean}} addDOMWidget
 * @property {((output: {text?: unknown, hunyuan3_workflow?: unknown[]}) => void) | undefined} onExecuted
 */
/**
 * @typedef {object} DomWidgetOptions
 * @property {boolean} serialize
 * @property {boolean} hideOnZoom
 * @property {() => number} getMinHeight
 * @property {() => string} getValue
 * @property {(value: string) => void} setValue
 */

const NODES = new Set(["Hunyuan3Think", "Hunyuan3Ask"])
const NAME = "hunyuan3_text" // of the widget, and of the node's property that keeps the text
const MIN_HEIGHT = 160
const STATUS_LENGTH = 100

/** @type {WeakMap<Node, TextView>} */
const views = new WeakMap()
/** @type {Set<TextView>} Those that had something to show in this run. */
const busy = new Set()
let unsaved = false // a text that the page's own draft of the workflow does not have

app.registerExtension({
    name: "Hunyuan3.Text",

    init() {
        const link = document.createElement("link")
        link.rel = "stylesheet"
        link.href = new URL("hunyuan3.css", import.meta.url).href
        document.head.append(link)
        const server = /** @type {EventTarget} */ (api) // its own type lists ComfyUI's events only
        server.addEventListener("hunyuan3.text", event => onText(/** @type {CustomEvent<TextEvent>} */ (event).detail))
        for (const end of /** @type {const} */ (["execution_success", "execution_error", "execution_interrupted"])) {
            api.addEventListener(end, onEnd)
        }
    },

    setup: () => colorSockets(app),
    afterConfigureGraph: () => colorSockets(app),

    nodeCreated(node) {
        if (NODES.has(node.comfyClass ?? "")) addView(/** @type {Node & MoreOfNode} */ (node))
    },
})

/** @param {Node & MoreOfNode} node */
function addView(node) {
    const view = new TextView(MIN_HEIGHT, zoom)
    const widget = node.addDOMWidget(NAME, NAME, view.element, {
        serialize: false, // not to the server
        hideOnZoom: false,
        getMinHeight: () => MIN_HEIGHT,
        getValue: () => view.text,
        setValue() {}, // the page, too, sets values by position
    })
    widget.serialize = false // not among the saved values either, which go by position: saved as a property instead
    divertProgressText(node, text => {
        // What is long is a text on its way, which comes as an event of our own that says where it belongs.
        if (view.writing || text.length > STATUS_LENGTH || text.includes("\n")) return
        view.setStatus(text)
        busy.add(view)
    })

    const { onConfigure, onExecuted } = node
    node.onConfigure = function (data) {
        onConfigure?.call(this, data)
        view.show(String(this.properties[NAME] ?? ""))
    }
    node.onExecuted = function (output) {
        onExecuted?.call(this, output)
        if (!Array.isArray(output?.text) || !isOpen(output.hunyuan3_workflow?.[0])) return
        const text = output.text.join("\n")
        keep(this, text)
        view.end(text)
    }
    views.set(node, view)
}

/**
 * Let the canvas have a turn of the wheel, unless the page has seen to it.
 * @param {WheelEvent} event
 */
function zoom(event) {
    if (event.defaultPrevented) return
    event.preventDefault()
    app.canvas.processMouseWheel(event)
}

/**
 * Whether a text belongs to the workflow that is open: another one may have a node of the same number.
 * @param {unknown} workflow its id, if the server knows it
 */
function isOpen(workflow) {
    return !workflow || workflow === (app.rootGraph ?? app.graph).id
}

/** @param {TextEvent} event */
function onText({ node: id, stage, text, workflow }) {
    if (!isOpen(workflow)) return
    const node = nodeOf(app.rootGraph ?? app.graph, id)
    const view = node && views.get(node)
    if (!view) return
    keep(node, text)
    view.write(text, STAGES[stage] ?? stage)
    busy.add(view)
}

/** A run is over, one way or another: what was being written will not go on. */
function onEnd() {
    busy.forEach(view => view.end())
    busy.clear()
    if (unsaved) saveDraft()
    unsaved = false
}

/**
 * Save a text with the node.
 * @param {Node} node
 * @param {string} text
 */
function keep(node, text) {
    unsaved ||= text !== node.properties[NAME]
    node.properties[NAME] = text
}

/** Have the page see that the workflow has changed: a reload of the page, and Undo, then know the text. */
function saveDraft() {
    const tracker = app.extensionManager.workflow?.activeWorkflow?.changeTracker
    if (tracker?.captureCanvasState) tracker.captureCanvasState()
    else tracker?.checkState() // older pages
}
