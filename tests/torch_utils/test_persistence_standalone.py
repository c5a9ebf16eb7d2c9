"""What is embedded in our pickles runs as a stand-alone module beside the official packages.

A subprocess that cannot see this project, only stand-ins for the official `torch_utils` and `dnnlib`, opens our pickles
with Python's own `pickle.load`, which executes the embedded text, and computes images. `make compat` has the oldest
Python and torch that the text is for do the same.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_io import GOLDEN, relative_error

import di_refine.ddpm.networks
import di_refine.edm.networks
import di_refine.edm2.networks
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
        image = getattr(net, "img_channels", 3), getattr(net, "img_resolution", 32), getattr(net, "img_resolution", 32)
        x = torch.randn([2, *((net.z_dim,) if hasattr(net, "z_dim") else image)], generator=generator)
        with torch.no_grad():
            if hasattr(net, "z_dim"):
                outputs[key] = net(x, labels, noise_mode="const", truncation_psi=0.7)
            elif hasattr(net, "Hz_geom"):  # the augmentation pipe, once acting and once drawing that it shall not act
                net.p.zero_()
                outputs[key] = torch.stack([net(x, debug_percentile=None if net.noise else 0.3), net(x)])
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
    networks = {key: net for key, net in content.items() if isinstance(net, torch.nn.Module)}
    kwargs = {key: dict(net.init_kwargs) for key, net in networks.items()}
    results[source] = {"outputs": compute(networks), "kwargs": kwargs}
torch.save(results, sys.argv[1])
"""


def run(sources, packages, folder, python=sys.executable):
    """Open pickles in a process that has nothing but `packages`; per pickle, its networks' outputs and arguments."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    command = [python, "-c", COMPUTE + MAIN, str(folder / "results.pt"), *map(str, sources)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = torch.load(folder / "results.pt", weights_only=True)
    return [results[str(source)] for source in sources]


def compute_here(source):
    namespace = {}
    exec(COMPUTE, namespace)
    content = persistence.load(source)
    return namespace["compute"]({key: net for key, net in content.items() if isinstance(net, torch.nn.Module)})


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


def edm2():
    unet = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
    net = di_refine.edm2.networks.Precond(16, 3, 3, **unet, channels_per_head=8, resample_filter=[1, 3, 3, 1])
    for name, parameter in net.named_parameters():
        if name.endswith("gain"):
            torch.nn.init.constant_(parameter, 0.5)
    return {"ema": net}


def adm():
    """A diffusion model whose layers are torch's own, so that the pickle holds their tensors alone."""
    unet = {"model_channels": 8, "widths": [32, 32], "num_blocks": 1, "attention": [False, True]}
    steps = {"parameterisation": "vp", "prediction": "epsilon", "steps": 10, "time_scale": 1.0}
    net = di_refine.ddpm.networks.ADMPrecond(16, 3, 3, 0.01, 50.0, **steps, out_channels=6, **unet)
    net.log_sigmas.copy_(torch.linspace(-4, 4, 10))
    return {"ema": net}


NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
SHIPPED = ("stylegan2-digits.pkl", "edm-digits-16x16-cond.pkl", "edm-emoji-16x16-cond.pkl")
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
    "EDM2": edm2,
    "ADM": adm,
}
NEWER = {"ADM"}  # which need PyTorch 2


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
    assert list(there["outputs"]) == list(here)
    limit = 0 if "ema" in here else 1e-5  # the stand-ins for the operators, which EDM does not use, round otherwise
    for key, output in there["outputs"].items():
        assert output.abs().max() > 0
        assert relative_error(output, here[key]) <= limit, key


@pytest.mark.compat
@pytest.mark.parametrize("name", [*(name for name in MAKE if name not in NEWER), *SHIPPED])
def test_and_under_the_oldest_python_and_torch(name, made, tmp_path):
    """The interpreter is given by COMPAT_PYTHON; how far its results are from ours is printed with `pytest -rA`."""
    source = made[0].get(name) or Path(__file__).parents[2] / "pretrained" / name
    (there,) = run([source], STUB, tmp_path, os.environ["COMPAT_PYTHON"])
    here = compute_here(source)
    assert list(there["outputs"]) == list(here)
    errors = {key: relative_error(output, here[key]) for key, output in there["outputs"].items()}
    print(f"{name}: {errors}")
    assert max(errors.values()) <= 1e-5


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


MODULES = (
    stylegan2_ada.networks,
    stylegan2_ada.augment,
    di_refine.edm.networks,
    di_refine.edm2.networks,
    di_refine.ddpm.networks,
)


@pytest.mark.parametrize("module", MODULES)
def test_embedded_modules_are_written_in_python_3_8(module):
    """What annotations say is no matter as long as nobody evaluates them."""
    tree = ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))
    futures = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert [alias.name for node in futures for alias in node.names] == ["annotations"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_networks_have_the_present_texts(name):
    """`python -m di_refine convert --refresh-source` makes it so."""
    content = persistence.load_records(Path(__file__).parents[2] / "pretrained" / name)
    found = {record.module_src for record in content.values() if isinstance(record, persistence.Record)}
    assert found <= {Path(module.__file__).read_text() for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
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
