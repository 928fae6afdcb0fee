"""Custom nodes for the tests: latents of every bad kind, and what the server's process holds.

Placed in a ComfyUI beside the package under test. Watches models by weak references only, so it keeps nothing alive.
"""

from __future__ import annotations

import weakref
from pathlib import Path

import psutil
import torch
from aiohttp import web
from server import PromptServer

_watched: dict[str, dict[str, weakref.ref]] = {}


class Watch:
    """Remembers a model, weakly, under a name; /hunyuan3_probe tells what has become of it."""

    CATEGORY = "tests"
    FUNCTION = "run"
    RETURN_TYPES = ("HUNYUAN3_MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("HUNYUAN3_MODEL",), "name": ("STRING",), "after": ("IMAGE",)}}

    OUTPUT_NODE = True

    def run(self, model, name, after):
        """`after`: anything that makes this run when the weights are there."""
        parts = {"transformer": model.transformer.placed, "vae": model.vae.placed}
        _watched[name] = {"handle": weakref.ref(model)}
        for part, placed in parts.items():
            _watched[name][part] = weakref.ref(placed.module)
            _watched[name][f"{part} weights"] = weakref.ref(next(placed.module.parameters()))
        return (model,)


class Latent:
    """A LATENT of any shape and content."""

    CATEGORY = "tests"
    FUNCTION = "run"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"shape": ("STRING",), "fill": ("STRING",), "seed": ("INT", {"default": 0})}}

    def run(self, shape, fill, seed):
        """`shape`: "1,16,8,8". `fill`: "noise", or a number that one value is set to ("nan", "inf")."""
        sides = [int(side) for side in shape.split(",")]
        samples = torch.randn(sides, generator=torch.Generator().manual_seed(seed))
        if fill != "noise":
            samples.view(-1)[samples.numel() // 2] = float(fill)
        return ({"samples": samples},)


class Number:
    """A number that no field of a page would take: past a node's limits, not finite."""

    CATEGORY = "tests"
    FUNCTION = "run"
    RETURN_TYPES = ("FLOAT",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"number": ("STRING",)}}

    def run(self, number):
        """A float; the server does not look at the values that come through links."""
        return (float(number),)


class Turns:
    """Who says what in a conversation, a line per message: role, then its words or the kind of its picture."""

    CATEGORY = "tests"
    FUNCTION = "run"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"conversation": ("HUNYUAN3_CONVERSATION",)}}

    def run(self, conversation):
        """A text in the history for each message."""
        said = [(message.role, message.content) for message in conversation.messages]
        lines = [f"{role}: {content if isinstance(content, str) else type(content).__name__}" for role, content in said]
        return {"ui": {"text": lines}}


@PromptServer.instance.routes.get("/hunyuan3_probe")
async def probe(_request):
    """Return which watched objects live, the process's memory (RSS) in bytes, its open files and threads."""
    alive = {name: {part: ref() is not None for part, ref in refs.items()} for name, refs in _watched.items()}
    process = psutil.Process()
    mapped = sorted({Path(entry.path).name for entry in process.memory_maps() if entry.path.endswith(".safetensors")})
    return web.json_response({"alive": alive, "rss": process.memory_info().rss, "mapped": mapped})


NODE_CLASS_MAPPINGS = {
    "Hunyuan3TestWatch": Watch,
    "Hunyuan3TestLatent": Latent,
    "Hunyuan3TestNumber": Number,
    "Hunyuan3TestTurns": Turns,
}
