import contextlib
import copy
import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
import torch
from golden_io import GOLDEN, assert_close

from di_refine.commands import plane
from di_refine.critic import Critic
from di_refine.edm.augment import AugmentPipe
from di_refine.edm.networks import EDMPrecond
from di_refine.generators import StyleGAN2Generator
from di_refine.labels import LabelLaw
from di_refine.noise import SIGMA_EDGES, EdmGrid, LogNormal
from di_refine.trainer import Trainer, TrainerConfig
from torch_utils import persistence
from torch_utils.training import NotFiniteError

SETTINGS = {"lr": 1e-3, "score_lr": 1e-3, "batch": 4, "ema_kimg": 0.1, "score_warmup": 0}


class ImageGenerator(torch.nn.Module):
    """Latents and labels to 8x8 images through one linear layer, with a buffer that training moves."""

    latent_shape = (5,)

    def __init__(self, label_dim: int = 0):
        super().__init__()
        self.label_dim = label_dim
        self.linear = torch.nn.Linear(5 + label_dim, 3 * 8 * 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, labels):
        if self.training:
            self.calls += 1
        return self.linear(torch.cat([z, labels], dim=1)).reshape(-1, 3, 8, 8)


def make_trainer(label_dim: int = 0, student=None, seed: int = 0, **settings) -> Trainer:
    """A trainer on a linear generator and a tiny U-Net with dropout, no layer of which is silent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        generator = ImageGenerator(label_dim)
        unet = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "dropout": 0.3}
        teacher = EDMPrecond(8, 3, label_dim, attn_resolutions=[], **unet)
        with torch.no_grad():
            for p in teacher.parameters():
                p += 0.1 * torch.randn_like(p)
    own = ("sigma", "score_sigma", "labels", "total", "backend")
    laws = {name: settings.pop(name) for name in own if name in settings}
    config = {**SETTINGS, "seed": seed, **settings}
    return Trainer(generator, teacher, TrainerConfig(**config), student, **laws)


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor of the trainer's state under a flat name."""
    found = {}

    def walk(name, value):
        if isinstance(value, torch.Tensor):
            found[name] = value.detach().clone()
        elif isinstance(value, dict):
            for key, child in value.items():
                walk(f"{name}/{key}", child)

    walk("", trainer.state_dict())
    return found


def changed(before: dict, after: dict, prefix: str) -> bool:
    keys = [key for key in before if key.startswith(f"/{prefix}/")]
    assert keys
    return any(not torch.equal(before[key], after[key]) for key in keys)


def steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    return [{name: value.item() for name, value in trainer.step().items()} for _ in range(count)]


def disturb(student: torch.nn.Module) -> None:
    """Set the student score apart from the teacher, from which it begins without any difference."""
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02


def gradients(trainer: Trainer) -> dict[str, list[torch.Tensor]]:
    """Filled by the next step with the gradients that reach the two optimizers."""
    found = {}
    for name in ("generator", "student"):

        def keep(optimizer, args, kwargs, name=name):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            found[name] = [p.grad.clone() for p in params if p.grad is not None]

        trainer.optimizers[name].register_step_pre_hook(keep)
    return found


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ikl", "uni-rkl"])
def test_the_divergence_falls(objective):
    """In the plane, where the reverse KL to the teacher can be integrated."""
    teacher = plane.ring()
    trainer = plane.make_trainer(teacher, objective)
    before = plane.distances(trainer.ema, teacher)
    steps(trainer, 200 + 350)
    trainer.check_finite()
    after = plane.distances(trainer.ema, teacher)
    assert after["rkl"] < 0.2 * before["rkl"]
    assert after["js"] < 0.3 * before["js"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score_warmup": 0.008},
        {"objective": "sid", "dropout": "matched"},
        {"batch_gpu": 2, "dropout": "matched", "precision": "bf16"},
        {"ema_kimg": 0},
    ],
    ids=str,
)
def test_resume_is_exact(settings):
    """N steps, save, load into a fresh trainer, N steps: bit for bit the same as 2 N steps."""
    straight = make_trainer(label_dim=3, **settings)
    first = make_trainer(label_dim=3, **settings)
    steps(straight, 6)
    steps(first, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make_trainer(label_dim=3, **settings)
    with torch.no_grad():
        for p in [*second.generator.parameters(), *second.student.parameters(), *second.ema.parameters()]:
            p.fill_(7)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.nimg == first.nimg == 12
    torch.manual_seed(99)  # the global random state is no part of it
    steps(second, 3)
    assert second.nimg == straight.nimg == 24
    expected, actual = snapshot(straight), snapshot(second)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_student_score_that_shares_the_teachers_weights():
    """Only the low-rank changes are trained and saved, and a resumed trainer goes on the same."""
    trainer = make_trainer(label_dim=3, score_adapter=2, batch=8)
    before = copy.deepcopy(trainer.teacher.state_dict())
    steps(trainer, 2)
    saved = copy.deepcopy(trainer.state_dict())
    assert sum(p.numel() for p in saved["student"].values()) < sum(p.numel() for p in trainer.teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in trainer.teacher.state_dict().items())
    shared = {p.data_ptr() for p in trainer.teacher.parameters() if p.ndim >= 2}
    assert shared < {p.data_ptr() for p in trainer.student.parameters()}
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    expected = steps(trainer, 1)
    again = make_trainer(label_dim=3, score_adapter=2, batch=8)
    again.load_state_dict(saved)
    assert steps(again, 1) == expected and expected[0]["score_gap"] > 0
    with pytest.raises(ValueError, match="a student is given"):
        Trainer(trainer.generator, trainer.teacher, trainer.config, student=trainer.student)


def test_frozen_parameters_stay_and_the_others_move():
    settings = {"label_dim": 3, "batch": 8, "freeze": "*bias", "score_freeze": "*conv0.weight, *conv1.weight"}
    trainer = make_trainer(**settings)
    before = copy.deepcopy([dict(net.named_parameters()) for net in (trainer.generator, trainer.student)])
    steps(trainer, 1)
    saved = copy.deepcopy(trainer.state_dict())
    expected = steps(trainer, 1)
    patterns = (("bias",), ("conv0.weight", "conv1.weight"))
    for net, old, names in zip((trainer.generator, trainer.student), before, patterns):
        frozen = {name for name in old if name.endswith(names)}
        same = {name for name, p in net.named_parameters() if torch.equal(p, old[name])}
        assert frozen and same >= frozen and len(same) < len(old)
    again = make_trainer(**settings)
    again.load_state_dict(saved)
    assert steps(again, 1) == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"freeze": "nothing*"}, "matches no parameter of the generator"),
        ({"freeze": "*"}, "leaves no parameter to train of the generator"),
        ({"score_freeze": "nothing*"}, "matches no parameter of the student score"),
        ({"score_freeze": "*conv*", "score_adapter": 2}, "leave out score_freeze"),
        ({"score_freeze": "*conv*", "objective": "sds"}, "has no student score"),
    ],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(label_dim=3, **settings)


def test_a_resumed_trainer_uses_its_own_rates():
    network = torch.nn.Linear(2, 2)
    network.latent_shape, network.label_dim = (2,), 0
    teacher, law = torch.nn.Linear(2, 2), LogNormal()
    saved = Trainer(network, teacher, TrainerConfig(lr=1e-2, score_lr=1e-2), sigma=law).state_dict()
    trainer = Trainer(network, teacher, TrainerConfig(lr=1e-3, score_lr=2e-3), sigma=law)
    trainer.load_state_dict(saved)
    rates = [trainer.optimizers["generator"].param_groups[0]["lr"], trainer.optimizers["student"].param_groups[0]["lr"]]
    assert rates == [1e-3, 2e-3]


@pytest.mark.parametrize("objective", ["ikl", "sid"])
@pytest.mark.parametrize("batch_gpu", [1, 4])
def test_batch_gpu_changes_nothing_but_rounding(objective, batch_gpu):
    results = []
    for settings in ({}, {"batch_gpu": batch_gpu}):
        trainer = make_trainer(label_dim=3, objective=objective, batch=8, **settings)
        disturb(trainer.student)
        grads = gradients(trainer)
        results.append((steps(trainer, 1)[0], grads))
    (stats, grads), (cut_stats, cut_grads) = results
    assert cut_stats == pytest.approx(stats, rel=1e-4)
    for name in ("generator", "student"):
        scale = max(g.abs().max() for g in grads[name])
        for whole, cut in zip(grads[name], cut_grads[name]):
            assert (whole - cut).abs().max() < 1e-5 * scale


def test_each_network_gets_its_own_loss_alone():
    """The generator's objective flows through the student's output in `sim`, and must not train the student."""
    first = {}
    for objective in ("ikl", "sim"):
        trainer = make_trainer(objective=objective)
        disturb(trainer.student)
        first[objective] = gradients(trainer)
        before = copy.deepcopy(trainer.teacher.state_dict())
        steps(trainer, 1)
        assert all(p.grad is None and not p.requires_grad for p in trainer.teacher.parameters())
        assert all(torch.equal(before[name], value) for name, value in trainer.teacher.state_dict().items())
        assert all(p.requires_grad for p in trainer.student.parameters())
    for a, b in zip(first["ikl"]["student"], first["sim"]["student"]):
        assert torch.equal(a, b)


def test_generator_gradient_is_the_difference_of_the_denoisers():
    """For ikl with a linear generator, everything in the gradient can be written down."""
    trainer = make_trainer(batch=2)
    disturb(trainer.student)
    seen = []
    trainer.student.register_forward_hook(lambda module, args, out: seen.append((args, out.detach())))
    trainer.teacher.register_forward_hook(lambda module, args, out: seen.append((args, out.detach())))
    latents = []
    trainer.generator.register_forward_hook(lambda module, args, out: latents.append(args[0]))
    grads = gradients(trainer)
    stats = steps(trainer, 1)[0]
    (student_args, dp), (teacher_args, dq) = seen  # one pass each
    assert torch.equal(student_args[0], teacher_args[0]) and torch.equal(student_args[1], teacher_args[1])
    flat = (dp - dq).reshape(2, -1)
    weight, bias = grads["generator"]
    assert_close(weight, flat.T @ latents[0] / 2, 1e-5)
    assert_close(bias, flat.mean(0), 1e-5)
    assert stats["score_gap"] == pytest.approx(flat.abs().mean().item(), rel=1e-5)
    norm = (weight.square().sum() + bias.square().sum()).sqrt().item()
    assert stats["generator_grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("objective", ["sim", "uni-rkl"])
def test_generator_gradient_flows_through_the_denoisers(objective):
    """The same as calling the objective on the images, noise levels and noised images that the step used."""
    trainer = make_trainer(objective=objective, batch=3)
    disturb(trainer.student)
    generator, student = copy.deepcopy(trainer.generator), copy.deepcopy(trainer.student).requires_grad_(False)
    inputs = {}
    for name in ("generator", "teacher"):
        net = getattr(trainer, name)
        net.register_forward_hook(lambda module, args, out, name=name: inputs.update({name: args}))
    grads = gradients(trainer)
    steps(trainer, 1)
    (z, labels), (noised, sigma, _) = inputs["generator"], inputs["teacher"]
    x0 = generator(z, labels)
    x_s = x0 + (noised - x0).detach()
    loss = trainer.objective(x0, x_s, sigma, trainer.teacher, student)
    expected = torch.autograd.grad(loss.mean(), generator.linear.weight)[0]
    assert_close(grads["generator"][0], expected, 1e-5)


def test_score_loss_is_denoising_score_matching():
    trainer = make_trainer(batch=3, sigma=LogNormal(0.2, 0.9))
    seen, images = [], []
    trainer.student.register_forward_hook(lambda module, args, out: seen.append((args, out.detach())))
    trainer.generator.register_forward_hook(lambda module, args, out: images.append(out.detach()))
    stats = steps(trainer, 1)[0]
    (noised, sigma, _), denoised = seen[0]
    noise = (noised - images[0]) / sigma[:, None, None, None]
    torch.testing.assert_close(noise.flatten(1).std(1), torch.ones(3), rtol=0, atol=0.2)
    torch.testing.assert_close(noise.flatten(1).mean(1), torch.zeros(3), rtol=0, atol=0.3)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = (weight[:, None, None, None] * (denoised - images[0]) ** 2).mean()
    assert stats["score_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_warmup_trains_the_score_alone():
    trainer = make_trainer(score_warmup=0.008)
    before = snapshot(trainer)
    for stats in steps(trainer, 2):
        assert set(stats) == {"score_loss", "score_grad_norm"}
    after = snapshot(trainer)
    assert torch.equal(before["/generator/linear.weight"], after["/generator/linear.weight"])
    assert torch.equal(before["/generator/linear.bias"], after["/generator/linear.bias"])
    assert not changed(before, after, "ema") and changed(before, after, "student")
    assert not trainer.optimizers["generator"].state and trainer.nimg == 8
    stats = steps(trainer, 1)[0]
    assert {"generator_loss", "generator_grad_norm", "score_gap"} < set(stats)
    later = snapshot(trainer)
    assert changed(after, later, "generator") and changed(after, later, "ema")


@pytest.mark.parametrize("batch", [4, 10])
def test_average_has_its_half_life(batch):
    """After `ema_kimg` images the average is half of the way to a generator that stands still, whatever the batch."""
    trainer = make_trainer(batch=batch, ema_kimg=0.04, lr=1e-30)
    start = trainer.ema.linear.weight.clone()
    with torch.no_grad():
        trainer.generator.linear.weight += 1
    steps(trainer, 40 // batch)
    torch.testing.assert_close(trainer.ema.linear.weight, start + 0.5, rtol=0, atol=1e-6)
    steps(trainer, 40 // batch)
    torch.testing.assert_close(trainer.ema.linear.weight, start + 0.75, rtol=0, atol=1e-6)
    assert trainer.ema.calls == trainer.generator.calls > 0
    assert not trainer.ema.training and not any(p.requires_grad for p in trainer.ema.parameters())


def test_average_can_be_off():
    trainer = make_trainer(ema_kimg=0)
    assert trainer.ema is trainer.generator


# ----------------------------------------------------------------------------------------------------------------------


def test_non_finite_generator_is_reported():
    trainer = make_trainer()
    steps(trainer, 2)
    trainer.check_finite()
    good = copy.deepcopy(trainer.state_dict())
    broken = trainer.teacher.register_forward_hook(lambda module, args, out: out * float("nan"))
    steps(trainer, 1)
    broken.remove()
    with pytest.raises(
        NotFiniteError, match=r"of the generator is .* at 0\.008 kimg \(step 2\).* network-snapshot-000000\.pkl"
    ):
        trainer.check_finite("network-snapshot-000000.pkl")
    assert trainer.generator.linear.weight.isnan().any(), "nothing is replaced by zeros"
    steps(trainer, 2)  # a broken generator breaks the score; the first bad step stays the one that is named
    with pytest.raises(NotFiniteError, match="of the generator is .* at 0.008 kimg"):
        trainer.check_finite()
    trainer.load_state_dict(good)
    trainer.check_finite()
    steps(trainer, 1)
    trainer.check_finite()


def test_non_finite_score_is_reported():
    trainer = make_trainer()
    steps(trainer, 1)
    with torch.no_grad():
        next(trainer.student.parameters()).fill_(float("inf"))
    steps(trainer, 1)
    with pytest.raises(
        NotFiniteError, match=r"of the student score is .* at 0\.004 kimg \(step 1\); last good snapshot: none"
    ):
        trainer.check_finite()


@pytest.mark.parametrize("network, name", [("generator", "generator"), ("student", "student score")])
def test_infinite_gradients_are_noticed_behind_a_finite_loss(network, name):
    trainer = make_trainer()
    parameter = next(getattr(trainer, network).parameters())
    parameter.register_hook(lambda grad: grad + float("inf"))
    stats = steps(trainer, 1)[0]
    assert math.isfinite(stats["generator_loss"]) and math.isfinite(stats["score_loss"])
    with pytest.raises(NotFiniteError, match=f"of the {name} is"):
        trainer.check_finite()


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["ikl", "sid"])
@pytest.mark.parametrize("dropout", ["off", "matched"])
def test_equal_networks_have_no_score_gap(objective, dropout):
    """At the start the student score is the teacher; with their dropout matched it must look so."""
    trainer = make_trainer(objective=objective, dropout=dropout)
    stats = steps(trainer, 1)[0]
    assert stats["score_gap"] == 0
    # sid's gradient is a difference of two backward passes, which round differently.
    assert stats["generator_grad_norm"] <= (0 if objective == "ikl" else 1e-5)
    assert steps(trainer, 1)[0]["score_gap"] > 0


def test_unmatched_dropout_would_show(monkeypatch):
    monkeypatch.setattr(Trainer, "_replayed", lambda self, state: contextlib.nullcontext())
    assert steps(make_trainer(dropout="matched"), 1)[0]["score_gap"] > 1e-3


def test_dropout_changes_the_score_loss():
    off, matched = (steps(make_trainer(dropout=dropout), 1)[0] for dropout in ("off", "matched"))
    assert off["score_loss"] != matched["score_loss"]


def test_bf16_is_close_and_keeps_float32_weights():
    full, half = (make_trainer(precision=precision, score_warmup=0.004) for precision in ("fp32", "bf16"))
    for _ in range(3):
        a, b = steps(full, 1)[0], steps(half, 1)[0]
        assert a["score_loss"] != b["score_loss"] == pytest.approx(a["score_loss"], rel=0.05)
    half.check_finite()
    assert {p.dtype for net in (half.generator, half.student, half.ema) for p in net.parameters()} == {torch.float32}


def test_labels_follow_their_law():
    trainer = make_trainer(label_dim=4, labels=LabelLaw(4, np.array([1, 0, 6, 3])))
    rng = torch.Generator().manual_seed(0)
    z, labels = trainer.draw(20_000, rng)
    assert z.shape == (20_000, 5) and labels.shape == (20_000, 4)
    assert torch.equal(labels.sum(1), torch.ones(20_000)) and set(labels.unique().tolist()) == {0, 1}
    torch.testing.assert_close(labels.mean(0), torch.tensor([0.1, 0.0, 0.6, 0.3]), rtol=0, atol=0.015)
    assert labels[:, 1].sum() == 0
    _, uniform = make_trainer(label_dim=4).draw(20_000, rng)
    torch.testing.assert_close(uniform.mean(0), torch.full([4], 0.25), rtol=0, atol=0.015)
    assert make_trainer().draw(3, rng)[1].shape == (3, 0)


def test_both_denoisers_see_the_labels_of_the_generator():
    trainer = make_trainer(label_dim=3, batch=6, batch_gpu=3)
    seen = {}
    for name in ("generator", "student", "teacher"):
        seen[name] = []
        getattr(trainer, name).register_forward_hook(lambda module, args, out, name=name: seen[name].append(args[-1]))
    steps(trainer, 1)
    assert len(seen["generator"]) == 2 and all(len(labels) == 3 for labels in seen["generator"])
    for name in ("student", "teacher"):
        assert all(torch.equal(a, b) for a, b in zip(seen[name], seen["generator"], strict=True))


def test_seeds_reproduce():
    runs = []
    for seed, global_seed in ((1, 5), (1, 6), (2, 5)):
        trainer = make_trainer(label_dim=3, seed=seed, dropout="matched")
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        steps(trainer, 2)
        assert torch.equal(state, torch.get_rng_state()), "a step leaves the global random state alone"
        runs.append(snapshot(trainer))
    assert not changed(runs[0], runs[1], "generator") and not changed(runs[0], runs[1], "student")
    assert changed(runs[0], runs[2], "generator") and changed(runs[0], runs[2], "student")


def test_every_step_draws_anew():
    trainer = make_trainer(lr=1e-30, score_lr=1e-30)
    inside = []  # what a network would draw for itself
    trainer.generator.register_forward_pre_hook(lambda module, args: inside.append(torch.rand(()).item()))
    first, second = steps(trainer, 2)
    assert first["score_loss"] != second["score_loss"]
    assert inside[0] != inside[1]


def test_a_student_of_ones_own():
    student = EDMPrecond(8, 3, model_type="SongUNet", model_channels=4, channel_mult=[1], num_blocks=1)
    trainer = make_trainer(student=student)
    before = snapshot(trainer)
    assert trainer.student is student and all(p.requires_grad for p in student.parameters())
    assert steps(trainer, 1)[0]["score_gap"] > 0
    assert changed(before, snapshot(trainer), "student")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch": 6, "batch_gpu": 4}, "batch=6 is not a multiple of batch_gpu=4"),
        ({"batch": 0}, "batch=0"),
        ({"dropout": "on"}, "dropout=on is not possible; it must be one of off, matched"),
        ({"precision": "fp8"}, "precision=fp8 is not possible; it must be one of fp32, bf16, fp16"),
        ({"lr": 0.0}, "lr=0.0 is not possible; .*greater than 0"),
        ({"objective": "kl"}, "objective=kl is not possible; it must be one of ikl"),
        ({"teacher_precision": "fp8"}, "precision=fp8 is not possible; it must be one of fp32, bf16, fp16"),
        ({"objective": "f-js"}, "objective=f-js needs a density ratio"),
        ({"label_dim": 3, "labels": LabelLaw(2)}, "labels of 2 classes are for a generator of 3"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**settings)


# ----------------------------------------------------------------------------------------------------------------------
# More than one law, network or update


def images(batch: int, label_dim: int):
    """A reference of images of noise, a function of the images seen."""

    def stream(start):
        for nimg in itertools.count(start, batch):
            rng = torch.Generator().manual_seed(nimg)
            labels = torch.eye(label_dim)[torch.randint(label_dim, [batch], generator=rng)]
            yield torch.randn(batch, 3, 8, 8, generator=rng), labels

    return stream


def with_reference(label_dim: int = 3, **settings) -> Trainer:
    trainer = make_trainer(label_dim, **{**settings, "objective": "ikl", "adversarial_weight": 0.0})
    generator, teacher = trainer.ema.train(), trainer.teacher
    config = {**SETTINGS, **settings}
    return Trainer(generator, teacher, TrainerConfig(**config), reference=images(config["batch"], label_dim))


def test_a_law_of_its_own_for_the_score():
    """The objective's noise levels are then not those that the score trains at, and the student is asked again."""
    levels = {"teacher": [], "student": []}
    trainer = make_trainer(sigma=LogNormal(2.0, 0.0), score_sigma=LogNormal(-2.0, 0.0))
    for name in levels:
        net = getattr(trainer, name)
        net.register_forward_pre_hook(lambda module, args, name=name: levels[name].append(args[1].log().mean().item()))
    trainer.step()
    assert levels["teacher"] == pytest.approx([2.0]) and levels["student"] == pytest.approx([-2.0, 2.0])


def test_score_steps_are_updates_on_fresh_samples():
    trainer, seen, updates = make_trainer(score_steps=3), [], []
    trainer.generator.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    trainer.optimizers["student"].register_step_post_hook(lambda *args: updates.append("student"))
    trainer.optimizers["generator"].register_step_post_hook(lambda *args: updates.append("generator"))
    trainer.step()
    assert updates == ["student"] * 3 + ["generator"] and trainer.nimg == 4
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    once = make_trainer()
    once.generator.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    once.step()
    assert torch.equal(seen[2], seen[3]), "the generator's own samples do not depend on the number of score steps"


@pytest.mark.parametrize("objective", ["f-js", "uni-fkl"])
def test_the_generator_gets_the_objectives_gradient(objective):
    """With the head's logits for the log ratio, and through them where the objective says so."""
    trainer = with_reference(objective=objective, batch=4, score_lr=1e-12, lr=1e-12, ratio_lr=1e-12)
    torch.nn.init.normal_(trainer.ratio.out.weight, std=3.0)
    found = gradients(trainer)
    draws = trainer._draw(0)
    trainer.step()
    x0 = trainer.generator(draws.z, draws.labels)
    s = draws.sigma.reshape(-1, 1, 1, 1)
    x_s = x0 + s * draws.normals("score", x0.shape[1:])
    net = trainer.student

    def log_ratio(x, sigma):
        return trainer.ratio(trainer.ratio.features(x, sigma, draws.labels)).clamp(-10, 10)

    loss = trainer.objective(
        x0,
        x_s,
        draws.sigma,
        lambda x, sigma: trainer.teacher(x, sigma, draws.labels),
        lambda x, sigma: net(x, sigma, draws.labels),
        log_ratio,
    ).mean()
    expected = torch.autograd.grad(loss, list(trainer.generator.parameters()))
    for a, b in zip(found["generator"], expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert trainer.ratio.out.weight.requires_grad and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"objective": "f-js"}, {"objective": "uni-js", "score_steps": 2, "ratio_r1": 0.5}, {"adversarial_weight": 0.3}],
    ids=str,
)
def test_parts_of_a_batch_add_up_with_a_ratio(settings):
    whole, parts = with_reference(**settings), with_reference(**settings, batch_gpu=2)
    a, b = gradients(whole), gradients(parts)
    one, two = whole.step(), parts.step()
    assert one.keys() == two.keys() and "ratio_loss" in one
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5, equal_nan=True)
    for name in a:
        for x, y in zip(a[name], b[name]):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_augmentation_is_the_scores_alone(monkeypatch):
    """The student trains on transformed samples and is told how; the generator's update sees neither."""
    trainer = make_trainer()
    seen = []

    def double(images, generator, part):
        assert generator.device.type == "cpu" and part == (0, 4)
        return 2 * images, torch.ones(len(images), 2)

    monkeypatch.setattr(AugmentPipe, "edm", lambda p: double)
    config = dataclasses.replace(trainer.config, augment=0.5)
    Trainer(trainer.ema.train(), trainer.teacher, config, Recorder(trainer.student, seen)).step()
    assert len(seen) == 2 and seen[0].shape == (4, 2) and seen[1] is None


class Recorder(torch.nn.Module):
    """A student that remembers the augmentation labels it was given."""

    def __init__(self, net, seen):
        super().__init__()
        self.net, self.seen = net, seen

    def forward(self, x, sigma, labels, augment_labels=None):
        self.seen.append(augment_labels)
        return self.net(x, sigma, labels)


def test_a_critic_trains_and_pulls():
    class Judge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3 * 8 * 8 + 3, 1)

        def forward(self, images, labels):
            return self.linear(torch.cat([images.flatten(1), labels], dim=1))

    def run(weight):
        torch.manual_seed(1)
        trainer = make_trainer(3)
        config = TrainerConfig(**{**SETTINGS, "ema_kimg": 500}, adversarial_weight=weight)
        critic = Critic(Judge(), gamma=1.0)
        before = copy.deepcopy(critic.net.state_dict())
        trainer = Trainer(trainer.ema.train(), trainer.teacher, config, reference=images(4, 3), critic=critic)
        found = gradients(trainer)
        stats = trainer.step()
        assert any(not torch.equal(before[name], value) for name, value in critic.net.state_dict().items())
        assert trainer.ratio is None and stats["critic_loss"] > 0 and stats["critic_grad_norm"] > 0
        return trainer, found["generator"], stats

    _, weak, _ = run(1e-9)
    trainer, strong, stats = run(2.0)
    assert stats["adversarial_loss"] > 0 and any(not torch.allclose(a, b) for a, b in zip(weak, strong))
    assert set(trainer.state_dict()) >= {"critic", "critic_optimizer"}


def test_a_reference_is_asked_for():
    teacher = plane.ring()
    generator, student = plane.PlaneGenerator(), plane.PlaneDenoiser()
    for settings in ({"objective": "f-js"}, {"adversarial_weight": 1.0}):
        with pytest.raises(ValueError, match="reference"):
            Trainer(generator, teacher, TrainerConfig(**settings), student)
    with pytest.raises(ValueError, match="name the layer"):
        Trainer(generator, teacher, TrainerConfig(objective="f-js"), student, reference=plane.reference(teacher, 64, 0))
    with pytest.raises(ValueError, match="score_steps"):
        TrainerConfig(score_steps=0)


def test_score_distillation_has_no_student():
    """None is made, saved or waited for; a state of earlier releases, which holds one, is gone on from."""
    trainer = make_trainer(objective="sds", score_warmup=1)
    assert trainer.student is None and set(trainer.optimizers) == {"generator"}
    before = snapshot(trainer)
    stats = trainer.step()
    assert set(stats) == {"generator_loss", "generator_grad_norm", "score_gap", "ema_distance"}
    assert changed(before, snapshot(trainer), "generator")
    assert not [name for name in trainer.state_dict() if name.startswith("student")]
    earlier = {**make_trainer(objective="ikl").state_dict(), **trainer.state_dict()}
    again = make_trainer(objective="sds", score_warmup=1)
    again.load_state_dict(copy.deepcopy(earlier))
    steps(trainer, 2)
    steps(again, 2)
    assert all(torch.equal(value, snapshot(again)[name]) for name, value in snapshot(trainer).items())
    with pytest.raises(ValueError, match="sds has no student score"):
        make_trainer(objective="sds", student=make_trainer().student)


# ----------------------------------------------------------------------------------------------------------------------
# What keeps a run healthy


def test_statistics_by_noise_level():
    """One bin per stretch between the edges, NaN where no level fell; together they are the whole mean."""
    trainer = make_trainer(batch=8, sigma=EdmGrid(0.05, 0.9, tmax=1000))
    stats = trainer.step()
    for name in ("score_loss", "score_gap"):
        bins = trainer.by_sigma[f"{name}_by_sigma"]
        assert bins.shape == (len(SIGMA_EDGES) + 1,) and bins[3:].isnan().all() and not bins[:3].isnan().all()
        counts = torch.histogram(levels(trainer), EDGES)[0]
        assert (bins.nan_to_num() @ counts / 8).item() == pytest.approx(stats[name].item(), rel=1e-5)


EDGES = torch.tensor([0.0, *SIGMA_EDGES, 1e9])


def levels(trainer: Trainer) -> torch.Tensor:
    """The noise levels of the step before."""
    trainer.nimg -= trainer.config.batch
    sigma = trainer._draw(0).sigma
    trainer.nimg += trainer.config.batch
    return sigma


def test_long_gradients_are_shortened_and_counted():
    free, held, short = make_trainer(), make_trainer(max_grad_norm=1e-3), make_trainer(max_grad_norm=1e9)
    for trainer in (free, held, short):
        disturb(trainer.student)
    before = snapshot(held)
    found = {trainer: gradients(trainer) for trainer in (free, held, short)}
    stats = {trainer: trainer.step() for trainer in (free, held, short)}
    for name, title in (("generator", "generator"), ("student", "score")):
        norms = [torch.nn.utils.get_total_norm(found[trainer][name]) for trainer in (free, held, short)]
        assert norms[0] == norms[2] == stats[free][f"{title}_grad_norm"] == stats[held][f"{title}_grad_norm"]
        assert norms[1].item() == pytest.approx(1e-3, rel=1e-4)
        assert stats[held][f"{title}_clipped"] == 1 and stats[short][f"{title}_clipped"] == 0
        assert f"{title}_clipped" not in stats[free]
    assert changed(before, snapshot(held), "generator")


def test_recomputing_blocks_changes_nothing():
    """Gradient checkpointing of the student score, dropout included."""
    for settings in ({"objective": "sid"}, {"dropout": "matched"}):
        plain, saving = make_trainer(**settings), make_trainer(**settings, checkpoint_score=True)
        steps(plain, 2)
        steps(saving, 2)
        a, b = snapshot(plain), snapshot(saving)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_half_precision_scales_its_losses_and_resumes():
    """float16 gradients point where float32 ones do; the scale is part of the state."""
    full, half = make_trainer(), make_trainer(precision="fp16")
    disturb(full.student)
    disturb(half.student)
    for scaler in half._scalers.values():
        scaler.scale(torch.zeros(1))
        scaler.update(256.0)  # the scale it begins with is found by trial, and the first steps are left out
    a, b = gradients(full), gradients(half)
    full.step()
    half.step()
    for name in a:
        x, y = (torch.cat([g.flatten() for g in found[name]]) for found in (a, b))
        assert torch.nn.functional.cosine_similarity(x, y, dim=0) > 0.99
        assert y.norm().item() == pytest.approx(x.norm().item(), rel=0.05), "unscaled before the optimizer"
    half.check_finite()
    half._scalers["generator"].update(128.0)
    other = make_trainer(precision="fp16")
    other.load_state_dict(copy.deepcopy(half.state_dict()))
    assert other._scalers["generator"].get_scale() == 128
    steps(half, 2)
    steps(other, 2)
    x, y = snapshot(half), snapshot(other)
    assert all(torch.equal(x[name], y[name]) for name in x)


def test_precision_of_each_network():
    trainer = make_trainer(precision="bf16", score_precision="fp32")
    seen = {}

    def watch(name):
        def hook(module, args):
            seen[name] = torch.is_autocast_enabled("cpu")

        getattr(trainer, name).register_forward_pre_hook(hook)

    for name in ("generator", "teacher", "student"):
        watch(name)
    trainer.step()
    assert seen == {"generator": True, "teacher": True, "student": False}


def test_reduced_precision_pulls_the_same_way():
    """On networks of the public layouts: cosine of the generator's gradient in bf16 and in fp32."""
    network = persistence.load(GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl")["G_ema"]
    teacher = persistence.load(GOLDEN / "edm/ddpmpp_cond.pkl")["ema"]
    found = {}
    for precision in ("fp32", "bf16"):
        student = copy.deepcopy(teacher)
        disturb(student)
        config = TrainerConfig(batch=8, precision=precision, ema_kimg=0, score_warmup=0)
        trainer = Trainer(StyleGAN2Generator(copy.deepcopy(network)), copy.deepcopy(teacher), config, student)
        found[precision] = gradients(trainer)
        trainer.step()
    flat = {key: torch.cat([g.flatten() for g in value["generator"]]) for key, value in found.items()}
    assert torch.nn.functional.cosine_similarity(flat["fp32"], flat["bf16"], dim=0) > 0.99


def test_a_class_that_is_never_drawn_spoils_no_ratio():
    """Frequencies of zero, on either side, have no logarithm; the other classes keep their corrections."""
    stream = images(4, 3)
    stream.class_frequencies = [0.5, 0.5, 0.0]
    trainer = make_trainer(3)
    config = TrainerConfig(objective="f-js", batch=4, score_warmup=0)
    labels = LabelLaw(3, np.array([1, 0, 3]))
    trainer = Trainer(trainer.ema.train(), trainer.teacher, config, reference=stream, labels=labels)
    torch.testing.assert_close(trainer._log_prior, torch.tensor([math.log(2), 0.0, 0.0]))
    assert trainer.step()["ratio_loss"].isfinite()
    trainer.check_finite()


def test_the_generators_rate_falls_to_the_end_and_the_students_stays():
    trainer = make_trainer(batch=4, lr=1e-2, score_lr=2e-3, score_warmup=0.004, lr_rampdown=0.008, total=20)
    rates = []
    for _ in range(5):
        trainer.step()
        rates.append(trainer.optimizers["generator"].param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2, 1e-2, 5e-3])
    assert trainer.optimizers["student"].param_groups[0]["lr"] == 2e-3
    with pytest.raises(ValueError, match="lr_rampdown.*total"):
        make_trainer(lr_rampdown=1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Compiled networks


@pytest.mark.parametrize("settings", [{}, {"objective": "sid"}, {"batch_gpu": 2, "precision": "bf16"}], ids=str)
def test_compiling_changes_nothing_but_rounding(settings):
    plain = make_trainer(label_dim=3, dropout="off", **settings)
    compiled = make_trainer(label_dim=3, dropout="off", compile=True, backend="aot_eager", **settings)
    tolerance = 5e-2 if settings.get("precision") else 1e-3
    for _ in range(3):  # Adam turns rounding of tiny gradients into steps, so losses and norms are compared
        expected, actual = plain.step(), compiled.step()
        for name in ("score_loss", "score_grad_norm", "generator_loss", "generator_grad_norm", "score_gap"):
            assert actual[name].item() == pytest.approx(expected[name].item(), rel=tolerance, abs=1e-6), name
    assert snapshot(plain).keys() == snapshot(compiled).keys()


def test_a_network_that_cannot_be_compiled_runs_without(capsys):
    def broken(graph, inputs):
        raise RuntimeError("no compiler found")

    trainer = make_trainer(compile=True, backend=broken)
    steps(trainer, 2)
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be compiled" in line]
    assert len(said) == 3 and "no compiler found" in said[0]
    plain = make_trainer()
    steps(plain, 2)
    assert all(torch.equal(value, snapshot(plain)[name]) for name, value in snapshot(trainer).items())


def test_compiling_and_matched_dropout_exclude_each_other():
    with pytest.raises(ValueError, match="leave one of them out"):
        TrainerConfig(compile=True, dropout="matched")
