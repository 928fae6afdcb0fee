// What the model wrote, taken apart for reading. No page is needed here: `npm test` runs it.

/** @typedef {"thinking" | "rewritten" | "size" | "text"} Kind */
/** @typedef {{kind: Kind, text: string}} Section */

/** @type {Record<Kind, string>} What stands above a section. */
export const HEADINGS = { thinking: "Thinking", rewritten: "Rewritten prompt", size: "Size", text: "" }

/** @type {Record<string, string>} What a node is doing, by the stage that it reports. */
export const STAGES = {
    think: "thinking …",
    recaption: "rewriting the prompt …",
    ratio: "choosing the size …",
    answer: "answering …",
    done: "",
}

/** @type {Record<string, Kind>} */
const KINDS = { think: "thinking", recaption: "rewritten", answer: "text" }
const OPENING = /<(think|recaption|answer)>/
const SIZE = /^\d+x\d+( \([^)]*\))?$/

/**
 * Split a text at its tags: `<think>..</think>`, `<recaption>..</recaption>`, loose text, and the size at its end.
 *
 * A section goes on up to its own closing tag, any other tag in it is words; the last may be open, as it is while the
 * model writes. A section without words is left out, unless it is the open one.
 *
 * @param {string} text
 * @returns {Section[]}
 */
export function sectionsOf(text) {
    /** @type {Section[]} */
    const sections = []
    /** @param {Kind} kind @param {string} body */
    const add = (kind, body, open = false) => {
        if (body.trim() || open) sections.push({ kind, text: body.trim() })
    }
    let rest = text
    for (let tag = OPENING.exec(rest); tag; tag = OPENING.exec(rest)) {
        add("text", rest.slice(0, tag.index))
        const [body, ...after] = rest.slice(tag.index + tag[0].length).split(`</${tag[1]}>`)
        add(KINDS[tag[1]], body, after.length === 0)
        rest = after.join(`</${tag[1]}>`)
    }
    add("text", rest)
    const last = sections.at(-1)
    if (last?.kind === "text" && SIZE.test(last.text)) last.kind = "size"
    return sections
}
