"""One later denoise step, ours against a restatement of the reference's way (see reference_way.py), on the CPU.

    python benchmarks/denoise.py        # 8 layers: 5 GB of memory, some minutes
    python benchmarks/denoise.py --layers 2 --repeats 2

Same run, same weights, same key-value cache, alternating; times are medians, and what counts are ratios. Ours is
`hunyuan3.generate.denoise`, as the pipeline runs it. The weights are random; their numbers must agree.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.reference_way import ReferenceWay, build_masks, combine_outputs, dispatch_tokens
from hunyuan3.config import ModelConfig, MoEConfig, VAEConfig, VisionConfig
from hunyuan3.generate.denoise import DenoiseStep, denoise
from hunyuan3.generate.rows import SequenceRows
from hunyuan3.generate.schedule import Schedule
from hunyuan3.moe.dispatch import Dispatch, combine
from hunyuan3.moe.layer import MoELayer
from hunyuan3.moe.router import Router, Routing
from hunyuan3.moe.select import choose_backend, expert_backend
from hunyuan3.transformer.kv_cache import KVCache
from hunyuan3.transformer.model import Hunyuan3Transformer
from hunyuan3.types import Grid, ImageRun, Span, TokenSequence

TOLERANCE = 1e-4  # of velocities, relative to the largest
TIE = 1e-5  # of router probabilities
GUIDANCE = 5.0
BRANCHES = 2
STEPS = 50  # of the schedule; only its first ones are run
BUSY = 0.8  # below this share of the processors, even ratios mislead
_GEMM_SIZE = 2048


@dataclass(frozen=True)
class Sizes:
    """What is drawn with what. `side`: the picture is side x side tokens. `prompt`: tokens before <timestep>.

    vocabulary: words, which only text needs many of.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    expert_width: int
    patch_width: int
    latent_channels: int
    side: int
    prompt: int
    vocabulary: int = 512

    @property
    def queries(self) -> int:
        """Tokens of one row that a later step computes: <timestep> and the picture's."""
        return 1 + self.side**2

    @property
    def length(self) -> int:
        """Tokens of one row: prompt, <timestep>, picture, <eoi>."""
        return self.prompt + self.queries + 1


# patch_width keeps the published proportion to the hidden size.
BENCHMARK = Sizes(1024, 8, 16, 4, 64, 8, 768, patch_width=256, latent_channels=32, side=32, prompt=256)
PUBLISHED = Sizes(4096, 32, 32, 8, 64, 8, 3072, patch_width=1024, latent_channels=32, side=64, prompt=1300)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one later step, both guidance branches together, by part.

    Counted: what is a matrix product or a convolution, and the weighted sums of `combine`.
    """

    projections: int
    experts: int
    dispatch_combine: int
    attention: int
    patches: int

    @property
    def total(self) -> int:
        return self.projections + self.experts + self.dispatch_combine + self.attention + self.patches

    @classmethod
    def ours(cls, sizes: Sizes) -> "Flops":
        pairs = sizes.queries * BRANCHES * sizes.top_k
        seen = sizes.length - 1  # nobody sees <eoi>
        return cls._count(sizes, expert_rows=pairs, seen=seen, dispatch_combine=2 * pairs * sizes.hidden, embedded=1)

    @classmethod
    def reference(cls, sizes: Sizes, slots: int | None = None) -> "Flops":
        """`slots` per expert; None: as if the load were perfectly even, the best case."""
        tokens = sizes.queries * BRANCHES
        slots = slots or math.ceil(tokens * sizes.top_k / sizes.experts)
        einsums = 2 * 2 * tokens * sizes.experts * slots * sizes.hidden
        rows = sizes.experts * slots
        return cls._count(sizes, expert_rows=rows, seen=sizes.length, dispatch_combine=einsums, embedded=BRANCHES)

    @classmethod
    def _count(cls, sizes: Sizes, *, expert_rows: int, seen: int, dispatch_combine: int, embedded: int) -> "Flops":
        """`embedded`: how many pictures go through the patch embedder."""
        size, width = sizes.hidden, sizes.patch_width
        rows = sizes.queries * BRANCHES
        head_share = 2 + 2 * sizes.kv_heads / sizes.heads  # q and o, k and v
        attention_weights = int(head_share * size**2)
        mlp_weights = 3 * size * sizes.expert_width
        pixels = sizes.side**2
        embed = 9 * sizes.latent_channels * width + 9 * width * size + 9 * size * size + width * size
        final = 9 * size * width + 9 * width * width + size * width + 9 * width * sizes.latent_channels
        return cls(
            projections=2 * sizes.layers * rows * (attention_weights + size * sizes.experts),
            experts=2 * sizes.layers * (expert_rows + rows) * mlp_weights,  # and the shared one
            dispatch_combine=sizes.layers * dispatch_combine,
            attention=4 * sizes.layers * rows * seen * size,
            patches=2 * pixels * (embedded * embed + BRANCHES * final),
        )


class TieSettlingRouter(Router):
    """Ours chooses; when `following`, the reference's way takes the same experts where it is a tie.

    Thousands of choices in a step always hold some whose last two candidates are equal up to rounding. Two ways that
    add in another order may choose differently there; both are right, but the pictures would differ by more than
    rounding and hide a real error. A different choice that is no tie raises.
    """

    following = False
    settled = 0

    def forward(self, x: torch.Tensor) -> Routing:
        """As the router, see above."""
        routing = super().forward(x)
        if not self.following:
            self.remembered = routing
            return routing
        ours = self.remembered.ids
        (rows,) = (routing.ids.sort(dim=1).values != ours.sort(dim=1).values).any(dim=1).nonzero(as_tuple=True)
        if len(rows):
            probabilities = self.logits(x[rows]).softmax(dim=-1)
            chosen = probabilities.gather(1, ours[rows])
            lost = probabilities.gather(1, routing.ids[rows]).sum(dim=1) - chosen.sum(dim=1)
            if not lost.max() <= TIE:
                raise DisagreementError(f"The two ways chose different experts, {lost.max():.1e} apart.")
            routing.ids[rows] = ours[rows]
            routing.weights[rows] = chosen / chosen.sum(dim=1, keepdim=True)
            self.settled += len(rows)
        return routing


class DisagreementError(Exception):
    """The two ways do not compute the same."""


class Transformer(Hunyuan3Transformer):
    """Ours; lets the benchmark get at the cache that `denoise` asks it for, and settles ties."""

    cache: KVCache

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.mlp.router = TieSettlingRouter(config.hidden_size, config.moe.num_experts, config.moe.top_k[index])

    @property
    def routers(self) -> list[TieSettlingRouter]:
        return [layer.mlp.router for layer in self.layers]

    @contextmanager
    def ties_settled(self) -> Iterator[None]:
        """Inside, the routers follow their last choices in ties."""
        for router in self.routers:
            router.following = True
        yield
        for router in self.routers:
            router.following = False

    def new_cache(self, rows: int, length: int) -> KVCache:
        self.cache = super().new_cache(rows, length)
        return self.cache


def build_model(sizes: Sizes, seed: int) -> Transformer:
    """With random weights that keep activations near 1, and the expert backend that loading would choose."""
    with torch.device("meta"):
        model = Transformer(model_config(sizes))
    model.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    depth_scale = (2 * sizes.layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        inputs = math.prod(parameter.shape[2:] if "experts" in name else parameter.shape[1:])
        writes_to_stream = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down"))
        std = 1.0 if name == "wte.weight" else inputs**-0.5 * (depth_scale if writes_to_stream else 1.0)
        parameter.normal_(0.0, std, generator=generator)
    backend, _ = choose_backend("auto", model.device, model.dtype)
    for layer in model.layers:
        layer.mlp.backend = expert_backend(backend)
    return model.eval()


def model_config(sizes: Sizes) -> ModelConfig:
    """A text-to-image model of these sizes; the VAE and vision parts are never built."""
    return ModelConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.hidden // sizes.heads,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=22800,
        moe=MoEConfig(
            num_experts=sizes.experts,
            top_k=(sizes.top_k,) * sizes.layers,
            intermediate_size=(sizes.expert_width,) * sizes.layers,
            num_shared_experts=(1,) * sizes.layers,
        ),
        vae=VAEConfig(3, 3, sizes.latent_channels, (128,), 1, 16, 4, 384, 1.0),
        vision=VisionConfig(48, 96, 1, 4, 3, 16, 16, 16, 1e-6, use_head=False),
        patch_embed_hidden_dim=sizes.patch_width,
        image_base_size=16 * sizes.side,
        vae_downsample=16,
        cond_token_attn_type="joint_full",
        cfg_distilled=False,
        use_meanflow=False,
        model_version=None,
        token_ids={},
    )


def build_rows(sizes: Sizes, seed: int) -> SequenceRows:
    """A random prompt, and beside it the unconditional branch: one token, repeated."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, sizes.vocabulary, (sizes.length,), generator=generator).tolist()
    span = Span(sizes.prompt + 1, sizes.prompt + sizes.queries)
    grid = Grid(sizes.side, sizes.side)

    def branch(ids: list[int]) -> TokenSequence:
        run = ImageRun("gen", span, grid)
        return TokenSequence(tuple(ids), (Span(0, sizes.prompt),), (run,), gen_timestep=sizes.prompt)

    return SequenceRows((branch(prompt), branch([0] * sizes.length)), (span,), ((span, grid),))


@dataclass(frozen=True)
class Measured:
    """What was found.

    step, dispatch_combine: median seconds of ours and of the reference's way, the latter of all layers together.
    slots: pairs of the busiest expert, per layer. difference: the largest between velocities, which reach up to
    `scale`. choices, ties: how many tokens chose their experts, and how many of them had a tie settled.
    gemm_peak: FLOP/s. cpu_share: of the processors' time while both ways ran, how much was ours.
    """

    step: tuple[float, float]
    dispatch_combine: tuple[float, float]
    slots: list[int]
    difference: float
    scale: float
    choices: int
    ties: int
    gemm_peak: float
    cpu_share: float

    @property
    def relative_difference(self) -> float:
        return self.difference / self.scale


def measure(sizes: Sizes, repeats: int, seed: int) -> Measured:
    """Runs the first step, then later ones both ways: one that is compared but not timed, then `repeats` timed ones."""
    model, rows = build_model(sizes, seed), build_rows(sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, sizes.latent_channels, sizes.side, sizes.side, generator=generator)
    schedule = Schedule.flow_matching(max(STEPS, repeats + 3), shift=3.0)
    moe_inputs: dict[int, torch.Tensor] = {}
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args, index=index: moe_inputs.__setitem__(index, args[0]))
        for index, layer in enumerate(model.layers)
    ]
    ours = denoise(model, rows, latents, schedule, GUIDANCE)
    next(ours)  # fills the cache
    theirs = ReferenceWay(model, rows, model.cache)
    latents = balance_routers(model, ours).latents
    our_times, their_times, rates, differences, scales = [], [], [], [], []
    start, cpu_start = time.perf_counter(), time.process_time()
    for t in schedule.times[2 : 3 + repeats]:
        our_seconds, our_step = timed(lambda: next(ours))
        with model.ties_settled():
            their_seconds, velocity = timed(lambda latents=latents, t=t: theirs.velocity(latents, t))
        our_times.append(our_seconds)
        their_times.append(their_seconds)
        rates.append(gemm_rate())
        differences.append((velocity - our_step.raw_prediction).abs().max().item())
        scales.append(our_step.raw_prediction.abs().max().item())
        latents = our_step.latents
    for handle in handles:
        handle.remove()
    cpu_seconds = time.process_time() - cpu_start
    cpu_share = cpu_seconds / (time.perf_counter() - start) / torch.get_num_threads()
    ties = sum(router.settled for router in model.routers)
    alone = [measure_dispatch(layer.mlp, moe_inputs[index], repeats) for index, layer in enumerate(model.layers)]
    return Measured(
        step=(statistics.median(our_times[1:]), statistics.median(their_times[1:])),
        dispatch_combine=(sum(m[0] for m in alone), sum(m[1] for m in alone)),
        slots=[m[2] for m in alone],
        difference=max(differences),
        scale=min(scales),
        choices=len(differences) * sizes.layers * sizes.queries * BRANCHES,
        ties=ties,
        gemm_peak=max(rates),
        cpu_share=cpu_share,
    )


def balance_routers(model: Transformer, steps: Iterator[DenoiseStep]) -> DenoiseStep:
    """Runs the next step, taking from each router its reaction to the average token it meets there.

    Training balances the load of the experts. Random routers would give one expert three times its share, and make
    the reference's way, whose buffers all have the length of the fullest, slower than it has to be.
    """

    def balance(layer: MoELayer, args: tuple[torch.Tensor]) -> None:
        average = args[0].flatten(0, 1).mean(dim=0)
        weight = layer.router.weight
        weight -= torch.outer(weight @ average, average) / average.square().sum()

    handles = [layer.mlp.register_forward_pre_hook(balance) for layer in model.layers]
    step = next(steps)
    for handle in handles:
        handle.remove()
    return step


@torch.no_grad()
def measure_dispatch(layer: MoELayer, x: torch.Tensor, repeats: int) -> tuple[float, float, int]:
    """Seconds of dispatch and combine alone, ours and theirs, at one layer's input of a real step; and its slots."""
    flat = x.reshape(-1, x.shape[-1])
    routing = layer.router(flat)
    experts = layer.num_experts

    def ours() -> torch.Tensor:
        dispatch = Dispatch.sort(routing.ids, experts)
        return combine(flat[dispatch.token], dispatch, routing)

    def theirs() -> torch.Tensor:
        masks = build_masks(routing, experts)
        return combine_outputs(masks, dispatch_tokens(masks, flat))

    seconds = [(timed(ours)[0], timed(theirs)[0]) for _ in range(1 + repeats)][1:]
    our_median, their_median = (statistics.median(times) for times in zip(*seconds, strict=True))
    return our_median, their_median, int(torch.bincount(routing.ids.flatten()).max())


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def gemm_rate() -> float:
    """FLOP/s of a large square float32 matrix product, the best of three."""
    left, right = torch.randn(2, _GEMM_SIZE, _GEMM_SIZE)
    seconds = min(timed(lambda: torch.mm(left, right))[0] for _ in range(3))
    return 2 * _GEMM_SIZE**3 / seconds


def report(sizes: Sizes, measured: Measured) -> None:
    """Prints the findings; the last line is the ratio of the whole steps, theirs over ours."""
    tokens = sizes.queries * BRANCHES
    even = tokens * sizes.top_k / sizes.experts
    lowest, highest = min(measured.slots) / even, max(measured.slots) / even
    relative = measured.relative_difference
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; {sizes}")
    print(f"processor time that this process got: {measured.cpu_share:.0%}", end="")
    print(" (the machine is busy: repeat when it is idle)" if measured.cpu_share < BUSY else "")
    print(f"busiest expert: {lowest:.2f} to {highest:.2f} times its even share of {even:.0f} of {tokens} tokens")
    print(f"largest difference of velocities: {measured.difference:.1e}, {relative:.1e} of the largest velocity")
    print(f"ties between experts settled alike: {measured.ties} of {measured.choices} choices")
    print()
    print(f"{'seconds':34}{'ours':>10}{'reference':>12}{'ratio':>8}")
    for name, (ours, theirs) in (
        (f"dispatch + combine, {sizes.layers} layers", measured.dispatch_combine),
        ("whole step", measured.step),
    ):
        print(f"{name:34}{ours:10.3f}{theirs:12.3f}{theirs / ours:8.1f}")
    slots = round(sum(measured.slots) / len(measured.slots))
    print_flops("GFLOP of this step", 1e9, Flops.ours(sizes), Flops.reference(sizes, slots))
    print_flops("TFLOP at full model size", 1e12, Flops.ours(PUBLISHED), Flops.reference(PUBLISHED))
    rate = Flops.ours(sizes).total / measured.step[0]
    print()
    peak = measured.gemm_peak
    print(
        f"this machine's matrix product peak: {peak / 1e9:.0f} GFLOP/s; our step: {rate / 1e9:.0f}, {rate / peak:.0%}"
    )
    print(f"ratio: {measured.step[1] / measured.step[0]:.1f}")


def print_flops(title: str, unit: float, ours: Flops, theirs: Flops) -> None:
    """One table of operations by part."""
    print()
    print(f"{title:34}{'ours':>10}{'reference':>12}{'ratio':>8}")
    for name in ("projections", "experts", "dispatch_combine", "attention", "patches", "total"):
        our_count, their_count = getattr(ours, name), getattr(theirs, name)
        label = name.replace("_", " + ")
        print(f"  {label:32}{our_count / unit:10.2f}{their_count / unit:12.2f}{their_count / our_count:8.1f}")


def run(sizes: Sizes, repeats: int, seed: int) -> None:
    """Measures and prints; exits with an error if the two ways disagree."""
    try:
        measured = measure(sizes, repeats, seed)
        relative = measured.relative_difference
        if not relative <= TOLERANCE:  # also when it is not a number
            raise DisagreementError(f"The two ways differ by {relative:.1e} of the largest velocity.")
    except DisagreementError as error:
        sys.exit(str(error))
    report(sizes, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=BENCHMARK.layers, help="fewer for a quick try")
    parser.add_argument("--repeats", type=int, default=5, help="later steps to time, each way")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompt and noise")
    arguments = parser.parse_args()
    run(replace(BENCHMARK, layers=arguments.layers), arguments.repeats, arguments.seed)


if __name__ == "__main__":
    main()
