"""Writing text, ours against a restatement of the reference's way (see reference_way.py), on the CPU.

    python benchmarks/decode.py        # 8 layers: 5 GB of memory, some minutes
    python benchmarks/decode.py --layers 2 --tokens 8

Same prompt, same weights, the same tokens one after the other, alternating; times are medians, and what counts are
ratios. Ours is `hunyuan3.generate.text`, as the pipeline runs it. The weights are random; logits and tokens must agree.

Then, counted: the tokens that pass through the transformer for thinking once and drawing four seeds with kept keys and
values, against thinking and drawing afresh for each. A token of the text is one pass of its own, all others come by
the hundred.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.nn import functional as F

from benchmarks.denoise import (
    BENCHMARK,
    STEPS,
    TOLERANCE,
    DisagreementError,
    Sizes,
    Transformer,
    balance_routers,
    build_model,
    timed,
)
from benchmarks.reference_way import mixture_of_experts
from hunyuan3.generate.denoise import denoise
from hunyuan3.generate.prefix import PrefixStore
from hunyuan3.generate.rows import SequenceRows
from hunyuan3.generate.sampling import SamplingOptions, TokenSampler
from hunyuan3.generate.schedule import Schedule
from hunyuan3.generate.stages import StagePlan
from hunyuan3.generate.text import TextPass
from hunyuan3.ops.rope import rope_positions, rope_table
from hunyuan3.transformer.attention import SelfAttention
from hunyuan3.types import Grid, ImageRun, Span, TokenSequence

WRITING = replace(BENCHMARK, vocabulary=8192, prompt=512)
SEEDS = 4
THOUGHT = 256  # tokens of text before a picture
_ENDLESS = StagePlan(opening="auto", first_stage="answer", forced={}, stops=frozenset(), stage_after={})
_WARM_UP = 2


class ReferenceWriter:
    """One text as the reference writes it: keys and values kept, but everything else as in `ReferenceWay`.

    Every expert runs on its one-hot buffer, keys and values are repeated for the query heads, the prompt has a dense
    mask, and the word logits are computed for every position and held in float32. In its favour the rotary table is
    made once: made in each pass it would take a third of the time at these sizes, and next to none at full size.
    """

    def __init__(self, model: Transformer, length: int) -> None:
        config = model.config
        self.model = model
        self.cache = model.new_cache(rows=1, length=length)
        self.rope = rope_table(rope_positions(length, []), config.head_dim, config.rope_theta)
        self.seen = 0

    @torch.no_grad()
    def read(self, ids: list[int]) -> torch.Tensor:
        """Logits (V,) after some more tokens."""
        model, window = self.model, Span(self.seen, self.seen + len(ids))
        mask = torch.ones(window.stop, window.stop, dtype=torch.bool).tril()[window.start :] if len(ids) > 1 else None
        rope = self.rope[0][window.start : window.stop], self.rope[1][window.start : window.stop]
        x = model.wte(torch.tensor([ids]))
        for layer in model.layers:
            x = x + self._attention(layer.self_attn, layer.input_layernorm(x), rope, window, mask)
            x = x + mixture_of_experts(layer.mlp, layer.post_attention_layernorm(x))
        self.seen = window.stop
        return model.lm_head(model.ln_f(x)).float()[0, -1]

    def _attention(
        self,
        attention: SelfAttention,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        window: Span,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        q, k, v = attention.project(x, rope)
        keys, values = self.cache.write(attention.layer, window.start, k, v)
        keys = keys.repeat_interleave(attention.groups, dim=1)
        values = values.repeat_interleave(attention.groups, dim=1)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return attention.o_proj(out.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Measured:
    """What was found. Pairs are ours and the reference's way.

    prefill: seconds for the prompt. token: median seconds for each token after it. difference: the largest between
    logits, which reach up to `scale`. ties: choices of experts that were ties and settled alike.
    """

    prefill: tuple[float, float]
    token: tuple[float, float]
    difference: float
    scale: float
    ties: int


def measure(sizes: Sizes, tokens: int, seed: int) -> Measured:
    """Reads the prompt and writes `tokens` tokens both ways, in turns. Raises DisagreementError."""
    model, prompt = build_model(sizes, seed), random_tokens(sizes, sizes.prompt, seed)
    balance_routers(model, iter(text_pass(model, prompt, 1)))
    ours, theirs = iter(text_pass(model, prompt, 1 + _WARM_UP + tokens)), ReferenceWriter(model, sizes.prompt + 99)
    given, seconds, differences, scales = prompt, [], [], []
    for _ in range(1 + _WARM_UP + tokens):
        our_seconds, step = timed(lambda: next(ours))
        with model.ties_settled():
            their_seconds, logits = timed(lambda given=given: theirs.read(given))
        if int(logits.argmax()) != step.token:
            raise DisagreementError("The two ways write different tokens.")
        differences.append((logits - step.logits).abs().max().item())
        scales.append(step.logits.abs().max().item())
        seconds.append((our_seconds, their_seconds))
        given = [step.token]
    our_median, their_median = (statistics.median(times) for times in zip(*seconds[1 + _WARM_UP :], strict=True))
    return Measured(
        prefill=seconds[0],
        token=(our_median, their_median),
        difference=max(differences),
        scale=min(scales),
        ties=sum(router.settled for router in model.routers),
    )


def text_pass(model: Transformer, prompt: list[int], tokens: int, prefixes: PrefixStore | None = None) -> TextPass:
    """Greedy, and without an end."""
    sequence = TokenSequence(tuple(prompt), (Span(0, len(prompt)),), ())
    return TextPass(
        model,
        SequenceRows((sequence,), (), ()),
        _ENDLESS,
        TokenSampler(SamplingOptions(do_sample=False), 0, model.device),
        max_new_tokens=tokens,
        max_length=model.config.max_position_embeddings,
        prefixes=prefixes,
    )


def random_tokens(sizes: Sizes, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, sizes.vocabulary, (count,), generator=generator).tolist()


@dataclass(frozen=True)
class Passed:
    """Tokens through the transformer: of the text's prompt, of the text, of the drawings' prompts, of their steps."""

    prompt: int
    text: int
    drawing_prompt: int
    steps: int

    @property
    def total(self) -> int:
        return self.prompt + self.text + self.drawing_prompt + self.steps


def count_tokens(sizes: Sizes, steps: int, branches: int, *, reuse: bool) -> Passed:
    """Counts what passes through the first layer while thinking and then drawing each of the seeds.

    Nothing of it depends on the width or the number of layers, so a narrow model of one layer does it; and as one later
    step is like another, two steps do. Half of the prompt is the system's, which the unconditional branch has, too.
    """
    narrow = Sizes(64, 1, 4, 2, 4, 2, 32, 32, 4, sizes.side, sizes.prompt, sizes.vocabulary)
    model, prompt = build_model(narrow, seed=0), random_tokens(narrow, sizes.prompt, seed=0)
    prefixes = PrefixStore() if reuse else None
    prompt_tokens = text_tokens = drawing_prompt = step_tokens = 0
    text: TextPass | None = None
    with passed_tokens(model) as passed:
        for seed in range(SEEDS):
            if text is None or not reuse:
                text = text_pass(model, prompt, THOUGHT, prefixes)
                list(text)
                prompt_tokens += passed.pop(0)
                text_tokens += sum(passed)
                passed.clear()
            rows = drawing(sizes, prompt, text.ids, branches)
            latents = torch.randn(1, 4, sizes.side, sizes.side, generator=torch.Generator().manual_seed(seed))
            schedule = Schedule.flow_matching(2, shift=3.0)
            list(denoise(model, rows, latents, schedule, 2.0 if branches == 2 else 1.0, prefixes=prefixes))
            later = passed.pop()  # all later steps are alike
            first = later + branches  # <eoi>
            step_tokens += first + (steps - 1) * later
            drawing_prompt += sum(passed) - first
            passed.clear()
    return Passed(prompt_tokens, text_tokens, drawing_prompt, step_tokens)


def drawing(sizes: Sizes, prompt: list[int], text: list[int], branches: int) -> SequenceRows:
    """The rows of a drawing from a text: it goes on from there, and unconditionally words are replaced by one token."""
    start = len(prompt) + len(text) + 1
    span, grid = Span(start, start + sizes.side**2), Grid(sizes.side, sizes.side)
    rest = [0] * (1 + sizes.side**2 + 1)

    def branch(words: list[int]) -> TokenSequence:
        ids = (*prompt[: len(prompt) // 2], *words, *rest)
        return TokenSequence(ids, (Span(0, start - 1),), (ImageRun("gen", span, grid),), gen_timestep=start - 1)

    words = [*prompt[len(prompt) // 2 :], *text]
    rows = (branch(words), branch([0] * len(words)))
    return SequenceRows(rows[:branches], (span,), ((span, grid),))


@contextmanager
def passed_tokens(model: Transformer) -> Iterator[list[int]]:
    """Inside, each pass adds its rows times positions to the list."""
    passed: list[int] = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, args: passed.append(args[0].shape[:2].numel()))
    try:
        yield passed
    finally:
        hook.remove()


def report(sizes: Sizes, measured: Measured) -> None:
    """Prints the times."""
    (our_token, their_token), (our_prefill, their_prefill) = measured.token, measured.prefill
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; {sizes}")
    relative = measured.difference / measured.scale
    print(f"tokens equal; largest difference of logits: {measured.difference:.1e}, {relative:.1e} of the largest")
    print(f"ties between experts settled alike: {measured.ties}")
    print()
    print(f"{'':34}{'ours':>10}{'reference':>12}{'ratio':>8}")
    for name, ours, theirs, ratio in (
        (f"prefill, {sizes.prompt} tokens: seconds", our_prefill, their_prefill, their_prefill / our_prefill),
        ("decode: seconds per token", our_token, their_token, their_token / our_token),
        ("decode: tokens per second", 1 / our_token, 1 / their_token, their_token / our_token),
    ):
        print(f"{name:34}{ours:10.3f}{theirs:12.3f}{ratio:8.1f}")


def report_tokens(sizes: Sizes) -> None:
    """Counts and prints what passes through the transformer."""
    for name, steps, branches in ((f"{STEPS} steps, guidance", STEPS, 2), ("distilled, 8 steps", 8, 1)):
        kept, afresh = (count_tokens(sizes, steps, branches, reuse=reuse) for reuse in (True, False))
        print()
        print(f"{f'tokens per picture ({name})':34}{'ours':>10}{'afresh':>12}{'ratio':>8}")
        for label, part in (
            ("prompt of the text", "prompt"),
            ("text, one at a time", "text"),
            ("prompt of the drawing", "drawing_prompt"),
            ("steps", "steps"),
            ("total", "total"),
        ):
            ours, theirs = getattr(kept, part) / SEEDS, getattr(afresh, part) / SEEDS
            print(f"  {label:32}{ours:10.1f}{theirs:12.1f}{theirs / ours:8.1f}")


def run(sizes: Sizes, tokens: int, seed: int) -> None:
    """Measures and prints; exits with an error if the two ways disagree."""
    try:
        measured = measure(sizes, tokens, seed)
        relative = measured.difference / measured.scale
        if not relative <= TOLERANCE:  # also when it is not a number
            raise DisagreementError(f"The two ways differ by {relative:.1e} of the largest logit.")
    except DisagreementError as error:
        sys.exit(str(error))
    report(sizes, measured)
    report_tokens(sizes)
    print()
    print(f"ratio: {measured.token[1] / measured.token[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=WRITING.layers, help="fewer for a quick try")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to time, each way")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompt")
    arguments = parser.parse_args()
    run(replace(WRITING, layers=arguments.layers), arguments.tokens, arguments.seed)


if __name__ == "__main__":
    main()
