import pytest
import torch

from hunyuan3.errors import RequestError
from hunyuan3.generate.schedule import Schedule


def test_eight_steps_with_shift_three_are_the_published_times():
    times = Schedule.flow_matching(8, 3.0).times
    expected = [1000, 954.545, 900, 833.333, 750, 642.857, 500, 300, 0]
    assert torch.allclose(times, torch.tensor(expected), atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
def test_levels_fall_from_noise_to_exactly_zero_by_the_shifted_line(steps, shift):
    schedule = Schedule.flow_matching(steps, shift)
    assert schedule.steps == steps
    assert schedule.sigmas.dtype == torch.float32
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1] == 0
    for i, sigma in enumerate(schedule.sigmas.tolist()):
        s = 1 - i / steps
        assert abs(sigma - shift * s / (1 + (shift - 1) * s)) < 1e-6


@pytest.mark.parametrize(("steps", "denoise"), [(10, 0.5), (20, 0.3), (7, 0.77), (50, 0.01), (3, 0.999), (1, 0.1)])
def test_a_part_of_the_schedule_is_the_tail_of_the_longer_one(steps, denoise):
    """ComfyUI's rule (KSampler.set_steps): int(steps / denoise) steps, of which the last `steps` are run."""
    part = Schedule.flow_matching(steps, 3.0, denoise)
    whole = Schedule.flow_matching(int(steps / denoise), 3.0)
    assert part.steps == steps
    assert torch.equal(part.sigmas, whole.sigmas[len(whole.sigmas) - steps - 1 :])
    assert part.sigmas[0] <= 1


def test_half_of_the_schedule_starts_below_pure_noise():
    assert Schedule.flow_matching(10, 1.0, 0.5).sigmas[0] == 0.5


def test_with_the_true_velocity_any_number_of_steps_lands_on_the_clean_picture():
    """Straight paths: x = s n + (1 - s) c has the velocity n - c everywhere."""
    generator = torch.Generator().manual_seed(0)
    noise, clean = torch.randn(2, 1, 4, 3, 5, generator=generator)
    for steps, denoise in ((1, 1.0), (5, 1.0), (20, 1.0), (5, 0.4)):
        schedule = Schedule.flow_matching(steps, 3.0, denoise)
        sigma = schedule.sigmas[0]
        latents = sigma * noise + (1 - sigma) * clean
        for step in range(steps):
            assert (schedule.predicted_clean(latents, noise - clean, step) - clean).abs().max() < 1e-5
            latents = schedule.euler(latents, noise - clean, step)
        assert (latents - clean).abs().max() < 1e-5


def test_the_state_is_float32_even_if_the_latents_come_in_bfloat16():
    latents = torch.ones(1, 2, 2, 2, dtype=torch.bfloat16)
    assert Schedule.flow_matching(2, 3.0).euler(latents, torch.ones(1, 2, 2, 2), 0).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ((0, 3.0), "steps is 0"),
        ((-1, 3.0), "steps is -1"),
        ((4, 0.0), "shift is 0"),
        ((4, -2.0), "shift is -2"),
        ((4, float("nan")), "shift is nan"),
        ((4, 3.0, 0.0), "denoise is 0"),
        ((4, 3.0, 1.5), "denoise is 1.5"),
        ((4, 3.0, float("nan")), "denoise is nan"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, named):
    with pytest.raises(RequestError, match=named):
        Schedule.flow_matching(*settings)
