"""Experts from host memory: to the bit what resident ones give, whatever the ring, the share, the way through a pass.

`torch.device("cpu", 0)` stands in for a card: it is another device than the host's `torch.device("cpu")` to everything
that compares devices, and tensors on it compute. What this cannot show is a real copy to a real card.
"""

import itertools
import threading
import time

import pytest
import torch

from hunyuan3.errors import OutOfBudgetError, RequestError
from hunyuan3.folder import ModelFolder
from hunyuan3.generate.sampling import SamplingOptions
from hunyuan3.pack import pack
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.placement.copier import DirectCopier, RingSlot, ThreadCopier, copy_expert
from hunyuan3.placement.ring import ExpertRing
from hunyuan3.quant.policy import FORMATS
from hunyuan3.writing import TextRequest, answering, thinking

CARD = torch.device("cpu", 0)
EXPERTS, LAYERS = 8, 3


class HaltError(Exception):
    pass


def opened(folder, share=0.0, slots=3, **options):
    """A model of which this share of the experts is on the card."""
    options = {"device": CARD, "dtype": "float32"} | options
    placed = Hunyuan3.open(folder, streaming=slots, **options).placed_transformer
    beside = placed.required_bytes + placed.full_ring_on(placed.device)
    vram = beside + int(share * (placed.total_bytes - placed.required_bytes))
    return Hunyuan3.open(folder, streaming=slots, vram=vram, **options)


def latents(model, seed=1, **settings):
    conditioning = model.conditioning("a red fox", width=64, height=64)
    return model.sample(conditioning, seed=seed, steps=3, **settings).latents


def resident(model):
    """Experts of each layer on the card; the same in all layers."""
    counts = {sum(layer.mlp.experts.resident) for layer in model.placed_transformer.module.layers}
    assert len(counts) == 1
    return counts.pop()


def ring_of(model):
    return model.placed_transformer.streams.ring


def all_slots_are_accounted_for(model):
    ring = ring_of(model)
    return ring.num_free + len(ring._under_way) == ring.count and not ring._taken


@pytest.fixture(scope="module")
def whole(folders):
    """Format -> what a wholly resident model draws."""
    return {
        name: latents(Hunyuan3.load(folders["instruct"], device=CARD, dtype="float32", format=name)) for name in FORMATS
    }


# the same numbers


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.3, 2), (0.9, 7), (1.0, 8)])
@pytest.mark.parametrize("slots", [2, 3, 7])
def test_a_streamed_drawing_is_the_resident_one(folders, whole, share, count, slots):
    model = opened(folders["instruct"], share, slots)
    assert torch.equal(latents(model), whole["bf16"])
    assert resident(model) == count
    assert model.placed_transformer.streams.copied == (EXPERTS - count) * LAYERS * 4  # the prompt and three steps
    assert all_slots_are_accounted_for(model) or count == 8
    assert torch.equal(latents(model), whole["bf16"]), "with the kept prompt, and from the middle of a cycle"


@pytest.mark.parametrize("weight_format", FORMATS)
def test_in_every_format(folders, whole, weight_format):
    model = opened(folders["instruct"], 0.4, format=weight_format)
    assert torch.equal(latents(model), whole[weight_format])
    assert 0 < resident(model) < EXPERTS


def test_from_a_pack(folders, whole, tmp_path):
    list(pack(ModelFolder.open(folders["instruct"]), tmp_path / "pack", "int4"))
    assert torch.equal(latents(opened(tmp_path / "pack", 0.4)), whole["int4"])


def test_branches_in_turn_batches_and_distil(folders, models):
    for options in ({"one_branch_at_a_time": True}, {"batch_size": 2}):
        plain = latents(Hunyuan3.load(folders["instruct"], device=CARD, dtype="float32"), **options)
        assert torch.equal(latents(opened(folders["instruct"], 0.4), **options), plain)
    assert torch.equal(latents(opened(folders["distil"], 0.4)), latents(models["distil"]))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_words_are_the_same_and_need_few_experts(folders, models, share):
    greedy, request = SamplingOptions(do_sample=False), TextRequest("a fox")
    model = opened(folders["instruct"], share)
    plan = thinking(model.folder, "think", need_ratio=True)
    runs = [one.write(request, plan, sampling=greedy, max_new_tokens=20) for one in (model, models["instruct"])]
    for run in runs:
        list(run)
    assert runs[0].ids == runs[1].ids
    # Each token of 2 experts in each layer; the prompt, which is longer than the experts are many, of all.
    away = EXPERTS - resident(model)
    words = model.placed_transformer.streams.copied - away * LAYERS
    assert 0 < words <= 2 * LAYERS * (len(runs[0].ids) + 4)


def test_bfloat16(folders):
    plain = Hunyuan3.load(folders["instruct"], device=CARD, dtype="bfloat16", moe_backend="loop")
    assert torch.equal(latents(opened(folders["instruct"], 0.4, dtype="bfloat16")), latents(plain))


# room


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
def test_no_more_is_on_the_card_than_was_allowed(folders, share):
    model = opened(folders["instruct"], share)
    model.transformer()
    placed = model.placed_transformer
    latents(model)
    assert placed.loaded_bytes + placed.ring_on(placed.device) <= model.options.vram
    assert placed.ring_on(placed.device) == placed.full_ring_on(placed.device)
    assert placed.loaded_bytes + placed.host_bytes == placed.total_bytes, "nothing is held twice"
    largest = max(unit.nbytes for unit in placed.units if unit.streams)
    assert model.options.vram - placed.loaded_bytes - placed.ring_on(placed.device) < largest, "and no room is wasted"


def test_where_the_host_has_no_room_it_is_said(folders):
    placed = opened(folders["instruct"]).placed_transformer
    room = placed.required_bytes
    with pytest.raises(OutOfBudgetError, match=r"find room neither on cpu:0 nor in\s+host memory"):
        placed.load(room=room, host_has_room=lambda nbytes: placed.host_bytes + nbytes < 1e5)
    assert placed.load(room=room, host_has_room=lambda _nbytes: True) is placed.module


def test_experts_come_and_go_between_steps(folders, whole):
    """As a memory manager moves them while something else wants the card."""
    model = opened(folders["instruct"], 1.0)
    placed = model.placed_transformer
    conditioning = model.conditioning("a red fox", width=64, height=64)
    run = model.sample(conditioning, seed=1, steps=3)
    for step in run:
        if step.step == 0:
            assert placed.shrink(10**9) > 0
            assert resident(model) == 0
            assert placed.is_ready
        elif step.step == 1:
            placed.load(room=10**9)
            assert resident(model) == EXPERTS
    assert torch.equal(run.latents, whole["bf16"])


def test_unloading_gives_up_the_experts_then_the_ring_then_the_layers(folders):
    model = opened(folders["instruct"], 0.5)
    latents(model)
    placed = model.placed_transformer
    ring, before = placed.ring_on(placed.device), placed.loaded_bytes
    streamed = [unit.nbytes for unit in placed.units if unit.streams and placed.is_on_device(unit)]
    assert placed.unload(1, lambda _nbytes: True) == streamed[0]
    assert placed.ring_on(placed.device) == ring
    freed = placed.unload(sum(streamed[1:]) + 1, lambda _nbytes: True)
    assert freed == sum(streamed[1:]) + ring
    assert placed.ring_on(placed.device) == 0
    assert placed.is_ready
    assert placed.unload(None) == before - sum(streamed)
    assert not placed.is_ready
    placed.drop()
    assert placed.loaded_bytes == placed.host_bytes == 0
    assert all(parameter.is_meta for parameter in placed.module.parameters())


def test_a_ring_needs_two_slots(folders):
    for slots in (1, -2):
        with pytest.raises(RequestError, match="at least 2 slots"):
            Hunyuan3.open(folders["instruct"], device=CARD, streaming=slots)


# stopped in the middle


@pytest.mark.parametrize("stop_at", [1, 2, 5, 9, 14])
def test_after_a_stop_between_layers_the_next_drawing_is_right(folders, whole, stop_at):
    model, calls = opened(folders["instruct"], 0.3), 0

    def check_cancelled():
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise HaltError

    with pytest.raises(HaltError):
        latents(model, seed=5, check_cancelled=check_cancelled)
    assert torch.equal(latents(model), whole["bf16"])
    assert all_slots_are_accounted_for(model)


@pytest.mark.parametrize("fail_at", [1, 2, 7, 20, 41])
def test_after_a_failed_copy_the_next_drawing_is_right(folders, whole, fail_at):
    model, count = opened(folders["instruct"], 0.3), itertools.count(1)

    def copy(source, target):
        if next(count) == fail_at:
            raise torch.OutOfMemoryError("no room for a copy")
        copy_expert(source, target)

    ring_of(model)._copier = ThreadCopier(copy)
    with pytest.raises(torch.OutOfMemoryError):
        latents(model, seed=5)
    assert torch.equal(latents(model), whole["bf16"])
    assert all_slots_are_accounted_for(model)


@pytest.mark.parametrize("fail_at", [1, 4, 20])
def test_after_a_failure_while_an_expert_is_computed_the_next_drawing_is_right(folders, whole, fail_at):
    """The exception is held for a while, as a debugger or a retry does: its slot must not be lost for that time."""
    model, count, held = opened(folders["instruct"], 0.0, 2), itertools.count(1), []
    layer = model.transformer().layers[1].mlp
    backend = layer.backend

    def failing(*arguments):
        if next(count) == fail_at:
            raise torch.OutOfMemoryError("no room to compute")
        backend(*arguments)

    layer.backend = failing
    for _ in range(3):
        try:
            latents(model, seed=5)
        except torch.OutOfMemoryError as error:
            held.append(error)
        count = itertools.count(1)
    assert len(held) == 3
    layer.backend = backend
    assert torch.equal(latents(model), whole["bf16"])
    assert all_slots_are_accounted_for(model)
    held.clear()
    assert torch.equal(latents(model), whole["bf16"])
    assert all_slots_are_accounted_for(model)


# the ring


class Weights(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor([float(value)]), requires_grad=False)


class Journal(DirectCopier):
    """Copies when waited for, and notes what was begun."""

    def __init__(self):
        super().__init__()
        self.begun = []

    def start(self, source, slot):
        self.begun.append(int(source.value))
        super().start(source, slot)


def ring(slots, copier=None):
    return ExpertRing(lambda: RingSlot(Weights(-1)), slots, copier or Journal())


def values(run):
    return [(position, int(bank.value)) for position, bank in run]


def test_the_ring_runs_ahead_and_around():
    sources, journal = [Weights(value) for value in range(6)], Journal()
    one = ring(3, journal)
    taken = one.run(sources, 0, 4, cyclic=True)
    assert next(taken)[0] == 0
    assert journal.begun == [0, 1, 2], "while the first is used two more come"
    assert values(taken) == [(1, 1), (2, 2), (3, 3)]
    assert journal.begun == [0, 1, 2, 3, 4, 5, 0], "beyond the end of the layer, and of the pass"
    assert values(one.run(sources, 4, 2, cyclic=True)) == [(4, 4), (5, 5)]
    assert values(one.run(sources, 0, 4, cyclic=True)) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert journal.begun == [*range(6), *range(6), 0], "nothing twice"


def test_the_ring_fetches_no_more_than_asked_where_nothing_is_known_of_what_comes_next():
    sources, journal = [Weights(value) for value in range(5)], Journal()
    one = ring(4, journal)
    assert values(one.run(sources[:3], 0, 3, cyclic=False)) == [(0, 0), (1, 1), (2, 2)]
    assert journal.begun == [0, 1, 2]
    assert one.num_free == 4


def test_another_place_than_expected_starts_anew():
    sources, journal = [Weights(value) for value in range(6)], Journal()
    one = ring(2, journal)
    assert values(one.run(sources, 0, 2, cyclic=True)) == [(0, 0), (1, 1)]
    assert values(one.run(sources, 4, 2, cyclic=True)) == [(4, 4), (5, 5)]
    assert values(one.run(sources, 0, 1, cyclic=True)) == [(0, 0)]


def test_a_single_streamed_expert_and_more_slots_than_experts():
    sources = [Weights(7)]
    one = ring(5)
    for _ in range(3):
        assert values(one.run(sources, 0, 1, cyclic=True)) == [(0, 7)]


def test_a_slot_is_not_overwritten_while_it_is_used():
    """The thread copies ahead, but only into slots that were given back."""
    sources = [Weights(value) for value in range(40)]
    one = ring(3, ThreadCopier())
    for position, bank in one.run(sources, 0, 40, cyclic=True):
        assert int(bank.value) == position
        time.sleep(0.001)
        assert int(bank.value) == position


def test_copies_run_beside_the_compute():
    """With a copy and a computation of the same length, the whole takes about as long as one of them."""
    sources, both = [Weights(value) for value in range(12)], threading.Event()
    copying = threading.Event()

    def copy(source, target):
        copying.set()
        time.sleep(0.01)
        copy_expert(source, target)
        copying.clear()

    one = ring(3, ThreadCopier(copy))
    for _position, _bank in one.run(sources, 0, 12, cyclic=True):
        time.sleep(0.005)
        if copying.is_set():
            both.set()
        time.sleep(0.005)
    assert both.is_set()


def test_the_rings_memory_comes_when_needed_and_goes_when_asked():
    one = ring(3)
    assert one.nbytes == 0
    sources = [Weights(value) for value in range(4)]
    values(one.run(sources, 0, 2, cyclic=True))
    assert one.nbytes == 3 * 4
    assert one.release() == 12
    assert one.nbytes == one.num_free == 0
    assert values(one.run(sources, 2, 2, cyclic=True)) == [(2, 2), (3, 3)]


def test_an_answer_after_a_drawing_and_the_other_way_round(folders, models):
    """The cycle of drawings and the single experts of words share the ring."""
    model, plain = opened(folders["instruct"], 0.2), models["instruct"]
    for one in (model, plain):
        one.prefixes.clear()
    for _ in range(2):
        assert torch.equal(latents(model), latents(plain))
        greedy = SamplingOptions(do_sample=False)
        runs = [
            one.write(TextRequest("who?"), answering(one.folder), sampling=greedy, max_new_tokens=6)
            for one in (model, plain)
        ]
        texts = [[step.token for step in run] for run in runs]
        assert texts[0] == texts[1]
