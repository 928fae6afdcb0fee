"""The table of what settings cost: it must tell equal pictures from others, and a setting from the reference."""

import numpy as np
import pytest

from hunyuan3.tiny import make_tiny
from training import quality
from training.exam import exam
from training.likeness import psnr, ssim


def picture(seed, amount=0):
    noise = np.random.default_rng(seed).integers(0, 256, (48, 64, 3))
    smooth = np.repeat(np.repeat(noise[::8, ::8], 8, 0), 8, 1)
    return np.clip(smooth + amount, 0, 255).astype(np.uint8)


def test_likeness_of_equal_and_of_other_pictures():
    assert psnr(picture(0), picture(0)) == float("inf")
    assert ssim(picture(0), picture(0)) == pytest.approx(1)
    black, ten = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 10, np.uint8)
    assert psnr(black, ten) == pytest.approx(10 * np.log10(255**2 / 100))
    assert 0.9 < ssim(picture(0), picture(0, amount=5)) < 1
    assert ssim(picture(0), picture(1)) < 0.5


def test_a_page_with_a_line_for_each_setting(tmp_path, monkeypatch):
    folder = make_tiny(tmp_path / "tiny", "instruct")
    few = [
        quality.Setting("reference", sampling={"steps": 2}),
        quality.Setting("the same", sampling={"steps": 2}),
        quality.Setting("int4", {"format": "int4"}, {"steps": 2}),
    ]
    monkeypatch.setattr(quality, "settings", lambda steps, distil: few)
    out, said = tmp_path / "quality.md", []
    assert quality.main([str(folder), "--prompts", "2", "--out", str(out)], said.append) == 0
    lines = [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == ["setting", "---", "reference", "the same", "int4"]
    assert cells[2][6:] == ["-", "-", "-"]
    assert cells[3][6:] == ["inf dB", "1.000", "6 of 6"]  # of each kind but the answers two
    assert cells[4][8] == "0 of 6"
    assert not out.with_name("quality.md.part").exists()
    assert f"python -m training.quality {folder} --prompts 2" in out.read_text(encoding="utf-8")


def test_tasks_are_of_every_kind_and_of_the_exam_that_was_named():
    tasks = quality.some_of_each(6, 1)
    kinds = [task.kind for task in tasks]
    assert kinds[:12] == ["one"] * 6 + ["two"] * 6
    assert len(set(kinds[12:18])) == 5 and all(kind.startswith("edit ") for kind in kinds[12:18])
    assert len(set(kinds[18:])) == 5 and len(kinds) == 24
    assert set(tasks) <= set(exam(60, 1)) and not set(tasks) & set(exam(60, 0))


def test_every_format_step_cache_and_number_of_steps_is_there(tmp_path):
    names = [setting.name for setting in quality.settings(20, tmp_path)]
    for wanted in ("int8", "int8_dynamic", "fp8", "fp8_dynamic", "int4", "50 steps", "8 steps", "distilled"):
        assert wanted in names
    assert "20 steps" not in names, "that is the reference"
    assert sum("step cache" in name for name in names) == 3


def test_a_missing_distilled_folder_is_found_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality.Candidate, "draw", lambda *_args: pytest.fail("something was drawn"))
    folder = make_tiny(tmp_path / "tiny", "instruct")
    assert quality.main([str(folder), "--prompts", "2", "--distil", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_a_folder_that_is_none_is_an_error(tmp_path, capsys):
    assert quality.main([str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
