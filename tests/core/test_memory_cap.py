"""Work on a checkpoint several times larger than the memory that there is, under a real limit of the system."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hunyuan3.checkpoint.index import INDEX_NAME
from hunyuan3.checkpoint.shard import ShardWriter, StoredTensor
from hunyuan3.config import ModelConfig
from hunyuan3.folder import Networks
from tests.core.golden_paths import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory with RLIMIT_DATA")

MIB = 2**20
SHARDS = 24

# The limit counts what a process may write to, which is what it cannot give back. What Python and torch take before
# any work is measured first, and a tiny checkpoint worked on, so that libraries are loaded.
LIMITED = """
import resource, sys
from hunyuan3.pack import main
from hunyuan3.pipeline import Hunyuan3

def written_to():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData:"))

task, folder, out, tiny, cap = sys.argv[1:]
Hunyuan3.load(tiny, device="cpu", dtype="bfloat16", format="int4")
limit = written_to() + int(cap)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
if task == "pack":
    sys.exit(main([folder, out, "--format", "int4", "--device", "cpu"]))
model = Hunyuan3.load(folder, device="cpu", dtype="bfloat16", format=task)
print(sum(parameter.nbytes for parameter in model.transformer().parameters()))
"""


@pytest.fixture(scope="module")
def large(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An instruct folder of 1.6 GB in bfloat16, in sparse files: its weights are zeros and take no disk."""
    folder = tmp_path_factory.mktemp("large")
    for file in folders["instruct"].iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    data |= {"hidden_size": 1024, "attention_head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
    data |= {"num_hidden_layers": 8, "num_experts": 32, "moe_intermediate_size": 1024, "moe_topk": 2}
    data |= {"num_shared_expert": 1}
    data["vit_aligner"]["n_embed"] = 1024
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    shapes = {name: slot.shape for name, slot in Networks(ModelConfig.from_folder(folder)).all_slots.items()}
    weight_map = {}
    for shard in range(SHARDS):
        name, part = f"model-{shard}.safetensors", sorted(shapes)[shard::SHARDS]
        weight_map |= dict.fromkeys(part, name)
        with ShardWriter(folder / name, [StoredTensor(key, torch.bfloat16, tuple(shapes[key])) for key in part]):
            pass  # nothing is written: zeros
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


def limited(task: str, folder: Path, out: Path, tiny: Path, cap: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, task, folder, out, tiny, str(cap)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(list(map(str, command)), cwd=REPOSITORY, env=env, capture_output=True, text=True)


def test_a_checkpoint_of_eight_times_the_memory_is_packed_and_the_pack_loads(large, folders, tmp_path):
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    cap, out, tiny = 200 * MIB, tmp_path / "pack", folders["instruct"]
    assert size > 7.5 * cap
    packed = limited("pack", large, out, tiny, cap)
    assert packed.returncode == 0, packed.stderr[-2000:]
    # What is loaded must fit, of course: 4.5 bits a weight. In bfloat16 it does not, so the limit is a real one.
    room = 600 * MIB
    assert size > 2.5 * room
    loaded = limited("auto", out, out, tiny, room)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert 0.7 * room < int(loaded.stdout) < room
    refused = limited("bf16", large, out, tiny, room)
    assert refused.returncode != 0
    assert "can't allocate memory" in refused.stderr or "MemoryError" in refused.stderr, refused.stderr[-500:]


def test_it_is_quantised_while_loading_within_the_same_memory(large, folders, tmp_path):
    loaded = limited("int4", large, tmp_path, folders["instruct"], 600 * MIB)
    assert loaded.returncode == 0, loaded.stderr[-2000:]
