"""EDM networks against the outputs, gradients, names and shapes of the public implementation."""

import inspect
import types
from functools import cache

import pytest
import torch
from golden_io import GOLDEN, assert_close, cases, load_npz

from di_refine.edm import networks
from torch_utils import persistence

NAMES = ["ddpmpp_cond", "ddpmpp_uncond", "ncsnpp", "adm_cond", "vp", "ve", "iddpm", "fp16_cond"]
D, F, GRADIENT, NORM, BLOCK, EMBEDDING = 5e-6, 2e-5, 2e-5, 1e-5, 5e-6, 1e-4
BLOCKS = {name: case for name, case in cases("edm/blocks.npz")[0]["cases"].items() if "cls" in case}
FULL_SIZE = cases("edm/full_size_state_dicts.npz")[0]
TINY = {
    "img_resolution": 16,
    "img_channels": 1,
    "label_dim": 4,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "augment_dim": 9,
}


@cache
def load(name):
    return persistence.load(GOLDEN / "edm" / f"{name}.pkl")["ema"]


def network(name):
    """Made by the constructor, so that no attribute comes from the file."""
    meta = cases(f"edm/{name}.npz")[0]
    net = getattr(networks, meta["precond"])(**meta["init_kwargs"])
    net.load_state_dict(load(name).state_dict())
    return net.eval()


def arrays(name):
    return {k: torch.from_numpy(v.copy()) for k, v in load_npz(f"edm/{name}.npz").items() if k != "meta"}


def assert_each_close(actual, expected, tol, what):
    for i, pair in enumerate(zip(actual, expected)):
        assert_close(*pair, tol, f"{what} of sample {i}")


def randomised(net):
    """Without the zero and near-zero initial weights that silence branches."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.eval()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name, memory_format):
    a, meta = arrays(name), cases(f"edm/{name}.npz")[0]
    net = network(name).to(memory_format=memory_format)
    assert [n for n, _ in net.named_parameters()] == meta["parameter_names"]
    inside = {}
    net.model.register_forward_hook(lambda module, args, output: inside.update(F=output, c_noise=args[1]))
    modules = dict(net.model.named_modules())
    for block in meta["block_order"]:
        modules[block].register_forward_hook(lambda module, args, output, block=block: inside.update({block: output}))

    for suffix in ["", "_aug", "_nolabel"]:
        if f"D{suffix}" not in a:
            continue
        x = a["x"].clone().requires_grad_()
        labels = None if suffix == "_nolabel" else a.get("labels")
        extra = {"augment_labels": a["augment_labels"]} if suffix == "_aug" else {}
        out = net(x, a["sigma"], labels, **extra)
        assert out.dtype == torch.float32
        assert_each_close(out, a[f"D{suffix}"], D, f"D{suffix}")
        if f"F{suffix}" in a:
            assert_each_close(inside["F"], a[f"F{suffix}"], F, "F")
            assert_close(inside["c_noise"], a["c_noise"], 1e-6, "c_noise")
            assert_close(inside["map_layer1"], a["mapping_out"], F, "mapping")
            outputs = [inside[block].detach().double() for block in meta["block_order"]]
            assert_close(torch.stack([y.mean() for y in outputs]), a["block_mean"], F, "block means")
            assert_close(torch.stack([y.abs().mean() for y in outputs]), a["block_meanabs"], F, "block magnitudes")
        if f"gx{suffix}" in a or f"gparam_norm{suffix}" in a:
            net.zero_grad()
            (out * a["dy"]).sum().backward()
            if f"gx{suffix}" in a:
                assert_each_close(x.grad, a[f"gx{suffix}"], GRADIENT, f"gx{suffix}")
            if f"gparam_norm{suffix}" in a:
                norms = [torch.zeros([]) if p.grad is None else p.grad.norm() for p in net.parameters()]
                assert_close(torch.stack(norms), a[f"gparam_norm{suffix}"], NORM, "parameter gradients")


@pytest.mark.parametrize("name", NAMES)
def test_noise_levels_and_attributes(name):
    a, meta = arrays(name), cases(f"edm/{name}.npz")[0]
    with torch.device("meta"):
        net = getattr(networks, meta["precond"])(**meta["init_kwargs"])
    for key, value in meta["attributes"].items():
        expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value  # sines differ by processor
        assert getattr(net, key) == expected, key
    net = load(name)
    for dtype, key in [(torch.float32, "round_sigma_out32"), (torch.float64, "round_sigma_out64")]:
        rounded = net.round_sigma(a["round_sigma_in"].to(dtype))
        assert rounded.dtype == dtype
        assert torch.equal(rounded, a[key])
    if name == "iddpm":
        assert torch.equal(net.round_sigma(a["round_sigma_in"], return_index=True), a["round_sigma_index"])
        assert_each_close(networks.iDDPMPrecond(**meta["init_kwargs"]).u, a["u"], 1e-6, "noise levels")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_names_and_shapes(name):
    expected = FULL_SIZE[name]
    with torch.device("meta"):
        net = networks.EDMPrecond(**expected["init_kwargs"])
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == expected["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == expected["n_params"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", BLOCKS)
def test_block(name, memory_format):
    a = arrays("blocks")
    block = getattr(networks, BLOCKS[name]["cls"])(**BLOCKS[name]["kwargs"])
    prefix = f"{name}/w/"
    block.load_state_dict({k.removeprefix(prefix): v for k, v in a.items() if k.startswith(prefix)})
    for key, value in (BLOCKS[name].get("attributes") or {}).items():
        assert getattr(block, key) == value, key
    block = block.eval().to(memory_format=memory_format)
    x = a[f"{name}/x"].requires_grad_()
    if x.ndim == 4:
        x = x.contiguous(memory_format=memory_format)
    y = block(x, a[f"{name}/emb"]) if f"{name}/emb" in a else block(x)
    assert_close(y, a[f"{name}/y"], EMBEDDING if name.startswith(("posemb", "fourier")) else BLOCK)
    if f"{name}/gx" in a:
        (gx,) = torch.autograd.grad((y * a[f"{name}/dy"]).sum(), x)
        assert_close(gx, a[f"{name}/gx"], GRADIENT)


def test_half_precision():
    a, net = arrays("fp16_cond"), load("fp16_cond")
    args = a["x"], a["sigma"], a["labels"]
    extra = {"augment_labels": a["augment_labels"]}
    with torch.no_grad():
        with torch.autocast("cpu", torch.float16):
            half = net(*args, **extra)
            full = net(*args, force_fp32=True, **extra)
        assert half.dtype == full.dtype == torch.float32
        # The reference's own half-precision run is 1.8e-3 (rms 2.7e-4) from its float32 run.
        error = half - a["D_aug"]
        assert 1e-5 < error.abs().max() < 3e-3
        assert error.square().mean().sqrt() < 4e-4
        assert_each_close(full, a["D_aug"], D, "force_fp32")
        assert torch.equal(net(*args, **extra), full)  # use_fp16 alone changes nothing on the CPU
        with torch.autocast("cpu", torch.bfloat16):
            assert 1e-4 < (net(*args, **extra) - a["D_aug"]).abs().max() < 5e-2


@pytest.mark.gpu
def test_half_precision_on_cuda():
    a, net = arrays("fp16_cond"), network("fp16_cond").cuda()
    dtypes = []
    net.model.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    args = a["x"].cuda(), a["sigma"].cuda(), a["labels"].cuda()
    out = net(*args, augment_labels=a["augment_labels"].cuda())
    assert (out.cpu() - a["D_aug_fp16_emulated"]).abs().max() < 4e-3
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.grad is not None)
    net(*args, force_fp32=True)
    assert dtypes == [torch.float16, torch.float32]


def test_sigma_forms_agree():
    net = randomised(networks.EDMPrecond(**TINY))
    x, labels = torch.randn(3, 1, 16, 16), torch.eye(4)[:3]
    expected = net(x, torch.full([3], 0.7), labels)
    for sigma in (0.7, torch.tensor(0.7), torch.full([3, 1, 1, 1], 0.7, dtype=torch.float64)):
        assert_close(net(x, sigma, labels), expected.detach(), 1e-6)
    assert_close(net(x, 0.7), net(x, 0.7, torch.zeros(3, 4)).detach(), 1e-6)
    assert_close(net(x, 0.7, augment_labels=torch.zeros(3, 9)), net(x, 0.7).detach(), 1e-6)


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_dropout_only_in_training(model_type):
    kwargs = {**TINY, "model_type": model_type, "dropout": 0.5}
    net = randomised(networks.EDMPrecond(**kwargs))
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(net(x, 1.0), net(x, 1.0))
    net.train()
    assert not torch.equal(net(x, 1.0), net(x, 1.0))
    torch.manual_seed(1)
    first = net(x, 1.0)
    torch.manual_seed(1)
    assert torch.equal(first, net(x, 1.0))


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_label_dropout_zeroes_rows(model_type):
    net = randomised(networks.EDMPrecond(**{**TINY, "model_type": model_type, "dropout": 0, "label_dropout": 0.5}))
    x, labels = torch.randn(1, 1, 16, 16).expand(32, -1, -1, -1), torch.eye(4)[[1] * 32]
    with torch.no_grad():
        with_label, without = net(x, 1.0, labels)[0], net(x, 1.0)[0]
        net.train()
        out = net(x, 1.0, labels)
    kept = (out - with_label).abs().amax(dim=(1, 2, 3)) < 1e-4
    dropped = (out - without).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert bool((kept ^ dropped).all())
    assert 4 < int(kept.sum()) < 28


def test_initial_values():
    torch.manual_seed(0)
    song = networks.SongUNet(16, 3, 3, label_dim=10, model_channels=64, channel_mult=[1], num_blocks=1).state_dict()
    width = (6 / (64 * 9 * 2)) ** 0.5
    assert song["enc.16x16_block0.conv0.weight"].abs().max().item() == pytest.approx(width, rel=1e-3)
    assert song["enc.16x16_block0.conv1.weight"].abs().max().item() == pytest.approx(width * 1e-5, rel=1e-3)
    assert song["enc.16x16_block0.qkv.weight"].abs().max().item() == pytest.approx((0.2 * 6 / 256) ** 0.5, rel=1e-3)
    assert not song["enc.16x16_block0.conv0.bias"].any()
    adm = networks.DhariwalUNet(
        16, 3, 3, label_dim=10, augment_dim=9, model_channels=64, channel_mult=[1], num_blocks=1
    )
    adm = adm.state_dict()
    width = (1 / (64 * 9)) ** 0.5
    assert adm["enc.16x16_block0.conv0.weight"].abs().max().item() == pytest.approx(width, rel=1e-3)
    assert adm["enc.16x16_block0.conv0.bias"].abs().max().item() == pytest.approx(width, rel=0.2)
    assert adm["map_label.weight"].std().item() == pytest.approx(1, rel=0.1)
    for key in ("enc.16x16_block0.conv1.weight", "enc.16x16_block0.proj.bias", "out_conv.weight", "map_augment.weight"):
        assert not adm[key].any(), key
    fourier = networks.FourierEmbedding(4096).freqs
    assert fourier.std().item() == pytest.approx(16, rel=0.1)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "UNet"}, "model_type"),
        ({"model_channels": 132, "channel_mult": [1]}, "132"),
        ({"embedding_type": "cosine"}, "embedding_type"),
        ({"encoder_type": "skip"}, "encoder_type"),
        ({"decoder_type": "skip"}, "decoder_type"),
        ({"channel_mult": [1] * 6}, "img_resolution"),
    ],
)
def test_refusals(change, word):
    with pytest.raises(ValueError, match=word):
        networks.EDMPrecond(**{**TINY, **change})


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older compilers break the graph where autocast is asked for")
def test_compiles_without_graph_breaks():
    net = randomised(networks.EDMPrecond(**TINY))
    x, labels = torch.randn(2, 1, 16, 16), torch.eye(4)[:2]
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    sigma = torch.rand(2) + 0.1
    assert_close(compiled(x, sigma, labels), net(x, sigma, labels).detach(), 1e-6)


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_plain_forms_of_what_old_torch_lacks(model_type, monkeypatch):
    arguments = {**TINY, "model_type": model_type, **({"model_channels": 64} if model_type == "DhariwalUNet" else {})}
    net = randomised(networks.EDMPrecond(**arguments))
    x, sigma, labels = torch.randn(2, 1, 16, 16), torch.tensor([0.3, 4.0]), torch.eye(4)[:2]
    expected = net(x, sigma, labels).detach()
    monkeypatch.delattr(torch.nn.functional, "scaled_dot_product_attention")
    monkeypatch.setattr(networks, "_KNOWS_AUTOCAST", False)
    assert_close(net(x, sigma, labels).detach(), expected, 1e-6)


def test_source_stands_alone(monkeypatch):
    """The module's text goes into pickles: it has to run anywhere, under a decorator that subclasses, as others' do."""
    source = inspect.getsource(networks)
    imports = [line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert set(imports) == {"__future__", "contextlib", "math", "collections", "numpy", "torch", "torch_utils"}

    def subclassing(cls):
        return type(cls.__name__, (cls,), {"__module__": cls.__module__})

    monkeypatch.setattr(persistence, "persistent_class", subclassing)
    module = types.ModuleType("elsewhere")
    exec(source, module.__dict__)
    net = randomised(networks.EDMPrecond(**TINY))
    x, labels = torch.randn(2, 1, 16, 16), torch.eye(4)[:2]
    expected = net(x, 1.0, labels).detach()

    def rebuild(mine):
        """As a snapshot is opened: the state without the constructor."""
        theirs = getattr(module, type(mine).__name__, type(mine))
        theirs = theirs.__new__(theirs)
        theirs.__dict__.update(mine.__dict__)
        theirs._modules = {name: child and rebuild(child) for name, child in mine._modules.items()}
        return theirs

    other = rebuild(net)
    assert type(other.model) is module.SongUNet
    assert torch.equal(other(x, 1.0, labels), expected)


def test_a_table_of_noise_levels_has_bounds(tmp_path):
    net = networks.iDDPMPrecond(8, 1, M=10, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    record = persistence.to_records({"ema": net}, "x")["ema"]
    record.state["_init_kwargs"] = {**record.init_kwargs, "M": 10_001}
    persistence.save({"ema": record}, tmp_path / "a.pkl")
    with pytest.raises(persistence.NetworkFormatError, match="M is 10001, and there are at most 10000 noise levels"):
        persistence.load(tmp_path / "a.pkl")
