"""From logits to a token: against distributions written out, and on a model."""

import math
from collections import Counter

import pytest
import torch

from hunyuan3.errors import RequestError
from hunyuan3.generate.sampling import SamplingOptions, TokenSampler, pick_among
from hunyuan3.writing import TextRequest, WritingRun, answering, default_sampling

CPU = torch.device("cpu")
LOGITS = torch.tensor([2.0, -1.0, 3.0, 0.5, 2.5, -4.0])
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def frequencies(options, so_far=(), draws=4000):
    sampler = TokenSampler(options, 0, CPU)
    counts = Counter(sampler.pick(LOGITS, list(so_far)) for _ in range(draws))
    return [counts[token] / draws for token in range(len(LOGITS))]


def softmax(scores):
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def test_greedy_takes_the_most_likely_token_whatever_the_seed_and_the_filters():
    for seed in range(5):
        sampler = TokenSampler(SamplingOptions(do_sample=False, temperature=9.0, top_k=3, top_p=0.1), seed, CPU)
        assert [sampler.pick(LOGITS, []) for _ in range(5)] == [2] * 5


def test_top_k_of_one_equals_greedy():
    sampler = TokenSampler(SamplingOptions(temperature=5.0, top_k=1, top_p=1.0), 0, CPU)
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert [sampler.pick(row, []) for row in logits] == logits.argmax(dim=1).tolist()


def test_the_frequencies_are_those_of_the_softmax():
    assert frequencies(SamplingOptions(**PLAIN)) == pytest.approx(softmax(LOGITS.tolist()), abs=0.03)


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_temperature_divides_the_logits(temperature):
    expected = softmax([score / temperature for score in LOGITS.tolist()])
    assert frequencies(SamplingOptions(**PLAIN | {"temperature": temperature})) == pytest.approx(expected, abs=0.03)


def test_top_k_keeps_the_k_most_likely():
    kept = [score if token in (0, 2, 4) else -math.inf for token, score in enumerate(LOGITS.tolist())]
    assert frequencies(SamplingOptions(**PLAIN | {"top_k": 3})) == pytest.approx(softmax(kept), abs=0.03)


def test_top_k_above_the_vocabulary_keeps_all():
    assert frequencies(SamplingOptions(**PLAIN | {"top_k": 9999})) == frequencies(SamplingOptions(**PLAIN))


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    """Most likely first: 0.48, 0.29, 0.18, 0.04 ...; 0.85 is reached with the third."""
    kept = [score if token in (0, 2, 4) else -math.inf for token, score in enumerate(LOGITS.tolist())]
    assert frequencies(SamplingOptions(**PLAIN | {"top_p": 0.85})) == pytest.approx(softmax(kept), abs=0.03)


def test_top_p_goes_by_what_temperature_and_top_k_leave():
    """At temperature 0.5 the first two already reach 0.85; at 1 they do not."""
    kept = [2 * score if token in (2, 4) else -math.inf for token, score in enumerate(LOGITS.tolist())]
    options = SamplingOptions(temperature=0.5, top_k=0, top_p=0.85)
    assert frequencies(options) == pytest.approx(softmax(kept), abs=0.03)


def test_the_repetition_penalty_makes_what_was_written_less_likely():
    """Positive logits are divided by it, negative ones multiplied."""
    penalised = [1.0, -2.0, 3.0, 0.5, 2.5, -4.0]
    options = SamplingOptions(**PLAIN, repetition_penalty=2.0)
    assert frequencies(options, so_far=[0, 1, 0]) == pytest.approx(softmax(penalised), abs=0.03)
    greedy = TokenSampler(SamplingOptions(do_sample=False, repetition_penalty=2.0), 0, CPU)
    assert [greedy.pick(LOGITS, so_far) for so_far in ([], [2], [2, 4], [2, 4, 0])] == [2, 4, 0, 2]


def test_picking_leaves_the_logits_as_they_are():
    logits = LOGITS.clone()
    TokenSampler(SamplingOptions(repetition_penalty=3.0, top_k=2), 0, CPU).pick(logits, [0, 1])
    assert torch.equal(logits, LOGITS)


def test_a_seed_reproduces_and_another_differs():
    def drawn(seed):
        sampler = TokenSampler(SamplingOptions(temperature=2.0), seed, CPU)
        return [sampler.pick(LOGITS, []) for _ in range(40)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(2**64 - 1) == drawn(2**64 - 1)


def test_the_global_random_state_is_neither_used_nor_touched():
    before = torch.get_rng_state()
    first = [TokenSampler(SamplingOptions(temperature=2.0), 7, CPU).pick(LOGITS, []) for _ in range(20)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    assert [TokenSampler(SamplingOptions(temperature=2.0), 7, CPU).pick(LOGITS, []) for _ in range(20)] == first
    torch.set_rng_state(before)


def test_picking_among_some_takes_the_most_likely_of_them_in_any_order():
    assert pick_among(LOGITS, (5, 3, 1)) == 3
    assert pick_among(LOGITS, (1, 5)) == 1
    assert pick_among(LOGITS, tuple(range(6))) == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; it must be 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p is 1\.1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be above 0"),
        ({"repetition_penalty": -2.0}, "repetition_penalty is -2.0"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, named):
    with pytest.raises(RequestError, match=named):
        SamplingOptions(**options)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused_as_in_drawing(seed):
    with pytest.raises(RequestError, match=rf"seed is {seed}; it must be from 0 to 2\*\*64 - 1"):
        TokenSampler(SamplingOptions(), seed, CPU)


def written(model, seed=0, **sampling):
    run = WritingRun(
        model.folder,
        model.transformer(),
        TextRequest("What is in the picture?"),
        answering(model.folder),
        sampling=SamplingOptions(**sampling),
        seed=seed,
        max_new_tokens=16,
    )
    return [step.token for step in run]


def test_a_text_follows_from_its_seed(models):
    model = models["instruct"]
    texts = [written(model, seed, temperature=3.0) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_text_of_top_k_one_is_the_greedy_text(models):
    model = models["instruct"]
    assert written(model, 5, temperature=3.0, top_k=1) == written(model, 0, do_sample=False)
    assert written(model, 5, temperature=3.0) != written(model, 0, do_sample=False)


def test_the_penalty_of_a_greedy_text_counts_prompt_and_text(models):
    model, penalty = models["base"], 3.0
    run = WritingRun(
        model.folder,
        model.transformer(),
        TextRequest("a red fox"),
        answering(model.folder),
        sampling=SamplingOptions(do_sample=False, repetition_penalty=penalty),
        max_new_tokens=16,
    )
    so_far, changed = set(run.sequence.sequence.ids), 0
    for step in run:
        scores = step.logits.tolist()
        for token in so_far:
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        assert step.token == max(range(len(scores)), key=scores.__getitem__)
        changed += step.token != int(step.logits.argmax())
        so_far.add(step.token)
    assert changed, "the penalty made no difference: choose another prompt"


@pytest.mark.parametrize("variant", ["base", "instruct", "distil"])
def test_the_default_sampling_is_what_the_checkpoint_says(models, variant):
    own = models[variant].folder.generation
    expected = SamplingOptions(own.do_sample, own.temperature, own.top_k, own.top_p, own.repetition_penalty)
    assert default_sampling(models[variant].folder) == expected
    assert expected == SamplingOptions(True, 0.6, 1024, 0.95, 1.0)
