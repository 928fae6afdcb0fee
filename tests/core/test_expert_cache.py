"""Experts that words keep on the card: the same bits after every exchange, and a policy that tells use from chance.

`torch.device("cpu", 0)` stands in for a card, as in test_streaming.
"""

import contextlib
import gc
import itertools
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from hunyuan3.folder import ModelFolder
from hunyuan3.generate.sampling import SamplingOptions
from hunyuan3.moe.dispatch import Dispatch
from hunyuan3.moe.weights import ExpertWeights
from hunyuan3.pack import pack
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.placement import guess
from hunyuan3.placement.copier import DirectCopier, RingSlot, StreamCopier, ThreadCopier, copy_expert, exchange
from hunyuan3.placement.expert_cache import CacheStatistics, UseCounts
from hunyuan3.placement.ring import ExpertRing
from hunyuan3.placement.streaming import ExpertStreaming, StreamedBank, expert_unit
from hunyuan3.writing import TextRequest, answering

CARD = torch.device("cpu", 0)
EXPERTS, LAYERS, TOP_K = 8, 3, 2


class HaltError(Exception):
    pass


@pytest.fixture(scope="module")
def routed(folders, tmp_path_factory):
    """Routing -> checkpoint folder: as it is, and with routers that mostly choose the last two experts."""
    root = tmp_path_factory.mktemp("routed") / "skewed"
    root.mkdir()
    for file in folders["instruct"].iterdir():
        if file.suffix != ".safetensors":
            (root / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.wg.weight"):
                tensor[:-3] *= 0.3
        save_file(tensors, root / file.name, {"format": "pt"})
    return {"even": folders["instruct"], "skewed": root}


@pytest.fixture(scope="module")
def plain(routed):
    """Routing -> a wholly resident model."""
    return {name: Hunyuan3.load(folder, device=CARD, dtype="float32") for name, folder in routed.items()}


def opened(folder, share=0.0, slots=3, eager=True, **options):
    """A model of which this share of the experts is on the card.

    eager: an expert that was used more often than the least used one takes its place at once, which makes many swaps.
    """
    options = {"device": CARD, "dtype": "float32"} | options
    placed = Hunyuan3.open(folder, streaming=slots, **options).placed_transformer
    vram = placed.required_bytes + placed.full_ring_on(placed.device)
    vram += int(share * (placed.total_bytes - placed.required_bytes))
    model = Hunyuan3.open(folder, streaming=slots, vram=vram, **options)
    if eager:
        streaming_of(model).counts = [UseCounts(EXPERTS, half_life=4, margin=0) for _ in range(LAYERS)]
    return model


def streaming_of(model):
    return model.placed_transformer.streams


def banks_of(model):
    return [layer.mlp.experts for layer in model.placed_transformer.module.layers]


def written(model, prompt="who?", count=24, **settings):
    """(tokens, the logits that they were chosen from) of an answer."""
    model.prefixes.clear()
    greedy = SamplingOptions(do_sample=False)
    steps = list(
        model.write(TextRequest(prompt), answering(model.folder), sampling=greedy, max_new_tokens=count, **settings)
    )
    return [step.token for step in steps], torch.stack([step.logits for step in steps if step.logits is not None])


def latents(model, seed=1):
    model.prefixes.clear()
    return model.sample(model.conditioning("a red fox", width=64, height=64), seed=seed, steps=2).latents


def writes_the_same(model, whole, prompt="who?", count=24):
    tokens, logits = written(model, prompt, count)
    expected, expected_logits = written(whole, prompt, count)
    return tokens == expected and torch.equal(logits, expected_logits)


def require_true_books(model, whole):
    """Permutations are permutations, each rank holds its expert where its unit is, no slot is lost."""
    placed, ring = model.placed_transformer, streaming_of(model).ring
    for ours, theirs in zip(banks_of(model), banks_of(whole), strict=True):
        assert sorted(ours.expert_at) == list(range(EXPERTS))
        assert [ours.rank_of[expert] for expert in ours.expert_at] == list(range(EXPERTS))
        for rank, expert in enumerate(ours.expert_at):
            for parameter, stacked in zip(ours[rank].parameters(), theirs.parameters(), strict=True):
                assert torch.equal(parameter[0], stacked[expert])
    streamed = [unit for unit in placed.units if unit.streams]
    on_card = sum(unit.nbytes for unit in streamed if placed.is_on_device(unit))
    experts = [(bank[rank], bank.resident[rank]) for bank in banks_of(model) for rank in range(EXPERTS)]
    assert on_card == sum(sum(p.nbytes for p in one.parameters()) for one, here in experts if here)
    assert placed.loaded_bytes + placed.host_bytes == placed.total_bytes
    assert ring.num_free + len(ring._under_way) == ring.count
    on_card, in_host = places(model)
    assert len(on_card) + len(in_host) == 2 * (LAYERS * EXPERTS + ring.count), "no two share their memory"


def places(model):
    """Addresses of all experts' parameters on the card, those in slots among them, and of those in host memory."""
    on_card = [slot.bank for slot in streaming_of(model).ring._slots]
    in_host = []
    for bank in banks_of(model):
        for expert, here in zip(bank, bank.resident, strict=True):
            (on_card if here else in_host).append(expert)
    return tuple({p.data_ptr() for expert in experts for p in expert.parameters()} for experts in (on_card, in_host))


# the same numbers


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("routing", ["even", "skewed"])
@pytest.mark.parametrize("slots", [2, 5])
def test_words_and_drawings_are_the_same_to_the_bit(routed, plain, routing, share, slots):
    model, whole = opened(routed[routing], share, slots), plain[routing]
    assert torch.equal(latents(model), latents(whole))
    before = model.placed_transformer.loaded_bytes, places(model)
    for prompt in ("who?", "a fox in the snow"):
        assert writes_the_same(model, whole, prompt)
        assert torch.equal(latents(model), latents(whole))
    require_true_books(model, whole)
    assert (model.placed_transformer.loaded_bytes, places(model)) == before, "as many bytes, in the same places"
    assert (streaming_of(model).statistics.swaps > 10) == (share > 0)


@pytest.mark.parametrize("weight_format", ["fp8", "int4"])
def test_in_other_formats_and_from_a_pack(folders, tmp_path, weight_format):
    whole = Hunyuan3.load(folders["instruct"], device=CARD, dtype="float32", format=weight_format)
    list(pack(ModelFolder.open(folders["instruct"]), tmp_path / "pack", weight_format))
    for model in (opened(folders["instruct"], 0.4, format=weight_format), opened(tmp_path / "pack", 0.4)):
        assert writes_the_same(model, whole)
        assert streaming_of(model).statistics.swaps > 10
        model.release()
        assert torch.equal(latents(model), latents(whole)), "read anew, the exchanged ones to where they are now"
        assert writes_the_same(model, whole)


def test_in_bfloat16(folders):
    whole = Hunyuan3.load(folders["instruct"], device=CARD, dtype="bfloat16", moe_backend="loop")
    model = opened(folders["instruct"], 0.4, dtype="bfloat16")
    assert writes_the_same(model, whole)
    assert torch.equal(latents(model), latents(whole))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slots", [2, 4])
def test_on_a_real_card(routed, slots):
    """Copies on a stream of their own, exchanges on the one that computes, and evictions on that one as well."""
    whole = Hunyuan3.load(routed["even"], device="cuda", dtype="float32", moe_backend="loop")
    model = opened(routed["even"], 0.5, slots, device="cuda")
    for eviction in (shrink, all_to_the_card, to_host, shrink, drop):
        for prompt in ("who?", "a fox", "a bird in the snow"):
            assert writes_the_same(model, whole, prompt, 60)
        assert torch.equal(latents(model), latents(whole))
        torch.cuda.synchronize()
        for ours, theirs in zip(banks_of(model), banks_of(whole), strict=True):
            for rank, expert in enumerate(ours.expert_at):
                held = [*zip(ours[rank].parameters(), theirs.parameters(), strict=True)]
                assert all(torch.equal(one[0].cpu(), stacked[expert].cpu()) for one, stacked in held)
                assert all(one.is_cuda == ours.resident[rank] for one, _ in held)
        eviction(model)
    assert streaming_of(model).statistics.swaps > 100


def test_one_direct_copier_serves_as_well(routed, plain):
    """As on devices that compute and copy in turn."""
    model = opened(routed["skewed"], 0.4)
    streaming_of(model).ring._copier = DirectCopier()
    assert writes_the_same(model, plain["skewed"])
    require_true_books(model, plain["skewed"])
    assert streaming_of(model).statistics.swaps > 10


# with evictions in between


def shrink(model):
    placed = model.placed_transformer
    placed.shrink(max(unit.nbytes for unit in placed.units if unit.streams))


def to_host(model):
    model.placed_transformer.unload(None, lambda _nbytes: True)


def half_dropped(model):
    """Some units to host memory, the others nowhere."""
    answers = itertools.cycle([True, False])
    model.placed_transformer.unload(None, lambda _nbytes: next(answers))


def all_to_the_card(model):
    model.placed_transformer.load(room=10**9)


def drop(model):
    model.release()


@pytest.mark.parametrize("routing", ["even", "skewed"])
@pytest.mark.parametrize("eviction", [shrink, to_host, half_dropped, all_to_the_card, drop])
def test_after_evictions_every_expert_is_where_it_is_said_to_be(routed, plain, routing, eviction):
    model, whole = opened(routed[routing], 0.5), plain[routing]
    for prompt in ("who?", "a fox", "a bird"):
        assert writes_the_same(model, whole, prompt, 12)
        assert any(bank.expert_at != list(range(EXPERTS)) for bank in banks_of(model))
        eviction(model)
        assert torch.equal(latents(model), latents(whole))
        require_true_books(model, whole)


def test_evictions_between_words(routed, plain):
    model, whole = opened(routed["skewed"], 0.7), plain["skewed"]
    model.prefixes.clear()
    steps = model.write(
        TextRequest("who?"), answering(model.folder), sampling=SamplingOptions(do_sample=False), max_new_tokens=24
    )
    tokens = []
    for step in steps:
        tokens.append(step.token)
        if step.index % 7 == 3:
            shrink(model)
        elif step.index % 7 == 5:
            all_to_the_card(model)
    assert tokens == written(whole)[0]
    require_true_books(model, whole)


# stopped, or failed, in the middle


@pytest.mark.parametrize("stop_at", [5, 11, 23, 38])
def test_after_a_stop_the_next_words_are_right(routed, plain, stop_at):
    model, calls = opened(routed["skewed"], 0.4), itertools.count(1)

    def check_cancelled():
        if next(calls) == stop_at:
            raise HaltError

    with pytest.raises(HaltError):
        written(model, check_cancelled=check_cancelled)
    assert writes_the_same(model, plain["skewed"])
    assert torch.equal(latents(model), latents(plain["skewed"]))
    require_true_books(model, plain["skewed"])


@pytest.mark.parametrize("fail_at", range(1, 60, 4))
def test_after_a_failed_copy_the_next_words_are_right(routed, plain, fail_at):
    """Copies to the card and, at some of these, back to host memory; half done when they fail."""
    model = opened(routed["even"], 0.4)
    model.transformer()
    model.prefixes.clear()
    written(model, count=2)
    count = itertools.count(1)

    def copy(source, target):
        if next(count) == fail_at:
            with torch.no_grad():
                next(iter(target.parameters())).fill_(7)
            raise torch.OutOfMemoryError("no room for a copy")
        copy_expert(source, target)

    # A guess that fails stops nobody if it was wrong, so there may be nothing to raise.
    streaming_of(model).ring._copier = ThreadCopier(copy)
    raised = False
    try:
        written(model)
    except torch.OutOfMemoryError:
        raised = True
    assert raised or streaming_of(model).statistics.guesses > streaming_of(model).statistics.right
    assert writes_the_same(model, plain["even"])
    assert torch.equal(latents(model), latents(plain["even"]))
    require_true_books(model, plain["even"])


@pytest.mark.parametrize("fail_at", [1, 2, 7, 20])
def test_after_a_failure_while_an_expert_is_computed_the_next_words_are_right(routed, plain, fail_at):
    model, count, held = opened(routed["even"], 0.4, 2), itertools.count(1), []
    written(model, count=6)
    layer = model.transformer().layers[1].mlp
    backend = layer.backend

    def failing(x, *others):
        if len(x) == 1 and next(count) == fail_at:
            raise torch.OutOfMemoryError("no room to compute")
        backend(x, *others)

    layer.backend = failing
    for _ in range(3):
        try:
            written(model)
        except torch.OutOfMemoryError as error:
            held.append(error)
        count = itertools.count(1)
    assert len(held) == 3
    layer.backend = backend
    assert writes_the_same(model, plain["even"])
    require_true_books(model, plain["even"])


# guesses


@pytest.mark.parametrize("slots", [2, 4])
def test_wrong_guesses_change_no_number(routed, plain, slots, monkeypatch):
    right = guess._likely
    monkeypatch.setattr(
        guess, "_likely", lambda block, x: [expert for expert in range(EXPERTS) if expert not in right(block, x)]
    )
    model, off = opened(routed["even"], 0.4, slots), opened(routed["even"], 0.4, slots, expert_guesses=False)
    assert writes_the_same(model, plain["even"])
    assert writes_the_same(off, plain["even"])
    require_true_books(model, plain["even"])
    ours, theirs = streaming_of(model).statistics, streaming_of(off).statistics
    assert ours.guesses > 0
    assert theirs.guesses == theirs.right == 0
    assert ours.copied_bytes > theirs.copied_bytes
    assert (ours.hits, ours.misses, ours.swaps) == (theirs.hits, theirs.misses, theirs.swaps)


def test_guesses_are_mostly_right(routed):
    model = opened(routed["even"], 0.3)
    written(model)
    statistics = streaming_of(model).statistics
    assert statistics.guesses > 30
    assert statistics.right > 0.5 * statistics.guesses, "by chance a quarter"


def test_what_was_guessed_is_copied_before_the_layer_asks(routed, plain):
    """Perfect guesses: every copy has begun when attention runs, and none is begun twice."""
    model = opened(routed["even"], 0.0, 4)
    begun, at_attention = [], []

    class Noting(ThreadCopier):
        def start(self, source, slot):
            begun.append(source)
            super().start(source, slot)

    streaming_of(model).ring._copier = Noting()
    layer = model.transformer().layers[1]
    layer.self_attn.register_forward_pre_hook(lambda _module, _inputs: at_attention.append(len(begun)))
    written(model, count=3)
    assert at_attention[-1] > at_attention[-2] + 2
    statistics = streaming_of(model).statistics
    assert len(begun) <= 2 * EXPERTS * LAYERS + statistics.misses + statistics.guesses - statistics.right


# what is counted


def test_statistics_of_words_only(routed):
    model = opened(routed["even"], 0.5)
    latents(model)
    streaming = streaming_of(model)
    assert streaming.statistics == CacheStatistics(expert_bytes=streaming._slot_nbytes), "a drawing is none of it"
    assert all(counts.count(expert) == 0 for counts in streaming.counts for expert in range(EXPERTS))
    prefill = streaming.copied
    written(model, count=1)
    prefill = streaming.copied - prefill
    assert streaming.statistics.tokens == 0, "nor is a prompt"
    before = streaming.copied
    tokens, _ = written(model, count=16)
    seen = streaming.statistics
    assert seen.tokens == len(tokens) - 1
    assert seen.hits + seen.misses == TOP_K * LAYERS * seen.tokens
    assert seen.misses == streaming.copied - before - prefill
    assert seen.copied_bytes == (seen.misses + seen.guesses - seen.right) * seen.expert_bytes > 0
    assert seen.bytes_per_token == seen.copied_bytes / seen.tokens
    assert f"{seen.hit_rate:.0%}" in seen.text(2.0)
    assert f"{seen.tokens / 2:.1f} tokens/s" in seen.text(2.0)
    streaming.reset_statistics()
    assert streaming.statistics.tokens == 0


def test_off(routed, plain):
    model = opened(routed["skewed"], 0.5, expert_cache=False)
    assert writes_the_same(model, plain["skewed"])
    assert all(bank.expert_at == list(range(EXPERTS)) for bank in banks_of(model))
    statistics = streaming_of(model).statistics
    assert statistics.swaps == 0
    assert statistics.hits > 0


def test_on_a_skewed_routing_most_is_soon_on_the_card(routed):
    """With the policy as it is. The three experts that are chosen most are those that were left in host memory."""
    rates = {}
    for cache in (False, True):
        model = opened(routed["skewed"], 0.5, eager=False, expert_cache=cache)
        for prompt in ("who?", "a fox", "a bird"):
            written(model, prompt, 40)
        rates[cache] = streaming_of(model).statistics.hit_rate
    assert rates[True] > rates[False] + 0.2


def test_weights_die_with_their_model_at_once(folders):
    model = opened(folders["instruct"], 0.5)
    written(model, count=4)
    gone = weakref.ref(model.placed_transformer.module.layers[0].mlp.experts[0].gate_up)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# the policy, on routings that are stated


class Number(torch.nn.Module):
    """An expert that knows its number."""

    def __init__(self, number):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor([float(number)]), requires_grad=False)

    def chunks(self, dispatch=None):
        yield ExpertWeights(0, self.value, self.value)


def numbers(experts, resident):
    """A bank of such experts, the first ones on the device."""
    bank = StreamedBank([Number(number) for number in range(experts)])
    ring = ExpertRing(lambda: RingSlot(Number(-1)), 4, DirectCopier())
    streaming = ExpertStreaming([bank], {CARD: ring}, 4)
    for rank in range(resident):
        streaming.moved(expert_unit(rank, CARD), True)
    return bank, streaming


def choices(exponent, tokens, experts=64, top_k=8, seed=0):
    """(tokens, top_k) distinct experts, the popular ones anywhere, drawn by popularity rank ** -exponent."""
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, experts + 1, dtype=torch.float64) ** -exponent
    popularity = popularity[torch.randperm(experts, generator=generator)]
    return torch.multinomial(popularity.expand(tokens, -1), top_k, generator=generator)


def drive(bank, ids):
    """Each token a pass of its own; every expert that arrives must be the one that it is said to be."""
    for row in ids:
        dispatch = Dispatch.sort(row[None], len(bank))
        brought = [(weights.first, int(weights.gate_up)) for weights in bank.chunks(dispatch)]
        assert all(said == held for said, held in brought)
        assert sorted(said for said, _ in brought) == sorted(row.tolist())
    assert sorted(bank.expert_at) == list(range(len(bank)))


@pytest.mark.parametrize(("exponent", "least"), [(0.8, 0.50), (1.2, 0.68)])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_skewed_routing_is_hit_far_above_the_static_share(exponent, least, seed):
    bank, streaming = numbers(64, 16)  # a quarter
    ids = choices(exponent, 900, seed=seed)
    drive(bank, ids[:300])
    streaming.reset_statistics()
    drive(bank, ids[300:])
    assert streaming.statistics.hit_rate > least
    assert streaming.statistics.swaps < 0.02 * streaming.statistics.misses


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_uniform_routing_does_not_thrash(seed):
    bank, streaming = numbers(64, 16)
    drive(bank, choices(0, 900, seed=seed))
    statistics = streaming.statistics
    assert statistics.hit_rate == pytest.approx(0.25, abs=0.02)
    assert statistics.swaps < 0.01 * statistics.misses
    # Without the margin it would.
    bank, streaming = numbers(64, 16)
    streaming.counts = [UseCounts(64, margin=0)]
    drive(bank, choices(0, 900, seed=seed))
    assert streaming.statistics.swaps > 0.05 * streaming.statistics.misses


def test_another_text_brings_other_experts():
    bank, streaming = numbers(64, 16)
    drive(bank, choices(1.2, 400, seed=0))
    later = choices(1.2, 500, seed=1)
    drive(bank, later[:300])
    streaming.reset_statistics()
    drive(bank, later[300:])
    assert streaming.statistics.hit_rate > 0.6


def test_counts_fade_and_stay_in_range():
    counts = UseCounts(3, half_life=10, margin=0)
    counts.used([0])
    assert counts.count(0) == pytest.approx(1)
    counts.used([1], tokens=10)
    assert (counts.count(0), counts.count(1)) == (pytest.approx(0.5), pytest.approx(1))
    for _ in range(5000):
        counts.used([2])
    assert counts.count(0) < 1e-6
    assert counts.count(2) == pytest.approx(1 / (1 - 2**-0.1))
    assert counts.to_replace(2, [0, 1]) in (0, 1)
    assert counts.to_replace(0, [2]) is None
    assert counts.to_replace(0, []) is None


# the ring


def ring_of_three():
    return ExpertRing(lambda: RingSlot(Number(-1)), 3, DirectCopier())


def test_what_is_under_way_is_used_whoever_asks_and_the_rest_is_forgotten():
    one, sources = ring_of_three(), [Number(number) for number in range(6)]
    assert one.begin([sources[index] for index in (4, 1, 5, 0)]) == [0, 1, 2]
    wanted = [sources[index] for index in (0, 1, 2)]
    order = one.order(wanted)
    assert order == [1, 0, 2], "what comes already comes first"
    assert one.num_free == 2
    ordered = [wanted[index] for index in order]
    assert [int(bank.value) for _, bank in one.run(ordered, 0, 3, cyclic=False)] == [1, 0, 2]
    assert one.num_free == 3


def test_leftovers_are_not_taken_for_something_else():
    """A pass over few tokens that stopped leaves copies under way at places where a cycle might expect its own."""
    one, sources = ring_of_three(), [Number(number) for number in range(6)]
    one.begin([sources[index] for index in (0, 3)])
    assert [int(bank.value) for _, bank in one.run(sources, 0, 6, cyclic=True)] == list(range(6))


def test_an_exchange_leaves_three_places_of_their_own():
    resident, away, slot = Number(1), Number(2), RingSlot(Number(2))
    place = away.value.data_ptr()
    exchange(slot, resident, away)
    assert (int(resident.value), int(away.value)) == (2, 1)
    assert away.value.data_ptr() == place, "in place: it may be page-locked"
    assert len({module.value.data_ptr() for module in (resident, away, slot.bank)}) == 3


def test_slots_of_passes_that_ended_in_the_middle_are_there_for_a_guess():
    """Held, as a debugger or a retry holds an exception and with it the generator."""
    one, sources, held = ring_of_three(), [Number(number) for number in range(6)], []
    for number in range(5):
        one.begin(sources[number : number + 2])
        held.append(one.run(sources[number : number + 2], 0, 2, cyclic=False))
        assert int(next(held[-1])[1].value) == number
    assert one.begin(sources[:3]) == [0, 1, 2]
    held.clear()
    assert one.num_free == 0, "nor are they given back twice"


def test_a_copy_that_cannot_begin_loses_no_slot():
    class Refusing(DirectCopier):
        def start(self, source, slot):
            if int(source.value) == 1:
                raise torch.OutOfMemoryError("no room for a copy")
            super().start(source, slot)

    one, sources = ExpertRing(lambda: RingSlot(Number(-1)), 3, Refusing()), [Number(number) for number in range(3)]
    for _ in range(4):
        with pytest.raises(torch.OutOfMemoryError):
            one.begin(sources)
    one.reset()
    assert one.num_free == 3


class FakeStream:
    """Notes what it is asked to do, and does nothing."""

    def __init__(self, name):
        self.name, self.done, self.waited = name, [], []

    def record_event(self):
        self.done.append(FakeEvent(f"{self.name} {len(self.done)}"))
        return self.done[-1]

    def wait_event(self, event):
        self.waited.append(event.name)


class FakeEvent:
    def __init__(self, name):
        self.name = name

    def synchronize(self):
        pass


def test_on_a_card_nothing_is_read_or_overwritten_too_early(monkeypatch):
    """Only the order in which streams wait for each other: what a card does with it needs a card."""
    copies, compute = FakeStream("copies"), FakeStream("compute")
    monkeypatch.setattr(torch.cuda, "Stream", lambda _device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    one = ExpertRing(lambda: RingSlot(Number(-1)), 2, StreamCopier(CARD))
    resident, away, other = Number(1), Number(2), Number(3)
    run = one.run([away, other], 0, 2, cyclic=False)
    next(run)
    assert copies.waited == ["compute 0", "compute 1"], "until the slots' memory is free"
    assert compute.waited == ["copies 0"], "for the first one only"
    one.exchange(resident, away)  # compute 2
    assert [position for position, _ in run] == [1]  # the slots are used up at compute 3 and 4
    assert compute.waited == ["copies 0", "copies 1"]
    list(one.run([away], 0, 1, cyclic=False))
    assert copies.waited[2:] == ["compute 3", "compute 2"], "until the slot is free, and its new expert written there"
