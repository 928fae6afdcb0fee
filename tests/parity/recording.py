"""One recording of the reference: `NAME.json` and `NAME.safetensors`, either of which may be absent."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class MissingFeatureError(Exception):
    """The recording needs something that this package, or this folder, does not have; the message names it."""


class Recording:
    """A recording and what was read of it.

    `meta` is the json, `tensors` the safetensors. Whoever computes asks for its inputs with `input` and `setting`:
    what nobody asked for and nobody computed is reported, so that nothing recorded is silently ignored.
    """

    def __init__(self, name: str, meta: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.name = name
        self.meta = meta
        self.tensors = tensors
        self.inputs: set[str] = set()
        self.settings: set[str] = set()

    @classmethod
    def read(cls, folder: Path, name: str) -> "Recording":
        """Reads `folder/name.json` and `folder/name.safetensors`."""
        meta, tensors = folder / f"{name}.json", folder / f"{name}.safetensors"
        return cls(
            name,
            json.loads(meta.read_text(encoding="utf-8")) if meta.is_file() else {},
            load_file(tensors) if tensors.is_file() else {},
        )

    def input(self, key: str) -> torch.Tensor:
        """A recorded tensor that the computation starts from."""
        if key not in self.tensors:
            raise MissingFeatureError(f"the recording lacks its own input {key}")
        self.inputs.add(key)
        return self.tensors[key]

    def setting(self, key: str, *default: Any) -> Any:
        """A value of the json that the computation starts from."""
        self.settings.add(key)
        if key not in self.meta and not default:
            raise MissingFeatureError(f"the recording lacks its own setting {key}")
        return self.meta.get(key, *default)

    def matching(self, pattern: str) -> list[re.Match[str]]:
        """Tensor keys that match as a whole, each group of equal captures once, in natural order."""
        found = {}
        for key in sorted(self.tensors, key=_natural):
            if match := re.fullmatch(pattern, key):
                found.setdefault(match.groups() or key, match)
        return list(found.values())

    def not_computed(self, computed: set[str]) -> list[str]:
        """Tensor keys that are neither inputs nor computed."""
        return [key for key in self.tensors if key not in self.inputs and key not in computed]

    def not_read(self) -> list[str]:
        """Keys of the json that nobody asked for."""
        return [key for key in self.meta if key not in self.settings]


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", key) if part]
