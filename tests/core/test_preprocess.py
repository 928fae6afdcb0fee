import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hunyuan3.config import ModelConfig
from hunyuan3.errors import RequestError
from hunyuan3.image.preprocess import (
    align_output,
    fit_picture,
    load_picture,
    patch_grid,
    picture_of,
    size_of,
    to_uint8,
    to_vae_range,
    vision_patches,
)
from hunyuan3.image.resolution import ResolutionTable
from hunyuan3.types import ImageSize
from tests.core.golden_paths import checkpoint, component, golden_root, scenarios


def recorded_pictures():
    """(recording, index, meta, checkpoint name, file) of every recorded input picture that is here."""
    found = []
    for name in ("cond_images", "cond_images_extra"):
        if (golden_root() / "components" / f"{name}.json").is_file():
            recording = component(name)
            for index, meta in enumerate(recording["images"]):
                path = golden_root() / "images" / meta["file"]
                if path.is_file() and checkpoint(recording["checkpoint"]) is not None:
                    found.append(pytest.param(name, index, meta, recording["checkpoint"], path, id=path.stem))
    if (golden_root() / "components" / "cond_images.json").is_file():  # the committed subset has none
        assert found, f"no recorded picture under {golden_root()}"
    return found


def recorded_tensor(name, key):
    return load_file(golden_root() / "components" / f"{name}.safetensors")[key]


def aligned_scenarios():
    """(recording, tensors) of drawings that were, or could have been, brought to the size of an input picture."""
    found = []
    for recording in scenarios():
        path = golden_root() / "scenarios" / f"{recording['name']}.safetensors"
        pictures = [golden_root() / "images" / image for image in recording["images"]]
        if recording["call"].get("infer_align_image_size") and all(file.is_file() for file in (path, *pictures)):
            tensors = load_file(path)
            if "image_uint8" in tensors:
                found.append((recording, tensors))
    return found


@pytest.mark.parametrize("name, index, meta, checkpoint_name, path", recorded_pictures())
def test_the_vae_sees_the_recorded_pixels(name, index, meta, checkpoint_name, path):
    picture = load_picture(path, reference=True)
    for how, stretch in (("center", False), ("resize", True)):
        said = meta[f"vae_{how}"]
        assert size_of(picture) == (said["ori_image_height"], said["ori_image_width"])
        pixels = fit_picture(picture, ImageSize(said["image_height"], said["image_width"]), stretch=stretch)
        recorded = recorded_tensor(name, f"img{index}.vae_image_{how}_uint8")
        assert torch.equal(pixels, recorded), f"{how}: {(pixels != recorded).float().mean():.2%} of the values differ"


@pytest.mark.parametrize("name, index, meta, checkpoint_name, path", recorded_pictures())
def test_the_vision_tower_sees_the_recorded_patches(name, index, meta, checkpoint_name, path):
    vision = ModelConfig.from_folder(checkpoint(checkpoint_name)).vision
    patches = vision_patches(
        load_picture(path, reference=True), max_num_patches=vision.max_num_patches, patch_size=vision.patch_size
    )
    recorded = recorded_tensor(name, f"img{index}.vit_pixel_values")
    assert torch.equal(patches.pixels, recorded), f"largest difference {(patches.pixels - recorded).abs().max():.2e}"
    assert torch.equal(patches.mask, recorded_tensor(name, f"img{index}.vit_mask"))
    assert list(patches.grid) == recorded_tensor(name, f"img{index}.vit_spatial_shape").tolist()


@pytest.mark.parametrize(
    "size, grid",
    [((1024, 1024), (32, 32)), ((512, 512), (32, 32)), ((720, 1280), (24, 42)), ((3000, 4000), (27, 36))],
)
def test_published_patch_grids(size, grid):
    assert patch_grid(ImageSize(*size), max_num_patches=1024, patch_size=16) == grid


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (17, 31), (4096, 4096)])
def test_a_patch_grid_never_exceeds_its_budget_nor_vanishes(size):
    grid = patch_grid(ImageSize(*size), max_num_patches=64, patch_size=16)
    assert grid.height >= 1 and grid.width >= 1
    assert grid.height * grid.width <= 64


def test_the_vae_range_is_exactly_minus_one_to_one():
    values = to_vae_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert values.dtype == torch.float32
    assert values.tolist() == [-1.0, 1.0]


def test_pixels_survive_the_way_through_the_vae_range():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 2, 256)
    assert torch.equal(to_uint8(to_vae_range(every)), every.permute(0, 2, 3, 1))


def test_output_is_clamped_and_rounded_to_nearest():
    pixels = torch.tensor([-7.0, -1.0, 0.0, 0.006, 1.0, 1.5]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(pixels)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert to_uint8(torch.full((1, 3, 1, 1), 0.0077)).unique().tolist() == [128]  # 128.48
    assert to_uint8(torch.full((1, 3, 1, 1), 0.0083)).unique().tolist() == [129]  # 128.56


def test_drawings_are_aligned_to_their_input_picture_as_recorded():
    recordings = aligned_scenarios()
    if not recordings:
        pytest.skip("the committed subset holds no aligned drawing")
    resized = 0
    for recording, tensors in recordings:
        base_size = ModelConfig.from_folder(checkpoint(recording["checkpoint"])).image_base_size
        table = ResolutionTable.build(base_size, 37)
        originals = [size_of(load_picture(golden_root() / "images" / image)) for image in recording["images"]]
        drawn = tensors["image_uint8"][0]
        aligned = align_output(drawn, originals, lambda size, table=table: table.rows[table.nearest(*size)], base_size)
        recorded = tensors.get("image_postprocessed_uint8", drawn)
        assert torch.equal(aligned, recorded), recording["name"]
        resized += aligned.shape != drawn.shape
    assert resized, "no recording was resized, so nothing was compared"


TABLE = ResolutionTable.build(1024, 37)
DRAWN = torch.zeros(896, 1152, 3, dtype=torch.uint8)  # ratio 0.7778


def bucket_of(size):
    return TABLE.rows[TABLE.nearest(*size)]


@pytest.mark.parametrize(
    "originals",
    [
        [],  # nothing to align to
        [ImageSize(1000, 1000)],  # another bucket
        [ImageSize(896, 1152)],  # the bucket's own ratio
        [ImageSize(785, 1000)],  # 0.0072 away from it
        [ImageSize(896, 1152), ImageSize(800, 1000)],  # only the first of a bucket counts
    ],
)
def test_a_drawing_without_a_matching_aspect_stays_as_it_is(originals):
    assert align_output(DRAWN, originals, bucket_of, 1024) is DRAWN


def test_the_first_picture_of_the_same_bucket_gives_its_aspect():
    originals = [ImageSize(1000, 1000), ImageSize(800, 1000), ImageSize(896, 1152)]
    aligned = align_output(DRAWN, originals, bucket_of, 1024)
    assert aligned.shape == (916, 1145, 3)
    assert aligned.dtype == torch.uint8


def test_orientation_is_applied_before_anything_is_measured(tmp_path):
    picture = Image.new("RGB", (30, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    assert size_of(load_picture(tmp_path / "turned.png")) == (30, 10)
    with Image.open(tmp_path / "turned.png") as opened:
        assert size_of(load_picture(opened)) == (30, 10)


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(RequestError, match=r"notes\.png cannot be read"):
        load_picture(tmp_path / "notes.png")
    with pytest.raises(RequestError, match=r"no picture .*absent\.png"):
        load_picture(tmp_path / "absent.png")


def test_uint8_pixels_become_the_picture_they_show():
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    picture = picture_of(pixels)
    assert size_of(picture) == (5, 7)
    assert picture.getpixel((6, 4)) == tuple(pixels[4, 6].tolist())
