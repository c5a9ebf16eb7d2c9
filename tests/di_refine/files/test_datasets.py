import io
import json
import os
import pickle
import sys
import threading
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from di_refine.errors import InputError
from di_refine.files.datasets import ImageDataset, absent_classes, batches, sample_order
from di_refine.files.image_files import DamagedImages

CASES = Path(__file__).parents[2] / "cases"
COUNT = 10


def pixels_of(index: int, size: int = 8, mode: str = "RGB") -> np.ndarray:
    shape = [size, size, 3] if mode == "RGB" else [size, size]
    return np.random.default_rng(index).integers(0, 256, shape, np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def files_of(count: int = COUNT, mode: str = "RGB") -> dict[str, bytes]:
    """Images by name, with the class numbers index % 3."""
    images = {f"{index // 5:05d}/img{index:08d}.png": png(pixels_of(index, mode=mode)) for index in range(count)}
    labels = [[name, index % 3] for index, name in enumerate(images)]
    return {**images, "dataset.json": json.dumps({"labels": labels}).encode()}


def write(path, files: dict[str, bytes], kind: str = "zip"):
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    return path


@pytest.fixture
def dataset(tmp_path):
    return ImageDataset(write(tmp_path / "set.zip", files_of()))


@pytest.mark.parametrize("kind", ["zip", "folder"])
@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
def test_reads_images_and_labels(tmp_path, kind, mode, channels):
    extra = {"__MACOSX/00000/._img.png": b"junk", ".hidden.png": b"junk", "notes.txt": b"hello"}
    dataset = ImageDataset(write(tmp_path / "set", {**files_of(mode=mode), **extra}, kind))
    properties = (len(dataset), dataset.resolution, dataset.num_channels, dataset.label_dim, dataset.has_labels)
    assert properties == (COUNT, 8, channels, 3, True) and dataset.name == "set"
    images = dataset.images([7, 2])
    assert images.shape == (2, channels, 8, 8) and images.dtype == np.uint8
    for image, index in zip(images, [7, 2]):
        assert np.array_equal(image, pixels_of(index, mode=mode).reshape(8, 8, channels).transpose(2, 0, 1))
    labels = dataset.labels([7, 2])
    assert labels.dtype == np.float32 and labels.tolist() == [[0, 1, 0], [0, 0, 1]]
    np.testing.assert_allclose(dataset.label_law().class_frequencies, [0.4, 0.3, 0.3])
    assert np.array_equal(dataset.decode_all(workers=3), dataset.images(range(COUNT)))


def test_zip_and_folder_have_the_same_hash_and_any_change_changes_it(tmp_path):
    files = files_of()
    original = ImageDataset(write(tmp_path / "a.zip", files)).content_hash()
    assert ImageDataset(write(tmp_path / "a", files, "folder")).content_hash() == original
    name = "00001/img00000007.png"
    relabelled = files["dataset.json"].replace(b'7.png", 1', b'7.png", 2')
    changes = [
        {**files, name: png(pixels_of(99))},
        {**{("00002/x.png" if key == name else key): value for key, value in files.items()}, "dataset.json": b"{}"},
        {**files, "dataset.json": relabelled},
    ]
    hashes = [
        ImageDataset(write(tmp_path / f"{i}.zip", changed)).content_hash() for i, changed in enumerate(changes)
    ] + [ImageDataset(tmp_path / "a.zip", mirror=True).content_hash()]
    assert relabelled != files["dataset.json"] and len({original, *hashes}) == 5


def test_mirror_appends_flipped_copies(tmp_path):
    dataset = ImageDataset(write(tmp_path / "set.zip", files_of()), mirror=True)
    assert len(dataset) == 2 * COUNT
    assert np.array_equal(dataset.images([COUNT + 3])[0], dataset.images([3])[0, :, :, ::-1])
    assert np.array_equal(dataset.labels([COUNT + 5]), dataset.labels([5]))
    assert np.array_equal(dataset.decode_all(), dataset.images(range(2 * COUNT)))


@pytest.mark.parametrize("content", [None, b'{"labels": null}', b"{}"])
def test_no_labels(tmp_path, content):
    files = {name: data for name, data in files_of().items() if name != "dataset.json"}
    dataset = ImageDataset(
        write(tmp_path / "set.zip", files if content is None else {**files, "dataset.json": content})
    )
    assert (
        not dataset.has_labels
        and dataset.labels([0, 1]).shape == (2, 0)
        and dataset.label_law().class_frequencies.shape == (0,)
    )


def test_label_vectors_and_backslashes(tmp_path):
    files = files_of(2)
    names = [name.replace("/", "\\") for name in files if name.endswith("png")]
    files["dataset.json"] = json.dumps({"labels": [[names[0], [0.5, 1]], [names[1], [0, -1]]], "more": 1}).encode()
    dataset = ImageDataset(write(tmp_path / "set.zip", files))
    assert dataset.label_dim == 2 and dataset.labels([1, 0]).tolist() == [[0, -1], [0.5, 1]]
    with pytest.raises(InputError, match="labels are vectors"):
        dataset.class_counts()
    assert dataset.label_law().rows.tolist() == [[0, -1], [0.5, 1]] and dataset.label_law().class_frequencies is None


def test_named_classes_count_though_the_last_have_no_image(tmp_path):
    files = files_of(2)
    labels = [[name, number] for number, name in enumerate(name for name in files if name.endswith("png"))]
    for names, expected in [(["a", "b", "c"], ("a", "b", "c")), (["a"], ("a", "")), ([1, 2], ())]:
        files["dataset.json"] = json.dumps({"labels": labels, "classes": names}).encode()
        dataset = ImageDataset(write(tmp_path / f"{len(expected)}.zip", files))
        assert dataset.class_names == expected and dataset.label_dim == max(len(expected), 2)
        assert dataset.class_counts().tolist() == [1, 1, 0][: dataset.label_dim]
        twice = ImageDataset(dataset.path, mirror=True)
        for part in (dataset, twice):
            assert part.class_numbers().tolist() == part.labels(np.arange(len(part))).argmax(axis=1).tolist()


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_backslashes_in_names_are_slashes(tmp_path, kind):
    slashes = ImageDataset(write(tmp_path / "a", files_of(), kind))
    files = {name.replace("/", "\\"): content for name, content in files_of().items()}
    dataset = ImageDataset(write(tmp_path / "b", {**files, "empty\\": b""} if kind == "zip" else files, kind))
    assert dataset.files.names == slashes.files.names and dataset.content_hash() == slashes.content_hash()
    with pytest.raises(InputError, match="holds two files named 00000/img00000000.png"):
        ImageDataset(write(tmp_path / "c", {**files, **files_of()}, kind))
    assert ImageDataset(CASES / "backslash_both.zip").label_dim == 2


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_packed_twice_is_refused(tmp_path):
    path = write(tmp_path / "a.zip", files_of())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(FIRST, png(pixels_of(5)))
    with pytest.raises(InputError, match=f"a.zip holds two files named {FIRST}; rename one of them"):
        ImageDataset(path)


def raw_names(path, files: dict[bytes, bytes]):
    """A zip file whose names are these bytes, without a word about their encoding."""
    coded = {f"{index:0{len(name)}d}": name for index, name in enumerate(files)}
    content = write(path, dict(zip(coded, files.values()))).read_bytes()
    for placeholder, name in coded.items():
        content = content.replace(placeholder.encode(), name)
    path.write_bytes(content)
    return path


def test_names_in_archives_that_do_not_say_their_encoding(tmp_path):
    pixels = png(pixels_of(0))
    name = "Grüße/Bäume.png"
    assert ImageDataset(raw_names(tmp_path / "mac.zip", {name.encode(): pixels})).files.image_names == [name]
    with pytest.raises(InputError, match="names that are not UTF-8.*unzip -O GBK, and give the folder"):
        ImageDataset(raw_names(tmp_path / "old.zip", {name.encode("cp1252"): pixels}))
    with pytest.raises(InputError, match="gbk.zip has file names that are not UTF-8"):
        ImageDataset(CASES / "gbk.zip")


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="file names are Unicode there")
def test_names_in_folders_that_are_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xc4.png", "wb") as file:
        file.write(png(pixels_of(0)))
    with pytest.raises(InputError, match=r"not UTF-8 \(such as \\udcc4.png\); rename them, as convmv"):
        ImageDataset(tmp_path)


def test_classes_are_counted_and_gaps_named(dataset, tmp_path):
    assert dataset.class_counts().tolist() == [4, 3, 3] and absent_classes(dataset.class_counts()) is None
    gap = ImageDataset(CASES / "labels_from_one").class_counts()
    assert gap.tolist() == [0, 4, 4] and absent_classes(gap) == "no image of class 0 of 3"
    assert absent_classes([0] * 12 + [1]) == "no image of classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more of 13"
    with pytest.raises(InputError, match=r"dataset.json is malformed at line 8, column \d+"):
        ImageDataset(CASES / "labels_trailing_comma")
    with pytest.raises(InputError, match=r'among "labels" is \["0.png", 1, 0, 0\], expected \["name", label\]'):
        ImageDataset(CASES / "labels_flat_row")
    with pytest.raises(InputError, match="labels_listed_twice: dataset.json lists 0.png more than once"):
        ImageDataset(CASES / "labels_listed_twice")


FIRST, NAME = "00000/img00000000.png", "00001/img00000007.png"


def _labels(change) -> bytes:
    labels = json.loads(files_of()["dataset.json"])["labels"]
    return json.dumps({"labels": change(labels)}).encode()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({NAME: png(pixels_of(0, size=4))}, f"image {NAME} is 4x4 but {FIRST} is 8x8.*--resolution"),
        ({NAME: png(pixels_of(0, mode="L"))}, f"image {NAME} has Pillow mode L but {FIRST} has RGB"),
        ({FIRST: png(np.zeros([4, 6, 3], np.uint8))}, f"image {FIRST} is 6x4, not square"),
        ({FIRST: png(np.zeros([8, 8, 4], np.uint8))}, f"image {FIRST} has Pillow mode RGBA.*--rgb"),
        ({NAME: b"no image"}, f"image {NAME} is damaged or not an image"),
        ({"dataset.json": b"{"}, "dataset.json is malformed at line 1, column 2"),
        ({"dataset.json": b'{"labels": null,\n  "a": [1 2]}'}, "malformed at line 2, column 1[01]"),
        ({"dataset.json": b'{"labels": "\xff"}'}, "dataset.json is no UTF-8 text"),
        ({"dataset.json": b"[1]"}, "dataset.json is malformed; expected"),
        ({"dataset.json": b'{"labels": [1]}'}, 'malformed: among "labels" is 1, expected'),
        ({"dataset.json": b'{"labels": {"a": 1}}'}, 'malformed: among "labels" is {"a": 1}, expected'),
        ({"dataset.json": _labels(lambda x: [*x, ["other.png", 0]])}, "a label for other.png, which is not there"),
        ({"dataset.json": _labels(lambda x: [*x, [FIRST, 2]])}, f"lists {FIRST} more than once \\(labels 0 and 2\\)"),
        ({"dataset.json": _labels(lambda x: x[:-1])}, "no label for 00001/img00000009.png"),
        ({"dataset.json": _labels(lambda x: [[x[0][0], -1], *x[1:]])}, f"gives {FIRST} the label -1"),
        ({"dataset.json": _labels(lambda x: [[x[0][0], 10**9], *x[1:]])}, f"gives {FIRST} the label 1000000000"),
        ({"dataset.json": _labels(lambda x: [[x[0][0], "cat"], *x[1:]])}, "all class numbers, or all vectors"),
        ({"dataset.json": _labels(lambda x: [[x[0][0], [1, 2]], *x[1:]])}, "all class numbers, or all vectors"),
        ({"dataset.json": _labels(lambda x: [[name, [float("nan")]] for name, _ in x])}, "all class numbers, or"),
    ],
)
def test_faults_are_named_on_opening(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        ImageDataset(write(tmp_path / "set.zip", {**files_of(), **changes}))


def test_paths_that_are_no_data_set(tmp_path):
    with pytest.raises(InputError, match="^data=.*absent.zip does not exist"):
        ImageDataset(tmp_path / "absent.zip")
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(InputError, match="^`reference`: .*text.zip is neither a folder nor a zip file"):
        ImageDataset(tmp_path / "text.zip", setting="reference")
    with pytest.raises(InputError, match="holds no images"):
        ImageDataset(write(tmp_path / "empty.zip", {"dataset.json": b"{}"}))
    whole = write(tmp_path / "whole.zip", files_of()).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut.zip is neither a folder nor a zip file, or it is damaged"):
        ImageDataset(tmp_path / "cut.zip")


def truncated(index: int) -> bytes:
    """An image with a good header and damaged pixels."""
    content = png(pixels_of(index))
    return content[: len(content) // 2]


@pytest.mark.parametrize("memory_limit", [1 << 30, 0])
def test_damaged_pixels_are_named_on_decoding(tmp_path, memory_limit):
    dataset = ImageDataset(write(tmp_path / "set.zip", {**files_of(), NAME: truncated(7)}))
    with pytest.raises(InputError, match=f"^{dataset.path}: image {NAME} is damaged or not an image \\([^\n]*\\)$"):
        for _ in islice(batches(dataset, COUNT, seed=0, workers=1, memory_limit=memory_limit), 2):
            pass


def test_damaged_images_are_all_named(tmp_path):
    names = [name for name in files_of(14) if name.endswith("png")]
    broken = dict.fromkeys(names[:12], b"no image")
    with pytest.raises(DamagedImages, match=r"12 images are damaged or not images: .*00001.* and 2 more$") as raised:
        ImageDataset(write(tmp_path / "a.zip", {**files_of(14), **broken}))
    assert list(pickle.loads(pickle.dumps(raised.value)).faults) == names[:12]
    dataset = ImageDataset(write(tmp_path / "b.zip", {**files_of(), **{name: truncated(7) for name in names[2:4]}}))
    for read in (dataset.decode_all, lambda: dataset.images(range(COUNT))):
        with pytest.raises(DamagedImages, match=f"2 images are damaged.*: {names[2]} \\(.*\\), {names[3]} "):
            read()


def test_arrays_of_samples_are_a_data_set(tmp_path, capsys):
    with np.load(CASES / "samples_adm.npz") as archive:
        pixels, numbers = archive["arr_0"], archive["arr_1"]
    dataset = pickle.loads(pickle.dumps(ImageDataset(CASES / "samples_adm.npz")))
    assert np.array_equal(dataset.decode_all(), pixels.transpose(0, 3, 1, 2))
    assert np.array_equal(dataset.labels(range(32)).argmax(axis=1), numbers)
    np.savez(tmp_path / "grey.npz", arr_0=pixels[..., :1], mu=np.zeros(3))
    grey = ImageDataset(tmp_path / "grey.npz")
    assert (grey.num_channels, grey.label_dim) == (1, 0) and grey.content_hash() != dataset.content_hash()
    assert "passed over arrays that are no images: mu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "is feature statistics, which --ref takes"),
        ({"arr_0": np.zeros([2, 4, 4, 3], np.float32)}, r"arr_0 is float32 \[2, 4, 4, 3\], not uint8"),
        ({"arr_0": np.zeros([0, 4, 4, 3], np.uint8)}, "not uint8"),
        ({"arr_0": np.zeros([2, 4, 4, 3], np.uint8), "arr_1": np.zeros(3, int)}, "arr_1 is not one class number"),
        ({"arr_0": np.array([{}])}, "is no file of arrays, or it is damaged"),
        ({"arr_0": np.zeros([2, 4, 6, 3], np.uint8)}, r"image arr_0\[0\] is 6x4, not square"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        ImageDataset(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="is no file of arrays, or it is damaged"):
        ImageDataset(tmp_path / "a.npz")


def test_check_compatible(dataset):
    dataset.check_compatible(8, 3, 3)
    dataset.check_compatible(8, 3, 0)
    with pytest.raises(InputError, match=r"holds 8x8 images with 3 channel.*teacher has 16x16 with 1"):
        dataset.check_compatible(16, 1, what="teacher")
    with pytest.raises(InputError, match="has 3 classes, but the network is conditional on 10"):
        dataset.check_compatible(8, 3, 10)


def test_can_be_pickled_and_read_from_threads(dataset):
    expected = dataset.images(range(COUNT))
    copy = pickle.loads(pickle.dumps(dataset))
    results = [None] * 8

    def read(slot):
        results[slot] = copy.images(range(COUNT))

    threads = [threading.Thread(target=read, args=[slot]) for slot in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, expected) for result in results)


def test_order_is_one_permutation_per_epoch_and_independent_of_where_it_starts():
    order = sample_order(7, seed=1, start=0, count=70).reshape(10, 7)
    assert (np.sort(order, axis=1) == np.arange(7)).all() and len({tuple(epoch) for epoch in order}) > 5
    for start in (1, 7, 23, 69):
        assert np.array_equal(sample_order(7, 1, start, 70 - start), order.ravel()[start:])
    assert not np.array_equal(sample_order(7, 2, 0, 70), order.ravel())


@pytest.mark.parametrize("memory_limit, workers", [(1 << 30, 2), (0, 0), (0, 2)])
def test_batches_follow_the_order_and_resume(dataset, memory_limit, workers):
    options = {"seed": 5, "workers": workers, "memory_limit": memory_limit}
    stream = batches(dataset, 4, **options)
    seen = [next(stream) for _ in range(7)]
    order = sample_order(COUNT, 5, 0, 28)
    for step, (images, labels) in enumerate(seen):
        indices = order[4 * step : 4 * step + 4]
        assert images.dtype == torch.uint8 and labels.dtype == torch.float32
        assert np.array_equal(images, dataset.images(indices)) and np.array_equal(labels, dataset.labels(indices))
    images, labels = next(batches(dataset, 4, start_nimg=20, **options))
    assert torch.equal(images, seen[5][0]) and torch.equal(labels, seen[5][1])


def test_processes_share_each_step(dataset):
    whole = next(batches(dataset, 6, seed=0))[0]
    parts = [next(batches(dataset, 3, seed=0, rank=rank, world_size=2))[0] for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole)


def test_batches_can_mirror(dataset):
    images = next(batches(dataset, 2 * COUNT, seed=0, mirror=True))[0].numpy()
    both = np.concatenate([dataset.images(range(COUNT)), dataset.images(range(COUNT))[:, :, :, ::-1]])
    assert {image.tobytes() for image in images} == {image.tobytes() for image in both} and not dataset.mirror


@pytest.mark.gpu
def test_batches_on_a_gpu(dataset):
    images, labels = next(batches(dataset, 4, seed=0, device="cuda"))
    assert images.device.type == labels.device.type == "cuda"
    assert np.array_equal(images.cpu(), dataset.images(sample_order(COUNT, 0, 0, 4)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
@pytest.mark.parametrize("name", ["a.png", "dataset.json"])
def test_pipes_in_a_folder_are_not_waited_for(tmp_path, name):
    Image.new("L", (8, 8)).save(tmp_path / "b.png")
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=rf"cannot read {name} \(not a regular file\)"):
        ImageDataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b" " * (1 << 23), "cannot read dataset.json .* more than the"),
        (b"[" + b"[]," * 20_000 + b"0]", "dataset.json cannot be used: 20001 lists and objects, more than the 10016"),
        (b'{"labels": ' + b"[" * 9999, "dataset.json cannot be used: it nests too deeply|is malformed"),
    ],
)
def test_labels_have_bounds(tmp_path, text, reason):
    picture = io.BytesIO()
    Image.new("L", (8, 8)).save(picture, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", picture.getvalue())
        archive.writestr("dataset.json", text)
    with pytest.raises(InputError, match=reason):
        ImageDataset(tmp_path / "a.zip")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes in folders here")
def test_a_pipe_is_no_data_set(tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    with pytest.raises(InputError, match="is no regular file"):
        ImageDataset(tmp_path / "a.zip")


def test_damage_within_a_zip_file_is_named_by_whatever_reads_it(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(picture, format="PNG")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", picture.getvalue())
        archive.writestr("dataset.json", '{"labels": [["a.png", 1]]}')
    whole = (tmp_path / "x.zip").read_bytes()
    data = whole.index(b"IDAT") + 8
    (tmp_path / "x.zip").write_bytes(whole[:data] + b"\xff" + whole[data + 1 :])
    for read in (ImageDataset.content_hash, ImageDataset.decode_all):
        with pytest.raises(DamagedImages, match=r"image a\.png is damaged"):
            read(ImageDataset(tmp_path / "x.zip"))
    (tmp_path / "x.zip").write_bytes(whole.replace(b'a.png", 1]]}', b'a.png", 2]]}'))
    with pytest.raises(InputError, match=r"dataset\.json is damaged \(Bad CRC-32.*\); pack the data set anew"):
        ImageDataset(tmp_path / "x.zip")


def test_a_zip_file_with_a_damaged_directory_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("\u00e9.png", b"")  # marked as UTF-8
    whole = (tmp_path / "x.zip").read_bytes()
    version = b"PK\x01\x02\x14\x03\x14"  # of the entry in the directory
    for old, new in (("\u00e9".encode(), b"\x82\x82"), (version, version[:-1] + b"\xff")):
        assert old in whole
        (tmp_path / "x.zip").write_bytes(whole.replace(old, new))
        with pytest.raises(InputError, match=r"x.zip is neither a folder nor a zip file, or it is damaged"):
            ImageDataset(tmp_path / "x.zip")
