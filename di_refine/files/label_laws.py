"""Which law of labels a command draws from: what its option `labels` means for a network."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from di_refine.errors import InputError
from di_refine.files import registry
from di_refine.files.datasets import ImageDataset, label_array
from di_refine.labels import FILE, LIST, UNIFORM, UNKNOWN, LabelLaw, numbers
from torch_utils import safe_files


def choose(text: str | None, own: LabelLaw, dataset: ImageDataset | None = None, label: str | None = None) -> LabelLaw:
    """Return the law that the setting `labels` names, or the setting `label`, which names one class.

    Args:
        text: None for the network's own; 'uniform'; 'dataset'; the number or name of a class; frequencies separated by
            commas; a labelled data set (path, URL or name); a JSON file, or JSON itself. JSON is a list of frequencies,
            an object with a number for each class by its name, a list of label vectors, or the content of a
            `dataset.json`.
        own: the network's law, as its file has it.
        dataset: what 'dataset' means; None means the data that the network's file knows of.
        label: the number or name of the class to draw alone; None leaves it to `text`.

    Raises:
        InputError: it names nothing, or no law for this network.
    """
    if label is not None and text is not None:
        raise InputError("`labels` and `label` both say what to draw; give one of them")
    if text is None:
        return own if label is None else own.only(label)
    if text == "uniform":
        if not own.has_classes:
            raise InputError("labels=uniform: the network is conditional on label vectors, not on classes")
        return replace(own, counts=None, origin=UNIFORM, where="")
    if not own.label_dim:
        raise InputError(f"labels={text}: the network has no classes")
    if text == "dataset":
        return _of_dataset(own, dataset)
    try:
        return _fitting(own, _named(text, own))
    except InputError as error:
        found = str(error)
        raise InputError(found if found.startswith("labels=") else f"labels={text}: {found}") from None


def _of_dataset(own: LabelLaw, dataset: ImageDataset | None) -> LabelLaw:
    if dataset is not None and dataset.has_labels:
        return _fitting(own, dataset.label_law())
    if own.origin == UNKNOWN:
        raise InputError(
            "labels=dataset: the network's file does not say what labels its training data had; name the data set "
            "itself, as in labels=train.zip"
        )
    return own


def _named(text: str, own: LabelLaw) -> LabelLaw:
    """The law of a text that is no word of its own."""
    dim = own.label_dim
    if text[:1] in ("[", "{"):
        return _of_json(text.encode("utf-8", "surrogateescape"), own, LIST, "")
    path = Path(text)
    if not os.path.exists(text):  # which, unlike Path, takes a list of any length for no file
        if own.find(text) is not None:
            return own.only(text, "labels")
        try:
            frequencies = [float(word) for word in text.split(",")]
        except ValueError:
            frequencies = None
        if frequencies is not None and (len(frequencies) > 1 or not text.isdecimal()):
            return LabelLaw(dim, np.array(frequencies), origin=LIST)
        if text.isdecimal():
            return own.only(text, "labels")
    if path.suffix == ".json" and path.is_file():
        try:
            with safe_files.open_regular(path, safe_files.JSON_BYTES) as file:
                return _of_json(file.read(), own, FILE, text)
        except OSError as error:
            raise InputError(f"it cannot be read ({error.strerror or error})") from None
    path = registry.resolve(text, setting="labels", kind="dataset")
    return replace(ImageDataset(path, setting="labels").label_law(), origin=FILE, where=str(path))


def _of_json(content: bytes, own: LabelLaw, origin: str, where: str) -> LabelLaw:
    dim = own.label_dim
    try:
        value: Any = safe_files.parse_json(content)
    except json.JSONDecodeError as error:
        raise InputError(f"it is no JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except ValueError as error:
        raise InputError(f"it is no JSON ({error})") from None
    if isinstance(value, dict) and isinstance(value.get("labels"), list):
        value = [entry[1] if isinstance(entry, list) and len(entry) == 2 else None for entry in value["labels"]]
        labels = label_array(value, [""] * len(value), Path(where or "JSON"))
        if labels.ndim == 1:
            value = np.bincount(labels, minlength=dim).tolist()
        else:
            value = labels.tolist()
    elif isinstance(value, dict) and "class_counts" in value:
        value = value["class_counts"]
    elif isinstance(value, dict):
        value = _by_name(value, own)
    if isinstance(value, list) and value and isinstance(value[0], list):
        rows = label_array(value, [""] * len(value), Path(where or "JSON"))
        return LabelLaw.of_rows(rows, origin=origin, where=where)
    return LabelLaw(dim, numbers(value), origin=origin, where=where)


def _by_name(value: dict[str, Any], own: LabelLaw) -> list[Any]:
    counts: list[Any] = [0] * own.label_dim
    for name, count in value.items():
        counts[own.only(name).present[0]] = count
    return counts


def _fitting(own: LabelLaw, law: LabelLaw) -> LabelLaw:
    """A law with the names of the network, checked against it."""
    if law.label_dim != own.label_dim:
        raise InputError(f"it has {law.label_dim or 'no'} classes, and the network {own.label_dim}")
    if own.origin != UNKNOWN and law.has_classes != own.has_classes:
        kinds = {True: "classes", False: "label vectors"}
        raise InputError(f"it has {kinds[law.has_classes]}, and the network is conditional on {kinds[own.has_classes]}")
    own.check_order(law.names, "it")
    return replace(law, names=own.names or law.names)
