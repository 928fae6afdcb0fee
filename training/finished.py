"""A finished checkpoint folder as the state that a stage begins with."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from hunyuan3.errors import RequestError
from hunyuan3.pipeline import Hunyuan3

from .state import load_state


def start_of(path: Path) -> dict[str, Any]:
    """What a stage takes from the one before: its state file, or the folder that was exported from it.

    Raises RequestError for the state of a stage that is not over.
    """
    if path.is_dir():
        return state_of_folder(path)
    saved = load_state(path)
    done, length = saved["stage"]["done"], saved.get("steps", 0)
    if done < length:
        raise RequestError(f"{path} is at step {done} of {length}: finish that stage first.")
    return saved["stage"]


def vae_of(path: Path) -> dict[str, torch.Tensor]:
    """The averaged weights that the VAE's stage ended with, those of a `FlatVAE`. Raises as `start_of` does."""
    name = load_state(path)["name"]
    if name != "vae":
        raise RequestError(f"{path} is a state of the stage {name!r}, not of 'vae'; name that one, or a folder.")
    return start_of(path)["optimiser"]["average"]


def state_of_folder(folder: Path) -> dict[str, Any]:
    """The averaged weights that a folder holds (rounded to bfloat16 as they are there), its vocabulary and its VAE.

    Keys as those that `TransformerStage.start_from` and its constructor read. Raises the package's errors for a folder
    that is none.
    """
    model = Hunyuan3.open(folder, device="cpu", dtype="float32", vae_dtype="float32")
    vae = model.folder.config.vae
    seeing = {f"vision.{name}": tensor for name, tensor in model.vision().state_dict().items()}
    return {
        "tokenizer": Tokenizer.from_file(str(folder / "tokenizer.json")).to_str(),
        "distilled": model.folder.config.cfg_distilled,
        "scaling": [vae.shift_factor or 0.0, vae.scaling_factor],
        "vae": {name: _flat(tensor) for name, tensor in model.vae().state_dict().items()},
        "optimiser": {"average": {**model.transformer().state_dict(), **seeing}},
    }


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The middle temporal tap of a kernel; anything else as it is."""
    return tensor[:, :, tensor.shape[2] // 2].clone() if tensor.ndim == 5 else tensor
