import assert from "node:assert/strict"
import { test } from "node:test"

import { nodeOf } from "../../js/lookup.js"

/** @param {Record<string, object>} nodes */
const graph = nodes => ({ getNodeById: /** @param {string} id */ id => nodes[id] ?? null })
const inner = { name: "inner" }
const root = graph({ 7: { name: "outer" }, 12: { name: "group", subgraph: graph({ 7: inner }) } })

test("a node of the root graph", () => assert.deepEqual(nodeOf(root, "7"), { name: "outer" }))
test("a node of a subgraph", () => assert.equal(nodeOf(root, "12:7"), inner))
for (const id of ["8", "12:8", "8:7", "7:7", ""]) {
    test(`no node for "${id}"`, () => assert.equal(nodeOf(root, id), undefined))
}
