import dataclasses
import json

import pytest

from hunyuan3.config import ModelConfig
from hunyuan3.errors import CheckpointError, RequestError
from hunyuan3.text.special_tokens import SpecialTokens
from hunyuan3.text.tokenizer import Tokenizer
from tests.core.golden_paths import checkpoints, component

FOLDER = checkpoints()[0]
CONFIG = dataclasses.replace(ModelConfig.from_folder(FOLDER), cfg_distilled=False, use_meanflow=False)


def without(tmp_path, *names):
    """The golden tokenizer without some added tokens; the ids of the others stay."""
    data = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))
    last = max(token["id"] for token in data["added_tokens"])
    for token in data["added_tokens"]:
        if token["content"] in names:
            token["content"] = f"<gone_{token['id'] - last}>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("folder", checkpoints(), ids=lambda folder: folder.name)
def test_ids_are_the_recorded_ones(folder):
    recorded = component("tokenizer")
    config = ModelConfig.from_folder(folder)
    tokens = SpecialTokens.from_tokenizer(Tokenizer.from_folder(folder), config)
    special = recorded["special"]
    assert tokens.bos == special["<|startoftext|>"]
    assert tokens.eos == special["<|endoftext|>"]
    assert (tokens.boi, tokens.eoi, tokens.img) == (special["<boi>"], special["<eoi>"], special["<img>"])
    assert (tokens.cfg, tokens.pad, tokens.timestep) == (special["<cfg>"], special["<pad>"], special["<timestep>"])
    assert (tokens.think, tokens.think_end) == (special["<think>"], special["</think>"])
    assert (tokens.recaption, tokens.recaption_end) == (special["<recaption>"], special["</recaption>"])
    assert (tokens.answer, tokens.answer_end) == (special["<answer>"], special["</answer>"])
    assert tokens.joint_img_sep == special["<joint_img_sep>"]
    assert tokens.size == special[f"<img_size_{config.image_base_size}>"]
    assert list(tokens.ratios) == recorded["all_ratio_ids"]
    assert tokens.guidance == (special["<guidance>"] if config.cfg_distilled else None)
    assert tokens.timestep_r == (special["<timestep_r>"] if config.use_meanflow else None)


def test_ratio_tokens_map_to_table_rows_and_back():
    tokens = SpecialTokens.from_tokenizer(Tokenizer.from_folder(FOLDER), CONFIG)
    assert [tokens.ratio_index(tokens.ratio(i)) for i in range(len(tokens.ratios))] == list(range(len(tokens.ratios)))
    assert tokens.ratio_index(tokens.boi) is None
    for index in (-1, len(tokens.ratios)):
        with pytest.raises(RequestError, match=f"aspect ratio {index} "):
            tokens.ratio(index)


def test_a_vocabulary_without_all_four_extra_ratios_has_33(tmp_path):
    tokens = SpecialTokens.from_tokenizer(without(tmp_path, "<img_ratio_34>"), CONFIG)
    assert len(tokens.ratios) == 33


@pytest.mark.parametrize(
    "name", ["<boi>", "<cfg>", "</think>", "<img_ratio_7>", f"<img_size_{CONFIG.image_base_size}>"]
)
def test_a_missing_token_is_named_with_its_file(tmp_path, name):
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json has no token '{name}'"):
        SpecialTokens.from_tokenizer(without(tmp_path, name), CONFIG)


def test_guidance_and_timestep_r_are_needed_only_by_a_distilled_checkpoint(tmp_path):
    tokenizer = without(tmp_path, "<guidance>", "<timestep_r>")
    tokens = SpecialTokens.from_tokenizer(tokenizer, CONFIG)
    assert tokens.guidance is None and tokens.timestep_r is None
    with pytest.raises(CheckpointError, match="<guidance>"):
        SpecialTokens.from_tokenizer(tokenizer, dataclasses.replace(CONFIG, cfg_distilled=True))
    with pytest.raises(CheckpointError, match="<timestep_r>"):
        SpecialTokens.from_tokenizer(tokenizer, dataclasses.replace(CONFIG, use_meanflow=True))


def test_the_separator_is_missed_only_when_a_picture_needs_it(tmp_path):
    tokens = SpecialTokens.from_tokenizer(without(tmp_path, "<joint_img_sep>"), CONFIG)
    assert tokens.joint_img_sep is None
    with pytest.raises(CheckpointError, match="<joint_img_sep>"):
        tokens.require_joint_img_sep()


@pytest.mark.parametrize("key", sorted(CONFIG.token_ids))
def test_an_id_that_contradicts_the_config_is_refused(key):
    config = dataclasses.replace(CONFIG, token_ids={**CONFIG.token_ids, key: 3})
    with pytest.raises(CheckpointError, match=f"'{key}' 3"):
        SpecialTokens.from_tokenizer(Tokenizer.from_folder(FOLDER), config)


def test_config_ids_are_optional():
    config = dataclasses.replace(CONFIG, token_ids={})
    assert SpecialTokens.from_tokenizer(Tokenizer.from_folder(FOLDER), config).bos > 0


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(CheckpointError, match="'vocab_size' 100"):
        SpecialTokens.from_tokenizer(Tokenizer.from_folder(FOLDER), dataclasses.replace(CONFIG, vocab_size=100))
