import pytest

from hunyuan3.errors import RequestError
from hunyuan3.text.template import TEMPLATES, InputPicture, Message, OutputPicture, TextSection, request_messages
from hunyuan3.text.trace import recaption_only, split_trace, thinks, tidy_trace
from hunyuan3.types import Grid
from tests.core.golden_requests import Checkpoint, checkpoint_name, template_rows, template_sections

ROWS = template_rows()
PICTURE = InputPicture(16, Grid(4, 4), Grid(2, 3), 8)
DRAW = OutputPicture(16, Grid(4, 4))
INSTRUCT, PRETRAIN = TEMPLATES["instruct"], TEMPLATES["pretrain"]
FULL_TRACE = "<think>plan</think><recaption>fox</recaption>"


def texts(sections):
    return [
        section.affixes[0] + section.text + section.affixes[1] if isinstance(section, TextSection) else type(section)
        for section in sections
    ]


def replaceable(sections):
    return [section.text for section in sections if isinstance(section, TextSection) and section.replaceable]


def recorded_section(section):
    """A section in the form of the recording."""
    if isinstance(section, TextSection):
        return {"type": "text", "text": "".join((section.affixes[0], section.text, section.affixes[1]))}
    if isinstance(section, OutputPicture):
        size = {"token_length": section.grid.height * section.grid.width}
        size |= {"token_height": section.grid.height, "token_width": section.grid.width}
        return {"type": "gen_image", "ratio_idx": section.ratio, **size}
    vae, vit = section.vae_grid, section.vit_grid
    return {
        "type": "cond_joint_image",
        "ratio_idx": section.ratio,
        "token_length": [vae.height * vae.width, section.vit_tokens],
        "token_height": [vae.height, vit.height],
        "token_width": [vae.width, vit.width],
    }


def test_there_are_recorded_templates():
    assert ROWS


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_sections_are_the_recorded_ones(row):
    at = Checkpoint(checkpoint_name(row))
    made = [recorded_section(section) for section in template_sections(row, at)]
    for recorded in row["sections"]:
        assert made == [{key: value for key, value in section.items() if key != "base_size"} for section in recorded]
        assert all(
            section.get("base_size", at.config.image_base_size) == at.config.image_base_size for section in recorded
        )


def test_an_instruct_request_is_cut_into_these_sections():
    messages = request_messages("fox", system="sys", pictures=[PICTURE], trace=FULL_TRACE, draw=DRAW)
    assert texts(INSTRUCT.image_sections(messages)) == [
        "", "sys", "\n\n", "User: ", InputPicture, "fox", "\n\n", "Assistant: ",
        "<think>", "plan", "</think>", "<recaption>", "fox", "</recaption>",
        "<answer>", OutputPicture, "</answer>", "\n\n",
    ]  # fmt: skip


def test_only_words_of_the_user_and_the_model_are_replaceable():
    messages = request_messages("prompt", system="sys", pictures=[PICTURE], trace=f"a {FULL_TRACE} z", draw=DRAW)
    assert replaceable(INSTRUCT.image_sections(messages)) == ["prompt", "a ", "plan", "fox", " z"]


def test_an_empty_prompt_is_an_empty_section():
    sections = INSTRUCT.image_sections(request_messages("", draw=DRAW))
    assert texts(sections)[:3] == ["User: ", "", "\n\n"]


def test_plain_assistant_text_is_an_answer_and_replaced_whole():
    (section,) = (s for s in INSTRUCT.image_sections([Message("assistant", "ok")]) if s.source == "trace")
    assert section == TextSection("ok", True, "trace", ("<answer>", "</answer>"))
    (section,) = (s for s in PRETRAIN.image_sections([Message("assistant", "ok")]) if s.source == "trace")
    assert section == TextSection("ok", True, "trace", ("", ""))


def test_a_truncated_trace_is_treated_like_plain_text_unless_closed_first():
    truncated = "<think>plan that never"
    messages = request_messages("fox", trace=truncated, draw=DRAW)
    assert f"<answer>{truncated}</answer>" in texts(INSTRUCT.image_sections(messages))
    messages = request_messages("fox", trace=tidy_trace(truncated), draw=DRAW)
    assert replaceable(INSTRUCT.image_sections(messages)) == ["fox", "plan that never"]


@pytest.mark.parametrize(
    ("trace", "tidy"),
    [
        ("<think>a", "<think>a</think>"),
        ("<think>a</think><recaption>b", "<think>a</think><recaption>b</recaption>"),
        (FULL_TRACE, FULL_TRACE),
        ("<think>a<recaption>b</recaption>", "<think>a</think><recaption>b</recaption>"),
        ("<think>a<recaption>b", "<think>a</think><recaption>b</recaption>"),
        ("<recaption>a sign that says <think></recaption>", "<recaption>a sign that says </recaption>"),
        (
            "<think>next is <recaption></think><recaption>b",
            "<think>next is </think><recaption>b</recaption>",
        ),
        ("<think>a</think><recaption>b</think>c</recaption>", "<think>a</think><recaption>bc</recaption>"),
        ("<recaption>a</recaption><recaption>b</recaption>", "<recaption>a\nb</recaption>"),
        ("<recaption>a</recaption><think>b", "<recaption>a</recaption><think>b</think>"),
        ("x</think><think>a</think>y", "x<think>a</think>y"),
        ("</recaption>", ""),
        ("<think>a<recaption>b</think>c</recaption>", "<think>ab</think>c"),
        ("a<recaption>b</recaption>c", "a<recaption>b</recaption>c"),
        ("<think>a<recaption>b</recaption><think>c</think>", "<think>a\nc</think><recaption>b</recaption>"),
        ("</thi</recaption>nk>a", "a"),
        ("plain", "plain"),
        ("", ""),
    ],
)
def test_a_tidy_trace_has_every_word_and_each_tag_once(trace, tidy):
    assert tidy_trace(trace) == tidy
    assert tidy_trace(tidy) == tidy
    kept = "".join(part.text for part in split_trace(tidy))
    assert kept == tidy, "nothing of it is lost when it is read"


@pytest.mark.parametrize(
    ("trace", "parts"),
    [
        ("", []),
        ("loose", ["loose"]),
        ("<think></think>", ["<think>", "", "</think>"]),
        (FULL_TRACE, ["<think>", "plan", "</think>", "<recaption>", "fox", "</recaption>"]),
        ("a<recaption>b</recaption>c", ["a", "<recaption>", "b", "</recaption>", "c"]),
        ("<think>a</think> b <recaption>c", ["<think>", "a", "</think>", " b <recaption>c"]),
        ("<think>a</think>b</think>lost", ["<think>", "a", "</think>", "b"]),
        ("<recaption>a</recaption><think>b</think>", ["<recaption>", "a", "</recaption>", "<think>", "b", "</think>"]),
        ("</think><think>", ["</think><think>"]),
    ],
)
def test_a_trace_is_split_at_its_tags(trace, parts):
    assert [part.text for part in split_trace(trace)] == parts


def test_dropping_the_think_part_keeps_the_rest():
    assert (
        "".join(part.text for part in split_trace(f"a{FULL_TRACE}z", drop_think=True)) == "a<recaption>fox</recaption>z"
    )
    messages = request_messages("fox", trace=FULL_TRACE, draw=DRAW)
    assert "<think>" not in texts(INSTRUCT.image_sections(messages, drop_think=True))
    assert "<recaption>" in texts(INSTRUCT.image_sections(messages, drop_think=True))


def test_recaption_only_leaves_the_rewrite_alone():
    assert recaption_only(FULL_TRACE) == "<recaption>fox</recaption>"
    assert recaption_only("x<recaption>a</recaption>") == "<recaption>a</recaption>"
    for trace in ("<think>a</think>", "plain", ""):
        assert recaption_only(trace) == ""


@pytest.mark.parametrize(
    ("trace", "does"),
    [
        (FULL_TRACE, True),
        ("<think>a", True),
        ("<recaption>a sign that says <think></recaption>", False),
        ("plain", False),
    ],
)
def test_whether_a_trace_thinks(trace, does):
    assert thinks(trace) == does


@pytest.mark.parametrize(
    ("task", "instruct", "pretrain"),
    [
        ("auto", "Assistant: ", ""),
        ("image", "", ""),
        ("think", "Assistant: <think>", "<think>"),
        ("recaption", "Assistant: <recaption>", "<recaption>"),
        ("img_ratio", "Assistant: <answer><boi><img_size_512>", "<boi><img_size_512>"),
    ],
)
def test_a_text_stage_ends_with_the_opening_of_its_task(task, instruct, pretrain):
    messages = request_messages("fox")
    assert texts(INSTRUCT.text_sections(messages, task, 512)) == ["User: ", "fox", "\n\n", instruct]
    assert texts(PRETRAIN.text_sections(messages, task, 512)) == ["", "fox", "", pretrain]


def test_a_text_stage_continues_the_assistants_turn():
    messages = request_messages("fox", trace="<recaption>a</recaption>")
    sections = texts(INSTRUCT.text_sections(messages, "img_ratio", 1024))
    assert sections == [
        "User: ", "fox", "\n\n", "Assistant: ", "<recaption>", "a", "</recaption>", "<answer><boi><img_size_1024>",
    ]  # fmt: skip


def test_messages_of_one_role_share_their_affixes_and_turns_alternate():
    turns = [("system", "s"), ("user", PICTURE), ("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")]
    sections = texts(INSTRUCT.image_sections([Message(role, content) for role, content in turns]))
    assert sections == [
        "", "s", "\n\n", "User: ", InputPicture, "a", "b", "\n\n", "Assistant: ", "<answer>c</answer>", "\n\n",
        "User: ", "d", "\n\n",
    ]  # fmt: skip


def test_a_picture_follows_the_role_it_was_given():
    as_assistant = texts(INSTRUCT.image_sections([Message("assistant", PICTURE), Message("user", "a")]))
    assert as_assistant == ["Assistant: ", InputPicture, "\n\n", "User: ", "a", "\n\n"]


def test_unknown_roles_and_tasks_are_refused():
    with pytest.raises(RequestError, match="'tool'"):
        Message("tool", "x")
    with pytest.raises(RequestError, match="assistant's, not the user's"):
        Message("user", DRAW)
    with pytest.raises(RequestError, match="'sing'"):
        INSTRUCT.text_sections(request_messages("fox"), "sing", 1024)
