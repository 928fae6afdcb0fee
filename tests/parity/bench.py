"""A folder of recordings with its checkpoints, each opened and loaded once, in float32 on the CPU."""

import json
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from hunyuan3.folder import ModelFolder
from hunyuan3.pack import pack
from hunyuan3.parts import LoadOptions
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.placement.placed import PlacedModule
from hunyuan3.placement.split import LayerSplit

from .recording import MissingFeatureError, Recording
from .way import Way

_PLAIN = Way()


class Bench:
    """`root` holds `ckpt/`, `scenarios/`, `components/`, `images/` and `router_gaps.json`, or some of them."""

    def __init__(self, root: Path, dumping: bool = False, way: Way = _PLAIN) -> None:
        self.root = root
        self.way = way
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

    @cached_property
    def _packs(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="hunyuan3-parity-")

    def _weights(self, name: str) -> ModelFolder:
        """What the model is loaded from."""
        folder = self.folder(name)
        if not self.way.packed:
            return folder
        out = Path(self._packs.name) / name
        if not out.is_dir():
            for _step in pack(folder, out, self.way.weight_format):
                pass
        return ModelFolder.open(out)

    def _model(self, name: str, dtype: str = "float32") -> Hunyuan3:
        way, folder = self.way, self._weights(name)
        weight_format = "auto" if way.packed else way.weight_format
        options = LoadOptions(device="cpu", dtype=dtype, vae_dtype="float32", format=weight_format)
        # cpu:0 and cpu:1 stand in for cards: to all that compares devices they are others than the host's cpu.
        if way.split:
            second = folder.config.num_layers // 2
            first = folder.config.num_layers - second
            runs = ((torch.device("cpu", 0), first), (torch.device("cpu", 1), second))
            options = replace(options, device="auto", split=LayerSplit(runs))
        if way.streaming:
            options = replace(options, streaming=way.streaming, disk=way.disk, ram=0 if way.disk else None)
            if not way.split:
                options = replace(options, device="cpu:0")
            placed = Hunyuan3(folder, options.resolved(folder.stored_format)).placed_transformer
            options = replace(options, vram={device: _a_third(placed, device) for device in placed.devices})
        return Hunyuan3(folder, options.resolved(folder.stored_format))


def _a_third(placed: PlacedModule, device: torch.device) -> int:
    """Bytes in which a third of a device's experts stay there."""
    required = placed.required_on(device)
    return required + placed.full_ring_on(device) + (placed.total_on(device) - required) // 3
