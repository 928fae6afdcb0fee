"""Which experts of a layer are worth a place on the device while text is written: those that are used often.

A denoise step needs every expert, so for it any set is as good as any other. A token needs few, and some more often
than others; which ones depends on the text. So uses are counted, old ones fading, and an expert that had to be copied
takes the place of the least used one if it is used more often by more than chance explains.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

HALF_LIFE = 32  # tokens after which a use counts half; longer ones are no better while a text keeps to its subject
MARGIN = 2.5  # standard deviations of the difference of two counts (benchmarks/expert_cache.py shows both ends)
_LARGEST = 2.0**64


class UseCounts:
    """How often each expert of one layer was used lately.

    Instead of shrinking all counts with every token, later uses count more: by 2 for each half-life.
    """

    def __init__(self, experts: int, half_life: float = HALF_LIFE, margin: float = MARGIN) -> None:
        self._sums = [0.0] * experts
        self._one = 1.0  # what a use adds now
        self._half_life = half_life
        self._margin = margin

    def used(self, experts: Iterable[int], tokens: int = 1) -> None:
        """A pass over so many tokens used these experts."""
        self._one *= 2.0 ** (tokens / self._half_life)
        for expert in experts:
            self._sums[expert] += self._one
        if self._one > _LARGEST:
            self._sums = [total / self._one for total in self._sums]
            self._one = 1.0

    def count(self, expert: int) -> float:
        """Its uses, those of one half-life ago counting half."""
        return self._sums[expert] / self._one

    def to_replace(self, expert: int, residents: Iterable[int]) -> int | None:
        """The resident expert whose place `expert` should take; None if it should take none.

        Faded counts of two experts that are equally likely differ by about the root of half their sum; where the least
        used of many is compared, by more. Without a margin, experts that are used alike would change places for ever.
        """
        least = min(residents, key=self._sums.__getitem__, default=None)
        if least is None:
            return None
        ours, theirs = self.count(expert), self.count(least)
        return least if ours - theirs > self._margin * math.sqrt((ours + theirs) / 2) else None


@dataclass(frozen=True)
class CacheStatistics:
    """What passes over few tokens needed and copied.

    tokens: that went through the model. hits, misses: experts that a layer needed, on the device and not. guesses:
    experts whose copy began before their layer's router had chosen; right: those that it then chose. swaps: experts
    that took another one's place, whose bytes went to host memory. expert_bytes: of one expert.
    """

    tokens: int = 0
    hits: int = 0
    misses: int = 0
    guesses: int = 0
    right: int = 0
    swaps: int = 0
    expert_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the needed experts that were on the device; 0 where none was needed."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def copied_bytes(self) -> int:
        """Bytes that were copied to the device, those of wrong guesses among them."""
        return (self.misses + self.guesses - self.right) * self.expert_bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes that were copied to the device for each token; 0 without tokens."""
        return self.copied_bytes / max(1, self.tokens)

    def text(self, seconds: float | None = None) -> str:
        """One line; `seconds`: how long these tokens took."""
        speed = "" if not seconds else f", {self.tokens / seconds:.1f} tokens/s"
        return (
            f"{self.tokens} tokens, {self.hit_rate:.0%} of their experts on the device, "
            f"{self.bytes_per_token / 1e6:.2f} MB copied per token, {self.swaps} experts swapped{speed}"
        )
