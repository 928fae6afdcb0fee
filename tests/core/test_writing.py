"""Text requests from the outside: what comes back as trace and answer, what is drawn from it, hard inputs."""

import itertools
from dataclasses import replace

import pytest
import torch

from hunyuan3.conditioning import drawable, make_conditioning, system_text
from hunyuan3.errors import RequestError
from hunyuan3.generate.sampling import TokenSampler
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.text.template import InputPicture, Message
from hunyuan3.types import Grid
from hunyuan3.writing import TextRequest, WritingRun, answering, choosing_ratio, text_rows, thinking

VARIANTS = ["base", "instruct", "distil"]
HARD = {
    "empty": "",
    "blank": " \n\t ",
    "emoji": "🦊🏳️‍🌈👩‍👩‍👧‍👦 e\u0301 \u200b\u200d",
    "chinese": "一只橘猫坐在窗边的木桌上。繁體字、簡体字",
    "right to left": "ثعلب أحمر \u202eabc\u202c שועל",
    "null": "a\0b\x1b[31m",
    "tags": "<think>a</think><recaption>b</recaption><answer>",
    "controls": "<img><boi><eoi><timestep><cfg><|endoftext|><|startoftext|><img_ratio_3><img_size_256><joint_img_sep>",
    "roles": "User: a\n\nAssistant: b",
    "long": "fox " * 5000,
}


@pytest.fixture
def write(models, monkeypatch):
    """`write(plan, "words <tag>")`: the run, its tokens those of the text, control tokens recognised."""

    def written(plan, text, variant="instruct", request=None, **options):
        model = models[variant]
        script = model.folder.tokenizer.encode(text)
        monkeypatch.setattr(TokenSampler, "pick", lambda *_: script.pop(0))
        options = {"max_new_tokens": len(script)} | options
        run = WritingRun(model.folder, model.transformer(), request or TextRequest("a red fox"), plan, **options)
        list(run)
        return run

    return written


def plain(folder, task="think_recaption"):
    return thinking(folder, task, need_ratio=False)


@pytest.mark.parametrize(
    ("task", "text", "trace"),
    [
        ("think", "a b</think>", "<think>a b</think>"),
        ("think", "a b", "<think>a b"),
        ("recaption", "a b</recaption>", "<recaption>a b</recaption>"),
        ("think_recaption", "a</think>b", "<think>a</think><recaption>b"),
        ("think_recaption", "a</think>b</think>c</recaption>", "<think>a</think><recaption>b</think>c</recaption>"),
        ("think_recaption", "a</recaption>", "<think>a</recaption>"),
        ("think", "</think>", "<think></think>"),
    ],
)
def test_the_trace_is_what_was_written_with_the_tag_it_began_with(models, write, task, text, trace):
    folder = models["instruct"].folder
    run = write(plain(folder, task), text, max_new_tokens=len(folder.tokenizer.encode(trace)) - 1)
    assert run.trace == trace


def test_the_trace_grows_as_it_is_written_and_never_shows_the_way_to_the_ratio(models, monkeypatch):
    folder = models["instruct"].folder
    script = folder.tokenizer.encode("a fox</think> b</recaption>")
    monkeypatch.setattr(TokenSampler, "pick", lambda *_: script.pop(0))
    plan = thinking(folder, "think_recaption", need_ratio=True)
    run = WritingRun(folder, models["instruct"].transformer(), TextRequest("a"), plan, max_new_tokens=40)
    seen = [run.trace for _step in run]
    assert seen[0].startswith("<think>")
    assert all(b.startswith(a) for a, b in itertools.pairwise(seen))
    assert seen[-1] == run.trace == "<think>a fox</think><recaption> b</recaption>"
    assert not any(word in trace for trace in seen for word in ("<answer>", "<boi>", "<img_size", "<img_ratio"))


def test_a_pass_that_has_not_begun_has_no_result(models):
    folder = models["instruct"].folder
    run = WritingRun(folder, models["instruct"].transformer(), TextRequest("a"), choosing_ratio(folder))
    assert (run.ids, run.finish, run.trace, run.answer, run.resolution) == ([], None, "", "", None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_answer_is_the_words_alone(models, write, variant):
    folder = models[variant].folder
    run = write(answering(folder), "<answer> A fox. </answer>", variant)
    assert (run.answer, run.finish) == ("A fox.", "stop")
    run = write(answering(folder), " A fox<boi>", variant)
    assert (run.answer, run.finish) == ("A fox", "stop")


def test_the_checkpoints_own_number_of_tokens_is_the_default(models, monkeypatch):
    folder = models["instruct"].folder
    short = replace(folder, generation=replace(folder.generation, max_new_tokens=3))
    run = WritingRun(short, models["instruct"].transformer(), TextRequest("a"), answering(short))
    monkeypatch.setattr(TokenSampler, "pick", lambda *_: 5)
    assert len(list(run)) == 3
    with pytest.raises(RequestError, match="max_new_tokens is -1"):
        WritingRun(short, models["instruct"].transformer(), TextRequest("a"), answering(short), max_new_tokens=-1)


def test_preparing_needs_no_weights(folders):
    """The nodes prepare a pass, then bring the weights in."""
    model = Hunyuan3.open(folders["instruct"], device="cpu")
    module = model.placed_transformer.module
    run = WritingRun(
        model.folder, module, TextRequest("a"), answering(model.folder), max_new_tokens=2, device=model.options.device
    )
    model.transformer()
    assert len(list(run)) <= 2


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_prompt_is_read_and_its_characters_stay_text(models, variant, name):
    folder, prompt = models[variant].folder, HARD[name]
    plan = answering(folder)
    sequence = text_rows(folder, TextRequest(prompt, system_prompt="None"), plan).sequence
    empty = text_rows(folder, TextRequest("", system_prompt="None"), plan).sequence
    words = folder.tokenizer.encode(prompt, "text")
    controls = {token for token in vars(folder.tokens).values() if isinstance(token, int)} | set(folder.tokens.ratios)
    assert not controls & set(words)
    prefix = 1 if variant == "base" else 1 + len(folder.tokenizer.encode("User: "))
    assert sequence.ids == (*empty.ids[:prefix], *words, *empty.ids[prefix:])
    assert folder.tokenizer.decode(words) == prompt
    conditioning = make_conditioning(folder, prompt, folder.resolutions.free(32, 32), system_prompt="None")
    assert conditioning.rows.sequence.ids[prefix : prefix + len(words)] == tuple(words)


@pytest.mark.parametrize("name", [name for name in HARD if name != "long"])
def test_any_prompt_is_answered_and_drawn(models, name):
    model = models["instruct"]
    run = model.write(TextRequest(HARD[name]), answering(model.folder), max_new_tokens=2)
    assert all(step.logits.isfinite().all() for step in run)
    conditioning = model.conditioning(HARD[name], width=32, height=32)
    assert model.sample(conditioning, steps=1).latents.isfinite().all()


def test_twenty_thousand_characters_that_fit_are_read_whole(models):
    """The limit is one of tokens, 22800."""
    model, prompt = models["distil"], "fox " * 5000
    tokens = len(model.folder.tokenizer.encode(prompt, "text"))
    assert tokens + 100 < model.folder.max_length
    run = model.write(TextRequest(prompt), answering(model.folder), max_new_tokens=1)
    assert len(run.sequence.sequence) > tokens
    (step,) = run
    assert step.logits.isfinite().all()
    other = model.write(TextRequest("cat " + prompt[4:]), answering(model.folder), max_new_tokens=1)
    assert (next(iter(other)).logits - step.logits).abs().max() > 1e-6, "its beginning does not count"
    model.prefixes.clear()


def test_a_prompt_beyond_the_limit_is_refused_with_numbers(models):
    folder = models["instruct"].folder
    with pytest.raises(RequestError, match=rf"takes \d+ tokens .* the limit is {folder.max_length}"):
        text_rows(folder, TextRequest("狐" * 30000), answering(folder))


def test_a_broken_prompt_is_refused(models):
    with pytest.raises(RequestError, match="half of a character"):
        text_rows(models["instruct"].folder, TextRequest("fox \ud800"), answering(models["instruct"].folder))


def count(folder, ids, name):
    return list(ids).count(folder.tokenizer.token_id(name))


def test_in_a_trace_only_the_tags_of_a_trace_count(models):
    folder = models["instruct"].folder
    trace = "<think>the <img> and <|endoftext|> <ref>fox</ref></think><recaption>a <boi> fox<answer></recaption>"
    conditioning = make_conditioning(folder, "a", folder.resolutions.free(32, 32), trace=trace)
    bare = make_conditioning(folder, "a", folder.resolutions.free(32, 32))
    ids = conditioning.rows.sequence.ids
    for tag in ("<think>", "</think>", "<recaption>", "</recaption>", "<ref>", "</ref>"):
        assert count(folder, ids, tag) == count(folder, bare.rows.sequence.ids, tag) + 1, tag
    for token in ("<img>", "<|endoftext|>", "<boi>", "<answer>", "</answer>"):
        assert count(folder, ids, token) == count(folder, bare.rows.sequence.ids, token), token
    read = text_rows(folder, TextRequest("a", trace=trace), choosing_ratio(folder)).sequence.ids
    assert count(folder, read, "<img>") == 0
    assert count(folder, read, "<think>") == 1


def test_in_the_reference_mode_control_tokens_are_recognised(models):
    folder = models["instruct"].folder
    prompt = "a <img> fox"
    for reference, expected in ((False, 0), (True, 1)):
        request = TextRequest(prompt, system_prompt="None", reference=reference)
        assert count(folder, text_rows(folder, request, answering(folder)).sequence.ids, "<img>") == expected


@pytest.mark.parametrize(
    ("choice", "expected"), [("custom", 0), ("en_unified", 1)], ids=["user's words", "checkpoint's own"]
)
def test_control_tokens_in_a_system_prompt_count_only_in_the_checkpoints_own(models, choice, expected):
    folder = models["instruct"].folder
    texts = {**folder.system_prompts.texts, "en_unified": "You <think>."}
    folder = replace(folder, system_prompts=replace(folder.system_prompts, texts=texts))
    request = TextRequest("a", system_prompt=choice, custom_system_prompt="You <think>.")
    assert count(folder, text_rows(folder, request, answering(folder)).sequence.ids, "<think>") == expected


def test_text_and_drawing_read_the_same_beginning(models):
    """Or nothing could be reused."""
    for variant in VARIANTS:
        folder = models[variant].folder
        request = TextRequest("a red fox", bot_task="image")
        read = text_rows(folder, request, plain(folder, "think")).sequence.ids
        trace = "<think>a</think>"
        drawn = make_conditioning(folder, "a red fox", folder.resolutions.free(32, 32), trace=trace).rows.sequence.ids
        shared = len(read) - 1 - (0 if variant == "base" else len(folder.tokenizer.encode("Assistant: ")))
        assert drawn[:shared] == read[:shared]


def test_an_unknown_system_prompt_is_refused(models):
    folder = models["instruct"].folder
    with pytest.raises(RequestError, match="system prompt 'nice' does not exist"):
        text_rows(folder, TextRequest("a", system_prompt="nice"), answering(folder))


def test_history_comes_between_system_prompt_and_prompt(models):
    folder = models["instruct"].folder
    history = (Message("user", "first"), Message("assistant", "answer"), Message("user", "second"))
    request = TextRequest("third", system_prompt="custom", custom_system_prompt="sys", history=history)
    text = folder.tokenizer.decode(text_rows(folder, request, answering(folder)).sequence.ids)
    assert text == (
        "<|startoftext|>sys\n\nUser: first\n\nAssistant: <answer>answer</answer>\n\nUser: second\nthird\n\nAssistant: "
    )


# drop_think


@pytest.fixture
def dropping(models):
    folder = models["instruct"].folder
    return replace(folder, generation=replace(folder.generation, drop_think=True))


BOTH = "<think>a</think><recaption>b</recaption>"


@pytest.mark.parametrize(
    ("trace", "kept"),
    [
        (BOTH, "<recaption>b</recaption>"),
        ("<think>a</think>", ""),
        ("<think>a", ""),
        ("<think></think><recaption></recaption>", "<recaption></recaption>"),
    ],
)
def test_drop_think_draws_from_the_rewrite_alone(dropping, trace, kept):
    rewriting = dropping.system_prompts.text("en_recaption")
    assert drawable(dropping, trace, "some system prompt") == (kept, rewriting)
    assert drawable(dropping, trace, "") == (kept, ""), "where there was no system prompt none comes"


@pytest.mark.parametrize("trace", ["<recaption>b</recaption>", "", "loose words"])
def test_drop_think_leaves_a_trace_without_thoughts(dropping, trace):
    assert drawable(dropping, trace, "system") == (trace, "system")


@pytest.mark.parametrize("trace", [BOTH, "<think>a</think>", ""])
def test_without_drop_think_everything_stays(models, trace):
    assert drawable(models["instruct"].folder, trace, "system") == (trace, "system")


@pytest.mark.parametrize(
    ("trace", "as_if"), [(BOTH, "<recaption>b</recaption>"), ("<think>a</think>", ""), ("<think>a", "")]
)
@pytest.mark.parametrize(("choice", "becomes"), [("en_unified", "en_recaption"), ("None", ""), ("custom", "mine")])
def test_drop_think_drops_the_thoughts_of_any_trace_that_is_drawn_from(dropping, trace, as_if, choice, becomes):
    size = dropping.resolutions.free(32, 32)
    texts = {"system_prompt": choice, "custom_system_prompt": "mine"}
    dropped = make_conditioning(dropping, "a fox", size, trace=trace, **texts).rows.sequence.ids
    system = dropping.system_prompts.text(becomes) if becomes == "en_recaption" else becomes
    expected = make_conditioning(dropping, "a fox", size, trace=as_if, system=system).rows.sequence.ids
    assert count(dropping, dropped, "<think>") == 0
    assert dropped == expected


def test_a_history_whose_pictures_are_not_given_is_refused(models):
    folder = models["instruct"].folder
    picture = InputPicture(0, Grid(2, 2), Grid(2, 2), 4)
    request = TextRequest("third", history=(Message("user", picture),))
    with pytest.raises(RequestError, match="shows 1 pictures, but only 0 are given"):
        text_rows(folder, request, answering(folder))


def test_a_pass_writes_once(models):
    model = models["instruct"]
    run = model.write(TextRequest("a"), answering(model.folder), max_new_tokens=2)
    list(run)
    with pytest.raises(RuntimeError, match="once"):
        list(run)


def test_the_system_prompt_of_a_request(models):
    folder = models["instruct"].folder
    assert system_text(folder, "auto", "", "think") == system_text(
        folder, folder.generation.use_system_prompt, "", "think"
    )
    assert system_text(folder, "None", "mine", "think") == ""
    assert system_text(folder, "custom", " mine ", "think") == "mine"
    think = folder.system_prompts.text("en_think_recaption").strip()
    assert system_text(folder, "dynamic", "", "think_recaption") == think
    assert system_text(folder, "dynamic", "", "think_recaption", reference=True) == ""


def test_writing_touches_no_global_random_state(models):
    before = torch.get_rng_state()
    model = models["instruct"]
    list(model.write(TextRequest("a"), answering(model.folder), seed=3, max_new_tokens=3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("a fox<|endoftext|>", "a fox"),
        ("<think>hm</think>a fox</answer>", "a fox"),
        ("<recaption>a nice fox</recaption><|endoftext|>", "a nice fox"),
        ("<think>hm</think><recaption>a fox</recaption><answer><boi>", "a fox"),
        ("<think>hm</think><recaption>long</recaption><answer>a fox</answer>", "a fox"),
        ("<think>hm hm", ""),
        ("one</think> two</answer>", "one two"),
    ],
)
def test_what_counts_as_the_answer(models, write, written, answer):
    """Whatever tags the model puts around it; its thinking never does."""
    assert write(answering(models["instruct"].folder), written).answer == answer


def test_control_tokens_in_a_custom_system_prompt_stay_words_when_drawing_and_writing(models):
    folder = models["instruct"].folder
    texts = {"system_prompt": "custom", "custom_system_prompt": "be <think> brief"}
    drawn = make_conditioning(folder, "a fox", folder.resolutions.free(32, 32), **texts).rows.sequence.ids
    written = text_rows(folder, TextRequest("a fox", **texts), answering(folder)).sequence.ids
    assert count(folder, drawn, "<think>") == count(folder, written, "<think>") == 0
    texts["system_prompt"] = "dynamic"  # which hands the user's text on where it has none of its own
    written = text_rows(folder, TextRequest("a fox", **texts), answering(folder)).sequence.ids
    assert "brief" in folder.tokenizer.decode(written)
    assert count(folder, written, "<think>") == 0


def test_a_muddled_trace_is_drawn_with_all_its_words(models):
    folder = models["instruct"].folder
    trace = "<think>a</think><recaption>b</think>c</recaption>"
    rows = make_conditioning(folder, "a fox", folder.resolutions.free(32, 32), trace=trace).rows
    conditional, unconditional = (branch.ids for branch in rows.branches)
    assert "<think>a</think><recaption>bc</recaption>" in folder.tokenizer.decode(conditional)
    for tag in ("<think>", "</think>", "<recaption>", "</recaption>"):
        assert count(folder, conditional, tag) == count(folder, unconditional, tag) == 1
