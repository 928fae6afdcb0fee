"""The judge of `python -m tests.parity`: it passes what is right, and it must not pass what is wrong."""

import copy
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.parity import components, judging, scenarios
from tests.parity.__main__ import FAILED, MISSING, NOTHING_COMPARED, PASSED, main
from tests.parity.bench import Bench
from tests.parity.formats import LIMITS, Limits
from tests.parity.report import COMPONENT, IDENTICAL, Computed, Report, compare

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SCENARIO = "C2_instruct_given_cot"
WITH_PICTURE = "E3_instruct_ti2i_think_recaption_auto_align"


def judge(folder, *arguments):
    """Exit code and lines of a run."""
    out = io.StringIO()
    with redirect_stdout(out):
        code = main([str(folder), *map(str, arguments)])
    return code, out.getvalue().splitlines()


@pytest.fixture(scope="module")
def bench():
    return Bench(GOLDEN)


def answered(bench, name):
    """(recording, what we computed) of a scenario."""
    recording, computed = bench.read("scenarios", name), Computed()
    with torch.no_grad():
        scenarios.compute(bench, recording, computed)
    return recording, computed


@pytest.fixture(scope="module")
def drawn(bench):
    """A recorded scenario with a picture to draw alone, answered once. Tests compare copies."""
    return answered(bench, SCENARIO)


@pytest.fixture(scope="module")
def written(bench):
    """One that has an input picture and writes before it draws."""
    return answered(bench, WITH_PICTURE)


@pytest.fixture
def folder(tmp_path):
    """An own folder with the committed checkpoints and nothing recorded yet."""
    (tmp_path / "ckpt").symlink_to(GOLDEN / "ckpt", target_is_directory=True)
    for kind in ("scenarios", "components"):
        (tmp_path / kind).mkdir()
    return tmp_path


def put(folder, kind, name, change_meta=None, change_tensors=None, new_name=None):
    """Copies a recording into an own folder, changed."""
    meta = json.loads((GOLDEN / kind / f"{name}.json").read_text(encoding="utf-8"))
    if change_meta:
        change_meta(meta)
    (folder / kind / f"{new_name or name}.json").write_text(json.dumps(meta), encoding="utf-8")
    tensors = GOLDEN / kind / f"{name}.safetensors"
    if tensors.is_file():
        loaded = load_file(tensors)
        if change_tensors:
            change_tensors(loaded)
        save_file(loaded, folder / kind / f"{new_name or name}.safetensors")


def verdict(recording, computed, own_gaps=None, of="steps"):
    """(report, lines) of judging a scenario that was answered already; own_gaps: step or row -> router gap."""
    report, out = Report(), io.StringIO()
    with redirect_stdout(out):
        judging.judge(recording, replace(computed, gaps={of: own_gaps or {}}), report)
    return report, out.getvalue()


def test_every_committed_recording_is_met():
    code, lines = judge(GOLDEN)
    *compared, summary = lines
    assert code == PASSED, "\n".join(compared)
    assert summary == f"{len(compared)} passed, 0 failed, 0 missing"
    assert len(compared) >= 80
    for path in (*GOLDEN.glob("scenarios/*.json"), *GOLDEN.glob("components/*.json")):
        assert any(line.startswith(f"{path.stem} ") for line in compared), path.stem


def test_the_committed_recordings_are_small():
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*")) < 12_000_000


@pytest.mark.parametrize(
    ("key", "amount"),
    [
        ("stage0.tokens", 1),
        ("stage0.gen_image_mask", 1),
        ("stage0.gen_timestep_scatter_index", 1),
        ("stage0.real_pos", 1),
        ("stage0.rope_pos_yx", 1),
        ("stage0.cos", 1e-4),
        ("later_step_position_ids", 1),
        ("noise", 1e-2),
        ("sched.sigmas", 1e-4),
        ("step_timestep", 0.1),
        ("step_prediction", 1e-3),
        ("step_latents", 2e-4),
    ],
)
def test_one_wrong_number_fails(drawn, key, amount):
    recording, computed = drawn
    wrong = copy.deepcopy(recording)
    wrong.tensors[key].view(-1)[-1] += amount
    report, lines = verdict(wrong, computed)
    assert report.failed == 1 and f"1 off: {key}" in lines


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_slices", [[[1, 5]], [[1, 5]]]),
        ("full_attention_slices", [[], []]),
        ("rope_image_info", [[[[60, 312], [14, 18]]]] * 2),
        ("decoded", ["", ""]),
        ("gen_image_info", {"image_width": 288}),
    ],
)
def test_one_wrong_place_fails(drawn, key, value):
    recording, computed = drawn
    wrong = copy.deepcopy(recording)
    wrong.meta["stages"][0][key] = value
    report, lines = verdict(wrong, computed)
    assert report.failed == 1 and f"1 off: stage0.{key}" in lines


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("taylor_full_steps", [0, 2]),
        ("output_size_wh", [288, 224]),
        ("later_step_mask_shape", None),
        ("latents_std", [1.0] * 4),
        ("image_float_minmax", [-1.0, 1.0]),
    ],
)
def test_one_wrong_fact_of_the_run_fails(drawn, key, value):
    recording, computed = drawn
    wrong = copy.deepcopy(recording)
    wrong.meta[key] = value
    report, lines = verdict(wrong, computed)
    assert report.failed == 1 and f"1 off: {key}" in lines


@pytest.mark.parametrize(
    ("key", "amount"),
    [
        ("stage0.tokens", 1),
        ("stage0.real_pos", 1),
        ("stage0.vae_image_mask", 1),
        ("stage0.vit_image_mask", 1),
        ("stage0.cond_timestep_scatter_index", 1),
        ("stage0.cos", 1e-4),
        ("stage0.cond_timesteps", 1),
        ("stage0.cond_vae_mean_0", 1e-4),
        ("stage0.cond_vae_logvar_0", 1e-4),
        ("stage0.cond_latent_0", 2e-4),
        ("stage1.cond_latent_0", 2e-4),
        ("stage0.logits", 2e-4),
        ("stage0.decode_position_ids", 1),
        ("stage1.tokens", 1),
        ("step_latents", 2e-4),
        ("image_postprocessed_uint8", -2),
    ],
)
def test_one_wrong_number_of_a_text_stage_or_a_picture_fails(written, key, amount):
    recording, computed = written
    wrong = copy.deepcopy(recording)
    wrong.tensors[key].view(-1)[-1] += amount
    report, lines = verdict(wrong, computed)
    assert report.failed == 1 and f"1 off: {key}" in lines


def test_logits_of_forced_tokens_are_compared_too(written):
    recording, computed = written
    for row in recording.meta["stages"][0]["forced_steps"]:
        wrong = copy.deepcopy(recording)
        wrong.tensors["stage0.logits"][row, 7] += 2e-4
        assert verdict(wrong, computed)[0].failed == 1, row


@pytest.mark.parametrize(
    ("stage", "key", "value"),
    [
        (0, "mode", "gen_image"),
        (0, "bot_task", "recaption"),
        (0, "generated_tokens", [784]),
        (0, "generated_text", "words"),
        (0, "raw_argmax", [784]),
        (0, "free_steps", []),
        (0, "forced_steps", []),
        (0, "free_margin_min", 0.5),
        (0, "free_margin_min", None),
        (0, "last_step_ratio_margin", 0.5),
        (0, "n_forward", 26),
        (0, "joint_image_slices", [[]]),
        (0, "full_attention_slices", [[]]),
        (0, "rope_image_info", [[]]),
        (0, "cond_rows", 2),
        (1, "image_size", [288, 224]),
        (1, "full_attention_slices", [[[366, 618]]] * 2),
        (1, "vit_image_slices", [[], []]),
        (None, "cot_text", ["words"]),
        (None, "output_size_wh", [288, 224]),
        (None, "cond_image_vae_sizes_hw", [[288, 224]]),
    ],
)
def test_one_wrong_fact_of_a_text_stage_or_a_picture_fails(written, stage, key, value):
    recording, computed = written
    wrong = copy.deepcopy(recording)
    (wrong.meta if stage is None else wrong.meta["stages"][stage])[key] = value
    report, lines = verdict(wrong, computed)
    assert report.failed == 1 and f"1 off: {key if stage is None else f'stage{stage}.{key}'}" in lines


@pytest.mark.parametrize(("key", "value"), [("stops", [753]), ("finish", "length")])
def test_a_text_stage_must_end_as_the_reference_ends_it(written, key, value):
    recording, computed = written
    other = replace(computed, facts=computed.facts | {f"stage0.{key}": value})
    report, lines = verdict(recording, other)
    assert report.failed == 1 and f"1 off: stage0.{key}" in lines


def test_after_a_flipped_tie_in_a_text_stage_only_the_rows_before_it_count(written):
    recording, computed = written
    rows = range(len(recording.tensors["stage0.logits"]))
    other = copy.deepcopy(recording)
    other.tensors["stage0.logits"][9:] += 0.1
    other.meta["stages"][0]["free_margin_min"] += 0.1
    tied = dict.fromkeys(rows, 1e-3) | {9: 1e-6}
    report, lines = verdict(other, computed, tied, of="stage0")
    assert report.failed == 0 and "only before row 9 of stage0" in lines
    assert verdict(other, computed)[0].failed == 2  # no tie was recorded
    assert verdict(other, computed, dict.fromkeys(rows, 1e-3), of="stage0")[0].failed == 2  # no tie of ours there
    early = copy.deepcopy(other)
    early.tensors["stage0.logits"][4] += 0.1
    assert verdict(early, computed, tied, of="stage0")[0].failed == 2  # off before it
    wrong = copy.deepcopy(other)
    wrong.meta["stages"][0]["generated_tokens"][-1] += 1
    assert verdict(wrong, computed, tied, of="stage0")[0].failed == 1


def test_pictures_hidden_states_and_masks_count_too(drawn):
    recording, computed = drawn
    for key, amount in (("image_uint8", 2), ("image_float", 0.01), ("hidden_probe", 1e-3)):
        full = copy.deepcopy(recording)
        full.tensors[key] = computed.tensors[key].clone()
        assert verdict(full, computed)[0].failed == 0
        full.tensors[key].view(-1)[3] += amount if full.tensors[key].view(-1)[3] < 100 else -amount
        assert verdict(full, computed)[0].failed == 1, key
    full = copy.deepcopy(recording)
    full.tensors["first_step_attention_mask_packed"] = computed.tensors["first_step_attention_mask_packed"].clone()
    full.tensors["first_step_attention_mask_packed"][0, 7, 3] ^= 1
    assert verdict(full, computed)[0].failed == 1


def test_a_little_off_passes(drawn):
    recording, computed = drawn
    near = copy.deepcopy(recording)
    near.tensors["step_latents"][2] += 5e-5
    near.tensors["step_prediction"] += 2e-4
    report, _ = verdict(near, computed)
    assert report.failed == 0 and report.passed > 8


def test_what_nothing_computes_is_named_and_counted(drawn):
    recording, computed = drawn
    more = copy.deepcopy(recording)
    more.tensors["stage0.unheard_of"] = torch.zeros(1)
    more.meta["stages"][0]["unheard"] = 1
    report, lines = verdict(more, computed)
    assert (report.failed, report.missing) == (0, 1)
    assert "missing  stage0.unheard_of, stage0.unheard" in lines


def flipped(recording, computed, step):
    """A recording whose steps from `step` on went another way."""
    other = copy.deepcopy(recording)
    for key in ("step_prediction", "step_latents"):
        other.tensors[key][step:] += 0.1
    other.meta["latents_std"][step:] = [9.0] * (4 - step)
    return other


def test_after_a_flipped_router_tie_only_the_steps_before_it_count(drawn):
    recording, computed = drawn
    gaps = {0: 1e-3, 1: 1e-3, 2: 1e-6, 3: 1e-3}
    other = flipped(recording, computed, 2)
    report, lines = verdict(other, computed, gaps)
    assert report.failed == 0 and "only before step 2" in lines
    assert verdict(other, computed)[0].failed == 2  # no tie was recorded
    assert verdict(other, computed, gaps | {2: 1e-3})[0].failed == 2  # no tie of ours in that step
    assert verdict(flipped(recording, computed, 1), computed, gaps)[0].failed == 2  # off before it
    wrong = copy.deepcopy(other)
    wrong.tensors["stage0.tokens"][0, 0] += 1
    assert verdict(wrong, computed, gaps)[0].failed == 1


def test_a_tie_flipped_in_the_first_step_leaves_the_layers_before_it(drawn):
    recording, computed = drawn
    other = flipped(recording, computed, 0)
    other.tensors["hidden_probe"] = computed.tensors["hidden_probe"].clone()
    other.tensors["hidden_probe"][2:] += 1
    report, lines = verdict(other, computed, {0: 1e-6, 1: 1e-3, 2: 1e-3, 3: 1e-3})
    assert report.failed == 0 and "only before step 0" in lines
    other.tensors["hidden_probe"][0] += 1  # no router comes before the first layer
    assert verdict(other, computed, {0: 1e-6, 1: 1e-3, 2: 1e-3, 3: 1e-3})[0].failed == 1


def test_our_own_router_gaps_are_measured_where_the_recording_names_a_tie(bench):
    recorded = bench.router_gaps[SCENARIO]
    tied = Bench(GOLDEN)
    tied.router_gaps = {SCENARIO: 1e-6}
    with torch.no_grad():
        computed = Computed()
        scenarios.compute(tied, bench.read("scenarios", SCENARIO), computed)
    gaps = computed.gaps["steps"]
    assert sorted(gaps) == [0, 1, 2, 3]
    assert min(gaps.values()) == pytest.approx(recorded, abs=1e-5)


def test_router_gaps_are_measured_per_row_of_a_text_stage(bench):
    tied = Bench(GOLDEN)
    tied.router_gaps = {WITH_PICTURE: 1e-6}
    recording, computed = answered(tied, WITH_PICTURE)
    assert sorted(computed.gaps["stage0"]) == list(range(len(recording.tensors["stage0.logits"])))
    found = min(min(gaps.values()) for gaps in computed.gaps.values())
    assert found == pytest.approx(bench.router_gaps[WITH_PICTURE], abs=1e-5)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("attention", "layer_out"),
        ("attention", "mask"),
        ("embedders", "embedder.sinusoid"),
        ("embedders", "patch_embed.out"),
        ("embedders", "embedder.timestep_r_emb"),
        ("moe", "topk_index"),
        ("moe", "out_drop_True"),
        ("moe_bf16", "out_eager"),
        ("ratio_logits", "conditional_argmax"),
        ("ratio_logits", "sliced"),
        ("ratio_logits", "sliced_argmax"),
        ("rope", "layout0.pos_yx"),
        ("rope", "layout2.sin"),
        ("scheduler", "shift3.0_steps4.sample_end"),
        ("taylor", "low2"),
        ("taylor_orders", "case1.predict3_distance2"),
        ("vae", "decode0.pixels"),
        ("vae", "trace.encoder.mid.attn_1"),
    ],
)
def test_one_wrong_number_of_a_component_fails(bench, name, key):
    recording = bench.read("components", name)
    wrong = recording.tensors[key].view(-1)
    wrong[0] += 1
    report, out = Report(), io.StringIO()
    with redirect_stdout(out), torch.no_grad():
        components.check(bench, recording, report)
    assert report.failed == 1 and f"1 off: {key}" in out.getvalue()


@pytest.mark.parametrize("name", ["chat_templates", "resolutions", "system_prompts", "tokenizer"])
def test_one_wrong_row_of_a_component_fails(bench, name):
    recording = bench.read("components", name)
    table = {
        "chat_templates": lambda meta: meta["rows"][3]["tokens"][0].append(1),
        "resolutions": lambda meta: meta["groups"]["256"][5].reverse(),
        "system_prompts": lambda meta: meta["rows"][20].update(result="no"),
        "tokenizer": lambda meta: meta["encode"][1]["ids"].pop(),
    }
    table[name](recording.meta)
    report = Report()
    with redirect_stdout(io.StringIO()):
        components.check(bench, recording, report)
    assert report.failed == 1


def test_a_wrong_recording_fails_from_the_command_line_and_is_dumped(folder):
    def perturb(tensors):
        tensors["step_latents"][-1, 0, 0, 0, 0] += 2e-4

    put(folder, "scenarios", SCENARIO, change_tensors=perturb, new_name="of_any_name")
    code, lines = judge(folder, "--dump", folder / "out")
    assert code == FAILED and lines[-1].endswith("1 failed, 0 missing")
    assert [line.split()[0] for line in lines if "FAIL" in line] == ["of_any_name"]
    ours = dumped_like_the_recording(SCENARIO, folder / "out" / "of_any_name.safetensors")
    assert {"step_raw_prediction", "hidden_probe", "image_uint8"} <= ours


def dumped_like_the_recording(name, dump):
    """Checks a dump's shapes and dtypes against the recording's; returns its keys."""
    with safe_open(GOLDEN / "scenarios" / f"{name}.safetensors", "pt") as theirs, safe_open(dump, "pt") as ours:
        inputs = {key for key in theirs.keys() if key.endswith(".probe_index")}
        assert set(theirs.keys()) - set(ours.keys()) == inputs
        for key in set(theirs.keys()) - inputs:
            assert ours.get_slice(key).get_shape() == theirs.get_slice(key).get_shape(), key
            assert ours.get_slice(key).get_dtype() == theirs.get_slice(key).get_dtype(), key
        return set(ours.keys())


def test_everything_of_text_and_pictures_is_dumped(folder):
    (folder / "images").symlink_to(GOLDEN / "images", target_is_directory=True)
    put(folder, "scenarios", WITH_PICTURE)
    code, _ = judge(folder, "--dump", folder / "out")
    assert code == PASSED
    ours = dumped_like_the_recording(WITH_PICTURE, folder / "out" / f"{WITH_PICTURE}.safetensors")
    assert {"stage1.cond_vae_mean_0", "stage0.logits", "image_uint8", "image_postprocessed_uint8"} <= ours
    with safe_open(folder / "out" / f"{WITH_PICTURE}.safetensors", "pt") as dump:
        assert dump.get_tensor("stage0.logits").isfinite().all()


@pytest.mark.parametrize(
    ("change", "feature"),
    [
        (lambda meta: meta["stages"].insert(0, {"mode": "gen_text"}), "2 stages, where this package makes 1"),
        (lambda meta: meta["call"].update(image_size="auto"), "1 stages, where this package makes 2"),
        (lambda meta: meta.update(images=["absent.png"]), "no picture absent.png"),
        (lambda meta: meta["call"].update(message_list=[{}]), "message lists"),
        (lambda meta: meta["call"].update(prompt=["one", "two"]), "several requests at once"),
        (lambda meta: meta.update(checkpoint="other"), "no checkpoint other"),
    ],
)
def test_a_missing_feature_is_named_and_must_be_allowed(folder, change, feature):
    put(folder, "scenarios", SCENARIO, change_meta=change)
    code, _ = judge(folder, "--allow-missing")
    assert code == NOTHING_COMPARED
    put(folder, "components", "rope")
    code, lines = judge(folder)
    assert code == MISSING and lines[-1] == "2 passed, 0 failed, 1 missing"
    assert any(line.startswith(SCENARIO) and feature in line for line in lines)
    assert judge(folder, "--allow-missing")[0] == PASSED


def test_an_unknown_component_is_missing(folder):
    put(folder, "components", "rope", new_name="rope_of_tomorrow")
    put(folder, "components", "rope")
    code, lines = judge(folder)
    assert code == MISSING and lines[-1].endswith("1 missing")


def test_a_folder_with_nothing_in_it_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path), "--allow-missing"]) == NOTHING_COMPARED
    assert "Nothing was compared" in capsys.readouterr().err
    assert main([str(tmp_path / "no_such_folder")]) == NOTHING_COMPARED


def test_a_broken_recording_fails_and_the_others_are_still_compared(folder):
    put(folder, "components", "rope")
    (folder / "components" / "resolutions.json").write_text("{", encoding="utf-8")
    code, lines = judge(folder)
    assert code == FAILED and lines[-1] == "2 passed, 1 failed, 0 missing"


def test_not_a_number_never_passes():
    ours, theirs = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])
    assert not compare("x", ours, theirs, COMPONENT).passed
    assert not compare("x", theirs, ours, COMPONENT).passed
    assert not compare("x", torch.ones(2, 1), torch.ones(2), COMPONENT).passed
    assert not compare("x", [1, 2], [1, 3], IDENTICAL).passed
    assert compare("x", ((1, 2),), [[1, 2]], IDENTICAL).passed


# other ways to hold the weights


@pytest.mark.parametrize(
    "way",
    [
        ["--streaming", 3],
        ["--streaming", 2, "--disk"],
        ["--split"],
        ["--split", "--streaming", 3],
        ["--packed"],
        ["--packed", "--split", "--streaming", 3, "--disk"],
    ],
    ids=lambda way: " ".join(map(str, way)),
)
def test_every_committed_scenario_is_met_in_every_way_to_hold_the_weights(way):
    code, lines = judge(GOLDEN, *way, "--only", "[CDEHI]*")
    assert code == PASSED, [line for line in lines if "FAIL" in line]
    assert int(lines[-1].split()[0]) > 50


# other weight formats


@pytest.mark.parametrize("weight_format", list(LIMITS))
def test_every_format_stays_within_its_stated_error(weight_format):
    code, lines = judge(GOLDEN, "--format", weight_format, "--only", "[CH]*")
    assert code == PASSED, lines
    assert "relative error (step_latents of the last step)" in "\n".join(lines)
    assert not any("token ids" in line for line in lines), "what a format may change is compared, nothing else"


def test_a_format_past_its_stated_error_fails(monkeypatch):
    monkeypatch.setitem(LIMITS, "int4", Limits(0.2, 0.2, 0.02, 1.0, 1.0))
    code, lines = judge(GOLDEN, "--format", "int4", "--only", "C*")
    assert code == FAILED
    assert any("FAIL" in line for line in lines)


def test_a_format_that_is_typically_too_far_off_fails(monkeypatch):
    monkeypatch.setitem(LIMITS, "int8", Limits(1.0, 1.0, 1.0, 1.0, 0.01))
    code, lines = judge(GOLDEN, "--format", "int8", "--only", "[CDHI]*")
    assert code == FAILED
    assert [line for line in lines if "FAIL" in line] == [line for line in lines if line.startswith("all ")]
