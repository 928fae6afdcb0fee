"""Several processes that train one model: each sees a share of the rows, and their gradients are averaged.

    torchrun --standalone --nproc-per-node 2 -m training.run instruct ...

On two cores of a CPU a step of the instruct stage took 0.95 s with two processes of one thread, 1.5 s with one of two.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

_T = TypeVar("_T")


class Crew:
    """This process among `size` ones, of number `rank` from 0. Without torchrun it is alone."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def joined(cls) -> "Crew":
        """The crew that torchrun has started, over its sockets; this process alone where it has not."""
        if not dist.is_available() or not dist.is_torchelastic_launched():
            return cls()
        dist.init_process_group("gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, items: Sequence[_T]) -> list[_T]:
        """This process's part: every `size`-th."""
        return list(items[self.rank :: self.size])

    def gathered(self, part: Sequence[_T]) -> list[_T]:
        """What all processes made of their shares, in the order of the items that were shared."""
        if self.size == 1:
            return list(part)
        parts: list[Sequence[_T]] = [()] * self.size
        dist.all_gather_object(parts, part)
        return [parts[index % self.size][index // self.size] for index in range(sum(map(len, parts)))]

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their means over the processes; one that only others have counts as zero here."""
        if self.size == 1:
            return
        every = list(parameters)
        wanted = torch.tensor([parameter.grad is not None for parameter in every], dtype=torch.int32)
        dist.all_reduce(wanted)
        for parameter, count in zip(every, wanted.tolist(), strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in every if parameter.grad is not None]
        flat = torch.cat([gradient.float().flatten() for gradient in gradients]) / self.size
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def worked(self, work: Callable[[torch.Tensor], torch.Tensor], items: torch.Tensor) -> torch.Tensor:
        """`work(items)`, (n, ...) -> (n, ...) of which each process does its part along the first axis.

        Every process gets the same bits, which may not be those of one process that does all.
        """
        if self.size == 1:
            return work(items)
        each = -(-len(items) // self.size)
        part = work(items[self.rank * each : (self.rank + 1) * each])
        mine = part.new_zeros(each, *items.shape[1:])
        mine[: len(part)] = part
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather([other.view(torch.uint8) for other in parts], mine.view(torch.uint8))  # gloo knows few dtypes
        return torch.cat(parts)[: len(items)]

    def agreed(self, value: bool) -> bool:
        """What the first process says."""
        if self.size == 1:
            return value
        said = torch.tensor([value])
        dist.broadcast(said, 0)
        return bool(said)
