"""The model card of an exported folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from hunyuan3.errors import RequestError
from training import run
from training.card import card, main
from training.flat_vae import FlatVAE
from training.state import save_state
from training.transformer import TransformerStage, TransformerStageConfig
from training.vae import TINY_VAE


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
    folder = small_stage().export(tmp_path / "hunyuan3-tiny-test")
    log.write_text("step,seconds\n")
    with pytest.raises(RequestError, match=r"vae\.csv has no line"):
        card(folder, [log])
    log.write_text("")
    with pytest.raises(RequestError, match=r"vae\.csv is no log"):
        card(folder, [log])


def test_the_commands_lead_from_a_state_to_a_folder_with_its_card(
    vocabulary: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`training.run compact` and `export`, then `training.card`, as the README writes them."""

    def said(main: Callable[[], None], *words: object) -> None:
        monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
        main()

    torch.manual_seed(0)
    stage = TransformerStage(TransformerStageConfig(), vocabulary, FlatVAE(TINY_VAE).state_dict(), (0.25, 1.0))
    state, small, folder = tmp_path / "polish.pt", tmp_path / "small.pt", tmp_path / "hunyuan3-tiny-test"
    save_state(state, {"name": "polish", "stage": stage.state(), "seconds": 60.0, "steps": 0})
    said(run.main, "compact", "--state", state, "--out", small)
    assert small.stat().st_size < 0.5 * state.stat().st_size
    said(run.main, "export", "--state", small, "--out", folder)
    with safe_open(folder / "model-0001-of-0001.safetensors", framework="pt") as shard:
        written = shard.get_tensor("model.layers.0.self_attn.qkv_proj.weight")
    assert torch.equal(written, stage.optimiser.average["layers.0.self_attn.qkv_proj.weight"].bfloat16())

    texts = {"table.md": "| one | 0.5 |", "ceiling.txt": "ceiling: one-object 0.99", "notes.md": "One run."}
    for name, text in {**texts, "polish.csv": "step,seconds\n9,60\n"}.items():
        (tmp_path / name).write_text(text)
    files = (tmp_path / name for name in texts)
    options = [word for pair in zip(("--scores", "--ceiling", "--notes"), files, strict=True) for word in pair]
    said(main, folder, "--logs", tmp_path / "polish.csv", *options)
    text = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("| one | 0.5 |", "decoded): one-object 0.99.", "One run.\n\n`polish`: 9 steps in 1 minutes."):
        assert part in text
