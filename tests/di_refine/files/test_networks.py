"""Network files as people have them: written by other projects, or with something in them that is not needed here."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_io import GOLDEN

from di_refine.commands import convert, generate, inspect
from di_refine.denoisers import load_denoiser
from di_refine.edm.networks import EDMPrecond
from di_refine.errors import InputError
from di_refine.files import networks, safetensors_pair
from di_refine.files.download import sha256_of
from di_refine.generators import load_sampler
from stylegan2_ada.networks import Generator
from torch_utils import persistence

CASES = Path(__file__).parents[2] / "cases"

KEPT = {  # a part of the file that is of no use here, and what the note says
    "plain_D": ("D", "'D' is a pg_modules.discriminator.ProjectedDiscriminator, which is not known here"),
    "nan_in_G_only": ("G", "'G' (Generator): 'synthesis.b4.const' contains non-finite values; it is not needed"),
    "diffusion-gan": ("diffusion", "'diffusion' (Diffusion): the class is not known; it is not needed"),
    "projected-gan": ("D", "'D' is a pg_modules.discriminator.ProjectedDiscriminator, which is not known here"),
}


@pytest.fixture(autouse=True)
def notes_are_new():
    networks.say.cache_clear()


@pytest.mark.parametrize("name", KEPT)
def test_only_the_average_has_to_be_right(name, capsys, tmp_path):
    """The rest is kept as it is, written back, and said to be of no use."""
    key, note = KEPT[name]
    file = networks.load(CASES / f"{name}.pkl")
    assert file.kind == networks.STYLEGAN2
    assert note in capsys.readouterr().err
    persistence.save(file.networks, tmp_path / "a.pkl")
    again = networks.load(tmp_path / "a.pkl").networks
    assert note in capsys.readouterr().err and key in again
    persistence.save(again, tmp_path / "b.pkl")
    assert (tmp_path / "a.pkl").read_bytes() == (tmp_path / "b.pkl").read_bytes()


@pytest.mark.parametrize("name", ["without_D", "protocol2"])
def test_usable_files_need_no_note(name, capsys):
    assert isinstance(networks.load(CASES / f"{name}.pkl").average, Generator)
    assert capsys.readouterr().err == ""


def test_pickle_protocol_2_holds_the_same():
    """The two cases are one network, written twice."""
    a, b = (networks.load(CASES / f"{name}.pkl").average.state_dict() for name in ("without_D", "protocol2"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["diffusion-gan", "projected-gan"])
def test_generators_of_other_projects_make_their_images(name):
    """Their storages may be tagged as a GPU's."""
    with np.load(CASES / f"{name}.npz", allow_pickle=False) as golden:
        z, c, wanted = (torch.from_numpy(golden[key]) for key in ("z", "c", "img_const"))
    content = networks.load(CASES / f"{name}.pkl").networks
    images = content["G_ema"](z, c, noise_mode="const")
    assert (images - wanted).abs().max() <= 3e-5 * wanted.abs().max()


def test_what_is_not_known_stays_as_the_file_has_it(tmp_path):
    persistence.save(persistence.load(CASES / "plain_D.pkl"), tmp_path / "again.pkl")
    a, b = (persistence.load_records(path)["D"] for path in (CASES / "plain_D.pkl", tmp_path / "again.pkl"))
    assert _outline(a) == _outline(b)


def _outline(value):
    if isinstance(value, persistence.Opaque):
        return ["opaque", _outline(value.maker), value.new, *map(_outline, (value.args, value.state, value.items))]
    if isinstance(value, dict):
        return {key: _outline(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_outline(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)


def test_conversion_says_what_it_leaves_out(tmp_path):
    """JSON and safetensors hold no objects of unknown classes; a pickle holds them."""
    for suffix, key in ((".safetensors", False), (".pkl", True)):
        dest = tmp_path / f"network{suffix}"
        result = CliRunner().invoke(convert.main, [f"--source={CASES / 'plain_D.pkl'}", f"--dest={dest}"])
        assert result.exit_code == 0, result.output
        assert ("'D' is left out" in result.stderr) is not key
        assert ("D" in safetensors_pair.load_either(dest)) is key


def test_inspect_shows_what_is_not_known(cache):
    result = CliRunner().invoke(inspect.main, [str(CASES / "projected-gan.pkl")])
    assert result.exit_code == 0, result.output
    assert "pg_modules.discriminator.ProjectedDiscriminator" in result.output


def test_an_average_of_an_unknown_class_is_refused(tmp_path):
    content = persistence.load(CASES / "plain_D.pkl")
    swapped = {**content, "G_ema": content["D"]}
    persistence.save(swapped, tmp_path / "swapped.pkl")
    with pytest.raises(InputError, match="'G_ema' refers to pg_modules.discriminator.ProjectedDiscriminator"):
        networks.load(tmp_path / "swapped.pkl")


def test_one_step_generators_of_other_projects(tmp_path):
    """Their files look like those of diffusion models, but the network knows one noise level only."""
    average = persistence.load(GOLDEN / "distill/teacher.pkl")["ema"]
    path = tmp_path / "sid.pkl"
    persistence.save({"ema": average, "Sg": average}, path)
    with pytest.raises(InputError, match="teacher=.*one-step generator of another project.*`Sg`"):
        load_denoiser(path)
    with pytest.raises(InputError, match="`init_sigma` is needed"):
        load_sampler(path)
    assert load_sampler(path, init_sigma=2.5).images([0], torch.zeros(1, average.label_dim)).isfinite().all()


def test_generating_with_a_diffusion_model_tells_of_one_step_files(tmp_path):
    """A network that was distilled elsewhere and saved alone cannot be told from a diffusion model."""
    path = GOLDEN / "distill/teacher.pkl"
    arguments = [f"--network={path}", "--seeds=0", "--steps=2", "--device=cpu", f"--outdir={tmp_path}"]
    result = CliRunner().invoke(generate.main, arguments)
    assert result.exit_code == 0, result.output
    assert "give the noise level with --init-sigma" in result.stderr
    result = CliRunner().invoke(generate.main, [*arguments, "--init-sigma=2.5"])
    assert result.exit_code == 0 and "init-sigma" not in result.stderr


FOREIGN = {
    "checkpoint.pt": "a torch.save checkpoint; no command",
    "checkpoint_old.pt": "a torch.save checkpoint in the form before PyTorch 1.6; no command",
    "ddpm/unet/diffusion_pytorch_model.safetensors": "safetensors without the JSON",
    "web_page.pkl": "a web page; the download went wrong",
    "web_page2.pkl": "a web page; the download went wrong",
    "diffusion-gan.npz": "arrays of NumPy",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_called_by_their_name(name):
    for load in (networks.load, load_denoiser, load_sampler):
        with pytest.raises(InputError, match=f"{name} is {FOREIGN[name]}"):
            load(CASES / name)


@pytest.mark.parametrize("name", ["checkpoint.pt", "web_page.pkl"])
def test_converting_a_foreign_file_names_it(name, tmp_path):
    result = CliRunner().invoke(convert.main, [f"--source={CASES / name}", f"--dest={tmp_path / 'a.pkl'}"])
    assert result.exit_code == 2 and f"{name} is {FOREIGN[name]}" in result.stderr


def test_our_own_pairs_and_run_directories_are_read(tmp_path, capsys):
    before = persistence.load(GOLDEN / "distill/teacher.pkl")["ema"]
    safetensors_pair.save({"ema": before}, tmp_path / "a")
    for name in ("a.safetensors", "a.json"):
        file = networks.load(tmp_path / name)
        assert file.kind == networks.EDM and file.path.name == name
        assert all(torch.equal(x, y) for x, y in zip(file.average.parameters(), before.parameters()))
    for kimg in ("000003", "000012"):
        shutil.copy(GOLDEN / "distill/teacher.pkl", tmp_path / f"network-snapshot-{kimg}.pkl")
    assert networks.load(tmp_path).path == tmp_path / "network-snapshot-000012.pkl"
    assert "the newest snapshot is taken, network-snapshot-000012.pkl" in capsys.readouterr().err
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match="a.safetensors is not the file it was written with"):
        networks.load(tmp_path / "a.safetensors")


def _generator(**layers):
    synthesis = persistence.Record("SynthesisNetwork", {"_modules": layers}, "")
    return persistence.Record("Generator", {"_modules": {"synthesis": synthesis}}, "")


@pytest.mark.parametrize(
    "content, name",
    [
        ({"G_ema": _generator(input=None)}, "a StyleGAN3 generator"),
        ({"G_ema": _generator(input=None), "D": persistence.load_records(CASES / "plain_D.pkl")["D"]}, "a StyleGAN-XL"),
        ({"G_ema": persistence.Record("SuperresGenerator", {}, "")}, "a StyleGAN-XL generator"),
        ({"G_ema": _generator(init=None, feat_8=None)}, "a FastGAN generator"),
        ({"capture_all": False, "capture_mean_cov": True, "num_features": 2048}, "a metric cache"),
    ],
)
def test_pickles_of_other_projects_are_called_by_their_name(content, name, tmp_path):
    persistence.save(content, tmp_path / "a.pkl")
    with pytest.raises(InputError, match=f"a.pkl is {name}"):
        networks.load(tmp_path / "a.pkl")


def test_pictures_that_would_not_fit_into_memory_are_refused(tmp_path, monkeypatch):
    small = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    persistence.save({"ema": EDMPrecond(1 << 17, 1, **small)}, tmp_path / "a.pkl")
    with pytest.raises(InputError, match=r"`teacher`: one picture of .*131072x131072 with 1 channel.* GiB"):
        networks.load(tmp_path / "a.pkl", "teacher")


@pytest.mark.parametrize("sigmas", [[], [1.0] * 1001, 1.0, [1.0, 2.0], [1.0, 0.0], ["1"], [float("inf")], [True]])
def test_noise_levels_are_a_list_of_some(tmp_path, sigmas):
    small = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    persistence.save({"ema": EDMPrecond(8, 1, **small), "distilled_sigmas": sigmas}, tmp_path / "a.pkl")
    with pytest.raises(InputError, match="no list of 1 to 1000 falling noise levels"):
        networks.load(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "attribute, value",
    [
        ("z_dim", 1e12),
        ("z_dim", None),
        ("c_dim", True),
        ("img_resolution", 64.5),
        ("synthesis.num_ws", -1),
        ("mapping.fc0.activation", "relu"),
        ("mapping.fc0.weight_gain", math.inf),
        ("mapping.w_avg_beta", math.nan),
        ("mapping.w_avg_beta", "0.9"),
        ("synthesis.b8.conv1.act_gain", math.inf),
        ("synthesis.b8.conv1.conv_clamp", -1.0),
    ],
)
def test_attributes_of_a_generator_that_its_constructor_would_not_give_are_refused(monkeypatch, attribute, value):
    refused_with(monkeypatch, GOLDEN / "stylegan2/sg2ada-resnet16.pkl", "G_ema", attribute, value)


@pytest.mark.parametrize(
    "attribute, value",
    [
        ("label_dim", None),
        ("label_dim", 10**12),
        ("img_channels", "3"),
        ("sigma_data", 0),
        ("sigma_data", -0.5),
        ("sigma_data", math.inf),
        ("sigma_min", -1),
        ("sigma_min", math.nan),
        ("sigma_max", 0.0),
        ("sigma_max", None),
        ("model.map_layer0.in_features", 10**6),
    ],
)
def test_attributes_of_a_diffusion_model_that_its_constructor_would_not_give_are_refused(monkeypatch, attribute, value):
    refused_with(monkeypatch, GOLDEN / "edm/ddpmpp_uncond.pkl", "ema", attribute, value)


def refused_with(monkeypatch, path, key, attribute, value):
    """What a file says is changed in its record, as from_records reads it for every format."""
    records = persistence.load_records(path)
    *layers, name = attribute.split(".")
    layer = records[key]
    for part in layers:
        layer = layer.state["_modules"][part]
    assert name in layer.state
    layer.state[name] = value

    def load(path, notes=None):
        return persistence.from_records(records, str(path), notes)

    monkeypatch.setattr(safetensors_pair, "load_either", load)
    with pytest.raises(InputError, match=rf"attribute '({attribute}|{name})' is|is no diffusion model that works"):
        networks.load(path)


def test_the_digest_is_that_of_all_that_says_which_network_it_is(tmp_path):
    """Measurements and samples are kept under it."""
    teacher = GOLDEN / "distill/teacher.pkl"
    for kimg in ("000003", "000012"):
        shutil.copy(teacher if kimg == "000012" else GOLDEN / "edm/vp.pkl", tmp_path / f"network-snapshot-{kimg}.pkl")
    assert networks.digest(tmp_path) == networks.digest(teacher) == sha256_of(teacher)
    folder = shutil.copytree(GOLDEN / "diffusers/ddpm-eps-linear", tmp_path / "folder")
    digest = networks.digest(folder)
    (folder / "README.md").write_text("says nothing of the network")
    assert networks.digest(folder) == digest != networks.digest(folder, {"num_train_timesteps": 10})
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.02", "0.03"))
    assert networks.digest(folder) != digest
