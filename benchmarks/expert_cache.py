"""How fast text is written while most experts are in host memory: over the hit rate, and over the routing's skew.

    python benchmarks/expert_cache.py                # about half a minute
    python benchmarks/expert_cache.py --link 50      # PCIe 5.0
    python benchmarks/expert_cache.py --half-life 128 --margin 1.5      # other settings of the policy

A token needs 8 of the 64 experts of each of 32 layers. Those on the card are hits; each other one comes over the link.

    seconds per token = (misses + swaps) x bytes of an expert / link + bytes that a token reads / the card's memory rate

with sizes and resident shares of the published model as `hunyuan3.plan` has them for the stated cards. Nothing overlaps
in this formula: guesses made early gain nothing, and when an expert takes another one's place (a swap), the card waits
until that one has gone to host memory. The first table is without swaps. So the seconds are calculated.

The hit rates are not: they come from the package's own banks, ring and policy (`hunyuan3.placement`), with experts of
one number each, which is compared on arrival. What is made up is the routing:

* `uniform`, and Zipf with the stated exponent: each layer has its own order of popularity, the expert at rank r is
  drawn in proportion to r ** -exponent, 8 different ones per token, tokens independent of each other;
* `moving`: the same, with a new order of popularity every 300 tokens, as if the text turned to something else.

`static` is the share that is resident: what a set that nobody chooses hits on average. `best` is what the most popular
ones would hit if they were known beforehand (with `moving`, known anew each time). How skewed the published model's
routing is, is not known here. The last table has a tiny random model's own: 8 experts, 2 per token, 3 layers.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from hunyuan3.config import ModelConfig
from hunyuan3.generate.sampling import SamplingOptions
from hunyuan3.moe.dispatch import Dispatch
from hunyuan3.moe.weights import ExpertWeights
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.placement.budget import PCIE4, Workload
from hunyuan3.placement.copier import DirectCopier, RingSlot
from hunyuan3.placement.expert_cache import HALF_LIFE, MARGIN, CacheStatistics, UseCounts
from hunyuan3.placement.planner import Freedom, plan
from hunyuan3.placement.ring import ExpertRing
from hunyuan3.placement.streaming import ExpertStreaming, StreamedBank, expert_unit
from hunyuan3.plan import Machine, published_config, rates_of_card, sizes_of
from hunyuan3.tiny import make_tiny
from hunyuan3.writing import TextRequest, answering

CARD = torch.device("cpu", 0)  # stands in for a card: another device than the host's cpu
CARD = torch.device("cpu", 0)  # stands in for a card: another device than the host's cpu
SETUPS = (("int4", 24, 64), ("fp8", 24, 128))  # format, GB of the card, GB of RAM
HIT_RATES = tuple(percent / 100 for percent in range(0, 100, 10))
EXPONENTS = (0.0, 0.5, 0.8, 1.0, 1.2, 1.5)
WANTED = 10.0  # tokens per second
TURN = 300  # tokens between two orders of popularity
LAYERS, TOKENS, WARM = 3, 1200, 300  # simulated: layers are independent; the first tokens are not counted


@dataclass(frozen=True)
class Setup:
    """The published model in a format on a card. Bytes, bytes/s. resident: experts of each layer on the card."""

    name: str
    layers: int
    experts: int
    top_k: int
    resident: int
    expert: int
    read: int  # by a token, its experts among them
    memory: float
    link: float

    @classmethod
    def planned(cls, config: ModelConfig, weight_format: str, card: int, ram: int, link: float) -> "Setup":
        """With as many experts on the card as the plan for drawing and writing has there."""
        sizes, machine = sizes_of(config, weight_format), Machine((card,), ram)
        made = plan(config, sizes, machine.devices(), machine.host(), Workload(), Freedom(streaming=True, split=False))
        top_k, expert = config.moe.top_k[0], sizes.layers[0].expert
        return cls(
            name=f"{weight_format}, {card} GB",
            layers=config.num_layers,
            experts=sizes.experts,
            top_k=top_k,
            resident=made.layers[0].resident,
            expert=expert,
            read=sizes.head + sum(layer.dense + top_k * layer.expert for layer in sizes.layers),
            memory=rates_of_card(card)[1],
            link=link,
        )

    def bytes_per_token(self, hit_rate: float) -> float:
        """Over the link."""
        return self.layers * self.top_k * (1 - hit_rate) * self.expert

    def tokens_per_second(self, hit_rate: float, swaps: float = 0.0) -> float:
        """swaps: per miss."""
        return 1 / ((1 + swaps) * self.bytes_per_token(hit_rate) / self.link + self.read / self.memory)

    def hit_rate_for(self, speed: float) -> float:
        """The hit rate at which so many tokens per second are written; above 1: never."""
        return 1 - (1 / speed - self.read / self.memory) / (self.bytes_per_token(0) / self.link)


class NumberedExpert(nn.Module):
    """An expert whose weight is its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(number)), requires_grad=False)

    def chunks(self, dispatch: Dispatch | None = None) -> Iterator[ExpertWeights]:
        yield ExpertWeights(0, self.value, self.value)


def popularity(exponent: float, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Probabilities of a layer's experts (E,): Zipf, in an order of their own."""
    weights = torch.arange(1, experts + 1, dtype=torch.float64) ** -exponent
    return (weights / weights.sum())[torch.randperm(experts, generator=generator)]


def simulate(
    exponent: float,
    resident: int,
    *,
    experts: int = 64,
    top_k: int = 8,
    layers: int = LAYERS,
    tokens: int = TOKENS,
    warm: int = WARM,
    turn: int | None = None,
    cache: bool = True,
    half_life: float = HALF_LIFE,
    margin: float = MARGIN,
    seed: int = 0,
) -> tuple[CacheStatistics, float]:
    """(statistics of the tokens after the first `warm`, hit rate of the best fixed set) of made-up routings.

    turn: tokens after which the popular ones change; None: never. Raises ValueError if an expert arrives that is
    another one than the layer asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    banks = [StreamedBank([NumberedExpert(number) for number in range(experts)]) for _ in range(layers)]
    ring = ExpertRing(lambda: RingSlot(NumberedExpert(-1)), 4, DirectCopier())
    streaming = ExpertStreaming(banks, {CARD: ring}, 1, cache=cache)
    streaming.counts = [UseCounts(experts, half_life, margin) for _ in banks]
    for rank in range(resident):
        streaming.moved(expert_unit(rank, CARD), True)
    popular = [popularity(exponent, experts, generator) for _ in banks]
    best = 0
    for token in range(tokens):
        if turn and token and token % turn == 0:
            popular = [popularity(exponent, experts, generator) for _ in banks]
        if token == warm:
            streaming.reset_statistics()
        for bank, probabilities in zip(banks, popular, strict=True):
            ids = torch.multinomial(probabilities, top_k, generator=generator)
            if token >= warm:
                known = probabilities.topk(resident).indices
                best += int(torch.isin(ids, known).sum())
            for weights in bank.chunks(Dispatch.sort(ids[None], experts)):
                if weights.first != int(weights.gate_up):
                    raise ValueError(f"Expert {int(weights.gate_up)} came in place of expert {weights.first}.")
    seen = streaming.statistics
    return seen, best / (seen.hits + seen.misses)


def report_curve(setups: list[Setup]) -> None:
    """Prints tokens/s and bytes per token over the hit rate."""
    print("tokens/s and GB per token over the link, by hit rate (calculated)\n")
    print("hit rate " + "".join(f"{setup.name:>20}" for setup in setups))
    for rate in HIT_RATES:
        cells = (f"{s.tokens_per_second(rate):11.1f}/s{s.bytes_per_token(rate) / 1e9:5.2f} G" for s in setups)
        print(f"{rate:8.0%} " + "".join(f"{cell:>20}" for cell in cells))
    for setup in setups:
        at = setup.hit_rate_for(WANTED)
        where = f"at a hit rate of {at:.1%}" if 0 < at <= 1 else ("always" if at <= 0 else "never")
        print(
            f"{setup.name}: {setup.resident} of {setup.experts} experts resident, {setup.expert / 1e6:.1f} MB each, "
            f"reading takes {setup.read / setup.memory * 1e3:.1f} ms: {WANTED:g} tokens/s {where}"
        )


def report_skew(setups: list[Setup], tokens: int, half_life: float, margin: float, seed: int) -> None:
    """Prints what the policy makes of routings, and what that means for each setup."""
    print(f"\nhit rates by routing ({LAYERS} layers, {tokens} tokens, the first {WARM} not counted; simulated)\n")
    print("routing             static   best  policy  swaps/1000 misses   tokens/s  GB/token  (calculated)")
    for setup in setups:
        print(setup.name)
        for exponent in EXPONENTS:
            for turn in (None, TURN):
                if turn and not exponent:
                    continue
                seen, best = simulate(
                    exponent,
                    setup.resident,
                    experts=setup.experts,
                    top_k=setup.top_k,
                    tokens=tokens,
                    turn=turn,
                    half_life=half_life,
                    margin=margin,
                    seed=seed,
                )
                name = f"Zipf {exponent:g}" if exponent else "uniform"
                rate, swaps = seen.hit_rate, seen.swaps / max(1, seen.misses)
                print(
                    f"  {name + (', moving' if turn else ''):<18}{setup.resident / setup.experts:6.0%}{best:7.0%}"
                    f"{rate:8.0%}{1000 * swaps:15.1f}"
                    f"{setup.tokens_per_second(rate, swaps):15.1f}{setup.bytes_per_token(rate) / 1e9:10.2f}",
                    flush=True,
                )


def tiny_statistics(share: float, *, cache: bool, tokens: int = 150) -> tuple[CacheStatistics, float]:
    """(statistics, share of the experts that is resident) of two answers of a tiny model with random weights."""
    with tempfile.TemporaryDirectory() as root:
        folder = make_tiny(Path(root) / "tiny", "instruct")
        options = {"device": CARD, "dtype": "float32", "streaming": 3, "expert_cache": cache}
        placed = Hunyuan3.open(folder, **options).placed_transformer
        beside = placed.required_bytes + placed.full_ring_on(placed.device)
        vram = beside + int(share * (placed.total_bytes - placed.required_bytes))
        model = Hunyuan3.open(folder, vram=vram, **options)
        for prompt in ("who?", "a fox in the snow"):
            run = model.write(
                TextRequest(prompt),
                answering(model.folder),
                sampling=SamplingOptions(temperature=1.0),
                max_new_tokens=tokens,
            )
            for _step in run:
                pass
        resident = model.transformer().layers[0].mlp.experts.resident
        return model.placed_transformer.streams.statistics, sum(resident) / len(resident)


def report_tiny(setup: Setup, tokens: int) -> None:
    """Prints where a tiny model's routing lies."""
    print("\na tiny random model's own routing (measured), and a published one's speed at that hit rate (calculated)\n")
    print(f"resident   static   cached  swaps   guesses right   {setup.name}")
    for share in (0.26, 0.38, 0.51, 0.76):
        (fixed, _), (seen, resident) = (tiny_statistics(share, cache=cache, tokens=tokens) for cache in (False, True))
        right = seen.right / max(1, seen.guesses)
        print(
            f"{resident:8.0%}{fixed.hit_rate:9.0%}{seen.hit_rate:9.0%}{seen.swaps:7}{right:16.0%}"
            f"{setup.tokens_per_second(fixed.hit_rate):9.1f} ->{setup.tokens_per_second(seen.hit_rate):5.1f} tokens/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, default=PCIE4 / 1e9, help="GB/s from host memory (default: 25)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"simulated, more than {WARM}")
    parser.add_argument("--half-life", type=float, default=HALF_LIFE, help="tokens after which a use counts half")
    parser.add_argument("--margin", type=float, default=MARGIN, help="of two counts, in standard deviations")
    parser.add_argument("--seed", type=int, default=0, help="of the routings")
    arguments = parser.parse_args()
    if arguments.tokens <= WARM or arguments.link <= 0:
        parser.error(f"--tokens must be more than {WARM}, --link more than 0.")
    torch.set_num_threads(1)
    config = published_config()
    setups = [Setup.planned(config, *setup, arguments.link * 1e9) for setup in SETUPS]
    print(f"The published model over {arguments.link:g} GB/s.\n")
    report_curve(setups)
    report_skew(setups, arguments.tokens, arguments.half_life, arguments.margin, arguments.seed)
    report_tiny(setups[0], 150)


if __name__ == "__main__":
    main()
