"""`python -m hunyuan3`: what it writes and what it says."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hunyuan3.__main__ import main
from tests.core.golden_paths import REPOSITORY


@pytest.fixture
def draw(folders, tmp_path, capsys):
    """`draw(*arguments)`: exit code, stdout, stderr and the folder that was drawn into."""

    def drawn(*arguments, variant="distil", output="fox.png"):
        command = ["draw", "--model", str(folders[variant]), "--device", "cpu", "-o", str(tmp_path / output)]
        code = main([*command, "--width", "96", "--height", "64", "--steps", "2", *arguments])
        return code, *capsys.readouterr(), tmp_path

    return drawn


def test_a_drawing_is_written_with_its_settings_and_named(draw, models):
    code, out, _, folder = draw("--prompt", "a red fox", "--seed", "7")
    assert code == 0
    assert str(folder / "fox.png") in out
    assert "2 steps" in out
    assert "seed 7" in out
    picture = Image.open(folder / "fox.png")
    assert (picture.size, picture.format) == ((96, 64), "PNG")
    for word in ("a red fox", "seed=7", "steps=2", "guidance=2.5", "tiny-distil"):
        assert word in picture.text["hunyuan3"]
    model = models["distil"]
    conditioning = model.conditioning("a red fox", width=96, height=64)
    expected = model.pictures(model.sample(conditioning, seed=7, steps=2).latents)[0]
    assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_a_batch_is_numbered_and_folders_are_made(draw):
    code, out, _, folder = draw("--prompt", "x", "--batch-size", "2", output="new/folder/fox.png")
    assert code == 0
    assert sorted(file.name for file in (folder / "new" / "folder").iterdir()) == ["fox_0.png", "fox_1.png"]
    assert "fox_0.png" in out
    assert "fox_1.png" in out


def test_a_prompt_in_any_script_is_kept_in_the_file(draw):
    _, _, _, folder = draw("--prompt", "一只橘猫 🐈")
    assert "一只橘猫 🐈" in Image.open(folder / "fox.png").text["hunyuan3"]


def test_a_system_prompt_of_ones_own_needs_no_second_switch(draw, models):
    _, _, _, folder = draw("--prompt", "x", "--custom-system-prompt", "Only circles.", variant="instruct")
    model = models["instruct"]
    conditioning = model.conditioning(
        "x", width=96, height=64, system_prompt="custom", custom_system_prompt="Only circles."
    )
    expected = model.pictures(model.sample(conditioning, steps=2).latents)[0]
    assert np.array_equal(np.asarray(Image.open(folder / "fox.png")), np.asarray(expected))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--steps", "-1"), "steps is -1"),
        (("--guidance", "nan"), "guidance is nan"),
        (("--width", "100"), "width is 100"),
        (("--seed", "-1"), "seed is -1"),
        (("--batch-size", "0"), "batch_size is 0"),
        (("--variant", "turbo"), "'turbo'"),
        (("--dtype", "int4"), "dtype is 'int4'"),
        (("--device", "cuda:99"), "device is 'cuda:99'"),
        (("--device", "abacus"), "device is 'abacus'"),
        (("--system-prompt", "en_poetry"), "'en_poetry'"),
        (("--model", "/nowhere"), "/nowhere is not a folder"),
        (("--tile-size", "-5"), "tile"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(draw, arguments, named):
    code, _, err, folder = draw("--prompt", "x", *arguments)
    assert code == 1
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert named in last[0]
    assert "Traceback" not in err
    assert not (folder / "fox.png").exists()


def test_nothing_to_do_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err


def test_it_runs_as_a_module(folders, tmp_path):
    arguments = ["draw", "--model", tmp_path / "nowhere", "--prompt", "x"]
    command = [sys.executable, "-m", "hunyuan3", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"error: {tmp_path / 'nowhere'} is not a folder" in done.stderr


def test_the_global_random_state_is_left_alone(draw):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    draw("--prompt", "x")
    assert torch.equal(torch.random.get_rng_state(), before)
