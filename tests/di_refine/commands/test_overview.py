"""What a training says before it begins, and that Ctrl-C ends measurements after it, too."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from di_refine.commands import overview, pretrain, training
from di_refine.files.datasets import ImageDataset
from di_refine.runs import stopping
from di_refine.runs.directory import RunDirectory
from torch_utils.misc import derive_seed


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Twelve images of class 'a b', and one of class 'c', 8 x 8, grey."""
    path = tmp_path_factory.mktemp("images")
    labels = []
    for i in range(13):
        Image.fromarray(np.full([8, 8], 10 * i if i < 12 else 255, np.uint8)).save(path / f"{i}.png")
        labels.append([f"{i}.png", int(i == 12)])
    (path / "dataset.json").write_text(json.dumps({"labels": labels, "classes": ["a b", "c"]}))
    return path


def test_data_are_listed_and_drawn_by_class(folders, tmp_path):
    shown = overview.Overview({}, 4, torch.device("cpu"), dataset=ImageDataset(folders))
    assert overview.of_data(shown.dataset) == (
        f"data: {folders}, 13 images of 8x8 pixels and 1 channel, 2 classes: a b 12, c 1"
    )
    shown.draw_reals(tmp_path / "reals.png")
    picture = np.asarray(Image.open(tmp_path / "reals.png").convert("L"))
    grid = picture[-128:, -640:]  # two rows of ten images, enlarged eight times; titles on their left
    assert grid[64:].min() == 255 and len(np.unique(grid[:64])) == 10
    assert picture.shape[1] > 320 and picture[:, :-320].min() < 128, "the names"


def test_networks_are_counted_by_resolution():
    net = torch.nn.ModuleDict(
        {"b8": torch.nn.Linear(3, 2), "b16": torch.nn.Linear(1, 1), "16x16_conv": torch.nn.Linear(1, 1)}
    )
    net["mapping"] = torch.nn.Linear(1, 1, bias=False)
    assert overview.of_network(net) == "13 parameters (16x16 4, 8x8 8, others 1)"


def test_a_training_says_what_it_does(folders, tmp_path):
    arguments = ["gan", f"--data={folders}", "--kimg=0.064", "--batch=8", "--mbstd-group=4", f"--outdir={tmp_path}"]
    result = CliRunner().invoke(pretrain.main, [*arguments, "--z-dim=8", "--channel-base=64", "--channel-max=8"])
    assert result.exit_code == 0, result.output
    (run,) = tmp_path.iterdir()
    lines = (run / "log.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines[:6]] == ["run directory", "data", "G", "D", "device", "plan"]
    assert lines[5].startswith("plan: 0.064 kimg in 8 updates of 8 images; a network is saved every ")
    assert (run / "reals.png").is_file()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
def test_a_signal_ends_what_comes_after_the_loop(tmp_path):
    class Done:
        interrupted, stopped = False, None

    directory = RunDirectory.create(tmp_path, "test", {})
    assert training.unless_interrupted(Done, directory, lambda: 5) == 5

    def work():
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.check()

    assert training.unless_interrupted(Done, directory, work) is None
    assert Done.stopped == "SIGTERM" and "SIGTERM: nothing more is measured" in directory.files.log.read_text()
    Done.interrupted = True
    assert training.unless_interrupted(Done, directory, lambda: derive_seed(0)) is None
    directory.close()
