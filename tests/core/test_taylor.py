"""The step cache: when it runs (spec 11.2), and what it extrapolates (spec 11.3)."""

import math

import pytest
import torch

from hunyuan3.errors import RequestError
from hunyuan3.generate.taylor import TaylorCache, TaylorOptions, split_bands

PLAIN = {"enable_first_enhance": False}


def full_steps(steps, **options):
    cache = TaylorCache(TaylorOptions(**options), steps)
    full = []
    for step in range(steps):
        if cache.is_full(step):
            full.append(step)
            cache.update(step, torch.zeros(1, 4, 2))
        else:
            cache.extrapolate()
    return full


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        # interval alone: every third step
        (10, {"interval": 3, **PLAIN}, [0, 3, 6, 9]),
        (8, {"interval": 5, **PLAIN}, [0, 5]),
        (4, {"interval": 1, **PLAIN}, [0, 1, 2, 3]),
        (5, {"interval": 100, **PLAIN}, [0]),
        # the first steps are full, the count starts at the last of them
        (12, {"interval": 5}, [0, 1, 2, 7]),
        (14, {"interval": 3, "first_enhance_steps": 4}, [0, 1, 2, 3, 6, 9, 12]),
        (4, {"interval": 2, "first_enhance_steps": 9}, [0, 1, 2, 3]),
        (6, {"interval": 3, "first_enhance_steps": 1}, [0, 3]),
        # the last steps are full on top of that
        (12, {"interval": 5, "enable_tailing_enhance": True}, [0, 1, 2, 7, 11]),
        (12, {"interval": 5, "enable_tailing_enhance": True, "tailing_enhance_steps": 4}, [0, 1, 2, 7, 8, 9, 10, 11]),
        (8, {"interval": 5, "enable_tailing_enhance": True, "tailing_enhance_steps": 0}, [0, 1, 2, 7]),
        # a tail step that is off is not counted
        (12, {"interval": 5, "tailing_enhance_steps": 4}, [0, 1, 2, 7]),
        # a full tail step starts the count afresh
        (3, {"interval": 2, "enable_tailing_enhance": True, "tailing_enhance_steps": 2, **PLAIN}, [0, 1, 2]),
        (50, {"interval": 5}, [0, 1, 2, 7, 12, 17, 22, 27, 32, 37, 42, 47]),
        (1, {"interval": 5}, [0]),
    ],
)
def test_full_steps_follow_the_rule(steps, options, expected):
    assert full_steps(steps, **options) == expected


def run(signal, steps, **options):
    """Feeds signal(step) at full steps; step -> (extrapolated, true) for the others."""
    cache = TaylorCache(TaylorOptions(**options), steps)
    skipped = {}
    for step in range(steps):
        if cache.is_full(step):
            cache.update(step, signal(step))
        else:
            skipped[step] = (cache.extrapolate(), signal(step))
    return skipped


def along(*coefficients, shape=(2, 12, 3)):
    """Polynomial in the step with random tensors as coefficients, lowest order first."""
    generator = torch.Generator().manual_seed(0)
    tensors = [c * torch.randn(shape, generator=generator) for c in coefficients]
    return lambda step: sum(tensor * step**i for i, tensor in enumerate(tensors))


@pytest.mark.parametrize("options", [{}, PLAIN, {"enable_tailing_enhance": True}])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_a_constant_is_extrapolated_exactly_whatever_the_order(options, order):
    orders = {"order": order, "low_freqs_order": order, "high_freqs_order": order}
    skipped = run(along(1.0), 15, interval=3, **orders, **options)
    assert skipped
    for actual, true in skipped.values():
        assert (actual - true).abs().max() < 1e-5


def test_a_straight_line_is_extrapolated_exactly_from_the_second_recorded_step_on():
    """Backward differences over the last two full steps: exact for a line, at any distance."""
    skipped = run(along(1.0, 0.5), 15, interval=4, order=1, low_freqs_order=1, high_freqs_order=1, **PLAIN)
    assert set(skipped) == {1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14}
    for step, (actual, true) in skipped.items():
        error = (actual - true).abs().max()
        assert error < 1e-4 if step > 4 else error > 0.1  # one point alone gives no slope


def test_with_order_zero_the_last_full_output_is_repeated():
    skipped = run(along(1.0, 0.5), 9, interval=3, order=0, low_freqs_order=0, high_freqs_order=0, **PLAIN)
    signal = along(1.0, 0.5)
    for step, (actual, _) in skipped.items():
        assert (actual - signal(step // 3 * 3)).abs().max() < 1e-5


def test_a_parabola_is_extrapolated_by_backward_differences_over_h_to_the_i_by_i_factorial():
    """t^2 known at 0, 3, 6: D1 = 9, D2 = 2, so 6 + h is 36 + 9 h + h^2: the reference's series, not the true curve."""
    options = {"interval": 3, "order": 2, "low_freqs_order": 2, "high_freqs_order": 2, **PLAIN}
    skipped = run(along(0.0, 0.0, 1.0), 9, **options)
    unit = along(0.0, 0.0, 1.0)(1)
    for h in (1, 2):
        assert (skipped[6 + h][0] - unit * (36 + 9 * h + h**2)).abs().max() < 1e-3
    for h in (1, 2):  # at 3 there is no second difference yet: D1 = 3
        assert (skipped[3 + h][0] - unit * (9 + 3 * h)).abs().max() < 1e-3


def test_uneven_distances_between_full_steps_divide_the_differences():
    """First steps 0, 1, 2 then 5: recorded are 2 and 5, three steps apart."""
    skipped = run(along(1.0, 0.5), 8, interval=3, order=1, low_freqs_order=1, high_freqs_order=1)
    assert set(skipped) == {3, 4, 6, 7}
    for step in (6, 7):
        actual, true = skipped[step]
        assert (actual - true).abs().max() < 1e-4


def test_warming_up_records_only_its_last_step():
    """Steps 0 and 1 of three first steps leave no trace, so a jump there does not become a slope."""
    wild = along(1.0, 0.5)
    skipped = run(lambda step: 1e6 * wild(step) if step < 2 else wild(step), 5, interval=5)
    for actual, _ in skipped.values():
        assert (actual - wild(2)).abs().max() < 1e-4


def test_each_band_has_its_own_order():
    """A slow and a fast wave along the tokens, both rising: only the band with order 1 follows."""
    tokens = torch.arange(40.0)
    low = torch.cos(2 * math.pi * tokens / 40).view(1, 40, 1)
    high = torch.cos(2 * math.pi * tokens * 15 / 40).view(1, 40, 1)

    def signal(step):
        return (low + high) * (1.0 + step)

    for low_order, high_order in ((1, 0), (0, 1)):
        skipped = run(signal, 7, interval=3, order=2, low_freqs_order=low_order, high_freqs_order=high_order, **PLAIN)
        actual, _ = skipped[5]  # full: 0, 3
        expected = low * (6.0 if low_order else 4.0) + high * (6.0 if high_order else 4.0)
        assert (actual - expected).abs().max() < 1e-4


@pytest.mark.parametrize("length", [1, 2, 3, 21, 40, 41])
def test_the_bands_add_up_and_the_low_one_holds_the_slow_tenth(length):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, 3, generator=generator)
    low, high = split_bands(x)
    assert (low + high - x).abs().max() < 1e-5
    highest = length // 2  # cycles along the sequence
    spectrum = torch.fft.fft(low, dim=1).abs().amax(dim=(0, 2))
    for i in range(length):
        cycles = min(i, length - i)
        is_low = spectrum[i] > 1e-3
        assert is_low == (cycles <= 0.1 * highest + 1e-6), (i, spectrum[i])


def test_bands_and_series_keep_the_streams_dtype():
    cache = TaylorCache(TaylorOptions(interval=2, **PLAIN), 4)
    cache.update(0, torch.ones(1, 6, 2, dtype=torch.bfloat16))
    assert cache.extrapolate().dtype == torch.bfloat16


def test_two_runs_do_not_share_anything():
    """The reference keeps its state on the model, where an interrupted run leaves it behind."""
    options = TaylorOptions(interval=3, **PLAIN)
    first, second = TaylorCache(options, 6), TaylorCache(options, 6)
    first.update(0, torch.ones(1, 4, 2))
    first.extrapolate()
    assert second.low == []
    assert second.since_full == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("interval", 0),
        ("order", -1),
        ("first_enhance_steps", 0),
        ("tailing_enhance_steps", -1),
        ("low_freqs_order", -1),
        ("high_freqs_order", -2),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=f"{name} is {value}"):
        TaylorOptions(**{name: value})
