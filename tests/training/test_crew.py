"""Two processes train one model: the same weights in both, from gradients of all rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.testbed import REPO
from training.state import load_state

_MEMBER = """
import sys
from pathlib import Path

import torch

from training.crew import Crew

crew = Crew.joined()
out = Path(sys.argv[1])
assert crew.share(range(5)) == list(range(crew.rank, 5, crew.size))
assert crew.gathered([str(i) for i in crew.share(range(5))]) == [str(i) for i in range(5)]
assert crew.agreed(crew.rank == 0) is True
assert crew.agreed(crew.rank == 1) is False
for count in (1, 2, 5):  # parts of unequal length, and one without any
    items = torch.arange(6.0 * count).view(count, 2, 3)
    seen = []
    result = crew.worked(lambda part: seen.append(len(part)) or part.mT.contiguous().mT.bfloat16() * 2, items)
    assert torch.equal(result, items.bfloat16() * 2)
    assert seen == [(count + 1) // 2 if crew.rank == 0 else count // 2]
parameters = [torch.nn.Parameter(torch.zeros(*shape)) for shape in ((2, 3), (4,), (1,), (1,))]
parameters[0].grad = torch.full((2, 3), 1.0 + crew.rank)
parameters[1].grad = torch.arange(4.0) * (3 if crew.rank else 1)
if crew.rank:
    parameters[2].grad = torch.full((1,), 4.0)
crew.average(parameters)
torch.save([parameter.grad for parameter in parameters], out / f"gradients{crew.rank}.pt")

from tests.training.conftest import SMALL, bytes_vocabulary
from training.flat_vae import FlatVAE
from training.lessons import Curriculum
from training.run import train
from training.transformer import TransformerStage
from training.vae import TINY_VAE
from dataclasses import replace

torch.manual_seed(0)
vae = FlatVAE(TINY_VAE).state_dict()
config = replace(SMALL, steps=6, curriculum=Curriculum(edits=0.4, questions=0.3), rows=8, lessons=40)
stage = TransformerStage(config, bytes_vocabulary(), vae, (0.0, 1.0), torch.float32, crew)
records = [stage.step() for _ in range(4)]
torch.save({"masters": stage.optimiser.masters, "records": records}, out / f"stage{crew.rank}.pt")
train(stage, out / f"run{crew.rank}" / "state.pt", 5.0, crew)
torch.save(stage.optimiser.masters, out / f"finished{crew.rank}.pt")
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("crew")
    program = out / "member.py"
    program.write_text(_MEMBER, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(program), str(out)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_gradients_are_averaged(results: Path) -> None:
    for rank in (0, 1):
        first, second, third, fourth = torch.load(results / f"gradients{rank}.pt", weights_only=True)
        assert torch.equal(first, torch.full((2, 3), 1.5))
        assert torch.equal(second, torch.arange(4.0) * 2)
        assert torch.equal(third, torch.tensor([2.0]))
        assert fourth is None


def test_processes_see_other_rows_and_have_the_same_weights(results: Path) -> None:
    first, second = (torch.load(results / f"stage{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, master in first["masters"].items():
        assert torch.equal(master, second["masters"][name]), name
    assert first["records"] != second["records"]
    assert [record["norm"] for record in first["records"]] == [record["norm"] for record in second["records"]]


def test_the_first_process_alone_writes_what_all_came_to(results: Path) -> None:
    first, second = (torch.load(results / f"finished{rank}.pt", weights_only=True) for rank in (0, 1))
    saved = load_state(results / "run0" / "state.pt")["stage"]
    assert saved["done"] == 6
    assert (results / "run0" / "state.csv").exists()
    assert list((results / "run1").iterdir()) == []
    for name, master in saved["optimiser"]["masters"].items():
        assert torch.equal(master, first[name]), name
        assert torch.equal(master, second[name]), name
