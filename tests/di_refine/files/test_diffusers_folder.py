"""diffusers folders: what is read in which form, what is written, and what is refused in one sentence."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from golden_io import GOLDEN

from di_refine.denoisers import load_denoiser
from di_refine.errors import InputError
from di_refine.files import diffusers_folder, networks

pytest.importorskip("diffusers", reason="needs the optional package diffusers")
FOLDERS = GOLDEN / "diffusers"
INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDERS / "ddpm-eps-linear", tmp_path / "model")


def change(file, **changes):
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value != "absent"}))


def outputs(net):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return net(x, torch.tensor([0.5, 3.0]))


def test_forms_of_a_folder(folder):
    """Files at the top, weights in several files, in a variant and in a .bin; the index may be missing."""
    expected = outputs(load_denoiser(folder))
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        path = folder / f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file({name: tensors[name] for name in part}, path)
    assert torch.equal(outputs(load_denoiser(folder)), expected)
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    half = {name: tensor.half() for name, tensor in tensors.items()}
    safetensors.torch.save_file(half, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    torch.testing.assert_close(outputs(load_denoiser(folder)), expected, rtol=0.02, atol=0.02)
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    shutil.move(folder / UNET, folder / "config.json")
    shutil.move(folder / SCHEDULER, folder / "scheduler_config.json")
    (folder / "unet").rmdir()
    (folder / "model_index.json").unlink()
    assert torch.equal(outputs(load_denoiser(folder)), expected)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained", "zero snr"])
def test_schedules(folder, schedule):
    """The noise levels are those of the betas; a last step without any signal is left out."""
    betas = np.linspace(0.001, 0.4, 50)
    settings = {
        "trained": {"trained_betas": betas.tolist()},
        "zero snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    }.get(schedule, {"beta_schedule": schedule})
    change(folder / SCHEDULER, num_train_timesteps=50, beta_start=0.001, beta_end=0.4, **settings)
    net = load_denoiser(folder)
    if schedule == "scaled_linear":
        betas = np.linspace(0.001**0.5, 0.4**0.5, 50) ** 2
    if schedule == "squaredcos_cap_v2":
        alpha = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha[1:] / alpha[:-1], 0.999)
    roots = np.sqrt(np.cumprod(1 - betas))
    if schedule == "zero snr":  # arXiv 2305.08891, algorithm 1
        roots = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1]))[:-1]
    expected = torch.tensor(np.sqrt(1 / roots**2 - 1))
    torch.testing.assert_close(net.log_sigmas.double().exp(), expected, rtol=1e-4, atol=0)
    assert net.sigma_min == pytest.approx(float(expected[0]), rel=1e-4)
    assert net.sigma_max == pytest.approx(float(expected[-1]), rel=1e-4)


def test_settings_of_other_years(folder):
    change(folder / SCHEDULER, prediction_type="absent", predict_epsilon=False)
    assert load_denoiser(folder).prediction == "sample"


def test_a_table_of_steps_is_asked_at_whole_steps(folder):
    change(folder / UNET, time_embedding_type="learned", num_train_timesteps=1000)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    table = torch.randn(1000, 8)
    safetensors.torch.save_file({**tensors, "time_proj.weight": table}, folder / WEIGHTS)
    net = load_denoiser(folder)
    sigma = torch.tensor([0.5, 3.0])
    seen = []
    net.unet.time_proj.register_forward_hook(lambda module, args, result: seen.append(args[0]))
    outputs(net)
    assert seen[0].dtype == torch.int64 and torch.equal(seen[0], net.step(sigma).long())
    assert torch.equal(net.round_sigma(sigma), net.log_sigmas[seen[0]].exp())


def test_what_is_written_is_what_was_read(folder, tmp_path):
    content = networks.load(folder).networks
    content = {**content, "distilled_sigmas": [2.5, 0.5], "label_law": None}
    diffusers_folder.save(content, tmp_path / "new")
    again = networks.load(tmp_path / "new")
    assert again.sigmas == [2.5, 0.5] and again.networks["diffusers"] == content["diffusers"]
    assert torch.equal(outputs(again.average), outputs(content["ema"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"], "nothing temporary stays"
    (tmp_path / "other").mkdir()
    with pytest.raises(Exception, match="other is there, and no diffusers folder that could be replaced"):
        diffusers_folder.save(content, tmp_path / "other")


REFUSED = {
    "vae": ((INDEX, {"vae": ["diffusers", "AutoencoderKL"]}), "is a latent-space model"),
    "vqvae": ((INDEX, {"vqvae": ["diffusers", "VQModel"]}), "is a latent-space model"),
    "four channels": (
        (UNET, {"in_channels": 4, "out_channels": 4}),
        "in_channels is 4, as of latent-space",
    ),
    "two channels": ((UNET, {"in_channels": 2}), r"in_channels is 2; only 1 \(grey\) and 3 \(RGB\)"),
    "out": ((UNET, {"out_channels": 4}), "out_channels is 4, neither in_channels nor its double"),
    "text": ((INDEX, {"text_encoder": ["transformers", "CLIP"]}), "is a text-conditional model"),
    "text U-Net": (
        (INDEX, {"unet": ["diffusers", "UNet2DConditionModel"]}),
        "is a text-conditional model",
    ),
    "text config": ((UNET, {"_class_name": "UNet2DConditionModel"}), "is of a text-conditional model"),
    "transformer": (
        (INDEX, {"unet": "absent", "transformer": ["diffusers", "DiTTransformer2DModel"]}),
        "holds DiTTransformer2DModel; only UNet2DModel",
    ),
    "class": ((UNET, {"_class_name": "UNet3DModel"}), "is of a UNet3DModel; only UNet2DModel"),
    "timestep": ((UNET, {"class_embed_type": "timestep"}), "its classes are given as timestep"),
    "size": ((UNET, {"sample_size": None}), "sample_size is None; only square images"),
    "rectangle": ((UNET, {"sample_size": [8, 16]}), "sample_size is a list; only square"),
    "odd": ((UNET, {"sample_size": 7}), "sample_size 7 cannot be halved 1 times"),
    "widths": ((UNET, {"block_out_channels": [8, 16]}), "wrong shape: unet.down_blocks.1"),
    "blocks": ((UNET, {"layers_per_block": 2}), "missing: unet.down_blocks.0.resnets.1"),
    "many blocks": ((UNET, {"layers_per_block": 100000}), "far more layers than the file has"),
    "unknown block": (
        (UNET, {"down_block_types": ["A", "B"]}),
        "does not accept the constructor arguments",
    ),
    "unknown setting": ((UNET, {"surprise": 1}), "does not accept the constructor arguments"),
    "no number": ((UNET, {"norm_eps": "small"}), "norm_eps is small, no number that makes sense"),
    "no count": ((UNET, {"norm_num_groups": -1}), "norm_num_groups is -1, no whole number from 1 on"),
    "a list for a text": ((SCHEDULER, {"prediction_type": []}), "model"),
    "a number for a list": ((UNET, {"down_block_types": 3}), "model"),
    "scheduler": (
        (SCHEDULER, {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
        "its scheduler is FlowMatchEulerDiscreteScheduler; those of DDPM",
    ),
    "consistency": (
        (SCHEDULER, {"_class_name": "CMStochasticIterativeScheduler"}),
        "is a consistency model",
    ),
    "prediction": ((SCHEDULER, {"prediction_type": "flow"}), "prediction_type is flow"),
    "steps": ((SCHEDULER, {"num_train_timesteps": 10**9}), "num_train_timesteps is 1000000000"),
    "betas": (
        (SCHEDULER, {"trained_betas": [0.1]}),
        "trained_betas is no list of 1000 numbers",
    ),
    "schedule": ((SCHEDULER, {"beta_schedule": "x"}), "does not accept its settings: x is not"),
    "falling": (
        (SCHEDULER, {"beta_start": -0.1, "beta_end": -0.2}),
        "noise levels of its scheduler",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_sentence_says_what_cannot_be_used(folder, case):
    (file, changes), words = REFUSED[case]
    change(folder / file, **changes)
    with pytest.raises(InputError, match=words) as error:
        load_denoiser(folder)
    assert "`teacher`: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, words",
    [
        ("scheduler/scheduler_config.json", "has no scheduler/scheduler_config.json"),
        ("unet/config.json", "has no unet/config.json"),
        (WEIGHTS, "has no unet/diffusion_pytorch_model.safetensors"),
    ],
)
def test_missing_and_damaged_files(folder, name, words):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=f"{(folder / name).name}: "):
        load_denoiser(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=words):
        load_denoiser(folder)


def test_a_scheduler_may_be_given_apart(folder):
    scheduler = json.loads((folder / SCHEDULER).read_text())
    expected = outputs(load_denoiser(folder))
    shutil.rmtree(folder / "scheduler")
    assert torch.equal(outputs(load_denoiser(folder, scheduler)), expected)


def test_pickles_beside_the_tensors_are_not_run(folder):
    torch.save({"net": torch.nn.Linear(1, 1)}, folder / "unet/diffusion_pytorch_model.bin")
    outputs(load_denoiser(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="diffusion_pytorch_model.bin holds more than tensors"):
        load_denoiser(folder)


def test_without_the_library(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"which needs the library: pip install 'di-refine\[diffusers\]'"):
        load_denoiser(folder)


def test_a_folder_is_there_until_another_takes_its_place(folder, tmp_path, monkeypatch):
    held = networks.load(folder).networks
    rename = Path.rename

    def failing(path, target):
        if target == folder and path.name == folder.name:
            raise OSError(28, "No space left on device")
        return rename(path, target)

    before = sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        diffusers_folder.save(held, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name], "nothing half-written is left"
    monkeypatch.undo()
    diffusers_folder.save(held, folder)
    assert torch.equal(outputs(load_denoiser(folder)), outputs(held["ema"]))
