"""Experts that stay in their files: read in every pass, to the bit what resident ones give.

`torch.device("cpu", 0)` stands in for a card (see test_streaming.py).
"""

import contextlib
import gc
import threading
import weakref

import pytest
import torch

from hunyuan3.checkpoint.read import TensorReader
from hunyuan3.errors import CheckpointError, OutOfBudgetError, RequestError
from hunyuan3.folder import ModelFolder
from hunyuan3.generate.sampling import SamplingOptions
from hunyuan3.pack import pack
from hunyuan3.parts import LoadOptions
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.placement.copier import DirectCopier, RingSlot, StreamCopier, is_in_files
from hunyuan3.placement.ring import ExpertRing
from hunyuan3.placement.split import LayerSplit
from hunyuan3.writing import TextRequest, answering

CARD, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
EXPERTS, LAYERS = 8, 3


def opened(folder, on_card, in_host, slots=3, **options):
    """A model with so many experts of each layer on the card and in host memory, the others in files."""
    options = {"device": CARD, "dtype": "float32", "streaming": slots, "disk": True} | options
    placed = Hunyuan3.open(folder, **options).placed_transformer
    one = max(unit.nbytes for unit in placed.units if unit.streams)
    vram = placed.required_on(CARD) + placed.full_ring_on(CARD) + on_card * one
    return Hunyuan3.open(folder, vram=vram, ram=in_host * one, **options)


def latents(model, seed=1):
    conditioning = model.conditioning("a red fox", width=64, height=64)
    return model.sample(conditioning, seed=seed, steps=3).latents


def written(model, seed=1):
    sampling = SamplingOptions(temperature=3.0)  # or the tiny models end at once
    run = model.write(
        TextRequest("what is it?"), answering(model.folder), sampling=sampling, seed=seed, max_new_tokens=24
    )
    list(run)
    return run.ids


def places(model):
    """(on the card, in host memory, in files) of each layer's experts."""
    counts = set()
    for layer in model.placed_transformer.module.layers:
        bank = layer.mlp.experts
        files = sum(map(is_in_files, bank))
        counts.add((sum(bank.resident), EXPERTS - sum(bank.resident) - files, files))
    (counts,) = counts
    return counts


def bytes_read(model):
    return sum(ring._copier._copy.__self__.bytes_read for ring in model.placed_transformer.streams.rings.values())


@pytest.fixture(scope="module")
def whole(folders):
    return Hunyuan3.load(folders["instruct"], device="cpu", dtype="float32")


@pytest.mark.parametrize(("on_card", "in_host"), [(0, 0), (3, 0), (0, 5), (2, 3), (7, 0), (3, 5)])
@pytest.mark.parametrize("slots", [2, 5])
def test_a_drawing_from_disk_is_the_resident_one(folders, whole, on_card, in_host, slots):
    model = opened(folders["instruct"], on_card, in_host, slots)
    assert torch.equal(latents(model), latents(whole))
    assert places(model) == (on_card, in_host, EXPERTS - on_card - in_host)
    placed = model.placed_transformer
    assert placed.loaded_bytes + placed.host_bytes + placed.file_bytes == placed.total_bytes
    assert bool(bytes_read(model)) == (on_card + in_host < EXPERTS)


def test_what_is_in_files_is_read_once_in_each_pass(folders):
    model = opened(folders["instruct"], 3, 2, slots=2)
    latents(model)
    before = bytes_read(model)
    latents(model, seed=2)  # three steps: the prompt is known
    stored = 2  # bytes of a number in the folder; bfloat16
    bank = model.placed_transformer.module.layers[0].mlp.experts[0]
    expert = sum(parameter.numel() for parameter in bank.parameters()) * stored
    assert bytes_read(model) - before == 3 * 3 * LAYERS * expert


@pytest.mark.parametrize("name", ["bf16", "int8", "fp8", "int4"])
def test_packs_are_read_as_they_are(folders, tmp_path, name):
    list(pack(ModelFolder.open(folders["instruct"]), tmp_path / "packed", name))
    expected = latents(Hunyuan3.load(tmp_path / "packed", device="cpu", dtype="float32"))
    model = opened(tmp_path / "packed", 2, 2)
    assert torch.equal(latents(model), expected)
    assert places(model) == (2, 2, 4)


def test_in_the_dtype_of_the_files_nothing_is_converted(folders, monkeypatch):
    expected = latents(Hunyuan3.load(folders["instruct"], device=CARD, dtype="bfloat16", moe_backend="loop"))
    model = opened(folders["instruct"], 2, 2, dtype="bfloat16")
    model.transformer()
    monkeypatch.setattr(TensorReader, "get", lambda *_arguments: pytest.fail("read by way of a buffer"))
    assert torch.equal(latents(model), expected)
    assert bytes_read(model)


@pytest.mark.parametrize("cache", [True, False])
def test_text_is_the_same_and_experts_that_words_use_come_to_stay(folders, whole, cache):
    model = opened(folders["instruct"], 3, 2, expert_cache=cache)
    for seed in (1, 2, 3):
        assert written(model, seed) == written(whole, seed)
    swaps = model.placed_transformer.streams.statistics.swaps
    assert bool(swaps) == cache
    assert places(model) == (3, 2, 3), "exchanges move no bytes from one place to another"
    assert torch.equal(latents(model), latents(whole))
    model.placed_transformer.shrink(1)
    assert torch.equal(latents(model, seed=2), latents(whole, seed=2)), "each rank's own expert is read"


def test_split_over_two_devices(folders, whole):
    split = LayerSplit(((CARD, 1), (SECOND, 2)))
    model = Hunyuan3.open(
        folders["instruct"], dtype="float32", split=split, streaming=2, disk=True, vram={CARD: 0, SECOND: 0}, ram=0
    )
    assert torch.equal(latents(model), latents(whole))
    assert places(model) == (0, 0, EXPERTS)
    assert written(model) == written(whole)


def test_devices_without_copies_of_their_own(folders, whole, monkeypatch):
    monkeypatch.setattr("hunyuan3.parts.copier_for", lambda _device, copy: DirectCopier(copy))
    assert torch.equal(latents(opened(folders["instruct"], 2, 2)), latents(whole))


def test_more_room_is_used(folders, whole):
    model = opened(folders["instruct"], 2, 0)
    assert torch.equal(latents(model), latents(whole)) and places(model) == (2, 0, 6)
    placed = model.placed_transformer
    placed.load(room=0)  # as much of the host as it takes
    assert places(model) == (2, 6, 0)
    assert placed.file_bytes == 0
    assert torch.equal(latents(model), latents(whole))
    assert placed.shrink(1, lambda _nbytes: False) and places(model) == (1, 6, 1)
    assert placed.is_ready


def test_a_stop_in_the_middle_leaves_everything_usable(folders, whole):
    model = opened(folders["instruct"], 1, 2)
    for at in range(1, 14):
        calls = iter(range(1, 100))

        def check(at=at, calls=calls):
            if next(calls) == at:
                raise KeyboardInterrupt

        model.transformer()
        conditioning = model.conditioning("a red fox", width=64, height=64)
        with pytest.raises(KeyboardInterrupt):
            list(model.sample(conditioning, seed=1, steps=3, check_cancelled=check))
    assert torch.equal(latents(model), latents(whole))
    ring = model.placed_transformer.streams.ring
    assert ring.num_free + len(ring._under_way) == ring.count and not ring._taken


def test_a_file_that_vanished_is_named_and_serves_again_when_it_is_back(tmp_path, folders, whole):
    list(pack(ModelFolder.open(folders["instruct"]), tmp_path / "packed", "int8"))
    expected = latents(Hunyuan3.load(tmp_path / "packed", device="cpu", dtype="float32"))
    model = opened(tmp_path / "packed", 2, 2)
    model.transformer()
    files = sorted((tmp_path / "packed").glob("*.safetensors"))
    for file in files:
        file.rename(f"{file}.away")
    with pytest.raises(CheckpointError, match=r"\.safetensors cannot be read"):
        latents(model)
    for file in files:
        file.with_name(f"{file.name}.away").rename(file)
    assert torch.equal(latents(model), expected)


def test_without_leave_to_read_in_every_pass_it_is_refused(folders):
    model = opened(folders["instruct"], 2, 2, disk=False)
    with pytest.raises(OutOfBudgetError, match="find room neither on cpu:0 nor in"):
        model.transformer()


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_what_would_be_quantised_anew_each_time_is_refused(name):
    with pytest.raises(RequestError, match=r"make a pack"):
        LoadOptions(format=name, streaming=2, disk=True).resolved()
    LoadOptions(streaming=2, disk=True).resolved(name)


def test_weights_die_with_their_model(folders):
    gc.collect()
    gc.disable()
    try:
        model = opened(folders["instruct"], 2, 2)
        latents(model)
        weights = weakref.ref(model.placed_transformer.module.layers[0].mlp.experts[0])
        del model
        assert weights() is None
    finally:
        gc.enable()


# on a card: the order of things alone, as for the copies from host memory (test_expert_cache.py)


class Event:
    def __init__(self, journal, name):
        self.journal, self.name = journal, name

    def synchronize(self):
        self.journal.append(f"host waits for {self.name}")


class Stream:
    def __init__(self, journal, name):
        self.journal, self.name, self.count = journal, name, 0

    def record_event(self):
        self.count += 1
        return Event(self.journal, f"{self.name} {self.count}")

    def wait_event(self, event):
        self.journal.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, other):
        self.journal.append(f"{self.name} waits for {other.name}")


class OnDisk(torch.nn.Module):
    """An expert of one number, which is in no memory."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.weight = torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)


@pytest.fixture
def journal(monkeypatch):
    journal = []
    copies, compute = Stream(journal, "copies"), Stream(journal, "compute")
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **kinds: empty(*shape, **kinds))
    return journal


def ring_of(journal, read, slots=2):
    def room():
        bank = OnDisk(-1)
        bank.weight = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        return RingSlot(bank)

    def copy(source, target):
        journal.append(f"read {source.number}")
        read(source)
        target.weight.fill_(source.number)

    return ExpertRing(room, slots, StreamCopier(CARD, copy))


def test_a_read_waits_for_what_was_in_its_memory_and_for_nothing_else(journal):
    ring = ring_of(journal, lambda _source: None)
    experts = [OnDisk(number) for number in range(5)]
    seen = [bank.weight.item() for _position, bank in ring.run(experts, 0, 5, cyclic=False)]
    assert seen == [0, 1, 2, 3, 4]
    assert [entry for entry in journal if entry.startswith("read")] == [f"read {number}" for number in range(5)]
    waits = [entry for entry in journal if entry.startswith("host waits")]
    assert waits == ["host waits for copies 1", "host waits for copies 2", "host waits for copies 3"]
    assert "compute waits for copies 1" in journal


def test_what_a_read_raises_is_raised_where_it_is_needed_and_no_slot_is_lost(journal):
    def read(source):
        if source.number == 2:
            raise CheckpointError("gone")

    ring = ring_of(journal, read, slots=3)
    experts = [OnDisk(number) for number in range(4)]
    run, seen = ring.run(experts, 0, 4, cyclic=False), []
    with pytest.raises(CheckpointError, match="gone"):
        for _position, bank in run:
            seen.append(bank.weight.item())
    assert seen == [0, 1]
    ring.reset()
    assert ring.num_free == 3
    assert [bank.weight.item() for _position, bank in ring.run(experts[:2], 0, 2, cyclic=False)] == [0, 1]


def test_a_forgotten_read_is_over_when_the_ring_is_released(journal):
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def read(source):
        if source.number == 0:
            begun.set()
            may_end.wait(10)
            ended.set()

    ring = ring_of(journal, read)
    ring.begin([OnDisk(0)])
    assert begun.wait(10)
    ring.order([])  # nobody wants it any more
    threading.Timer(0.2, may_end.set).start()
    ring.release()
    assert ended.is_set()
