"""Reading pictures and labels from a folder, a zip archive or an array: names, headers, pixels, `dataset.json`."""

import io
import json
import os
import threading
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from PIL import Image

from di_refine.errors import InputError
from di_refine.files import arrays, decoding, foreign
from torch_utils import safe_files

MAX_BYTES = 1 << 29  # of one picture's file, unpacked; an uncompressed one of the largest size has as many
JSON_BYTES, JSON_BYTES_PER_IMAGE = 1 << 22, 1 << 15  # of dataset.json
JSON_INFLATION = 8  # bytes of dataset.json for each of the zip file


class DamagedImages(InputError):
    """Some images are damaged, or no images at all; the message names the first of them.

    Attributes:
        path: of the folder or zip file.
        faults: name -> what is wrong with it.
    """

    SHOWN = 10

    def __init__(self, path: Path, faults: dict[str, str]):
        self.path, self.faults = path, faults
        if len(faults) == 1:
            ((name, fault),) = faults.items()
            super().__init__(f"{path}: image {name} is damaged or not an image ({fault})")
            return
        shown = [f"{name} ({fault})" for name, fault in list(faults.items())[: self.SHOWN]]
        more = f" and {len(faults) - self.SHOWN} more" if len(faults) > self.SHOWN else ""
        super().__init__(f"{path}: {len(faults)} images are damaged or not images: {', '.join(shown)}{more}")

    def __reduce__(self):
        return type(self), (self.path, self.faults)  # worker processes send it


class ImageFiles:
    """Read access to the files of a folder or a zip archive, by their names relative to it.

    An object of this class may be pickled and used from several threads and processes.

    Args:
        path: the folder or zip file.
        setting: the name of the setting that holds it, for messages.

    Attributes:
        remarks: what was met in images that were read (see `decoding`), with the names of the images.

    Raises:
        InputError: the path does not exist or is neither a folder nor a zip file.
    """

    def __init__(self, path: str | os.PathLike, setting: str = "data"):
        self.path = Path(path)
        self.remarks: dict[str, set[str]] = {}
        self._archive: zipfile.ZipFile | None = None
        self._lock = threading.Lock()
        self._owner = 0
        if self.path.is_dir():
            found = (Path(root, file) for root, _, files in os.walk(self.path) for file in files)
            stored = [(name, name) for name in (file.relative_to(self.path).as_posix() for file in found)]
            self._is_zip = False
        elif not self.path.is_file():
            problem = "is no regular file" if self.path.exists() else "does not exist"
            raise InputError(f"{setting}={path} {problem}; give a folder or zip file of images")
        else:
            self._is_zip = True
            try:
                stored = [(entry.filename, _archived_name(entry)) for entry in self._zip().infolist()]
            except PermissionError:
                raise
            except Exception:  # zipfile raises a dozen kinds of them for damaged directories
                neither = f"{path} is neither a folder nor a zip file, or it is damaged"
                raise InputError(f"`{setting}`: {foreign.explained(neither, path, foreign.IMAGES)}") from None
        #: How many files, by extension, are no images and were passed over.
        self.skipped: dict[str, int] = {}
        #: Name -> what the file system or the archive calls the file.
        self._stored: dict[str, str] = {}
        for original, spelled in sorted(stored):
            name = spelled.replace("\\", "/")  # some Windows programs write zip files so
            if name.endswith("/"):
                continue
            is_image = name.lower().endswith(decoding.EXTENSIONS)
            if _is_hidden(name) or not (is_image or name == "dataset.json"):
                kind = "hidden" if _is_hidden(name) else PurePosixPath(name.lower()).suffix or "without extension"
                self.skipped[kind] = self.skipped.get(kind, 0) + 1
                continue
            if not _is_unicode(name):
                shown = original.encode(errors="backslashreplace").decode()
                raise InputError(
                    f"{setting}={path} has file names that are not UTF-8 (such as {shown}); {self._advice()}"
                )
            if name in self._stored:
                raise InputError(f"{setting}={path} holds two files named {name}; rename one of them")
            self._stored[name] = original
        self.names = sorted(self._stored)
        self.image_names = [name for name in self.names if name != "dataset.json"]

    def _advice(self) -> str:
        if self._is_zip:
            return "unpack it with a program that is told their encoding, as in unzip -O GBK, and give the folder"
        return "rename them, as convmv -f GBK -t UTF-8 does"

    def open(self, name: str, most: int | None = None) -> IO[bytes]:
        """Open one file for reading.

        Args:
            name: of the file.
            most: how many bytes it may have, unpacked; None is what a picture may have.

        Raises:
            InputError: the file cannot be opened, or is too large; the message names it.
        """
        try:
            original = self._stored[name]
            if not self._is_zip:
                return safe_files.open_regular(self.path / original, most or MAX_BYTES)
            if (size := self._zip().getinfo(original).file_size) > (most or MAX_BYTES):
                raise NotImplementedError(f"{size} bytes, more than the {most or MAX_BYTES} there may be")
            return self._zip().open(original)
        except (zipfile.BadZipFile, OSError, KeyError, RuntimeError, NotImplementedError) as error:
            raise InputError(f"{self.path}: cannot read {name} ({reason(error)})") from None

    def image(self, name: str) -> Image.Image:
        """Decode one image, upright.

        Raises:
            DamagedImages: the image is damaged or no image at all.
        """
        try:
            with self._lock, self.open(name) as file:  # ZipFile counts its open members without a lock
                content = file.read()
            image, remarks = decoding.decode(content, name)
        except InputError:
            raise
        except Exception as error:  # Pillow and zipfile raise a dozen unrelated types for damaged data
            raise DamagedImages(self.path, {name: reason(error)}) from None
        self._remember(name, remarks)
        return image

    def header(self, name: str) -> tuple[tuple[int, int], str]:
        """Return (width, height) and Pillow mode of what `image` gives, without decoding it where the header tells.

        Raises:
            InputError: as `image` does.
        """
        try:
            with self.open(name) as file:
                size, mode, remarks = decoding.header(file, name)
        except InputError:
            raise
        except Exception as error:
            raise DamagedImages(self.path, {name: reason(error)}) from None
        self._remember(name, remarks)
        return size, mode

    def _remember(self, name: str, remarks: set[str]) -> None:
        for remark in remarks:
            self.remarks.setdefault(remark, set()).add(name)

    def notes(self) -> list[str]:
        """Return sentences about images read so far that are more than pixels, and about what was passed over."""
        notes = [
            f"{len(names)} image{'s' * (len(names) > 1)} {remark} (such as {min(names)})"
            for remark, names in sorted(self.remarks.items())
        ]
        if self.skipped:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items()))
            notes.append(f"passed over what are no images in a format that can be read: {kinds}")
        return notes

    def labels(self) -> dict[str, int | list[float]] | None:
        """Return the labels in `dataset.json` by image name, or None where there are none.

        Raises:
            InputError: the file is malformed, names an image that is not there or one twice, or leaves one without a
                label.
        """
        where = f"{self.path}: dataset.json"
        entries = self._description().get("labels")
        if entries is None:
            return None
        pairs = []
        for entry in entries if isinstance(entries, list) else [entries]:
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
                shown = json.dumps(entry)[:60]
                raise InputError(f'{where} is malformed: among "labels" is {shown}, expected ["name", label]')
            pairs.append((entry[0].replace("\\", "/"), entry[1]))
        labels = dict(pairs)
        if len(labels) < len(pairs):
            twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            given = " and ".join(str(label) for name, label in pairs if name == twice)
            raise InputError(f"{where} lists {twice} more than once (labels {given}); leave one entry for each image")
        known = set(self.image_names)
        if unknown := next((name for name in labels if name not in known), None):
            raise InputError(f"{where} has a label for {unknown}, which is not there")
        if missing := next((name for name in self.image_names if name not in labels), None):
            raise InputError(f"{where} has no label for {missing}; label every image or none")
        return labels

    def class_names(self) -> list[str] | None:
        """Return what the class numbers mean, if `dataset.json` says so."""
        names = self._description().get("classes")
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None

    def _description(self) -> dict[str, Any]:
        """Return the content of `dataset.json`, {} where there is none.

        Raises:
            InputError: it is malformed.
        """
        if "dataset.json" not in self.names:
            return {}
        where = f"{self.path}: dataset.json"
        try:
            most = JSON_BYTES + JSON_BYTES_PER_IMAGE * len(self.image_names)
            if self._is_zip:
                most = min(most, JSON_BYTES + JSON_INFLATION * self.path.stat().st_size)
            with self.open("dataset.json", most) as file:
                content = safe_files.parse_json(file.read(), 10_000 + 16 * len(self.image_names))
        except InputError:
            raise
        except json.JSONDecodeError as error:
            place = f"line {error.lineno}, column {error.colno}"
            raise InputError(f"{where} is malformed at {place} ({error.msg}); mend it there") from None
        except UnicodeDecodeError:
            raise InputError(f"{where} is no UTF-8 text; save it as UTF-8") from None
        except ValueError as error:
            raise InputError(f"{where} cannot be used: {error}") from None
        except Exception as error:  # zipfile raises a dozen unrelated types for damaged data
            raise InputError(f"{where} is damaged ({reason(error)}); pack the data set anew") from None
        if not isinstance(content, dict):
            raise InputError(f'{where} is malformed; expected {{"labels": [["name", 0], ...]}}, not a list or a value')
        return content

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None or self._owner != os.getpid():  # a forked file handle would share its position
            self._archive, self._owner = zipfile.ZipFile(self.path), os.getpid()
        return self._archive

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


class ArrayFiles:
    """Images in the array `arr_0` of an .npz file, in the place of `ImageFiles`; diffusion projects write samples so.

    `arr_1` may hold their class numbers.

    Args:
        path: the file.
        setting: the name of the setting that holds it, for messages.

    Raises:
        InputError: there is no such file, it is damaged, or the arrays are others.
    """

    def __init__(self, path: str | os.PathLike, setting: str = "data"):
        self.path = Path(path)
        where = f"{setting}={path}"
        try:
            found, others = arrays.read(self.path, ("arr_0", "arr_1"))
        except FileNotFoundError:
            raise InputError(f"{where} does not exist") from None
        except arrays.ERRORS as error:
            raise InputError(f"{where} is no file of arrays, or it is damaged ({reason(error)})") from None
        if "arr_0" not in found:
            problem = f"{path} holds no images, which would be in arr_0; it has {', '.join(others[:20]) or 'nothing'}"
            raise InputError(f"`{setting}`: {foreign.explained(problem, path, foreign.IMAGES)}")
        pixels = found["arr_0"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3, 4) or pixels.size == 0:
            raise InputError(
                f"{where}: arr_0 is {pixels.dtype} {list(pixels.shape)}, not uint8 [N, H, W, C] with 1, 3 or 4 channels"
            )
        self._pixels = pixels[..., 0] if pixels.shape[3] == 1 else pixels
        self._classes = found.get("arr_1")
        if self._classes is not None and (
            self._classes.shape != pixels.shape[:1] or self._classes.dtype.kind not in "iu"
        ):
            raise InputError(
                f"{where}: arr_1 is not one class number for each of the {len(pixels)} images; leave it out"
            )
        self.skipped = dict.fromkeys(others, 1)
        self.names = self.image_names = [f"arr_0[{index}]" for index in range(len(pixels))]
        self._index = {name: index for index, name in enumerate(self.names)}

    def open(self, name: str) -> IO[bytes]:
        """Open the pixels of one image for reading."""
        return io.BytesIO(self._pixels[self._index[name]].tobytes())

    def image(self, name: str) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self._pixels[self._index[name]])

    def header(self, name: str) -> tuple[tuple[int, int], str]:
        """Return (width, height) and Pillow mode of one image."""
        image = self.image(self.names[0])  # all are alike
        return image.size, image.mode

    def labels(self) -> dict[str, int] | None:
        """Return the class numbers by image name, or None where there are none."""
        return None if self._classes is None else dict(zip(self.names, self._classes.tolist()))

    def class_names(self) -> None:
        """Return nothing: the file does not say what classes mean."""

    def notes(self) -> list[str]:
        """Return a sentence about arrays that were passed over."""
        return [f"passed over arrays that are no images: {', '.join(self.skipped)}"] if self.skipped else []


def open_files(path: str | os.PathLike, setting: str = "data") -> ImageFiles | ArrayFiles:
    """Open a folder, a zip file or an .npz file of images, named by a setting.

    Raises:
        InputError: it is none of these, or has no images.
    """
    if Path(path).suffix.lower() == ".npz":
        return ArrayFiles(path, setting)
    files = ImageFiles(path, setting)
    if not files.image_names:
        problem = "; ".join([f"{path} holds no images", *files.notes()])
        raise InputError(f"`{setting}`: {foreign.explained(problem, path, foreign.IMAGES)}")
    return files


def _archived_name(entry: zipfile.ZipInfo) -> str:
    """Return a zip member's name, with surrogates where it is not UTF-8."""
    says_utf8 = entry.flag_bits & 0x800 or entry.filename != entry.orig_filename  # by the Unicode field for names
    if says_utf8 or entry.filename.isascii():
        return entry.filename
    return entry.filename.encode("cp437").decode(errors="surrogateescape")  # zipfile takes the bytes for cp437


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def reason(error: Exception) -> str:
    """Say what is wrong with a picture or an archive, in the words of the library that met it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).split(" <_io")[0]  # Pillow names the in-memory file object
    return "unknown format" if "cannot identify image file" in text else text or type(error).__name__
