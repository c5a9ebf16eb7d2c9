"""Settings of the whole suite."""

import os

import pytest
import torch

from di_refine import start

start.set_runtime()  # as in every command
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_collection_modifyitems(items):
    """Tests whose mark names something that is not here are left out, with the reason in the report."""
    skip = {}
    if not torch.cuda.is_available():
        skip["gpu"] = pytest.mark.skip(reason="needs a CUDA device; run `make gpu-check` on one")
    if "COMPAT_PYTHON" not in os.environ:
        skip["compat"] = pytest.mark.skip(reason="needs an old Python with an old torch; run `make compat`")
    for item in items:
        for mark in skip.keys() & set(item.keywords):
            item.add_marker(skip[mark])


@pytest.fixture(autouse=True, scope="session")
def cache_folder_of_the_suite(tmp_path_factory):
    """Nothing is read from the user's cache folder or left there, also not by commands that tests start."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DI_REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
