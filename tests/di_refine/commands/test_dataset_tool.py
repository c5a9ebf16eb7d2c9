import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from di_refine.commands import dataset_tool
from di_refine.errors import InputError
from di_refine.files.dataset_sources import CIFAR_MEMBERS
from di_refine.files.datasets import ImageDataset

CASES = Path(__file__).parents[2] / "cases"


def convert(source, dest, *options):
    arguments = [f"--source={source}", f"--dest={dest}", *options]
    return CliRunner().invoke(dataset_tool.main, arguments, prog_name="dataset_tool.py")


def good(source, dest, *options) -> dict:
    result = convert(source, dest, *options)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def picture(path, size=(8, 8), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, [size[1], size[0], bands], np.uint8)
    Image.fromarray(pixels.squeeze(2) if bands == 1 else pixels, mode=None).save(path)
    return pixels


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for index, name in enumerate(["cat/a.png", "cat/b.png", "dog/c.png", "ape/d.png"]):
        picture(folder / name, seed=index)
    return folder


def test_digits(tmp_path):
    result = good("digits", tmp_path / "new" / "digits.zip", "--resolution=16")
    dataset = ImageDataset(tmp_path / "new" / "digits.zip")
    shown = {key: result[key] for key in ("images", "resolution", "channels", "classes")}
    assert shown == {"images": 1797, "resolution": 16, "channels": 1, "classes": 10}
    assert (len(dataset), dataset.resolution, dataset.num_channels, dataset.label_dim) == (1797, 16, 1, 10)
    assert dataset.labels(range(10)).argmax(axis=1).tolist() == list(range(10)), "the set begins with 0 to 9"

    good("digits", tmp_path / "small.zip", "--max-images=20")
    small = ImageDataset(tmp_path / "small.zip")
    assert small.resolution == 8 and len(small) == 20 and small.images(range(20)).max() == 255


def test_layout_and_bytes_are_reproducible(tmp_path, photos):
    first = good(photos, tmp_path / "a.zip", "--resolution=4", "--resize-filter=box")
    os.utime(photos / "cat" / "a.png", (0, 0))
    second = good(photos, tmp_path / "b.zip", "--resolution=4x4", "--resize-filter=box")
    assert first["sha256"] == second["sha256"]
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = [f"00000/img{index:08d}.png" for index in range(4)]
        assert archive.namelist() == [*names, "dataset.json"]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        content = json.loads(archive.read("dataset.json"))
    assert content["labels"] == [list(pair) for pair in zip(names, [0, 1, 1, 2])]
    assert content["classes"] == ["ape", "cat", "dog"]
    assert content["conversion"]["resize_filter"] == "box" and content["conversion"]["source"] == "photos"
    assert content["conversion"]["tool"].startswith("di-refine ")


def test_the_filter_is_pillows(tmp_path, photos):
    for name in ("box", "nearest", "bicubic"):
        good(photos, tmp_path / f"{name}.zip", "--resolution=3", f"--resize-filter={name}")
        expected = Image.open(photos / "cat" / "a.png").resize((3, 3), Image.Resampling[name.upper()])
        image = ImageDataset(tmp_path / f"{name}.zip").images([1])[0]
        assert np.array_equal(image.transpose(1, 2, 0), expected)


def test_without_resizing_pixels_are_kept(tmp_path, photos):
    good(photos, tmp_path / "a.zip")
    assert np.array_equal(
        ImageDataset(tmp_path / "a.zip").images([1])[0].transpose(1, 2, 0), picture(tmp_path / "x.png")
    )


def test_center_crop_and_resolution_unite_sizes(tmp_path):
    wide = picture(tmp_path / "in" / "a.png", (10, 6))
    tall = picture(tmp_path / "in" / "b.png", (6, 11))
    good(tmp_path / "in", tmp_path / "out.zip", "--transform=center-crop")
    images = ImageDataset(tmp_path / "out.zip").images([0, 1]).transpose(0, 2, 3, 1)
    assert np.array_equal(images[0], wide[:, 2:8]) and np.array_equal(images[1], tall[2:8])
    picture(tmp_path / "in" / "c.png", (20, 20))
    result = good(tmp_path / "in", tmp_path / "out2.zip", "--transform=center-crop", "--resolution=4")
    assert (result["images"], result["resolution"], result["classes"]) == (3, 4, 0)


def test_bars_make_squares_of_whole_images(tmp_path):
    wide = picture(tmp_path / "in" / "a.png", (10, 6))
    tall = picture(tmp_path / "in" / "b.png", (6, 10))
    good(tmp_path / "in", tmp_path / "out.zip", "--transform=pad", "--pad-colour=#ff8000")
    images = ImageDataset(tmp_path / "out.zip").images([0, 1]).transpose(0, 2, 3, 1)
    assert np.array_equal(images[0, 2:8], wide) and (images[0, :2] == [255, 128, 0]).all()
    assert np.array_equal(images[1, :, 2:8], tall) and (images[1, :, 8:] == [255, 128, 0]).all()
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["conversion"]["pad_colour"] == "#ff8000"
    result = good(CASES / "rectangles", tmp_path / "out2.zip", "--transform=pad", "--resolution=16")
    image = ImageDataset(tmp_path / "out2.zip").images([0])[0]
    assert result["resolution"] == 16 and not image[:, :3].any() and not image[:, -3:].any() and image[:, 4:12].any()


def test_center_crop_wide_cuts_a_rectangle_and_adds_bars(tmp_path):
    pixels = picture(tmp_path / "in" / "a.png", (16, 16))
    options = ["--transform=center-crop-wide", "--resolution=16x8"]
    good(tmp_path / "in", tmp_path / "out.zip", *options)
    image = ImageDataset(tmp_path / "out.zip").images([0])[0].transpose(1, 2, 0)
    assert np.array_equal(image[4:12], pixels[4:12]) and not image[:4].any() and not image[12:].any()


def test_conversion_of_a_data_set_keeps_its_labels(tmp_path, photos):
    good(photos, tmp_path / "a.zip")
    assert good(tmp_path / "a.zip", tmp_path / "b.zip", "--grey")["channels"] == 1
    assert np.array_equal(
        ImageDataset(tmp_path / "b.zip").labels(range(4)), ImageDataset(tmp_path / "a.zip").labels(range(4))
    )
    assert good(tmp_path / "a.zip", tmp_path / "c.zip", "--labels=none")["classes"] == 0
    assert good(tmp_path / "c.zip", tmp_path / "d.zip")["classes"] == 0, "a data set's own folders are no classes"
    subset = good(photos, tmp_path / "e.zip", "--max-images=2")
    assert subset["images"] == 2 and subset["sha256"] == good(photos, tmp_path / "f.zip", "--max-images=2")["sha256"]


def test_names_and_counts_of_classes_are_shown_and_kept(tmp_path, photos):
    result = convert(photos, tmp_path / "a.zip")
    *table, last = result.stdout.splitlines()
    assert [line.split() for line in table[2:]] == [["0", "ape", "1"], ["1", "cat", "2"], ["2", "dog", "1"]]
    for path, shown in [(tmp_path / "a.zip", json.loads(last)), (tmp_path / "b.zip", None)]:
        shown = shown or good(tmp_path / "a.zip", path)
        assert shown["class_names"] == ["ape", "cat", "dog"] and shown["class_counts"] == [1, 2, 1]
        with zipfile.ZipFile(path) as archive:
            content = json.loads(archive.read("dataset.json"))
        assert content["classes"] == ["ape", "cat", "dog"] and content["class_counts"] == [1, 2, 1]


def test_gaps_in_class_numbers_are_said_and_labels_checked(tmp_path, photos):
    result = convert(CASES / "labels_from_one", tmp_path / "a.zip")
    assert result.exit_code == 0 and "note: no image of class 0 of 3" in result.stderr
    subset = good(photos, tmp_path / "b.zip", "--max-images=3")
    assert sum(subset["class_counts"]) == 3 and len(subset["class_counts"]) == 3
    (photos / "dataset.json").write_text(
        json.dumps({"labels": [[str(path.relative_to(photos)), "cat"] for path in photos.rglob("*.png")]})
    )
    result = convert(photos, tmp_path / "c.zip")
    assert result.exit_code == 2 and "labels in dataset.json must be all class numbers, or all vectors" in result.stderr


def test_folders_without_classes(tmp_path):
    picture(tmp_path / "in" / "a" / "x.png")
    picture(tmp_path / "in" / "a" / "y.png")
    assert good(tmp_path / "in", tmp_path / "a.zip")["classes"] == 0, "one folder is no class"
    picture(tmp_path / "in" / "z.png")
    assert good(tmp_path / "in", tmp_path / "b.zip")["classes"] == 0, "an image lies beside the folders"


def test_folders_in_archives_with_backslashes_are_classes(tmp_path):
    good(CASES / "backslash_folders.zip", tmp_path / "out.zip")
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["classes"] == ["cat", "dog"]
    result = convert(CASES / "gbk.zip", tmp_path / "gbk.zip")
    assert result.exit_code == 2 and "--source=" in result.stderr and "not UTF-8" in result.stderr


def test_every_format_is_read_and_anything_else_is_counted_aloud(tmp_path):
    shutil.copytree(CASES / "tiff", tmp_path / "in")
    for name in ("a.HEIC", "b.heic", "notes.txt", "Makefile", ".DS_Store"):
        (tmp_path / "in" / name).write_text("x")
    result = convert(tmp_path / "in", tmp_path / "out.zip", "--grey")
    shown = json.loads(result.stdout.splitlines()[-1])
    assert shown["images"] == 10 and shown["resolution"] == 16
    assert shown["skipped"] == {".heic": 2, ".txt": 1, "without extension": 1, "hidden": 1}
    assert "2 .heic, 1 .txt, 1 hidden, 1 without extension" in result.stderr


def test_damaged_images_are_all_named_or_left_out(tmp_path, photos):
    for name in ("cat/b.png", "ape/d.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:60])
    result = convert(photos, tmp_path / "out.zip")
    error = result.stderr.splitlines()[-1]
    assert (
        result.exit_code == 2 and "2 images are damaged or not images: ape/d.png (" in error and "cat/b.png (" in error
    )
    assert error.endswith("; mend them, or leave them out with --skip-damaged") and not (tmp_path / "out.zip").exists()
    result = convert(photos, tmp_path / "out.zip", "--skip-damaged")
    shown = json.loads(result.stdout.splitlines()[-1])
    assert shown["damaged"] == ["ape/d.png", "cat/b.png"] and (shown["images"], shown["class_counts"]) == (2, [0, 1, 1])
    assert "left out: " in result.stderr and "no image of class 0 (ape) of 3" in result.stderr
    assert ImageDataset(tmp_path / "out.zip").labels([0, 1]).argmax(axis=1).tolist() == [1, 2]
    assert good(CASES / "damaged", tmp_path / "case.zip", "--skip-damaged")["damaged"] == ["4.jpg"]
    for path in photos.rglob("*.png"):
        path.write_bytes(b"x")
    result = convert(photos, tmp_path / "none.zip", "--skip-damaged")
    assert result.exit_code == 2 and "none is left" in result.stderr and not (tmp_path / "none.zip").exists()


def test_arrays_of_samples_are_a_source(tmp_path):
    result = good(CASES / "samples_adm.npz", tmp_path / "out.zip")
    expected, made = ImageDataset(CASES / "samples_adm.npz"), ImageDataset(tmp_path / "out.zip")
    assert np.array_equal(made.decode_all(), expected.decode_all()) and result["images"] == 32
    assert result["class_counts"] == expected.class_counts().tolist()
    assert good(CASES / "samples_adm.npz", tmp_path / "b.zip", "--labels=none")["classes"] == 0


def test_a_size_that_a_gan_would_refuse_is_said(tmp_path, photos):
    for size, said in [(24, True), (4, True), (16, False)]:
        result = convert(photos, tmp_path / f"{size}.zip", f"--resolution={size}")
        assert result.exit_code == 0
        assert (f"note: {size}x{size} is no size that pretrain.py gan takes" in result.stderr) == said


def test_transparency_becomes_white(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "in" / "a.png")
    Image.new("L", (4, 4), 7).save(tmp_path / "in" / "b.png")
    assert good(tmp_path / "in", tmp_path / "out.zip", "--rgb")["channels"] == 3
    images = ImageDataset(tmp_path / "out.zip").images([0, 1])
    assert (images[0] == 255).all() and (images[1] == 7).all()


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """{'data': data, 'labels': labels} as Python 2 wrote it: byte strings for text, and numpy's old module names."""
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    shape = b"".join(b"J" + size.to_bytes(4, "little") for size in data.shape) + b"\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content = b"T" + data.nbytes.to_bytes(4, "little") + data.tobytes()
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    state = b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"
    return b"\x80\x02}(U\x04data" + array + state + b"U\x06labels" + numbers + b"u."


def cifar_archive(path, batch=None, members=CIFAR_MEMBERS):
    """A small archive in the layout of cifar-10-python.tar.gz, or one with `batch` pickled in its place."""
    with tarfile.open(path, "w:gz") as archive:
        for index, member in enumerate(members):
            data = np.random.default_rng(index).integers(0, 256, [2, 3072], np.uint8)
            content = python2_pickle(data, [index, 9]) if batch is None else pickle.dumps(batch)
            entry = tarfile.TarInfo(member)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_cifar_archive(tmp_path):
    result = good(cifar_archive(tmp_path / "cifar.tar.gz"), tmp_path / "out.zip")
    dataset = ImageDataset(tmp_path / "out.zip")
    assert (result["images"], result["resolution"], result["channels"], result["classes"]) == (10, 32, 3, 10)
    assert dataset.labels(range(10)).argmax(axis=1).tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    rows = np.random.default_rng(3).integers(0, 256, [2, 3072], np.uint8)
    assert np.array_equal(dataset.images([7])[0], rows[1].reshape(3, 32, 32))


class Attack:
    def __reduce__(self):
        return os.mkdir, (os.environ["ATTACK"],)


def test_cifar_pickles_run_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTACK", str(tmp_path / "attacked"))
    result = convert(cifar_archive(tmp_path / "cifar.tar.gz", batch=Attack()), tmp_path / "out.zip")
    assert result.exit_code == 2 and "asks for posix.mkdir" in result.stderr.replace("nt.mkdir", "posix.mkdir")
    assert not (tmp_path / "attacked").exists() and not (tmp_path / "out.zip").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"not a tar file"),
        lambda path: cifar_archive(path, members=["other/file"]),
        lambda path: cifar_archive(path, batch=[1]),
        lambda path: cifar_archive(path, batch={b"data": np.zeros([2, 3], np.uint8), b"labels": [0, 1]}),
        lambda path: cifar_archive(path, batch={b"data": np.zeros([1, 3072], np.uint8), b"labels": [10]}),
        lambda path: path.write_bytes(cifar_archive(path).read_bytes()[:5000]),
    ],
)
def test_bad_cifar_archives(tmp_path, make):
    make(tmp_path / "cifar.tar.gz")
    result = convert(tmp_path / "cifar.tar.gz", tmp_path / "out.zip")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "cifar.tar.gz is not the CIFAR-10 Python archive, or is damaged" in result.stderr


def _add(name, **settings):
    return lambda folder: picture(folder / name, **settings)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (None, ["--resolution=0"], "--resolution must be a positive number such as 16 or 16x16, not '0'"),
        (None, ["--resolution=-4"], "--resolution must be"),
        (None, ["--resolution=16x8"], "--resolution=16x8 is not square"),
        (None, ["--transform=center-crop-wide"], "--transform=center-crop-wide needs --resolution=WxH"),
        (None, ["--transform=center-crop-wide", "--resolution=8x16"], "needs --resolution=WxH with W above H"),
        (None, ["--pad-colour=white"], "--pad-colour is of bars, which --transform=pad and center-crop-wide alone"),
        (None, ["--transform=pad", "--pad-colour=whitish"], "--pad-colour must be a name such as white, or #rrggbb"),
        (_add("ape/0.png", size=(99, 1)), ["--transform=pad", "--resolution=8"], "image ape/0.png is 99x1, too narrow"),
        (None, ["--resize-filter=sinc"], "'--resize-filter': 'sinc' is not one of"),
        (None, ["--max-images=0"], "'--max-images': 0 is not in the range x>=1"),
        (None, ["--labels=json"], "--labels=json: "),
        (_add("flat.png"), ["--labels=folder"], "--labels=folder: the images of"),
        (_add("dog/e.png", size=(8, 6)), [], "image dog/e.png is 8x6, not square; use --transform=center-crop"),
        (
            _add("dog/e.png", size=(6, 6)),
            [],
            "image dog/e.png is 6x6 but ape/d.png is 8x8; bring them to one size with --resolution",
        ),
        (
            _add("dog/e.png", mode="L"),
            [],
            "image dog/e.png has Pillow mode L but ape/d.png has RGB; convert them with dataset_tool.py --grey",
        ),
        (
            _add("ape/0.png", mode="RGBA"),
            [],
            "image ape/0.png has Pillow mode RGBA; convert it with dataset_tool.py --grey or --rgb",
        ),
        (lambda folder: (folder / "cat/a.png").write_bytes(b"x"), [], "image cat/a.png is damaged or not an image"),
        (lambda folder: (folder / "dataset.json").write_text("{"), [], "dataset.json is malformed"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, photos, change, options, message):
    if change is not None:
        change(photos)
    before = sorted(tmp_path.rglob("*"))
    result = convert(photos, tmp_path / "new" / "folder" / "out.zip", *options)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("converting")]
    assert result.exit_code == 2 and len(errors) == 1 and result.stdout == ""
    assert message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_sixteen_bit_greyscale_is_scaled_and_numbers_that_are_no_colours_are_refused(tmp_path):
    result = good(CASES / "sixteen_bit", tmp_path / "out.zip")
    assert result["channels"] == 1 and result["notes"] == [
        "2 images with 16 bits per channel, scaled to 8 (such as 0.png)"
    ]
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full([4, 4], 0.5, np.float32)).save(tmp_path / "in" / "a.tiff")
    (tmp_path / "in" / "a.tiff").rename(tmp_path / "in" / "a.png")
    result = convert(tmp_path / "in", tmp_path / "out2.zip", "--grey")
    assert result.exit_code == 2 and "image a.png has Pillow mode F, which is no colour" in result.stderr


def test_photos_on_their_side_are_turned_before_they_are_cropped(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    upright = np.random.default_rng(0).integers(0, 256, [10, 6, 3], np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(np.rot90(upright)).save(tmp_path / "in" / "a.png", exif=exif)
    good(tmp_path / "in", tmp_path / "out.zip", "--transform=center-crop")
    assert np.array_equal(ImageDataset(tmp_path / "out.zip").images([0])[0].transpose(1, 2, 0), upright[2:8])


def test_bad_source_and_dest(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("x")
    existing = tmp_path / "existing.zip"
    existing.write_text("old")
    for source, dest, message in [
        (tmp_path / "absent", tmp_path / "o.zip", "--source="),
        (tmp_path / "empty", tmp_path / "o.zip", "holds no images"),
        (tmp_path / "text.zip", tmp_path / "o.zip", "is neither a folder nor a zip file"),
        (tmp_path / "absent.tar.gz", tmp_path / "o.zip", "absent.tar.gz does not exist"),
        (photos, tmp_path / "o.tar", "must end in .zip"),
        (photos, existing, "exists already; choose another name or give --overwrite"),
    ]:
        result = convert(source, dest)
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "o.zip").exists()
    assert existing.read_text() == "old"
    assert good(photos, existing, "--overwrite")["images"] == 4 and len(ImageDataset(existing)) == 4


def test_missing_scikit_learn_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    result = convert("digits", tmp_path / "out.zip")
    assert result.exit_code == 2 and "pip install scikit-learn" in result.stderr


@pytest.mark.parametrize(
    "label", ["-1", "2147483648", "NaN", "1e400", "true", '"1"', "[NaN, 1]", '["1", "2"]', "[true, false]"]
)
def test_labels_that_a_data_set_may_not_have_are_not_written(tmp_path, photos, label):
    """What `ImageDataset` refuses in a source must not come out of the conversion."""
    pairs = [f'["{path.relative_to(photos).as_posix()}", {label}]' for path in photos.rglob("*.png")]
    (photos / "dataset.json").write_text('{"labels": [' + ", ".join(pairs) + "]}")
    result = convert(photos, tmp_path / "a.zip")
    assert result.exit_code == 2 and "dataset.json" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "a.zip").exists()
    with pytest.raises(InputError, match=r"dataset\.json"):
        ImageDataset(photos)
