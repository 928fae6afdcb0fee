"""Quantised stand-ins for a linear layer and an expert bank: the same seams, the weight as data.

`swap` puts them into a transformer on the meta device; `transform` makes their tensors from published ones while
loading. A stored tensor `NAME.weight` becomes `NAME.weight` (data) and `NAME.weight_scale_0`, `_1` (scales).
"""

from collections.abc import Iterator

import torch
from torch import nn

from ..checkpoint.load import Transform
from ..errors import CheckpointError
from ..moe.dispatch import Dispatch
from ..moe.weights import ExpertWeights
from ..ops.product import linear
from ..ops.quantized import (
    QuantizedWeight,
    Scheme,
    data_dtype,
    data_shape,
    quantize,
    scale_dtypes,
    scale_shapes,
)
from ..transformer.model import Hunyuan3Transformer
from .policy import QuantPolicy

CHUNK = 8  # experts that are dequantised at once


class QuantLinear(nn.Module):
    """A bias-free linear layer whose weight is stored in a scheme."""

    def __init__(self, shape: tuple[int, ...], scheme: Scheme, dynamic: bool = False) -> None:
        super().__init__()
        self.scheme = scheme
        self.dynamic = dynamic
        _register(self, "weight", shape, scheme)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out) in x's dtype."""
        return linear(x, _weight(self, "weight"))


class QuantExpertBank(nn.Module):
    """All routed experts of a layer, stored in a scheme: a weight source like `moe.weights.ExpertBank`."""

    def __init__(self, gate_up: tuple[int, ...], down: tuple[int, ...], scheme: Scheme, dynamic: bool = False) -> None:
        super().__init__()
        self.scheme = scheme
        self.dynamic = dynamic
        self.chunk_size = CHUNK
        _register(self, "gate_up", gate_up, scheme)
        _register(self, "down", down, scheme)

    def alone(self) -> "QuantExpertBank":
        """An empty bank for a single one of these experts, on the meta device."""
        gate_up, down = ((1, *_weight(self, name).shape[1:]) for name in ("gate_up", "down"))
        return QuantExpertBank(gate_up, down, self.scheme, self.dynamic)

    def chunks(self, dispatch: Dispatch | None = None) -> Iterator[ExpertWeights]:
        """The experts in order, `chunk_size` at a time."""
        gate_up, down = _weight(self, "gate_up"), _weight(self, "down")
        for first in range(0, gate_up.shape[0], self.chunk_size):
            part = slice(first, first + self.chunk_size)
            yield ExpertWeights(first, gate_up[part], down[part])


def swap(model: Hunyuan3Transformer, policy: QuantPolicy) -> None:
    """Replaces, in a transformer on the meta device, what the policy stores small."""
    for layer in model.layers:
        for owner, name in (
            (layer.self_attn, "qkv_proj"),
            (layer.self_attn, "o_proj"),
            (layer.mlp.shared_mlp, "gate_and_up_proj"),
            (layer.mlp.shared_mlp, "down_proj"),
        ):
            setattr(owner, name, QuantLinear(tuple(getattr(owner, name).weight.shape), policy.linears, policy.dynamic))
        bank = layer.mlp.experts
        layer.mlp.experts = QuantExpertBank(
            tuple(bank.gate_up.shape), tuple(bank.down.shape), policy.experts, policy.dynamic
        )


def transform_to(policy: QuantPolicy, device: torch.device) -> Transform:
    """Quantises each tensor on its way in, on `device`, where it is fast."""

    def transform(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        scheme = policy.scheme_of(name)
        if scheme is None:
            yield name, tensor
            return
        tensor = tensor.to(device)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{name} holds numbers that are not finite (NaN or infinity). Download its file again."
            )
        stored = quantize(tensor, scheme)
        yield name, stored.data
        for index, scale in enumerate(stored.scales):
            yield f"{name}_scale_{index}", scale

    return transform


def is_quantized(parameter: str, model: nn.Module) -> bool:
    """Whether a parameter belongs to a quantised stand-in, and so has a dtype of its own."""
    return isinstance(model.get_submodule(parameter.rpartition(".")[0]), (QuantLinear, QuantExpertBank))


def _register(module: nn.Module, name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    def empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    module.register_parameter(name, empty(data_shape(shape, scheme), data_dtype(scheme)))
    for index, (size, dtype) in enumerate(zip(scale_shapes(shape, scheme), scale_dtypes(scheme), strict=True)):
        module.register_parameter(f"{name}_scale_{index}", empty(size, dtype))


def _weight(module: QuantLinear | QuantExpertBank, name: str) -> QuantizedWeight:
    scales = tuple(getattr(module, f"{name}_scale_{index}") for index in range(len(scale_dtypes(module.scheme))))
    return QuantizedWeight(module.scheme, getattr(module, name), scales, module.dynamic)
