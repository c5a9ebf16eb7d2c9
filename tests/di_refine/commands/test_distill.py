"""The distill command on real (tiny) diffusion models."""

import json

import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN

from di_refine.commands.distill import main
from di_refine.commands.generate import main as generate
from di_refine.generators import DistilledGenerator, GeneratorSampler, load_sampler, step_sigmas
from di_refine.presets import PRESETS
from torch_utils import persistence

TEACHER, UNCOND = GOLDEN / "distill/teacher.pkl", GOLDEN / "edm/ncsnpp.pkl"


def distill(*arguments):
    return CliRunner().invoke(main, ["--device=cpu", *(str(argument) for argument in arguments)])


def options(outdir, **changes):
    values = {
        "teacher": TEACHER,
        "outdir": outdir,
        "kimg": 0.024,
        "batch": 4,
        "score-warmup": 0,
        "ema-kimg": 0.01,
        "lr": 1e-3,
        "score-lr": 1e-3,
        "tick": 0.008,
        "snap": 1,
        "metrics": "none",
    }
    values.update({name.replace("_", "-"): value for name, value in changes.items()})
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def report(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("steps", [1, 2])
def test_the_file_knows_how_to_make_images(tmp_path, steps):
    """A distilled network opens like the teacher, and carries its noise levels to generate.py."""
    done = report(distill(*options(tmp_path, student_steps=steps, init_sigma=2.5)))
    networks = persistence.load(done["snapshot"])
    sigmas = networks["distilled_sigmas"]
    assert sigmas == pytest.approx(step_sigmas(steps, 2.5)) and len(sigmas) == steps and sigmas[0] == 2.5
    before = persistence.load(TEACHER)["ema"]
    changed = [not torch.equal(a, b) for a, b in zip(before.parameters(), networks["ema"].parameters())]
    assert sum(changed) > len(changed) / 2

    sampler = load_sampler(done["snapshot"])
    images = sampler.images([0, 1])
    torch.testing.assert_close(images, GeneratorSampler(DistilledGenerator(networks["ema"], sigmas)).images([0, 1]))
    out = CliRunner().invoke(generate, [f"--network={done['snapshot']}", "--seeds=0-3", f"--outdir={tmp_path / 'out'}"])
    assert out.exit_code == 0, out.stderr
    assert len(list((tmp_path / "out").glob("seed*.png"))) == 4


def test_several_steps_denoise_what_they_noise():
    net = persistence.load(TEACHER)["ema"]
    generator = DistilledGenerator(net, [2.5, 0.6]).eval()
    z, labels = torch.randn(3, 2, 3, 16, 16), torch.eye(10)[:3]
    with torch.no_grad():
        first = net(2.5 * z[:, 0], torch.full([3], 2.5), labels)
        second = net(first + 0.6 * z[:, 1], torch.full([3], 0.6), labels)
        torch.testing.assert_close(generator(z, labels), second)
    generator.train()
    assert not generator.net.training, "no dropout inside the generator"
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        x0 = generator(z, labels)
        seen.add(int(torch.allclose(x0, second)) - int(torch.allclose(x0, first)))
        assert x0.requires_grad == any(p.requires_grad for p in net.parameters())
    assert seen == {-1, 1}, "each step has its turn in training"


def test_noise_levels_of_several_steps():
    assert step_sigmas(1, 80) == [80]
    four = step_sigmas(4, 2.5)
    assert four == sorted(four, reverse=True) and len(four) == 4 and four[-1] > 0.1
    assert step_sigmas(2, 0.05) == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize(
    "changes", [{"preset": "sid"}, {"student_steps": 2, "augment": 0.3, "teacher": UNCOND}], ids=str
)
def test_resume_is_exact(tmp_path, changes):
    whole = report(distill(*options(tmp_path / "whole", **changes)))
    first = report(distill(*options(tmp_path / "parts", **changes, kimg=0.012)))
    second = report(distill(*options(tmp_path / "parts", **changes, resume=first["run_dir"])))
    a, b = (persistence.load(done["snapshot"])["ema"].state_dict() for done in (whole, second))
    assert all(torch.equal(a[name], b[name]) for name in a)


def dry_run(*arguments):
    return report(distill(f"--teacher={TEACHER}", "--dry-run", *arguments))


def test_presets_are_the_published_values_and_options_override_them():
    assert set(PRESETS) >= {"diff-instruct", "sid", "sim", "dmd", "f-distill-js", "uni-fkl"}
    default = dry_run("--preset=paper-cifar10")
    assert default["objective"] == "ikl" and default["init_sigma"] == 1 and default["batch"] == 128
    assert default["lr"] == default["score_lr"] == 1e-5 and default["beta1"] == 0 and default["ema_kimg"] == 500
    sid = dry_run("--preset=sid", "--batch=64")
    assert sid["objective"] == "sid" and sid["alpha"] == 1.2 and sid["normalize"] is True
    assert sid["sigma_dist"] == "edm-grid" and sid["tmax"] == 800 and sid["init_sigma"] == 2.5
    assert sid["batch"] == 64 and sid["sources"]["batch"] == "given" and sid["sources"]["alpha"] == "preset"
    other = dry_run("--preset=sid", "--objective=sim")
    assert other["objective"] == "sim" and other["alpha"] is None and other["init_sigma"] == 2.5
    for name in ("f-distill-js", "uni-fkl"):
        refused = distill(f"--teacher={TEACHER}", f"--preset={name}", "--dry-run")
        assert refused.exit_code == 2 and "needs --data" in refused.stderr


def test_a_registry_teacher_brings_values_for_its_size():
    result = CliRunner().invoke(main, ["--teacher=edm-digits-16x16-cond.pkl", "--preset=diff-instruct", "--dry-run"])
    record = report(result)
    assert record["sources"]["lr"] == "registry" and record["sources"]["init_sigma"] == "preset"
    assert record["metrics"] == ["fd2k_full@digits", "acc2k@digits"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, ["--teacher is needed"]),
        ({"teacher": GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl"}, ["--teacher", "StyleGAN2 generator"]),
        ({"init_sigma": 100}, ["--init-sigma", "100", "80"]),
        ({"init_sigma": 0.0001}, ["--init-sigma", "0.002"]),
        ({"student_steps": 3, "student_sigmas": "2,1"}, ["--student-sigmas has 2 levels", "--student-steps is 3"]),
        ({"student_steps": 2, "student_sigmas": "1,2"}, ["--student-sigmas=1,2", "fall"]),
        ({"student_steps": 2, "student_sigmas": "1,x"}, ["--student-sigmas", "'1,x'"]),
        ({"student_steps": 2, "student_sigmas": "100,1"}, ["--student-sigmas: 100", "80"]),
        ({"objective": "uni-js"}, ["--objective=uni-js", "--data"]),
        ({"objective": "ikl", "detach_ratio": True}, ["--detach-ratio"]),
        ({"alpha": 1.0}, ["--alpha", "sid"]),
        ({"preset": "nonsense"}, ["--preset", "diff-instruct"]),
        ({"augment": 0.1, "teacher": GOLDEN / "edm/iddpm.pkl"}, ["--augment", "iddpm.pkl"]),
        ({"kimg": 1, "score_warmup": 2}, ["--kimg=1", "--score-warmup=2"]),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, changes, words):
    outdir = tmp_path / "runs"
    arguments = [word.replace("--detach-ratio=True", "--detach-ratio") for word in options(outdir, **changes)]
    result = distill(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.strip().splitlines()) == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert not outdir.exists()


def test_teachers_that_do_not_go_together(tmp_path):
    """An unconditional one may stand after the first; another size may not."""
    unconditional, other = GOLDEN / "edm/vp.pkl", GOLDEN / "edm/ddpmpp_cond.pkl"
    common = options(tmp_path / "runs")
    first = distill(f"--teacher={unconditional}", *common)
    assert first.exit_code == 2 and "the first is unconditional" in first.stderr
    result = distill(*common, f"--teacher={other}")
    assert result.exit_code == 2 and not (tmp_path / "runs").exists(), result.stderr
    assert "of the teachers is" in result.stderr
