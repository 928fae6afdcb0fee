import pytest
import torch
import torch.nn.functional as F

from hunyuan3.config import VAEConfig
from hunyuan3.errors import RequestError
from hunyuan3.vae.autoencoder import AutoencoderKLConv3D
from hunyuan3.vae.tiling import Tiling, tiled_decode, tiled_encode

FACTOR = 16
PUBLISHED = Tiling.of_pixels(384, FACTOR)
SMALL = Tiling.of_pixels(128, FACTOR)
LENGTHS = (1, 7, 8, 9, 14, 15, 16, 22, 23, 40)


def upscale(latents):
    """A decoder without context: every pixel is its latent."""
    return latents.repeat_interleave(FACTOR, -1).repeat_interleave(FACTOR, -2)


def downscale(pixels):
    return F.avg_pool2d(pixels, FACTOR)


def test_the_published_tile_size_gives_the_published_numbers():
    assert (PUBLISHED.tile, PUBLISHED.step, PUBLISHED.overlap) == (24, 21, 3)


@pytest.mark.parametrize("length", range(1, 70))
@pytest.mark.parametrize("tiling", [PUBLISHED, SMALL, Tiling.of_pixels(32, FACTOR)])
def test_tiles_cover_an_axis_and_every_tile_adds_something(length, tiling):
    starts = list(tiling.starts(length))
    ends = [min(start + tiling.tile, length) for start in starts]
    assert starts == [i * tiling.step for i in range(len(starts))]
    assert ends[-1] == length
    assert all(end < length for end in ends[:-1])
    for start, end, before in zip(starts[1:], ends[1:], ends, strict=False):
        assert before - start == tiling.overlap  # the blend is always whole
        assert end > before


@pytest.mark.parametrize("height", LENGTHS)
@pytest.mark.parametrize("width", LENGTHS)
def test_tiles_of_a_context_free_function_leave_no_trace(height, width):
    latents = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(tiled_decode(upscale, latents, SMALL), upscale(latents), rtol=0, atol=1e-6)
    pixels = upscale(latents)
    torch.testing.assert_close(tiled_encode(downscale, pixels, SMALL), downscale(pixels), rtol=0, atol=1e-6)


def brightened(amounts):
    """A decoder of zeros whose n-th tile is brighter by the n-th amount: blending alone decides the picture."""
    calls = iter(amounts)
    return lambda latents: upscale(latents[:, :3]) * 0 + next(calls)


def test_neighbours_are_blended_linearly_over_the_overlap():
    picture = tiled_decode(brightened([0.0, 1.0]), torch.zeros(1, 4, 1, 15), SMALL)[0, 0, 0]
    edge = SMALL.step * FACTOR
    assert torch.equal(picture[:edge], torch.zeros(edge))
    torch.testing.assert_close(picture[edge : edge + FACTOR], torch.arange(FACTOR) / FACTOR)
    assert torch.equal(picture[edge + FACTOR :], torch.ones(15 * FACTOR - edge - FACTOR))


def test_rows_are_blended_like_columns():
    across = tiled_decode(brightened([0.0, 1.0]), torch.zeros(1, 4, 1, 15), SMALL)
    down = tiled_decode(brightened([0.0, 1.0]), torch.zeros(1, 4, 15, 1), SMALL)
    assert torch.equal(across.mT, down)


def test_a_corner_is_blended_with_the_tile_above_first_then_with_the_blended_left_one():
    above_left, above, left, here = 1.0, 2.0, 4.0, 8.0
    picture = tiled_decode(brightened([above_left, above, left, here]), torch.zeros(1, 4, 15, 15), SMALL)[0, 0]
    edge = SMALL.step * FACTOR
    y, x = 5 / FACTOR, 11 / FACTOR
    above_blended = above_left * (1 - x) + above * x
    left_blended = above_left * (1 - y) + left * y
    expected = left_blended * (1 - x) + (above_blended * (1 - y) + here * y) * x
    assert picture[edge + 5, edge + 11].item() == pytest.approx(expected, abs=1e-6)


def test_an_affine_picture_stays_affine_across_seams():
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(30.0), indexing="ij")
    plane = (0.5 * x - 0.25 * y + 3)[None, None].expand(1, 3, -1, -1)

    def smooth(latents):
        """Exact on planes: the latent's value plus the slope inside it."""
        offset = (torch.arange(FACTOR) - (FACTOR - 1) / 2) / FACTOR
        rows, columns = (offset.repeat(side) for side in latents.shape[-2:])
        return upscale(latents) + 0.5 * columns - 0.25 * rows[:, None]

    picture = tiled_decode(smooth, plane, SMALL)
    steps = picture.diff(dim=-1)
    torch.testing.assert_close(steps, torch.full_like(steps, 0.5 / FACTOR), rtol=0, atol=1e-5)
    steps = picture.diff(dim=-2)
    torch.testing.assert_close(steps, torch.full_like(steps, -0.25 / FACTOR), rtol=0, atol=1e-5)


def test_half_precision_tiles_stay_in_their_dtype():
    latents = torch.randn(1, 4, 15, 15).half()
    picture = tiled_decode(upscale, latents, SMALL)
    assert picture.dtype == torch.float16
    torch.testing.assert_close(picture, upscale(latents), rtol=1e-3, atol=1e-3)


class StopAskedError(Exception):
    pass


def test_a_cancelled_job_stops_between_tiles():
    ran = []

    def check_cancelled():
        if len(ran) == 2:
            raise StopAskedError

    def decode(latents):
        ran.append(latents.shape)
        return upscale(latents)

    with pytest.raises(StopAskedError):
        tiled_decode(decode, torch.zeros(1, 4, 20, 20), SMALL, check_cancelled)
    assert len(ran) == 2


@pytest.mark.parametrize("tile_size", [0, 16, 31])
def test_tiles_too_small_to_overlap_are_refused(tile_size):
    with pytest.raises(RequestError, match=f"at least 32 pixels wide, got {tile_size}"):
        Tiling.of_pixels(tile_size, FACTOR)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    config = VAEConfig(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
        ffactor_spatial=FACTOR,
        ffactor_temporal=4,
        sample_size=384,
        scaling_factor=1.0,
    )
    return AutoencoderKLConv3D(config)


def test_a_picture_that_fits_one_tile_is_exactly_the_untiled_one(vae):
    latents, pixels = torch.randn(1, 4, 2, 4), torch.rand(1, 3, 32, 64) * 2 - 1
    assert torch.equal(vae.decode(latents, tile_size=64), vae.decode(latents))
    whole, tiled = vae.encode(pixels), vae.encode(pixels, tile_size=64)
    assert torch.equal(tiled.mean, whole.mean)
    assert torch.equal(tiled.logvar, whole.logvar)


def test_tiles_of_the_real_networks_resemble_the_whole(vae):
    """Statistics and borders differ per tile, so this is a resemblance; a tile in the wrong place gives 1.4."""
    latents = torch.randn(1, 4, 7, 5, generator=torch.Generator().manual_seed(1))
    pixels = upscale(latents[:, :3]).clamp(-1, 1)
    for whole, tiled in (
        (vae.decode(latents), vae.decode(latents, tile_size=64)),
        (vae.encode(pixels).mean, vae.encode(pixels, tile_size=64).mean),
    ):
        assert tiled.shape == whole.shape
        assert not torch.equal(tiled, whole)
        error = (tiled - whole).pow(2).mean().sqrt() / whole.std()
        assert error < 0.7, f"relative error {error:.2f}"
