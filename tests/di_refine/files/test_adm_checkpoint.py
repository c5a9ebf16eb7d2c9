"""Weights of OpenAI's diffusion models: flags and tensors have to agree, and what is wrong is said in one sentence."""

import json
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from golden_io import GOLDEN

from di_refine.denoisers import load_denoiser
from di_refine.errors import InputError
from di_refine.files import adm_checkpoint, networks, registry

ADM = GOLDEN / "guided"
FILE = ADM / "gd64-cond.pt"
FLAGS = json.loads(str(np.load(ADM / "gd64-cond.npz")["meta"][0]))["flags"]


def state(**changes):
    tensors = torch.load(FILE, weights_only=True)
    return OrderedDict((name, tensor) for name, tensor in {**tensors, **changes}.items() if tensor is not None)


def test_flags_beside_the_file_and_as_the_scripts_write_them(tmp_path):
    """Texts are read as the command lines of the published scripts have them; what has no part is passed over."""
    shutil.copy(FILE, tmp_path / "a.pt")
    with pytest.raises(InputError, match="`teacher`: .*a.pt: the weights do not say image_size"):
        load_denoiser(tmp_path / "a.pt")
    flags = {**FLAGS, "attention_resolutions": "8,4", "channel_mult": "", "learn_sigma": "True", "use_fp16": "True"}
    (tmp_path / "a.json").write_text(json.dumps(flags))
    file = networks.load(tmp_path / "a.pt")
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(10)[:2]
    expected = load_denoiser(FILE, FLAGS)
    assert torch.equal(file.average(x, torch.tensor(1.0), labels), expected(x, torch.tensor(1.0), labels))
    digest = networks.digest(tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps({**flags, "noise_schedule": "linear"}))
    assert networks.digest(tmp_path / "a.pt") != digest, "the flags are part of the network"
    assert networks.load(tmp_path / "a.pt", config=FLAGS).average.sigma_max == expected.sigma_max, (
        "what is given counts"
    )


def test_weights_are_written_back(tmp_path):
    content = networks.load(FILE, config=FLAGS).networks
    adm_checkpoint.save(content, tmp_path / "b.pt")
    written, before = torch.load(tmp_path / "b.pt", weights_only=True), state()
    assert list(written) == list(before)
    assert all(torch.equal(written[name], before[name].float()) for name in before)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_res_blocks": 2}, "the flag num_res_blocks is 2, and the tensors are of a network where it is 1"),
        ({"num_channels": 64}, "the flag num_channels is 64"),
        ({"channel_mult": "1,2"}, "the flag channel_mult is"),
        ({"class_cond": False}, "the flag class_cond is False, and the tensors are of a network where it is True"),
        ({"learn_sigma": False}, "the flag learn_sigma is False"),
        ({"use_scale_shift_norm": False}, "the flag use_scale_shift_norm is False"),
        ({"resblock_updown": False}, "the flag resblock_updown is False"),
        (
            {"attention_resolutions": [8]},
            r"attention_resolutions is \[8\], and .* image_size 8 have attention at \[8, 4\]",
        ),
        ({"image_size": 16}, "attention_resolutions is .* image_size 16 have attention at"),
        ({"image_size": 7}, "image_size is 7, which cannot be halved 1 times"),
        ({"num_head_channels": 5}, "num_head_channels is 5, which does not divide its 32 channels"),
        ({"num_head_channels": -1, "num_heads": 5}, "num_heads is 5, which does not divide its 32 channels"),
        ({"noise_schedule": "cosin"}, "noise_schedule is cosin; linear and cosine are known"),
        ({"diffusion_steps": 0}, "diffusion_steps is 0; 2 to 10000"),
        ({"diffusion_steps": 10, "noise_schedule": "linear"}, "diffusion_steps is 10, too few"),
        ({"num_head_chanels": 16}, "the flag num_head_chanels is not known; is it num_head_channels?"),
        ({"rescale_timesteps": "perhaps"}, "rescale_timesteps is perhaps, neither true nor false"),
        ({"dropout": -1}, "dropout is -1"),
    ],
)
def test_flags_that_contradict_the_tensors(changes, words):
    with pytest.raises(InputError, match=f"`teacher`: .*gd64-cond.pt: {words}"):
        load_denoiser(FILE, {**FLAGS, **changes})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"out.2.bias": None}, "missing: unet.out.2.bias"),
        ({"more": torch.zeros(1)}, "unexpected: unet.more"),
        (
            {"middle_block.1.norm.weight": torch.zeros(31)},
            r"wrong shape: unet.middle_block.1.norm.weight \[31\] for \[32\]",
        ),
        ({"out.0.bias": torch.full([32], float("nan"))}, "'unet.out.0.bias' contains non-finite values"),
        ({"out.2.weight": None}, "there is no tensor out.2.weight"),
        ({"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, "it is a super-resolution model"),
        ({"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)}, "its U-Net has 4 channels in and 6 out"),
    ],
)
def test_tensors_that_do_not_fit(changes, words, tmp_path):
    torch.save(state(**changes), tmp_path / "a.pt")
    with pytest.raises(InputError, match=words):
        load_denoiser(tmp_path / "a.pt", FLAGS)


def test_a_classifier_is_no_diffusion_model(tmp_path):
    tensors = {name: tensor for name, tensor in state().items() if not name.startswith("output_blocks")}
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(InputError, match="it is a classifier"):
        load_denoiser(tmp_path / "a.pt", FLAGS)


def test_defaults_that_differ_between_the_projects_have_to_be_given():
    with pytest.raises(InputError, match="rescale_timesteps is needed: guided-diffusion's default is false"):
        load_denoiser(ADM / "id-cosine4000.pt", {"image_size": 8, "noise_schedule": "cosine", "diffusion_steps": 4000})


@pytest.mark.parametrize("mode, said", [(None, "missing"), ("consistency_distillation", "consistency_distillation")])
def test_consistency_models_do_not_teach(mode, said):
    flags = {"image_size": 8, "num_head_channels": 16, **({} if mode is None else {"training_mode": mode})}
    with pytest.raises(InputError, match=f"training_mode is {said}: .* only those that were trained as diffusion"):
        load_denoiser(ADM / "cm-imagenet64.pt", flags)


def test_settings_files_that_are_none(tmp_path):
    for text, words in [("[1]", "holds no settings"), ("{", "no JSON that can be read")]:
        (tmp_path / "flags.json").write_text(text)
        with pytest.raises(InputError, match=f"`teacher_config`: .*flags.json: {words}"):
            load_denoiser(FILE, tmp_path / "flags.json")
    with pytest.raises(InputError, match="`teacher_config`: .*none.json: No such file"):
        load_denoiser(FILE, tmp_path / "none.json")
    with pytest.raises(InputError, match="`teacher_config` is for diffusers folders and .pt files"):
        load_denoiser(GOLDEN / "edm/vp.pkl", FLAGS)


def test_more_than_tensors_is_not_read(tmp_path):
    torch.save({"time_embed.0.weight": torch.zeros(1), "input_blocks.0.0.weight": FLAGS}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="holds no state dictionary: input_blocks.0.0.weight is no tensor"):
        load_denoiser(tmp_path / "a.pt", FLAGS)
    torch.save({"net": torch.nn.Linear(1, 1)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="b.pt holds more than tensors and plain values"):
        load_denoiser(tmp_path / "b.pt", FLAGS)


def test_published_files_need_no_flags(tmp_path):
    """Each record of the registry has flags that the tensors of the published file agree with."""
    meta = json.loads(str(np.load(ADM / "full_size_shapes.npz")["meta"][0]))["models"]
    records = {name: record for name, record in registry.registry().items() if "flags" in record}
    known = {"lsun_cat": "lsun_bedroom", "lsun_horse": "lsun_bedroom", "edm_cat256_ema": "edm_bedroom256_ema"}
    for record in records.values():
        name = record["url"].rpartition("/")[2].removesuffix(".pt")
        model = meta[known.get(name, name)]
        tensors = {key: torch.empty(shape, device="meta") for key, shape in model["state_dict"].items()}
        shapes = adm_checkpoint.architecture(tensors)
        flags = adm_checkpoint.read_flags({**model["flags"], **record["flags"]}, shapes)
        assert (record["resolution"], record["classes"]) == (model["flags"]["image_size"], shapes["classes"])
        assert flags["image_size"] == record["resolution"] and flags["num_heads"] in (1, 4)
    assert len(records) >= 14
    shutil.copy(ADM / "gd256-uncond.pt", tmp_path / "256x256_diffusion_uncond.pt")
    with pytest.raises(InputError, match="num_head_channels is 64, which does not divide its 32 channels"):
        load_denoiser(tmp_path / "256x256_diffusion_uncond.pt")
