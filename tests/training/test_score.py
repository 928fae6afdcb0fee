"""The scorer: full marks for a candidate that does everything right, none for one that does not listen."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hunyuan3.image.resolution import ResolutionTable
from hunyuan3.pipeline import Hunyuan3
from hunyuan3.tiny import make_tiny
from training.candidate import MODES, Candidate, Drawing
from training.ceiling import gate
from training.draw import draw
from training.exam import DrawingTask, QuestionTask, exam
from training.run import train
from training.score import main, score
from training.state import load_state, save_state
from training.vae import VAEStage, VAEStageConfig
from training.words import description
from training.world import is_held_out

ROWS = ResolutionTable.build(128, 33)


def perfect_drawing(task, mode):
    trace = "" if mode == "direct" else f"<recaption>{description(task.scene, task.language)}</recaption>"
    return Drawing(draw(task.scene), trace, ROWS.nearest(task.scene.height, task.scene.width))


def perfect():
    return SimpleNamespace(rows=ROWS, draw=perfect_drawing, answer=lambda task: task.answer)


def deaf():
    """Draws the same scene whatever is asked, and gives every picture back unchanged."""
    scene = next(task.scene for task in exam(20, seed=99) if isinstance(task, DrawingTask) and task.kind == "three")

    def drawing(task, mode):
        return Drawing(draw(task.inputs[0] if task.inputs else scene), "", None)

    return SimpleNamespace(rows=ROWS, draw=drawing, answer=lambda task: "Yes.")


def test_a_perfect_candidate_gets_full_marks(tmp_path):
    results = score(perfect(), exam(20), MODES, tmp_path)
    assert results.last_line == "score: one-object 1.00 two-object 1.00 edit 1.00 ask 1.00"
    assert "0." not in results.table
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(results.rows)
    assert all((tmp_path / line["file"]).exists() and line["prompt"] for line in lines)
    assert (tmp_path / "sheet-edit-move-think.png").exists()
    found = next(line["found"] for line in lines if line["kind"] == "one")
    assert len(found["objects"]) == 1 and found["objects"][0]["shape"] and found["background"]["colour"]
    (tmp_path / "table.md").write_text("of before")
    draw(exam(20)[0].scene).save(tmp_path / "mine.png")
    score(perfect(), exam(20)[:1], ["direct"], tmp_path)  # again: nothing of before is left
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".jsonl"}
    assert {path.name for path in tmp_path.glob("*.png")} == {"mine.png", "one-direct-000.png", "sheet-one-direct.png"}


def test_a_deaf_candidate_gets_none():
    results = score(deaf(), exam(20), ["direct"])
    assert results.last_line == "score: one-object 0.00 two-object 0.00 edit 0.00 ask 0.00"
    edits = [row for row in results.rows if row.preserved is not None]
    assert edits and all(row.preserved == 1 for row in edits)


def test_short_prompts_are_judged_by_what_they_ask_for():
    tasks = [task for task in exam(40) if task.kind == "short"]
    assert len({task.text for task in tasks}) == len(tasks) == 8
    for row in score(perfect(), tasks, ["direct", "rewrite"]).rows:
        assert row.marks.all == 1 and row.text is None and row.ratio is None
    for row in score(perfect(), [task for task in exam(40) if task.kind == "two"], ["rewrite"]).rows:
        assert row.text is not None and row.ratio is not None


def test_the_exam_is_held_out_and_names_everything():
    tasks = exam(40)
    assert tasks == exam(40) and tasks != exam(40, seed=1)
    assert all(is_held_out(task.scene) for task in tasks)
    for task in tasks:
        if isinstance(task, DrawingTask) and not task.inputs:
            assert all(wish.colour and wish.shape for wish in task.wanted.objects)
            assert all((wish.place is None) == (task.kind == "short") for wish in task.wanted.objects)
    drawn = [task.kind for task in exam(200) if isinstance(task, DrawingTask) and not task.inputs]
    assert len(drawn) == 240 and drawn.count("short") == 40
    assert sum(isinstance(task, QuestionTask) for task in exam(200)) == 100
    seconds = [task for task in exam(200) if task.kind == "turn 2"]
    assert len(seconds) == 20 and all(task.first and len(task.inputs) == 1 for task in seconds)
    assert all(is_held_out(task.inputs[0]) for task in seconds)


def test_a_second_turn_is_told_what_the_first_one_asked(tmp_path):
    """The rows that are drawn from: the first request, what was written to that, the picture, the second request."""
    model = Hunyuan3.load(make_tiny(tmp_path / "tiny"), device="cpu", dtype="float32")
    task = next(task for task in exam(20) if task.kind == "turn 2")
    asked = []

    class Listening:
        def __getattr__(self, name):
            return getattr(model, name)

        def conditioning(self, prompt, **others):
            asked.append(model.conditioning(prompt, **others))
            return asked[-1]

    candidate = Candidate(Listening(), {"steps": 1})
    for mode in ("direct", "rewrite"):
        assert candidate.draw(task, mode).picture.size == (task.scene.width, task.scene.height)
    for conditioning in asked:
        text = model.folder.tokenizer.decode(conditioning.rows.sequence.ids)
        assert text.index(task.first) < text.index("<boi>") < text.index(task.text)
        assert text.count("User: ") == 2
    assert len(asked[0].rows.sequence.ids) < len(asked[1].rows.sequence.ids)


def test_the_gate_is_told_of_a_vae_before_there_is_a_folder(tmp_path, capsys):
    true, upside_down = gate(lambda pictures: pictures, count=4), gate(lambda pictures: pictures[:, ::-1], count=4)
    assert true.reached and not upside_down.reached
    assert true.line.endswith("three-object 1.000 (shape 1.000), 4 scenes each, reaches the gate")
    stage = VAEStage(replace(VAEStageConfig(), steps=0), torch.float32)
    train(stage, tmp_path / "vae.pt", minutes=0)
    assert main([str(tmp_path / "vae.pt"), "--vae", "--prompts", "4"]) == 1
    save_state(tmp_path / "other.pt", {**load_state(tmp_path / "vae.pt"), "name": "polish"})
    line = capsys.readouterr().out.strip()
    assert main([str(tmp_path / "other.pt"), "--vae", "--prompts", "4"]) == 1
    assert "other.pt is a state of the stage 'polish', not of 'vae'" in capsys.readouterr().err
    save_state(tmp_path / "tensors.pt", {"weight": torch.zeros(1)})
    assert main([str(tmp_path / "tensors.pt"), "--vae", "--prompts", "4"]) == 1
    assert "tensors.pt is no state file" in capsys.readouterr().err
    assert line.startswith("ceiling: one-object 0.") and line.endswith("misses the gate")


def test_the_command_scores_a_checkpoint(tmp_path, capsys):
    folder = make_tiny(tmp_path / "tiny")
    command = [str(folder), "--prompts", "1", "--kinds", "one", "ask colour", "--modes", "direct", "--steps", "1"]
    assert main([*command, "--dump", str(tmp_path / "dump")]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == f"`python -m training.score {' '.join(command)} --dump {tmp_path / 'dump'}`"
    assert lines[2].startswith("| kind | mode | n | count | colour | shape | place | all | size |")
    assert (tmp_path / "dump" / "table.md").read_text(encoding="utf-8").splitlines() == lines
    assert lines[-1] == "score: one-object 0.00 two-object - edit - ask 0.00"
    assert (tmp_path / "dump" / "one-direct-000.png").exists()


def test_edits_that_pick_are_of_two_objects_and_change_one():
    tasks = [task for task in exam(60) if task.kind.startswith("pick ")]
    assert Counter(task.kind for task in tasks) == {"pick recolour": 3, "pick remove": 3, "pick move": 3}
    for task in tasks:
        before, after = task.inputs[0], task.scene
        assert len(before.objects) == 2 and len(set(before.objects) & set(after.objects)) == 1
        assert task.is_edit and is_held_out(before) and is_held_out(after)


def test_only_direct_drawings_count_in_the_last_line():
    tasks = [task for task in exam(20) if task.kind.startswith(("one", "two", "edit", "ask"))]
    assert score(perfect(), tasks, ["rewrite"]).last_line == "score: one-object - two-object - edit - ask 1.00"


def test_kinds_that_are_none_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(make_tiny(tmp_path / "tiny")), "--prompts", "1", "--kinds", "one", "edits"])
    assert "edit recolour" in capsys.readouterr().err


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
