"""What training adds to the mixture of experts: a backend that gradients pass through fast, and the balancing loss."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hunyuan3.moe.dispatch import Dispatch
from hunyuan3.moe.layer import MoELayer
from hunyuan3.moe.router import Router, Routing
from hunyuan3.moe.weights import ExpertWeights

_STEP = 128  # blocks are filled up to multiples of it: a CPU's library prepares a kernel for every new shape


def run_experts(x: torch.Tensor, dispatch: Dispatch, experts: ExpertWeights, out: torch.Tensor) -> None:
    """An expert backend with the contract of `moe.loop.run_experts`, for all experts of a layer at once.

    The plain loop writes block by block into `out`, and autograd then copies the whole gradient for each block; here
    the blocks are joined first. The gather has its own gradient: each token's pairs are read back, not scattered.
    """
    assert experts.count == len(dispatch.ends), "training runs all experts of a layer at once"
    ends = dispatch.ends_on_host
    sizes = [stop - start for start, stop in zip((0, *ends[:-1]), ends, strict=True)]
    rows = _Gather.apply(x, dispatch.token, dispatch.place).split(sizes)
    blocks = []
    for block, gate_up, down in zip(rows, experts.gate_up.unbind(), experts.down.unbind(), strict=True):
        size = len(block)
        filled = F.pad(block, (0, 0, 0, -size % _STEP)) if size > _STEP else block
        value, gate = F.linear(filled, gate_up).chunk(2, dim=-1)
        blocks.append(F.linear(value * F.silu(gate), down)[:size])
    out.copy_(torch.cat(blocks))


class _Gather(torch.autograd.Function):
    """`x[token]`, (T, D) -> (N, D), with the gradient summed over each token's places (T, K)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (place,) = ctx.saved_tensors
        total = gradient.index_select(0, place[:, 0])
        for choice in range(1, place.shape[1]):
            total = total + gradient.index_select(0, place[:, choice])
        return total, None, None


class Balance:
    """The load-balancing loss of all routers of a network, gathered while it runs.

    Per layer `E * sum over experts of (share of the choices) * (mean probability)`, 1 when both are even (Fedus et al.
    2021, "Switch Transformers", equations 4 to 6).
    """

    def __init__(self, network: nn.Module) -> None:
        self._losses: list[torch.Tensor] = []
        for module in network.modules():
            if isinstance(module, MoELayer):
                module.router.register_forward_hook(self._see)

    def take(self) -> torch.Tensor:
        """The mean over what ran since the last call."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).mean()

    def _see(self, router: Router, args: tuple[torch.Tensor], routing: Routing) -> None:
        if not torch.is_grad_enabled():
            return
        probabilities = router.logits(args[0]).float().softmax(dim=-1).mean(dim=0)
        experts = len(probabilities)
        shares = torch.bincount(routing.ids.flatten(), minlength=experts).float() / routing.ids.numel()
        self._losses.append(experts * (shares * probabilities).sum())
