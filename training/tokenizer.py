"""The tiny checkpoints' vocabulary: byte-level BPE over the small world's texts, then the family's control tokens."""

import random
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from .captions import random_prompt
from .edits import random_edit
from .export import SYSTEM_PROMPTS
from .fusion import random_fusion
from .questions import random_question
from .scene import DIGITS, LETTERS
from .thoughts import rewrite, thought
from .world import split_scene, stream

_BYTES_AND_MERGES = 960
_TEXTS = 12_000
_RATIOS = 33  # the four further rows of the published table are sizes of a megapixel
_TEMPLATE = ("User: ", "Assistant: ", "\n\n")


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """A vocabulary in which most words of the world are one token, and each Chinese character is one.

    The same seed gives the same vocabulary. It serves Instruct and Distil alike: `<timestep_r>` is in it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Chinese has no spaces: without this cut whole phrases would become tokens, which say nothing of new ones.
            pre_tokenizers.Split(Regex(r"[\p{Han}，。：？（）]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_BYTES_AND_MERGES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control_tokens()])
    return tokenizer


def control_tokens() -> list[str]:
    """The control tokens, in vocabulary order."""
    pairs = ("ref", "recaption", "quad", "think", "answer")
    tokens = ["<|endoftext|>", "<|startoftext|>", "<boi>", "<eoi>", "<img>", "<pad>", "<cfg>", "<timestep>"]
    tokens += ["<guidance>", "<timestep_r>", "<joint_img_sep>"]
    tokens += [tag for name in pairs for tag in (f"<{name}>", f"</{name}>")]
    tokens += [f"<img_size_{size}>" for size in (128, 256, 512, 768, 1024)]
    return tokens + [f"<img_ratio_{i}>" for i in range(_RATIOS)]


def _texts(seed: int) -> Iterator[str]:
    """What the vocabulary is made from: texts of every kind, of training scenes alone."""
    rng = stream("train", seed)
    for _ in range(20):
        yield from (SYSTEM_PROMPTS, *_TEMPLATE)
        # The rarest words: a scene shows one of 34 characters now and then.
        yield " ".join(f"letter {letter}" for letter in LETTERS) + " ".join(f"digit {digit}" for digit in DIGITS)
    for index in range(_TEXTS):
        yield from _some(rng, index)


def _some(rng: random.Random, index: int) -> tuple[str, ...]:
    match index % 6:
        case 0:
            edit = random_edit(rng, "train")
            return edit.text, edit.summary, edit.rewrite
        case 1:
            return (random_fusion(rng, "train").text,)
        case 2:
            question = random_question(rng, "train")
            return question.text, question.answer
        case _:
            scene = split_scene(rng, "train")
            prompt = random_prompt(rng, scene)
            return prompt.text, thought(prompt, scene), rewrite(scene, prompt.language)
