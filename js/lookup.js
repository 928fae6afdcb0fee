// From the id in a server's message to the node on the page. No page is needed here: `npm test` runs it.

/**
 * @template N
 * @typedef {{getNodeById(id: string): N | null}} Graph
 */

/**
 * Find the node of an id such as "7", or "12:7" for node 7 in the subgraph of node 12.
 *
 * @template {object} N
 * @param {Graph<N>} root
 * @param {string} id
 * @returns {N | undefined}
 */
export function nodeOf(root, id) {
    /** @type {Graph<N> | undefined} */
    let graph = root
    /** @type {N | undefined} */
    let node
    for (const part of id.split(":")) {
        node = graph?.getNodeById(part) ?? undefined
        graph = /** @type {{subgraph?: Graph<N>} | undefined} */ (node)?.subgraph
    }
    return node
}
