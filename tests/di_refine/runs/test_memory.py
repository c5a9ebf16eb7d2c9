"""Estimated memory against what PyTorch's allocator was asked for, and the search for the largest pass that fits."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import ranks
import torch
from click.testing import CliRunner
from golden_io import GOLDEN

from benchmarks.memory import measured_peak
from di_refine.commands.refine import main as refine
from di_refine.critic import Critic
from di_refine.edm.networks import EDMPrecond
from di_refine.errors import RunError
from di_refine.generators import DistilledGenerator, StyleGAN2Generator
from di_refine.runs import memory
from di_refine.trainer import Trainer, TrainerConfig
from torch_utils import distributed, persistence


def distilling(attention=(8,), reference=None, **settings) -> Trainer:
    """A small U-Net of 16x16 images, taught by itself."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = {"model_type": "SongUNet", "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "dropout": 0.1}
        teacher = EDMPrecond(16, 3, 4, attn_resolutions=list(attention), **unet)
    generator = DistilledGenerator(copy.deepcopy(teacher))
    config = TrainerConfig(**{"batch": 16, "lr": 1e-3, "score_lr": 1e-3, **settings})
    return Trainer(generator, teacher, config, reference=reference)


def samples(nimg, count=16):
    images, labels = torch.zeros(count, 3, 16, 16), torch.eye(4).repeat(count // 4, 1)
    return ((images, labels) for _ in itertools.count())


def with_ratio(**settings) -> Trainer:
    return distilling(reference=samples, objective="uni-js", **settings)


def refining(batch: int = 8, **settings) -> Trainer:
    """A StyleGAN2 generator with its discriminator as a critic."""
    networks = persistence.load(GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl")
    teacher = persistence.load(GOLDEN / "edm/ddpmpp_cond.pkl")["ema"]
    real = torch.zeros(batch, 3, 32, 32), torch.eye(10)[:batch]
    return Trainer(
        StyleGAN2Generator(networks["G_ema"]),
        teacher,
        TrainerConfig(batch=batch, adversarial_weight=0.1, **settings),
        reference=lambda nimg: itertools.repeat(real),
        critic=Critic(networks["D"]),
    )


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (distilling, {}),
        (distilling, {"batch_gpu": 4, "score_steps": 2}),
        (distilling, {"precision": "bf16", "batch_gpu": 8}),
        (distilling, {"checkpoint_score": True, "dropout": "matched"}),
        (distilling, {"objective": "sid", "precision": "bf16", "checkpoint_score": True, "batch_gpu": 4}),
        (with_ratio, {"batch_gpu": 8}),
        (with_ratio, {"ratio_r1": 0.1}),
        (refining, {"batch_gpu": 4}),
    ],
    ids=lambda value: value.__name__ if callable(value) else " ".join(f"{k}={v}" for k, v in value.items()) or "plain",
)
def test_the_estimate_is_what_is_measured(make, settings):
    trainer = make(**settings)
    estimate = memory.Estimator(trainer)()
    measured = measured_peak(trainer)
    print(f"{estimate.peak / 2**20:.1f} MiB estimated, {measured / 2**20:.1f} MiB measured; {estimate}")
    assert estimate.peak == pytest.approx(measured, rel=0.1)
    assert estimate.networks + estimate.optimizers < 0.8 * measured, "not only what is known without running anything"


def test_what_lowers_the_need():
    def peak(**settings):
        return memory.Estimator(distilling(**settings))().peak

    whole = peak()
    assert peak(precision="bf16") < 0.7 * whole
    assert peak(checkpoint_score=True) < 0.85 * whole
    assert peak(batch_gpu=8) < 0.7 * whole
    assert peak(objective="sid") > 1.2 * whole
    assert peak(precision="fp16") == pytest.approx(peak(precision="bf16"), rel=1e-4)


@pytest.mark.parametrize("make", [distilling, with_ratio, refining])
def test_an_estimate_leaves_no_trace(make):
    """Weights, buffers, random numbers and reference samples go on as if nothing had been."""
    asked, other = make(checkpoint_score=True), make(checkpoint_score=True)
    for batch_gpu in (asked.micro_batch, 2):
        memory.Estimator(asked)(batch_gpu)
    seed = torch.initial_seed(), torch.get_rng_state()
    assert not any(p.grad is not None or p._backward_hooks for p in asked.generator.parameters())
    for trainer in (asked, other):
        trainer.step()
    assert torch.initial_seed() == seed[0] and torch.equal(torch.get_rng_state(), seed[1])
    tensors = [list(memory._flat(trainer.state_dict())) for trainer in (asked, other)]
    assert len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))


def test_networks_that_go_by_the_number_of_images():
    """Moments that do not correspond give an upper bound."""
    estimator = memory.Estimator(distilling())
    exact = estimator(16)
    ((one, two),) = estimator._watched.values()
    estimator._watched = {False: [one, [*two, two[-1]]]}
    assert exact.peak <= estimator(16).peak < 1.5 * exact.peak


def test_largest_within():
    estimator = memory.Estimator(distilling(batch=12))
    peaks = {images: estimator(images).peak for images in (1, 2, 3, 4, 6, 12)}
    assert sorted(peaks, key=peaks.get) == list(peaks)
    for images, peak in peaks.items():
        assert estimator.largest_within(peak) == images
        assert estimator.largest_within(peak - 1) == max([n for n in peaks if n < images], default=1)


def test_choose_on_a_cpu(monkeypatch):
    sizes = []

    def make(images):
        sizes.append(images)
        return distilling(batch_gpu=images)

    estimator = memory.Estimator(distilling())
    free = estimator(4).peak / memory.SAFETY + 1
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    number, how = memory.choose(make, 16, torch.device("cpu"))
    assert number == 4 and "GiB free" in how and sizes == [16]
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert memory.choose(make, 16, torch.device("cpu"))[0] == 16


def test_free_memory_of_a_cpu(monkeypatch):
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    monkeypatch.setattr(memory, "_available", lambda: iter([2**30]))
    monkeypatch.setattr(memory, "_container", lambda: iter([2**29]))
    assert memory.free_memory(torch.device("cpu")) == 2**29
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory(torch.device("cpu")) == 2**27


class Crowded(DistilledGenerator):
    """A generator on a device that has room for so many images."""

    room = 0

    def forward(self, z, labels):
        if len(z) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(z, labels)


def crowded(room: int):
    def make(images):
        trainer = distilling(batch=12, batch_gpu=images, attention=())
        trainer.generator.__class__ = Crowded
        trainer.generator.room = room
        return trainer

    return make


@pytest.mark.parametrize(("room", "number"), [(99, 12), (12, 12), (11, 6), (5, 4), (1, 1)])
def test_the_first_divisor_that_works(room, number):
    assert memory.largest_that_works(crowded(room), 12) == number


def test_no_room_for_one_image_is_one_sentence():
    with pytest.raises(RunError, match="^--batch-gpu=auto: .* one image per pass; try --precision=bf16"):
        memory.largest_that_works(crowded(0), 12)


def as_one_of_several():
    """The second process has less room than the first."""
    rank = distributed.rank()
    print(memory.largest_that_works(crowded([6, 2][rank]), 6))
    free = memory.Estimator(distilling())([4, 2][rank]).peak / memory.SAFETY + 1
    memory.free_memory = lambda device: free
    print(memory.choose(lambda images: distilling(batch_gpu=images), 8, torch.device("cpu"))[0])


def test_the_process_with_the_least_room_decides():
    assert ranks.run(__file__, "as_one_of_several", 2) == ["2\n2\n"] * 2


def options(outdir, *more):
    values = {"network": GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl", "teacher": GOLDEN / "edm/ddpmpp_cond.pkl"}
    values |= {"outdir": outdir, "kimg": 0.008, "batch": 4, "score-warmup": 0, "tick": 0.004, "snap": 1}
    return ["--device=cpu", "--metrics=none", *(f"--{name}={value}" for name, value in values.items()), *more]


def test_auto_is_logged_recorded_and_may_change(tmp_path):
    result = CliRunner().invoke(refine, options(tmp_path, "--batch-gpu=auto"))
    assert result.exit_code == 0, result.stderr
    run = Path(json.loads(result.stdout.splitlines()[-1])["run_dir"])
    record = json.loads((run / "training_options.json").read_text())
    assert record["batch_gpu"] == 4 and record["sources"]["batch_gpu"] == "auto"
    assert "--batch-gpu=auto: 4 images per forward pass (estimated" in (run / "log.txt").read_text()
    again = CliRunner().invoke(refine, options(run, "--batch-gpu=2", "--kimg=0.012"))
    assert again.exit_code == 0, again.stderr
    assert "batch_gpu: 4 -> 2" in (run / "log.txt").read_text()


@pytest.mark.parametrize("value", ["some", "0", "2.5"])
def test_batch_gpu_is_auto_or_a_number(tmp_path, value):
    result = CliRunner().invoke(refine, options(tmp_path / "runs", f"--batch-gpu={value}"))
    assert result.exit_code == 2 and not (tmp_path / "runs").exists()
    assert f"--batch-gpu must be 'auto' or a whole number (at least 1), not '{value}'" in result.stderr


def test_dry_run_says_what_a_run_needs(tmp_path):
    dry = CliRunner().invoke(refine, options(tmp_path, "--dry-run", "--batch-gpu=auto", "--keep=1"))
    assert dry.exit_code == 0 and list(tmp_path.iterdir()) == [], dry.stderr
    record = json.loads(dry.stdout.splitlines()[-1])
    needs, files = record["memory"], record["files"]
    parts = [needs[f"{part}_gib"] for part in ("networks", "optimizers", "gradients", "activations")]
    assert needs["images_per_pass"] == 4 and needs["peak_gib"] == pytest.approx(sum(parts), rel=0.01)
    assert "per device with 4 images per pass (networks" in dry.stderr

    result = CliRunner().invoke(refine, options(tmp_path, "--keep=1"))
    run = Path(json.loads(result.stdout.splitlines()[-1])["run_dir"])
    for name, about in files.items():
        written = [path.stat().st_size for path in run.glob(f"{name}-*")]
        assert 1 <= len(written) <= about["at_most"]
        assert written[0] == pytest.approx(about["gib_each"] * 2**30, rel=0.15)


if __name__ == "__main__":
    ranks.main(globals())
