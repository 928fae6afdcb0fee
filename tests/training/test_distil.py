"""The distilled stage: its pass against the package's own loop, its targets against the teacher's flow."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hunyuan3.generate.denoise import denoise
from hunyuan3.generate.schedule import Schedule
from hunyuan3.pipeline import Hunyuan3
from tests.training.conftest import stir
from training.distil import DistilStage, DistilStageConfig, GuidedField, mean_velocity, spans
from training.joint import JointPass, Noisy
from training.lessons import Curriculum, Lesson
from training.optimiser import OptimiserConfig
from training.rows import collate, lay_out
from training.run import distil_stage, instruct_stage
from training.scene import Background, Object, Scene
from training.state import load_state, save_state
from training.transformer import Epoch, TransformerStageConfig, shifted

SCENE = Scene(128, 128, Background("plain", "white"), (Object("circle", "green", 64, 64, 48),))
PROMPTS = ("a red circle", "a blue heart")
LESSONS = tuple(Lesson(prompt, 0) for prompt in PROMPTS)
EPOCH = Epoch(0, 0, (SCENE,), {}, ())
STEPS = 3
GUIDANCE = 2.5


@pytest.fixture(scope="module")
def stage(small_distil: Callable[..., DistilStage]) -> DistilStage:
    made = small_distil()
    stir(made)
    return made


@torch.no_grad()
def test_velocity_is_that_of_the_denoise_loop(stage: DistilStage, tmp_path: Path) -> None:
    """At every step of the loop, which tells guidance and the end of the step, and runs no second branch."""
    model = Hunyuan3.load(stage.export(tmp_path / "folder"), device="cpu", dtype="float32")
    assert model.folder.config.cfg_distilled
    assert model.folder.config.use_meanflow
    assert model.folder.generation.steps == 8
    rows = [lay_out(stage.folder, lesson, (SCENE,)) for lesson in LESSONS]
    read = JointPass(stage.model, stage.vision, collate(rows, stage.folder.tokens, [False] * len(rows)))
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    conditionings = [model.conditioning(prompt, width=128, height=128) for prompt in PROMPTS]
    schedule = Schedule.flow_matching(STEPS, 3.0)
    runs = [denoise(model.transformer(), c.rows, noise, schedule, guidance=GUIDANCE) for c in conditionings]
    latents = noise.repeat(len(PROMPTS), 1, 1, 1)
    for index, steps in enumerate(zip(*runs, strict=True)):
        sigma, end = (schedule.sigmas[index + at].expand(len(PROMPTS)) for at in (0, 1))
        guidance = torch.full((len(PROMPTS),), GUIDANCE)
        velocity = read.velocity(Noisy(latents, sigma, end, guidance))
        expected = torch.cat([step.raw_prediction for step in steps])
        torch.testing.assert_close(velocity, expected, atol=3e-4, rtol=1e-3)
        told_other = read.velocity(Noisy(latents, sigma, end, guidance + 1))
        sent_elsewhere = read.velocity(Noisy(latents, sigma, end * 0.5, guidance))
        assert not torch.allclose(told_other, expected, atol=1e-2)
        assert index == STEPS - 1 or not torch.allclose(sent_elsewhere, expected, atol=1e-2)
        latents = torch.cat([step.latents for step in steps])


@torch.no_grad()
def test_the_field_is_the_teachers_guided_one(stage: DistilStage, tmp_path: Path) -> None:
    """As the package's loop guides by two branches, for each row with its own strength."""
    teacher = stage.teacher
    model = Hunyuan3.load(teacher.export(tmp_path / "folder"), device="cpu", dtype="float32")
    flow = GuidedField(teacher, LESSONS, (), EPOCH)
    latents = torch.randn(len(PROMPTS), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas, guidance = torch.tensor([0.9, 0.4]), torch.tensor([1.5, 4.0])
    velocity = flow.velocity(latents, sigmas, guidance)
    for index, prompt in enumerate(PROMPTS):
        conditioning = model.conditioning(prompt, width=128, height=128)
        from_here = Schedule(torch.stack((sigmas[index], torch.tensor(0.0))), shift=1.0)
        strength = float(guidance[index])
        (step,) = denoise(
            model.transformer(), conditioning.rows, latents[index : index + 1], from_here, guidance=strength
        )
        torch.testing.assert_close(velocity[index : index + 1], step.prediction, atol=1e-3, rtol=1e-3)


class _Analytic:
    """A flow with known ends: `v = g (a x + b s)`."""

    def __init__(self, a: float, b: float) -> None:
        self.a, self.b = a, b

    def velocity(self, latents: torch.Tensor, sigmas: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        return guidance[:, None, None, None] * (self.a * latents + self.b * sigmas[:, None, None, None])


def test_mean_velocity_leads_where_the_flow_leads() -> None:
    """To the bit of the arithmetic where it is linear in time, and to the third order where it grows."""
    latents = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas, ends = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.8, 0.3], dtype=torch.float64)
    guidance = torch.tensor([1.0, 2.0], dtype=torch.float64)
    noisy = Noisy(latents, sigmas, ends, guidance)
    expected = (guidance * (sigmas + ends))[:, None, None, None].expand_as(latents)
    torch.testing.assert_close(mean_velocity(_Analytic(0, 2), noisy), expected)
    exponents = guidance * (ends - sigmas)
    grown = latents * exponents.exp()[:, None, None, None]
    reached = latents + (ends - sigmas)[:, None, None, None] * mean_velocity(_Analytic(1, 0), noisy)
    assert ((reached - grown).abs() < (exponents.abs() ** 3 / 5)[:, None, None, None] * latents.abs()).all()


def test_a_distilled_model_is_no_beginning(stage: DistilStage, tmp_path: Path) -> None:
    save_state(tmp_path / "distil.pt", {"name": "distil", "stage": stage.state()})
    for start in (tmp_path / "distil.pt", stage.export(tmp_path / "folder")):
        with pytest.raises(SystemExit, match="distilled"):
            distil_stage(DistilStageConfig(), start)
        with pytest.raises(SystemExit, match="distilled"):
            instruct_stage(TransformerStageConfig(), tmp_path / "new.pt", start)


def test_spans_are_steps_of_schedules() -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas, ends = spans(4000, (6.0, 24.0), 0.1, 3.0, generator)
    assert ((ends >= 0) & (ends < sigmas) & (sigmas <= 1)).all()
    assert abs((sigmas == 1).float().mean() - 0.1) < 0.01
    place, end = (x / (3.0 - 2.0 * x) for x in (sigmas, ends))
    torch.testing.assert_close(shifted(place, 3.0), sigmas)
    inside = ends > 0
    assert (inside == (end > 0)).all()
    lengths = (place - end)[inside]
    assert 1 / 24 - 1e-5 <= lengths.min() < 0.05
    assert 0.15 < lengths.max() <= 1 / 6 + 1e-5


def test_it_learns_the_teachers_flow(small_distil: Callable[..., DistilStage]) -> None:
    """From an output layer that says nothing at all; the teacher stays as it is."""
    stage = small_distil(words=0.0, optimiser=OptimiserConfig(rate=1e-2, muon_rate=1e-3))
    teacher = {name: parameter.clone() for name, parameter in stage.teacher.model.named_parameters()}
    for name in ("final_layer.conv_out.weight", "final_layer.conv_out.bias"):
        stage.optimiser.masters[name].zero_()
        stage.optimiser.parameters[name].data.zero_()
    before = _error(stage)
    for _ in range(40):
        stage.step()
    assert _error(stage) < 0.5 * before
    for name, parameter in stage.teacher.model.named_parameters():
        assert torch.equal(parameter, teacher[name]), name
    assert all(stage.optimiser.first[name].any() for name in ("guidance_emb.fc1.weight", "timestep_r_emb.fc1.weight"))


def test_resuming_changes_no_bit(small_distil: Callable[..., DistilStage], tmp_path: Path) -> None:
    """Pictures, edits and answers, with the teacher from the start again."""
    curriculum = Curriculum(edits=0.25, questions=0.25)
    first = small_distil(torch.bfloat16, curriculum=curriculum, lessons=60, repeats=1)
    records = [first.step() for _ in range(14)]
    assert {"flow", "flow_shown", "answer", "words"} <= {key for record in records for key in record}
    save_state(tmp_path / "state.pt", {"name": first.name, "stage": first.state()})
    second = small_distil(torch.bfloat16, curriculum=curriculum, lessons=60, repeats=1)
    second.restore(load_state(tmp_path / "state.pt")["stage"])
    for _ in range(3):
        assert first.step() == second.step()


@torch.no_grad()
def _error(stage: DistilStage) -> float:
    """Mean square error of the student's velocities, on steps of three lengths."""
    rows = [lay_out(stage.folder, lesson, (SCENE,)) for lesson in LESSONS]
    read = JointPass(stage.model, stage.vision, collate(rows, stage.folder.tokens, [False] * len(rows)))
    generator = torch.Generator().manual_seed(0)
    errors = []
    for sigma, end in ((1.0, 0.95), (0.9, 0.8), (0.4, 0.0)):
        latents = torch.randn(len(PROMPTS), 16, 8, 8, generator=generator)
        levels = (torch.full((len(PROMPTS),), value) for value in (sigma, end, 2.0))
        noisy = Noisy(latents, *levels)
        target = mean_velocity(GuidedField(stage.teacher, LESSONS, (), EPOCH), noisy)
        errors.append(float((read.velocity(noisy) - target).square().mean()))
    return sum(errors)
