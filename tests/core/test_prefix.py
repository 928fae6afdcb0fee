"""Kept prompts: never the wrong one, always the same picture, and exactly as much left out as can be."""

import gc
import itertools
import math
import weakref
from contextlib import contextmanager

import pytest
import torch
from PIL import Image

from hunyuan3.generate.prefix import PrefixStore
from hunyuan3.generate.rows import SequenceRows, ShownPicture
from hunyuan3.generate.sampling import SamplingOptions, TokenSampler
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.run import SamplingRun
from hunyuan3.text.template import Message
from hunyuan3.transformer.kv_cache import KVCache
from hunyuan3.types import Span, TokenSequence
from hunyuan3.writing import TextRequest, WritingRun, answering, thinking
from tests.core.test_denoise import WORDS
from tests.core.test_pictures import encode

PROMPT = WORDS * 4
THOUGHT = "the larger circle is green; a small boat on the sea"
REWRITE = "a blue vase with yellow flowers stands near the window"
GUIDANCE = 3.0


class HaltError(Exception):
    """What a host raises to stop."""


@contextmanager
def counted(model):
    """The tokens that pass through the first layer: a list of one number per pass."""
    passes = []
    layer = model.transformer().layers[0]
    hook = layer.register_forward_pre_hook(lambda _layer, args: passes.append(args[0].shape[0] * args[0].shape[1]))
    try:
        yield passes
    finally:
        hook.remove()


@contextmanager
def router_gaps(model):
    """The smallest distance between the last chosen and the first rejected router logit of each routing."""
    gaps = []

    def look(router, args, _routing):
        ranked = router.logits(args[0]).sort(dim=-1, descending=True).values
        gaps.append((ranked[:, router.top_k - 1] - ranked[:, router.top_k]).min().item())

    hooks = [layer.mlp.router.register_forward_hook(look) for layer in model.transformer().layers]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()


def draw(model, conditioning, store, seed=1, **settings):
    settings = {"steps": 3, "guidance": GUIDANCE, "prefixes": store} | settings
    return SamplingRun.prepare(model.folder, model.transformer(), conditioning, seed=seed, **settings).latents


def asked(model, prompt=PROMPT, width=96, height=64, **options):
    return model.conditioning(prompt, width=width, height=height, **{"system_prompt": "None"} | options)


class Shape:
    """How many tokens the passes of a drawing take."""

    def __init__(self, conditioning):
        sequence = conditioning.rows.sequence
        self.branches = len(conditioning.rows.branches)
        self.prompt = sequence.gen_timestep  # up to the picture's control tokens
        self.window = sequence.gen_run.span.stop - sequence.gen_timestep  # control tokens and picture
        self.rest = len(sequence) - sequence.gen_timestep  # what follows the picture, too: the first step

    def steps(self, count, batch=1):
        rows = self.branches * batch
        return [rows * self.rest, *[rows * self.window] * (count - 1)]


@pytest.fixture(scope="module")
def pictures(models):
    gradient = Image.radial_gradient("L").convert("RGB")
    return {
        name: encode(model, [gradient.resize((90, 40)), gradient.resize((30, 70))]) for name, model in models.items()
    }


def think(model, monkeypatch, store, pictures=(), **options):
    """Thinks and rewrites in scripted words that survive being decoded and read again."""
    tokenizer, tokens = model.folder.tokenizer, model.folder.tokens
    script = [
        *tokenizer.encode(THOUGHT, "text"),
        tokens.think_end,
        *tokenizer.encode(REWRITE, "text"),
        tokens.recaption_end,
    ]
    monkeypatch.setattr(TokenSampler, "pick", lambda *_: script.pop(0))
    run = WritingRun(
        model.folder,
        model.transformer(),
        TextRequest(PROMPT, pictures, system_prompt="None"),
        thinking(model.folder, "think_recaption", need_ratio=True),
        prefixes=store,
        **options,
    )
    list(run)
    assert run.trace == f"<think>{THOUGHT}</think><recaption>{REWRITE}</recaption>"
    return run


def small_size(run):
    """The smallest size of exactly the chosen shape, so that its ratio token is the written one."""
    height, width = run.resolution.size
    divisor = math.gcd(height // 16, width // 16)
    return {"height": height // divisor, "width": width // divisor}


@pytest.mark.parametrize("shown", [0, 2])
@pytest.mark.parametrize("variant", ["base", "instruct", "distil"])
def test_thinking_then_drawing_equals_drawing_the_same_trace_afresh(models, pictures, monkeypatch, variant, shown):
    model, store, pictures = models[variant], PrefixStore(), pictures[variant][:shown]
    with router_gaps(model) as gaps:
        with counted(model) as written:
            run = think(model, monkeypatch, store, pictures)
        conditioning = asked(model, trace=run.trace, pictures=pictures, **small_size(run))
        with counted(model) as passes:
            reused = draw(model, conditioning, store)
        afresh = draw(model, conditioning, None)
    assert min(gaps) > 1e-5, "near a tie of the router: choose another seed"
    assert (reused - afresh).abs().max() < 1e-4
    shape, text = Shape(conditioning), run.sequence.sequence.ids
    ids = conditioning.rows.sequence.ids
    assert ids[: len(text) + len(run.ids)] == (*text, *run.ids), "the drawing begins with what was written"
    # The text pass never ran its last token, the ratio: all that the conditional row still lacks.
    assert written[0] == len(text)
    assert sum(written) == len(text) + len(run.ids) - 1
    unconditional = []
    if shape.branches == 2:  # it shares everything up to the first of the prompt's words
        other = conditioning.rows.branches[1].ids
        unconditional = [shape.prompt - next(i for i, (a, b) in enumerate(zip(ids, other, strict=True)) if a != b)]
    assert passes == [1, *unconditional, *shape.steps(3)]


@pytest.mark.parametrize("variant", ["instruct", "distil"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_second_seed_computes_its_steps_and_nothing_else(models, pictures, variant, batch):
    model, store = models[variant], PrefixStore()
    conditioning = asked(model, pictures=pictures[variant])
    shape = Shape(conditioning)
    with counted(model) as first:
        draw(model, conditioning, store, seed=1, batch_size=batch)
    with counted(model) as second:
        latents = draw(model, conditioning, store, seed=2, batch_size=batch)
    assert first == [shape.branches * shape.prompt, *shape.steps(3, batch)]
    assert second == shape.steps(3, batch)
    assert (latents - draw(model, conditioning, None, seed=2, batch_size=batch)).abs().max() < 1e-4


def test_without_a_store_the_first_step_runs_everything(models):
    conditioning = asked(models["instruct"])
    shape = Shape(conditioning)
    with counted(models["instruct"]) as passes:
        draw(models["instruct"], conditioning, None)
    assert passes == [2 * (shape.prompt + shape.rest), *shape.steps(3)[1:]]


@pytest.mark.parametrize("variant", ["base", "instruct", "distil"])
def test_the_same_seed_again_gives_the_same_picture_to_the_bit(models, pictures, variant):
    model, store = models[variant], PrefixStore()
    conditioning = asked(model, pictures=pictures[variant][:1])
    first, other, again = (draw(model, conditioning, store, seed=seed) for seed in (1, 2, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    store.clear()
    assert torch.equal(draw(model, conditioning, store, seed=1), first)


def test_a_batch_of_three_equals_three_singles(models, pictures):
    model, store = models["instruct"], PrefixStore()
    conditioning = asked(model, pictures=pictures["instruct"])
    together = draw(model, conditioning, store, seed=7, batch_size=3, noise="device")
    noise = torch.randn(together.shape, generator=torch.Generator().manual_seed(7))
    for index in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hunyuan3.run.draw_noise", lambda *_, index=index: noise[index : index + 1])
            alone = draw(model, conditioning, store)
        assert (alone[0] - together[index]).abs().max() < 1e-4
    assert (together[0] - together[1]).abs().max() > 0.1


def test_one_branch_at_a_time_reuses_its_own_prompts_but_not_those_of_both_together(models):
    """They were computed in passes of another width, so their last bits differ."""
    model, store = models["instruct"], PrefixStore()
    conditioning = asked(model)
    shape = Shape(conditioning)
    expected = draw(model, conditioning, None)
    with counted(model) as first:
        one = draw(model, conditioning, store, one_branch_at_a_time=True)
    with counted(model) as again:
        draw(model, conditioning, store, one_branch_at_a_time=True)
    with counted(model) as second:
        both = draw(model, conditioning, store)
    assert torch.equal(both, draw(model, conditioning, PrefixStore()))
    assert again == [count for half in shape.steps(3) for count in [half // 2] * 2]
    assert first == [shape.prompt] * 2 + [count for half in shape.steps(3) for count in [half // 2] * 2]
    assert second == [2 * shape.prompt, *shape.steps(3)]
    assert (one - expected).abs().max() < 1e-4
    assert (both - expected).abs().max() < 1e-4


@pytest.mark.parametrize("before", [{"guidance": 1.0}, {"one_branch_at_a_time": True}])
def test_what_was_drawn_otherwise_before_changes_no_bit(models, before):
    model, store = models["base"], PrefixStore()
    conditioning = asked(model)
    draw(model, conditioning, store, **before)
    assert torch.equal(draw(model, conditioning, store), draw(model, conditioning, PrefixStore()))


@pytest.mark.parametrize(
    "second",
    [
        {"width": 64, "height": 96},
        {"prompt": PROMPT + "at night"},
        {"prompt": WORDS * 3},
        {"trace": "<think>a</think>"},
    ],
    ids=["size", "longer prompt", "shorter prompt", "trace"],
)
def test_a_drawing_does_not_depend_on_another_that_merely_began_alike(models, second):
    """Not even in its last bits, though nearly all of its prompt is known."""
    model, store = models["instruct"], PrefixStore()
    system = {"system_prompt": "custom", "custom_system_prompt": WORDS * 2}
    draw(model, asked(model, **system), store)
    conditioning = asked(model, **{**system, **second})
    shape = Shape(conditioning)
    with counted(model) as passes:
        latents = draw(model, conditioning, store)
    assert passes == [2 * shape.prompt, *shape.steps(3)]
    assert torch.equal(latents, draw(model, conditioning, PrefixStore()))


@pytest.fixture
def changed(models, pictures):
    """name -> (request, the same with one thing changed)."""
    model = models["instruct"]
    picture, other = pictures["instruct"]
    stretched = encode(model, [Image.radial_gradient("L").convert("RGB").resize((90, 40))], align=True)
    assert stretched[0].in_template() == picture.in_template()
    spotted = Image.radial_gradient("L").convert("RGB").resize((90, 40))
    spotted.putpixel((45, 20), (255, 0, 0))
    (spotted,) = encode(model, [spotted])
    assert spotted.in_template() == picture.in_template()
    shown = asked(model, pictures=(picture,))
    return {
        "prompt": (asked(model), asked(model, prompt="two dogs; " + PROMPT)),
        "picture": (shown, asked(model, pictures=(other,))),
        "one pixel": (shown, asked(model, pictures=(spotted,))),
        "alignment": (shown, asked(model, pictures=stretched)),
        "posterior": (shown, asked(model, pictures=(picture,), posterior="reference")),
        "no picture": (shown, asked(model)),
        "order": (asked(model, pictures=(picture, other)), asked(model, pictures=(other, picture))),
    }


@pytest.mark.parametrize("what", ["prompt", "picture", "one pixel", "alignment", "posterior", "no picture", "order"])
def test_what_differs_is_never_reused(models, changed, what):
    model, store = models["instruct"], PrefixStore()
    for first, second in (changed[what], changed[what][::-1]):
        store.clear()
        draw(model, first, store)
        shape = Shape(second)
        with counted(model) as passes:
            latents = draw(model, second, store)
        assert passes == [2 * shape.prompt, *shape.steps(3)]
        assert (latents - draw(model, second, None)).abs().max() < 1e-4


def test_a_picture_drawn_from_another_seed_is_not_reused(models, pictures):
    model, store = models["instruct"], PrefixStore()
    conditioning = asked(model, pictures=pictures["instruct"], posterior="reference")
    shape = Shape(conditioning)
    draw(model, conditioning, store, seed=1)
    with counted(model) as passes:
        draw(model, conditioning, store, seed=2)
    assert passes == [2 * shape.prompt, *shape.steps(3)]
    with counted(model) as passes:
        draw(model, conditioning, store, seed=1)
    assert passes == shape.steps(3)


def test_every_model_has_its_own_store(models, folders):
    one = Hunyuan3.load(folders["instruct"], device="cpu")
    two = Hunyuan3.load(folders["instruct"], device="cpu")
    assert one.prefixes is not two.prefixes
    conditioning = asked(one)
    settings = {"seed": 1, "steps": 2, "guidance": GUIDANCE}
    shape = Shape(conditioning)
    for model in (one, two):
        with counted(model) as passes:
            assert model.sample(conditioning, **settings).latents.isfinite().all()
        assert passes == [2 * shape.prompt, *shape.steps(2)]
    one.release()
    assert (one.prefixes.nbytes, two.prefixes.nbytes > 0) == (0, True)


def test_a_text_asked_again_with_another_seed_runs_one_token_of_its_prompt(models, pictures):
    model, store = models["instruct"], PrefixStore()

    def written(seed, prefixes):
        request = TextRequest(PROMPT, pictures["instruct"])
        run = WritingRun(
            model.folder,
            model.transformer(),
            request,
            answering(model.folder),
            sampling=SamplingOptions(temperature=3.0),
            seed=seed,
            max_new_tokens=6,
            prefixes=prefixes,
        )
        with counted(model) as passes:
            steps = list(run)
        return passes, steps, len(run.sequence.sequence)

    passes, _, prompt = written(1, store)
    assert passes[0] == prompt
    passes, steps, _ = written(2, store)
    assert passes == [1] * len(steps)
    _, afresh, _ = written(2, None)
    assert [step.token for step in steps] == [step.token for step in afresh]
    for a, b in zip(steps, afresh, strict=True):
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-4)


def test_a_next_turn_goes_on_from_the_last_answer(models):
    """What was written is kept like what was read."""
    model, store = models["instruct"], PrefixStore()
    run = WritingRun(
        model.folder,
        model.transformer(),
        TextRequest(PROMPT, system_prompt="None"),
        answering(model.folder),
        sampling=SamplingOptions(do_sample=False),
        max_new_tokens=6,
        prefixes=store,
    )
    list(run)
    history = (Message("user", PROMPT), Message("assistant", run.answer))
    turn = WritingRun(
        model.folder,
        model.transformer(),
        TextRequest("And now?", system_prompt="None", history=history),
        answering(model.folder),
        max_new_tokens=1,
        prefixes=store,
    )
    before, after = (run.sequence.sequence.ids, turn.sequence.sequence.ids)
    with counted(model) as passes:
        list(turn)
    common = next(i for i, (a, b) in enumerate(zip((*before, -1), after, strict=False)) if a != b)
    assert common >= len(before) - 1
    assert passes[0] <= len(after) - common


def test_cancelling_a_prompts_pass_keeps_nothing(models):
    model, store = models["instruct"], PrefixStore()
    conditioning, calls = asked(model), itertools.count(1)

    def check_cancelled():
        if next(calls) == 2:
            raise HaltError

    with pytest.raises(HaltError):
        draw(model, conditioning, store, check_cancelled=check_cancelled)
    assert store.nbytes == 0
    assert torch.equal(draw(model, conditioning, store), draw(model, conditioning, PrefixStore()))


def test_cancelling_in_a_step_keeps_the_prompt_which_is_whole(models):
    model, store = models["instruct"], PrefixStore()
    conditioning, calls = asked(model), itertools.count(1)

    def check_cancelled():
        if next(calls) == 7:  # 3 layers of the prompt and their end, the step, its first two layers
            raise HaltError

    expected = draw(model, conditioning, PrefixStore())
    with pytest.raises(HaltError):
        draw(model, conditioning, store, check_cancelled=check_cancelled)
    assert store.nbytes > 0
    with counted(model) as passes:
        assert torch.equal(draw(model, conditioning, store), expected)
    assert passes == Shape(conditioning).steps(3)


def test_nothing_is_kept_or_used_with_capacity_dropping(folders, monkeypatch):
    """Dropping lets a prompt depend on what follows it."""
    model, store = Hunyuan3.load(folders["instruct"], device="cpu", drop_tokens=True), PrefixStore()
    think(model, monkeypatch, store)
    conditioning = asked(model)
    first, second = (draw(model, conditioning, store) for _ in range(2))
    assert store.nbytes == 0
    assert torch.equal(first, draw(model, conditioning, None))
    assert torch.equal(first, second)


def test_the_bytes_are_counted(models):
    model, store = models["instruct"], PrefixStore()
    config, conditioning = model.folder.config, asked(model)
    draw(model, conditioning, store)
    per_position = config.num_layers * 2 * config.num_kv_heads * config.head_dim * 4
    assert store.nbytes == 2 * Shape(conditioning).prompt * per_position
    draw(model, conditioning, store, seed=2)
    assert store.nbytes == 2 * Shape(conditioning).prompt * per_position, "the same prompt is kept once"


def test_clearing_frees(models):
    model, store = models["instruct"], PrefixStore()
    draw(model, asked(model), store)
    held = store.nbytes
    tensors = [weakref.ref(tensor) for entry in store._entries.values() for tensor in entry.keys]
    assert tensors
    assert store.clear() == held > 0
    assert (store.nbytes, store.clear()) == (0, 0)
    gc.collect()
    assert not any(tensor() is not None for tensor in tensors)


# The store alone, on made-up rows.


def rows_of(ids, full_spans=(), pictures=()):
    """`pictures`: (span, key) of each."""
    sequence = TokenSequence(tuple(ids), (), (), joint_spans=tuple(span for span, _ in pictures))
    shown = tuple(ShownPicture(torch.zeros(1), torch.zeros(1), key) for _, key in pictures)
    return SequenceRows((sequence,), tuple(full_spans), (), shown)


def cache_of(length, value=0.0):
    cache = KVCache(
        devices=[torch.device("cpu")] * 2, rows=2, kv_heads=1, length=length, head_dim=2, dtype=torch.float32
    )
    for index, tensor in enumerate((*cache.keys, *cache.values)):
        tensor.copy_(torch.arange(length).view(1, 1, -1, 1) + 1000 * index + value)
    return cache


def keep(store, ids, value=0.0, request=None, **rows):
    store.keep(tuple(ids), rows_of(ids, **rows), cache_of(len(ids), value), 0, request=request)


def known(store, ids, partly=False, **rows):
    return store.find(tuple(ids), rows_of(ids, **rows), partly=partly)[1]


@pytest.mark.parametrize(("common", "expected"), [(0, 0), (39, 0), (40, 40), (50, 50), (60, 60)])
def test_a_prefix_serves_a_row_that_holds_its_whole_request(common, expected):
    """40 tokens were given, 20 written."""
    store, row = PrefixStore(), [*range(common), *[999] * (100 - common)]
    keep(store, range(60), request=40)
    assert known(store, row) == expected
    assert known(store, row, partly=True) == common


def test_a_prefix_that_was_all_given_serves_rows_that_begin_with_it():
    store = PrefixStore()
    keep(store, range(60))
    assert [known(store, range(length)) for length in (59, 60, 100)] == [0, 60, 60]
    assert [known(store, range(length), partly=True) for length in (59, 60, 100)] == [59, 60, 60]


def test_the_longest_of_several_is_found():
    store = PrefixStore()
    for length in (40, 80, 60):
        keep(store, range(length), value=length)
    prefix, length = store.find(tuple(range(100)), rows_of(range(100)))
    assert (length, len(prefix.ids)) == (80, 80)
    assert prefix.keys[0][0, 0, 0, 0] == 80
    assert known(store, [*range(70), *[999] * 30]) == 60
    assert known(store, [*range(70), *[999] * 30], partly=True) == 70


def test_the_four_last_used_are_kept():
    store = PrefixStore()
    for entry in range(4):
        keep(store, [entry] * 40)
    assert known(store, [0] * 40) == 40  # used: now 1 is the oldest
    keep(store, [4] * 40)
    keep(store, [2] * 40)  # kept again: no entry more, and 3 is the oldest
    assert [known(store, [entry] * 40) for entry in range(5)] == [40, 0, 40, 40, 40]
    keep(store, [5] * 40)
    assert sum(known(store, [entry] * 40) > 0 for entry in range(6)) == 4
    assert known(store, [0] * 40) == 0


@pytest.mark.parametrize(
    ("common", "expected"), [(40, 40), (41, 40), (60, 40), (79, 40), (80, 80), (81, 81), (35, 35), (100, 100)]
)
def test_a_prefix_that_would_cut_a_bidirectional_span_ends_before_it(common, expected):
    store, spans = PrefixStore(), [Span(40, 80)]
    keep(store, range(100), full_spans=spans, request=1)
    assert known(store, [*range(common), *[999] * (120 - common)], full_spans=spans) == expected


def test_a_request_whose_picture_would_be_cut_is_not_held_whole():
    store, spans = PrefixStore(), [Span(40, 80)]
    keep(store, range(100), full_spans=spans, request=50)
    assert known(store, [*range(70), *[999] * 50], full_spans=spans) == 0


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        ([(Span(40, 60), "a"), (Span(70, 90), "b")], 100),
        ([(Span(40, 60), "a"), (Span(70, 90), "c")], 70),
        ([(Span(40, 60), "c"), (Span(70, 90), "b")], 40),
        ([(Span(40, 60), "b"), (Span(70, 90), "a")], 40),
        ([(Span(40, 60), "a")], 70),
        ([(Span(40, 90), "a")], 40),
        ([(Span(38, 60), "a"), (Span(70, 90), "b")], 38),
        ([], 40),
    ],
)
def test_the_same_tokens_with_another_picture_end_before_it(pictures, expected):
    store = PrefixStore()
    keep(store, range(100), pictures=[(Span(40, 60), "a"), (Span(70, 90), "b")])
    assert known(store, range(100), partly=True, pictures=pictures) == expected
    assert known(store, range(100), pictures=pictures) == (100 if expected == 100 else 0)


def test_the_same_tokens_with_other_pictures_are_kept_beside_each_other():
    store = PrefixStore()
    for key in ("a", "b"):
        keep(store, range(100), value=ord(key), pictures=[(Span(40, 60), key)])
    for key in ("a", "b"):
        prefix, length = store.find(tuple(range(100)), rows_of(range(100), pictures=[(Span(40, 60), key)]))
        assert (length, prefix.keys[0][0, 0, 0, 0]) == (100, ord(key))


def test_what_is_kept_is_a_copy_of_one_row():
    store, cache = PrefixStore(), cache_of(50)
    for tensor in (*cache.keys, *cache.values):
        tensor[1] += 500
    store.keep(tuple(range(40)), rows_of(range(40)), cache, row=1)
    for tensor in (*cache.keys, *cache.values):
        tensor.zero_()
    prefix, _ = store.find(tuple(range(40)), rows_of(range(40)))
    for index, tensor in enumerate((*prefix.keys, *prefix.values)):
        assert tuple(tensor.shape) == (1, 1, 40, 2)
        assert torch.equal(tensor[0, 0, :, 0], torch.arange(40.0) + 1000 * index + 500)
    assert store.nbytes == prefix.nbytes == 4 * 40 * 2 * 4


def test_an_empty_store_finds_nothing():
    assert PrefixStore().find(tuple(range(100)), rows_of(range(100))) == (None, 0)
