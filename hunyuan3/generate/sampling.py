"""From logits to a token id: greedy or sampled, always with an explicit generator.

The penalties and filters are transformers' own, in the order in which its `generate` applies them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import RequestError

if TYPE_CHECKING:
    from transformers import LogitsProcessorList


@dataclass(frozen=True)
class SamplingOptions:
    """How text is sampled. With `do_sample` False the most likely token is taken; only the penalty then still counts.

    temperature above 0; top_k tokens (0: all); top_p in (0, 1]; repetition_penalty above 0 (1: none).
    """

    do_sample: bool = True
    temperature: float = 0.6
    top_k: int = 1024
    top_p: float = 0.95
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RequestError(f"temperature is {self.temperature}; it must be above 0 (turn sampling off for greedy).")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not self.repetition_penalty > 0:
            raise RequestError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1: none).")


class TokenSampler:
    """Picks one token after the other."""

    def __init__(self, options: SamplingOptions, seed: int, device: torch.device) -> None:
        if not 0 <= seed < 2**64:
            raise RequestError(f"seed is {seed}; it must be from 0 to 2**64 - 1.")
        self.options = options
        self.generator = torch.Generator(device).manual_seed(seed)
        self._processors = _processors(options)

    def pick(self, logits: torch.Tensor, so_far: list[int]) -> int:
        """Next token from logits (V,) float32; `so_far` are the ids of the whole sequence, for the penalty."""
        ids = torch.tensor([so_far], device=logits.device)
        scores = self._processors(ids, logits[None].clone())
        if not self.options.do_sample:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator))


def pick_among(logits: torch.Tensor, allowed: tuple[int, ...]) -> int:
    """The most likely of the allowed tokens; logits (V,)."""
    return allowed[int(logits[list(allowed)].argmax())]


def _processors(options: SamplingOptions) -> "LogitsProcessorList":
    from transformers import (  # a heavy import, needed only when text is written
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = LogitsProcessorList()
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(options.repetition_penalty)))
    if options.do_sample:
        if options.temperature != 1:
            processors.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k:
            processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            processors.append(TopPLogitsWarper(options.top_p))
    return processors
