"""The checkpoint's `tokenizer.json`, with a say in which strings of a text may become control tokens.

The reference encodes every text with all added tokens recognised, so a prompt that merely mentions `<img>` or
`<|endoftext|>` puts that control token into the sequence. Parity needs this; people's own words do not. Hence three
modes, see `Tokenizer.encode`.

The `tokenizers` library is used directly: no remote code, no tokenizer class to resolve. Added tokens come from
`tokenizer.json` alone (the published file holds them all).
"""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Literal

import tokenizers

from ..config import read_json
from ..errors import CheckpointError, RequestError

ControlMode = Literal["text", "trace", "reference"]


class Tokenizer:
    """Text to ids and back. Never adds bos, eos or padding: the sequence builder owns those."""

    def __init__(self, inner: tokenizers.Tokenizer, source: Path, clean_up: bool = False) -> None:
        """`source` is the file named in errors; `clean_up` applies the punctuation clean-up when decoding."""
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.source = source
        self.clean_up = clean_up

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Reads `folder/tokenizer.json` and, if there is one, `folder/tokenizer_config.json`.

        The latter matters only for `clean_up_tokenization_spaces`; a missing file or key means false, as in
        transformers since 4.48. Raises CheckpointError naming the file that is missing or damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path.name} is missing from {folder}. Is this the whole checkpoint folder?")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a usable tokenizer ({error}). Download this file again.") from error
        settings = folder / "tokenizer_config.json"
        clean_up = settings.is_file() and bool(read_json(settings).get("clean_up_tokenization_spaces", False))
        return cls(inner, path, clean_up)

    def encode(self, text: str, control_tokens: ControlMode = "reference") -> list[int]:
        """Ids of `text` (none for the empty string).

        `control_tokens` says which added tokens may be recognised in it:

        - "reference": all of them, as the reference does.
        - "trace": only what a model's own reasoning is made of: think, recaption, ref, quad, relation and pos_x/y/z
          tags. Never a token that steers the sequence (image, size, ratio, timestep, answer, end of text ...).
        - "text": none; the ids are those of plain byte pair encoding of the same characters.

        Raises RequestError for text that is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is broken at character {error.start}: {text[error.start]!r} is half of a character"
            ) from None
        if control_tokens == "reference":
            return self._inner.encode(text, add_special_tokens=False).ids
        if control_tokens == "text":
            return self._encode_plain(text)
        if control_tokens != "trace":
            raise ValueError(f"control_tokens is {control_tokens!r}, not 'text', 'trace' or 'reference'")
        if self._trace_pattern is None:
            return self._encode_plain(text)
        # The pattern captures, so odd pieces are the tags themselves.
        ids: list[int] = []
        for index, piece in enumerate(self._trace_pattern.split(text)):
            ids += [self._inner.token_to_id(piece)] if index % 2 else self._encode_plain(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens included; ids without a token (padding rows of the embedding) are skipped."""
        text = self._inner.decode(list(ids), skip_special_tokens=False)
        if self.clean_up:
            for before, after in _CLEAN_UP:
                text = text.replace(before, after)
        return text

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def token_id(self, token: str) -> int | None:
        """Id of a token given as it is written in the vocabulary, or None."""
        return self._inner.token_to_id(token)

    def _encode_plain(self, text: str) -> list[int]:
        # Normaliser, pre-tokenizer and model are the steps of `encode` minus the added-token search. Running them here
        # needs no second tokenizer (half a second and 100 MB for the published file) and no change of shared state.
        if self._inner.normalizer is not None:
            text = self._inner.normalizer.normalize_str(text)
        if not text:
            return []
        pre_tokenizer = self._inner.pre_tokenizer
        words = [text] if pre_tokenizer is None else [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
        model = self._inner.model
        return [token.id for word in words for token in model.tokenize(word)]

    @cached_property
    def _trace_pattern(self) -> re.Pattern[str] | None:
        added = (token.content for token in self._inner.get_added_tokens_decoder().values())
        tags = sorted((tag for tag in added if _TRACE_TAG.fullmatch(tag)), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, tags))})") if tags else None


_TRACE_TAG = re.compile(r"</?(?:think|recaption|ref|quad|relation_\d+)>|<pos_[xyz]_\d+>")

# transformers' clean_up_tokenization, in its order.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
