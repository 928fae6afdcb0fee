"""The model card of an exported folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hunyuan3.errors import RequestError
from training.card import card
from training.transformer import TransformerStage


def test_card_counts_weights_and_thins_logs(small_stage: Callable[..., TransformerStage], tmp_path: Path) -> None:
    stage = small_stage()
    folder = stage.export(tmp_path / "hunyuan3-tiny-test")
    log = tmp_path / "transformer.csv"
    log.write_text("step,seconds,flow\n" + "".join(f"{10 * i},{60 * i},0.5\n" for i in range(1, 101)))
    text = card(folder, [log], "| one | 0.5 |", "ceiling: one-object 0.99", "One seed.\n")
    assert "encoded and decoded): one-object 0.99." in text
    assert "# hunyuan3-tiny-test" in text
    assert "## Training\n\nOne seed.\n\n`transformer`" in text
    assert "| one | 0.5 |" in text
    assert "`transformer`: 1000 steps in 100 minutes." in text
    assert 10 < text.count("| 0.5 |\n") < 20
    assert "| 1000 | 6000 | 0.5 |" in text
    count = sum(parameter.numel() for parameter in stage.model.parameters())
    assert f"transformer {count / 1e6:.2f} M" in text
    assert "Distilled" not in text


def test_card_says_that_a_model_is_distilled(small_distil: Callable[..., TransformerStage], tmp_path: Path) -> None:
    text = card(small_distil().export(tmp_path / "hunyuan3-tiny-test"), [], "")
    assert "8 single passes" in text


def test_a_log_without_lines_is_named(small_stage: Callable[..., TransformerStage], tmp_path: Path) -> None:
    log = tmp_path / "vae.csv"
    log.write_text("step,seconds\n")
    with pytest.raises(RequestError, match=r"vae\.csv has no line"):
        card(small_stage().export(tmp_path / "hunyuan3-tiny-test"), [log])
