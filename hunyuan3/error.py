"""What a weight format costs in numbers, measured on a checkpoint's own weights.

    python -m hunyuan3.error FOLDER [--format int4] [--layers 2]

Per format: relative error and cosine of the weights of each kind, and the relative error of what each layer adds to the
residual stream, against the published weights. The inputs of the layers are calibrated: random tokens of the folder's
own embedding, passed through the layers before. Only the asked layers are read, and of each layer the weights of the
first four experts are compared.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .checkpoint.index import open_shard
from .errors import Hunyuan3Error, RequestError
from .folder import ModelFolder
from .ops.attention import plan_attention
from .ops.quantized import quantize
from .ops.rope import rope_positions, rope_table
from .parts import LoadOptions, load_transformer
from .quant.policy import FORMATS, QuantPolicy, policy_of
from .transformer.model import Hunyuan3Transformer
from .types import Span

_TOKENS = 64
_EXPERTS = 4  # of each layer, whose weights are compared one by one


@dataclass(frozen=True)
class WeightError:
    """Of one kind of tensor: relative error |q - w| / |w| and cosine, over all tensors compared."""

    kind: str
    tensors: int
    relative: float
    cosine: float


def weight_errors(folder: ModelFolder, policy: QuantPolicy, layers: int) -> Iterator[WeightError]:
    """One per kind of tensor that the policy stores small, over the first layers."""
    kinds: dict[str, list[str]] = {}
    for name in folder.networks.transformer_slots:
        parts = name.split(".")
        if policy.scheme_of(name) is None or int(parts[2]) >= layers:
            continue
        if "experts" in parts and int(parts[5]) >= _EXPERTS:
            continue
        kinds.setdefault(".".join(part for part in parts[3:-1] if not part.isdigit()), []).append(name)
    for kind, names in kinds.items():
        error = norm = dot = quantized_norm = 0.0
        for name in names:
            with open_shard(folder.index[name].file) as file:
                weight = file.get_tensor(name).float()
            stored = quantize(weight, policy.scheme_of(name)).dequantize(torch.float32)
            error += (stored - weight).square().sum().item()
            norm += weight.square().sum().item()
            quantized_norm += stored.square().sum().item()
            dot += (stored * weight).sum().item()
        yield WeightError(kind, len(names), (error / norm) ** 0.5, dot / (norm * quantized_norm) ** 0.5)


@torch.no_grad()
def layer_errors(reference: Hunyuan3Transformer, quantized: Hunyuan3Transformer) -> list[float]:
    """Relative error of what each layer adds to the stream, both models given the reference's stream."""
    config = reference.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, _TOKENS), generator=generator).to(reference.device)
    rope = rope_table(rope_positions(_TOKENS, ()).to(reference.device), config.head_dim, config.rope_theta)
    plan = plan_attention(Span(0, _TOKENS), ())
    x = reference.wte(ids)
    errors = []
    for ours, theirs in zip(quantized.layers, reference.layers, strict=True):
        expected = theirs(x, rope, plan, reference.new_cache(1, _TOKENS)) - x
        actual = ours(x, rope, plan, quantized.new_cache(1, _TOKENS)) - x
        errors.append(((actual - expected).float().norm() / expected.float().norm()).item())
        x = x + expected
    return errors


def first_layers(folder: ModelFolder, layers: int) -> ModelFolder:
    """The folder as if the model ended after its first layers."""
    layers = min(layers, folder.config.num_layers)
    return replace(folder, config=replace(folder.config, num_layers=layers))


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hunyuan3.error", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("--format", choices=FORMATS[1:], help="one format (default: all)")
    parser.add_argument("--layers", type=_at_least_one, default=2, help="how many layers to read (default: 2)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    try:
        opened = ModelFolder.open(args.folder)
        if opened.pack is not None:
            raise RequestError(f"{args.folder} is a pack. Errors are measured against the folder as it was published.")
        folder = first_layers(opened, args.layers)
        options = LoadOptions(device=args.device, dtype="float32")
        reference = load_transformer(folder, options.resolved())
        for name in [args.format] if args.format else FORMATS[1:]:
            for row in weight_errors(folder, policy_of(name), folder.config.num_layers):
                print(f"{name}  {row.kind:<28} {100 * row.relative:6.2f} %  cosine {row.cosine:.5f}  ({row.tensors})")
            quantized = load_transformer(folder, replace(options, format=name).resolved())
            for index, error in enumerate(layer_errors(reference, quantized)):
                print(f"{name}  output of layer {index:<12} {100 * error:6.2f} %")
    except Hunyuan3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
