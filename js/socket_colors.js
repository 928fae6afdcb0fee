// Colours of our sockets and links. A theme knows ComfyUI's own types only; hunyuan3.css has the same colours for the
// sockets of Nodes 2.0.

/** @type {Record<string, string>} */
export const COLORS = {
    HUNYUAN3_MODEL: "#b39ddb",
    HUNYUAN3_CONDITIONING: "#ffa931",
    HUNYUAN3_IMAGES: "#64b5f6",
    HUNYUAN3_CONVERSATION: "#6ee7b7",
    HUNYUAN3_STEP_CACHE: "#cdffcd",
}

/**
 * Give the canvas our colours. A change of the theme takes them away until the next workflow is loaded.
 * @param {import("@comfyorg/comfyui-frontend-types").ComfyApp} app
 */
export function colorSockets({ canvas }) {
    const { link_type_colors: links } = /** @type {{link_type_colors?: Record<string, string>}} */ (canvas.constructor)
    if (links) Object.assign(links, COLORS)
    Object.assign(canvas.default_connection_color_byType, COLORS)
}
