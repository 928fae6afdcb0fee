"""What is trained is what is drawn: the training pass against the package's own loops, on an exported folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from hunyuan3.generate.denoise import denoise
from hunyuan3.generate.schedule import Schedule
from hunyuan3.image.preprocess import vision_patches
from hunyuan3.pictures import show_pictures
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.text.template import Message
from hunyuan3.writing import TextRequest, answering, thinking
from tests.training.conftest import stir
from training.draw import draw
from training.joint import JointPass, Noisy, Shown
from training.lessons import Lesson
from training.rows import NO_TARGET, Batch, Row, collate, lay_out, next_tokens
from training.scene import Background, Object, Scene
from training.transformer import TransformerStage

PROMPTS = ("a red circle", "a blue heart", "one red ring")  # of equal length in bytes
TRACE = "<think>One object.</think><recaption>A large circle.</recaption>"
SCENES = tuple(
    Scene(128, 128, Background("plain", colour), (Object("circle", "green", 64, 64, 48),))
    for colour in ("red", "blue", "white")
)
SAMPLES = 2


@pytest.fixture(scope="module")
def stage(small_stage: Callable[..., TransformerStage]) -> TransformerStage:
    """Stirred, so that nothing is zero, and rounded to what the exported folder holds."""
    stage = small_stage()
    stir(stage)
    return stage


@pytest.fixture(scope="module")
def model(stage: TransformerStage, tmp_path_factory: pytest.TempPathFactory) -> Hunyuan3:
    folder = stage.export(tmp_path_factory.mktemp("joint") / "folder", average=False)
    return Hunyuan3.load(folder, device="cpu", dtype="float32")


def _batch(stage: TransformerStage, dropped: bool = False, **lesson: object) -> Batch:
    lessons = [replace(Lesson(prompt, i), **lesson) for i, prompt in enumerate(PROMPTS)]
    rows = [lay_out(stage.folder, lesson, SCENES) for lesson in lessons]
    return collate(rows, stage.folder.tokens, [dropped] * len(rows))


def _read(stage: TransformerStage, batch: Batch, shown: Sequence[Shown] = ()) -> JointPass:
    return JointPass(stage.model, stage.vision, batch, shown)


def _shown(model: Hunyuan3, scene: Scene) -> tuple[Shown, torch.Tensor]:
    """A scene as every row's input picture, its latent as inference draws it; and that latent's tokens."""
    encoded = model.encode_pictures([draw(scene)])
    (shown,) = show_pictures(model.folder.config.vae, encoded)
    patches = vision_patches(draw(scene), max_num_patches=64, patch_size=16)
    return Shown(shown.latent.expand(len(PROMPTS), -1, -1, -1), [patches] * len(PROMPTS)), encoded


@pytest.mark.parametrize("kind", ["prompt", "trace", "picture", "second turn"])
@torch.no_grad()
def test_velocity_is_that_of_the_denoise_loop(stage: TransformerStage, model: Hunyuan3, kind: str) -> None:
    """Conditional and unconditional, for every prompt, picture and time of a batch with a shared beginning."""
    trace = TRACE if kind in ("trace", "second turn") else ""
    shown, encoded = _shown(model, SCENES[1])
    inputs = (1,) if kind in ("picture", "second turn") else ()
    history, turn = (), {}
    if kind == "second turn":
        history = (
            Message("user", "a ring"),
            Message("assistant", TRACE),
            Message("assistant", encoded[0].in_template()),
        )
        turn = {"first": "a ring", "first_trace": TRACE}
    noisy = torch.randn(len(PROMPTS) * SAMPLES, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = torch.tensor([1.0, 0.3] * len(PROMPTS))
    conditional, unconditional = (
        _read(stage, _batch(stage, dropped, trace=trace, inputs=inputs, **turn), [shown] * len(inputs)).velocity(
            Noisy(noisy, sigmas)
        )
        for dropped in (False, True)
    )
    for index, prompt in enumerate(PROMPTS):
        conditioning = model.conditioning(prompt, trace=trace, pictures=encoded if inputs else (), history=history)
        rows = conditioning.rows.showing(show_pictures(model.folder.config.vae, conditioning.pictures))
        for sample in range(SAMPLES):
            at = index * SAMPLES + sample
            from_here = Schedule(torch.stack((sigmas[at], torch.tensor(0.0))), shift=1.0)
            (step,) = denoise(model.transformer(), rows, noisy[at : at + 1], from_here, guidance=2.0)
            expected = torch.cat((conditional[at : at + 1], unconditional[at : at + 1]))
            torch.testing.assert_close(step.raw_prediction, expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(conditional, unconditional, atol=1e-2)  # prompts matter, or this test shows nothing


@torch.no_grad()
def test_logits_are_those_of_the_text_loop(stage: TransformerStage, model: Hunyuan3) -> None:
    """The first token of a rewrite, predicted in training from the whole row, in inference from the prompt alone."""
    batch = _batch(stage, trace="<recaption>A large circle.</recaption>")
    predicted = _read(stage, batch)
    per_row = len(predicted.targets) // len(PROMPTS)
    plan = thinking(model.folder, "recaption", need_ratio=False)
    for index, prompt in enumerate(PROMPTS):
        first = next(iter(model.write(TextRequest(prompt), plan, max_new_tokens=1)))
        torch.testing.assert_close(first.logits, predicted.logits[index * per_row], atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_answers_are_those_of_the_text_loop(stage: TransformerStage, model: Hunyuan3) -> None:
    """The first token of an answer about a picture: the tag that opens it."""
    shown, encoded = _shown(model, SCENES[2])
    predicted = _read(stage, _batch(stage, scene=None, inputs=(2,), answer="Two."), [shown])
    per_row = len(predicted.targets) // len(PROMPTS)
    tokens, tokenizer = stage.folder.tokens, stage.folder.tokenizer
    assert predicted.targets[:per_row].tolist() == [tokens.answer, *tokenizer.encode("Two."), tokens.answer_end]
    for index, prompt in enumerate(PROMPTS):
        request = TextRequest(prompt, pictures=encoded)
        first = next(iter(model.write(request, answering(model.folder), max_new_tokens=1)))
        torch.testing.assert_close(first.logits, predicted.logits[index * per_row], atol=2e-4, rtol=1e-3)


def _targets(stage: TransformerStage, row: Row) -> list[int]:
    ids = row.rows.sequence.ids
    targets = next_tokens(ids, stage.folder.tokens)
    assert all(ids[i + 1] == target for i, target in enumerate(targets) if target != NO_TARGET)
    return [target for target in targets if target != NO_TARGET]


def test_targets_are_what_the_model_writes(stage: TransformerStage) -> None:
    """Bodies with their closing tags, and the ratio; no prompt, no tag that the plan forces, no picture."""
    tokens, tokenizer = stage.folder.tokens, stage.folder.tokenizer
    body = [*tokenizer.encode("One object."), tokens.think_end]
    body += [*tokenizer.encode("A large circle."), tokens.recaption_end]
    for inputs in ((), (1, 2)):
        row = lay_out(stage.folder, Lesson(PROMPTS[0], 0, inputs, TRACE), SCENES)
        assert _targets(stage, row) == [*body, tokens.ratio(16)]


def test_both_turns_are_written_by_the_model(stage: TransformerStage) -> None:
    """The trace of the first turn is learned as that of the second is; what the user says in either is not."""
    tokens, tokenizer = stage.folder.tokens, stage.folder.tokenizer
    first = Lesson(PROMPTS[0], 0, (1,), TRACE, first="a ring", first_trace="<recaption>A small ring.</recaption>")
    earlier = [*tokenizer.encode("A small ring."), tokens.recaption_end]
    body = [*tokenizer.encode("One object."), tokens.think_end]
    body += [*tokenizer.encode("A large circle."), tokens.recaption_end]
    assert _targets(stage, lay_out(stage.folder, first, SCENES)) == [*earlier, *body, tokens.ratio(16)]


def test_unconditional_rows_teach_no_words(stage: TransformerStage) -> None:
    batch = _batch(stage, True, trace=TRACE)
    assert (batch.targets == NO_TARGET).all()
    assert (batch.ids == stage.folder.tokens.cfg).any()


def test_gradients_reach_everything_that_is_shown(stage: TransformerStage) -> None:
    """The shared system prompt, whose keys and values are computed once for all rows, and the vision tower."""
    batch = _batch(stage, inputs=(1,))
    assert batch.shared > 4
    patches = vision_patches(draw(SCENES[1]), max_num_patches=64, patch_size=16)
    shown = Shown(torch.randn(3, 16, 8, 8), [patches] * 3)
    read = _read(stage, batch, [shown])
    read.velocity(Noisy(torch.randn(3, 16, 8, 8), torch.full((3,), 0.5))).square().mean().backward()
    stage.balance.take()
    gradient = stage.model.wte.weight.grad
    assert gradient[batch.ids[0, : batch.shared]].abs().amax(dim=1).min() > 0
    assert all(parameter.grad is not None for parameter in stage.vision.parameters())
    stage.model.zero_grad()
    stage.vision.zero_grad()
