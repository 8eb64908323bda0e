"""The training world: splits do not overlap, questions have the answers their scenes show."""

import random
from dataclasses import replace

import numpy as np
import pytest

from mmlora.assets.training import pictures, world
from mmlora.assets.training.evaluate import Case, Metric, normalize
from mmlora.assets.training.metrics import word_errors
from mmlora.assets.training.pictures import Shape
from mmlora.assets.training.text_tasks import SPANISH, sample_text_item
from mmlora.assets.training.train_patches import count_targets, patch_targets


def test_sentences_of_both_splits_are_disjoint_and_of_the_world() -> None:
    rng = random.Random(0)
    trained = {world.sample_sentence(rng, held_out=False) for _ in range(3000)}
    held_out = {world.sample_sentence(rng, held_out=True) for _ in range(500)}
    assert not trained & held_out
    for sentence in trained | held_out:
        words = sentence.split()
        assert 2 <= len(words) <= 12
        assert set(words) <= set(world.WORDS)


def test_sums_add_up_and_stay_within_twenty() -> None:
    rng = random.Random(0)
    for held_out in (False, True):
        for _ in range(300):
            sentence, answer = world.sample_sum(rng, held_out=held_out)
            left, sign, right = sentence.split()[-3:]
            a, b = world.NUMBERS.index(left), world.NUMBERS.index(right)
            assert world.NUMBERS.index(answer) == (a + b if sign == "plus" else a - b)
            assert world.is_held_out(sentence) == held_out


def test_every_generated_question_has_the_answer_found_from_its_text() -> None:
    rng = random.Random(0)
    for _ in range(600):
        scene, question = pictures.sample_picture_question(rng)
        if question.task == "describe":
            assert question.answer.count(" and ") == len(scene.shapes) - 1
        else:
            assert pictures.answer(scene, question.text) == question.answer


def test_a_spoken_question_gets_a_scene_with_a_clear_answer() -> None:
    rng = random.Random(0)
    for _ in range(60):
        text = pictures.sample_spoken_question(rng, held_out=True)
        scene, answer = pictures.scene_for(text, rng)
        assert answer == pictures.answer(scene, text)


def test_pictures_depend_on_the_scene_alone() -> None:
    scene = pictures.sample_scene(random.Random(1))
    assert pictures.draw(scene).tobytes() == pictures.draw(scene).tobytes()
    assert pictures.draw(scene).size == (112, 112)


def test_a_shape_ends_in_its_patch_and_cell() -> None:
    shape = Shape("circle", "red", "big", x=40, y=30, radius=20)
    assert divmod(shape.patch, 8) == (3, 2)  # y = 30 + 17, x = 40, in patches of 14 px
    assert divmod(shape.cell, 4) == (1, 1)
    assert replace(shape, y=91).patch // 8 == 7


def test_a_question_knows_the_cells_of_the_shapes_it_names() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene, question = pictures.sample_picture_question(rng, rng.choice(("color", "relation")))
        words = question.text.split()
        kinds = [word for word in words if word in pictures.SHAPES]
        assert [kind for kind, _ in question.named] == kinds
        for kind, cell in question.named:
            assert any((shape.kind, shape.cell) == (kind, cell) for shape in scene.shapes)


def test_targets_of_the_vision_tower_say_what_ends_where_and_how_many_there_are() -> None:
    shapes = (Shape("star", "red", "big", 30, 40, 20), Shape("star", "blue", "little", 80, 20, 8))
    scene = pictures.Scene(shapes, 0)
    targets = patch_targets([scene])[0]
    assert [shape.patch for shape in shapes] == (targets[:, 0] > 0).nonzero().flatten().sort(descending=True)[
        0
    ].tolist()
    assert targets[shapes[0].patch].tolist() == [4, 0, 0] and targets[shapes[1].patch].tolist() == [4, 2, 1]
    counts = count_targets([scene])[0].tolist()
    assert counts == [2, 0, 0, 0, 2, 1, 0, 1, 0, 0, 0, 0, 0]


def test_the_mask_covers_the_shapes_and_nothing_else() -> None:
    for seed in range(20):
        scene = pictures.sample_scene(random.Random(seed))
        picture, mask = (np.asarray(drawn).astype(int) for drawn in pictures.draw_with_mask(scene))
        assert np.array_equal(picture, np.asarray(pictures.draw(scene)))
        distance = [np.hypot(*(np.mgrid[:112, :112] - np.array([s.y, s.x])[:, None, None])) for s in scene.shapes]
        assert (mask[[int(s.y) for s in scene.shapes], [int(s.x) for s in scene.shapes]] == 255).all()
        outside = np.all([d > s.radius * 1.3 + 1 for d, s in zip(distance, scene.shapes, strict=True)], axis=0)
        assert (mask[outside] == 0).all() and 0 < (mask > 0).mean() < 1


def test_spanish_answers_use_spanish_words() -> None:
    rng = random.Random(0)
    items = [item for item in (sample_text_item(rng) for _ in range(300)) if "plus" in item.question and item.spanish]
    assert items and all(item.spanish in SPANISH.values() for item in items)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [("a b c", "a b c", 0), ("a b c", "", 3), ("a b c", "a x c", 1), ("a b", "a b c d", 2), ("a b c", "b c", 1)],
)
def test_word_errors(reference: str, hypothesis: str, errors: int) -> None:
    assert word_errors(reference, hypothesis) == errors


def test_scores_ignore_case_and_punctuation() -> None:
    metric = Metric("m", "", [Case("q", "a red star", {}), Case("q", "two", {})])
    assert normalize("A red, star.") == "a red star"
    assert metric.score(["A red star.", "three"]) == 0.5
