"""Read tensors from their files straight into where they belong.

Mapping a file and copying from it, as the safetensors library does, costs a page fault for every 4 KB on top of the
copy; reading into the target costs the copy alone, and several threads share it. The index says where the bytes are.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch

from ..errors import CheckpointError
from .index import TensorInfo
from .shard import SAFETENSORS_DTYPES

TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_PIECE = 2**25  # bytes that a thread reads at once
_THREADS = 4


class TensorReader:
    """Reads tensors one after the other; `with TensorReader() as reader`.

    pinned: whether `get` reads into page-locked memory, from which a CUDA card copies fast.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), thread_name_prefix="hunyuan3-read")

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def into(self, info: TensorInfo, target: torch.Tensor) -> None:
        """Fills `target`: on the CPU, contiguous, of the stored dtype and shape. Raises CheckpointError."""
        assert target.device.type == "cpu" and target.is_contiguous(), "it is read into as it lies"
        assert target.nbytes == info.nbytes and target.dtype == TORCH_DTYPES[info.dtype]
        bytes_of = target.view(-1).view(torch.uint8).numpy()
        starts = range(0, info.nbytes, _PIECE)
        # list(): an error of a thread is raised here.
        list(self._pool.map(lambda start: _read(info, start, bytes_of[start : start + _PIECE]), starts))

    def get(self, info: TensorInfo) -> torch.Tensor:
        """The tensor, in a buffer that the next `get` overwrites. Raises CheckpointError."""
        if self._buffer.nbytes < info.nbytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one first
            self._buffer = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=self.pinned)
        tensor = self._buffer[: info.nbytes].view(TORCH_DTYPES[info.dtype]).view(info.shape)
        self.into(info, tensor)
        return tensor


def _read(info: TensorInfo, start: int, target: np.ndarray) -> None:
    try:
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.offset + start)
            done = 0
            while done < len(target):
                count = file.readinto(memoryview(target)[done:])
                if not count:
                    raise CheckpointError(f"{info.file} is cut off. Download this file again.")
                done += count
    except OSError as error:
        raise CheckpointError(f"{info.file} cannot be read ({error}). Download this file again.") from error
