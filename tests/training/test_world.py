"""The small world and its texts: the same from the same seed, the held-out part apart, the texts true and short."""

import random
import re
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from hunyuan3.image.resolution import ResolutionTable
from training.captions import random_prompt
from training.edits import EDIT_KINDS, random_edit
from training.fusion import random_fusion
from training.lessons import Curriculum, make_lessons
from training.questions import QUESTION_KINDS, random_question
from training.run import DISTIL, EDITS, INSTRUCT, POLISH, TURNS
from training.scene import COLOURS, PLACES, Background, Scene, place
from training.thoughts import rewrite, thought
from training.tokenizer import train_tokenizer
from training.transformer import TransformerStageConfig
from training.wanted import Wanted
from training.words import COLOUR_WORDS, PLACE_PHRASES, SHAPE_WORDS, background_phrases, description, size_word
from training.world import (
    FORMATS,
    HABITS,
    fits,
    format_of,
    is_held_out,
    put,
    scenes,
    split_scene,
    stream,
    suited_format,
)


def arrangement(scene):
    pairs = zip(scene.objects, scene.places, strict=True)
    return tuple(sorted((item.shape, item.colour, where) for item, where in pairs))


def last_words(phrase, language):
    """A place without "in the", which "move to the" replaces."""
    return phrase.split(" the ")[1] if language == "en" else phrase


def test_the_same_seed_gives_the_same_scenes_and_texts():
    for split in ("train", "held-out"):
        assert list(islice(scenes(split, 5), 20)) == list(islice(scenes(split, 5), 20))
        assert random_edit(stream(split, 5), split) == random_edit(stream(split, 5), split)
        assert random_question(stream(split, 5), split) == random_question(stream(split, 5), split)
    scene = next(scenes("train", 5))
    assert random_prompt(random.Random(1), scene) == random_prompt(random.Random(1), scene)


def test_no_arrangement_is_in_both_splits():
    train = {arrangement(scene) for scene in islice(scenes("train", 0, 1), 5000)}
    held_out = {arrangement(scene) for scene in islice(scenes("held-out", 0, 1), 500)}
    assert train and held_out and not train & held_out


def test_what_training_shows_is_never_held_out():
    rng = stream("train", 1)
    for _ in range(40):
        edit = random_edit(rng, "train")
        assert not is_held_out(edit.before) and not is_held_out(edit.after)
        fusion = random_fusion(rng, "train")
        assert not any(map(is_held_out, (*fusion.inputs, fusion.after)))
        assert not is_held_out(random_question(rng, "train").scene)
        assert is_held_out(random_question(rng, "held-out").scene)


@pytest.mark.parametrize("stage", [TransformerStageConfig(), INSTRUCT, POLISH, TURNS, EDITS, DISTIL])
def test_no_lesson_shows_a_held_out_scene(stage):
    scenes, lessons = make_lessons(random.Random(0), 1500, stage.curriculum)
    assert len(lessons) >= 1500
    assert not any(map(is_held_out, scenes))


def test_formats_are_rows_of_the_resolution_table():
    rows = ResolutionTable.build(128, 33).rows
    assert all(rows.count(size) == 1 for size in FORMATS.values())


def test_objects_lie_where_they_are_said_to_lie():
    rng = random.Random(0)
    for height, width in FORMATS.values():
        for where in (name for row in PLACES for name in row):
            item = put(rng, "star", "red", 40, where, width, height)
            assert item is not None and place(item.x, item.y, width, height) == where


def test_the_suited_format_follows_the_places():
    assert suited_format(["left", "right"]) == "wide"
    assert suited_format(["bottom", "top", "middle"]) == "very tall"
    assert suited_format(["top left", "right"]) == "square"
    assert suited_format(["middle"]) == "square"


def test_prompts_name_what_they_want_and_nothing_else():
    rng = stream("train", 2)
    for scene in islice(scenes("train", 2), 300):
        prompt = random_prompt(rng, scene, "en")
        for item, wish in zip(scene.objects, prompt.wanted.objects, strict=True):
            assert SHAPE_WORDS["en"][item.shape] in prompt.text
            assert wish.colour in (None, item.colour) and wish.shape == item.shape
        behind = prompt.wanted.background
        named = {wish.colour for wish in prompt.wanted.objects} | {behind and behind.colour, behind and behind.second}
        assert set(re.findall("|".join(COLOURS), prompt.text.lower())) == named - {None}
        sizes = sorted(word for item in scene.objects if (word := size_word(item.size, "en")))
        assert sorted(re.findall(r"\b(?:small|big)\b", prompt.text.lower())) == sizes
        whole = description(scene, "en")
        assert sorted(re.findall(r"\b(?:small|big)\b", whole.lower())) == sizes
        assert all(PLACE_PHRASES["en"][where][0] in whole for where in scene.places)
        for wish in prompt.wanted.objects:
            if wish.place:
                assert any(phrase in prompt.text for phrase in PLACE_PHRASES["en"][wish.place])
        complete = random_prompt(rng, scene, kind="complete")
        assert all(wish.colour and wish.place for wish in complete.wanted.objects)
        short = random_prompt(rng, scene, "en", kind="short")
        assert short.wanted.background is None and "background" not in short.text
        assert all(wish.colour and not wish.place for wish in short.wanted.objects)
        for silent in (prompt, short):
            if not any(wish.place for wish in silent.wanted.objects):
                assert not any(words in silent.text for phrases in PLACE_PHRASES["en"].values() for words in phrases)


def test_places_that_a_habitual_prompt_leaves_open_are_the_habitual_ones():
    rng = stream("train", 10)
    open_ones = {True: 0, False: 0}
    for number in range(400):
        scene = split_scene(rng, "train", habitual=number % 2 == 0)
        if number % 2 == 0:
            assert scene.places == HABITS[len(scene.objects)]
        prompt = random_prompt(rng, scene, kind=rng.choice(("open", "short")), habitual=True)
        is_open = any(wish.place is None for wish in prompt.wanted.objects)
        assert not is_open or scene.places == HABITS[len(scene.objects)]
        open_ones[number % 2 == 0] += is_open
    assert open_ones[True] > 100  # such scenes' prompts do leave places open
    assert open_ones[False] < 20  # others only where the scene happens to be habitual


def test_what_is_drawn_at_once_was_taught_to_lie_where_habit_has_it():
    curriculum = Curriculum(complete=0.3, repeats=2)
    scenes, lessons = make_lessons(random.Random(0), 1500, curriculum)
    said = {word for phrases in PLACE_PHRASES.values() for names in phrases.values() for word in names}
    silent = [lesson for lesson in lessons if not any(word in lesson.prompt for word in said)]
    direct = [scenes[lesson.scene] for lesson in silent if not lesson.trace]
    written = [scenes[lesson.scene] for lesson in silent if lesson.trace]
    assert len(direct) > 100 and all(scene.places == HABITS[len(scene.objects)] for scene in direct)
    assert any(scene.places != HABITS[len(scene.objects)] for scene in written)


def test_a_format_that_does_not_suit_is_named():
    rng = stream("train", 4)
    for scene in islice(scenes("train", 4), 200):
        if format_of(scene) != suited_format(scene.places):
            assert "picture" in random_prompt(rng, scene, "en").text.lower()


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_edits_change_what_they_say(kind):
    rng = stream("train", 6)
    for _ in range(60):
        edit = random_edit(rng, "train", kind, complete=True)
        assert edit.kind == kind and edit.before != edit.after and fits(edit.after)
        assert (edit.before.width, edit.before.height) == (edit.after.width, edit.after.height)
        assert edit.wanted == Wanted.whole(edit.after)
        kept = set(edit.before.objects) & set(edit.after.objects)
        assert set(edit.before.objects) | set(edit.after.objects) == kept | set(edit.changed)
        language, text, said = edit.language, edit.text.lower(), edit.summary.lower()
        if kind == "background":
            phrases = [phrase.lower() for phrase in background_phrases(edit.after.background, language)]
            assert any(phrase in text for phrase in phrases) and phrases[0] in said
            continue
        then = edit.changed[-1]  # as it is, or was
        assert SHAPE_WORDS[language][then.shape].lower() in text
        assert SHAPE_WORDS[language][then.shape].lower() in said
        alike = sum(item.shape == then.shape for item in edit.before.objects)
        if alike > 1 and kind != "add":
            assert COLOUR_WORDS[language][edit.changed[0].colour] in said
        if kind in ("recolour", "add"):
            assert COLOUR_WORDS[language][then.colour] in text
            assert COLOUR_WORDS[language][then.colour] in said
        if kind == "add":
            assert size_word(then.size, language) in text
        if kind == "move":
            where = edit.after.places[edit.after.objects.index(then)]
            assert any(last_words(phrase, language) in text for phrase in PLACE_PHRASES[language][where])


@pytest.mark.parametrize(("stage", "least", "most"), [(TURNS, 0.2, 0.5), (EDITS, 0.75, 0.9)])
def test_lessons_of_the_last_stage_mostly_pick_one_of_several_objects(stage, least, most):
    """A recoloured, removed or moved object beside one that stays; 0.7 of the edits, and two fifths of the rest."""
    made, lessons = make_lessons(random.Random(0), 2000, stage.curriculum)
    edits = [lesson for lesson in lessons if lesson.inputs and lesson.scene is not None and not lesson.first]
    edits = [(made[lesson.inputs[0]], made[lesson.scene]) for lesson in edits if len(lesson.inputs) == 1]
    picks = [
        (before, after)
        for before, after in edits
        if len(before.objects) > 1
        and len(after.objects) <= len(before.objects)
        and set(before.objects) - set(after.objects)
    ]
    assert len(edits) > 300
    assert least <= len(picks) / len(edits) <= most
    for before, after in picks:
        assert len(set(before.objects) - set(after.objects)) == 1 and before.background == after.background


def test_second_turns_change_what_the_first_asked_for():
    """Same language, and the same written in both; the first turn's prompt and trace are about the picture shown."""
    made, lessons = make_lessons(random.Random(0), 2000, TURNS.curriculum)
    seconds = [lesson for lesson in lessons if lesson.first]
    assert len(seconds) > 100
    for lesson in seconds:
        before, after = made[lesson.inputs[0]], made[lesson.scene]
        language = "en" if lesson.first.isascii() else "zh"
        assert lesson.prompt.isascii() == (language == "en")
        (item,) = before.objects
        assert COLOUR_WORDS[language][item.colour] in lesson.first.lower()
        assert SHAPE_WORDS[language][item.shape].lower() in lesson.first.lower()
        assert f"<recaption>{rewrite(before, language)}</recaption>" in lesson.first_trace
        assert f"<recaption>{rewrite(after.read(), language)}</recaption>" in lesson.trace
        assert ("<think>" in lesson.first_trace) == ("<think>" in lesson.trace)
    assert {len(made[lesson.scene].objects) for lesson in seconds} == {1, 2}
    assert {"<think>" in lesson.trace for lesson in seconds} == {True, False}


def test_fusions_take_shape_colour_and_background():
    rng = stream("train", 7)
    for count in (2, 3):
        fusion = random_fusion(rng, "train", count)
        (item,) = fusion.after.objects
        assert item.shape == fusion.inputs[0].objects[0].shape
        assert item.colour == fusion.inputs[1].objects[0].colour
        assert fusion.after.background == fusion.inputs[0 if count == 2 else 2].background
        assert len({(scene.height, scene.width) for scene in (*fusion.inputs, fusion.after)}) == 1


def test_the_thought_of_a_fusion_says_what_comes_from_where():
    rng = stream("train", 9)
    thoughts = {}
    while len(thoughts) < 4:
        fusion = random_fusion(rng, "train")
        thoughts.setdefault((fusion.language, len(fusion.inputs)), (fusion, fusion.summary))
    for (language, count), (fusion, said) in thoughts.items():
        (item,) = fusion.after.objects
        assert SHAPE_WORDS[language][item.shape] in said
        assert COLOUR_WORDS[language][item.colour] in said
        behind = background_phrases(fusion.after.background, language)[0]
        assert (behind in said) == (count == 3)


def test_scenes_have_few_sizes_and_places():
    found = {}
    for scene in islice(scenes("train", 3, 1), 1000):
        if scene.width == scene.height:
            (item,) = scene.objects
            found.setdefault(item.size, set()).add(item.x)
    assert found == {
        40: {21, 23, 62, 66, 105, 107},
        52: {27, 29, 62, 66, 99, 101},
        68: {35, 37, 62, 66, 91, 93},
    }


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_questions_have_true_answers(kind):
    rng = stream("train", 8)
    for _ in range(60):
        question = random_question(rng, "train", kind)
        language, scene = question.language, question.scene
        about = [item for item in scene.objects if SHAPE_WORDS[language][item.shape].lower() in question.text.lower()]
        match kind:
            case "count":
                words = {"One.": 1, "Two.": 2, "Three.": 3, "一个。": 1, "两个。": 2, "三个。": 3}
                assert words[question.answer] == len(about or scene.objects)
            case "colour":
                (item,) = about
                assert question.answer.lower().rstrip(".。") == COLOUR_WORDS[language][item.colour]
            case "place":
                (item,) = about
                where = scene.places[scene.objects.index(item)]
                assert question.answer.lower().rstrip(".。") == PLACE_PHRASES[language][where][0]
            case "shape":
                asked = max(
                    (where for where in scene.places if PLACE_PHRASES[language][where][0] in question.text), key=len
                )
                item = scene.objects[scene.places.index(asked)]
                for word in (COLOUR_WORDS[language][item.colour], SHAPE_WORDS[language][item.shape]):
                    assert word.lower() in question.answer.lower()
            case _:
                assert question.answer == description(scene.read(), language)


def test_what_is_said_about_a_picture_does_not_depend_on_the_order_its_objects_were_made_in():
    several = 0
    for scene in islice(scenes("train", 13), 100):
        turned = replace(scene, objects=scene.objects[::-1])
        assert description(scene.read(), "en") == description(turned.read(), "en")
        several += description(scene, "en") != description(turned, "en")
    assert several > 30
    first = put(random.Random(0), "star", "red", 40, "top right", 128, 128)
    second = put(random.Random(0), "heart", "blue", 40, "left", 128, 128)
    scene = Scene(128, 128, Background("plain", "white"), (second, first))
    assert scene.read().objects == (first, second)


def test_every_count_is_asked_for_as_often():
    rng = stream("train", 11)
    counts, ones = Counter(), 0
    for _ in range(600):
        question = random_question(rng, "train", "count")
        objects = any(word in question.text for word in ("objects", "物体"))
        counts[objects, question.answer.rstrip(".。").rstrip("个").lower()] += 1
        ones += len(question.scene.objects) == 1
    for objects in (True, False):
        total = sum(count for (kind, _), count in counts.items() if kind == objects)
        for words in (("one", "一"), ("two", "两"), ("three", "三")):
            assert 0.25 < sum(counts[objects, word] for word in words) / total < 0.42
    assert ones < 200  # "one circle" is asked of pictures with other objects, too


def test_questions_about_several_objects_are_mostly_that():
    rng = stream("train", 12)
    for kind in ("colour", "place", "shape", "caption"):
        objects = [len(random_question(rng, "train", kind, several=True).scene.objects) for _ in range(100)]
        assert sum(count > 1 for count in objects) > 55


def test_texts_are_short_in_tokens_and_come_back_whole():
    tokenizer = train_tokenizer()
    rng = stream("train", 9)
    lengths = {"thought": [], "rewrite": []}
    for scene in islice(scenes("train", 9, 2), 100):
        prompt = random_prompt(rng, scene)
        texts = {"thought": thought(prompt, scene), "rewrite": rewrite(scene, prompt.language)}
        for name, text in texts.items():
            ids = tokenizer.encode(text).ids
            assert tokenizer.decode(ids) == text
            lengths[name].append(len(ids))
    assert max(lengths["thought"]) <= 62 and max(lengths["rewrite"]) <= 44
    assert tokenizer.get_vocab_size() <= 1024
    assert tokenizer.token_to_id("<img_ratio_32>") is not None and tokenizer.token_to_id("<img_ratio_33>") is None
    assert len(tokenizer.encode("an apple, ein Äpfelchen 苹果 🍎").ids) > 5  # any text at all has ids
