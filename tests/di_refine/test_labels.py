"""The law of labels: what it draws, what it keeps, and how classes are called."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from di_refine.errors import InputError
from di_refine.files import safetensors_pair
from di_refine.labels import KEY, MAX_ROWS, NETWORK, UNIFORM, LabelLaw
from torch_utils import misc, persistence

NAMES = ("animals", "flags", "Flowers", "flour", "10")
VECTORS = np.array([[1, 0, 0.5], [0, 1, -2], [1, 0, 0.5], [1, 0, 0.5]], np.float32)


def shares(labels):
    return labels.double().mean(dim=0).numpy()


@pytest.mark.parametrize("counts", [None, [10, 0, 60, 30, 0]])
def test_classes_are_drawn_as_often_as_the_law_says(counts):
    law = LabelLaw(5, None if counts is None else np.array(counts))
    expected = np.full(5, 0.2) if counts is None else np.array(counts) / 100
    np.testing.assert_allclose(law.class_frequencies, expected)
    for labels in (law.draw(20_000, torch.Generator().manual_seed(0)), law.of_seeds(range(4000))):
        assert labels.dtype == torch.float32 and set(labels.unique().tolist()) == {0, 1}
        assert torch.equal(labels.sum(dim=1), torch.ones(len(labels)))
        np.testing.assert_allclose(shares(labels), expected, atol=0.03)
        assert (shares(labels)[expected == 0] == 0).all()
    assert law.present == [number for number, share in enumerate(expected) if share]


def test_rows_are_drawn_as_often_as_they_are_there():
    law = LabelLaw.of_rows(VECTORS)
    assert law.rows.tolist() == [[0, 1, -2], [1, 0, 0.5]] and law.counts.tolist() == [1, 3]
    assert not law.has_classes and law.class_frequencies is None
    for labels in (law.draw(20_000, torch.Generator().manual_seed(0)), law.of_seeds(range(4000))):
        assert {tuple(row) for row in labels.tolist()} == {(0, 1, -2), (1, 0, 0.5)}
        np.testing.assert_allclose(shares(labels), [0.75, 0.25, -0.125], atol=0.04)


def test_a_label_is_a_function_of_its_seed_and_as_it_was_before_there_were_laws():
    """Numbers that were measured with classes equally often stay what they are."""
    law = LabelLaw(5)
    assert torch.equal(law.of_seeds([7, 3])[1], law.of_seeds([3])[0])
    for seed in range(20):
        draw = np.random.RandomState(misc.derive_seed(seed, "label") % 2**32).choice(5)
        assert law.of_seeds([seed])[0].argmax() == draw
    index = torch.multinomial(torch.ones(5), 20, replacement=True, generator=torch.Generator().manual_seed(1))
    assert torch.equal(law.draw(20, torch.Generator().manual_seed(1)).argmax(dim=1), index)


def test_classes_come_in_turn_only_where_all_are_equally_frequent():
    for law in (LabelLaw(3), LabelLaw(3, np.array([7, 7, 7]))):
        assert law.in_turn([0, 4, 11]).argmax(dim=1).tolist() == [0, 1, 2]
    for law in (LabelLaw(3, np.array([1, 2, 3])), LabelLaw.of_rows(VECTORS)):
        assert torch.equal(law.in_turn(range(9)), law.of_seeds(range(9)))
    assert LabelLaw(0).in_turn([1, 2]).shape == LabelLaw(0).draw(2, torch.Generator()).shape == (2, 0)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("4", 4),
        ("5", None),
        ("10", 4),  # no number of a class, so a name
        ("flags", 1),
        ("FLAGS", 1),
        ("flowers", 2),
        ("flow", 2),
        ("flou", 3),
        ("fl", None),
        ("a", 0),
        ("dogs", None),
        ("-1", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_a_class_is_found_by_number_name_and_beginning(text, number):
    assert LabelLaw(5, names=NAMES).find(text) == number


def test_a_number_goes_before_a_name_of_digits_aloud(capsys):
    assert LabelLaw(3, names=("1", "10", "2")).find("1") == 1
    assert "the class that is called '1' has the number 0" in capsys.readouterr().err
    assert LabelLaw(2, names=("0", "1")).find("1") == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("law", "text", "words"),
    [
        (LabelLaw(5, names=NAMES), "dogs", "which has 0 to 4: animals, flags, Flowers, flour, 10$"),
        (LabelLaw(5, names=NAMES), "fl", "as several begin so: flags, Flowers, flour$"),
        (LabelLaw(5), "dogs", "which has 0 to 4 and knows no names"),
        (LabelLaw(0), "1", "which has no classes"),
        (LabelLaw.of_rows(VECTORS), "1", "which has label vectors instead"),
        (LabelLaw(900, names=tuple(f"n{i}" for i in range(900))), "x", "which has .* n18, n19 and 880 more$"),
    ],
)
def test_a_class_that_is_not_there(law, text, words):
    with pytest.raises(InputError, match=f"^label={text} is not a class of this network, {words}"):
        law.only(text)


def test_one_class_alone():
    law = LabelLaw(5, np.arange(5), names=NAMES).only("flags")
    assert law.of_seeds(range(50)).argmax(dim=1).unique().tolist() == [1]
    assert law.described == "class:1" and law.sentence == "labels: class 1 alone, flags"


LAWS = {
    "classes": LabelLaw(5, np.array([3, 0, 1, 1, 2.5]), names=NAMES),
    "uniform": LabelLaw(5, names=NAMES, origin=UNIFORM),
    "without names": LabelLaw(3, np.array([1, 2, 3])),
    "vectors": LabelLaw.of_rows(VECTORS, names=("hat", "beard", "age")),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("ending", ["pkl", "safetensors"])
def test_what_a_file_keeps_draws_the_same(tmp_path, law, ending):
    path = tmp_path / f"net.{ending}"
    (persistence.save if ending == "pkl" else safetensors_pair.save)({KEY: law.record()}, path)
    content = safetensors_pair.load_either(path)[KEY]
    found = LabelLaw.from_record(content, law.label_dim)
    assert found.content == law.content and found.names == law.names and found.origin == NETWORK
    assert torch.equal(found.of_seeds(range(200)), law.of_seeds(range(200)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "a list instead of"),
        ({"classes": "ab", "counts": [1, 1]}, "names of classes must be a list of texts"),
        ({"classes": ["a", 1], "counts": [1, 1]}, "names of classes must be a list of texts"),
        ({"classes": ["a"], "counts": [1, 1]}, "1 names for 2 classes"),
        ({"counts": [1, 1, 1]}, "must be 2 frequencies"),
        ({"counts": [1, -1]}, "must not be negative"),
        ({"counts": [0, 0]}, "one must be positive"),
        ({"counts": [1, float("nan")]}, "must not be negative"),
        ({"counts": [1e308, 1e308]}, "must not be negative"),
        ({"counts": [1, 10**400]}, "must be a list of numbers"),
        ({"counts": [1, True]}, "must be a list of numbers"),
        ({"counts": {"a": 1}}, "must be a list of numbers"),
        ({"counts": [1], "rows": [[1, 2]]}, "must be a table of numbers"),
        ({"counts": [1], "rows": torch.zeros(1, 3)}, "must have 2 numbers each"),
        ({"counts": [], "rows": torch.zeros(0, 2)}, "there must be label vectors"),
        ({"counts": [1], "rows": torch.full([1, 2], float("inf"))}, "of finite numbers"),
    ],
    ids=str,
)
def test_what_is_no_law_is_refused(content, words):
    with pytest.raises(InputError, match=words):
        LabelLaw.from_record(content, 2)


def test_a_file_keeps_a_bounded_sample_of_many_vectors():
    law = LabelLaw.of_rows(np.linspace(0, 1, 3 * MAX_ROWS, dtype=np.float32)[:, None] ** 2)
    kept = law.kept()
    assert len(kept.rows) <= MAX_ROWS < len(law.rows) and kept.counts.sum() == MAX_ROWS
    assert np.isin(kept.rows, law.rows).all() and kept.content == law.kept().content != law.content
    assert abs(np.average(kept.rows[:, 0], weights=kept.counts) - 1 / 3) < 0.01
    few = LabelLaw.of_rows(VECTORS)
    assert few.kept() is few


def test_laws_with_the_same_content_draw_the_same():
    law = LabelLaw(3, np.array([1, 2, 3]), names=("a", "b", "c"))
    assert replace(law, counts=np.array([2, 4, 6]), origin=NETWORK, names=()).content == law.content
    others = [LabelLaw(3), LabelLaw(3, np.array([1, 2, 4])), LabelLaw.of_rows(VECTORS), LabelLaw(3, np.ones(3))]
    others += [LabelLaw(30, np.ones(30)), LabelLaw(30, np.arange(30))]
    assert len({law.content, *(other.content for other in others)}) == 7


def test_titles_of_a_grid():
    law = LabelLaw(3, names=("a", "", "c"))

    def labels(*classes):
        return torch.eye(3)[list(classes)]

    assert law.titles(labels(0, 1, 2, 0, 1), 3) == (["a", "1", "c"], [])
    assert law.titles(labels(0, 0, 2, 2), 2) == ([], ["a", "c"])
    assert law.titles(labels(0, 1, 2, 2), 2) == ([], [])
    assert law.titles(labels(0, 1), 2, drawable=lambda name: name != "a") == (["0", "1"], [])
    assert LabelLaw(3).titles(labels(0, 1, 2), 3) == ([], [])
