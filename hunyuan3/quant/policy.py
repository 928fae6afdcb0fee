"""Which tensors a weight format stores small, and how: one table.

Routed experts are 95 % of the numbers. Router, norms, embeddings, text head, patch embedding, final layer and time
embedders stay as published: they are small, and errors there are seen at once.
"""

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import RequestError
from ..ops.quantized import Scheme

Format = Literal["bf16", "fp8", "fp8_dynamic", "int8", "int8_dynamic", "int4"]
FORMATS: tuple[Format, ...] = ("bf16", "fp8", "fp8_dynamic", "int8", "int8_dynamic", "int4")


@dataclass(frozen=True)
class QuantPolicy:
    """Schemes of the routed experts and of the other large matrices of a layer (attention, shared MLP).

    dynamic: activations are quantised as well, token by token. The stored bytes are the same.
    """

    experts: Scheme
    linears: Scheme
    dynamic: bool = False

    def scheme_of(self, published: str) -> Scheme | None:
        """The scheme of a published tensor, None for one that stays as it is."""
        if _EXPERT.fullmatch(published):
            return self.experts
        return self.linears if _LINEAR.fullmatch(published) else None


_POLICIES: dict[str, QuantPolicy | None] = {
    "bf16": None,
    "fp8": QuantPolicy(experts="fp8", linears="fp8"),
    "fp8_dynamic": QuantPolicy(experts="fp8", linears="fp8", dynamic=True),
    "int8": QuantPolicy(experts="int8", linears="int8"),
    "int8_dynamic": QuantPolicy(experts="int8", linears="int8", dynamic=True),
    "int4": QuantPolicy(experts="int4", linears="int8"),
}
_DYNAMIC = "_dynamic"
_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate_and_up_proj|down_proj)\.weight")
_LINEAR = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.shared_mlp\.(gate_and_up_proj|down_proj))\.weight"
)


def policy_of(weight_format: str) -> QuantPolicy | None:
    """The policy of a format; None for bf16, which stores nothing small. Raises RequestError for an unknown one."""
    if weight_format not in _POLICIES:
        raise RequestError(f"format is {weight_format!r}; it must be one of {', '.join(FORMATS)}.")
    return _POLICIES[weight_format]


def same_storage(one: str, other: str) -> bool:
    """Whether two formats store the same bytes: they may differ in what is done with the activations."""
    return storage_of(one) == storage_of(other)


def storage_of(weight_format: str) -> str:
    """The format that stores what this one stores and does nothing else."""
    return weight_format.removesuffix(_DYNAMIC)
