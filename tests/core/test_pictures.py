"""Input pictures: any file, what tells two pictures apart, how their latents are drawn, how many fit."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hunyuan3.conditioning import make_conditioning
from hunyuan3.errors import RequestError
from hunyuan3.image.preprocess import load_picture
from hunyuan3.image.resolution import ResolutionTable
from hunyuan3.pictures import encode_pictures, show_pictures
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.run import SamplingRun
from hunyuan3.types import Grid
from hunyuan3.writing import TextRequest, answering, text_rows


class HaltError(Exception):
    """What a host raises to stop."""


@pytest.fixture(scope="module")
def model(models):
    return models["instruct"]


SMALL = ResolutionTable.build(64, num_ratios=33)


def encode(model, pictures, **options):
    """As `model.encode_pictures`, fitted to shapes of a sixteenth of the area, for speed."""
    folder = replace(model.folder, resolutions=SMALL)
    return encode_pictures(folder, model.vae(), model.vision(), pictures, **options)


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def encoded(model):
    return encode(model, [noise(90, 40)])[0]


def saved(picture, tmp_path, name="picture.png", **options):
    picture.save(tmp_path / name, **options)
    return tmp_path / name


def same(a, b):
    return (
        a.key == b.key
        and (a.size, a.resolution, a.vision_grid) == (b.size, b.resolution, b.vision_grid)
        and torch.equal(a.posterior.mean, b.posterior.mean)
        and torch.equal(a.posterior.logvar, b.posterior.logvar)
        and torch.equal(a.tokens, b.tokens)
    )


def test_an_encoded_picture_holds_both_faces(model):
    config = model.folder.config
    small = Hunyuan3(replace(model.folder, resolutions=SMALL), model.options)
    (encoded,) = small.encode_pictures([noise(90, 40)])
    assert encoded.size == (40, 90)
    row = SMALL.row(SMALL.nearest(40, 90))
    assert encoded.resolution == row
    assert tuple(encoded.posterior.mean.shape) == (1, config.vae.latent_channels, *row.grid)
    assert encoded.posterior.logvar.shape == encoded.posterior.mean.shape
    assert tuple(encoded.tokens.shape) == (config.vision.max_num_patches, config.hidden_size)
    assert encoded.vision_grid == (5, 12)
    assert all(part.isfinite().all() for part in (encoded.posterior.mean, encoded.posterior.logvar, encoded.tokens))
    assert encoded.in_template().vit_tokens == config.vision.max_num_patches


def test_encoding_again_gives_the_same(model, encoded):
    assert same(encode(model, [noise(90, 40)])[0], encoded)


def test_pictures_together_equal_one_by_one(model):
    pictures = [noise(90, 40), noise(30, 70, seed=1), Image.new("RGB", (64, 64))]
    together = encode(model, pictures)
    assert [picture.size for picture in together] == [(40, 90), (70, 30), (64, 64)]
    assert all(same(a, *encode(model, [b])) for a, b in zip(together, pictures, strict=True))


def test_no_pictures_are_none(model):
    assert encode(model, []) == ()
    assert show_pictures(model.folder.config.vae, ()) == ()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "1", "P", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_any_mode_is_read(model, tmp_path, mode):
    rgb = noise(40, 40)
    if mode == "I;16":
        picture = Image.fromarray(np.array(rgb.convert("L")).astype(np.uint16) * 257)
    elif mode == "P":
        picture = rgb.quantize(16)
    else:
        picture = rgb.convert(mode)
    name = "picture.tiff" if mode in ("CMYK", "F", "I", "YCbCr") else "picture.png"
    loaded = load_picture(saved(picture, tmp_path, name))
    assert (loaded.mode, loaded.size) == ("RGB", (40, 40))
    if mode in ("L", "I;16", "I"):
        assert loaded.tobytes() == rgb.convert("L").convert("RGB").tobytes()
    (encoded,) = encode(model, [loaded])
    assert encoded.tokens.isfinite().all()
    assert encoded.posterior.mean.isfinite().all()


def test_sixteen_bits_are_scaled_and_clipped_only_for_the_reference(tmp_path):
    ramp = Image.fromarray(np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16))
    path = saved(ramp, tmp_path, "ramp.png")
    assert np.abs(np.array(load_picture(path))[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1
    assert (np.array(load_picture(path, reference=True)) == 255).mean() > 0.99


def test_transparency_is_dropped_not_blended(model, tmp_path):
    rgb = noise(40, 40)
    seen_through = rgb.copy()
    seen_through.putalpha(Image.linear_gradient("L").resize((40, 40)))
    assert same(*encode(model, [load_picture(saved(seen_through, tmp_path)), load_picture(saved(rgb, tmp_path))]))


def test_an_exif_rotated_picture_is_upright_and_has_its_upright_size(model, tmp_path):
    upright = noise(30, 70)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it"
    lying = saved(upright.transpose(Image.Transpose.ROTATE_90), tmp_path, exif=exif)
    with Image.open(lying) as raw:
        assert raw.size == (70, 30)
    turned, plain = encode(model, [load_picture(lying), upright])
    assert turned.size == (70, 30)  # height, width
    assert same(turned, plain)


def test_an_animation_gives_its_first_picture(model, tmp_path):
    frames = [noise(40, 40, seed).quantize(32) for seed in range(3)]
    path = saved(frames[0], tmp_path, "moving.gif", save_all=True, append_images=frames[1:])
    assert same(*encode(model, [load_picture(path), frames[0].convert("RGB")]))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 2000), (2000, 1), (2, 3), (17, 15)])
def test_pictures_of_extreme_shape_can_be_shown(model, width, height):
    (encoded,) = encode(model, [noise(width, height)])
    shapes = {size.height / size.width for size in SMALL.rows}
    used = encoded.resolution.size.height / encoded.resolution.size.width
    assert encoded.size == (height, width)
    if height / width > max(shapes):
        assert used == max(shapes)
    if height / width < min(shapes):
        assert used == min(shapes)
    conditioning = model.conditioning("closer", width=32, height=32, pictures=(encoded,))
    assert model.sample(conditioning, steps=1, guidance=1.0).latents.isfinite().all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read as a picture"),
        (b"this is no picture at all" * 20, "cannot be read as a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "cannot be read as a picture"),
        (None, "There is no picture"),
        ("half", "cannot be read as a picture"),
        ("flipped", "cannot be read as a picture"),
        ("bomb", "cannot be read as a picture"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, monkeypatch, content, said):
    path = tmp_path / "my picture.png"
    whole = io.BytesIO()
    noise(90, 40).save(whole, "PNG")
    data = whole.getvalue()
    if content == "half":
        path.write_bytes(data[: len(data) // 2])
    elif content == "flipped":  # a chunk header in the middle is garbage
        path.write_bytes(data[:33] + b"\xff\x00\x00\x00????" + data[41:])
    elif content == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        path.write_bytes(data)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=said) as error:
        load_picture(path)
    assert "my picture.png" in str(error.value)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(RequestError, match="cannot be read"):
        load_picture(tmp_path)


def test_one_changed_pixel_gives_another_key(model, encoded):
    picture = noise(90, 40)
    picture.putpixel((45, 20), (1, 2, 3))
    assert encode(model, [picture])[0].key != encoded.key


def test_a_pixel_that_only_the_vision_tower_sees_counts(model, encoded):
    """The crop for the VAE cuts the sides off; the tower sees the whole picture."""
    picture = noise(400, 40)
    changed = picture.copy()
    changed.paste((255, 0, 0), (0, 0, 4, 40))
    a, b = encode(model, [picture, changed])
    assert torch.equal(a.posterior.mean, b.posterior.mean)
    assert a.key != b.key


def test_the_way_of_fitting_is_part_of_the_key(model):
    picture = noise(90, 40)
    cropped, stretched = (encode(model, [picture], align=align)[0] for align in (False, True))
    assert cropped.key != stretched.key
    assert not torch.equal(cropped.posterior.mean, stretched.posterior.mean)
    assert torch.equal(cropped.tokens, stretched.tokens)  # the tower sees the uncropped original either way


def test_the_fixed_latent_depends_on_picture_and_place_alone(model, encoded):
    vae = model.folder.config.vae
    once, again = show_pictures(vae, [encoded, encoded]), show_pictures(vae, [encoded, encoded])
    assert [picture.key for picture in once] == [picture.key for picture in again]
    assert all(torch.equal(a.latent, b.latent) for a, b in zip(once, again, strict=True))
    assert once[0].key != once[1].key
    assert not torch.equal(once[0].latent, once[1].latent)
    before = torch.get_rng_state()
    show_pictures(vae, [encoded])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_latent_is_mean_plus_noise_scaled(model, encoded):
    (shown,) = show_pictures(model.folder.config.vae, [encoded], torch.Generator().manual_seed(5))
    eps = torch.randn(encoded.posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    sample = encoded.posterior.mean + (0.5 * encoded.posterior.logvar).exp() * eps
    assert shown.latent.dtype == torch.float32
    torch.testing.assert_close(shown.latent, (sample * 0.562679178327931)[0])


def test_latents_of_one_generator_are_drawn_in_order(model, encoded):
    shown = show_pictures(model.folder.config.vae, [encoded, encoded], torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    for picture in shown:
        eps = torch.randn(encoded.posterior.mean.shape, generator=generator)
        sample = encoded.posterior.mean + (0.5 * encoded.posterior.logvar).exp() * eps
        torch.testing.assert_close(picture.latent, (sample * 0.562679178327931)[0])


def test_two_latents_never_share_a_key(model, encoded):
    """Whatever generator they come from, and however much of it was used before."""
    vae, used = model.folder.config.vae, torch.Generator().manual_seed(5)
    shown = [
        *show_pictures(vae, [encoded, encoded]),
        *show_pictures(vae, [encoded, encoded], used),
        *show_pictures(vae, [encoded, encoded], used),
        *show_pictures(vae, [encoded], torch.Generator().manual_seed(6)),
    ]
    assert len({picture.key for picture in shown}) == len(shown)
    again = show_pictures(vae, [encoded, encoded], torch.Generator().manual_seed(5))
    assert [picture.key for picture in again] == [picture.key for picture in shown[2:4]]


@pytest.fixture
def shown_in_drawing(model, encoded):
    """The latents that a drawing shows its network."""

    def latents(posterior, seed):
        conditioning = model.conditioning("closer", width=32, height=32, pictures=(encoded,), posterior=posterior)
        folder = model.folder
        run = SamplingRun.prepare(folder, model.transformer(), conditioning, seed=seed, steps=1, guidance=1.0)
        seen, embed = [], model.transformer().embed_latents
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.transformer(), "embed_latents", lambda x, t: seen.append(x) or embed(x, t))
            list(run)
        return next(x[0] for x in seen if tuple(x.shape[2:]) == encoded.resolution.grid)

    return latents


def test_a_fixed_posterior_is_the_same_for_every_image_seed(shown_in_drawing):
    assert torch.equal(shown_in_drawing("fixed", 1), shown_in_drawing("fixed", 2))


def test_the_reference_posterior_depends_on_the_image_seed(shown_in_drawing):
    first, again, other = (shown_in_drawing("reference", seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    assert not torch.equal(first, shown_in_drawing("fixed", 1))


def test_the_reference_noise_comes_after_the_pictures_latents(model, encoded):
    """One generator: a picture shown first moves the noise; a fixed one does not."""

    def start(pictures, posterior):
        conditioning = model.conditioning("a", width=32, height=32, pictures=pictures, posterior=posterior)
        settings = {"seed": 3, "steps": 1, "guidance": 1.0, "noise": "reference"}
        step = next(iter(model.sample(conditioning, **settings)))
        return step.latents + step.prediction  # one step from sigma 1 to 0

    alone, fixed = start((), "fixed"), start((encoded,), "fixed")
    torch.testing.assert_close(alone, fixed, rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(3)
    torch.randn(encoded.posterior.mean.shape, generator=generator)
    expected = torch.randn(alone.shape, generator=generator, dtype=torch.bfloat16).float()
    torch.testing.assert_close(start((encoded,), "reference"), expected, rtol=0, atol=1e-5)


def test_too_many_pictures_are_refused_with_numbers(model, encoded):
    folder = replace(model.folder, generation=replace(model.folder.generation, max_length=400))
    tokens = encoded.resolution.grid.height * encoded.resolution.grid.width + folder.config.vision.max_num_patches
    many = (encoded,) * 6
    with pytest.raises(RequestError, match="the limit is 400") as drawing:
        make_conditioning(folder, "a fox", folder.resolutions.free(32, 32), pictures=many)
    with pytest.raises(RequestError, match="the limit is 400") as writing:
        text_rows(folder, TextRequest("a fox", many), answering(folder))
    for error in (drawing, writing):
        assert "fewer input pictures" in str(error.value)
        numbers = [int(word.strip("(),.")) for word in str(error.value).split() if word.strip("(),.").isdigit()]
        assert numbers[0] > 6 * tokens > 400
        assert numbers[2] >= 6 * tokens
    make_conditioning(folder, "a fox", folder.resolutions.free(32, 32), pictures=many[:3])


def test_every_picture_of_a_sequence_keeps_its_own_shape(model):
    """A regression of another implementation: pictures of unlike size paired with each other's grids."""
    encoded = encode(model, [noise(90, 40), noise(30, 70), noise(64, 64)])
    rows = model.conditioning("a", width=32, height=48, pictures=encoded).rows
    grids = [grid for _span, grid in rows.grids]
    expected = [grid for picture in encoded for grid in (picture.resolution.grid, picture.vision_grid)]
    assert grids == [*expected, Grid(3, 2)]


def test_encoding_can_be_cancelled(model):
    asked = []

    def check_cancelled():
        asked.append(1)
        raise HaltError

    with pytest.raises(HaltError):
        encode(model, [noise(20, 20)], check_cancelled=check_cancelled)
    assert len(asked) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_vae_draws_its_noise_in_its_own_precision(model, encoded, dtype):
    """As the reference's autocast has it (spec 9.5); the latent is float32 all the same."""
    posterior = replace(
        encoded.posterior, mean=encoded.posterior.mean.to(dtype), logvar=encoded.posterior.logvar.to(dtype)
    )
    narrow = replace(encoded, posterior=posterior)
    (shown,) = show_pictures(model.folder.config.vae, [narrow], torch.Generator().manual_seed(5))
    eps = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
    expected = (posterior.mean.float() + (0.5 * posterior.logvar.float()).exp() * eps.float()) * 0.562679178327931
    assert shown.latent.dtype == torch.float32
    torch.testing.assert_close(shown.latent, expected[0], rtol=0, atol=1e-5)
