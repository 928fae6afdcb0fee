// The page draws the progress text of a running node by itself, in a widget that it adds for it. On a node with a field
// of ours that would be the same text twice: here the page finds its widget already there, unseen, and what it writes
// to it goes to our field.

/** @typedef {Parameters<NonNullable<import("@comfyorg/comfyui-frontend-types").ComfyExtension["nodeCreated"]>>[0]} Node */

const NAME = "$$node-text-preview" // by this name the page looks for it

/**
 * @param {Node} node
 * @param {(text: string) => void} onText called with each progress text
 */
export function divertProgressText(node, onText) {
    const widget = node.addCustomWidget({
        name: NAME,
        type: "hidden",
        value: "",
        y: 0,
        hidden: true,
        serialize: false,
        options: { hidden: true, canvasOnly: true, serialize: false },
        /** @returns {[number, number]} no room at all: 4 is the gap between two widgets */
        computeSize: () => [0, -4],
        draw() {},
    })
    let value = ""
    Object.defineProperty(widget, "value", {
        get: () => value,
        set(text) {
            value = String(text ?? "")
            onText(value)
        },
    })
    // Newer pages remove it after a run. It is back before the next one.
    Object.assign(widget, {
        onRemove: () =>
            setTimeout(() => {
                const there = node.widgets?.some(({ name }) => name === NAME)
                if (node.graph && !there) divertProgressText(node, onText)
            }),
    })
}
