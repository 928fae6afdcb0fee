import pytest

from hunyuan3.errors import CheckpointError, RequestError
from hunyuan3.text.system_prompts import CHOICES, SystemPrompts
from tests.core.golden_paths import checkpoints, component

FOLDER = checkpoints()[0]


def write(folder, source):
    (folder / "system_prompt.py").write_text(source, encoding="utf-8")
    return SystemPrompts.from_folder(folder)


def test_the_selection_table_is_the_recorded_one():
    prompts = SystemPrompts.from_folder(FOLDER)
    rows = component("system_prompts")["rows"]
    assert rows
    for row in rows:
        chosen = prompts.select(row["use_system_prompt"], row["bot_task"], row["system_prompt"], reference=True)
        assert chosen == row["result"], row


def test_dynamic_serves_think_recaption_unless_the_reference_is_asked_for():
    prompts = SystemPrompts.from_folder(FOLDER)
    assert prompts.select("dynamic", "think_recaption") == prompts.text("en_think_recaption")
    assert prompts.select("dynamic", "think_recaption", "mine") == prompts.text("en_think_recaption")
    assert prompts.select("dynamic", "think_recaption", "mine", reference=True) == "mine"


def test_apart_from_that_the_mended_table_is_the_recorded_one():
    prompts = SystemPrompts.from_folder(FOLDER)
    for row in component("system_prompts")["rows"]:
        if (row["use_system_prompt"], row["bot_task"]) != ("dynamic", "think_recaption"):
            assert prompts.select(row["use_system_prompt"], row["bot_task"], row["system_prompt"]) == row["result"]


def test_a_request_gets_the_prompt_stripped():
    prompts = SystemPrompts.from_folder(FOLDER)
    assert prompts.for_request("custom", "image", "  My own.\n") == "My own."
    assert (
        prompts.for_request("en_vanilla", "image") == prompts.text("en_vanilla").strip() != prompts.text("en_vanilla")
    )
    assert prompts.for_request("None", "image", "My own.") == prompts.for_request("custom", "image") == ""


def test_an_unknown_choice_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match=r"'en_other' does not exist.*en_unified"):
        SystemPrompts.from_folder(FOLDER).select("en_other", "image")


def test_without_the_file_only_the_callers_own_text_is_left(tmp_path):
    prompts = SystemPrompts.from_folder(tmp_path)
    assert prompts.select("None", "image") is None
    assert prompts.select("custom", "image", "mine") == "mine"
    assert prompts.select("dynamic", "auto", "mine") == "mine"
    for choice in CHOICES:
        if choice.startswith("en_") or choice == "dynamic":
            with pytest.raises(CheckpointError, match=r"system_prompt\.py is missing.*'None', or 'custom'"):
                prompts.select(choice, "image")


def test_the_file_is_never_executed(tmp_path):
    marker = tmp_path / "executed"
    prompts = write(tmp_path, f"open({str(marker)!r}, 'w')\nunified_system_prompt_en = 'words'\nraise SystemExit")
    assert prompts.text("en_unified") == "words"
    assert not marker.exists()


def test_literals_may_be_concatenated_annotated_or_assigned_again(tmp_path):
    prompts = write(
        tmp_path,
        "unified_system_prompt_en = ('one '\n  'two')\n"
        "t2i_system_prompt_en_vanilla: str = 'noted'\n"
        "t2i_system_prompt_en_recaption = 'old'\n"
        "t2i_system_prompt_en_recaption = other = 'new'\n"
        "t2i_system_prompt_en_think_recaption = 'a'.upper()\n",
    )
    assert prompts.texts == {"en_unified": "one two", "en_vanilla": "noted", "en_recaption": "new"}
    with pytest.raises(CheckpointError, match="has no text 't2i_system_prompt_en_think_recaption'"):
        prompts.select("en_think_recaption", "image")


def test_names_inside_functions_and_other_types_do_not_count(tmp_path):
    prompts = write(tmp_path, "def f():\n    unified_system_prompt_en = 'x'\nt2i_system_prompt_en_vanilla = b'x'\n")
    assert not prompts.texts


@pytest.mark.parametrize("source", ["unified_system_prompt_en = (", "a = '\x00'", "\ud7ff = = 1"])
def test_a_file_that_does_not_parse_is_named(tmp_path, source):
    with pytest.raises(CheckpointError, match=r"system_prompt\.py is not valid Python"):
        write(tmp_path, source)


def test_a_byte_order_mark_and_chinese_text_are_read(tmp_path):
    assert write(tmp_path, "\ufeffunified_system_prompt_en = '猫'").text("en_unified") == "猫"
