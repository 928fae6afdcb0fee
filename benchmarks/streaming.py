"""Experts from host memory, copied beside the compute: how much of the copying is hidden. On the CPU, one thread.

    python benchmarks/streaming.py      # 3 layers of 64 experts: 1.5 GB of memory, about a minute
    python benchmarks/streaming.py --share 0.5 --slots 8

The layers are the pipeline's, in the published proportions (attention, shared expert, 64 experts of which a token takes
8), with random float32 weights. `--share` of each layer's experts is on the device, a stand-in of this machine's own
memory; the others come through a ring of `--slots`, by default as many as the loader's, filled by the copier for a CPU.
A step runs the stack on a guidance pair of pictures against a filled key-value cache, again and again, so the ring runs
from the last layer into the first of the next step.

The link: a thread of its own really copies each expert's bytes, then sleeps until the expert's time has passed. That
time is chosen so that the copies of a step take 0.7, 1.0 and 1.4 times as long as its compute. Sleeping leaves the
processor to the compute, as a copy engine does; the copies themselves share the memory's bandwidth with it.

Before anything is timed, a verifying run of the same schedule at each pace compares every expert that arrives, byte by
byte, with its source: before it is computed with, and again after, when it must still be there. Every output, also of
the timed runs, is compared to the bit with that of plain resident experts.

For each pace, in turns: the copies of the steps alone (the ring runs, nothing is computed), their compute alone (all
experts on the device), both together. Each ring run has a step to settle before it is timed. Times are medians, in
seconds per step; a ratio is together over the longer of the two alone, of the same turn, and its median is shown.
`serial`: copying first and computing then. The last line is the worst ratio of the three; 1 would be perfect.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.denoise import BRANCHES, BUSY, Sizes, balance_routers, build_model, build_rows, timed
from hunyuan3.moe.dispatch import Dispatch
from hunyuan3.moe.layer import MoELayer
from hunyuan3.moe.weights import ExpertBank, ExpertWeights
from hunyuan3.ops.attention import plan_attention
from hunyuan3.ops.rope import rope_positions, rope_table
from hunyuan3.placement.copier import Copier, CopyExpert, RingSlot, ThreadCopier, copy_expert
from hunyuan3.placement.cut import RING_GROUPS
from hunyuan3.placement.ring import ExpertRing
from hunyuan3.placement.streaming import ExpertStreaming, StreamedBank, expert_unit
from hunyuan3.types import Span

CARD = torch.device("cpu", 0)
PACES = (0.7, 1.0, 1.4)  # time of the copies over time of the compute
SLOW_LINK = 1.1  # above this share of its pace, the link's thread was kept waiting by others
STREAMING = Sizes(768, 3, 12, 3, 64, 8, 576, patch_width=192, latent_channels=32, side=16, prompt=128)


@dataclass(frozen=True)
class Setting:
    """What is run. share: of a layer's experts, on the device. steps: timed at once. repeats: turns."""

    sizes: Sizes = STREAMING
    share: float = 0.25
    slots: int = RING_GROUPS
    steps: int = 2
    repeats: int = 3
    seed: int = 0
    make_copier: Callable[[CopyExpert], Copier] = ThreadCopier
    copy: CopyExpert = copy_expert


class StreamingError(Exception):
    """Something wrong arrived or came out, or nothing can be measured with these sizes."""


class PacedLink:
    """Copies an expert in `seconds`: its bytes at once, then it sleeps. `copying`: seconds of each real copy."""

    def __init__(self, copy: CopyExpert) -> None:
        self._copy = copy
        self.seconds = 0.0
        self.copying: list[float] = []

    def __call__(self, source: nn.Module, target: nn.Module) -> None:
        start = time.perf_counter()
        self._copy(source, target)
        self.copying.append(time.perf_counter() - start)
        time.sleep(max(0.0, start + self.seconds - time.perf_counter()))


class Stack:
    """The layers, what goes into them in a step, and which experts are on the device."""

    @torch.no_grad()
    def __init__(self, setting: Setting) -> None:
        sizes = setting.sizes
        self.setting = setting
        self.model = build_model(sizes, setting.seed)
        rows = build_rows(sizes, setting.seed)
        generator = torch.Generator().manual_seed(setting.seed)
        x = torch.randn(BRANCHES, sizes.length, sizes.hidden, generator=generator)
        self._cache = self.model.new_cache(BRANCHES, sizes.length)
        cos, sin = rope_table(rope_positions(sizes.length, rows.grids), sizes.hidden // sizes.heads, 10000.0)

        def inputs(span: Span) -> tuple:
            part = slice(span.start, span.stop)
            return x[:, part], (cos[part], sin[part]), plan_attention(span, rows.full_spans), self._cache

        self.model(*inputs(Span(0, sizes.prompt)))
        self._inputs = inputs(Span(sizes.prompt, sizes.prompt + sizes.queries))
        balance_routers(self.model, (self.step() for _ in range(1)))
        self.expected = self.step()  # of plain banks, all resident
        self.link = PacedLink(setting.copy)
        self.streaming = self._stream()
        self.away = round(sizes.experts * (1 - setting.share))
        if not self.away:
            raise StreamingError("All experts are on the device: choose a smaller --share.")

    def _stream(self) -> ExpertStreaming:
        """Cuts the banks into single experts and connects them to a ring; the weights stay where they are."""
        first = self.layers[0].experts
        for layer in self.layers:
            layer.experts = StreamedBank(
                [_single(layer.experts, expert, expert + 1) for expert in range(layer.num_experts)]
            )

        def make_slot() -> RingSlot:
            return RingSlot(first.alone().to_empty(device=CARD).requires_grad_(False))

        ring = ExpertRing(make_slot, self.setting.slots, self.setting.make_copier(self.link))
        nbytes = sum(parameter.nbytes for parameter in self.layers[0].experts[0].parameters())
        return ExpertStreaming([layer.experts for layer in self.layers], {CARD: ring}, nbytes)

    @property
    def layers(self) -> list[MoELayer]:
        return [layer.mlp for layer in self.model.layers]

    @property
    def copies(self) -> int:
        """Experts that are copied in a step."""
        return self.away * len(self.layers)

    @property
    def expert_nbytes(self) -> int:
        return self.streaming.full_nbytes_on(CARD) // self.setting.slots

    def send_away(self, count: int) -> None:
        """So many experts of each layer are in host memory, the others on the device. Empties the ring."""
        for expert in range(self.setting.sizes.experts):
            self.streaming.moved(expert_unit(expert, CARD), expert < self.setting.sizes.experts - count)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """The stack's output, which is the same each time."""
        return self.model(*self._inputs)

    def check(self, out: torch.Tensor) -> None:
        """Raises StreamingError unless it is what plain resident experts gave."""
        if not torch.equal(out, self.expected):
            raise StreamingError("The output is not that of resident experts.")

    def copy_step(self) -> None:
        """The ring of a step, without its compute."""
        for layer in self.layers:
            away = [expert for expert, here in enumerate(layer.experts.resident) if not here]
            for _arrived in self.streaming.bring(layer.experts.layer, away, few=False):
                pass

    def seconds(self) -> float:
        """Of one step, from several in a row; their outputs are checked afterwards."""
        seconds, outputs = timed(lambda: [self.step() for _ in range(self.setting.steps)])
        for out in outputs:
            self.check(out)
        return seconds / self.setting.steps

    def copy_seconds(self) -> float:
        """Of the copies of one step, from several in a row."""
        return timed(lambda: [self.copy_step() for _ in range(self.setting.steps)])[0] / self.setting.steps


def _single(bank: ExpertBank, start: int, stop: int) -> ExpertBank:
    """One expert of a bank, sharing its memory."""
    single = bank.alone()
    for name, parameter in bank.named_parameters():
        setattr(single, name, nn.Parameter(parameter.detach()[start:stop], requires_grad=False))
    return single


@contextmanager
def bytes_compared(stack: Stack) -> Iterator[list[int]]:
    """Inside, every expert from the ring is compared with its source, and its bytes are added to the list."""
    arrived: list[int] = []

    def comparing(layer: MoELayer) -> Callable[..., None]:
        backend = layer.backend

        def compare(experts: ExpertWeights, when: str) -> int:
            source, nbytes = layer.experts[experts.first], 0
            for theirs, ours in ((source.gate_up, experts.gate_up), (source.down, experts.down)):
                if ours.data_ptr() == theirs.data_ptr():
                    continue  # on the device
                if not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
                    raise StreamingError(f"Wrong bytes of expert {experts.first} {when} it was computed with.")
                nbytes += ours.nbytes
            return nbytes

        def run(x: torch.Tensor, dispatch: Dispatch, experts: ExpertWeights, out: torch.Tensor) -> None:
            nbytes = compare(experts, "before")
            backend(x, dispatch, experts, out)
            compare(experts, "after")
            if nbytes:
                arrived.append(nbytes)

        return run

    backends = [layer.backend for layer in stack.layers]
    for layer in stack.layers:
        layer.backend = comparing(layer)
    try:
        yield arrived
    finally:
        for layer, backend in zip(stack.layers, backends, strict=True):
            layer.backend = backend


def verify(stack: Stack, pace: float) -> int:
    """Runs two steps with everything compared; returns the bytes that arrived."""
    stack.send_away(stack.away)
    with bytes_compared(stack) as arrived:
        for _ in range(2):
            stack.check(stack.step())
    if len(arrived) != 2 * stack.copies:
        raise StreamingError(f"At pace {pace}, {len(arrived)} experts arrived instead of {2 * stack.copies}.")
    return sum(arrived)


@dataclass(frozen=True)
class Turn:
    """Seconds per step at a pace; cpu_share: of one processor, while computing alone; link: time over its pace."""

    copy: float
    compute: float
    together: float
    cpu_share: float
    link: float

    @property
    def ratio(self) -> float:
        return self.together / max(self.copy, self.compute)

    @property
    def serial(self) -> float:
        return self.copy + self.compute


def take_turn(stack: Stack) -> Turn:
    """Measures the three at the link's present pace."""
    stack.send_away(stack.away)
    stack.copy_step()
    copy = stack.copy_seconds()
    stack.send_away(0)
    cpu = time.process_time()
    compute = stack.seconds()
    cpu = time.process_time() - cpu
    stack.send_away(stack.away)
    stack.check(stack.step())
    together = stack.seconds()
    link = copy / (stack.copies * stack.link.seconds)
    return Turn(copy, compute, together, cpu / (compute * stack.setting.steps), link)


@dataclass(frozen=True)
class Measured:
    """What was found. compared: bytes. copying: median seconds of an expert's real copy."""

    turns: dict[float, list[Turn]]
    compared: int
    copying: float

    def median(self, pace: float, name: str) -> float:
        return statistics.median(getattr(turn, name) for turn in self.turns[pace])

    def over_all(self, name: str) -> float:
        """Median over all turns at all paces."""
        return statistics.median(getattr(turn, name) for turns in self.turns.values() for turn in turns)

    @property
    def overlap(self) -> float:
        """The worst ratio."""
        return max(self.median(pace, "ratio") for pace in self.turns)


def measure(stack: Stack) -> Measured:
    """Verifies at each pace, then takes the turns. Raises StreamingError."""
    stack.send_away(0)
    stack.check(stack.step())
    compute = statistics.median(timed(stack.step)[0] for _ in range(3))
    compared = 0
    for pace in PACES:
        stack.link.seconds = pace * compute / stack.copies
        compared += verify(stack, pace)
    copying = statistics.median(stack.link.copying)
    if copying > PACES[0] * compute / stack.copies:
        raise StreamingError(
            f"Copying an expert takes {copying * 1e3:.2f} ms, more than its share of the compute allows at pace "
            f"{PACES[0]}: choose a larger --side, so that there is more to compute."
        )
    turns: dict[float, list[Turn]] = {pace: [] for pace in PACES}
    for _ in range(stack.setting.repeats):
        for pace in PACES:
            stack.link.seconds = pace * compute / stack.copies
            turns[pace].append(take_turn(stack))
            compute = turns[pace][-1].compute  # the pace follows a machine that becomes slower or faster
    stack.streaming.release(CARD)
    return Measured(turns, compared, copying)


def report(stack: Stack, measured: Measured) -> None:
    """Prints the findings."""
    sizes, experts = stack.setting.sizes, stack.setting.sizes.experts
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, float32; {sizes}")
    print(
        f"{experts - stack.away} of {experts} experts of each layer on the device, a ring of {stack.setting.slots}; "
        f"{stack.copies} copies of {stack.expert_nbytes / 1e6:.1f} MB in a step"
    )
    print(f"compared with their sources before and after use: {measured.compared / 1e9:.2f} GB, all equal")
    print("outputs: to the bit those of resident experts")
    share, link = measured.over_all("cpu_share"), measured.over_all("link")
    busy = " (the machine is busy: repeat when it is idle)"
    print(f"processor time that the compute alone got: {share:.0%}{busy if share < BUSY else ''}")
    print(f"time of the copies alone over their pace: {link:.2f}{busy if link > SLOW_LINK else ''}")
    for pace in measured.turns:
        part = measured.copying * stack.copies / measured.median(pace, "copy")
        print(f"pace {pace}: of an expert's time on the link, the real copy takes {part:.0%}")
    print()
    columns = ("copy", "compute", "together", "ratio", "serial")
    print(f"{'pace':>4}" + "".join(f"{name if name == 'ratio' else name + ' s':>12}" for name in columns))
    for pace in measured.turns:
        cells = (f"{measured.median(pace, name):12.{2 if name == 'ratio' else 3}f}" for name in columns)
        print(f"{pace:4.1f}" + "".join(cells))


def run(setting: Setting) -> None:
    """Measures and prints; exits with an error if anything arrives or comes out wrong."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stack = Stack(setting)
        measured = measure(stack)
        report(stack, measured)
    except StreamingError as error:
        sys.exit(str(error))
    finally:
        torch.set_num_threads(threads)
    print()
    print(f"overlap: {measured.overlap:.2f}")


def main() -> None:
    default = Setting()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=default.sizes.layers)
    parser.add_argument("--experts", type=int, default=default.sizes.experts, help="of each layer")
    parser.add_argument("--side", type=int, default=default.sizes.side, help="of the picture, in tokens")
    parser.add_argument("--share", type=float, default=default.share, help="of the experts, on the device")
    parser.add_argument("--slots", type=int, default=default.slots, help="of the ring, at least 2")
    parser.add_argument("--steps", type=int, default=default.steps, help="timed in a row")
    parser.add_argument("--repeats", type=int, default=default.repeats, help="turns, each of all three paces")
    parser.add_argument("--seed", type=int, default=default.seed, help="of weights and inputs")
    given = parser.parse_args()
    sizes = replace(default.sizes, layers=given.layers, experts=given.experts, side=given.side)
    run(Setting(sizes, given.share, given.slots, given.steps, given.repeats, given.seed))


if __name__ == "__main__":
    main()
