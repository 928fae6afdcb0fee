"""Stages learn, go on from their states to the bit, and export folders that draw."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hunyuan3.errors import RequestError
from hunyuan3.pipeline import Hunyuan3
from training.finished import start_of
from training.lessons import Curriculum
from training.optimiser import Optimiser, OptimiserConfig, orthogonalised, trapezoid
from training.run import Stage, instruct_stage, main, train, transformer_stage
from training.state import compact, load_state, save_state
from training.transformer import TransformerStage, TransformerStageConfig, noise_levels
from training.vae import VAEStage, VAEStageConfig

INSTRUCT = Curriculum(edits=0.3, fusions=0.1, questions=0.3)
TINY_STAGE = replace(VAEStageConfig(), crops=2, wholes=1, crop=32, crop_share=0.9, warmup=2, steps=20)


def _vae_stage() -> VAEStage:
    return VAEStage(TINY_STAGE, torch.float32)


def test_vae_learns() -> None:
    stage = _vae_stage()
    losses = [stage.step()["loss"] for _ in range(10)]
    assert min(losses[-3:]) < 0.8 * losses[0]


def test_transformer_learns(small_stage: Callable[..., TransformerStage]) -> None:
    stage = small_stage()
    records = [stage.step() for _ in range(24)]
    words = [record["words"] for record in records if "words" in record]
    flow = [record["flow"] for record in records]
    assert sum(flow[-8:]) < 0.97 * sum(flow[:8])
    assert sum(words[-8:]) < 0.9 * sum(words[:8])


def test_instruction_teaches_pictures_and_answers(small_stage: Callable[..., TransformerStage]) -> None:
    stage = small_stage(curriculum=INSTRUCT)
    tower = stage.optimiser.masters["vision.tower.patch_embedding.weight"].clone()
    records = [stage.step() for _ in range(12)]
    assert {"flow", "flow_shown", "answer", "words"} <= {key for record in records for key in record}
    assert not torch.equal(stage.optimiser.masters["vision.tower.patch_embedding.weight"], tower)


@pytest.mark.parametrize("kind", ["vae", "transformer"])
def test_resuming_changes_no_bit(kind: str, small_stage: Callable[..., TransformerStage], tmp_path: Path) -> None:
    """Across an epoch's end, with the data laid out anew."""

    def make() -> Stage:
        return _vae_stage() if kind == "vae" else small_stage(torch.bfloat16, curriculum=INSTRUCT, lessons=1, repeats=1)

    first = make()
    for _ in range(3):
        first.step()
    save_state(tmp_path / "state.pt", {"name": first.name, "stage": first.state()})
    second = make()
    second.restore(load_state(tmp_path / "state.pt")["stage"])
    for _ in range(4):
        assert first.step() == second.step()
    if kind == "transformer":
        assert first.state()["epoch"][0] > 0
    for name, master in first.optimiser.masters.items():
        assert torch.equal(master, second.optimiser.masters[name]), name
        assert torch.equal(first.optimiser.average[name], second.optimiser.average[name]), name


def test_a_run_stops_at_the_last_step_and_logs(tmp_path: Path) -> None:
    stage = VAEStage(replace(TINY_STAGE, steps=2), torch.float32)
    train(stage, tmp_path / "vae.pt", minutes=5)
    assert stage.done == 2
    header, line = (tmp_path / "vae.csv").read_text().splitlines()
    assert header.startswith("step,seconds,")
    assert line.startswith("2,")
    assert load_state(tmp_path / "vae.pt")["stage"]["done"] == 2


def test_another_stages_state_is_refused_and_kept(tmp_path: Path) -> None:
    stage = VAEStage(replace(TINY_STAGE, steps=1), torch.float32)
    train(stage, tmp_path / "vae.pt", minutes=5)
    before = (tmp_path / "vae.pt").read_bytes()
    with pytest.raises(SystemExit, match="is a state of the stage 'vae', not of 'polish'"):
        train(stage, tmp_path / "vae.pt", minutes=5, name="polish")
    assert (tmp_path / "vae.pt").read_bytes() == before
    with pytest.raises(SystemExit, match="a state of the VAE's stage"):
        instruct_stage(TransformerStageConfig(), tmp_path / "none.pt", tmp_path / "vae.pt")


def test_a_stage_that_is_not_over_is_no_start_and_not_prolonged(tmp_path: Path) -> None:
    """So the written commands can't lead on from half a stage, nor change a schedule in its middle."""
    state = tmp_path / "vae.pt"
    train(VAEStage(replace(TINY_STAGE, steps=2), torch.float32), state, minutes=0)
    with pytest.raises(RequestError, match="step 0 of 2: finish that stage first"):
        start_of(state)
    with pytest.raises(SystemExit, match="step 0 of 2; go on with --steps 2 first"):
        train(VAEStage(replace(TINY_STAGE, steps=3), torch.float32), state, minutes=5)
    train(VAEStage(replace(TINY_STAGE, steps=2), torch.float32), state, minutes=5)
    assert start_of(state)["done"] == 2
    train(VAEStage(replace(TINY_STAGE, steps=3), torch.float32), state, minutes=5)
    assert start_of(state)["done"] == 3


def test_a_file_that_is_no_state_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.pt").write_text("words")
    with pytest.raises(RequestError, match=r"words\.pt is no state file"):
        load_state(tmp_path / "words.pt")
    monkeypatch.setattr("sys.argv", ["training.run", "polish", "--state", str(tmp_path / "words.pt")])
    with pytest.raises(SystemExit, match=r"error: .*words\.pt is no state file"):
        main()


def test_a_finished_stage_is_not_shortened(tmp_path: Path) -> None:
    train(VAEStage(replace(TINY_STAGE, steps=2), torch.float32), tmp_path / "vae.pt", minutes=5)
    with pytest.raises(SystemExit, match="at step 2 already, beyond --steps 1"):
        train(VAEStage(replace(TINY_STAGE, steps=1), torch.float32), tmp_path / "vae.pt", minutes=5)


def test_a_log_forgets_the_steps_that_a_killed_run_does_again(tmp_path: Path) -> None:
    train(VAEStage(replace(TINY_STAGE, steps=2), torch.float32), tmp_path / "vae.pt", minutes=5)
    with (tmp_path / "vae.csv").open("a") as log:
        log.write("3,9,0,0,0,0,0\n")
    train(VAEStage(replace(TINY_STAGE, steps=3), torch.float32), tmp_path / "vae.pt", minutes=5)
    steps = [line.split(",")[0] for line in (tmp_path / "vae.csv").read_text().splitlines()]
    assert steps == ["step", "2", "3"]
    (tmp_path / "vae.pt").unlink()
    train(VAEStage(replace(TINY_STAGE, steps=1), torch.float32), tmp_path / "vae.pt", minutes=5)
    steps = [line.split(",")[0] for line in (tmp_path / "vae.csv").read_text().splitlines()]
    assert steps == ["step", "1"]


def test_compact_state_goes_on(small_stage: Callable[..., TransformerStage], tmp_path: Path) -> None:
    stage = small_stage()
    stage.step()
    save_state(tmp_path / "full.pt", {"name": "transformer", "stage": stage.state()})
    save_state(tmp_path / "compact.pt", {"name": "transformer", "stage": compact(stage.state())})
    full, small = ((tmp_path / name).stat().st_size for name in ("full.pt", "compact.pt"))
    assert small < 0.5 * full
    other = small_stage()
    other.restore(load_state(tmp_path / "compact.pt")["stage"])
    assert other.done == 1
    for name, master in other.optimiser.masters.items():
        assert torch.equal(master, stage.optimiser.average[name].bfloat16().float()), name
    other.step()


def test_export_draws(small_stage: Callable[..., TransformerStage], tmp_path: Path) -> None:
    stage = small_stage()
    stage.step()
    folder = stage.export(tmp_path / "tiny")
    model = Hunyuan3.load(folder, device="cpu")
    run = model.sample(model.conditioning("a red circle", width=96, height=64), steps=2, seed=1)
    (picture,) = model.pictures(run.latents)
    assert picture.size == (96, 64)
    router = model.folder.index["model.layers.0.mlp.gate.wg.weight"]
    assert router.dtype == "F32"
    assert model.folder.index["lm_head.weight"].dtype == "BF16"


def test_a_transformer_begins_beside_the_vae_of_a_finished_folder(
    small_stage: Callable[..., TransformerStage], tmp_path: Path
) -> None:
    finished = small_stage()
    folder = finished.export(tmp_path / "tiny")
    begun = transformer_stage(finished.config, tmp_path / "none.pt", folder)
    assert begun.scaling == finished.scaling
    assert all(torch.equal(tensor, finished.vae_state[name]) for name, tensor in begun.vae_state.items())


def test_noise_levels_cover_the_range() -> None:
    levels = noise_levels(500, 4, shift=2.0, uniform=0.2, generator=torch.Generator().manual_seed(0)).view(500, 4)
    assert 0 <= levels.min() and levels.max() <= 1
    assert levels.mean() > 0.55  # shifted towards noise
    assert (levels.mean(dim=0).diff() > 0).all()  # a row's levels lie in successive parts


def test_orthogonalised_matrices_have_even_singular_values() -> None:
    matrices = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_a_step_that_is_not_finite_is_left_out() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimiser = Optimiser({"weight": weight}, [], OptimiserConfig(rate=1e-2, muon_rate=1e-2))
    weight.grad = torch.full((2, 2), float("nan"))
    optimiser.step(1.0)
    assert torch.equal(weight, torch.ones(2, 2))
    assert optimiser.steps == 0
    weight.grad = torch.ones(2, 2)
    optimiser.step(1.0)
    assert (weight < 1).all()


def test_trapezoid_warms_up_holds_and_ends_at_zero() -> None:
    factors = [trapezoid(step, 100, 10, 0.4) for step in range(101)]
    assert factors[0] == 0.1
    assert factors[10:60] == [1.0] * 50
    assert factors[100] == 0
