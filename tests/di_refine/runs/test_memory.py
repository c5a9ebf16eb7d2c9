"""What a run needs of memory and disk, and the search for the largest pass that fits."""

import copy
import itertools
import json
from pathlib import Path

import pytest
import ranks
import torch
from click.testing import CliRunner
from golden_io import GOLDEN

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
    config = TrainerConfig(**{"batch": 16, "lr": 1e-3, "score_lr": 1e-3, "score_warmup": 0, **settings})
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
        TrainerConfig(batch=batch, adversarial_weight=0.1, score_warmup=0, **settings),
        reference=lambda nimg: itertools.repeat(real),
        critic=Critic(networks["D"]),
    )


@pytest.mark.parametrize("make", [distilling, with_ratio, refining])
def test_sizes_are_those_of_what_there_is_after_an_update(make):
    trainer = make()
    sizes, number = memory.tensor_sizes(trainer), memory.trained_parameters(trainer)
    trainer.step()
    optimizers = trainer.optimizers.values()
    trained = [(p, o.state[p]) for o in optimizers for group in o.param_groups for p in group["params"]]
    there = sum(state[name].nbytes for _, state in trained for name in ("exp_avg", "exp_avg_sq") if state)
    # The layer of augmentation labels is not used without augmentation.
    unused = sum(p.nbytes for p, state in trained if not state)
    assert sizes["optimizers"] == 2 * sizes["gradients"] == 8 * number == there + 2 * unused
    assert unused < 0.01 * there
    assert sizes["average"] == sum(t.nbytes for t in trainer.ema.state_dict().values())
    critic = trainer.critic and trainer.critic.net
    networks = [trainer.generator, trainer.student, trainer.teacher, trainer.ratio, critic]
    tensors = [t for net in networks if net is not None for t in (*net.parameters(), *net.buffers())]
    assert sizes["networks"] == sum(t.nbytes for t in tensors)


def test_a_generator_that_is_its_own_average_counts_once():
    assert memory.tensor_sizes(distilling(ema_kimg=0))["average"] == 0


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_without_cuda_the_whole_share_is_taken(device):
    def make(images):
        raise AssertionError("nothing is tried")

    number, how = memory.choose(make, 16, torch.device(device))
    assert number == 16 and how == "the whole share of this process; what fits is tried on CUDA alone"


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
    with pytest.raises(RunError, match="^batch_gpu=auto: .* one image per pass; try precision=bf16"):
        memory.largest_that_works(crowded(0), 12)


class FullTrainer:
    """Runs out of memory where more images than `room` go through a network at once, or as many at the second step.

    Its update meets the other processes at its end, as a real one does.
    """

    def __init__(self, images, room, tried, batch=12, second=None):
        self.images, self.room, self.tried, self.second = images, room, tried, second
        self.config, self.nimg, self.steps = TrainerConfig(batch=batch, score_warmup=0.5), 0, 0

    def step(self):
        self.tried.append((self.images, self.nimg))
        self.steps += 1
        if self.images > self.room or (self.steps == 2 and self.images == self.second):
            raise torch.OutOfMemoryError("CUDA out of memory")
        distributed.average([torch.ones([])])
        self.nimg += self.config.batch


def test_divisors_are_tried_downwards_with_updates_in_which_everything_moves():
    tried = []
    number = memory.largest_that_works(lambda images: FullTrainer(images, 5, tried), 12)
    start = 576  # past the warm-up of 500 images, and a multiple of 16 batches
    assert number == 4 and tried == [(12, start), (6, start), (4, start), (4, start)]
    tried.clear()
    assert memory.largest_that_works(lambda images: FullTrainer(images, 5, tried, second=4), 12) == 3
    assert [images for images, _ in tried] == [12, 6, 4, 4, 3, 3]


def test_on_cuda_it_is_tried():
    number, how = memory.choose(lambda images: FullTrainer(images, 2, []), 12, torch.device("cuda"))
    assert number == 2 and how == "the most that an update on the GPU had room for"


def as_one_of_several():
    """The second process has less room than the first, which must not wait for it in the middle of an update."""
    tried, room = [], [6, 2][distributed.rank()]
    print(memory.largest_that_works(lambda images: FullTrainer(images, room, tried), 6), [n for n, _ in tried])
    print(memory.largest_that_works(crowded([6, 2][distributed.rank()]), 6), distributed.world_size())


def test_the_process_with_the_least_room_decides():
    assert ranks.run(__file__, "as_one_of_several", 2) == [
        "2 [6, 6, 3, 3, 2, 2]\n2 2\n",
        "2 [6, 3, 2, 2]\n2 2\n",
    ]


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
    assert (
        "batch-gpu=auto: 4 images per forward pass (the whole share of this process; what fits is tried"
        in (run / "log.txt").read_text()
    )
    again = CliRunner().invoke(refine, options(run, "--batch-gpu=2", "--kimg=0.012"))
    assert again.exit_code == 0, again.stderr
    assert "batch_gpu: 4 -> 2" in (run / "log.txt").read_text()


@pytest.mark.parametrize("value", ["some", "0", "2.5"])
def test_batch_gpu_is_auto_or_a_number(tmp_path, value):
    result = CliRunner().invoke(refine, options(tmp_path / "runs", f"--batch-gpu={value}"))
    assert result.exit_code == 2 and not (tmp_path / "runs").exists()
    assert "Invalid value for '--batch-gpu'" in result.stderr and value in result.stderr


def test_dry_run_says_what_a_run_needs(tmp_path):
    dry = CliRunner().invoke(refine, options(tmp_path, "--dry-run", "--batch-gpu=auto", "--keep=1"))
    assert dry.exit_code == 0 and list(tmp_path.iterdir()) == [], dry.stderr
    record = json.loads(dry.stdout.splitlines()[-1])
    needs, files = record["memory"], record["files"]
    assert 2 * needs["gradients_gib"] == pytest.approx(needs["optimizers_gib"], rel=0.01)
    assert needs["gradients_gib"] * 2**30 == pytest.approx(4 * needs["trained_parameters"], rel=0.01)
    assert 0 < needs["average_gib"] < needs["networks_gib"]
    assert "memory per device, besides activations: networks" in dry.stderr

    result = CliRunner().invoke(refine, options(tmp_path, "--keep=1"))
    run = Path(json.loads(result.stdout.splitlines()[-1])["run_dir"])
    for name, about in files.items():
        written = [path.stat().st_size for path in run.glob(f"{name}-*")]
        assert 1 <= len(written) <= about["at_most"]
        assert written[0] == pytest.approx(about["gib_each"] * 2**30, rel=0.15)


if __name__ == "__main__":
    ranks.main(globals())
