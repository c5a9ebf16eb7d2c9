"""The teacher's training with one, two and three processes."""

import copy

import pytest
import ranks
import torch

from di_refine.edm.networks import EDMPrecond
from di_refine.noise import SIGMA_EDGES
from di_refine.pretraining.config import TeacherConfig
from di_refine.pretraining.teacher import TeacherTrainer, learning_rate
from torch_utils import distributed
from torch_utils.distributed import DistributedError

BATCH, CLASSES = 12, 3


def images(start_nimg, batch=BATCH):
    """This process's share of an endless stream that is a function of the images seen."""
    mine = distributed.share(batch)
    while True:
        rng = torch.Generator().manual_seed(start_nimg)
        pixels = torch.randint(256, [batch, 3, 8, 8], generator=rng, dtype=torch.uint8)
        labels = torch.eye(CLASSES)[torch.randint(CLASSES, [batch], generator=rng)]
        yield pixels[mine], labels[mine]
        start_nimg += batch


def make(seed=0, dropout=0.0, total=None, **settings):
    torch.manual_seed(seed)
    widths = {"model_channels": 16, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}
    net = EDMPrecond(8, 3, CLASSES, model_type="SongUNet", dropout=dropout, augment_dim=9, **widths)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)  # an untrained network has many weights and gradients that are zero
    # Adam makes full steps of rounding errors where a gradient is zero, as of the attention's key biases: small ones.
    fixed = {"batch": BATCH, "lr": 1e-4, "lr_rampup": 0, "ema_kimg": 0.05, "augment": 0.9}
    return TeacherTrainer(net, images, TeacherConfig(**{**fixed, **settings}), total, backend="aot_eager")


def steps(trainer, num):
    return [{**trainer.step(), **trainer.by_sigma} for _ in range(num)]


def train_and_save(folder):
    """Three steps; then the last of them again, from the state that a single process left."""
    folder = f"{folder}/{distributed.world_size()}-{distributed.rank()}"
    trainer = make(batch_gpu=2)
    stats = steps(trainer, 3)
    torch.save({"state": trainer.state_dict(), "stats": stats}, f"{folder}.pt")
    trainer = make(batch_gpu=2, seed=1)
    trainer.load_state_dict(torch.load(f"{folder[: folder.rindex('/')]}/alone.pt", weights_only=True))
    steps(trainer, 1)
    torch.save(trainer.state_dict(), f"{folder}-resumed.pt")
    refusals()
    dropout_differs_between_ranks()


def refusals():
    size, last = distributed.world_size(), distributed.rank() == distributed.world_size() - 1
    with pytest.raises(DistributedError, match=r"^batch=13 is not a multiple of"):
        make(batch=13)
    with pytest.raises(DistributedError, match=rf"^batch_gpu=\d does not divide the {24 // size} images of each of"):
        make(batch=24, batch_gpu={2: 8, 3: 6}[size])
    with pytest.raises(DistributedError, match=rf"rank {size - 1} .* teacher's settings: lr is 0.5 there and 0.1 here"):
        make(lr=0.5 if last else 0.1).step()
    with pytest.raises(DistributedError, match=rf"rank {size - 1} .* training state: net.model.\S+ differs \(and"):
        make(seed=int(last)).step()


def dropout_differs_between_ranks():
    masks = []
    trainer = make(dropout=0.5)
    trainer.net.model.register_forward_pre_hook(lambda *_: masks.append(torch.get_rng_state()))
    trainer.step()
    states = distributed.gather_object(masks[0])
    assert all(not torch.equal(states[0], other) for other in states[1:])


def assert_same(state, want):
    for part in ("net", "ema"):
        for name, value in want[part].items():
            error = (state[part][name] - value).norm() / value.norm()
            assert error < 1e-6, f"{part}.{name}: {error:.1e}"
    assert state["nimg"] == want["nimg"] == 3 * BATCH and state.keys() == want.keys()


def test_processes_agree_with_one(tmp_path):
    alone = make()
    steps(alone, 2)
    torch.save(copy.deepcopy(alone.state_dict()), tmp_path / "alone.pt")
    (stats,) = steps(alone, 1)
    for size in (2, 3):
        ranks.run(__file__, "train_and_save", size, tmp_path)
        saved = [torch.load(tmp_path / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
        resumed = [torch.load(tmp_path / f"{size}-{rank}-resumed.pt", weights_only=True) for rank in range(size)]
        assert_same(saved[0]["state"], alone.state_dict())
        assert_same(resumed[0], alone.state_dict())
        for name in ("loss", "grad_norm"):
            assert saved[0]["stats"][-1][name] == pytest.approx(stats[name].item(), rel=1e-5)
        by_sigma = saved[0]["stats"][-1]["loss_by_sigma"]
        torch.testing.assert_close(by_sigma, stats["loss_by_sigma"], rtol=1e-5, atol=0, equal_nan=True)
        for name, value in saved[0]["state"]["net"].items():  # and with each other bit for bit
            assert all(torch.equal(value, other["state"]["net"][name]) for other in saved[1:])


def test_compiling_changes_nothing():
    plain, compiled = make(precision="bf16"), make(precision="bf16", compile=True)
    for one, other in zip(steps(plain, 2), steps(compiled, 2)):
        assert other["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-2)
    assert plain.state_dict()["net"].keys() == compiled.state_dict()["net"].keys()
    assert all(torch.isfinite(p).all() for p in compiled.ema.parameters())


def test_the_learning_rate_falls_to_the_end():
    config = TeacherConfig(batch=10, lr=1.0, lr_rampup=0.02, lr_rampdown=0.04)
    rates = [learning_rate(config, nimg, 100) for nimg in range(10, 101, 10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert learning_rate(config, 200, 100) == 0.25
    assert learning_rate(TeacherConfig(batch=10, lr=1.0, lr_rampup=0), 10**9, None) == 1
    trainer = make(lr=1e-4, lr_rampdown=0.003 * BATCH, total=4 * BATCH)
    steps(trainer, 4)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-4 / 3)
    with pytest.raises(ValueError, match="total"):
        make(lr_rampdown=5)


def test_augmentation_is_not_rounded_by_autocast():
    seen = []
    trainer = make(precision="bf16")
    pipe = trainer.augment_pipe

    def watched(images, **kwargs):
        augmented = pipe(images, **kwargs)
        seen.append(augmented[0])
        return augmented

    trainer.augment_pipe = watched
    steps(trainer, 1)
    assert seen[0].dtype == torch.float32 and not torch.equal(seen[0], seen[0].bfloat16().float())


def test_accumulation_equals_the_large_batch():
    """Noise levels, noise and augmentation do not depend on how the batch is divided."""
    large, small = make(), make(batch_gpu=3)
    for one, other in zip(steps(large, 3), steps(small, 3)):
        assert one["loss"].item() == pytest.approx(other["loss"].item(), rel=1e-5)
    assert_same(small.state_dict(), large.state_dict())


def test_the_loss_is_recorded_by_noise_level():
    (stats,) = steps(make(sigma_mean=-1.5, sigma_std=1e-6, batch_gpu=2), 1)  # all levels are 0.22
    assert stats["loss_by_sigma"].shape == (len(SIGMA_EDGES) + 1,)
    assert stats["loss_by_sigma"][1].item() == pytest.approx(stats["loss"].item(), rel=1e-5)
    assert stats["loss_by_sigma"].isnan().tolist() == [True, False, True, True, True, True]


def test_resume_is_exact():
    straight, first, second = make(dropout=0.3), make(dropout=0.3), make(dropout=0.3, seed=1)
    steps(straight, 3)
    steps(first, 1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, 2)
    for name, value in straight.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name]), name


def test_a_stream_of_whole_batches_is_refused():
    trainer = make(batch=2 * BATCH)
    with pytest.raises(ValueError, match="gives 12 images a step where this process needs 24"):
        trainer.step()


if __name__ == "__main__":
    ranks.main(globals())
