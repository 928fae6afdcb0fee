// The field on a node in which the model's text appears while it is written, and stays.

import { HEADINGS, sectionsOf } from "./sections.js"

const NEAR_THE_END = 30 // pixels

/** One field: sections with headings, a line with what is being done, a scroll bar. */
export class TextView {
    /** @type {HTMLElement} */
    element = document.createElement("div")
    /** The text shown, tags and all. */
    text = ""
    /** Whether text is being written. */
    writing = false
    #body = document.createElement("div")
    #status = document.createElement("div")

    /**
     * @param {number} minHeight pixels; Nodes 2.0 asks the element itself, not the widget
     * @param {(event: WheelEvent) => void} zoom takes a turn of the wheel that is not for the text
     */
    constructor(minHeight, zoom) {
        this.element.className = "hunyuan3-text widget-expands" // the latter: room as for a text area, in Nodes 2.0
        this.element.style.minHeight = `${minHeight}px`
        this.element.tabIndex = 0 // so that keys can scroll it
        this.element.dataset.captureWheel = "true" // Nodes 2.0 would zoom; newer pages do unless it was clicked
        this.#status.className = "hunyuan3-status"
        this.element.append(this.#body, this.#status)
        // A drag in here selects text and moves no node; a copy is of that text, not of the selected nodes.
        for (const type of ["pointerdown", "pointermove", "mousedown", "copy"]) {
            this.element.addEventListener(type, event => event.stopPropagation())
        }
        this.element.addEventListener("wheel", event => {
            const { scrollHeight, clientHeight } = this.element
            if (!event.ctrlKey && scrollHeight > clientHeight) event.stopPropagation()
            else zoom(event)
        })
    }

    /**
     * Show the text as far as it is written; follows its end unless the reader has scrolled away from it.
     * @param {string} text
     * @param {string} status what is being done
     */
    write(text, status) {
        const { scrollTop, clientHeight, scrollHeight } = this.element
        const follow = !this.writing || scrollTop + clientHeight > scrollHeight - NEAR_THE_END
        this.writing = true
        this.show(text)
        this.setStatus(status)
        if (follow) this.element.scrollTop = this.element.scrollHeight
    }

    /**
     * The text is whole, or will not go on.
     * @param {string} text
     */
    end(text = this.text) {
        this.writing = false
        this.setStatus("")
        if (text !== this.text) this.show(text)
    }

    /** @param {string} status what is being done, "" for nothing */
    setStatus(status) {
        this.#status.textContent = status
    }

    /** @param {string} text */
    show(text) {
        this.text = text
        const sections = sectionsOf(text)
        while (this.#body.children.length > sections.length) this.#body.lastElementChild?.remove()
        sections.forEach((section, index) => {
            const part = this.#body.children[index] ?? this.#body.appendChild(emptyPart())
            const [heading, body] = part.children
            setText(heading, HEADINGS[section.kind])
            setText(body, section.text)
        })
    }
}

/** @returns {HTMLElement} */
function emptyPart() {
    const part = document.createElement("section")
    part.append(document.createElement("h4"), document.createElement("p"))
    return part
}

/**
 * Change an element's text; one that only grew keeps what the reader has selected in it.
 * @param {Element} element
 * @param {string} text
 */
function setText(element, text) {
    const node = element.firstChild
    if (node instanceof Text && node.data && text.startsWith(node.data)) {
        if (text.length > node.data.length) node.appendData(text.slice(node.data.length))
    } else {
        element.textContent = text
    }
}
