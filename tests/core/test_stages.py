"""The stage machine: what is forced, what ends a pass, how the ratio is chosen; and every way of being cut off.

The words are scripted where the model would choose them; what follows from them is not. Texts are written as
`think: a a </think> <recaption>!`, where `a` is any word, `!` marks what was forced and `R` is the ratio token.
"""

import re
from dataclasses import replace

import pytest
import torch

from hunyuan3.conditioning import make_conditioning
from hunyuan3.errors import RequestError
from hunyuan3.generate.sampling import SamplingOptions, TokenSampler
from hunyuan3.generate.stages import TASKS, trace_plan
from hunyuan3.text.trace import is_complete
from hunyuan3.writing import TextRequest, WritingRun, answering, choosing_ratio, thinking

WORD = "the"
VARIANTS = ["base", "instruct", "distil"]


@pytest.fixture
def write(models, monkeypatch):
    """`write("think", "a a </think>", need_ratio=True)`: (transcript, run); the script's last word goes on forever."""

    def written(task, script, variant="instruct", folder=None, reference=False, need_ratio=True, budget=40, **options):
        model = models[variant]
        folder = folder or model.folder
        said = [token_id(folder, name) for name in script.split()]
        queue = list(said)
        monkeypatch.setattr(TokenSampler, "pick", lambda *_: queue.pop(0) if len(queue) > 1 else queue[0])
        if task == "img_ratio":
            plan = choosing_ratio(folder)
        elif task == "answer":
            plan = answering(folder)
        else:
            plan = thinking(folder, task, need_ratio=need_ratio, reference=reference)
        request = TextRequest("a red fox", bot_task=task, reference=reference)
        run = WritingRun(folder, model.transformer(), request, plan, max_new_tokens=budget, **options)
        steps = list(run)
        assert [step.token for step in steps] == run.ids
        assert [step.index for step in steps] == list(range(len(steps)))
        assert [step.logits is None for step in steps] == [step.forced for step in steps]
        return " ".join(name_of(folder, step) for step in steps), run

    return written


def token_id(folder, name):
    if name == "a":
        (word,) = folder.tokenizer.encode(WORD)
        return word
    found = folder.tokenizer.token_id(name)
    assert found is not None, name
    return found


def name_of(folder, step):
    if step.token in folder.tokens.ratios:
        return "R"
    name = folder.tokenizer.decode([step.token])
    return ("a" if name == WORD else name) + ("!" if step.forced else "")


def words_of(text):
    """A transcript as the text that it stands for."""
    return "".join(WORD if part == "a" else part for part in text.replace("!", "").split())


LEAD = "<answer>! <boi>! <img_size_256>! R"
TO_RATIO = {"base": "<boi>! <img_size_256>! R", "instruct": LEAD, "distil": LEAD}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("task", "script", "text"),
    [
        ("think", "a a </think>", "a a </think>"),
        ("recaption", "a a </recaption>", "a a </recaption>"),
        ("think_recaption", "a </think> a </recaption>", "a </think> <recaption>! a </recaption>"),
    ],
)
def test_each_task_goes_through_its_stages(write, models, variant, task, script, text):
    without, run = write(task, script, variant, need_ratio=False)
    assert (without, run.finish, run.resolution) == (text, "stop", None)
    chosen, run = write(task, script, variant)
    assert (chosen, run.finish) == (f"{text} {TO_RATIO[variant]}", "stop")
    folder = models[variant].folder
    assert run.resolution == folder.resolutions.row(folder.tokens.ratios.index(run.ids[-1]))
    opening = "<recaption>" if task == "recaption" else "<think>"
    assert run.trace == opening + words_of(text)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("task", "tag"), [("think", "<think>"), ("recaption", "<recaption>")])
def test_the_prompt_ends_in_the_tag_that_the_text_goes_on_from(write, models, variant, task, tag):
    """The turn's opening and the tag are one section; the pretrain template has no opening."""
    _, run = write(task, "</think>" if task == "think" else "</recaption>", variant)
    pieces = ["a red fox", tag] if variant == "base" else ["User: ", "a red fox", "\n\n", f"Assistant: {tag}"]
    expected = [token for piece in pieces for token in models[variant].folder.tokenizer.encode(piece)]
    assert list(run.sequence.sequence.ids[-len(expected) :]) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_choosing_only_the_ratio_is_one_token(write, models, variant):
    text, run = write("img_ratio", "a", variant)
    assert (text, run.finish, run.trace) == ("R", "stop", "")
    folder = models[variant].folder
    opening = "<boi><img_size_256>" if variant == "base" else "Assistant: <answer><boi><img_size_256>"
    expected = folder.tokenizer.encode(opening)
    assert list(run.sequence.sequence.ids[-len(expected) :]) == expected


def test_the_stages_are_named_as_they_pass(models, monkeypatch):
    folder = models["instruct"].folder
    script = [token_id(folder, name) for name in "a </think> a </recaption>".split()]
    monkeypatch.setattr(TokenSampler, "pick", lambda *_: script.pop(0))
    plan = thinking(folder, "think_recaption", need_ratio=True)
    run = WritingRun(folder, models["instruct"].transformer(), TextRequest("a fox"), plan, max_new_tokens=20)
    assert [(name_of(folder, step), step.stage) for step in run] == [
        ("a", "think"),
        ("</think>", "think"),
        ("<recaption>!", "think"),
        ("a", "recaption"),
        ("</recaption>", "recaption"),
        ("<answer>!", "recaption"),
        ("<boi>!", "recaption"),
        ("<img_size_256>!", "recaption"),
        ("R", "ratio"),
    ]


@pytest.mark.parametrize(
    ("task", "script", "text"),
    [
        # A second </think> forces nothing, whether the model means it or babbles.
        (
            "think_recaption",
            "</think> a </think> </recaption>",
            f"</think> <recaption>! a </think> </recaption> {LEAD}",
        ),
        ("think_recaption", "</think> </think> </recaption>", f"</think> <recaption>! </think> </recaption> {LEAD}"),
        # The rewrite may end before the thinking does.
        ("think_recaption", "a </recaption>", f"a </recaption> {LEAD}"),
        # Tags that mean nothing in this task.
        ("think", "a </recaption> a </think>", f"a </recaption> a </think> {LEAD}"),
        ("recaption", "a </think> a </recaption>", f"a </think> a </recaption> {LEAD}"),
        # The end of an answer and of a picture stop nothing here.
        ("think", "a </answer> <boi> <eoi> </think>", f"a </answer> <boi> <eoi> </think> {LEAD}"),
        # The size token asks for the ratio wherever it comes from, other sizes' tokens do not.
        ("think", "a <img_size_256>", "a <img_size_256> R"),
        ("think", "a <img_size_512> </think>", f"a <img_size_512> </think> {LEAD}"),
    ],
)
def test_triggers_fire_once_and_other_tags_mean_nothing(write, task, script, text):
    chosen, run = write(task, script)
    assert (chosen, run.finish) == (text, "stop")


@pytest.mark.parametrize(
    ("task", "stops"),
    [
        ("think", {"</think>", "</recaption>"}),
        ("recaption", {"</recaption>"}),
        ("think_recaption", {"</recaption>"}),
    ],
)
def test_what_ends_a_pass_of_fixed_size(models, task, stops):
    tokens = models["instruct"].folder.tokens
    plan = trace_plan(task, tokens, instruct=True, need_ratio=False, stop_at_end=True)
    ids = {"</think>": tokens.think_end, "</recaption>": tokens.recaption_end}
    assert plan.stops == {ids[stop] for stop in stops}
    assert plan.end_of_text == tokens.eos


@pytest.mark.parametrize(("variant", "ratios"), [("base", 33), ("instruct", 37), ("distil", 37)])
@pytest.mark.parametrize("task", TASKS)
def test_what_ends_a_pass_of_automatic_size_is_any_ratio(models, variant, ratios, task):
    folder = models[variant].folder
    plan = thinking(folder, task, need_ratio=True)
    assert plan.stops == set(plan.ratios) == set(folder.tokens.ratios)
    assert len(plan.ratios) == ratios
    assert choosing_ratio(folder).ratios == plan.ratios


def test_a_ratio_token_in_the_middle_of_a_text_is_the_ratio(write, models):
    text, run = write("think", "a <img_ratio_3>")
    assert (text, run.finish, run.trace) == ("a R", "stop", f"<think>{WORD}")
    assert run.resolution == models["instruct"].folder.resolutions.row(3)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["img_ratio", "think"])
def test_the_ratio_is_the_most_likely_of_the_ratio_tokens(write, models, monkeypatch, variant, task):
    """Of both slices of the vocabulary, and of nothing else: each word would be likelier here."""
    model, ratios = models[variant].transformer(), models[variant].folder.tokens.ratios
    own = model.logits
    wish = torch.zeros(model.config.vocab_size)
    monkeypatch.setattr(model, "logits", lambda x: own(x) + wish)
    for row in (0, 8, 16, 32, len(ratios) - 1):
        wish[list(ratios)] = -100.0
        wish[ratios[row]] = -50.0
        text, run = write(task, "</think>", variant)
        assert text.endswith("R")
        assert run.ids[-1] == ratios[row]
        assert run.resolution.ratio == row


def test_the_ratio_is_the_same_for_every_seed_however_wild_the_sampling(models):
    folder = models["instruct"].folder
    wild = SamplingOptions(temperature=50.0, top_k=0, top_p=1.0)
    ratios = set()
    for seed in range(8):
        run = WritingRun(
            folder,
            models["instruct"].transformer(),
            TextRequest("a fox"),
            choosing_ratio(folder),
            sampling=wild,
            seed=seed,
        )
        (step,) = run
        assert step.token == folder.tokens.ratios[int(step.logits[list(folder.tokens.ratios)].argmax())]
        ratios.add(run.resolution)
    assert len(ratios) == 1


FULL = f"a a </think> <recaption>! a a </recaption> {LEAD}"
CUT_OFF = [
    f"a </think>! {LEAD}",
    f"a a </think>! {LEAD}",
    f"a a </think> {LEAD}",
    f"a a </think> <recaption>! </recaption>! {LEAD}",
    f"a a </think> <recaption>! a </recaption>! {LEAD}",
    f"a a </think> <recaption>! a a </recaption>! {LEAD}",
    FULL,  # right after </recaption>
    FULL,  # in the middle of what leads to the ratio
    FULL,
    FULL,  # right before the ratio
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", range(1, 12))
def test_cut_off_anywhere_the_tags_are_closed_and_the_ratio_is_chosen(write, models, variant, budget):
    folder = models[variant].folder
    text, run = write("think_recaption", "a a </think> a a </recaption> a", variant, budget=budget)
    complete = len(FULL.split()) - (variant == "base")
    expected = [*CUT_OFF, FULL][budget - 1].replace(LEAD, TO_RATIO[variant])
    assert text == expected
    assert run.finish == ("stop" if budget >= complete else "length")
    assert run.resolution is not None
    assert run.ids[-1] in folder.tokens.ratios
    assert run.trace == "<think>" + words_of(text.removesuffix(TO_RATIO[variant]))
    assert is_complete(run.trace)
    conditioning = make_conditioning(folder, "a red fox", run.resolution, trace=run.trace)
    assert conditioning.trace == run.trace, "nothing was left to close"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("budget", range(1, 7))
def test_cut_off_without_a_ratio_the_drawing_closes_the_trace(write, models, task, budget):
    folder = models["instruct"].folder
    text, run = write(task, "a a </think> a a </recaption> a", need_ratio=False, budget=budget)
    done = {"think": 3, "recaption": 6, "think_recaption": 7}[task]
    assert run.finish == ("stop" if budget >= done else "length")
    assert len(text.split()) == min(budget, done)
    assert run.resolution is None
    conditioning = make_conditioning(folder, "a red fox", folder.resolutions.row(0), trace=run.trace)
    # Every word that was written; a tag that came where it means nothing is left out.
    words = [re.sub(r"</?(think|recaption)>", "", trace) for trace in (run.trace, conditioning.trace)]
    assert words[0] == words[1]
    assert is_complete(conditioning.trace)
    # Tags stay in the unconditional row, only words are replaced there: no tag was taken for a word.
    tokens = folder.tokens
    for tag in (tokens.think, tokens.think_end, tokens.recaption, tokens.recaption_end):
        counts = [branch.ids.count(tag) for branch in conditioning.rows.branches]
        name = folder.tokenizer.decode([tag])
        assert counts[0] == conditioning.trace.count(name)
        if task != "recaption":
            assert counts == [counts[0]] * 2


def test_the_budget_of_one_token_still_chooses_the_ratio_when_it_is_the_trigger(write):
    text, run = write("recaption", "</recaption>", budget=1)
    assert (text, run.finish) == (f"</recaption> {LEAD}", "length")


def test_a_size_token_of_the_models_own_at_the_budgets_end_still_gets_its_ratio(write):
    text, run = write("think", "a <img_size_256>", budget=2)
    assert (text, run.finish) == ("a <img_size_256> R", "length")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("script", "unclosed", "closing"),
    [
        ("<|endoftext|>", "", "</think>!"),
        ("a <|endoftext|>", "a ", "</think>!"),
        ("a </think> <|endoftext|>", "a </think> <recaption>! ", "</recaption>!"),
        ("a </think> a <|endoftext|>", "a </think> <recaption>! a ", "</recaption>!"),
    ],
)
def test_end_of_text_ends_a_pass_properly(write, variant, script, unclosed, closing):
    chosen, run = write("think_recaption", script, variant)
    assert (chosen, run.finish) == (f"{unclosed}{closing} {TO_RATIO[variant]}", "end_of_text")
    assert run.resolution is not None
    assert is_complete(run.trace)
    _, short = write("think_recaption", script, variant, need_ratio=False)
    assert short.finish == "end_of_text"
    assert short.trace == "<think>" + words_of(unclosed)


def test_the_reference_runs_on_after_end_of_text(write):
    text, run = write("think", "a <|endoftext|> a </think>", reference=True)
    assert text == f"a <|endoftext|> a </think> {LEAD}"
    assert run.finish == "stop"


@pytest.mark.parametrize("spare", [1, 3, 5])
def test_a_budget_beyond_what_fits_is_clamped_and_all_of_it_fits(write, models, spare):
    folder = models["instruct"].folder
    prompt = len(write("think_recaption", "a")[1].sequence.sequence)
    narrow = replace(folder, generation=replace(folder.generation, max_length=prompt + 8 + spare))
    text, run = write("think_recaption", "a", folder=narrow, budget=5000)
    assert text == "a " * spare + "</think>! " + TO_RATIO["instruct"]
    assert run.finish == "length"
    assert prompt + len(run.ids) <= narrow.max_length


@pytest.mark.parametrize(("spare", "named"), [(8, "no room to write"), (0, "no room to write"), (-1, "the limit is")])
def test_a_prompt_longer_than_fits_is_refused_with_both_numbers(write, models, spare, named):
    folder = models["instruct"].folder
    prompt = len(write("think", "a")[1].sequence.sequence)
    narrow = replace(folder, generation=replace(folder.generation, max_length=prompt + spare))
    with pytest.raises(RequestError, match=named) as error:
        write("think", "a", folder=narrow)
    assert str(prompt) in str(error.value)
    assert str(prompt + spare) in str(error.value)


@pytest.mark.parametrize("task", ["thinking", "image", "auto", "", "think-recaption"])
def test_an_unknown_task_is_refused(models, task):
    with pytest.raises(RequestError, match="it must be one of think_recaption, recaption, think"):
        thinking(models["instruct"].folder, task, need_ratio=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("script", "text", "finish", "answer"),
    [
        ("a a <|endoftext|>", "a a", "end_of_text", WORD * 2),
        ("<answer> a </answer>", "<answer> a </answer>", "stop", WORD),
        ("a <boi>", "a <boi>", "stop", WORD),
        ("a a a a", "a a a a", "length", WORD * 4),
        ("<|endoftext|>", "", "end_of_text", ""),
    ],
)
def test_an_answer_ends_by_itself_or_at_the_budget(write, variant, script, text, finish, answer):
    chosen, run = write("answer", script, variant, budget=4)
    assert (chosen, run.finish, run.answer) == (text, finish, answer)
    assert run.resolution is None
