"""The alternating update with one, two and three processes."""

import copy
import itertools

import numpy as np
import pytest
import ranks
import torch

from di_refine.critic import Critic
from di_refine.edm.networks import EDMPrecond
from di_refine.generators import StyleGAN2Generator
from di_refine.labels import LabelLaw
from di_refine.noise import EdmGrid, LogNormal
from di_refine.trainer import Trainer, TrainerConfig
from stylegan2_ada.networks import Generator
from torch_utils import distributed
from torch_utils.distributed import DistributedError
from torch_utils.training import NotFiniteError

BATCH, CLASSES = 12, 3


class Linear(torch.nn.Module):
    """Latents and labels to images, or images and labels to a logit; draws nothing."""

    latent_shape, label_dim = (5,), CLASSES

    def __init__(self, inputs=5, shape=(3, 8, 8)):
        super().__init__()
        self.shape = shape
        self.linear = torch.nn.Linear(inputs + CLASSES, torch.Size(shape).numel())

    def forward(self, x, labels):
        return self.linear(torch.cat([x.flatten(1), labels], dim=1)).reshape(-1, *self.shape)


class Reference:
    """This process's share of an endless stream that is a function of its position; classes are not equally many."""

    class_frequencies = (1, 2, 3)

    def __call__(self, start):
        mine = distributed.share(BATCH)
        for position in itertools.count(start, BATCH):
            rng = torch.Generator().manual_seed(position)
            labels = torch.eye(CLASSES)[torch.randint(CLASSES, [BATCH], generator=rng)]
            yield torch.randn(BATCH, 3, 8, 8, generator=rng)[mine], labels[mine]


def stylegan():
    sizes = {"mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": {"channel_base": 64, "channel_max": 8}}
    return StyleGAN2Generator(Generator(8, CLASSES, 8, 8, 3, **sizes), noise_mode="const")


LABELS = LabelLaw(CLASSES, np.array([5, 2, 3]))
LAWS = {"score_sigma": LogNormal(), "sigma": EdmGrid(0.002, 80)}

CASES = {
    "plain": {"objective": "ikl", "max_grad_norm": 1.0},
    "ratio": {"objective": "f-js", "adversarial_weight": 0.1, "ratio_r1": 0.1},
    "score law": {"objective": "sid", "score_steps": 2},
    "augmented ratio": {"objective": "uni-rkl", "score_steps": 2, "augment": 0.9},
    "mean w": {"objective": "ikl", "score_warmup": 0.002 * BATCH, "adversarial_weight": 0.1, "batch_gpu": BATCH},
}


def randomized(net):
    """An untrained network has many weights and gradients that are zero."""
    for p in net.parameters():
        p.data.add_(torch.randn(p.shape) * 0.1)
    return net


def make(case="plain", seed=0, **settings):
    laws = LAWS if case == "score law" else {}
    widths = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    widths |= {"dropout": 0.3, "augment_dim": 9 if "augment" in CASES[case] else 0}
    torch.manual_seed(99)
    teacher = randomized(EDMPrecond(8, 3, CLASSES, model_type="SongUNet", **widths))
    torch.manual_seed(seed)
    generator = randomized(stylegan() if case == "mean w" else Linear())
    student = randomized(copy.deepcopy(teacher))
    critic = Critic(randomized(Linear(3 * 8 * 8, (1,))), gamma=1.0) if case == "mean w" else None
    rates = {"lr": 1e-4, "score_lr": 1e-4, "ratio_lr": 1e-4}
    config = TrainerConfig(**{"batch": BATCH, "ema_kimg": 0.05, "score_warmup": 0, **rates, **CASES[case], **settings})
    labels = LABELS if case == "plain" else None
    reference = Reference() if config.adversarial_weight or config.objective.startswith(("f-", "uni-")) else None
    trainer = Trainer(generator, teacher, config, student, reference=reference, critic=critic, labels=labels, **laws)
    if trainer.ratio is not None:
        randomized(trainer.ratio)
    for optimizer in trainer.optimizers.values():
        for group in optimizer.param_groups:  # Adam makes full steps of rounding errors, as of attention's key biases
            group["eps"] = 1e-4
    return trainer


def steps(trainer, num):
    return [trainer.step() | trainer.by_sigma for _ in range(num)]


def train_and_save(folder):
    """Three steps of each case; then the last of them again, from the state that a single process left."""
    path = f"{folder}/{distributed.world_size()}-{distributed.rank()}.pt"
    found = {}
    for case in CASES:
        parts = {} if case == "mean w" else {"batch_gpu": 2}  # its average counts forward passes
        trainer = make(case, **parts)
        stats = steps(trainer, 3)
        resumed = make(case, seed=1, **parts)
        resumed.load_state_dict(torch.load(f"{folder}/alone.pt", weights_only=True)[case])
        steps(resumed, 1)
        found[case] = {"stats": stats, "state": trainer.state_dict(), "resumed": resumed.state_dict()}
    torch.save(found, path)
    refusals()
    bad_numbers_of_one_rank_are_noticed_by_all()
    dropout_is_matched_and_differs_between_ranks()


def refusals():
    size, last = distributed.world_size(), distributed.rank() == distributed.world_size() - 1
    with pytest.raises(DistributedError, match=r"^batch=13 is not a multiple of"):
        make(batch=13, batch_gpu=13)
    with pytest.raises(DistributedError, match=rf"rank {size - 1} .* settings: lr is 0.5 there and 0.1 here"):
        make(lr=0.5 if last else 0.1).step()
    with pytest.raises(DistributedError, match=rf"rank {size - 1} .* networks: generator.linear.weight differs \(and"):
        make(seed=int(last)).step()
    trainer = make()
    next(trainer.teacher.parameters()).data.add_(1e-3 * last)
    with pytest.raises(DistributedError, match=rf"rank {size - 1} .* networks: teacher\.\S+ differs;"):
        trainer.step()
    trainer = make("ratio")
    trainer._log_prior += last
    with pytest.raises(DistributedError, match=rf"rank {size - 1} .* labels: 1 differs;"):
        trainer.step()


def bad_numbers_of_one_rank_are_noticed_by_all():
    """Also where the gradients say nothing, as those of float16 may be infinite while the scale is sought."""
    trainer = make(precision="fp16")
    trainer.step()
    trainer.check_finite()
    if distributed.rank() == distributed.world_size() - 1:
        trainer.student.register_forward_hook(lambda module, args, out: out * float("nan"))
    trainer.step()
    with pytest.raises(NotFiniteError, match=r"^the loss .* of the student score is not finite at 0\.012 kimg"):
        trainer.check_finite()


def dropout_is_matched_and_differs_between_ranks():
    trainer = make(dropout="matched")
    trainer.teacher.load_state_dict(trainer.student.state_dict())
    states = []
    trainer.student.model.register_forward_pre_hook(lambda *_: states.append(torch.get_rng_state()))
    assert trainer.step()["score_gap"] == 0
    everyone = distributed.gather_object(states[0])
    assert all(not torch.equal(everyone[0], other) for other in everyone[1:])


def networks(state):
    return {
        f"{part}.{name}": value
        for part in ("generator", "ema", "student", "ratio", "critic")
        for name, value in state.get(part, {}).items()
    }


def assert_same(case, state, want):
    assert state.keys() == want.keys() and state["nimg"] == want["nimg"] == 3 * BATCH
    tensors = networks(want)
    for name, value in networks(state).items():
        error = (value - tensors[name]).norm() / tensors[name].norm().clamp(min=1e-9)
        assert error < 1e-6, f"{case}: {name}: {error:.1e}"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process comes to, with the whole batch at once; and the folder with its states after two steps."""
    folder, states, found = tmp_path_factory.mktemp("ranks"), {}, {}
    for case in CASES:
        trainer = make(case)
        start = copy.deepcopy(networks(trainer.state_dict()))
        stats = steps(trainer, 2)
        states[case] = copy.deepcopy(trainer.state_dict())
        stats += steps(trainer, 1)
        found[case] = {"stats": stats, "state": trainer.state_dict()}
        trained = {
            name for name, value in networks(trainer.state_dict()).items() if not torch.equal(value, start[name])
        }
        assert {name.split(".")[0] for name in trained} == {name.split(".")[0] for name in start}
    assert "ema.net.mapping.w_avg" in trained
    torch.save(states, folder / "alone.pt")
    return folder, found


@pytest.mark.parametrize("size", [2, 3])
def test_processes_agree_with_one(alone, size):
    """Accumulating gradients, too; up to the order of summation, and with each other bit for bit."""
    folder, found = alone
    ranks.run(__file__, "train_and_save", size, folder)
    saved = [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]
    for case, want in found.items():
        first = saved[0][case]
        assert_same(case, first["state"], want["state"])
        assert_same(case, first["resumed"], want["state"])
        for other in saved[1:]:
            for name, value in networks(first["state"]).items():
                assert torch.equal(value, networks(other[case]["state"])[name]), f"{case}: {name}"
        for step, stats in enumerate(want["stats"]):
            assert stats.keys() == first["stats"][step].keys()
            for name, value in stats.items():
                reported = first["stats"][step][name]
                assert torch.allclose(reported, value, rtol=1e-4, atol=1e-6, equal_nan=True), f"{case}: {name}"
                for other in saved[1:]:
                    assert torch.equal(other[case]["stats"][step][name].nan_to_num(), reported.nan_to_num()), name


@pytest.mark.parametrize("case", CASES)
def test_accumulation_equals_the_large_batch(alone, case):
    """Augmentation and all; but StyleGAN2's mean w counts forward passes."""
    small = make(case, batch_gpu=3)
    steps(small, 3)
    want = copy.deepcopy(alone[1][case]["state"])
    if case == "mean w":
        for part in ("generator", "ema"):
            want[part]["net.mapping.w_avg"] = small.state_dict()[part]["net.mapping.w_avg"]
    assert_same(case, small.state_dict(), want)


if __name__ == "__main__":
    ranks.main(globals())
