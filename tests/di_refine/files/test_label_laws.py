"""What the option --labels means for a network."""

import json
from dataclasses import replace

import numpy as np
import pytest
from golden_io import GOLDEN
from PIL import Image

from di_refine.errors import InputError
from di_refine.files.datasets import ImageDataset
from di_refine.files.label_laws import choose
from di_refine.labels import NETWORK, LabelLaw

CASES = GOLDEN.parent / "cases"
OWN = LabelLaw(3, np.array([1, 2, 5]), names=("cat", "dog", "fox"), origin=NETWORK)
UNKNOWN = LabelLaw(3)


def data_set(folder, classes, names=None):
    folder.mkdir()
    for i, _ in enumerate(classes):
        Image.new("L", [8, 8], i).save(folder / f"{i}.png")
    rows = [[f"{i}.png", label] for i, label in enumerate(classes)]
    (folder / "dataset.json").write_text(json.dumps({"labels": rows, "classes": names}))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return data_set(tmp_path_factory.mktemp("laws") / "photos", [0, 0, 0, 2], ["cat", "dog", "fox"])


@pytest.mark.parametrize(
    ("text", "shares", "described"),
    [
        (None, [1, 2, 5], "network"),
        ("dataset", [1, 2, 5], "network"),
        ("uniform", [1, 1, 1], "uniform"),
        ("1,0,3.5", [1, 0, 3.5], "list"),
        (",".join(["1.000", "2.000", f"3.{'0' * 5000}"]), [1, 2, 3], "list"),
        ("2", [0, 0, 1], "class:2"),
        ("fox", [0, 0, 1], "class:2"),
        ("[1, 1, 2]", [1, 1, 2], "list"),
        ('{"fox": 3, "cat": 1}', [1, 0, 3], "list"),
        ('{"class_counts": [4, 0, 4]}', [4, 0, 4], "list"),
        ('{"labels": [["a.png", 1], ["b.png", 2], ["c.png", 2]]}', [0, 1, 2], "list"),
    ],
)
def test_words_lists_and_json(text, shares, described):
    law = choose(text, OWN)
    np.testing.assert_allclose(law.class_frequencies, np.array(shares) / np.sum(shares))
    assert law.described == described and law.names == OWN.names


def test_files(tmp_path, photos):
    law = choose(str(photos), UNKNOWN)
    assert law.counts.tolist() == [3, 0, 1] and law.names == ("cat", "dog", "fox")
    assert law.described == f"file:{photos}" and law.sentence == f"labels: as often as in {photos}"
    for content in ([3, 0, 1], {"class_counts": [3, 0, 1]}, json.loads((photos / "dataset.json").read_text())):
        (tmp_path / "law.json").write_text(json.dumps(content))
        assert choose(str(tmp_path / "law.json"), OWN).counts.tolist() == [3, 0, 1]


def test_the_data_set_of_the_command_goes_before_that_of_training(photos):
    law = choose("dataset", OWN, ImageDataset(photos))
    assert law.counts.tolist() == [3, 0, 1] and law.described == f"dataset:{photos}"
    assert choose(None, OWN, ImageDataset(photos)) is OWN


def test_label_vectors(tmp_path):
    data = CASES / "labels_multi_hot"
    law = choose(str(data), LabelLaw(4))
    assert len(law.rows) == 4 and law.counts.tolist() == [2, 2, 2, 2]
    same = choose(str(data / "dataset.json"), replace(law, origin=NETWORK))
    assert same.content == law.content
    (row,) = choose("[[0, 1, 1, 0]]", law).rows.tolist()
    assert row == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("text", "own", "words"),
    [
        ("dataset", UNKNOWN, "labels=dataset: the network's file does not say .*labels=train.zip"),
        ("dataset", LabelLaw(0), "labels=dataset: the network has no classes"),
        ("1,2", LabelLaw(0), "labels=1,2: the network has no classes"),
        ("1,2", OWN, "labels=1,2: there must be 3 frequencies"),
        ("1,2,-1", OWN, "labels=1,2,-1: frequencies must not be negative"),
        ("nan,0,1", OWN, "frequencies must not be negative"),
        ("3", OWN, "labels=3 is not a class of this network, which has 0 to 2: cat, dog, fox"),
        ("dogs", OWN, "labels=dogs is neither a file nor a name"),
        ("no/such.zip", OWN, "labels=no/such.zip: there is no such file"),
        ("[1, 2", OWN, "it is no JSON .line 1"),
        ('["a"]', OWN, "frequencies must be a list of numbers"),
        ('{"owl": 1}', OWN, "label=owl is not a class of this network"),
        ('{"labels": [["a", 0], ["b", [1, 2]]]}', OWN, "all class numbers, or all vectors"),
        ('{"labels": [["a", 3]]}', OWN, "there must be 3 frequencies"),
        ("[[1, 2, 3]]", OWN, "it has label vectors, and the network is conditional on classes"),
        ("[[1, 2]]", UNKNOWN, "it has 2 classes, and the network 3"),
        ("uniform", LabelLaw.of_rows(np.eye(3, dtype=np.float32)), "conditional on label vectors, not on classes"),
        ("1,1,1", LabelLaw.of_rows(np.eye(3, dtype=np.float32), origin=NETWORK), "conditional on label vectors"),
        (str(CASES / "labels_listed_twice"), LabelLaw(2), "lists 0.png more than once"),
    ],
)
def test_what_fits_no_network_is_one_sentence(text, own, words):
    with pytest.raises(InputError, match=words) as caught:
        choose(text, own)
    assert "\n" not in str(caught.value)


def test_classes_in_another_order(tmp_path):
    other = data_set(tmp_path / "photos", [0, 1, 2], ["dog", "cat", "fox"])
    order = "it has the classes in another order than the network: class 0 is 'dog' there and 'cat' here"
    with pytest.raises(InputError, match=order):
        choose(str(other), OWN)
