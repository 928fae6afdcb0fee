"""The vision tower against the recordings, against transformers' SigLIP2, and against itself."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hunyuan3.checkpoint.index import open_shard
from hunyuan3.image.preprocess import vision_patches
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.types import Grid
from tests.core.golden_paths import checkpoint, component, golden_root

GRIDS = [Grid(8, 8), Grid(3, 21), Grid(16, 4), Grid(1, 1), Grid(1, 64), Grid(5, 7)]  # of at most 64 patches


def recorded():
    """(index, tensors) of the recorded pictures that have vision features; none where the set lacks them."""
    path = golden_root() / "components" / "cond_images.safetensors"
    if not path.is_file() or checkpoint(component("cond_images")["checkpoint"]) is None:
        return []
    tensors = load_file(path)
    count = len(component("cond_images")["images"])
    return [(index, tensors) for index in range(count) if f"img{index}.aligned" in tensors]


@pytest.fixture(scope="module")
def vision(models):
    return models["instruct"].vision()


@pytest.fixture(scope="module")
def batch():
    """Patches of every grid, the rest of the 64 slots zero; mask; grids."""
    generator = torch.Generator().manual_seed(0)
    patches, mask = torch.zeros(len(GRIDS), 64, 768), torch.zeros(len(GRIDS), 64, dtype=torch.int32)
    for row, grid in enumerate(GRIDS):
        count = grid.height * grid.width
        patches[row, :count] = torch.rand(count, 768, generator=generator) * 2 - 1
        mask[row, :count] = 1
    return patches, mask, GRIDS


@pytest.mark.parametrize("case", [pytest.param(case, id=f"img{case[0]}") for case in recorded()])
def test_features_are_the_recorded_ones(case):
    index, tensors = case
    vision = Hunyuan3.open(checkpoint(component("cond_images")["checkpoint"]), device="cpu", dtype="float32").vision()
    patches, mask = tensors[f"img{index}.vit_pixel_values"][None], tensors[f"img{index}.vit_mask"][None]
    grids = [Grid(*tensors[f"img{index}.vit_spatial_shape"].tolist())]
    with torch.no_grad():
        found = {
            "vit_embeddings": vision.tower.embed(patches, grids),
            "vit_last_hidden": vision.tower(patches, mask, grids),
            "aligned": vision(patches, mask, grids),
        }
    for name, value in found.items():
        expected = tensors[f"img{index}.{name}"]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-5 * expected.abs().max().item(), msg=name)


@pytest.fixture(scope="module")
def siglip2(models):
    """transformers' network with the same weights, taken from the folder by their published names."""
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    folder = models["instruct"].folder
    own = folder.config.vision
    config = Siglip2VisionConfig(
        hidden_size=own.hidden_size,
        intermediate_size=own.intermediate_size,
        num_hidden_layers=own.num_layers,
        num_attention_heads=own.num_heads,
        num_channels=own.num_channels,
        num_patches=own.num_positions,
        patch_size=own.patch_size,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=own.layer_norm_eps,
        vision_use_head=False,
        attn_implementation="eager",
    )
    model = Siglip2VisionModel(config).eval()
    weights = {}
    for name in folder.index:
        if name.startswith("vision_model."):
            with open_shard(folder.index[name].file) as file:
                weights[name] = file.get_tensor(name).float()
    missing, _ = model.load_state_dict(weights, strict=False)
    assert not [name for name in missing if ".head." not in name], missing
    return model


def test_the_tower_is_siglip2(vision, siglip2, batch):
    patches, mask, grids = batch
    with torch.no_grad():
        ours = vision.tower(patches, mask, grids)
        theirs = siglip2(patches, mask, torch.tensor(grids)).last_hidden_state
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def test_pictures_of_different_grids_in_one_batch_equal_one_by_one(vision, batch):
    patches, mask, grids = batch
    together = vision(*batch)
    alone = torch.cat([vision(patches[i : i + 1], mask[i : i + 1], grids[i : i + 1]) for i in range(len(grids))])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_padding_patches_do_not_change_real_ones(vision, batch):
    patches, mask, grids = batch
    other = patches.masked_fill(mask[..., None] == 0, 3.0)
    real = mask.bool()
    first, second = vision(patches, mask, grids), vision(other, mask, grids)
    assert torch.equal(first[real], second[real])
    assert not torch.equal(first[~real], second[~real]), "padding slots have values, too"


def test_more_slots_change_nothing_for_the_real_patches(vision, batch):
    patches, mask, grids = batch
    longer = vision(
        torch.nn.functional.pad(patches, (0, 0, 0, 9)), torch.nn.functional.pad(mask, (0, 9)), grids
    )  # a larger max_num_patches
    torch.testing.assert_close(longer[:, :64][mask.bool()], vision(*batch)[mask.bool()], rtol=0, atol=1e-5)


def test_every_real_patch_counts_for_every_slot(vision, batch):
    patches, mask, grids = (part[:1] for part in batch)
    changed = patches.clone()
    changed[0, 63] += 1
    difference = (vision(changed, mask, grids) - vision(patches, mask, grids)).abs().amax(dim=-1)
    assert (difference > 1e-6).all()


def test_where_a_patch_lies_matters(vision, batch):
    patches, mask, _ = (part[:1] for part in batch)
    wide, tall = (vision(patches, mask, [grid]) for grid in (Grid(4, 16), Grid(16, 4)))
    assert (wide - tall).abs().max() > 1e-2


def test_the_position_grid_as_it_is_stored_is_used_unresized(models, vision, batch):
    """The tiny tower's own grid is 4 x 4."""
    patches = batch[0][:1]
    own = vision.tower.patch_embedding(patches)
    with torch.no_grad():
        embedded = vision.tower.embed(patches, [Grid(4, 4)]) - own
    table = vision.tower.position_embedding.weight
    torch.testing.assert_close(embedded[0, :16], table, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedded[0, 16:], table[:1].expand(48, -1), rtol=0, atol=1e-5)


def test_bfloat16_stays_near_float32(folders, vision, batch):
    narrow = Hunyuan3.open(folders["instruct"], device="cpu", dtype="bfloat16").vision()
    patches, mask, grids = batch
    exact, rounded = vision(patches, mask, grids), narrow(patches, mask, grids)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).std() / exact.std()
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (64, 64), (300, 240)])
def test_a_picture_of_any_shape_gives_finite_features(models, vision, size):
    settings = models["instruct"].folder.config.vision
    seen = vision_patches(
        Image.new("RGB", size, "red"), max_num_patches=settings.max_num_patches, patch_size=settings.patch_size
    )
    out = vision(seen.pixels[None], seen.mask[None], [seen.grid])
    assert out.shape == (1, settings.max_num_patches, models["instruct"].folder.config.hidden_size)
    assert out.isfinite().all()


def test_no_gradient_is_recorded(vision, batch):
    with torch.enable_grad():
        assert not vision(*batch).requires_grad
