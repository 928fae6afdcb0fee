"""What benchmarks/streaming.py shows and notices: tiny runs, with copies that go wrong or do not overlap."""

import itertools
import re
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.denoise import Sizes
from benchmarks.streaming import PACES, Setting, Stack, StreamingError, Turn, measure, run, verify
from hunyuan3.placement.copier import DirectCopier, ThreadCopier, copy_expert

TINY = Setting(
    Sizes(128, 2, 4, 2, 8, 2, 96, patch_width=32, latent_channels=4, side=12, prompt=12), slots=3, steps=1, repeats=1
)
# With as many slots as copies are needed between two layers, and enough to compute that Python does not matter.
ROOMY = replace(TINY, sizes=replace(TINY.sizes, hidden=384, expert_width=288), slots=6, steps=2, repeats=3)


class CopierInTurn(DirectCopier):
    """Copies at the link's pace when the expert is waited for: nothing overlaps."""

    def __init__(self, copy):
        super().__init__()
        self._copy = copy

    def wait(self, slot):
        self._copy(self._sources.pop(id(slot)), slot.bank)


class HastyCopier(ThreadCopier):
    """Does not wait for the expert that is computed with."""

    def wait(self, slot):
        self._jobs.pop(id(slot))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_prints_a_line_for_each_pace_and_the_worst_last(capsys):
    run(TINY)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "2 of 8 experts of each layer on the device, a ring of 3; 12 copies of 0.1 MB in a step" in out
    header = next(index for index, line in enumerate(lines) if line.startswith("pace  "))
    assert lines[header].split() == "pace copy s compute s together s ratio serial s".split()
    rows = [list(map(float, line.split())) for line in lines[header + 1 : header + 4]]
    assert [row[0] for row in rows] == list(PACES)
    for _pace, copy, compute, _together, _ratio, serial in rows:
        assert serial == pytest.approx(copy + compute, abs=0.0011)
    assert re.fullmatch(r"overlap: \d+\.\d\d", lines[-1])
    assert float(lines[-1].split()[1]) == max(row[4] for row in rows)


def test_the_ratio_is_of_the_longer_one():
    turn = Turn(copy=2.0, compute=1.0, together=2.5, cpu_share=1.0, link=1.0)
    assert (turn.ratio, turn.serial) == (1.25, 3.0)
    assert replace(turn, copy=0.5).ratio == 2.5


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_every_streamed_expert_is_compared_and_the_output_is_the_resident_one(share):
    stack = Stack(replace(TINY, share=share))
    assert stack.copies == 2 * {0.0: 8, 0.25: 6, 0.9: 1}[share]
    assert verify(stack, 1.0) == 2 * stack.copies * stack.expert_nbytes
    stack.check(stack.step())
    stack.send_away(0)
    copied = stack.streaming.copied
    stack.check(stack.step())
    assert stack.streaming.copied == copied, "with all of them resident nothing is copied"


@pytest.mark.parametrize("fail_at", [1, 4, 13, 24])
def test_a_corrupted_copy_is_noticed(capsys, fail_at):
    count = itertools.count(1)

    def copy(source, target):
        copy_expert(source, target)
        if next(count) == fail_at:
            target.down.view(torch.uint8).flatten()[-1] ^= 1  # the least that can go wrong

    with pytest.raises(SystemExit, match="Wrong bytes of expert"):
        run(replace(TINY, copy=copy))
    assert "overlap" not in capsys.readouterr().out


def test_a_copy_that_has_not_arrived_is_noticed():
    def late(source, target):
        time.sleep(0.02)
        copy_expert(source, target)

    with pytest.raises(StreamingError, match=r"Wrong bytes of expert \d before"):
        measure(Stack(replace(TINY, make_copier=HastyCopier, copy=late)))


def test_a_slot_that_is_overwritten_while_it_is_used_is_noticed():
    stack = Stack(TINY)
    backend = stack.layers[1].backend

    def overwritten(x, dispatch, experts, out):
        backend(x, dispatch, experts, out)
        if experts.first == 5:
            experts.gate_up.zero_()

    stack.layers[1].backend = overwritten
    with pytest.raises(StreamingError, match="Wrong bytes of expert 5 after"):
        verify(stack, 1.0)


def test_another_output_is_noticed():
    stack = Stack(TINY)
    stack.expected[0, 0, 0] += 1e-6
    with pytest.raises(StreamingError, match="not that of resident experts"):
        measure(stack)


def test_copies_that_take_longer_than_their_pace_are_refused():
    def slow(source, target):
        copy_expert(source, target)
        torch.randn(2 * 10**5).sort()

    with pytest.raises(StreamingError, match="choose a larger --side"):
        measure(Stack(replace(TINY, copy=slow)))


def test_without_anything_to_copy_it_says_so():
    with pytest.raises(StreamingError, match="smaller --share"):
        Stack(replace(TINY, share=1.0))


def test_copies_that_do_not_overlap_give_a_clearly_worse_figure():
    """At pace 1, one after the other takes twice as long as one of them. On a busy machine the better one may fail."""
    in_turn = measure(Stack(replace(ROOMY, make_copier=CopierInTurn)))
    assert in_turn.overlap > 1.5
    assert any(measure(Stack(ROOMY)).overlap < in_turn.overlap - 0.25 for _ in range(4))
