"""What benchmarks/expert_cache.py calculates and simulates with: its formula, its routings, a short run."""

import re
import sys

import pytest
import torch

from benchmarks import expert_cache
from benchmarks.expert_cache import Setup, popularity, simulate

SETUP = Setup("made up", layers=2, experts=8, top_k=2, resident=4, expert=1000, read=5000, memory=1e6, link=1e5)


def test_seconds_are_those_of_the_link_and_the_memory():
    assert SETUP.bytes_per_token(0.75) == 1000
    assert SETUP.tokens_per_second(0.75) == pytest.approx(1 / (0.01 + 0.005))
    assert SETUP.tokens_per_second(0.75, swaps=0.5) == pytest.approx(1 / (0.015 + 0.005))
    assert SETUP.tokens_per_second(SETUP.hit_rate_for(40.0)) == pytest.approx(40.0)
    assert SETUP.hit_rate_for(1000.0) > 1, "reading alone takes longer"


def test_routings_are_as_skewed_as_they_say():
    generator = torch.Generator().manual_seed(0)
    assert torch.allclose(popularity(0, 8, generator), torch.full((8,), 1 / 8, dtype=torch.float64))
    zipf = popularity(1.0, 64, generator).sort(descending=True).values
    assert (zipf[0] / zipf[9]).item() == pytest.approx(10)
    found = [simulate(exponent, 16, layers=1, tokens=300, warm=150) for exponent in (0.0, 1.2)]
    (uniform, chance), (skewed, best) = found
    assert uniform.hit_rate == pytest.approx(chance, abs=0.04)
    assert chance == pytest.approx(0.25, abs=0.04)
    assert 0.6 < skewed.hit_rate <= best
    assert skewed.hits + skewed.misses == 8 * skewed.tokens == 8 * 150
    without, _ = simulate(1.2, 16, layers=1, tokens=300, warm=150, cache=False)
    assert without.swaps == 0
    assert without.hit_rate < skewed.hit_rate - 0.2


def test_refuses_to_count_an_expert_that_is_not_the_right_one(monkeypatch):
    monkeypatch.setattr(expert_cache, "NumberedExpert", WrongExpert)
    with pytest.raises(ValueError, match="came in place of"):
        simulate(1.0, 4, layers=1, tokens=4, warm=0)


class WrongExpert(expert_cache.NumberedExpert):
    def __init__(self, number: int) -> None:
        super().__init__(7)


def test_names_the_hit_rate_that_reaches_ten_tokens_a_second(capsys, monkeypatch):
    monkeypatch.setattr(expert_cache, "EXPONENTS", (1.0,))
    monkeypatch.setattr(expert_cache, "LAYERS", 1)
    monkeypatch.setattr(expert_cache, "report_tiny", lambda *_arguments: None)
    monkeypatch.setattr(sys, "argv", ["expert_cache.py", "--tokens", "320"])
    expert_cache.main()
    printed = capsys.readouterr().out
    named = re.search(r"int4, 24 GB: (\d+) of 64 .* 10 tokens/s at a hit rate of ([\d.]+)%", printed)
    assert named
    assert 20 <= int(named[1]) <= 26
    assert 50 < float(named[2]) < 65
    assert printed.count("Zipf 1") == 4, "still and moving, for both setups"


def test_the_tiny_models_own_routing():
    seen, resident = expert_cache.tiny_statistics(0.51, cache=True, tokens=12)
    assert resident == 0.5
    assert seen.tokens > 12
    assert 0.2 < seen.hit_rate < 0.9
