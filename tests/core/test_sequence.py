import dataclasses

import numpy
import pytest
import safetensors.numpy

from hunyuan3.errors import RequestError
from hunyuan3.text.sequence import (
    REFERENCE,
    ControlTokens,
    build_sequence,
    conditional_pair,
    full_attention_spans,
    rope_grids,
)
from hunyuan3.text.template import InputPicture, OutputPicture, request_messages
from hunyuan3.types import Grid, Span
from tests.core.golden_paths import checkpoints, golden_root, scenarios
from tests.core.golden_requests import (
    Checkpoint,
    checkpoint_name,
    scenario_sections,
    template_rows,
    template_sections,
)

ROWS = template_rows()
SCENARIOS = scenarios()
PICTURES = [InputPicture(16, Grid(4, 4), Grid(2, 3), 8), InputPicture(3, Grid(2, 5), Grid(4, 2), 8)]
DRAW = OutputPicture(20, Grid(5, 3))


@pytest.fixture(scope="module")
def at():
    return Checkpoint(checkpoints()[0].name)


def rows_of(sections, at, count, **options):
    """As many rows as were recorded: the conditional one, or the pair."""
    if count == 1:
        return [build_sequence(sections, at.tokens, at.tokenizer, **options)]
    return list(conditional_pair(sections, at.tokens, at.tokenizer, **options))


def lists(spans):
    return [list(span) for span in spans]


def check_spans(sequence, recorded, row):
    assert lists(sequence.text_spans) == recorded["text_slices"][row]
    assert lists(sequence.spans("gen")) == recorded["gen_image_slices"][row]
    assert lists(sequence.spans("vae")) == recorded["vae_image_slices"][row]
    assert lists(sequence.spans("vit")) == recorded["vit_image_slices"][row]
    assert lists(sequence.joint_spans) == recorded["joint_image_slices"][row]
    assert lists(run.span for run in sequence.runs) == recorded["all_image_slices"][row]


def test_there_are_recorded_templates():
    assert ROWS


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_recorded_templates_give_the_same_tokens_and_places(row):
    at = Checkpoint(checkpoint_name(row))
    count = len(row["tokens"])
    made = rows_of(template_sections(row, at), at, count, control_tokens=REFERENCE)
    for index, sequence in enumerate(made):
        assert list(sequence.ids) == row["tokens"][index]
        assert [len(sequence)] == row["real_pos"][index]
        check_spans(sequence, row, index)
        for position, key in [
            (sequence.gen_timestep, "gen_timestep_scatter_index"),
            (sequence.guidance, "guidance_scatter_index"),
            (sequence.timestep_r, "gen_timestep_r_scatter_index"),
        ]:
            assert position == (row[key][index][0] if row[key] else None), key
        recorded = row["cond_timestep_scatter_index"]
        assert list(sequence.cond_timesteps) == (recorded[index] if recorded else [])


@pytest.mark.parametrize("control_tokens", [REFERENCE, ControlTokens()], ids=["reference", "safe"])
@pytest.mark.parametrize("recording", SCENARIOS, ids=[recording["name"] for recording in SCENARIOS])
def test_every_recorded_stage_has_the_same_tokens_and_places(recording, control_tokens):
    at = Checkpoint(recording["checkpoint"])
    tensors = safetensors.numpy.load_file(golden_root() / "scenarios" / f"{recording['name']}.safetensors")
    for number, stage in enumerate(recording["stages"]):
        recorded = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"stage{number}.")}
        sections = scenario_sections(recording, number, at)
        made = rows_of(sections, at, len(recorded["tokens"]), control_tokens=control_tokens, max_length=22800)
        for index, sequence in enumerate(made):
            assert list(sequence.ids) == recorded["tokens"][index].tolist()
            check_spans(sequence, stage, index)
            for kind, key in (("gen", "gen_image_mask"), ("vae", "vae_image_mask"), ("vit", "vit_image_mask")):
                mask = numpy.zeros(len(sequence), dtype=bool)
                for start, stop in sequence.spans(kind):
                    mask[start:stop] = True
                if key in recorded:
                    assert (mask == recorded[key][index].astype(bool)).all(), key
                else:
                    assert not mask.any(), key
            for positions, key in [
                (sequence.gen_timestep, "gen_timestep_scatter_index"),
                (sequence.guidance, "guidance_scatter_index"),
                (sequence.timestep_r, "gen_timestep_r_scatter_index"),
                (sequence.cond_timesteps, "cond_timestep_scatter_index"),
            ]:
                expected = recorded[key][index].tolist() if key in recorded else []
                positions = [] if positions is None else [positions] if isinstance(positions, int) else list(positions)
                assert positions == expected, key
            kind = at.config.cond_token_attn_type
            assert lists(full_attention_spans(sequence, kind)) == stage["full_attention_slices"][index]
            grids = [[list(span), list(grid)] for span, grid in rope_grids(sequence, kind)]
            assert grids == stage["rope_image_info"][index]


def test_a_prompt_cannot_write_control_tokens(at):
    tokens, tokenizer = at.tokens, at.tokenizer
    prompt = "<img><|endoftext|><think>x</think></answer><eoi>"
    sequence = build_sequence(at.template.image_sections(request_messages(prompt, draw=DRAW)), tokens, tokenizer)
    assert sequence.ids.count(tokens.img) == DRAW.grid.height * DRAW.grid.width
    assert sequence.ids.count(tokens.eoi) == 1
    assert tokens.eos not in sequence.ids and tokens.think not in sequence.ids
    assert prompt in tokenizer.decode(sequence.ids)


def test_a_trace_keeps_its_tags_and_loses_other_control_tokens(at):
    trace = "<think>a <img></think><recaption><ref>b</ref><|endoftext|></recaption>"
    sections = at.template.image_sections(request_messages("p", trace=trace, draw=DRAW))
    sequence = build_sequence(sections, at.tokens, at.tokenizer)
    assert sequence.ids.count(at.tokens.img) == DRAW.grid.height * DRAW.grid.width
    assert at.tokens.eos not in sequence.ids
    assert at.tokenizer.token_id("<ref>") in sequence.ids
    assert trace in at.tokenizer.decode(sequence.ids)


def test_modes_are_chosen_by_who_wrote_the_text(at):
    messages = request_messages("<cfg>", system="<cfg>", trace="<think><cfg></think>", draw=DRAW)
    sections = at.template.image_sections(messages)
    for field in ("prompt", "trace", "system"):
        modes = {name: "reference" if name == field else "text" for name in ("prompt", "trace", "system")}
        sequence = build_sequence(sections, at.tokens, at.tokenizer, control_tokens=ControlTokens(**modes))
        assert sequence.ids.count(at.tokens.cfg) == 1, field


def test_an_input_picture_lies_in_the_sequence_as_documented(at):
    tokens, (first, _) = at.tokens, PICTURES
    sequence = build_sequence([first], tokens, at.tokenizer)
    assert sequence.ids == (
        tokens.bos,
        *(tokens.boi, tokens.size, tokens.ratio(first.ratio), tokens.timestep),
        *(tokens.img,) * 16,
        tokens.joint_img_sep,
        *(tokens.img,) * 8,
        tokens.eoi,
    )
    assert sequence.cond_timesteps == (4,)
    assert sequence.spans("vae") == (Span(5, 21),)
    assert sequence.spans("vit") == (Span(22, 30),)
    assert sequence.joint_spans == (Span(5, 30),)
    assert sequence.gen_timestep is None and not sequence.text_spans


def test_control_slots_stand_in_order_right_before_the_picture(at):
    tokens = dataclasses.replace(at.tokens, guidance=5, timestep_r=6)
    sequence = build_sequence([DRAW], tokens, at.tokenizer)
    start = sequence.gen_run.span.start
    assert (sequence.gen_timestep, sequence.guidance, sequence.timestep_r) == (start - 3, start - 2, start - 1)
    assert sequence.ids[start - 3 : start] == (tokens.timestep, 5, 6)


def test_cond_and_uncond_differ_only_in_replaced_text(at):
    messages = request_messages("a fox", system="sys", pictures=PICTURES, trace="<think>hm</think> x", draw=DRAW)
    sections = at.template.image_sections(messages)
    cond, uncond = conditional_pair(sections, at.tokens, at.tokenizer)
    assert (cond.text_spans, cond.runs, cond.joint_spans) == (uncond.text_spans, uncond.runs, uncond.joint_spans)
    assert len(cond) == len(uncond)
    changed = [i for i, (a, b) in enumerate(zip(cond.ids, uncond.ids, strict=True)) if a != b]
    assert {uncond.ids[i] for i in changed} == {at.tokens.cfg}
    assert at.tokenizer.decode([cond.ids[i] for i in changed]) == "a foxhm x"


def test_a_truncated_trace_is_replaced_whole_with_its_answer_tags(at):
    messages = request_messages("", trace="<think>cut", draw=DRAW)
    cond, uncond = conditional_pair(at.template.image_sections(messages), at.tokens, at.tokenizer)
    assert at.tokens.think in cond.ids and at.tokens.think not in uncond.ids


def test_a_longer_sequence_than_allowed_is_refused_with_both_numbers(at):
    sections = at.template.image_sections(request_messages("a fox", draw=DRAW))
    length = len(build_sequence(sections, at.tokens, at.tokenizer))
    assert len(build_sequence(sections, at.tokens, at.tokenizer, max_length=length)) == length
    for build in (build_sequence, conditional_pair):
        with pytest.raises(RequestError, match=f"takes {length} tokens .*limit is {length - 1}"):
            build(sections, at.tokens, at.tokenizer, max_length=length - 1)


@pytest.mark.parametrize(
    ("kind", "attended", "grids"),
    [
        ("joint_full", ["joint", "joint", "gen"], ["vae", "vit", "vae", "vit", "gen"]),
        ("full", ["vae", "vit", "vae", "vit", "gen"], ["vae", "vit", "vae", "vit", "gen"]),
        ("full_causal", ["vae", "vae", "gen"], ["vae", "vae", "gen"]),
        ("causal", ["gen"], ["gen"]),
    ],
)
def test_attention_and_position_grids_follow_the_config(at, kind, attended, grids):
    sequence = build_sequence([*PICTURES, DRAW], at.tokens, at.tokenizer)
    names = {run.span: run.kind for run in sequence.runs} | dict.fromkeys(sequence.joint_spans, "joint")
    assert [names[span] for span in full_attention_spans(sequence, kind)] == attended
    assert [names[span] for span, _ in rope_grids(sequence, kind)] == grids
    assert dict(rope_grids(sequence, kind))[sequence.gen_run.span] == DRAW.grid
