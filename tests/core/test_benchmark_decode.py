"""What benchmarks/decode.py compares with: a tiny run, and its counts."""

import re

import pytest
import torch

from benchmarks import decode
from benchmarks.decode import ReferenceWriter, count_tokens, random_tokens, run, text_pass
from benchmarks.denoise import Sizes, build_model

TINY = Sizes(64, 2, 4, 2, 8, 2, 32, patch_width=32, latent_channels=4, side=6, prompt=12, vocabulary=700)


@pytest.fixture(autouse=True)
def short_thoughts(monkeypatch):
    monkeypatch.setattr(decode, "THOUGHT", 6)


def test_prints_the_ratio_last(capsys):
    run(TINY, tokens=2, seed=0)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"ratio: \d+\.\d", lines[-1])
    assert any(line.startswith("prefill, 12 tokens") for line in lines)


def test_refuses_to_report_when_the_ways_disagree(capsys, monkeypatch):
    right = ReferenceWriter.read
    monkeypatch.setattr(ReferenceWriter, "read", lambda self, ids: right(self, ids) * 1.001)
    with pytest.raises(SystemExit, match="differ"):
        run(TINY, tokens=2, seed=0)
    assert "ratio" not in capsys.readouterr().out


def test_reading_in_pieces_equals_reading_at_once():
    model, ids = build_model(TINY, seed=0), random_tokens(TINY, 20, seed=0)
    pieces, whole = ReferenceWriter(model, 20), ReferenceWriter(model, 20)
    for token in ids[:-1]:
        pieces.read([token])
    torch.testing.assert_close(pieces.read(ids[-1:]), whole.read(ids), rtol=0, atol=1e-5)


def test_another_prompt_gives_another_text():
    model = build_model(TINY, seed=0)
    first, second = (text_pass(model, random_tokens(TINY, 12, seed=seed), 6) for seed in (0, 1))
    assert [step.token for step in first] != [step.token for step in second]


@pytest.mark.parametrize("branches", [1, 2])
def test_counts_are_what_the_lengths_say(branches):
    prompt, text, picture = 12, 6, 36
    kept, afresh = (count_tokens(TINY, 5, branches, reuse=reuse) for reuse in (True, False))
    assert (kept.prompt, kept.text) == (prompt, text - 1)
    assert (afresh.prompt, afresh.text) == (4 * prompt, 4 * (text - 1))
    assert kept.steps == afresh.steps == 4 * branches * (5 * (1 + picture) + 1)
    assert afresh.drawing_prompt == 4 * branches * (prompt + text)
    # Kept: the text's last token, and unconditionally all but the half of the prompt that is the system's.
    assert kept.drawing_prompt == 1 + (branches - 1) * (prompt // 2 + text)
