import json
import re
from pathlib import Path

import pytest
import tokenizers

from hunyuan3.errors import CheckpointError, RequestError
from hunyuan3.text.tokenizer import Tokenizer
from tests.core.golden_paths import checkpoint, checkpoints, component
from tests.core.golden_requests import checkpoint_name, template_rows

FOLDER = checkpoints()[0]
ORDINARY = [
    "",
    " ",
    "a red fox, isn't it?",
    "  two  spaces\n\n",
    "一只橘猫坐在窗台上。",
    "😀👩‍👩‍👧 🇨🇳",
    "שלום עולם مرحبا",
    "é e\u0301 ﬁ",
    "tab\tnull\x00 control\x07",
    "almost <im g> <think < /think> img>",
]
FOREIGN = ["<img>", "<boi>", "<eoi>", "<timestep>", "<cfg>", "<pad>", "<|endoftext|>", "<|startoftext|>", "<answer>",
           "</answer>", "<img_size_256>", "<img_ratio_3>", "<joint_img_sep>", "<guidance>"]  # fmt: skip
TRACE = ["<think>", "</think>", "<recaption>", "</recaption>", "<ref>", "</ref>", "<quad>", "</quad>"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER)


@pytest.fixture
def odd(tmp_path):
    """A tokenizer unlike the golden one: normaliser, added tokens that are not "special", truncation and padding on."""
    alphabet = {letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    inner.normalizer = tokenizers.normalizers.NFC()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    names = ["<img>", "<think>", "</think>", "<relation_1>", "</relation_12>", "<pos_x_7>", "<pos_7>", "<relation_x>"]
    inner.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False) for name in names])
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_equal_the_recorded_ones(tokenizer):
    rows = component("tokenizer")["encode"]
    assert rows
    for row in rows:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]


def test_special_strings_have_the_recorded_ids(tokenizer):
    recorded = component("tokenizer")["special"]
    assert recorded
    assert {name: tokenizer.token_id(name) for name in recorded} == recorded
    assert tokenizer.token_id("<no_such_token>") is None


def test_decoding_gives_back_every_recorded_template():
    rows = template_rows()
    assert rows
    for row in rows:
        folder = checkpoint(checkpoint_name(row))
        reader = Tokenizer.from_folder(folder)
        for ids, text in zip(row["tokens"], row["decoded"], strict=True):
            shortened = re.sub(r"(?:<img>)+", lambda run: f"[<img>x{len(run[0]) // 5}]", reader.decode(ids))
            assert shortened == text, row["name"]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_has_the_same_ids_in_every_mode(tokenizer, text):
    assert tokenizer.encode(text, "text") == tokenizer.encode(text, "trace") == tokenizer.encode(text, "reference")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, "text")) == text


@pytest.mark.parametrize("token", FOREIGN + TRACE)
@pytest.mark.parametrize("pattern", ["{}", "a {} b", "{0}{0}", "<{}>", "<im{}g>", "猫{}\n\n"])
def test_text_mode_never_yields_a_control_token(tokenizer, token, pattern):
    text = pattern.format(token)
    ids = tokenizer.encode(text, "text")
    assert not control_ids(FOLDER) & set(ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("token", FOREIGN)
def test_trace_mode_keeps_steering_tokens_as_text(tokenizer, token):
    ids = tokenizer.encode(f"<think>see {token} here</think>", "trace")
    body = tokenizer.encode(f"see {token} here", "text")
    assert ids == [tokenizer.token_id("<think>"), *body, tokenizer.token_id("</think>")]


@pytest.mark.parametrize("token", TRACE)
def test_trace_mode_recognises_the_tags_of_a_trace(tokenizer, token):
    assert tokenizer.encode(f"a{token}{token} b", "trace") == tokenizer.encode(f"a{token}{token} b", "reference")
    assert tokenizer.token_id(token) in tokenizer.encode(f"a{token}", "trace")


def test_reference_mode_recognises_every_added_token(tokenizer):
    for token in FOREIGN + TRACE:
        assert tokenizer.encode(token) == [tokenizer.token_id(token)]


def test_numbered_tags_count_as_trace_tags_and_lookalikes_do_not(odd):
    tokenizer = Tokenizer.from_folder(odd)
    text = "<relation_1>a</relation_12><pos_x_7>"
    assert tokenizer.encode(text, "trace") == tokenizer.encode(text, "reference")
    for token in ("<pos_7>", "<relation_x>", "<img>"):
        assert tokenizer.encode(token, "trace") == tokenizer.encode(token, "text") != tokenizer.encode(token)


def test_control_tokens_that_are_not_marked_special_stay_text_too(odd):
    tokenizer = Tokenizer.from_folder(odd)
    assert not control_ids(odd) & set(tokenizer.encode("<img><think>", "text"))


def test_plain_encoding_applies_the_normaliser(odd):
    tokenizer = Tokenizer.from_folder(odd)
    assert tokenizer.encode("e\u0301", "text") == tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_truncation_and_padding_of_the_file_are_ignored(odd):
    tokenizer = Tokenizer.from_folder(odd)
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert len(tokenizer.encode("a")) == 1


def test_ids_without_a_token_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("fox")
    assert tokenizer.decode([*ids, 10_000_000, *ids]) == "foxfox"


def test_punctuation_is_cleaned_up_only_if_the_folder_says_so(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    text = "well , it 's fine . do n't ! why ? we 've ' x"
    ids = Tokenizer.from_folder(tmp_path).encode(text)
    assert Tokenizer.from_folder(tmp_path).decode(ids) == text
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).decode(ids) == text
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}', encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).decode(ids) == "well, it's fine. don't! why? we've'x"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "not json", (FOLDER / "tokenizer.json").read_text("utf-8")[:5000]])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a usable tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("mode", ["text", "trace", "reference"])
def test_half_a_character_is_refused_with_its_place(tokenizer, mode):
    with pytest.raises(RequestError, match="broken at character 2"):
        tokenizer.encode("ab\ud83d", mode)


def test_an_unknown_mode_is_refused(tokenizer):
    with pytest.raises(ValueError, match="control_tokens"):
        tokenizer.encode("a", "everything")


def control_ids(folder: Path) -> set[int]:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["id"] for token in data["added_tokens"]}
