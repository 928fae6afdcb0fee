"""Which expert backend a model uses: chosen once when it is built, with the reason, never silently in mid-run."""

import logging
from collections.abc import Callable
from typing import Literal

import torch

from ..errors import RequestError
from . import grouped, loop
from .dispatch import Dispatch
from .weights import ExpertWeights

ExpertFn = Callable[[torch.Tensor, Dispatch, ExpertWeights, torch.Tensor], None]
MoEBackend = Literal["auto", "loop", "grouped"]
MOE_BACKENDS: tuple[MoEBackend, ...] = ("auto", "loop", "grouped")

_BACKENDS: dict[str, ExpertFn] = {"loop": loop.run_experts, "grouped": grouped.run_experts}
_log = logging.getLogger(__name__)


def expert_backend(name: str) -> ExpertFn:
    """The function of a named backend ("loop" or "grouped")."""
    return _BACKENDS[name]


def choose_backend(name: MoEBackend, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, reason) for a device and dtype.

    Raises RequestError for an unknown name, and for one that does not work here: asking by name never falls back.
    """
    if name not in MOE_BACKENDS:
        raise RequestError(f"moe_backend is {name!r}; it must be one of {', '.join(MOE_BACKENDS)}.")
    if name == "loop":
        return "loop", "asked for"
    problem = _grouped_problem(device, dtype)
    if name == "grouped":
        if problem:
            raise RequestError(f"moe_backend 'grouped' does not work here: {problem}. Choose 'auto' or 'loop'.")
        return "grouped", "asked for"
    if problem:
        return "loop", problem
    if device.type == "cpu":
        return "loop", "grouped_mm brings nothing on a CPU"
    return "grouped", "grouped_mm works on this device"


def log_choice(backend: str, reason: str) -> None:
    """One log line per model: what was chosen and why."""
    _log.info("MoE backend: %s (%s)", backend, reason)


def _grouped_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `grouped_mm` can not serve, or None. Tries a small case against the plain loop."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 32, generator=generator).to(device, dtype)
    experts = ExpertWeights(
        0,
        torch.randn(4, 64, 32, generator=generator).to(device, dtype),
        torch.randn(4, 32, 32, generator=generator).to(device, dtype),
    )
    dispatch = Dispatch.sort(torch.randint(0, 3, (24, 2), generator=generator).to(device), 4)  # expert 3 stays empty
    expected, actual = x.new_empty(48, 32), x.new_empty(48, 32)
    loop.run_experts(x, dispatch, experts, expected)
    try:
        grouped.run_experts(x, dispatch, experts, actual)
    except (RuntimeError, NotImplementedError) as error:
        return f"grouped_mm refused {dtype} on {device}: {str(error).splitlines()[0]}"
    scale = expected.abs().max()
    error = ((actual - expected).abs().max() / scale).item()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return None if error <= tolerance else f"grouped_mm differs from the plain loop by {error:.1e} on {device}"
