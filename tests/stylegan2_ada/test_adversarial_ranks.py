"""Adversarial training with one, two and three processes."""

import copy

import pytest
import ranks
import torch

from stylegan2_ada.adversarial import AdaController, AdversarialTrainer
from stylegan2_ada.augment import AugmentPipe
from stylegan2_ada.config import AdversarialConfig
from stylegan2_ada.networks import Discriminator, Generator
from torch_utils import distributed
from torch_utils.distributed import DistributedError

BATCH, CLASSES = 12, 3


def make(seed=0, **options):
    """All phases and running means, nothing that each process draws for itself, no groups of images."""
    torch.manual_seed(seed)
    torch.randn_like = torch.ones_like  # the directions of path lengths
    G = Generator(8, CLASSES, 8, 8, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs={"channel_max": 8})
    D = Discriminator(CLASSES, 8, 3, channel_max=8, epilogue_kwargs={"mbstd_group_size": 1})
    for p in [*G.parameters(), *D.parameters()]:
        p.data.add_(torch.randn(p.shape) * 0.3)  # many start at zero, where relative errors mean nothing
    settings = {"pl_weight": 2.0, "g_reg_interval": 2, "d_reg_interval": 2, "gamma": 1.0, "noise_mode": "const"}
    config = AdversarialConfig(**{**settings, "batch": BATCH, "ema_kimg": 0.05, "lr": 1e-3, **options})
    return AdversarialTrainer(G, D, AugmentPipe(), AdaController(kimg=0.5, interval=2, target=0.01), config)


@pytest.fixture(autouse=True)
def original_normals(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.randn_like)


def steps(trainer, num):
    """Steps on this process's share of batches that are a function of the images seen."""
    mine, stats = distributed.share(BATCH), []
    for _ in range(num):
        rng = torch.Generator().manual_seed(trainer.nimg)
        labels = torch.eye(CLASSES)[torch.randint(CLASSES, [3, BATCH], generator=rng)][:, mine]
        real = torch.rand([BATCH, 3, 8, 8], generator=rng)[mine] * 2 - 1
        z = torch.randn([2, BATCH, 8], generator=rng)[:, mine]
        stats.append(trainer.update(real, labels[0], z.flatten(0, 1), labels[1:].flatten(0, 1)))
    return stats


def train_and_save(folder):
    """Three steps; then the last of them again, from the state that a single process left."""
    size, rank = distributed.world_size(), distributed.rank()
    trainer = make(batch_gpu=BATCH // size)
    stats = steps(trainer, 3)
    torch.save({"state": trainer.state_dict(), "stats": stats}, f"{folder}/{size}-{rank}.pt")
    trainer = make(seed=1)
    trainer.load_state_dict(torch.load(f"{folder}/alone.pt", weights_only=True))
    steps(trainer, 1)
    torch.save(trainer.state_dict(), f"{folder}/{size}-{rank}-resumed.pt")
    last = rank == size - 1
    with pytest.raises(DistributedError, match=rf"rank {size - 1} .* GAN's settings: lr is 0.5 there and 0.1 here"):
        steps(make(lr=0.5 if last else 0.1), 1)
    with pytest.raises(DistributedError, match=rf"rank {size - 1} .* GAN's training state: G\.\S+ differs \(and"):
        steps(make(seed=int(last)), 1)
    with pytest.raises(ValueError, match="batch=12 is not a multiple of batch_gpu=5"):
        steps(make(batch_gpu=5), 1)


def assert_same(state, want):
    for part in ("G", "D", "G_ema"):
        for name, value in want[part].items():
            error = (state[part][name] - value).norm() / value.norm().clamp(min=1e-9)
            assert error < 1e-6, f"{part}.{name}: {error:.1e}"
    assert state["pl_mean"].item() == pytest.approx(want["pl_mean"].item(), rel=1e-5) and want["pl_mean"] > 0
    assert {name: state["ada"][name].item() for name in ("p", "r_t", "signs")} == pytest.approx(
        {name: want["ada"][name].item() for name in ("p", "r_t", "signs")}
    )
    assert [state["ada"][name] for name in ("images", "batches")] == [BATCH, 1]  # three steps, an interval of two
    assert (state["nimg"], state["num_steps"]) == (want["nimg"], want["num_steps"]) == (3 * BATCH, 3)
    assert state.keys() == want.keys()


def test_processes_agree_with_one(tmp_path):
    alone = make()
    steps(alone, 2)
    torch.save(copy.deepcopy(alone.state_dict()), tmp_path / "alone.pt")
    (stats,) = steps(alone, 1)
    assert {"grad_norm/Greg", "path_lengths", "r1_penalty", "augment_p"} <= stats.keys()
    assert alone.state_dict()["ada"]["r_t"] != 0
    for size in (2, 3):
        ranks.run(__file__, "train_and_save", size, tmp_path)
        saved = [torch.load(tmp_path / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
        resumed = [torch.load(tmp_path / f"{size}-{rank}-resumed.pt", weights_only=True) for rank in range(size)]
        assert_same(saved[0]["state"], alone.state_dict())
        assert_same(resumed[0], alone.state_dict())
        for name, value in stats.items():
            assert saved[0]["stats"][-1][name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
        for part in ("G", "D", "G_ema"):  # and with each other bit for bit
            for name, value in saved[0]["state"][part].items():
                assert all(torch.equal(value, other["state"][part][name]) for other in saved[1:]), name


if __name__ == "__main__":
    ranks.main(globals())
