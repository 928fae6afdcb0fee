"""`benchmarks/loading.py` runs, loads what it says, and ends in its ratio."""

import re
import subprocess
import sys

import torch

from benchmarks import loading
from hunyuan3.pipeline import Hunyuan3
from tests.core.golden_paths import REPOSITORY


def test_it_measures_each_format_and_ends_in_the_ratio(tmp_path):
    command = [
        sys.executable,
        "benchmarks/loading.py",
        "--gb",
        "0.1",
        "--formats",
        "bf16",
        "int8",
        "--keep",
        tmp_path / "out",
    ]
    out = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.fullmatch(r"ratio: \d+\.\d\d", out[-1])
    for what in ("published, as bf16", "pack of int8", "published, as int8"):
        (line,) = (line for line in out if line.startswith(what))
        plain, loaded, ratio = (float(number) for number in re.findall(r"\d+\.\d+", line))
        assert 0 < plain
        assert 0 < loaded
        assert abs(ratio - loaded / plain) < 0.02 + 0.02 / plain


def test_what_is_loaded_is_what_was_written(tmp_path):
    """Else the figure would be of nothing: the folder's numbers come back, each in its place."""
    folder = loading.make_folder(tmp_path / "folder", 0.05, 256, 192)
    model = Hunyuan3.load(folder, device="cpu", dtype="bfloat16").transformer()
    pool = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = model.layers[0].mlp.experts.gate_up[3]
    assert torch.equal(weight.flatten(), pool[: weight.numel()])
