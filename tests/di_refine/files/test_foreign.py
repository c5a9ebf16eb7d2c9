"""Files that are given in the wrong place are called by what they are, in every place alike."""

import numpy as np
import pytest
from golden_io import GOLDEN

from di_refine.errors import InputError
from di_refine.files import foreign, networks, registry
from di_refine.files.datasets import ImageDataset
from di_refine.metrics.detectors import load_detector
from di_refine.metrics.statistics import FeatureStatistics

CASES = GOLDEN.parent / "cases"
READERS = {
    foreign.NETWORK: networks.load,
    foreign.IMAGES: ImageDataset,
    foreign.STATISTICS: FeatureStatistics.load,
    foreign.DETECTOR: load_detector,
}


def given(kind):
    """A file of a kind that one reader reads, or that none does, and what it is called."""
    shipped = {
        foreign.NETWORK: "stylegan2-digits.pkl",
        foreign.IMAGES: "digits-16x16.zip",
        foreign.STATISTICS: "stats-digits-features.npz",
        foreign.DETECTOR: "features-digits.safetensors",
    }
    if kind in shipped:
        options = {foreign.IMAGES: "--data and --images take", foreign.STATISTICS: "--ref takes"}
        return registry.resolve(shipped[kind]), options.get(kind, f"--{kind} takes")
    return CASES / kind, "a web page"


@pytest.mark.parametrize("kind", [*READERS, "web_page.pkl"])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_in_the_wrong_place_is_called_by_what_it_is(reader, kind):
    path, words = given(kind)
    if kind == reader:
        READERS[reader](path)
    else:
        with pytest.raises(InputError, match=f"{path.name} is a?.*{words}"):
            READERS[reader](path)


def test_other_arrays_and_checkpoints_are_described_by_their_reader(tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(InputError, match="other.npz: lacks mu and sigma; it holds images"):
        FeatureStatistics.load(tmp_path / "other.npz")
    with pytest.raises(InputError, match="other.npz holds no images, which would be in arr_0; it has images"):
        ImageDataset(tmp_path / "other.npz")
    with pytest.raises(InputError, match="without mu and sigma or arr_0; no command here reads it"):
        networks.load(tmp_path / "other.npz")
    with pytest.raises(InputError, match="not a feature network; expected Inception weights"):
        load_detector(CASES / "checkpoint.pt")
