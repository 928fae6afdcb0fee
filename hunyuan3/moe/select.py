"""Which expert backend a model uses: chosen once when it is built, with the reason, never silently in mid-run."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch

from ..errors import RequestError
from ..ops.quantized import Scheme, quantize
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


def choose_backend(
    name: MoEBackend, device: torch.device, dtype: torch.dtype, dynamic: Scheme | None = None
) -> tuple[str, str]:
    """(backend, reason) for a device and dtype. `dynamic`: the scheme of the activations, if they are quantised.

    Raises RequestError for an unknown name, and for one that does not work here: asking by name never falls back.
    """
    if name not in MOE_BACKENDS:
        raise RequestError(f"moe_backend is {name!r}; it must be one of {', '.join(MOE_BACKENDS)}.")
    if name == "loop":
        return "loop", "asked for"
    problem = _grouped_problem(device, dtype, dynamic)
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


def _grouped_problem(device: torch.device, dtype: torch.dtype, dynamic: Scheme | None) -> str | None:
    """Why a grouped product can not serve, or None. Tries a small case against the plain loop."""
    kernel = "grouped_mm" if dynamic is None else "scaled_grouped_mm"
    if dynamic == "int8":
        return "there is no grouped product of int8 activations"
    if not hasattr(torch.nn.functional, kernel):
        return f"torch {torch.__version__} has no {kernel}"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 32, generator=generator).to(device, dtype)
    weights = [torch.randn(4, rows, 32, generator=generator).to(device, dtype) for rows in (64, 32)]
    if dynamic is not None:
        weights = [replace(quantize(weight, dynamic), dynamic=True) for weight in weights]
    experts = ExpertWeights(0, *weights)
    dispatch = Dispatch.sort(torch.randint(0, 3, (24, 2), generator=generator).to(device), 4)  # expert 3 stays empty
    expected, actual = x.new_empty(48, 32), x.new_empty(48, 32)
    loop.run_experts(x, dispatch, experts, expected)
    try:
        grouped.run_experts(x, dispatch, experts, actual)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"{kernel} refused {dtype} on {device}: {str(error).splitlines()[0]}"
    scale = expected.abs().max()
    error = ((actual - expected).abs().max() / scale).item()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return None if error <= tolerance else f"{kernel} differs from the plain loop by {error:.1e} on {device}"
