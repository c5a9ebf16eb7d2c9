"""Losses and gradients against golden numbers, the controller against hand-counted moves, and the whole trainer."""

import copy
import math

import pytest
import torch
from golden_io import assert_close, cases, load_npz

from stylegan2_ada.adversarial import (
    AdaController,
    AdversarialTrainer,
    discriminator_loss,
    generator_loss,
    path_lengths,
    r1_penalty,
)
from stylegan2_ada.augment import PRESETS, AugmentPipe
from stylegan2_ada.config import AdversarialConfig
from stylegan2_ada.networks import Discriminator, Generator
from torch_utils.training import NotFiniteError

LOSS = "stylegan2/loss.npz"
META = cases(LOSS)[0]
VALUE, GRADIENT = 1e-5, 1e-4


def golden(name):
    return torch.from_numpy(load_npz(LOSS)[name].copy())


def stored_state(prefix):
    return {name.removeprefix(prefix): golden(name) for name in load_npz(LOSS) if name.startswith(prefix)}


def golden_trainer(**options):
    G, D = Generator(**META["G_init_kwargs"]), Discriminator(**META["D_init_kwargs"])
    G.load_state_dict(stored_state("G/"))
    D.load_state_dict(stored_state("D/"))
    return AdversarialTrainer(G, D, config=AdversarialConfig(gamma=META["r1_gamma"], noise_mode="const", **options))


def golden_batch():
    return golden("real_img"), golden("real_c"), golden("z"), golden("gen_c")


@pytest.mark.parametrize("name", ["Gmain", "Dmain", "Dreg", "Dboth"])
def test_golden_phase(name):
    trainer = golden_trainer(d_reg_interval=None if name == "Dboth" else 16)
    assert_close(trainer.G.mapping.w_avg, golden("w_avg_before"), 1e-7)
    (phase,) = [phase for phase in trainer.phases if phase.name == name]
    assert phase.interval == META["gains"][name]
    terms = trainer.accumulate_gradients(phase, *golden_batch())
    assert_close(trainer.G.mapping.w_avg, golden(f"{name}/w_avg_after"), VALUE)
    net = getattr(trainer, phase.net)
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
    norms = torch.stack([grads[n].norm() for n in META[f"{phase.net}_grad_norm_names"]])
    assert_close(norms, golden(f"{name}/grad_norms"), GRADIENT)
    checked = 0
    for key in load_npz(LOSS):
        if key.startswith(f"{name}/grad/"):
            assert_close(grads[key.removeprefix(f"{name}/grad/")], golden(key), GRADIENT, key)
        elif key.startswith(f"{name}/") and key.removeprefix(f"{name}/") not in ("grad_norms", "w_avg_after"):
            assert_close(terms[key.removeprefix(f"{name}/")], golden(key), VALUE, key)
            checked += 1
    assert checked == {"Gmain": 2, "Dmain": 3, "Dreg": 3, "Dboth": 5}[name]
    other = {"G": trainer.D, "D": trainer.G}[phase.net]
    assert all(p.grad is None for p in other.parameters())


def test_golden_latents_and_images():
    trainer = golden_trainer()
    ws = trainer.G.mapping(golden("z"), golden("gen_c"))
    assert_close(ws, golden("ws"), VALUE)
    assert_close(trainer.G.synthesis(ws, noise_mode="const"), golden("gen_img"), 3e-5)


def test_losses_at_known_points():
    zero = torch.zeros([1, 1])
    assert generator_loss(zero).item() == pytest.approx(math.log(2))
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(torch.tensor([[-30.0]])).item() == pytest.approx(30)
    assert discriminator_loss(torch.tensor([[30.0]]), torch.tensor([[-30.0]])).item() == pytest.approx(0, abs=1e-9)


def test_r1_of_a_quadratic():
    """D(x) = |x|^2 has the squared gradient norm 4 |x|^2."""
    x = torch.randn([3, 2, 4, 4], requires_grad=True)
    penalty = r1_penalty(x.square().sum(dim=[1, 2, 3]), x)
    torch.testing.assert_close(penalty, 4 * x.square().sum(dim=[1, 2, 3]))
    assert penalty.requires_grad


def test_path_length_of_a_linear_generator():
    """For images = s * w, pixel by pixel, E[length^2] = s^2 * (C H W) / (H W) / num_ws."""
    ws = torch.randn([4000, 2, 3 * 4 * 4], requires_grad=True)
    lengths = path_lengths(5 * ws[:, 0].reshape(-1, 3, 4, 4), ws)
    assert lengths.square().mean().item() == pytest.approx(25 * 3 / 2, rel=0.03)


def test_ada_moves_by_hand():
    ada = AdaController(target=0.6, kimg=1, interval=2, p=0)
    real = torch.tensor([[1.0], [2.0], [3.0], [-0.5], [0.1]])  # mean sign 0.6: at the target, no move
    fooled, certain = -torch.ones([5, 1]), torch.ones([5, 1])
    assert ada.update(real) == 0 and ada.update(real) == 0 and ada.r_t == pytest.approx(0.6)
    assert ada.update(certain) == 0  # one batch of two: waits
    assert ada.update(certain).item() == pytest.approx(10 / 1000) and ada.r_t == 1
    ada.update(certain)
    assert ada.update(real).item() == pytest.approx(20 / 1000) and ada.r_t.item() == pytest.approx(0.8)
    for _ in range(6):
        ada.update(fooled)
    assert ada.p == 0 and ada.r_t == -1  # never negative


def test_ada_state_includes_a_started_interval():
    one, two = AdaController(kimg=1, interval=3), AdaController(kimg=1, interval=3)
    one.update(torch.ones([4, 1]))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for ada in (one, two):
        ada.update(torch.ones([4, 1]))
        ada.update(torch.ones([4, 1]))
    assert one.p == two.p and two.p.item() == pytest.approx(12 / 1000)


# The trainer on tiny 8x8 networks.

BATCH, CLASSES = 4, 3
EVERYTHING = {
    "pl_weight": 2.0,
    "g_reg_interval": 2,
    "d_reg_interval": 3,
    "gamma": 1.0,
    "style_mixing": 0.5,
    "batch_gpu": 2,
    "ema_kimg": 0.05,
}


def tiny_trainer(pipe=True, seed=0, **options):
    torch.manual_seed(seed)
    G = Generator(8, CLASSES, 8, 8, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs={"channel_max": 8})
    D = Discriminator(CLASSES, 8, 3, channel_max=8, epilogue_kwargs={"mbstd_group_size": 2})
    if not pipe:
        return AdversarialTrainer(G, D, config=AdversarialConfig(**options))
    ada = AdaController(kimg=0.05, interval=2, target=-1.5)  # any r_t is above this target: p grows
    return AdversarialTrainer(G, D, AugmentPipe(**PRESETS["bgc"]), ada, AdversarialConfig(**options))


def run_steps(trainer, num):
    stats = {}
    for _ in range(num):
        torch.manual_seed(1000 + trainer.num_steps)
        labels = torch.eye(CLASSES)[torch.randint(CLASSES, [3, BATCH])]
        real, z = torch.rand([BATCH, 3, 8, 8]) * 2 - 1, torch.randn([2 * BATCH, 8])
        stats.update(trainer.update(real, labels[0], z, labels[1:].flatten(0, 1)))
    return stats


def test_smoke():
    trainer = tiny_trainer(**EVERYTHING)
    before = copy.deepcopy((trainer.G.state_dict(), trainer.D.state_dict(), trainer.G_ema.state_dict()))
    stats = run_steps(trainer, 7)
    trainer.check_finite()
    assert [phase.name for phase in trainer.phases] == ["Gmain", "Greg", "Dmain", "Dreg"]
    assert set(stats) == {
        *("gen_logits", "real_logits", "loss_G", "loss_D", "r1_penalty", "loss_r1", "path_lengths", "loss_pl"),
        *("grad_norm/Gmain", "grad_norm/Greg", "grad_norm/Dmain", "grad_norm/Dreg", "augment_p"),
    }
    assert all(value.ndim == 0 and value.isfinite() and not value.requires_grad for value in stats.values())
    assert trainer.num_steps == 7 and trainer.nimg == 7 * BATCH and trainer.pl_mean > 0
    assert stats["augment_p"].item() == pytest.approx(6 * BATCH / 50) == trainer.augment_pipe.p.item()
    for old, net in zip(before, (trainer.G, trainer.D, trainer.G_ema)):
        unchanged = [name for name, p in net.named_parameters() if torch.equal(p, old[name])]
        assert not unchanged, unchanged
    assert trainer.G.training and trainer.D.training and not trainer.G_ema.training


def test_state_dict_continues_bit_for_bit(tmp_path):
    straight, first = tiny_trainer(**EVERYTHING), tiny_trainer(**EVERYTHING)
    run_steps(straight, 7)
    run_steps(first, 4)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = tiny_trainer(seed=1, **EVERYTHING)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run_steps(second, 3)

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for key in value for leaf in leaves(value[key])]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, (list, tuple)) else [value]

    pairs = list(zip(leaves(straight.state_dict()), leaves(second.state_dict()), strict=True))
    assert len(pairs) > 200
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_state_of_another_configuration_is_refused():
    with pytest.raises(ValueError, match=r"lacks \['ada', 'augment_pipe'\]"):
        tiny_trainer().load_state_dict(tiny_trainer(pipe=False).state_dict())


def test_gradient_accumulation_equals_one_batch():
    """Minibatch standard deviation off (groups of one), because its groups depend on the micro-batches."""
    grads = []
    for size in (None, 1, 2):
        trainer = golden_trainer(batch_gpu=size)
        trainer.D.b4.mbstd.group_size = 1
        for phase in trainer.phases:
            trainer.accumulate_gradients(phase, *golden_batch())
        grads.append([p.grad for net in (trainer.G, trainer.D) for p in net.parameters() if p.grad is not None])
    for a, b, c in zip(*grads, strict=True):
        assert_close(b, a, 1e-4)
        assert_close(c, a, 1e-4)


def test_lazy_regularisation_corrects_adam():
    trainer = tiny_trainer(lr=0.1, d_lr=0.2, d_reg_interval=16)
    (g_group,), (d_group,) = (trainer.optimizers[net].param_groups for net in "GD")
    assert g_group["lr"] == 0.1 and g_group["betas"] == (0.0, 0.99)  # no penalty, no correction
    assert d_group["lr"] == pytest.approx(0.2 * 16 / 17) and d_group["betas"] == (0.0, pytest.approx(0.99 ** (16 / 17)))
    together = tiny_trainer(d_lr=0.2, d_reg_interval=None)
    assert together.optimizers["D"].param_groups[0]["lr"] == 0.2
    assert [phase.name for phase in together.phases] == ["Gmain", "Dboth"]
    assert [phase.name for phase in tiny_trainer(gamma=0).phases] == ["Gmain", "Dmain"]


def test_regularisation_runs_every_interval_only():
    trainer = tiny_trainer(pipe=False, d_reg_interval=3)
    assert ["r1_penalty" in run_steps(trainer, 1) for _ in range(5)] == [True, False, False, True, False]


def test_average_halves_in_its_half_life():
    trainer = tiny_trainer(pipe=False, ema_kimg=2 * BATCH / 1000, ema_rampup=None)
    start = {name: p.clone() for name, p in trainer.G_ema.named_parameters()}
    newest = []
    for _ in range(2):
        run_steps(trainer, 1)
        newest.append({name: p.clone() for name, p in trainer.G.named_parameters()})
    keep = 0.5**0.5
    for name, p in trainer.G_ema.named_parameters():
        expected = keep**2 * start[name] + (1 - keep) * (keep * newest[0][name] + newest[1][name])
        torch.testing.assert_close(p, expected)
    assert torch.equal(trainer.G_ema.mapping.w_avg, trainer.G.mapping.w_avg)


def test_average_rampup_starts_with_a_copy():
    trainer = tiny_trainer(pipe=False, ema_rampup=0.05)
    run_steps(trainer, 1)
    assert all(torch.equal(a, b) for a, b in zip(trainer.G_ema.parameters(), trainer.G.parameters()))


@pytest.mark.parametrize(
    ("phase_name", "network", "parameter"),
    [("Gmain", "generator", "mapping.fc0.bias"), ("Dreg", "discriminator", "b8.conv0.weight")],
)
def test_non_finite_gradient_is_found_and_named(phase_name, network, parameter):
    trainer = tiny_trainer(pipe=False, d_reg_interval=2)
    run_steps(trainer, 2)
    trainer.check_finite()
    healthy = trainer.accumulate_gradients

    def spoilt(phase, *batch):
        terms = healthy(phase, *batch)
        if phase.name == phase_name:
            getattr(trainer, phase.net).get_parameter(parameter).grad.view(-1)[0] = math.nan
        return terms

    trainer.accumulate_gradients = spoilt
    run_steps(trainer, 2)
    with pytest.raises(NotFiniteError, match=rf"of the {network} in phase {phase_name} is .* \(step 2\)"):
        trainer.check_finite()


def test_non_finite_images_are_found():
    trainer = tiny_trainer(pipe=False)
    real, labels = torch.full([BATCH, 3, 8, 8], math.inf), torch.eye(CLASSES)[[0, 1, 2, 0]]
    trainer.update(real, labels, torch.randn([BATCH, 8]), labels)
    with pytest.raises(NotFiniteError, match=r"of the discriminator in phase Dmain is .* \(step 0\)"):
        trainer.check_finite()


def test_unconditional_without_augmentation():
    torch.manual_seed(0)
    G = Generator(8, 0, 8, 8, 1, synthesis_kwargs={"channel_max": 4}, mapping_kwargs={"num_layers": 1})
    trainer = AdversarialTrainer(G, Discriminator(0, 8, 1, channel_max=4))
    stats = trainer.update(torch.zeros([2, 1, 8, 8]), None, torch.randn([2, 8]), None)
    trainer.check_finite()
    assert "augment_p" not in stats


def test_errors():
    trainer = tiny_trainer(pipe=False, batch=6, batch_gpu=3)
    labels = torch.eye(CLASSES)[[0, 1, 2, 0]]
    with pytest.raises(ValueError, match="change batch_gpu"):
        trainer.update(torch.zeros([4, 3, 8, 8]), labels, torch.zeros([4, 8]), labels)
    with pytest.raises(ValueError, match="need 4 or 8 latents"):
        trainer.update(torch.zeros([4, 3, 8, 8]), labels, torch.zeros([5, 8]), labels)
    with pytest.raises(ValueError, match="minibatch standard deviation: batch 3"):
        tiny_trainer(pipe=False).update(torch.zeros([3, 3, 8, 8]), labels[:3], torch.zeros([3, 8]), labels[:3])
    with pytest.raises(ValueError, match="augment_pipe"):
        AdversarialTrainer(trainer.G, trainer.D, ada=AdaController())
    with pytest.raises(ValueError, match="kimg > 0"):
        AdaController(kimg=0)


@pytest.mark.parametrize(
    "option",
    [
        {"lr": 0},
        {"d_lr": -1},
        {"batch": 3, "batch_gpu": 2},
        {"gamma": -1},
        {"style_mixing": 1.5},
        {"d_reg_interval": 0},
        {"ema_kimg": math.nan},
    ],
)
def test_config_names_a_bad_option(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        AdversarialConfig(**option)


@pytest.mark.gpu
def test_step_does_not_wait_for_the_gpu():
    trainer = tiny_trainer(**EVERYTHING)
    G, D, pipe = trainer.G.cuda(), trainer.D.cuda(), trainer.augment_pipe.cuda()
    trainer = AdversarialTrainer(G, D, pipe, trainer.ada, trainer.config)
    labels = torch.eye(CLASSES, device="cuda")[[0, 1, 2, 0]]
    batch = torch.rand([BATCH, 3, 8, 8], device="cuda"), labels, torch.randn([BATCH, 8], device="cuda"), labels
    for _ in range(6):  # every phase once, so that caches are filled
        trainer.update(*batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            trainer.update(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.check_finite()
