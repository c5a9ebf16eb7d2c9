"""What is embedded in our pickles runs as a stand-alone module beside the official packages.

A subprocess that cannot see this project, only stand-ins for the official `torch_utils` and `dnnlib`, opens our pickles
with Python's own `pickle.load`, which executes the embedded text, and computes images.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_io import GOLDEN, relative_error

import di_refine.edm.networks
import stylegan2_ada.augment
import stylegan2_ada.networks
from torch_utils import persistence

STUB = Path(__file__).parent / "official_stub"
COMPUTE = """
import torch

def compute(networks):
    generator = torch.Generator().manual_seed(0)
    outputs = {}
    for key, net in networks.items():
        label_dim = getattr(net, "c_dim", 0) or getattr(net, "label_dim", 0)
        labels = torch.eye(max(label_dim, 1))[:1].repeat(2, 1)
        image = net.img_channels, net.img_resolution, net.img_resolution
        x = torch.randn([2, *((net.z_dim,) if hasattr(net, "z_dim") else image)], generator=generator)
        with torch.no_grad():
            if hasattr(net, "z_dim"):
                outputs[key] = net(x, labels, noise_mode="const", truncation_psi=0.7)
            elif hasattr(net, "round_sigma"):
                outputs[key] = net(x, torch.tensor([0.5, 3.0]), labels if label_dim else None)
            else:
                outputs[key] = net(x, labels)
    return outputs
"""
MAIN = """
import pickle, sys
torch.set_num_threads(1)
results = {}
for source in sys.argv[2:]:
    with open(source, "rb") as file:
        content = pickle.load(file)
    assert not {"stylegan2_ada", "di_refine"} & set(sys.modules)
    kwargs = {key: dict(net.init_kwargs) for key, net in content.items()}
    outputs = compute({key: net for key, net in content.items() if hasattr(net, "img_channels")})
    results[source] = {"outputs": outputs, "kwargs": kwargs}
torch.save(results, sys.argv[1])
"""


def run(sources, packages, folder):
    """Open pickles in a process that has nothing but `packages`; per pickle, its networks' outputs and arguments."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMPUTE + MAIN, str(folder / "results.pt"), *map(str, sources)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "results.pt", weights_only=True)
    return [results[str(source)] for source in sources]


def compute_here(source):
    namespace = {}
    exec(COMPUTE, namespace)
    content = persistence.load(source)
    return namespace["compute"]({key: net for key, net in content.items() if hasattr(net, "img_channels")})


def stylegan2(architectures, **kwargs):
    generator, discriminator = architectures
    return {
        "G_ema": stylegan2_ada.networks.Generator(
            16, 3, 16, 32, 3, {"num_layers": 2}, {"channel_base": 256, "channel_max": 16, "architecture": generator}
        ),
        "D": stylegan2_ada.networks.Discriminator(
            3, 32, 3, architecture=discriminator, channel_base=256, channel_max=16, **kwargs
        ),
    }


def edm(cls, **kwargs):
    model = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "label_dim": 3}
    if kwargs.get("model_type") == "DhariwalUNet":
        model["model_channels"] = 64
    return {"ema": getattr(di_refine.edm.networks, cls)(img_resolution=16, img_channels=3, **{**model, **kwargs})}


NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
MAKE = {
    "skip and resnet": lambda: stylegan2(("skip", "resnet")),
    "resnet and skip": lambda: stylegan2(("resnet", "skip"), block_kwargs={"freeze_layers": 2}),
    "orig and orig": lambda: stylegan2(("orig", "orig"), conv_clamp=256, epilogue_kwargs={"mbstd_group_size": 2}),
    "augment": lambda: {"augment_pipe": stylegan2_ada.augment.AugmentPipe(xflip=1, scale=1, brightness=1)},
    "EDM DDPM++": lambda: edm("EDMPrecond", model_type="SongUNet", augment_dim=9),
    "EDM ADM": lambda: edm("EDMPrecond", model_type="DhariwalUNet"),
    "VP": lambda: edm("VPPrecond"),
    "VE NCSN++": lambda: edm("VEPrecond", **NCSNPP),
    "iDDPM": lambda: edm("iDDPMPrecond", model_type="SongUNet"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Write pickles of ours, and return what a process with only the stand-ins makes of them."""
    folder = tmp_path_factory.mktemp("standalone")
    torch.manual_seed(1)
    sources, kwargs = {}, {}
    for index, (name, make) in enumerate(MAKE.items()):
        networks = make()
        for parameter in (parameter for network in networks.values() for parameter in network.parameters()):
            if not parameter.abs().max() > 1e-3:  # or much of the network would not matter
                parameter.data.normal_(std=0.3)
        sources[name] = folder / f"{index}.pkl"
        kwargs[name] = {key: dict(network.init_kwargs) for key, network in networks.items()}
        persistence.save(networks, sources[name])
    return sources, kwargs, dict(zip(sources, run(sources.values(), STUB, folder)))


@pytest.mark.parametrize("name", MAKE)
def test_our_pickles_open_and_compute_beside_the_official_packages(name, made):
    sources, kwargs, results = made
    there, here = results[name], compute_here(sources[name])
    assert there["kwargs"] == kwargs[name]
    assert list(there["outputs"]) == list(here) and (here or name == "augment")
    limit = (
        1e-5 if "G_ema" in here else 0
    )  # the stand-ins for the operators, which only StyleGAN2 uses, round otherwise
    for key, output in there["outputs"].items():
        assert output.abs().max() > 0
        assert relative_error(output, here[key]) <= limit, key


def test_and_equally_beside_ours(made, tmp_path):
    """In a process with our `torch_utils`, but without the modules that the texts were taken from."""
    repository, packages = Path(persistence.__file__).parents[2], tmp_path / "packages"
    packages.mkdir()
    (packages / "torch_utils").symlink_to(repository / "torch_utils")
    (packages / "dnnlib").symlink_to(STUB / "dnnlib")
    # Ours refuses to rebuild from text; have the stand-in do it.
    text = (STUB / "torch_utils" / "persistence.py").read_text().replace("def persistent_class", "def unused")
    (packages / "rebuild.py").write_text(text)
    (packages / "sitecustomize.py").write_text(
        "import rebuild, torch_utils.persistence as ours\n"
        "ours._reconstruct_persistent_obj = rebuild._reconstruct_persistent_obj\n"
    )
    names = ["skip and resnet", "EDM DDPM++"]
    sources = [made[0][name] for name in names]
    for source, result in zip(sources, run(sources, packages, tmp_path)):
        here = compute_here(source)
        assert all(torch.equal(result["outputs"][key], here[key]) for key in here)


@pytest.mark.parametrize("module", [stylegan2_ada.networks, stylegan2_ada.augment, di_refine.edm.networks])
def test_embedded_modules_import_nothing_of_ours(module):
    lines = [line.split("#")[0].strip() for line in Path(module.__file__).read_text().splitlines()]
    imports = {line for line in lines if line.startswith(("import ", "from "))}
    foreign = [line for line in imports if line.split()[1].split(".")[0] in ("di_refine", "stylegan2_ada")]
    assert not foreign and all(" ." not in line for line in imports)
    allowed = (
        "from torch_utils import misc, persistence",
        "from torch_utils import persistence",
        "from torch_utils.ops",
    )
    assert all(line.startswith(allowed) for line in imports if "torch_utils" in line)


def test_official_networks_keep_their_own_text(tmp_path, name="stylegan2/sg2ada-resnet16.pkl"):
    """The golden files carry a text that raises when it runs, which shows that it is theirs that is written back."""
    persistence.save(persistence.load(GOLDEN / name), tmp_path / "again.pkl")
    with pytest.raises(AssertionError, match="embedded source must never be executed"):
        run([tmp_path / "again.pkl"], STUB, tmp_path)
