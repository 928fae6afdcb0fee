"""Prompts in the API format for the tests of single behaviours; nodes are called by what they do."""

from __future__ import annotations

from typing import Any

from tools.comfy_server import Prompt


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """One node of a prompt."""
    return {"class_type": class_type, "inputs": inputs}


def drawing(
    checkpoint: str = "tiny-instruct",
    *,
    loader: dict[str, Any] | None = None,
    conditioning: dict[str, Any] | None = None,
    sampler: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
) -> Prompt:
    """A small picture in two steps, from the loader to PreviewImage; the arguments add to the nodes' inputs."""
    return {
        "loader": node("Hunyuan3Loader", checkpoint=checkpoint, **(loader or {})),
        "conditioning": node(
            "Hunyuan3Conditioning",
            **{"model": ["loader", 0], "prompt": "a red fox", "width": 128, "height": 64, **(conditioning or {})},
        ),
        "sampler": node(
            "Hunyuan3Sampler",
            **{
                "model": ["loader", 0],
                "conditioning": ["conditioning", 0],
                "seed": 1,
                "steps": 2,
                "guidance": 0.0,
                "shift": 0.0,
                "batch_size": 1,
                "noise": "comfy",
                **(sampler or {}),
            },
        ),
        "decode": node("Hunyuan3VAEDecode", **{"model": ["loader", 0], "samples": ["sampler", 0], **(decode or {})}),
        "show": node("PreviewImage", images=["decode", 0]),
    }


def decoding(latent: dict[str, Any], *, checkpoint: str = "tiny-instruct", **decode: Any) -> Prompt:
    """Decodes what the node `latent` gives, from the loader to PreviewImage."""
    return {
        "loader": node("Hunyuan3Loader", checkpoint=checkpoint),
        "latent": latent,
        "decode": node("Hunyuan3VAEDecode", model=["loader", 0], samples=["latent", 0], **decode),
        "show": node("PreviewImage", images=["decode", 0]),
    }
