import pytest
import torch

from hunyuan3.generate.noise import NOISE_SOURCES, draw_noise, reference_generators

CPU = torch.device("cpu")
SHAPE = (3, 16, 5, 7)


def test_comfy_noise_is_what_comfyui_prepares():
    """comfy.sample.prepare_noise: torch.manual_seed, then one float32 draw of the whole batch on the CPU."""
    expected = torch.randn(SHAPE, generator=torch.manual_seed(42), device="cpu")
    assert torch.equal(draw_noise("comfy", 42, SHAPE, CPU), expected)


def test_reference_noise_is_drawn_in_bfloat16_a_generator_per_picture():
    """Not a rounded float32 draw, which gives other numbers where the size is no multiple of 16."""
    shape = (3, 5, 3, 7)
    noise = draw_noise("reference", 42, shape, CPU)
    for i in range(3):
        drawn, wide = (
            torch.randn((1, *shape[1:]), generator=torch.Generator().manual_seed(42 + i), dtype=dtype)
            for dtype in (torch.bfloat16, torch.float32)
        )
        assert torch.equal(noise[i : i + 1], drawn.float())
        assert not torch.equal(noise[i : i + 1], wide.bfloat16().float())


def test_picture_i_of_a_reference_batch_is_the_single_picture_of_seed_plus_i():
    batch = draw_noise("reference", 5, SHAPE, CPU)
    for i in range(3):
        assert torch.equal(batch[i : i + 1], draw_noise("reference", 5 + i, (1, *SHAPE[1:]), CPU))


def test_seeds_wrap_around_at_the_top():
    generators = reference_generators(2**64 - 1, 2, CPU)
    assert generators[1].initial_seed() == 0
    assert draw_noise("comfy", 2**64 - 1, SHAPE, CPU).isfinite().all()


@pytest.mark.parametrize("source", NOISE_SOURCES)
def test_noise_is_float32_standard_normal_and_repeats_by_seed_alone(source):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    noise = draw_noise(source, 7, (2, 16, 32, 32), CPU)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator was used"
    torch.manual_seed(2)
    assert torch.equal(noise, draw_noise(source, 7, (2, 16, 32, 32), CPU))
    assert noise.dtype == torch.float32
    assert noise.shape == (2, 16, 32, 32)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, draw_noise(source, 8, (2, 16, 32, 32), CPU))


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match=r"noise is 'gpu'.*comfy, device, reference"):
        draw_noise("gpu", 0, SHAPE, CPU)
