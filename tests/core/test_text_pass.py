"""The text loop against a plain re-statement: the whole sequence for every token, a dense mask, every expert."""

import itertools
from dataclasses import replace

import pytest
import torch
from PIL import Image

from hunyuan3.errors import RequestError
from hunyuan3.generate.prefix import PrefixStore
from hunyuan3.generate.sampling import SamplingOptions, TokenSampler
from hunyuan3.generate.stages import StagePlan, answer_plan, trace_plan
from hunyuan3.generate.text import TextPass
from hunyuan3.pictures import show_pictures
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.writing import TextRequest, text_rows
from tests.core.test_denoise import WORDS, Naive
from tests.core.test_pictures import encode

CPU = torch.device("cpu")
ENDLESS = StagePlan(opening="auto", first_stage="answer", forced={}, stops=frozenset(), stage_after={})
GREEDY = SamplingOptions(do_sample=False)


class HaltError(Exception):
    """What a host raises to stop."""


class NaiveText(Naive):
    """Of the package it uses, beyond what `Naive` uses, the table of the word logits."""

    @torch.no_grad()
    def logits(self):
        model, sequence = self.model, self.sequence
        x = model.wte(self.ids)
        for index, picture in enumerate(self.pictures):
            x[:, slice(*sequence.spans("vae")[index])] = model.embed_latents(picture.latent[None], torch.zeros(1))
            x[:, slice(*sequence.spans("vit")[index])] = picture.tokens
            x[:, sequence.cond_timesteps[index]] = model.timestep_emb(torch.zeros(1))
        for layer in model.layers:
            x = x + self.attention(layer.self_attn, self.rms(x, layer.input_layernorm.weight))
            x = x + self.experts(layer.mlp, self.rms(x, layer.post_attention_layernorm.weight))
        return (self.rms(x, model.ln_f.weight) @ model.lm_head.weight.T)[0, -1]


def naive_logits(model, rows, written):
    sequence = replace(rows.sequence, ids=(*rows.sequence.ids, *written))
    naive = NaiveText(model, replace(rows, branches=(sequence,)), guidance=1.0)
    logits = naive.logits()
    return logits, naive.smallest_gap


@pytest.fixture(scope="module")
def pictures(models):
    """Two of unlike shape; the vision run of each is longer than its grid."""
    noise = torch.randint(0, 256, (40, 90, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sources = [Image.fromarray(noise.numpy()), Image.radial_gradient("L").resize((36, 100)).convert("RGB")]
    return {name: encode(model, sources) for name, model in models.items()}


@pytest.fixture(scope="module")
def rows_of(models, pictures):
    """`rows_of("base", words=10, shown=1)`: what the model is to read."""

    def rows(variant="instruct", words=8, shown=0):
        folder = models[variant].folder
        request = TextRequest(WORDS * words, pictures[variant][:shown])
        return text_rows(folder, request, answer_plan(folder.tokens)).showing(
            show_pictures(folder.config.vae, request.pictures)
        )

    return rows


@pytest.fixture(scope="module")
def text_pass(models):
    """`text_pass(rows, plan)`: a pass that has not begun."""

    def made(rows, plan=ENDLESS, variant="instruct", sampling=GREEDY, seed=0, **options):
        options = {"max_new_tokens": 12, "max_length": 4000} | options
        return TextPass(models[variant].transformer(), rows, plan, TokenSampler(sampling, seed, CPU), **options)

    return made


def say(monkeypatch, tokens):
    """The model "chooses" these tokens, whatever its logits are."""
    left = iter(tokens)
    monkeypatch.setattr(TokenSampler, "pick", lambda *_: next(left))


@pytest.mark.parametrize("shown", [0, 1, 2])
@pytest.mark.parametrize("variant", ["base", "instruct", "distil"])
def test_greedy_writing_equals_recomputing_the_whole_sequence_for_every_token(
    models, rows_of, text_pass, variant, shown
):
    model, rows = models[variant].transformer(), rows_of(variant, shown=shown)
    written = []
    for step in text_pass(rows, variant=variant):
        expected, gap = naive_logits(model, rows, written)
        assert gap > 1e-5, "near a tie of the router: choose another prompt"
        best = expected.topk(2).values
        assert best[0] - best[1] > 1e-3, "near a tie of the words: choose another prompt"
        torch.testing.assert_close(step.logits, expected, rtol=0, atol=1e-4)
        assert (step.token, step.index, step.forced) == (int(expected.argmax()), len(written), False)
        written.append(step.token)
    assert len(written) == 12
    assert len(set(written)) > 4, "the comparison would hold for a model that stammers"


@pytest.mark.parametrize("shown", [0, 1])
def test_forced_tokens_are_read_as_if_the_model_had_written_them(models, rows_of, text_pass, shown):
    rows = rows_of(shown=shown)
    trigger = [step.token for step in text_pass(rows, max_new_tokens=3)][2]
    forced = (40, 7, 300, 41)
    steps = list(text_pass(rows, replace(ENDLESS, forced={trigger: forced})))
    at = [step.token for step in steps].index(trigger)
    assert [step.token for step in steps[at + 1 : at + 5]] == list(forced)
    assert [step.forced for step in steps].count(True) == 4
    for step in steps:
        assert (step.logits is None) == step.forced
        if not step.forced:
            expected, _ = naive_logits(models["instruct"].transformer(), rows, [s.token for s in steps[: step.index]])
            assert step.token == int(expected.argmax())
            torch.testing.assert_close(step.logits, expected, rtol=0, atol=1e-4)


def test_forced_tokens_as_one_chunk_equal_the_same_tokens_one_by_one(rows_of, text_pass, monkeypatch):
    rows, forced = rows_of(shown=1), [40, 7, 300, 41]
    lengths = {"chunk": [], "single": []}
    say(monkeypatch, [9, 100, 50, 60])
    chunked = text_pass(
        rows,
        replace(ENDLESS, forced={100: tuple(forced)}),
        max_new_tokens=8,
        on_layer=lambda layer, x: lengths["chunk"].append(x.shape[1]) if layer == 0 else None,
    )
    by_chunk = [step.logits for step in chunked][-2:]
    say(monkeypatch, [9, 100, *forced, 50, 60])
    single = text_pass(
        rows,
        max_new_tokens=8,
        on_layer=lambda layer, x: lengths["single"].append(x.shape[1]) if layer == 0 else None,
    )
    one_by_one = [step.logits for step in single][-2:]
    assert chunked.ids == single.ids
    for a, b in zip(by_chunk, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    prompt = len(rows.sequence)
    assert lengths == {"chunk": [prompt, 1, 5, 1], "single": [prompt, *[1] * 7]}


@pytest.mark.parametrize("budget", [1, 3, 4, 6, 7, 8, 9, 20])
def test_a_ratio_is_chosen_with_everything_in_view_that_leads_to_it(models, rows_of, text_pass, monkeypatch, budget):
    """Wherever the pass is cut off: of closing tags and all before it, nothing is left out."""
    rows, tokens = rows_of(shown=1), models["instruct"].folder.tokens
    plan = trace_plan("think_recaption", tokens, instruct=True, need_ratio=True, stop_at_end=True)
    say(monkeypatch, [40, 41, tokens.think_end, 42, tokens.recaption_end])
    run = text_pass(rows, plan, max_new_tokens=budget)
    *_, last = run
    assert last.token in tokens.ratios
    expected, gap = naive_logits(models["instruct"].transformer(), rows, run.ids[:-1])
    assert gap > 1e-5, "near a tie of the router: choose another prompt"
    torch.testing.assert_close(last.logits, expected, rtol=0, atol=1e-4)


def test_the_prompt_runs_once_then_each_token_alone_and_the_last_one_not_at_all(rows_of, text_pass):
    rows, seen = rows_of(), []
    run = text_pass(rows, max_new_tokens=4, on_layer=lambda layer, x: seen.append((layer, tuple(x.shape[:2]))))
    assert len(list(run)) == 4
    layers = range(4)
    assert seen == [(layer, (1, length)) for length in (len(rows.sequence), 1, 1, 1) for layer in layers]


def test_a_trigger_works_once(rows_of, text_pass, monkeypatch):
    say(monkeypatch, [5, 9, 5, 5, 9])
    run = text_pass(rows_of(words=1), replace(ENDLESS, forced={5: (6, 7)}), max_new_tokens=7)
    assert [(step.token, step.forced) for step in run] == [
        (5, False), (6, True), (7, True), (9, False), (5, False), (5, False), (9, False),
    ]  # fmt: skip


def test_forced_tokens_count_against_the_budget(rows_of, text_pass, monkeypatch):
    say(monkeypatch, [5])
    run = text_pass(rows_of(words=1), replace(ENDLESS, forced={5: (6, 7, 8)}), max_new_tokens=3)
    assert [step.token for step in run] == run.ids == [5, 6, 7]
    assert run.finish == "length"


@pytest.mark.parametrize(("stops", "ids", "finish"), [({9}, [5, 6, 9], "stop"), ({7}, [5, 6, 9, 8], "length")])
def test_a_stop_token_ends_the_pass_and_belongs_to_the_text(rows_of, text_pass, monkeypatch, stops, ids, finish):
    say(monkeypatch, [5, 6, 9, 8])
    run = text_pass(rows_of(words=1), replace(ENDLESS, stops=frozenset(stops)), max_new_tokens=4)
    assert run.finish is None
    list(run)
    assert (run.ids, run.finish) == (ids, finish)


def test_end_of_text_ends_the_pass_and_does_not_belong_to_the_text(rows_of, text_pass, monkeypatch):
    say(monkeypatch, [5, 6, 9])
    run = text_pass(rows_of(words=1), replace(ENDLESS, end_of_text=9))
    list(run)
    assert (run.ids, run.finish) == ([5, 6], "end_of_text")


def test_the_penalty_sees_prompt_and_text(rows_of, text_pass, monkeypatch):
    rows, seen = rows_of(words=1), []
    tokens = iter([5, 6, 7])
    monkeypatch.setattr(TokenSampler, "pick", lambda _self, _logits, so_far: seen.append(so_far) or next(tokens))
    list(text_pass(rows, max_new_tokens=3))
    prompt = list(rows.sequence.ids)
    assert seen == [prompt, [*prompt, 5], [*prompt, 5, 6]]


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (5, 5), (6, 5), (10**6, 5)])
def test_more_tokens_than_fit_are_clamped(rows_of, text_pass, asked, given):
    rows = rows_of(words=1)
    run = text_pass(rows, max_new_tokens=asked, max_length=len(rows.sequence) + 8 + 5)
    assert len(list(run)) == given
    assert run.finish == "length"


@pytest.mark.parametrize("count", [0, -1])
def test_no_tokens_at_all_are_refused(rows_of, text_pass, count):
    with pytest.raises(RequestError, match=rf"max_new_tokens is {count}; it must be at least 1"):
        text_pass(rows_of(words=1), max_new_tokens=count)


@pytest.mark.parametrize("spare", [-5, 0, 8])
def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(rows_of, text_pass, spare):
    rows = rows_of(words=1)
    length = len(rows.sequence)
    with pytest.raises(RequestError, match=rf"takes {length} tokens of the {length + spare} that fit"):
        text_pass(rows, max_length=length + spare)


def test_the_smallest_room_is_one_token(rows_of, text_pass):
    rows = rows_of(words=1)
    assert len(list(text_pass(rows, max_length=len(rows.sequence) + 9))) == 1


@pytest.mark.parametrize("stop_at", [1, 2, 4, 5, 6, 9, 12])
def test_cancelling_between_layers_or_tokens_leaves_nothing_half_written(rows_of, text_pass, stop_at):
    """Questions 1 to 4: layers of the prompt and their end. 5: before the first token. 6 to 9: its layers ..."""
    rows, store, calls, layers = rows_of(), PrefixStore(), itertools.count(1), []
    expected = [step.logits for step in text_pass(rows)]

    def check_cancelled():
        if next(calls) == stop_at:
            raise HaltError

    run = text_pass(rows, prefixes=store, check_cancelled=check_cancelled, on_layer=lambda *_: layers.append("ran"))
    with pytest.raises(HaltError):
        list(run)
    assert next(calls) == stop_at + 1, "asked again after it had said stop"
    assert len(layers) <= stop_at - 1
    assert run.finish is None
    assert store.nbytes == 0
    again = [step.logits for step in text_pass(rows, prefixes=store)]
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_cancelling_a_continued_text_leaves_what_was_kept_before(rows_of, text_pass):
    """The cancelled pass starts from a kept prompt and must not write into it."""
    rows, store, calls = rows_of(), PrefixStore(), itertools.count(1)
    expected = [step.logits for step in text_pass(rows, prefixes=store, max_new_tokens=3)]
    held = store.nbytes

    def check_cancelled():
        if next(calls) == 14:
            raise HaltError

    with pytest.raises(HaltError):
        list(text_pass(rows, prefixes=store, check_cancelled=check_cancelled))
    assert store.nbytes == held
    again = [step.logits for step in text_pass(rows, prefixes=store, max_new_tokens=3)]
    for a, b in zip(again, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_leaving_the_loop_early_keeps_nothing(rows_of, text_pass):
    store = PrefixStore()
    for _step in text_pass(rows_of(), prefixes=store):
        break
    assert store.nbytes == 0


def test_check_cancelled_is_asked_before_every_layer_and_every_token(models, rows_of, text_pass):
    events = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_: events.append("layer"))
        for layer in models["instruct"].transformer().layers
    ]
    try:
        for _step in text_pass(rows_of(), max_new_tokens=3, check_cancelled=lambda: events.append("asked")):
            assert events[-1] == "asked"
            events.append("token")
    finally:
        for hook in hooks:
            hook.remove()
    assert events.count("layer") == 3 * 3
    assert all(events[i - 1] == "asked" for i, event in enumerate(events) if event == "layer")


def test_no_gradient_is_recorded(rows_of, text_pass):
    with torch.enable_grad():
        steps = list(text_pass(rows_of(words=1), max_new_tokens=2))
        assert torch.is_grad_enabled()
    assert not any(step.logits.requires_grad for step in steps)


def test_the_loop_may_be_left_and_taken_up_again_with_gradients_as_they_were(rows_of, text_pass):
    """A generator that switches gradients off must not do so for its caller between two tokens."""
    with torch.enable_grad():
        for _step in text_pass(rows_of(words=1), max_new_tokens=3):
            assert torch.is_grad_enabled()


def test_bfloat16_reads_a_prompt_with_a_picture_near_float32(folders, rows_of, text_pass):
    """It keeps 8 bits, and a few tokens go to other experts: logits within 10 % (measured: 1 %)."""
    rows = rows_of(shown=1)
    narrow = Hunyuan3.load(folders["instruct"], device="cpu", dtype="bfloat16").transformer()
    sampler = TokenSampler(GREEDY, 0, CPU)
    rounded = list(TextPass(narrow, rows, ENDLESS, sampler, max_new_tokens=4, max_length=4000))
    exact = next(iter(text_pass(rows)))
    assert len(rounded) == 4
    assert all(step.logits.dtype == torch.float32 for step in rounded)
    error = (rounded[0].logits - exact.logits).std() / exact.logits.std()
    assert 1e-4 < error < 0.1
