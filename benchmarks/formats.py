"""How exactly weights can be kept in 4 bits (and 8): groups, codebooks, scales and a rotation, by measured error.

    python benchmarks/formats.py                          # 256 x 4096, about two minutes
    python benchmarks/formats.py --rows 512 --columns 3072
    python benchmarks/formats.py --rows 32 --columns 1024  # a quick look

A weight (out, in) is cut into groups along its input; a group has a scale, and a weight is a level of a codebook times
the scale. Compared are

* groups of 16, 32, 64, 128 and the whole row;
* codebooks of 4 bits: the integers -7..7; the integers -7..8 under a signed scale; NF4's 16 levels; and Lloyd levels as
  in `hunyuan3.ops.quantized`: best for Gaussian weights divided by their group's largest, sign included. These are
  found here anew for each group size and way of choosing scales, so that each is at its best;
* a group's scale from its largest weight (`largest`), the best of a few around it (`searched`), or of these with either
  sign (`signs`), which turns an uneven codebook round;
* scales as fp8 under a float32 scale per row, or as fp16. A whole row has one float32 scale. Bits a weight count them;
* a Hadamard rotation of blocks of 128 inputs. The activations would be rotated as well when the model runs, which a
  product does not notice; so errors are those of the weight rotated back.

Weights are synthetic: Gaussian, Laplace, Student's t with 4 degrees of freedom, and Gaussian with 0.5 % of the columns
ten times as large (`cols`). Errors are relative, in per cent: of the weight, |q - w| / |w|, and of its product with
activations, which are Gaussian, or Gaussian with 0.2 % of the channels twenty times as large (`channels`), as in real
transformers. Rows marked `package` are what `hunyuan3.ops.quantized.quantize` makes.

Why e4m3 (fp8) with a scale per row does not get below about 2.6 %: three mantissa bits are eight steps an octave,
however large the scale is. A value m times its power of two (1 <= m < 2) is rounded by 1/8 / sqrt(12) of that power, so
relatively by 3.6 % / m. With m anywhere in its octave the mean square of 1 / m is 0.75 / (2 ln 2) = 0.54, which makes
2.65 %. A scale only shifts weights along their octaves: one for each group instead of each row gains next to nothing,
and a search for the shift that happens to suit each 16 weights gains a tenth, for half a bit. int8, whose steps are
alike, is three times as exact as long as a row's largest weight is a few times the typical one.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from hunyuan3.ops.quantized import SCHEMES, quantize

GROUPS = (16, 32, 64, 128, 0)  # 0: the whole row
BLOCK = 128  # inputs that are rotated together
WEIGHTS = ("gauss", "laplace", "t4", "cols")
ACTIVATIONS = ("gauss", "channels")
_TOKENS = 64
# A group's scale is its largest weight times one of these: as in the package, and smaller, for wide groups with a few
# large weights.
_SEARCHED = (1.0, 0.93, 0.86, 0.79, 0.72, 1.05, 0.62, 0.52, 0.42, 0.32)
CHOICES = {"largest": (1.0,), "searched": _SEARCHED, "signs": _SEARCHED + tuple(-trial for trial in _SEARCHED)}
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_LLOYD_WEIGHTS, _LLOYD_COLUMNS, _LLOYD_STEPS = 2**18, 4096, 50
_NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Codebook:
    """Levels, ascending, for weights over their group's largest: over its magnitude, or, signed, over itself."""

    levels: tuple[float, ...]
    signed: bool = False

    @property
    def bits(self) -> int:
        return math.ceil(math.log2(len(self.levels)))


@dataclass(frozen=True)
class Method:
    """One way to store a weight: `codebook` of CODEBOOKS or "lloyd", `group` of GROUPS, `choice` of CHOICES."""

    codebook: str
    group: int
    choice: str = "searched"
    scale: str = "fp8"
    rotated: bool = False

    def bits(self, columns: int) -> float:
        """Of one weight, with its share of the scales."""
        codes = 4 if self.codebook == "lloyd" else CODEBOOKS[self.codebook].bits
        if not self.group:
            return codes + 32 / columns
        return codes + (8 / self.group + 32 / columns if self.scale == "fp8" else 16 / self.group)

    def stored(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (out, in), quantised and read back."""
        group = self.group or weight.shape[1]
        codebook = lloyd(group, self.choice) if self.codebook == "lloyd" else CODEBOOKS[self.codebook]
        groups = (rotate(weight) if self.rotated else weight).unflatten(-1, (-1, group))
        scale = "float32" if not self.group else self.scale
        _, _, values = nearest(groups, codebook, CHOICES[self.choice], scale)
        return rotate(values.flatten(-2)) if self.rotated else values.flatten(-2)


@dataclass(frozen=True)
class PackageMethod:
    """One of the package's own schemes."""

    scheme: str
    rotated: bool = False

    def bits(self, columns: int) -> float:
        return 8 * quantize(torch.ones(1, columns), self.scheme).nbytes / columns

    def stored(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (out, in), quantised and read back."""
        values = quantize(rotate(weight) if self.rotated else weight, self.scheme).dequantize(torch.float32)
        return rotate(values) if self.rotated else values


CODEBOOKS = {
    "-7..7": Codebook(tuple(i / 7 for i in range(-7, 8))),
    "-7..8": Codebook(tuple(i / 8 for i in range(-7, 9)), signed=True),
    "nf4": Codebook(_NF4),
    "int8": Codebook(tuple(i / 127 for i in range(-127, 128))),
    "e4m3": Codebook(
        tuple(sorted({v / _FP8_MAX for v in torch.arange(256).byte().view(_FP8).tolist() if math.isfinite(v)}))
    ),
}
_FOUR_BITS = ("-7..7", "-7..8", "nf4", "lloyd")


def methods() -> Iterator[tuple[str, list[Method | PackageMethod]]]:
    """The table's sections: a title and its rows."""
    yield "the package", [PackageMethod(scheme) for scheme in SCHEMES]
    yield (
        "8 bits, a scale per group",
        [Method("e4m3", 16, choice) for choice in ("largest", "searched")]
        + [Method("int8", group) for group in (16, 128)],
    )
    for choice in ("largest", "searched"):
        rows = [Method(codebook, group, choice) for codebook, group in product(_FOUR_BITS, GROUPS)]
        yield f"4 bits, fp8 scales, {choice}", rows
    yield "4 bits, fp8 scales, signs", [Method("lloyd", group, "signs") for group in GROUPS]
    yield "4 bits, fp16 scales", [Method("lloyd", group, scale="fp16") for group in GROUPS if group]
    rotated = [Method(codebook, group, rotated=True) for codebook, group in product(_FOUR_BITS, GROUPS)]
    yield "rotated", [*(PackageMethod(scheme, rotated=True) for scheme in SCHEMES), *rotated]


def nearest(
    groups: torch.Tensor, codebook: Codebook, trials: tuple[float, ...], scale: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For groups (r, g, n): codes (r, g, n), steps (r, g, 1) and values (r, g, n), of each group's best trial."""
    levels = torch.tensor(codebook.levels)
    boundaries = (levels[1:] + levels[:-1]) / 2
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    if not codebook.signed:
        largest = largest.abs()
    row = largest.abs().amax(1, keepdim=True) * max(trials) / _FP8_MAX
    best = None
    for trial in trials:
        step = rounded(largest * trial, row, scale)
        codes = torch.bucketize(groups / step, boundaries)
        values = levels[codes] * step
        error = (values - groups).square().sum(-1, keepdim=True)
        if best is None:
            best = error, codes, step, values
        else:
            better = error < best[0]
            best = tuple(
                torch.where(better, new, old) for new, old in zip((error, codes, step, values), best, strict=True)
            )
    return best[1:]


def rounded(step: torch.Tensor, row: torch.Tensor, scale: str) -> torch.Tensor:
    """Scales as they are stored; `row` is for fp8. None is zero."""
    if scale == "fp8":
        step = (step / row).to(_FP8).float() * row
    elif scale == "fp16":
        step = step.half().float()
    return torch.where(step != 0, step, torch.ones_like(step))


@lru_cache(maxsize=32)
def lloyd(group: int, choice: str) -> Codebook:
    """16 levels for Gaussian weights in groups of this size, by Lloyd's algorithm: assign, average, and again.

    An average weighs by the square of the scale, as errors do. Scales are chosen anew in every step. One level stays
    zero, which costs nothing but under either sign, so not there. Where it settles depends on where it starts: from
    evenly spread levels the uppermost two end around 1, and a group's largest may be either.
    """
    generator = torch.Generator().manual_seed(1)
    in_row = max(1, _LLOYD_COLUMNS // group)
    groups = torch.randn(max(1, _LLOYD_WEIGHTS // (in_row * group)), in_row, group, generator=generator)
    levels = torch.linspace(-0.9, 1.0, 16) * min(1.0, (16 / group) ** 0.1)
    for _ in range(_LLOYD_STEPS):
        codebook = Codebook(tuple(levels.tolist()), signed=True)
        codes, steps, _ = nearest(groups, codebook, CHOICES[choice], "fp8" if in_row > 1 else "float32")
        codes, weights = codes.flatten(), (steps**2).expand_as(groups).flatten()
        totals = torch.zeros(16).index_add_(0, codes, (groups * steps).flatten())
        counts = torch.zeros(16).index_add_(0, codes, weights)
        levels = torch.where(counts > 0, totals / counts, levels)
        if choice != "signs":
            levels[levels.abs().argmin()] = 0.0
    return Codebook(tuple(levels.tolist()), signed=True)


@lru_cache(maxsize=2)
def hadamard(size: int) -> torch.Tensor:
    """The orthogonal and symmetric Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotates blocks of 128 columns of x (n, in); twice is the identity."""
    return (x.unflatten(-1, (-1, BLOCK)) @ hadamard(BLOCK)).flatten(-2)


def make_weight(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    """A random weight (rows, columns) of one of WEIGHTS."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "laplace":
        uniform = torch.rand(rows, columns, generator=generator).clamp_min_(1e-7)
        weight = weight.sign() * -uniform.log()
    elif kind == "t4":
        squares = torch.randn(4, rows, columns, generator=generator).square().mean(0)
        weight = weight / squares.sqrt()
    elif kind == "cols":
        weight[:, _some(columns, 0.005, generator)] *= 10
    return weight


def make_activations(kind: str, columns: int, seed: int) -> torch.Tensor:
    """Random activations (64, columns) of one of ACTIVATIONS."""
    generator = torch.Generator().manual_seed(seed + 1000)
    x = torch.randn(_TOKENS, columns, generator=generator)
    if kind == "channels":
        x[:, _some(columns, 0.002, generator)] *= 20
    return x


def _some(columns: int, share: float, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(columns, generator=generator)[: max(1, round(share * columns))]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def errors(method: Method | PackageMethod, rows: int, columns: int, seed: int) -> dict[str, list[float]]:
    """Relative errors, one for each of WEIGHTS: of the "weight", and of products by each of ACTIVATIONS."""
    found: dict[str, list[float]] = {"weight": [], **{kind: [] for kind in ACTIVATIONS}}
    for kind in WEIGHTS:
        weight = make_weight(kind, rows, columns, seed)
        stored = method.stored(weight)
        found["weight"].append(relative(stored, weight))
        for name in ACTIVATIONS:
            x = make_activations(name, columns, seed)
            found[name].append(relative(x @ stored.mT, x @ weight.mT))
    return found


def label(method: Method | PackageMethod) -> str:
    if isinstance(method, PackageMethod):
        return f"{method.scheme:<6} (package)"
    return f"{method.codebook:<6} {method.group or 'row':>4}  {method.choice:<8}"


def report(rows: int, columns: int, seed: int) -> None:
    """Prints the table, section by section."""
    print(f"Weights {rows} x {columns}; errors in per cent.")
    print()
    over = "".join(f" | {title:<31}" for title in ("weight", "product, gauss", "product, channels"))
    print(f"{'':<22}{'':>6}{over}")
    kinds = "".join(f"{kind:>8}" for kind in WEIGHTS)
    print(f"{'codebook, group, scale':<22}{'bits':>6}" + f" |{kinds}" * 3)
    for title, listed in methods():
        print(f"\n{title}")
        for method in listed:
            found = errors(method, rows, columns, seed)
            cells = "".join(" |" + "".join(f"{100 * value:8.2f}" for value in found[key]) for key in found)
            print(f"{label(method):<22}{method.bits(columns):>6.2f}{cells}", flush=True)


def report_activations(columns: int, seed: int) -> None:
    """Prints what storing the activations costs, token by token, as the `dynamic` formats do."""
    print("\nactivations, a scale per token" + "".join(f"{kind:>10}" for kind in ACTIVATIONS))
    for scheme, rotated in product(("int8", "fp8"), (False, True)):
        method = PackageMethod(scheme, rotated)
        listed = (make_activations(kind, columns, seed) for kind in ACTIVATIONS)
        cells = "".join(f"{100 * relative(method.stored(x), x):10.2f}" for x in listed)
        print(f"{scheme + (', rotated' if rotated else ''):<30}{cells}")


def report_levels() -> None:
    print("\nLloyd levels for groups of 16")
    for choice in CHOICES:
        print(f"{choice:<9}" + " ".join(f"{level:.4f}" for level in lloyd(16, choice).levels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=4096, help=f"a multiple of {BLOCK}")
    parser.add_argument("--seed", type=int, default=0, help="of weights and activations")
    arguments = parser.parse_args()
    if arguments.columns % BLOCK:
        parser.error(f"--columns must be a multiple of {BLOCK}.")
    report(arguments.rows, arguments.columns, arguments.seed)
    report_activations(arguments.columns, arguments.seed)
    report_levels()


if __name__ == "__main__":
    main()
