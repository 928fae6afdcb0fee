"""Fill a module that was built on the meta device with the tensors of a checkpoint folder.

Each parameter is allocated once, where and as what it will live, and each tensor is read straight into it where nothing
has to be done to it: the host never holds more than the weights in their final dtype plus the tensor under way.
Strict: every missing, unexpected or misshapen tensor is listed before the first byte is read.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

from ..callbacks import CheckCancelled, never_cancelled
from ..errors import CheckpointError
from .index import CheckpointIndex
from .keymap import Slot, is_unused
from .read import TORCH_DTYPES, TensorReader

Transform = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Applied to each (published name, tensor) on its way in; yields what to store under which published-style name."""

_LISTED = 12
_NONE: Mapping[str, str] = {}
_DTYPES = ("BF16", "F16", "F32")  # numbers of any other kind are quantised weights, which mean nothing without scales


def check_complete(
    index: CheckpointIndex, shapes: Mapping[str, tuple[int, ...]], folder: object, small: Mapping[str, str] = _NONE
) -> None:
    """Compares a folder's tensors with the names and shapes that its configuration promises.

    `small`: of the tensors that a pack stores in a format, name -> safetensors dtype; all others are plain numbers.

    Raises CheckpointError listing what is missing, unexpected, misshapen and of a dtype that is not read.
    """
    missing = [name for name in shapes if name not in index]
    unexpected = [name for name in index if name not in shapes and not is_unused(name)]
    misshapen = [
        f"{name}: {list(index[name].shape)} in the file, {list(shape)} by config.json"
        for name, shape in shapes.items()
        if name in index and index[name].shape != tuple(shape)
    ]
    quantised = [
        f"{name}: {index[name].dtype}"
        for name in shapes
        if name in index and index[name].dtype not in ((small[name],) if name in small else _DTYPES)
    ]
    problems = [
        f"{len(names)} {what}: {_shortened(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of the wrong shape", misshapen),
            ("in a format that is not read", quantised),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The tensors in {folder} do not fit its config.json.\n" + "\n".join(problems) + "\n"
            "Download the folder again, weights and config.json together."
        )


def load_parameters(
    module: torch.nn.Module,
    index: CheckpointIndex,
    slots: Mapping[str, Slot],
    *,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
    transform: Transform | None = None,
    check_cancelled: CheckCancelled = never_cancelled,
) -> None:
    """Fills every parameter of `module` named by `slots` from `index`.

    Args:
        module: built on the meta device.
        slots: published name -> where it goes (see keymap).
        device: where the parameters will live.
        dtype_of: parameter name -> dtype that it will have.
        transform: applied to each tensor before it is stored; it may yield several (a quantised weight, its scale).
    """
    parameters = dict(module.named_parameters())
    filled: dict[str, torch.Tensor] = {}

    def place_of(name: str) -> torch.Tensor:
        slot = slots[name]
        if slot.parameter not in filled:
            shape = parameters[slot.parameter].shape
            dtype = dtype_of(slot.parameter)
            filled[slot.parameter] = torch.empty(shape, dtype=dtype, device=device)
        target = filled[slot.parameter]
        return target if slot.expert is None else target[slot.expert]

    with TensorReader(pinned=device.type == "cuda") as reader:
        # What a transform adds (scales) is in no file.
        for file, names in index.by_file([name for name in slots if name in index]).items():
            index.require_unchanged(file)
            for name in sorted(names, key=lambda name: index[name].offset):
                check_cancelled()
                info = index[name]
                if transform is None:
                    target = place_of(name)
                    if target.device.type == "cpu" and target.dtype == TORCH_DTYPES[info.dtype]:
                        reader.into(info, target)
                    else:
                        target.copy_(reader.get(info))
                    continue
                for stored_name, stored in transform(name, reader.get(info)):
                    place_of(stored_name).copy_(stored)
    for name, tensor in filled.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, torch.nn.Parameter(tensor, requires_grad=False))


def _shortened(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown}, ... and {len(names) - _LISTED} more"
