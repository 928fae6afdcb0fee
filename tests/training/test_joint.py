"""What is trained is what is drawn: the training pass against the package's own loops, on an exported folder."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hunyuan3.generate.denoise import denoise
from hunyuan3.generate.schedule import Schedule
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.writing import TextRequest, thinking
from training.joint import joint_pass
from training.rows import NO_TARGET, Batch, Lesson, collate, lay_out, next_tokens
from training.transformer import TransformerStage

PROMPTS = ("a red circle", "a blue heart", "one red ring")  # of equal length in bytes
TRACE = "<think>One object.</think><recaption>A large circle.</recaption>"
SAMPLES = 2


@pytest.fixture(scope="module")
def stage(small_stage: Callable[..., TransformerStage]) -> TransformerStage:
    """Stirred, so that nothing is zero, and rounded to what the exported folder holds."""
    stage = small_stage()
    generator = torch.Generator().manual_seed(1)
    for name, master in stage.optimiser.masters.items():
        master += 0.05 * torch.randn(master.shape, generator=generator)
        if not name.endswith("router.weight"):
            master.copy_(master.bfloat16())
        stage.optimiser.parameters[name].data.copy_(master)
    return stage


@pytest.fixture(scope="module")
def model(stage: TransformerStage, tmp_path_factory: pytest.TempPathFactory) -> Hunyuan3:
    folder = stage.export(tmp_path_factory.mktemp("joint") / "folder", average=False)
    return Hunyuan3.load(folder, device="cpu", dtype="float32")


def _batch(stage: TransformerStage, trace: str = "", dropout: float = 0.0) -> Batch:
    rows = [lay_out(stage.folder, Lesson(i, prompt, trace, ratio=16)) for i, prompt in enumerate(PROMPTS)]
    return collate(rows, stage.folder.tokens, dropout, random.Random(0))


@pytest.mark.parametrize("trace", ["", TRACE])
def test_velocity_is_that_of_the_denoise_loop(stage: TransformerStage, model: Hunyuan3, trace: str) -> None:
    """Conditional and unconditional, for every prompt, picture and time of a batch with a shared beginning."""
    schedule = Schedule.flow_matching(1, shift=1.0)
    noisy = torch.randn(len(PROMPTS) * SAMPLES, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([1.0, 0.3] * len(PROMPTS))
    with torch.no_grad():
        conditional, _, _ = joint_pass(stage.model, _batch(stage, trace), noisy, sigmas)
        unconditional, _, _ = joint_pass(stage.model, _batch(stage, trace, dropout=1.0), noisy, sigmas)
    stage.balance._losses.clear()
    for index, prompt in enumerate(PROMPTS):
        rows = model.conditioning(prompt, trace=trace).rows
        for sample in range(SAMPLES):
            at = index * SAMPLES + sample
            from_here = Schedule(torch.stack((sigmas[at], torch.tensor(0.0))), schedule.shift)
            (step,) = denoise(model.transformer(), rows, noisy[at : at + 1], from_here, guidance=2.0)
            expected = torch.cat((conditional[at : at + 1], unconditional[at : at + 1]))
            torch.testing.assert_close(step.raw_prediction, expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(conditional, unconditional, atol=1e-2)  # prompts matter, or this test shows nothing


def test_logits_are_those_of_the_text_loop(stage: TransformerStage, model: Hunyuan3) -> None:
    """The first token of a rewrite, predicted in training from the whole row, in inference from the prompt alone."""
    trace = "<recaption>A large circle.</recaption>"
    with torch.no_grad():
        noisy = torch.zeros(len(PROMPTS), 16, 8, 8)
        _, logits, targets = joint_pass(stage.model, _batch(stage, trace), noisy, torch.ones(len(PROMPTS)))
    per_row = len(targets) // len(PROMPTS)
    plan = thinking(model.folder, "recaption", need_ratio=False)
    for index, prompt in enumerate(PROMPTS):
        first = next(iter(model.write(TextRequest(prompt), plan, max_new_tokens=1)))
        torch.testing.assert_close(first.logits, logits[index * per_row], atol=2e-4, rtol=1e-3)


def test_targets_are_what_the_model_writes(stage: TransformerStage) -> None:
    """Bodies with their closing tags, and the ratio; no prompt, no tag that the plan forces, no picture."""
    tokens, tokenizer = stage.folder.tokens, stage.folder.tokenizer
    ids = lay_out(stage.folder, Lesson(0, PROMPTS[0], TRACE, ratio=12)).rows.sequence.ids
    learned = [target for target in next_tokens(ids, tokens) if target != NO_TARGET]
    body = [*tokenizer.encode("One object."), tokens.think_end]
    body += [*tokenizer.encode("A large circle."), tokens.recaption_end]
    assert learned == [*body, tokens.ratio(12)]
    assert all(ids[i + 1] == t for i, t in enumerate(next_tokens(ids, tokens)) if t != NO_TARGET)


def test_unconditional_rows_teach_no_words(stage: TransformerStage) -> None:
    batch = _batch(stage, TRACE, dropout=1.0)
    assert (batch.targets == NO_TARGET).all()
    assert (batch.ids == stage.folder.tokens.cfg).any()


def test_gradients_reach_the_shared_beginning(stage: TransformerStage) -> None:
    """The system prompt's keys and values are computed once for all rows, and learn from all of them."""
    batch = _batch(stage)
    assert batch.shared > 4
    velocity, _, _ = joint_pass(stage.model, batch, torch.randn(3, 16, 8, 8), torch.full((3,), 0.5))
    velocity.square().mean().backward()
    stage.balance.take()
    gradient = stage.model.wte.weight.grad
    assert gradient is not None
    assert gradient[batch.ids[0, : batch.shared]].abs().amax(dim=1).min() > 0
    stage.model.zero_grad()


def test_export_is_found_by_path(model: Hunyuan3) -> None:
    assert Path(model.folder.path).is_dir()
    assert model.folder.variant == "instruct"
