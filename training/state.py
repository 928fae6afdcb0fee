"""Resume states: one file, written whole or not at all."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hunyuan3.errors import RequestError


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state of tensors and plain values; a run killed meanwhile leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    torch.save(dict(state), partial)
    os.replace(partial, path)  # noqa: PTH105 (atomic on every platform, unlike Path.rename)


def load_state(path: Path) -> dict[str, Any]:
    """Reads what `save_state` wrote; no code in it is executed. Raises RequestError for any other file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):  # whatever torch advises, code is not the way to read it
        raise RequestError(f"{path} is no state file of training.run.") from None
    if not isinstance(state, dict) or not {"name", "stage"} <= state.keys():
        raise RequestError(f"{path} is no state file of training.run.")
    return state


def compact(state: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's state small enough to be kept with the code: its averaged weights in bfloat16, no moments.

    A run goes on from it, though not to the bit: from the average, the moments from zero.
    """
    average = {name: tensor.to(torch.bfloat16) for name, tensor in state["optimiser"]["average"].items()}
    return {**state, "optimiser": {"average": average, "steps": 0}}
