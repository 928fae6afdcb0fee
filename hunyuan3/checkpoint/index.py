"""Which file holds which tensor: the headers of a checkpoint folder's safetensors files.

Headers only: a 160 GB folder is indexed in well under a second, and everything that can be wrong with the files
(missing shard, dangling link, cut-off download, hostile header) is found here, before any weight is read.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..config import read_json
from ..errors import CheckpointError
from .keymap import unstacked

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is. `dtype` is the safetensors name ("BF16", "F32", ...).

    offset, nbytes: its bytes in the file.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int = 0
    nbytes: int = 0


class CheckpointIndex:
    """All tensors of a folder, by name.

    Reads `model.safetensors.index.json` and its shards, or a single `model.safetensors`. Links (a hub cache is made
    of them) are followed by the operating system.
    """

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._stacked = tensors  # as the files have them
        self._stamps = {file: _stamp(file) for file in {info.file for info in tensors.values()}}

    @classmethod
    def from_folder(cls, folder: Path) -> "CheckpointIndex":
        """Indexes `folder`. Raises CheckpointError naming the file that is missing or damaged."""
        index_path = folder / INDEX_NAME
        if index_path.exists():
            return cls(_read_shards(folder, index_path))
        if (folder / SINGLE_NAME).exists():
            return cls(_read_header(folder / SINGLE_NAME))
        raise CheckpointError(
            f"{folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}. Point to the folder that holds the weights "
            "and config.json, as downloaded."
        )

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def unstacked(self) -> "CheckpointIndex":
        """With the experts of a pack's stacked tensors as tensors of their own, under their published names."""
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            around = unstacked(name)
            if around is None:
                tensors[name] = info
                continue
            size = info.nbytes // info.shape[0]
            for expert in range(info.shape[0]):
                offset = info.offset + expert * size
                row = TensorInfo(info.file, info.shape[1:], info.dtype, offset, size)
                tensors[f"{around[0]}{expert}.{around[1]}"] = row
        index = CheckpointIndex(tensors)
        index._stacked = self.tensors
        return index

    def require_unchanged(self, file: Path) -> None:
        """Raises CheckpointError if a file no longer holds what it held when it was indexed.

        One that was merely written again (a repaired download) is as good as before.
        """
        if not file.exists():
            raise CheckpointError(f"{file} cannot be read: it is gone. Put it back, or download it again.")
        if _stamp(file) == self._stamps[file]:
            return
        now = _read_header(file)
        before = {name: info for name, info in self._stacked.items() if info.file == file}
        if any(now.get(name) != info for name, info in before.items()):
            raise CheckpointError(f"{file} has changed since the checkpoint was opened. Download this file again.")
        self._stamps[file] = _stamp(file)

    def by_file(self, names: list[str]) -> dict[Path, list[str]]:
        """The given names grouped by file, files in name order, so that each file is read once, front to back."""
        groups: dict[Path, list[str]] = {}
        for name in names:
            groups.setdefault(self.tensors[name].file, []).append(name)
        return dict(sorted(groups.items()))


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _read_shards(folder: Path, index_path: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index_path} has no usable 'weight_map'. Download this file again.")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index_path} names a shard outside its folder: {shard!r}.")
        tensors.update(_read_header(folder / shard))
    listed_nowhere = sorted(name for name in weight_map if name not in tensors)
    if listed_nowhere:
        example = listed_nowhere[0]
        raise CheckpointError(
            f"{len(listed_nowhere)} tensors of {index_path.name} are not in their shards, for example {example} "
            f"(expected in {weight_map[example]}). Download that shard again."
        )
    return tensors


@contextmanager
def open_shard(path: Path) -> Iterator[safe_open]:
    """A safetensors file, open for reading. Raises CheckpointError naming the file if it is missing or damaged."""
    if not path.exists():
        reason = "is a link to a file that does not exist" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{path} {reason}. Download this file again.")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}). Download this file again."
        ) from error


def _read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one file. The library reads the header first, and refuses one that does not fit the file."""
    with open_shard(path) as file:
        names = list(file.keys())
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tensors = {}
    for name in names:
        entry = header[name]
        start, stop = entry["data_offsets"]
        tensors[name] = TensorInfo(path, tuple(entry["shape"]), entry["dtype"], 8 + length + start, stop - start)
    return tensors
