"""Custom nodes for the tests: latents of every bad kind, and what the server's process holds.

Placed in a ComfyUI beside the package under test. Watches models by weak references only, so it keeps nothing alive.
"""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import ClassVar

import comfy.model_management
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


class Rows:
    """What a conditioning lays out: the conditional row as text, without picture tokens; how its pictures are drawn."""

    CATEGORY = "tests"
    FUNCTION = "run"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("HUNYUAN3_MODEL",), "conditioning": ("HUNYUAN3_CONDITIONING",)}}

    def run(self, model, conditioning):
        """Text, posterior and sizes of the pictures."""
        folder = model.model.folder
        ids = [token for token in conditioning.rows.sequence.ids if token != folder.tokens.img]
        sizes = [f"{picture.size.width}x{picture.size.height}" for picture in conditioning.pictures]
        return {"ui": {"text": [folder.tokenizer.decode(ids), conditioning.posterior, *sizes]}}


class Count:
    """Counts the tokens that go through the first layer, and can press Cancel after so many calls of any layer."""

    CATEGORY = "tests"
    FUNCTION = "run"
    RETURN_TYPES = ("HUNYUAN3_MODEL",)
    counts: ClassVar = {"tokens": 0, "calls": 0, "after_cancel": 0}

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("HUNYUAN3_MODEL",), "cancel_after": ("INT", {"default": 0, "max": 10**9})}}

    def run(self, model, cancel_after):
        """The model, watched from now on; the counts begin anew."""
        counts = Count.counts
        counts.update(tokens=0, calls=0, after_cancel=0)
        layers = model.transformer.placed.module.layers

        def before(layer, arguments):
            if layer is layers[0]:
                counts["tokens"] += arguments[0].shape[0] * arguments[0].shape[1]
            counts["after_cancel"] += bool(cancel_after) and counts["calls"] >= cancel_after
            counts["calls"] += 1
            if counts["calls"] == cancel_after:
                comfy.model_management.interrupt_current_processing()

        for layer in layers:
            layer._forward_pre_hooks.clear()
            layer.register_forward_pre_hook(before)
        return (model,)


@PromptServer.instance.routes.get("/hunyuan3_probe")
async def probe(_request):
    """Return which watched objects live, the process's memory (RSS) in bytes, its open files and threads."""
    alive = {name: {part: ref() is not None for part, ref in refs.items()} for name, refs in _watched.items()}
    process = psutil.Process()
    mapped = sorted({Path(entry.path).name for entry in process.memory_maps() if entry.path.endswith(".safetensors")})
    told = {"alive": alive, "rss": process.memory_info().rss, "mapped": mapped, "counts": Count.counts}
    told["kept"] = {
        name: [handle.model.prefixes.nbytes, handle.transformer.loaded_size() - handle.transformer.placed.loaded_bytes]
        for name, refs in _watched.items()
        if (handle := refs["handle"]()) is not None
    }
    return web.json_response(told)


@PromptServer.instance.routes.post("/hunyuan3_probe/fault")
async def fault(request):
    """Memory runs out in the next `times` calls of `at`, a "module:Class.method" of the package under test."""
    told = await request.json()
    module, _, path = told["at"].partition(":")
    owner, _, method = path.rpartition(".")
    (found,) = [value for name, value in sys.modules.items() if name.endswith(f".{module}")]
    owner = getattr(found, owner)
    original = getattr(owner, method)
    left = told["times"]

    def failing(*args, **kwargs):
        nonlocal left
        if left == 0:
            setattr(owner, method, original)
            return original(*args, **kwargs)
        left -= 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB. GPU 0 has a total capacity of")

    setattr(owner, method, failing)
    return web.json_response({})


NODE_CLASS_MAPPINGS = {
    "Hunyuan3TestWatch": Watch,
    "Hunyuan3TestLatent": Latent,
    "Hunyuan3TestNumber": Number,
    "Hunyuan3TestTurns": Turns,
    "Hunyuan3TestRows": Rows,
    "Hunyuan3TestCount": Count,
}
