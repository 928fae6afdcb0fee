"""The model card of an exported folder."""

from collections.abc import Callable
from pathlib import Path

from training.card import card
from training.transformer import TransformerStage


def test_card_counts_weights_and_thins_logs(small_stage: Callable[..., TransformerStage], tmp_path: Path) -> None:
    stage = small_stage()
    folder = stage.export(tmp_path / "hunyuan3-tiny-test")
    log = tmp_path / "transformer.csv"
    log.write_text("step,seconds,flow\n" + "".join(f"{10 * i},{60 * i},0.5\n" for i in range(1, 101)))
    text = card(folder, [log], "| one | 0.5 |")
    assert "# hunyuan3-tiny-test" in text
    assert "| one | 0.5 |" in text
    assert "`transformer`: 1000 steps in 100 minutes." in text
    assert 10 < text.count("| 0.5 |\n") < 20
    assert "| 1000 | 6000 | 0.5 |" in text
    count = sum(parameter.numel() for parameter in stage.model.parameters())
    assert f"transformer {count / 1e6:.2f} M" in text
