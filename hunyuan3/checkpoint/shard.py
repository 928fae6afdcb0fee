"""Write a safetensors file a tensor at a time: what it holds need not fit into memory at once.

The safetensors library writes whole dictionaries of tensors; a layer of the published model is 5 GB of them. The format
is a length, a JSON header and the bytes (https://github.com/huggingface/safetensors#format); the library reads it.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class ShardWriter:
    """A safetensors file under way, at PATH.partial until it is closed without an error.

    Wider dtypes come first, so every tensor lies at a multiple of its item size. Bytes that are never written are
    zeros.
    """

    def __init__(self, path: Path, tensors: Iterable[StoredTensor]) -> None:
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)}
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        end = 0
        for name, tensor in self.tensors.items():
            start, end = end, end + tensor.nbytes
            entries[name] = {
                "dtype": SAFETENSORS_DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
            self._offsets[name] = start
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        self.nbytes = len(self._header) + end
        self._partial = path.with_name(f"{path.name}.partial")
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ShardWriter":
        self._file = self._partial.open("wb")
        self._file.write(self._header)
        self._file.truncate(self.nbytes)
        return self

    def write(self, name: str, tensor: torch.Tensor, row: int | None = None) -> None:
        """Puts a tensor, or row `row` of a stacked one, into its place."""
        stored = self.tensors[name]
        shape = stored.shape if row is None else stored.shape[1:]
        assert tuple(tensor.shape) == shape and tensor.dtype == stored.dtype, (name, tensor.shape, tensor.dtype)
        at = self._offsets[name] + (0 if row is None else row * tensor.nbytes)
        self._file.seek(len(self._header) + at)
        self._file.write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if error is None:
            self._partial.replace(self.path)
