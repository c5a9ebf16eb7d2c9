"""The teacher as feature network and reference."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from di_refine import denoisers
from di_refine.commands.calc_metrics import main
from di_refine.denoisers import load_denoiser
from di_refine.errors import InputError
from di_refine.files import registry, teacher_samples
from di_refine.generators import DiffusionSampler
from di_refine.labels import LabelLaw
from di_refine.metrics import teacher_net
from di_refine.metrics.evaluate import Evaluator
from di_refine.metrics.kinds import parse_metric

TEACHER = registry.pretrained_folder() / "edm-digits-16x16-cond.pkl"
NETWORK = registry.pretrained_folder() / "stylegan2-digits.pkl"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DI_REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(teacher_net, "STEPS", 4)
        net = load_denoiser(TEACHER)
        yield teacher_net.TeacherReference(net, TEACHER, 48, LabelLaw(10), torch.device("cpu"))


def test_names():
    for name in (
        "fd5k@teacher",
        "fd5k_full@teacher",
        "fd48@teacher",
        "fd_all@teacher",
        "kd5k@teacher",
        "pr5k3@teacher",
    ):
        assert parse_metric(name).detector == "teacher", name
    for name in ("fd5k@digits", "fd5k", "fid5k@teacher", "fid5k_full@teacher"):
        with pytest.raises(InputError):
            parse_metric(name)


def test_features_are_the_encoders_at_a_low_noise_level(reference):
    """An image's features depend on it alone, whatever stands beside it."""
    images = torch.randint(0, 256, [5, 1, 16, 16], dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = reference.detector()
    features, probabilities = net(images)
    assert features.shape == (5, net.identity.feature_dim) and probabilities is None
    torch.testing.assert_close(net(images[3:4])[0], features[3:4])

    encoder = net.net
    seen = []
    handle = denoisers.encoder_layer(reference.net).register_forward_hook(lambda _m, _a, out: seen.append(out))
    x = images.float() / 127.5 - 1 + encoder.noise
    with torch.no_grad():
        reference.net(x, torch.full([5], teacher_net.SIGMA), torch.zeros(5, 10))
    handle.remove()
    torch.testing.assert_close(features, seen[0].mean(dim=[2, 3]))
    assert float(encoder.noise.std()) == pytest.approx(teacher_net.SIGMA, rel=0.2)


def test_the_reference_is_drawn_once_and_apart_from_what_users_drew(reference, monkeypatch):
    dataset = reference.draw()
    assert len(dataset) == 48 and dataset.resolution == 16
    sampler = DiffusionSampler(reference.net, num_steps=4, law=reference.law)
    labels = dataset.labels([5])
    np.testing.assert_array_equal(dataset.images([5]), sampler(5, 1, teacher_net.SEED)[0])
    assert labels.argmax() == int(sampler(5, 1, teacher_net.SEED)[1].argmax())
    assert teacher_samples.cached_samples(TEACHER) is None, "--data=teacher takes what was asked for"

    def never(*_):
        raise AssertionError("drawn again")

    monkeypatch.setattr(teacher_samples, "sample", never)
    assert reference.draw().content_hash() == dataset.content_hash()
    other = teacher_net.TeacherReference(reference.net, TEACHER, 49, reference.law, reference.device)
    assert other.content_hash() != reference.content_hash()


def test_an_evaluator_measures_by_the_teacher(reference):
    """Nothing is drawn before the first measurement; a teacher is nearer to itself than noise is."""
    evaluator = Evaluator(["fd48@teacher"], teacher=reference)
    near = DiffusionSampler(reference.net, num_steps=4, law=reference.law)

    class Noise:
        num_images, law, label_dim, num_channels, resolution = None, None, 10, 1, 16

        def __call__(self, first, count, seed):
            rng = torch.Generator().manual_seed(seed + first)
            return torch.randint(0, 256, [count, 1, 16, 16], dtype=torch.uint8, generator=rng), None

    (a,), (b,) = evaluator(near, seed=1), evaluator(Noise(), seed=1)
    assert 0 < a.value < b.value / 10
    assert a.detector.name == "teacher" and a.reference["count"] == 48
    assert evaluator.identity["references"] == {"teacher": reference.content_hash()}
    with pytest.raises(InputError, match="give `teacher`"):
        Evaluator(["fd48@teacher"])


def test_the_command_takes_the_networks_own_teacher_or_another(reference):
    options = ["--metrics=fd48@teacher", "--no-jsonl", "--device=cpu"]
    own = CliRunner().invoke(main, [f"--network={NETWORK}", *options])
    assert own.exit_code == 0, own.output
    named = CliRunner().invoke(main, [f"--network={NETWORK}", f"--teacher={TEACHER}", *options])
    values = [json.loads(result.stdout.splitlines()[-1])["results"][0]["results"] for result in (own, named)]
    assert values[0] == values[1] and values[0]["fd48@teacher"] > 0
    other = CliRunner().invoke(main, [f"--network={NETWORK}", f"--teacher={TEACHER}", "--metrics=acc1k@digits"])
    assert other.exit_code == 2 and "--teacher is for metrics such as fd5k@teacher" in other.stderr
    folder = CliRunner().invoke(main, [f"--images={reference.draw().path}", *options])
    assert folder.exit_code == 2 and "give --teacher" in folder.stderr
