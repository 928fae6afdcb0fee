"""What a pack is: a checkpoint folder rewritten in a weight format, and the small file that says so.

A pack is a complete folder: configuration, tokenizer and prompts lie beside the weights. Its tensors are those of the
published folder except that the routed experts of a layer are stacked into one bank, that stored scales lie beside
their weights, and that a layer is one file.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import CheckpointError

PACK_NAME = "pack.json"
UNFINISHED_NAME = "pack.unfinished.json"
_VERSION = 1
_BLOCK = 2**24  # bytes that are read at once


@dataclass(frozen=True)
class PackedFile:
    """Size and checksum of one weight file."""

    nbytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "PackedFile":
        """Reads the whole file."""
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        return cls(path.stat().st_size, digest.hexdigest())


@dataclass(frozen=True)
class PackManifest:
    """`pack.json`. format: of the weights, see quant.policy. files: the weight files by name."""

    format: str
    files: Mapping[str, PackedFile]

    @classmethod
    def from_folder(cls, folder: Path) -> "PackManifest | None":
        """The manifest of a pack, None for any other folder. Raises CheckpointError for one that is damaged."""
        if (folder / UNFINISHED_NAME).exists():
            raise CheckpointError(f"{folder} is an unfinished pack. Run `python -m hunyuan3.pack` on it again.")
        if not (folder / PACK_NAME).exists():
            return None
        return cls.from_json(read_json(folder / PACK_NAME), folder / PACK_NAME)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], path: Path) -> "PackManifest":
        """Parses it. Raises CheckpointError naming `path`."""
        if data.get("version") != _VERSION:
            raise CheckpointError(f"{path} is of version {data.get('version')!r}; this package reads {_VERSION}.")
        try:
            files = {name: PackedFile(int(file["nbytes"]), str(file["sha256"])) for name, file in data["files"].items()}
            return cls(str(data["format"]), files)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}). Pack the folder again.") from error

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads; the same for the same pack."""
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        return {"version": _VERSION, "format": self.format, "files": files}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a file that is either whole or not there."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8", newline="\n")
    partial.replace(path)
