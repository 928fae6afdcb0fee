"""A folder of recordings with its checkpoints, each opened and loaded once, in float32 on the CPU."""

import json
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path

import torch

from hunyuan3.folder import ModelFolder
from hunyuan3.parts import LoadOptions
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.placement.placed import PlacedModule
from hunyuan3.placement.split import halves

from .recording import MissingFeatureError, Recording


class Bench:
    """`root` holds `ckpt/`, `scenarios/`, `components/`, `images/` and `router_gaps.json`, or some of them."""

    def __init__(
        self,
        root: Path,
        dumping: bool = False,
        weight_format: str = "bf16",
        streaming: int = 0,
        split: bool = False,
    ) -> None:
        self.root = root
        self.weight_format = weight_format
        self.streaming = streaming
        self.split = split
        self.dumping = dumping  # compute also what this recording lacks, as far as a complete one would hold it
        self.folder = cache(self._folder)
        self.model = cache(self._model)

    def names(self, kind: str) -> list[str]:
        """Recordings of a kind ("scenarios" or "components")."""
        files = [*self.root.glob(f"{kind}/*.json"), *self.root.glob(f"{kind}/*.safetensors")]
        return sorted({file.stem for file in files})

    def read(self, kind: str, name: str) -> Recording:
        return Recording.read(self.root / kind, name)

    def image(self, name: str) -> Path | None:
        """An input picture, None where the folder lacks it."""
        path = self.root / "images" / name
        return path if path.is_file() else None

    @cached_property
    def router_gaps(self) -> dict[str, float]:
        """Scenario -> smallest distance between a chosen and a rejected expert's logit."""
        path = self.root / "router_gaps.json"
        if not path.is_file():
            return {}
        return {name: row["min_gap"] for name, row in json.loads(path.read_text(encoding="utf-8")).items()}

    def checkpoint_of(self, variant: str, preferred: str) -> str:
        """The checkpoint of that name, else one of that variant. Raises MissingFeatureError if there is neither."""
        if (self.root / "ckpt" / preferred).is_dir():
            return preferred
        for path in sorted(self.root.glob("ckpt/*/config.json")):
            if self.folder(path.parent.name).variant == variant:
                return path.parent.name
        raise MissingFeatureError(f"the folder has no {variant} checkpoint")

    def any_checkpoint(self) -> str:
        """The Instruct checkpoint, else the first one: for recordings that name none."""
        try:
            return self.checkpoint_of("instruct", "tiny-instruct")
        except MissingFeatureError:
            names = sorted(path.parent.name for path in self.root.glob("ckpt/*/config.json"))
            if not names:
                raise MissingFeatureError("the folder has no checkpoint") from None
            return names[0]

    def _folder(self, name: str) -> ModelFolder:
        if not (self.root / "ckpt" / name).is_dir():
            raise MissingFeatureError(f"the folder has no checkpoint {name}")
        return ModelFolder.open(self.root / "ckpt" / name)

    def _model(self, name: str, dtype: str = "float32") -> Hunyuan3:
        options = LoadOptions(device="cpu", dtype=dtype, vae_dtype="float32", format=self.weight_format)
        # cpu:0 and cpu:1 stand in for cards: to all that compares devices they are others than the host's cpu.
        if self.split:
            layers = self.folder(name).config.num_layers
            options = replace(
                options, device="auto", split=halves([torch.device("cpu", 0), torch.device("cpu", 1)], layers)
            )
        if self.streaming:
            options = replace(options, streaming=self.streaming)
            if not self.split:
                options = replace(options, device="cpu:0")
            placed = Hunyuan3(self.folder(name), options.resolved()).placed_transformer
            options = replace(options, vram={device: _a_third(placed, device) for device in placed.devices})
        return Hunyuan3(self.folder(name), options.resolved())


def _a_third(placed: PlacedModule, device: torch.device) -> int:
    """Bytes in which a third of a device's experts stay there."""
    required = placed.required_on(device)
    return required + placed.full_ring_on(device) + (placed.total_on(device) - required) // 3
