"""A drawing from the outside: settings, defaults, refusals, starting from a latent, decoding."""

import dataclasses

import pytest
import torch

from hunyuan3.errors import RequestError
from hunyuan3.generate.noise import NOISE_SOURCES, draw_noise
from hunyuan3.generate.schedule import Schedule
from hunyuan3.generate.taylor import TaylorOptions
from hunyuan3.pipeline import Hunyuan3

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


class HaltError(Exception):
    pass


@pytest.fixture(scope="module")
def conditionings(models):
    """A wide picture, so that exchanged sides show."""
    return {name: model.conditioning("a red fox", width=96, height=64) for name, model in models.items()}


@pytest.fixture(scope="module")
def draw(models, conditionings):
    """`draw(steps=2, ...)`: latents of the Instruct model."""

    def drawn(variant="instruct", **settings):
        settings = {"seed": 1, "steps": 2, "guidance": 3.0} | settings
        return models[variant].sample(conditionings[variant], **settings).latents

    return drawn


@pytest.fixture
def refused(models, conditionings):
    """The message with which settings are refused, before anything is drawn."""

    def message(variant="instruct", conditioning=None, **settings):
        with pytest.raises(RequestError) as error:
            models[variant].sample(conditioning or conditionings[variant], **settings)
        return str(error.value)

    return message


def latent(batch=1, height=4, width=6, seed=0):
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("variant", "steps", "guidance"), [("base", 50, 5.0), ("instruct", 50, 2.5), ("distil", 8, 2.5)]
)
def test_zero_means_the_checkpoints_default_and_the_run_says_what_it_uses(
    models, conditionings, variant, steps, guidance
):
    used = models[variant].sample(conditionings[variant]).settings
    assert (used.steps, used.guidance, used.shift) == (steps, guidance, 3.0)
    assert (used.seed, used.batch_size, used.noise, used.denoise, used.taylor) == (0, 1, "comfy", 1.0, None)
    own = models[variant].sample(conditionings[variant], steps=3, guidance=1.5, shift=7.0, seed=9).settings
    assert (own.steps, own.guidance, own.shift, own.seed) == (3, 1.5, 7.0, 9)


def test_defaults_draw_what_the_same_numbers_draw_when_given(draw):
    assert torch.equal(draw("distil", steps=0, guidance=0, shift=0), draw("distil", steps=8, guidance=2.5, shift=3.0))
    assert not torch.equal(draw("distil", steps=0), draw("distil", steps=7))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"guidance": -0.1}, "guidance is -0.1"),
        ({"guidance": NAN}, "guidance is nan"),
        ({"guidance": INF}, "guidance is inf"),
        ({"shift": -3.0}, "shift is -3.0"),
        ({"shift": NAN}, "shift is nan"),
        ({"shift": INF}, "shift is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -2}, "batch_size is -2"),
        ({"noise": "gpu"}, "noise is 'gpu'"),
        ({"denoise": -0.1}, "denoise is -0.1"),
        ({"denoise": 1.1}, "denoise is 1.1"),
        ({"denoise": NAN}, "denoise is nan"),
        ({"denoise": 0.5}, "denoise is 0.5, but no latent"),
        ({"denoise": 0.0}, "denoise is 0.0, but no latent"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(refused, settings, named):
    assert named in refused(**settings)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((1, 4, 4, 6), r"latent has the shape [1, 4, 4, 6]"),
        ((1, 32, 4, 6), r"latent has the shape [1, 32, 4, 6]"),
        ((16, 4, 6), r"latent has the shape [16, 4, 6]"),
        ((1, 16, 1, 4, 6), r"latent has the shape [1, 16, 1, 4, 6]"),
        ((1, 16, 6, 4), "latent is of a 64x96 picture, the conditioning asks for 96x64"),
        ((1, 16, 8, 12), "latent is of a 192x128 picture, the conditioning asks for 96x64"),
    ],
)
def test_a_latent_of_another_model_or_size_is_refused_with_both_sizes(refused, shape, named):
    assert named in refused(latent=torch.zeros(shape), denoise=0.5)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_latent_with_numbers_that_are_not_finite_is_refused(refused, value):
    broken = latent()
    broken[0, 3, 1, 2] = value
    assert "latent holds numbers that are not finite" in refused(latent=broken, denoise=0.5)


def test_an_empty_latent_batch_is_refused(refused):
    assert "latent has the shape [0, 16, 4, 6]" in refused(latent=torch.zeros(0, 16, 4, 6), denoise=0.5)


def test_a_batch_size_that_contradicts_the_latent_is_refused(refused):
    assert "batch_size is 3, but the latent holds 2 pictures" in refused(latent=latent(2), denoise=0.5, batch_size=3)


@pytest.mark.parametrize(("made_for", "used_by"), [("base", "instruct"), ("instruct", "distil"), ("distil", "base")])
def test_a_conditioning_of_another_checkpoint_is_refused(refused, conditionings, made_for, used_by):
    message = refused(used_by, conditionings[made_for])
    assert "conditioning was made for another checkpoint" in message
    assert f"tiny-{used_by}" in message


def test_a_conditioning_serves_every_handle_of_its_checkpoint(folders, conditionings, draw):
    again = Hunyuan3.load(folders["instruct"], device="cpu")
    latents = again.sample(conditionings["instruct"], seed=1, steps=2, guidance=3.0).latents
    assert torch.equal(latents, draw())


@pytest.mark.parametrize("side", [-16, 8, 100, 1])
def test_a_size_that_is_no_multiple_of_sixteen_is_refused(models, side):
    with pytest.raises(RequestError, match=f"width is {side}"):
        models["instruct"].conditioning("a fox", width=side, height=64)


def test_a_prompt_that_is_too_long_is_refused_with_the_count(models):
    with pytest.raises(RequestError, match=r"takes \d+ tokens .* limit is 22800"):
        models["instruct"].conditioning("fox " * 30000)


def test_drop_tokens_draws_one_picture_at_a_time(folders, conditionings):
    model = Hunyuan3.load(folders["instruct"], device="cpu", drop_tokens=True)
    with pytest.raises(RequestError, match="drop_tokens"):
        model.sample(conditionings["instruct"], batch_size=2)
    with pytest.raises(RequestError, match="drop_tokens"):
        model.sample(conditionings["instruct"], latent=latent(2), denoise=0.5)
    with pytest.raises(RequestError, match="one of the two off"):
        _ = model.sample(conditionings["instruct"], one_branch_at_a_time=True, steps=1).latents
    assert model.sample(conditionings["instruct"], steps=1).latents.isfinite().all()


@pytest.mark.parametrize("variant", ["base", "instruct", "distil"])
def test_the_same_seed_draws_the_same_picture_to_the_bit_and_another_seed_another(draw, variant):
    assert torch.equal(draw(variant), draw(variant))
    assert (draw(variant) - draw(variant, seed=2)).abs().max() > 0.1


def test_the_prompt_matters(models, draw):
    other = models["instruct"].conditioning("a small boat on a lake", width=96, height=64)
    latents = models["instruct"].sample(other, seed=1, steps=2, guidance=3.0).latents
    assert (latents - draw()).abs().max() > 1e-2


def test_an_empty_prompt_draws(models):
    conditioning = models["instruct"].conditioning("", width=64, height=64)
    assert models["instruct"].sample(conditioning, steps=1).latents.isfinite().all()


def test_latents_are_unscaled_float32_on_the_cpu_of_the_pictures_size(models, conditionings):
    run = models["instruct"].sample(conditionings["instruct"], steps=2)
    last = list(run)[-1]
    assert (run.latents.dtype, run.latents.device, run.latents.shape) == (torch.float32, CPU, (1, 16, 4, 6))
    assert torch.allclose(run.latents * models["instruct"].folder.config.vae.scaling_factor, last.latents, atol=1e-6)


def test_latents_draw_by_themselves_if_nobody_iterated_and_only_once(models, conditionings):
    run = models["instruct"].sample(conditionings["instruct"], seed=1, steps=2, guidance=3.0)
    assert run.latents is run.latents
    iterated = models["instruct"].sample(conditionings["instruct"], seed=1, steps=2, guidance=3.0)
    assert [step.step for step in iterated] == [0, 1]
    assert torch.equal(iterated.latents, run.latents)


@pytest.mark.parametrize("noise", NOISE_SOURCES)
def test_the_noise_asked_for_is_where_the_drawing_starts(models, conditionings, noise):
    """With sigma 1 to 0 in one step the result is the noise minus the prediction."""
    run = models["instruct"].sample(conditionings["instruct"], seed=5, steps=1, noise=noise, batch_size=2)
    (step,) = run
    expected = draw_noise(noise, 5, (2, 16, 4, 6), CPU)
    assert (step.latents + step.prediction - expected).abs().max() < 1e-5


def test_picture_i_of_a_reference_noise_batch_is_the_single_picture_of_seed_plus_i(draw):
    batch = draw(noise="reference", seed=10, batch_size=3)
    for i in range(3):
        assert (batch[i : i + 1] - draw(noise="reference", seed=10 + i)).abs().max() < 1e-4


def test_denoise_zero_returns_the_latent_as_it_came(models, conditionings):
    given = latent(2)
    run = models["instruct"].sample(conditionings["instruct"], latent=given, denoise=0)
    assert list(run) == []
    assert torch.equal(run.latents, given)
    one = models["instruct"].sample(conditionings["instruct"], latent=given[:1], denoise=0, batch_size=3)
    assert torch.equal(one.latents, given[:1].repeat(3, 1, 1, 1))


def test_denoise_one_replaces_the_latent_altogether(draw):
    assert torch.equal(draw(latent=latent(), denoise=1.0), draw())


@pytest.mark.parametrize(("steps", "denoise"), [(2, 0.5), (3, 0.3), (1, 0.2)])
def test_a_partial_drawing_starts_from_the_latent_noised_to_the_schedules_level(models, conditionings, steps, denoise):
    """ComfyUI's rule for flow models: sigma * noise + (1 - sigma) * scaled latent."""
    model = models["instruct"]
    given = latent()
    run = model.sample(conditionings["instruct"], seed=4, steps=steps, latent=given, denoise=denoise)
    step = next(iter(run))
    sigmas = Schedule.flow_matching(int(steps / denoise), 3.0).sigmas[-(steps + 1) :]
    begin = step.latents - (sigmas[1] - sigmas[0]) * step.prediction
    noise = draw_noise("comfy", 4, (1, 16, 4, 6), CPU)
    scaled = given * model.folder.config.vae.scaling_factor
    assert step.steps == steps
    assert 0 < sigmas[0] < 1
    assert (begin - (sigmas[0] * noise + (1 - sigmas[0]) * scaled)).abs().max() < 1e-5


def test_the_less_is_denoised_the_nearer_the_result_is_to_the_latent(draw):
    given = latent()
    errors = [(draw(latent=given, denoise=d, steps=2) - given).abs().mean() for d in (0.01, 0.1, 0.5, 0.9)]
    assert errors == sorted(errors)
    assert errors[0] < 0.3 * errors[-1]


def test_one_latent_is_repeated_over_the_batch_with_noise_of_its_own(draw):
    batch = draw(latent=latent(), denoise=0.5, batch_size=2)
    assert batch.shape[0] == 2
    assert (batch[0] - batch[1]).abs().max() > 0.1


def test_the_given_latent_is_not_changed(draw):
    given = latent()
    kept = given.clone()
    draw(latent=given, denoise=0.5)
    assert torch.equal(given, kept)


def test_the_step_cache_and_one_branch_at_a_time_are_passed_on(models, conditionings, draw):
    options = TaylorOptions(interval=3, first_enhance_steps=2)
    run = models["instruct"].sample(conditionings["instruct"], steps=8, taylor=options, one_branch_at_a_time=True)
    assert [step.full for step in run] == [True, True, False, False, True, False, False, True]
    assert run.settings.taylor == options
    assert run.settings.one_branch_at_a_time
    assert (draw(one_branch_at_a_time=True) - draw()).abs().max() < 1e-4


def test_a_stopped_run_can_be_drawn_again(models, conditionings, draw):
    calls = []

    def stop_once():
        calls.append(1)
        if len(calls) == 5:
            raise HaltError

    run = models["instruct"].sample(conditionings["instruct"], seed=1, steps=2, guidance=3.0, check_cancelled=stop_once)
    with pytest.raises(HaltError):
        list(run)
    assert torch.equal(run.latents, draw())


def test_numbers_that_run_away_are_an_error_and_not_a_black_picture(folders, conditionings):
    model = Hunyuan3.load(folders["instruct"], device="cpu")
    model.transformer().layers[1].self_attn.o_proj.weight[0, 0] = NAN
    with pytest.raises(RequestError, match="not finite"):
        _ = model.sample(conditionings["instruct"], steps=1).latents


def test_settings_are_a_record_that_can_be_written_down(models, conditionings):
    settings = models["instruct"].sample(conditionings["instruct"], steps=2).settings
    assert dataclasses.asdict(settings)["steps"] == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.steps = 3


def test_decoding_gives_pixels_between_zero_and_one_height_first(models, draw):
    pixels = models["instruct"].decode(draw(batch_size=2))
    assert (pixels.shape, pixels.dtype) == ((2, 64, 96, 3), torch.float32)
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert pixels.is_contiguous()


def test_pictures_are_the_rounded_pixels(models, draw):
    latents = draw()
    picture = models["instruct"].pictures(latents)[0]
    assert (picture.size, picture.mode) == ((96, 64), "RGB")
    pixels = models["instruct"].decode(latents)[0]
    for x, y in ((0, 0), (95, 63), (17, 40)):
        expected = [round(value * 255) for value in pixels[y, x].tolist()]
        assert list(picture.getpixel((x, y))) == expected


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (torch.zeros(1, 4, 4, 6), r"latents has the shape \[1, 4, 4, 6\]"),
        (torch.full((1, 16, 4, 6), NAN), "latents holds numbers that are not finite"),
    ],
)
def test_decoding_refuses_what_is_not_this_models_latents(models, broken, named):
    with pytest.raises(RequestError, match=named):
        models["instruct"].decode(broken)


def test_a_vae_that_overflows_is_an_error_and_not_a_black_picture(folders, draw):
    model = Hunyuan3.load(folders["instruct"], device="cpu", vae_dtype="bfloat16")
    model.vae().decoder.conv_out.weight.fill_(INF)
    with pytest.raises(RequestError, match=r"VAE overflowed in torch\.bfloat16.*float32"):
        model.decode(draw())


def test_decoding_stops_when_it_is_told_to(models, draw):
    def stop():
        raise HaltError

    with pytest.raises(HaltError):
        models["instruct"].decode(draw(), check_cancelled=stop)
