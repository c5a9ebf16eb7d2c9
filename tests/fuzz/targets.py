"""What `fuzz.py` fuzzes: readers, the files that they get, and seeds.

A zip file's checksums would hide all that is in it from a fuzzer. So an input that does not begin as a zip file does is
cut at `CUT` into the content of a file's parts, of which `prepare` makes a right archive.
"""

import io
import json
import math
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.torch
import test_persistence_hostile as hostile
import torch
from golden_io import GOLDEN
from PIL import Image

from di_refine.errors import InputError
from di_refine.files import dataset_sources, image_files, label_laws, networks, registry, safetensors_pair
from di_refine.files.datasets import ImageDataset
from di_refine.labels import LabelLaw
from di_refine.metrics.statistics import FeatureStatistics
from di_refine.runs import checkpoint, directory
from torch_utils import persistence
from torch_utils.persistence import reader, writer

CUT = b"\n-cut-\n"
SHIPPED = Path(__file__).resolve().parents[2] / "pretrained"


class Target:
    """A reader.

    Attributes:
        errors: the exceptions that it documents.
        longest: bytes of an input.
        printable: whether messages hold no control characters (the others are cleaned where they are shown).
        actions: what it does that most may not: 'open' for writing, or 'compile', as NumPy does for headers.
    """

    errors: tuple[type[Exception], ...] = (InputError,)
    longest = 30_000
    printable = False
    actions: tuple[str, ...] = ()

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.folder = Path(self._folder.name)

    def seeds(self):
        """Return inputs to begin with."""
        raise NotImplementedError

    def prepare(self, data):
        """Return what the reader gets for an input, such as a path."""
        return data

    def read(self, given):
        """Let the reader read it."""
        raise NotImplementedError

    def check(self):
        """Raise where reading had an effect."""

    def archive(self, name, data, members):
        """Write a zip file whose members have the parts of an input, and return its path."""
        path = self.folder / name
        if data.startswith(b"PK"):
            path.write_bytes(data)
            return path
        with zipfile.ZipFile(path, "w") as archive:
            for member, part in zip(members, data.split(CUT)):
                if part != b"-":
                    archive.writestr(member, part)
        return path


class Networks(Target):
    """Network pickles. Seeds are records of the golden pickles that are small, on their own, and the hostile files."""

    errors = (persistence.NetworkFormatError,)
    printable = True

    def seeds(self):
        found = {f"hostile-{name}": data for name, (data, _) in hostile.HOSTILE.items()}
        found["good"] = hostile.GOOD
        for path in sorted(GOLDEN.glob("*/*.pkl")):
            if len(path.read_bytes()) > 2_000_000:
                continue
            content = reader.read(path.read_bytes())
            records = content.values() if isinstance(content, dict) else content
            for index, record in enumerate(item for item in records if isinstance(item, reader.Record)):
                for number, part in enumerate(parts(record)):
                    try:
                        data = written({"G" if number else "x": part})
                    except TypeError:  # TensorFlow-era records are not written
                        continue
                    found[f"{path.stem}-{index}-{part.class_name}"] = data  # one of each class
        return [data for data in found.values() if len(data) <= self.longest]

    def read(self, given):
        persistence.load(given)

    def check(self):
        assert hostile.CANARY == []


def parts(record):
    """A record and all below it."""
    yield record
    for child in record.state.get("_modules", {}).values():
        if child is not None:
            yield from parts(child)


def written(content) -> bytes:
    buffer = io.BytesIO()
    writer.write(
        {key: writer.plain(value) for key, value in content.items()},
        buffer,
        persistence._reconstruct_persistent_obj,
    )
    return buffer.getvalue()


class Pairs(Target):
    """Networks as safetensors and JSON. The JSON may name the other file's checksum as SHA256."""

    errors = (persistence.NetworkFormatError,)

    def seeds(self):
        small = [data for data in Networks().seeds() if len(data) < 8000]
        for data in [(SHIPPED / "stylegan2-digits.pkl").read_bytes(), *small]:
            try:
                safetensors_pair.save(persistence.load(data), self.folder / "seed.json")
            except (persistence.NetworkFormatError, KeyError):
                continue
            text, tensors = ((self.folder / f"seed.{kind}").read_bytes() for kind in ("json", "safetensors"))
            config = json.loads(text)
            text = text.replace(config["tensors"]["sha256"].encode(), b"SHA256")
            yield json.dumps(json.loads(text)).encode() + CUT + tensors
        tensors = safetensors.torch.save({"a": torch.zeros(2, 3), "b": torch.zeros(())})
        config = {"format": "di-refine-networks", "version": 1, "tensors": {"sha256": "SHA256"}, "sources": {"s": "x"}}
        record = {"$record": "X", "source": "s", "version": 6, "state": {"_init_args": {"$tuple": [1]}, "_modules": {}}}
        values = [{"$tensor": "a", "stride": [1, 2]}, {"$float": "nan"}, {"$bytes": "QUJD"}, {"$set": ["x"]}, record]
        values += [{"$parameter": "b"}, {"$dict": [[1, 2]]}, {"$ordered": [["x", 2.5]]}, {"$shared": 0}, {"$shared": 0}]
        content = {"x": values, "G_ema": record}
        yield json.dumps(config | {"shared": [[1, {"$tuple": []}]], "content": content}).encode() + CUT + tensors

    longest = 400_000

    def prepare(self, data):
        text, _, tensors = data.partition(CUT)
        (self.folder / "x.safetensors").write_bytes(tensors)
        digest = safetensors_pair.sha256_of(self.folder / "x.safetensors")
        (self.folder / "x.json").write_bytes(text.replace(b"SHA256", digest.encode()))
        return self.folder / "x.json"

    def read(self, given):
        safetensors_pair.load(given)


class States(Target):
    """Training states: the pickle, and the content of three storages."""

    members = ("x/data.pkl", "x/data/0", "x/data/1", "x/data/2", "x/version", "x/byteorder", "x/data.pkl")

    def seeds(self):
        parameter = torch.nn.Parameter(torch.zeros(3))
        for content in (
            {"trainer": {"w": torch.zeros(2, 2)}, "loop": {"nimg": 3, "best": [1, {"fid": 2.5}], "saved": [1, 2]}},
            {"a": torch.zeros(2, dtype=torch.bfloat16), "p": parameter, "e": (1, None), "x": "text", "n": 1 << 80},
            {"l": torch.nn.Linear(2, 2).state_dict(), "i": torch.arange(6).reshape(2, 3).T},
        ):
            file = io.BytesIO()
            torch.save(content, file)
            yield file.getvalue()
            with zipfile.ZipFile(file) as archive:
                by_end = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
            names = ["data.pkl", "data/0", "data/1", "data/2"]
            yield CUT.join([by_end.get(name, b"-") for name in names] + [b"3\n", b"little"])

    def prepare(self, data):
        if not data.startswith(b"PK") and data.count(CUT) < 4:
            data = data + CUT * (4 - data.count(CUT)) + b"3\n"
        return self.archive("training-state-000001.pt", data, self.members)

    def read(self, given):
        checkpoint.load(given)


class Arrays(Target):
    """Statistics and arrays of images in .npz files."""

    actions = ("compile",)

    members = [
        f"{name}.npy" for name in ("mu", "sigma", "features", "count", "detector", "resolution", "arr_0", "arr_1")
    ]

    def seeds(self):
        def npy(array):
            file = io.BytesIO()
            np.save(file, array)
            return file.getvalue()

        arrays = [np.zeros(2), np.eye(2), np.zeros([3, 2], "f2"), np.array(3), np.array("x"), np.array(16)]
        yield CUT.join(map(npy, arrays))
        images = [np.zeros([2, 4, 4, 3], np.uint8), np.arange(2)]
        yield CUT.join([b"-"] * 6 + list(map(npy, images)))
        yield CUT.join(map(npy, [np.zeros(2, ">i8"), np.asfortranarray(np.eye(2, dtype="f4")), np.zeros([1, 2], bool)]))
        file = io.BytesIO()
        np.savez_compressed(file, mu=np.zeros(2), sigma=np.eye(2), count=np.array(2))
        yield file.getvalue()

    def prepare(self, data):
        return self.archive("x.npz", data, self.members)

    def read(self, given):
        failures = []
        for function in (FeatureStatistics.load, self._images):
            try:
                function(given)
            except InputError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _images(self, path):
        dataset = ImageDataset(path)
        dataset.labels(range(len(dataset)))
        dataset.images([0])


class Datasets(Target):
    """Data sets: dataset.json, and the files of two pictures; and labels that a command is given as JSON."""

    members = ("dataset.json", "a.png", "b/c.png")

    def seeds(self):
        file = io.BytesIO()
        Image.new("L", (8, 8)).save(file, format="PNG")
        png = file.getvalue()
        for labels in ([3, 1], [[0.5, 1], [1, 0]], None, [True, 1e9], [-1, None], [1 << 31, "1"], [[1], [1, 2]]):
            pairs = labels and [["a.png", labels[0]], ["b\\c.png", labels[1]]]
            content = {"labels": pairs, "classes": ["x", "y"], "class_counts": [1, 2.5, 0]}
            yield CUT.join([json.dumps(content).encode(), png, png])
        for value in ([1, 2, 3], [[1, 0, 0]], {"x": 1, "0": 2}, {"class_counts": [1, 1, 1]}):
            yield CUT.join([json.dumps(value).encode(), png, png])
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.png", png)
            archive.writestr("dataset.json", '{"labels": [["a.png", 1]]}')
        yield file.getvalue()

    def prepare(self, data):
        return self.archive("x.zip", data, self.members), data.partition(CUT)[0]

    def read(self, given):
        path, text = given
        failures = []
        for function in (self._open, self._convert, lambda _: self._choose(text)):
            try:
                function(path)
            except InputError as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _open(self, path):
        dataset = ImageDataset(path)
        dataset.labels(range(len(dataset)))
        dataset.label_law()
        dataset.content_hash()
        dataset.images([0])

    def _convert(self, path):
        source = dataset_sources.open_source(str(path), "auto")
        source.read(0)
        if source.labels:
            image_files.json.dumps(source.labels, allow_nan=False)

    def _choose(self, text):
        text = text.decode(errors="surrogateescape")
        if text[:1] in ("[", "{"):
            label_laws.choose(text, LabelLaw(3, names=("x", "y", "z")))


class Registry(Target):
    """The registry of names."""

    def seeds(self):
        records = json.loads((SHIPPED / "registry.json").read_text())
        names = ["stylegan2-digits.pkl", "stylegan2-cifar10.pkl", "edm-cifar10-32x32-cond-vp.pkl"]
        yield json.dumps({name: records[name] for name in names}).encode()
        yield b'{"x.pkl": {"kind": "edm", "file": "x.pkl", "teacher": "y"}, "y": {"kind": "edm", "url": "https://h/y%41?z"}}'

    def prepare(self, data):
        (self.folder / "registry.json").write_bytes(data)
        return self.folder

    def read(self, given):
        registry.registry.cache_clear()
        places = {"pretrained_folder": lambda: given, "cache_folder": lambda: given / "cache"}
        with mock.patch.multiple(registry, **places):
            for name in [*registry.registry()][:20]:
                registry.find(name[:-4])
                registry.entry(name)
                registry.state(name)
                registry.entry_for_path(given / name)
                for role in ("teacher", "detector", "statistics"):
                    try:
                        registry.companion(given / name, role, offline=True)
                    except InputError:
                        continue
                registry.resolve(name, kind="edm", offline=True)


class Runs(Target):
    """What a run directory holds beside networks: recorded options, and logs of JSON lines, which are mended."""

    actions = ("open",)

    def seeds(self):
        options = {"command": "refine", "lr": 0.001, "minutes": None, "kimg": 3, "sources": {"lr": "auto"}}
        lines = b'{"kimg": 1.5}\n{"kimg": 3.0, "lo'
        yield json.dumps(options).encode() + CUT + lines + CUT + b'{"snapshot_pkl": "network-snapshot-000002.pkl"}\n'

    def prepare(self, data):
        options, lines, metric = (data.split(CUT) + [b"", b""])[:3]
        for name, part in (("training_options.json", options), ("stats.jsonl", lines), ("metric-x.jsonl", metric)):
            (self.folder / name).write_bytes(part)
        return self.folder

    def read(self, given):
        directory._filter_lines(given / "stats.jsonl", lambda record: round(record["kimg"] * 1000) <= 2000)
        directory._filter_lines(given / "metric-x.jsonl", lambda record: directory._measured_at(record) <= 2000)
        options = {"command": "refine", "lr": 0.002, "batch": 64}
        directory.recorded_options(given, None, "x", "refine")
        directory.check_run(given, None, "x", options, ["lr"])


class Weights(Target):
    """Weights of OpenAI's diffusion models and of rosinality's StyleGAN2: flags, and the shapes of the tensors."""

    longest = 200_000

    def seeds(self):
        for name in ("gd64-cond", "id-cosine4000", "cm-bedroom256"):
            meta = json.loads(str(np.load(GOLDEN / f"guided/{name}.npz")["meta"].reshape(-1)[0]))
            flags = {**meta["flags"], "training_mode": "edm"}
            yield json.dumps(flags).encode() + CUT + json.dumps(meta["state_dict"]).encode()
        checkpoint = torch.load(GOLDEN / "rosinality/converted-32.pt", weights_only=True)
        shapes = {key: {name: list(t.shape) for name, t in checkpoint[key].items()} for key in ("g_ema", "d")}
        yield b"{}" + CUT + json.dumps({**shapes, "latent_avg": [24]}).encode()

    def prepare(self, data):
        flags, _, shapes = data.partition(CUT)
        self.size = 1 << 20  # numbers in a file

        def tensors(value):
            if isinstance(value, dict):
                return {name: tensors(item) for name, item in value.items()}
            if isinstance(value, list) and all(type(size) is int and 0 <= size < 1000 for size in value):
                self.size -= math.prod(value)
                return torch.ones(value) if self.size > 0 else None
            return value

        try:
            torch.save(tensors(json.loads(shapes)), self.folder / "x.pt")
        except (ValueError, RecursionError):
            torch.save({}, self.folder / "x.pt")
        (self.folder / "x.json").write_bytes(flags)
        return self.folder / "x.pt"

    def read(self, given):
        networks.load(given)


class Folders(Target):
    """diffusers folders: the index, the network's settings, the scheduler's, and what is ours, with right weights."""

    def seeds(self):
        for name in ("ddpm-eps-linear", "ddim-v-scaled-class", "score-sde-ve", "edm-epsilon"):
            folder = GOLDEN / "diffusers" / name
            files = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
            yield CUT.join([*((folder / file).read_bytes() for file in files), b'{"distilled_sigmas": [2.5]}'])

    def prepare(self, data):
        names = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "di-refine.json")
        for name, part in zip(names, data.split(CUT) + [b"-"] * 4):
            path = self.folder / name
            path.parent.mkdir(exist_ok=True)
            path.unlink(missing_ok=True)
            if part != b"-":
                path.write_bytes(part)
        weights = "unet/diffusion_pytorch_model.safetensors"
        if not (self.folder / weights).exists():
            shutil.copy(GOLDEN / "diffusers/ddpm-eps-linear" / weights, self.folder / weights)
        return self.folder

    def read(self, given):
        networks.load(given)


TARGETS = {
    "weights": Weights,
    "folders": Folders,
    "networks": Networks,
    "pairs": Pairs,
    "states": States,
    "arrays": Arrays,
    "datasets": Datasets,
    "registry": Registry,
    "runs": Runs,
}
