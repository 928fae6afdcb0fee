"""How fast a folder loads, against reading the same files plainly: bytes per second of each, in one run.

    python benchmarks/loading.py [--gb 2.0] [--formats bf16 int8 fp8 int4] [--device cpu]

Makes a folder of random bfloat16 weights (the published layout, experts one by one over several files) and a pack of
it in each format, reads all files of each plainly (`file.read()`, one after the other, each kept: weights need memory
of their own, too), then loads them. Every figure is bytes of the files over seconds. All files are in the system's file
cache: what is compared is the way from there to where the weights live. The last line is of the published folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hunyuan3.checkpoint.index import INDEX_NAME
from hunyuan3.checkpoint.shard import ShardWriter, StoredTensor
from hunyuan3.config import ModelConfig
from hunyuan3.folder import ModelFolder, Networks
from hunyuan3.pack import pack
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.tiny import make_tiny

_SHARDS = 4
_HIDDEN, _INNER, _EXPERTS = 2048, 1536, 32
_REPEATS = 3


def make_folder(path: Path, gigabytes: float, hidden: int = _HIDDEN, inner: int = _INNER) -> Path:
    """A tiny instruct folder with wide layers (half the published width), as many as it takes."""
    make_tiny(path, "instruct")
    for file in (*path.glob("*.safetensors"), path / INDEX_NAME):
        file.unlink()
    data = json.loads((path / "config.json").read_text(encoding="utf-8"))
    layer = 2 * (_EXPERTS + 1) * 3 * hidden * inner
    data |= {"hidden_size": hidden, "attention_head_dim": hidden // 16, "num_attention_heads": 16}
    data["num_key_value_heads"] = 4
    data |= {"num_hidden_layers": max(1, round(gigabytes * 1e9 / layer)), "num_experts": _EXPERTS, "moe_topk": 2}
    data |= {"moe_intermediate_size": inner, "num_shared_expert": 1}
    data["vit_aligner"]["n_embed"] = hidden
    (path / "config.json").write_text(json.dumps(data), encoding="utf-8")
    shapes = {name: slot.shape for name, slot in Networks(ModelConfig.from_folder(path)).all_slots.items()}
    pool = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight_map = {}
    for shard in range(_SHARDS):
        name = f"model-{shard + 1:04d}-of-{_SHARDS:04d}.safetensors"
        part = sorted(shapes)[shard::_SHARDS]
        weight_map |= dict.fromkeys(part, name)
        with ShardWriter(
            path / name, [StoredTensor(key, torch.bfloat16, tuple(shapes[key])) for key in part]
        ) as writer:
            for key in part:
                numbers = torch.Size(shapes[key]).numel()
                writer.write(key, pool.repeat(numbers // len(pool) + 1)[:numbers].view(shapes[key]))
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return path


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def read_plainly(path: Path) -> float:
    """Bytes per second of reading every weight file into memory of its own."""
    started, contents = time.perf_counter(), []
    for file in weight_files(path):
        with file.open("rb", buffering=0) as opened:
            contents.append(opened.read())
    return sum(map(len, contents)) / (time.perf_counter() - started)


def load(path: Path, device: str, weight_format: str) -> float:
    """Bytes per second of loading all three networks."""
    model = Hunyuan3.open(path, device=device, dtype="bfloat16", vae_dtype="bfloat16", format=weight_format)
    total, started = sum(file.stat().st_size for file in weight_files(path)), time.perf_counter()
    for part in (model.placed_transformer, model.placed_vae, model.placed_vision):
        part.load()
    if model.options.device.type == "cuda":
        torch.cuda.synchronize()
    return total / (time.perf_counter() - started)


def compare(what: str, path: Path, device: str, weight_format: str = "auto") -> float:
    """Prints one line, and returns loading over plain reading: the best of each, taken in turns."""
    plain, loaded = 0.0, 0.0
    for _ in range(_REPEATS):
        plain = max(plain, read_plainly(path))
        loaded = max(loaded, load(path, device, weight_format))
    print(
        f"{what:<34} plain {plain / 1e9:6.2f} GB/s  loaded {loaded / 1e9:6.2f} GB/s  ratio {loaded / plain:.2f}",
        flush=True,
    )
    return loaded / plain


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the folder in bfloat16 (default: 2)")
    parser.add_argument("--hidden", type=int, default=_HIDDEN, help="width of the layers, a multiple of 64")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "fp8", "int4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", type=Path, help="where to put the folders (default: a temporary one)")
    args = parser.parse_args()
    root = args.keep or Path(tempfile.mkdtemp(prefix="hunyuan3-loading-"))
    try:
        folder = make_folder(root / "published", args.gb, args.hidden, args.hidden * 3 // 4)
        size = sum(file.stat().st_size for file in weight_files(folder)) / 1e9
        print(f"{size:.2f} GB in bfloat16, {torch.get_num_threads()} threads, device {args.device}")
        ratio = compare("published, as bf16", folder, args.device)
        for name in args.formats:
            started = time.perf_counter()
            list(pack(ModelFolder.open(folder), root / name, name))
            seconds = time.perf_counter() - started
            print(f"{'packing as ' + name:<34} {size * 1e3 / seconds:.0f} MB/s of bfloat16")
            compare(f"pack of {name}", root / name, args.device)
            if name != "bf16":
                compare(f"published, as {name}", folder, args.device, name)
    finally:
        if args.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
