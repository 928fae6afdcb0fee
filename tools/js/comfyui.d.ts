// The modules of ComfyUI's page that js/ imports, for the type check. At run time the page serves them.

declare module "*/scripts/app.js" {
    import type { ComfyApp } from "@comfyorg/comfyui-frontend-types"
    export const app: ComfyApp
}

declare module "*/scripts/api.js" {
    import type { ComfyApi } from "@comfyorg/comfyui-frontend-types"
    export const api: ComfyApi
}
