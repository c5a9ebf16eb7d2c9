"""The folder of emoji, made from a small package of the same form."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from di_refine.files import registry
from di_refine.files.datasets import ImageDataset

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "emoji" / "make_folder.py"


def entry(image, category, order, subcategory="other", has_image=True):
    return {
        "image": image,
        "category": category,
        "subcategory": subcategory,
        "sort_order": order,
        "has_img_google": has_image,
    }


@pytest.fixture
def package(tmp_path):
    """Makes a package of 200 faces, 100 games, 28 people who do sports, and what is left out."""

    def make(games=100):
        emoji = [entry(f"face{i:03}.png", "Smileys & Emotion", 1000 - i) for i in range(200)]
        emoji += [entry(f"game{i:03}.png", "Activities", i) for i in range(games)]
        emoji += [entry(f"sport{i:03}.png", "People & Body", i, "person-sport") for i in range(28)]
        emoji += [entry("tone.png", "Component", 1), entry("none.png", "Activities", 1, has_image=False)]
        files = {f"img/google/64/{e['image']}": e["image"].encode() for e in emoji if e["has_img_google"]}
        path = tmp_path / "package.tgz"
        with tarfile.open(path, "w:gz") as archive:
            for name, content in {**files, "emoji.json": json.dumps(emoji).encode()}.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    return make


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_equally_many_of_each_class(package, tmp_path):
    done = run(package(), tmp_path / "emoji")
    assert done.returncode == 0, done.stderr
    made = {path.name: sorted(file.name for file in path.iterdir()) for path in (tmp_path / "emoji").iterdir()}
    assert set(made) == {"Activities", "Smileys & Emotion"} and {len(names) for names in made.values()} == {128}
    assert sum(name.startswith("sport") for name in made["Activities"]) == 28
    steps = np.diff([int(name[4:7]) for name in made["Smileys & Emotion"]])
    assert set(steps) == {1, 2}, "evenly spaced"
    assert (tmp_path / "emoji" / "Activities" / "game007.png").read_bytes() == b"game007.png"


def test_what_cannot_be_made(package, tmp_path):
    done = run(package(games=99), tmp_path / "emoji")
    assert done.returncode != 0 and "Activities has 127 pictures, fewer than 128" in done.stderr
    assert not (tmp_path / "emoji").exists()
    (tmp_path / "there").mkdir()
    assert "exists already" in run(package(), tmp_path / "there").stderr


def test_the_shipped_data_set():
    dataset = ImageDataset(registry.resolve("emoji-16x16"))
    assert (len(dataset), dataset.resolution, dataset.num_channels, dataset.label_dim) == (1152, 16, 3, 9)
    assert np.array_equal(dataset.label_law().class_frequencies, np.full(9, 1 / 9))
