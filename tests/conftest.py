"""Settings of the whole suite."""

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are left out where there is no GPU, with the reason in the report."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run `make gpu-check` on one"))


@pytest.fixture(autouse=True, scope="session")
def cache_folder_of_the_suite(tmp_path_factory):
    """Nothing is read from the user's cache folder or left there, also not by commands that tests start."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DI_REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
