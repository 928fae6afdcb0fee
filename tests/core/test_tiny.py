import subprocess
import sys

import pytest
import torch

from hunyuan3.config import VARIANTS
from hunyuan3.folder import ModelFolder
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.tiny import make_tiny
from tests.core.golden_paths import REPOSITORY


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_variant_and_seed_give_the_same_bytes(folders, tmp_path, variant):
    torch.manual_seed(123)  # the global generator has no say
    assert contents(make_tiny(tmp_path / "again", variant)) == contents(folders[variant])


def test_another_process_gives_the_same_bytes(folders, tmp_path):
    command = [sys.executable, "-m", "hunyuan3.tiny", tmp_path / "out", "--variant", "distil"]
    out = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert "variant distil" in out
    assert contents(tmp_path / "out") == contents(folders["distil"])


def test_another_seed_gives_other_weights_and_the_same_vocabulary(folders, tmp_path):
    other, first = contents(make_tiny(tmp_path / "other", "base", seed=1)), contents(folders["base"])
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_has_the_files_of_a_published_folder_and_nothing_else(folders, variant):
    assert set(contents(folders[variant])) == {
        "config.json",
        "generation_config.json",
        "model-0001-of-0002.safetensors",
        "model-0002-of-0002.safetensors",
        "model.safetensors.index.json",
        "system_prompt.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_experts_of_a_layer_straddle_the_shards(folders):
    index = ModelFolder.open(folders["instruct"]).index
    for layer in range(3):
        assert len({index[name].file for name in index if f"layers.{layer}.mlp.experts." in name}) == 2


def test_base_lacks_the_last_four_ratios_and_timestep_r(folders):
    for variant in VARIANTS:
        folder = ModelFolder.open(folders[variant])
        is_base = variant == "base"
        assert len(folder.tokens.ratios) == (33 if is_base else 37)
        for token in ("<img_ratio_33>", "<img_ratio_36>", "<timestep_r>"):
            assert (folder.tokenizer.token_id(token) is None) == is_base


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_pictures_have_something_on_them(models, variant):
    model, size = models[variant], (64, 96)
    conditioning = model.conditioning("一只橘猫 by the window", height=size[0], width=size[1])
    latents = model.sample(conditioning, seed=1, steps=3).latents
    pixels = model.decode(latents)
    assert pixels.shape == (1, *size, 3)
    assert pixels.std() > 0.05
    assert pixels.isfinite().all()


def test_other_weights_draw_another_picture(models, tmp_path):
    other = Hunyuan3.load(make_tiny(tmp_path / "other", "instruct", seed=1), device="cpu")
    one, two = (
        model.sample(model.conditioning("a fox", width=64, height=64), seed=1, steps=1).latents
        for model in (models["instruct"], other)
    )
    assert (one - two).abs().max() > 0.1
