"""What fits on which card with how much RAM, and how fast it will be; nothing is loaded.

    python -m hunyuan3.plan FOLDER --vram 24 --ram 64 [--format fp8] [--size 1024x1024] [--batch 1]
    python -m hunyuan3.plan --published --table

FOLDER needs only its config.json. Times are calculated from assumed rates, which the options change.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint.keymap import ROUTER_SUFFIX
from .checkpoint.manifest import PackManifest
from .config import ModelConfig
from .errors import Hunyuan3Error
from .folder import Networks
from .ops.quantized import Scheme
from .placement.budget import DISK, PCIE4, DeviceBudget, HostBudget, LayerSizes, PartSizes, Rate, Workload
from .placement.plan import Plan
from .placement.planner import Freedom, attempt, plan
from .quant.modules import CHUNK, is_quantized, swap
from .quant.policy import FORMATS, policy_of

_GIB = 2**30
_LINK, _NO_DISK = Rate(PCIE4), Rate(0.0)
_CONTEXT = _GIB  # of a card: the driver's context, libraries, what the allocator cannot use; assumed
_SYSTEM = 8 * _GIB  # of RAM: the system, ComfyUI, Python; assumed
_PINNED_SHARE = 0.5  # of RAM: Windows allows no more

# FLOP/s that dense bfloat16 products reach (60 % of the published peak, 45 % on data centre cards) and bytes/s of the
# memory, by GiB of a typical card: RTX 4070, 4080, 4090, 5090, 6000 Ada, H100, PRO 6000 Blackwell, H200. Assumed.
_CARDS = {
    12: (35e12, 504e9),
    16: (58e12, 717e9),
    24: (99e12, 1008e9),
    32: (125e12, 1792e9),
    48: (109e12, 960e9),
    80: (445e12, 3350e9),
    96: (150e12, 1792e9),
    141: (445e12, 4800e9),
}
_TABLE_CARDS = ((12,), (16,), (24,), (24, 24), (32,), (48,), (80,), (96,), (141,))
_TABLE_RAM = (32, 64, 128, 192)


def sizes_of(
    config: ModelConfig,
    weight_format: str = "bf16",
    dtype: torch.dtype = torch.bfloat16,
    vae_dtype: torch.dtype = torch.float16,
    *,
    experts_at_once: int | None = None,
) -> PartSizes:
    """Bytes of the networks that a configuration describes, as `parts.place_transformer` and the others place them.

    dtype, vae_dtype: of what is not stored small, and of the VAE. experts_at_once: None for what the grouped backend
    does, 1 for the loop. Raises RequestError for an unknown format.
    """
    networks = Networks(config)
    model, policy = networks.transformer(), policy_of(weight_format)
    if policy is not None:
        swap(model, policy)
    dense, experts, rest, head = [0] * config.num_layers, [0] * config.num_layers, 0, 0
    for name, parameter in model.named_parameters():
        stored = torch.float32 if name.endswith(ROUTER_SUFFIX) else dtype
        nbytes = parameter.numel() * (parameter.dtype if is_quantized(name, model) else stored).itemsize
        parts = name.split(".")
        if parts[0] != "layers":
            rest += nbytes
            head += nbytes if parts[0] == "lm_head" else 0
        elif parts[2:4] == ["mlp", "experts"]:
            experts[int(parts[1])] += nbytes
        else:
            dense[int(parts[1])] += nbytes
    if policy is None:
        at_once, scratch = config.moe.num_experts, 0
    else:
        at_once = CHUNK
        scratch = _scratch(config, policy.experts, dtype)
    return PartSizes(
        layers=tuple(
            LayerSizes(layer, bank // config.moe.num_experts) for layer, bank in zip(dense, experts, strict=True)
        ),
        experts=config.moe.num_experts,
        rest=rest,
        vae=sum(parameter.numel() for parameter in networks.vae().parameters()) * vae_dtype.itemsize,
        vision=sum(parameter.numel() for parameter in networks.vision().parameters()) * dtype.itemsize,
        head=head,
        experts_at_once=experts_at_once or min(at_once, config.moe.num_experts),
        scratch=scratch,
    )


def published_config() -> ModelConfig:
    """The published 80B model's configuration, as far as sizes and speed depend on it."""
    layers = 32
    return ModelConfig.from_json(
        {
            "vocab_size": 133120,
            "hidden_size": 4096,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "attention_head_dim": 128,
            "max_position_embeddings": 22800,
            "num_experts": 64,
            "moe_topk": 8,
            "moe_intermediate_size": 3072,
            "num_shared_expert": 1,
            "cond_token_attn_type": "joint_full",
            "vae": {
                "latent_channels": 32,
                "block_out_channels": [128, 256, 512, 1024, 1024],
                "layers_per_block": 2,
                "ffactor_spatial": 16,
                "ffactor_temporal": 4,
                "sample_size": 384,
                "scaling_factor": 0.562679178327931,
            },
            "vit": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "num_patches": 256,
            },
            "vit_processor": {"max_num_patches": 1024},
            "vit_aligner": {"projector_type": "mlp_gelu", "depth": 2},
        },
        "the published configuration",
    )


@dataclass(frozen=True)
class Machine:
    """Cards and RAM as people name them, in GiB, and the rates that the cards' names do not tell."""

    cards: tuple[float, ...]
    ram: float
    link: Rate = _LINK
    disk: Rate = _NO_DISK

    def devices(self) -> list[DeviceBudget]:
        """One per card, rates of the largest known card that is not larger."""
        budgets = []
        for index, card in enumerate(self.cards):
            compute, memory = rates_of_card(card)
            nbytes = max(0, int(card * _GIB) - _CONTEXT)
            budgets.append(DeviceBudget(f"cuda:{index}", nbytes, Rate(compute), Rate(memory), self.link))
        return budgets

    def host(self) -> HostBudget:
        """What is left of the RAM beside the system."""
        usable = max(0, int(self.ram * _GIB) - _SYSTEM)
        pinned = min(usable, int(self.ram * _PINNED_SHARE * _GIB))
        return HostBudget(pinned, usable - pinned, disk=self.disk)


def rates_of_card(gib: float) -> tuple[float, float]:
    """(FLOP/s, bytes/s of its memory) of the largest known card that is not larger than this; assumed."""
    return _CARDS[max((size for size in _CARDS if size <= gib * 1.02 + 0.5), default=min(_CARDS))]


def table(config: ModelConfig, work: Workload, formats: Sequence[str], disk: Rate = _NO_DISK) -> str:
    """Seconds per step of every card, RAM and format, or what is missing; Markdown."""
    sizes = {name: sizes_of(config, name, work.dtype, work.vae_dtype) for name in formats}
    lines = ["| card | RAM | " + " | ".join(formats) + " |", "|---|---|" + "---|" * len(formats)]
    for cards in _TABLE_CARDS:
        for ram in _TABLE_RAM:
            machine = Machine(cards, ram, disk=disk)
            cells = [_cell(config, sizes[name], machine, work) for name in formats]
            lines.append(f"| {_cards(cards)} | {ram} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(config: ModelConfig, sizes: PartSizes, machine: Machine, work: Workload) -> str:
    outcome = attempt(config, sizes, machine.devices(), machine.host(), work, Freedom(streaming=True, split=True))
    if isinstance(outcome, Plan):
        return f"{outcome.step_seconds:.1f} s/step"
    where = "RAM" if outcome.where == "host" else "on the card"
    return f"no: needs {max(0.1, outcome.missing / _GIB):.1f} GB more {where}"


def _cards(cards: Sequence[float]) -> str:
    return f"{cards[0]:g} GB" if len(cards) == 1 else f"{len(cards)}x{cards[0]:g} GB"


def _scratch(config: ModelConfig, scheme: Scheme, dtype: torch.dtype) -> int:
    """The most that is alive while an expert's larger matrix is read back (`QuantizedWeight.dequantize`)."""
    passes = 8  # bytes per weight: its float32 copy, and that times the scale
    if scheme == "int4" and dtype.itemsize < 4:
        passes += dtype.itemsize  # the copy is still there when the product is cast
    return 2 * max(config.moe.intermediate_size) * config.hidden_size * passes


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 1024x768 (width x height)")
    return int(width), int(height)


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _amount(text: str) -> float:
    return 0.0 if float(text) == 0 else _positive(text)


def main(argv: list[str] | None = None) -> int:
    """Prints the plan, the refusal, or the table; returns the exit code, 1 for a refusal."""
    parser = argparse.ArgumentParser(prog="python -m hunyuan3.plan", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="checkpoint folder; its config.json is enough")
    parser.add_argument("--published", action="store_true", help="the published 80B model instead of a folder")
    parser.add_argument("--format", choices=FORMATS, help="default: as the folder has it")
    parser.add_argument("--vram", type=_positive, nargs="+", default=[24.0], help="GB of each card")
    parser.add_argument("--ram", type=_amount, default=64.0, help="GB of RAM in the machine")
    parser.add_argument("--cpu", action="store_true", help="compute in RAM, without a card")
    parser.add_argument("--size", type=_size, default=(1024, 1024), help="width x height (default: 1024x1024)")
    parser.add_argument("--batch", type=int, default=1, help="pictures drawn at once")
    parser.add_argument("--sequential", action="store_true", help="guidance's branches one after the other")
    parser.add_argument(
        "--link", type=_positive, default=PCIE4 / 1e9, help="GB/s from RAM to a card (default: PCIe 4.0)"
    )
    parser.add_argument(
        "--disk", type=_amount, default=0.0, help=f"GB/s from disk, say {DISK / 1e9:g} (default: unused)"
    )
    parser.add_argument("--no-streaming", action="store_true", help="everything must fit on the cards")
    parser.add_argument("--table", action="store_true", help="every card, RAM and format, as Markdown")
    args = parser.parse_args(argv)
    if args.published == (args.folder is not None):
        parser.error("give a folder or --published")
    try:
        config = published_config() if args.published else ModelConfig.from_folder(args.folder)
        pack = None if args.published else PackManifest.from_folder(args.folder)
        weight_format = args.format or ("bf16" if pack is None else pack.format)
        if args.table and args.cpu:
            parser.error("--table is about cards; leave --cpu out")
        branches = 1 if config.cfg_distilled else 2
        work = Workload(
            width=args.size[0],
            height=args.size[1],
            batch=args.batch,
            rows=1 if args.sequential else branches,
            passes=branches if args.sequential else 1,
        )
        if args.table:
            names = [name for name in FORMATS if not name.endswith("_dynamic")]  # these take the same bytes
            print(table(config, work, names, Rate(args.disk * 1e9)))
            return 0
        machine = Machine(tuple(args.vram), args.ram, Rate(args.link * 1e9), Rate(args.disk * 1e9))
        devices = machine.devices()
        if args.cpu:
            devices = [DeviceBudget("cpu", 0, Rate(1e12), Rate(50e9))]
        sizes = {name: sizes_of(config, name, work.dtype, work.vae_dtype) for name in FORMATS}
        made = plan(
            config,
            sizes[weight_format],
            devices,
            machine.host(),
            work,
            Freedom(streaming=not args.no_streaming, split=True),
            alternatives=sizes,
        )
        print(made.text())
    except Hunyuan3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
