import assert from "node:assert/strict"
import { test } from "node:test"

import { sectionsOf } from "../../js/sections.js"

/** @type {[string, string, [string, string][]][]} */
const CASES = [
    ["nothing", "", []],
    ["an answer", " A fox.\n\nIt sleeps. ", [["text", "A fox.\n\nIt sleeps."]]],
    ["a tag that was just opened", "<think>", [["thinking", ""]]],
    ["thinking that goes on", "<think>A fox, so", [["thinking", "A fox, so"]]],
    ["what stands between a tag that closes and the next", "<think>A</think>", [["thinking", "A"]]],
    ["the rewrite begins", "<think>A</think><recaption>", [["thinking", "A"], ["rewritten", ""]]],
    ["without a thought", "<think>\n</think><recaption>B</recaption>", [["rewritten", "B"]]],
    [
        "all of it",
        "<think>A\n\n1. a</think><recaption>B</recaption>\n\n1024x768",
        [["thinking", "A\n\n1. a"], ["rewritten", "B"], ["size", "1024x768"]],
    ],
    [
        "cut off",
        "<think>A</think>\n\n256x256 (cut off by max_new_tokens: raise it for the whole text)",
        [["thinking", "A"], ["size", "256x256 (cut off by max_new_tokens: raise it for the whole text)"]],
    ],
    ["only the size", "1280x720", [["size", "1280x720"]]],
    ["a size within an answer", "It is 1280x720 large.", [["text", "It is 1280x720 large."]]],
    ["other tags are words", "<b>x</b> <img>", [["text", "<b>x</b> <img>"]]],
    ["a tag within thinking", "<think>A<think>B<recaption>C</think>D", [["thinking", "A<think>B<recaption>C"], ["text", "D"]]],
    ["a closing tag of nothing", "A</think>B", [["text", "A</think>B"]]],
    ["tags around an answer", "<answer>yes</answer>", [["text", "yes"]]],
    ["loose words", "x<think>A</think>y", [["text", "x"], ["thinking", "A"], ["text", "y"]]],
]

for (const [name, text, sections] of CASES) {
    test(name, () => assert.deepEqual(sectionsOf(text).map(({ kind, text }) => [kind, text]), sections))
}

test("every beginning of a text can be shown", () => {
    const text = "<think>one</think><recaption>two</recaption>\n\n1024x768"
    for (let end = 0; end <= text.length; end++) {
        const kinds = sectionsOf(text.slice(0, end)).map(({ kind }) => kind)
        assert.ok(kinds.length <= 3, text.slice(0, end))
    }
})
