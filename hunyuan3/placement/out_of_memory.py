"""What counts as out of memory, what such an error tells, and how to let go of what it holds."""

import re
import traceback
from types import ModuleType

import torch

# torch has a class for the memory of cards only; the host's and that of Apple's chips it tells by text.
_HOST_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # the same on Windows
)
_MPS_TEXT = "MPS backend out of memory"
_ASKED = re.compile(r"(?:tried to allocate|requested *:) *([\d.]+) *(bytes|[KMGT]i?B)", re.IGNORECASE)
_CARD = re.compile(r"GPU (\d+) has a total capacity")
_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}  # of 1024 each, also where it is written "GB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device, and nothing else."""
    if isinstance(error, torch.OutOfMemoryError) or is_out_of_host_memory(error):
        return True
    return isinstance(error, RuntimeError) and _MPS_TEXT in str(error)


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether it was the host's memory: moving weights there from a card would make things worse."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _HOST_TEXTS)


def asked_bytes(error: BaseException) -> int | None:
    """How many bytes were asked for when memory ran out, None if the error does not say."""
    found = _ASKED.search(str(error))
    return None if found is None else int(float(found[1]) * _UNITS[found[2][0].lower()])


def asked_device(error: BaseException) -> int | None:
    """The number of the card whose memory ran out, None if the error does not say."""
    found = _CARD.search(str(error))
    return None if found is None else int(found[1])


def raised_in(error: BaseException, module: ModuleType) -> bool:
    """Whether the code of a module was under way when an error was raised."""
    names = {frame.f_globals.get("__name__") for frame, _line in traceback.walk_tb(error.__traceback__)}
    return module.__name__ in names


def let_go(error: BaseException) -> None:
    """Empties the frames that an error keeps alive, and with them the tensors of the attempt that failed.

    The frames of the caller and of its callers still run: they stay as they are.
    """
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__context__
