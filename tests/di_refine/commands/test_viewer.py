"""What the page of `view` shows, without the page."""

import numpy as np
import pytest
import torch
from golden_io import GOLDEN

from di_refine.commands.viewer import Real, Request, Viewer, distinct_titles
from di_refine.denoisers import load_denoiser
from di_refine.errors import InputError
from di_refine.files import pictures, registry
from di_refine.files.datasets import ImageDataset
from di_refine.generators import load_sampler
from di_refine.metrics.detectors import load_detector

SHIPPED = registry.pretrained_folder()
GAN, EDM = SHIPPED / "stylegan2-digits.pkl", SHIPPED / "edm-digits-16x16-cond.pkl"
CIFAR = GOLDEN / "stylegan2/sg2ada-cifar-cond.pkl"


def sampler(path, **settings):
    return load_sampler(path, noise_mode="const", **settings)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DI_REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Real.of(ImageDataset(SHIPPED / "digits-16x16.zip"), load_detector("digits"))


@pytest.fixture(scope="module")
def viewer(real):
    return Viewer([("gan", sampler(GAN)), ("edm", sampler(EDM))], real=real, teacher=load_denoiser(EDM))


def shown(viewer, index=0, **asked):
    return viewer.pictures(Request(**{"count": 4, "steps": 2, **asked}))[index].images.int()


def test_pictures_are_those_of_the_seeds(viewer):
    seeds = [5, 6, 7, 8]
    for index, each in enumerate(viewer.samplers):
        if index:
            each.num_steps = 2
        wanted = pictures.to_uint8(each.images(seeds, each.law.in_turn(seeds))).int()
        assert (shown(viewer, index, seed=5) - wanted).abs().max() <= 1
    panels = viewer.pictures(Request(count=3, steps=2))
    assert [panel.title for panel in panels] == ["gan", "edm", "edm - gan"]
    assert [len(panel.images) for panel in panels] == [3, 3, 3]
    assert panels[0].note == "StyleGAN2 generator, 16x16" and panels[1].note == "diffusion model, 2 steps, 16x16"


def test_each_control_changes_what_it_is_for(viewer):
    before = shown(viewer), shown(viewer, 1)
    both = {"seed": 1, "between": 0.5, "label": 3}
    of_gan = {"psi": 0.5, "noise_mode": "none", "mix": 9}
    for name, value in both.items():
        assert (shown(viewer, **{name: value}) != before[0]).any(), name
        assert (shown(viewer, 1, **{name: value}) != before[1]).any(), name
    for name, value in of_gan.items():
        assert (shown(viewer, **{name: value}) != before[0]).any(), name
        assert (shown(viewer, 1, **{name: value}) == before[1]).all(), name
    assert (shown(viewer, 1, steps=3) != before[1]).any()
    assert (shown(viewer) == before[0]).all(), "and nothing stays changed"


def test_a_walk_ends_at_the_second_seed(viewer):
    end = shown(viewer, label=2, other=50, between=1.0)
    assert (end - shown(viewer, label=2, seed=50)).abs().max() <= 1
    end = shown(viewer, 1, label=2, other=50, between=1.0)
    assert (end - shown(viewer, 1, label=2, seed=50)).abs().max() <= 2


def test_all_styles_of_another_seed_are_that_seed(viewer):
    every = tuple(range(viewer.layers))
    mixed = shown(viewer, label=4, mix=30, layers=every)
    assert (mixed - shown(viewer, label=4, seed=30)[:1]).abs().max() <= 1
    assert (shown(viewer, label=4, mix=30, layers=()) == shown(viewer, label=4)).all()
    assert (shown(viewer, label=4, mix=30, layers=(99,)) == shown(viewer, label=4)).all(), "of another network"


def test_differences_are_white_where_there_are_none():
    twins = Viewer([("a", sampler(GAN)), ("b", sampler(GAN))])
    panel = twins.pictures(Request(count=2))[-1]
    assert (panel.images == 255).all() and panel.note == "no difference"
    last = twins.samplers[1].generator.net.synthesis.b16.torgb
    last.bias.data += 0.25
    panel = twins.pictures(Request(count=2, seed=3))[-1]
    assert "red: brighter in b" in panel.note
    red, green, blue = panel.images[:, 0], panel.images[:, 1], panel.images[:, 2]
    assert (red == 255).all() and (green == blue).all() and (green == 0).any(), "b is nowhere darker"


def test_classes_have_the_names_of_the_data_where_networks_have_none(real):
    found = Viewer([("gan", sampler(GAN))])
    assert len(found.class_names) == 10
    named = Viewer([("gan", sampler(GAN))], real=real)
    assert named.class_names == (real.dataset.class_names or found.class_names)
    assert Viewer([("edm", sampler(GOLDEN / "edm/ddpmpp_uncond.pkl"))]).class_names == ()


def test_the_nearest_picture_of_a_real_one_is_itself(real, viewer):
    first = torch.from_numpy(real.dataset.images([7]))
    features = real.detector(first, probabilities=False)[0]
    assert torch.cdist(features, real.features).argmin() == 7
    panels = viewer.nearest(Request(count=2, steps=2))
    assert [panel.title for panel in panels] == ["gan", "edm"]
    rows = panels[0].images.unflatten(0, (2, -1))
    assert panels[0].columns == rows.shape[1] == 6
    assert (rows[:, 0].int() == shown(viewer, count=2)).all()
    known = real.dataset.images(np.arange(len(real.dataset)))
    assert all((known == picture.numpy()).all(axis=(1, 2, 3)).any() for picture in rows[:, 1:].flatten(0, 1))


def test_the_teacher_denoises(viewer):
    low, high = viewer.sigmas
    before, noised, denoised, change = viewer.judged(Request(count=4, steps=2), low)
    assert (before.images.int() == shown(viewer)).all()
    assert (denoised.images.int() - before.images.int()).abs().float().mean() < 1, "with hardly any noise"
    _, noised, denoised, change = viewer.judged(Request(count=4, steps=2), 0.5)
    assert (noised.images.int() - before.images.int()).abs().float().mean() > 20
    error = (denoised.images.int() - before.images.int()).abs().float().mean()
    assert error < 20 and change.note.startswith("red: brighter after denoising")
    assert (viewer.judged(Request(count=4, steps=2), 0.5, 1)[0].images.int() == shown(viewer, 1)).all()
    for sigma, which in ((high * 2, 0), (low / 2, 0), (0.5, 2)):
        with pytest.raises(InputError):
            viewer.judged(Request(count=4, steps=2), sigma, which)


def test_networks_of_other_sizes_stand_beside_each_other(real):
    mixed = [("gan", sampler(GAN)), ("large", sampler(GOLDEN / "edm/ddpmpp_uncond.pkl"))]
    both = Viewer(mixed, teacher=load_denoiser(EDM))
    assert not both.difference
    request = Request(count=2, steps=2, label=1)
    assert [panel.images.shape[-1] for panel in both.pictures(request)] == [16, mixed[1][1].resolution]
    assert both.judged(request, 0.5, 1)[0].images.shape[1:] == (1, 16, 16), "as the teacher sees it"
    with pytest.raises(InputError, match="--difference: gan makes pictures of 16x16 pixels and 1 channels, large"):
        Viewer(mixed, difference=True)
    with pytest.raises(InputError, match="--difference needs two"):
        Viewer(mixed[:1], difference=True)


def test_what_does_not_fit_is_refused(real):
    gan, cifar = sampler(GAN), sampler(CIFAR)
    vectors = load_denoiser(GOLDEN / "edm/iddpm.pkl")
    if cifar.label_dim != gan.label_dim:
        with pytest.raises(InputError, match=f"cifar has {cifar.label_dim} classes, and gan has 10"):
            Viewer([("gan", gan), ("cifar", cifar)])
    if vectors.label_dim not in (0, 10):
        with pytest.raises(InputError, match="take a teacher of the same classes"):
            Viewer([("gan", gan)], teacher=vectors)
    with pytest.raises(InputError, match="digits takes images with 1"):
        Viewer([("cifar", cifar)], real=real)


@pytest.mark.parametrize(
    "asked",
    [{"seed": -1}, {"count": 0}, {"count": 10**9}, {"between": 1.5}, {"steps": 10**6}, {"noise_mode": "loud"}],
    ids=str,
)
def test_requests_out_of_range_are_refused(asked):
    with pytest.raises(InputError, match="may be"):
        Request(**asked)


def test_unknown_classes_and_missing_parts_are_refused():
    alone = Viewer([("gan", sampler(GAN))])
    with pytest.raises(InputError, match="there is no class 10; there are 10"):
        alone.pictures(Request(label=10))
    with pytest.raises(InputError, match="give a data set with --data"):
        alone.nearest(Request())
    with pytest.raises(InputError, match="give one with --teacher"):
        alone.judged(Request(), 1.0)


def test_titles_are_distinct():
    assert distinct_titles(["a/x.pkl", "b.pkl"]) == ["x", "b"]
    assert distinct_titles(["a/x.pkl", "c/x.pkl", "b.pkl"]) == ["a/x.pkl", "c/x.pkl", "b"]
