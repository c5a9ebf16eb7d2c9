"""The compiled operators beyond the golden cases: random calls against float64, unwritten results, PyTorch's machinery.

The same tests run for the CPU library, in its own and in the CUDA kernels' shapes, and under `-m gpu` for the CUDA one.
"""

import random

import pytest
import torch
from golden_io import relative_error

from stylegan2_ada.networks import Discriminator, Generator
from torch_utils import custom_ops
from torch_utils.ops import bias_act, conv2d_resample, upfirdn2d

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SCHEMA_OPS = ("bias_act", "bias_act_grad", "bias_act_grad2", "upfirdn2d")


@pytest.fixture
def device(compiled_form):
    """Run every test in every compiled form; the value is the device of the tensors."""
    return compiled_form


def grads(op, x, b, dy):
    x, b = x.detach().requires_grad_(), b.detach().requires_grad_()
    y = op(x, b)
    dx, db = torch.autograd.grad(y, [x, b], dy.to(y.dtype), allow_unused=True)
    return [y, dx] + ([] if db is None else [db])


def compare(op, x, b, what):
    """Compare op(x, b) and its derivatives with the PyTorch form in float64, which gets the same rounded operands."""
    with torch.no_grad():
        shape = op(x, b).shape
    dy = torch.randn(shape, device=x.device).to(x.dtype)
    got = grads(op, x, b, dy)
    with custom_ops.use("native"):
        want = grads(op, x.double(), b.double(), dy.double())
    assert got[0].dtype == x.dtype
    for name, g, w in zip(("y", "dx", "db"), got, want):
        assert torch.isfinite(g).all(), f"{what}: {name} has elements that were not written"
        error = relative_error(g.cpu(), w.cpu())
        assert error <= TOLERANCES[x.dtype], f"{what}: {name} is off by {error:.1e}"


def random_layout(x, rng):
    kind = rng.choice(["plain", "channels_last", "permuted", "offset"])
    if kind == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if kind == "permuted":
        return x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    if kind == "offset":  # not aligned to 16 bytes
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


@pytest.mark.parametrize("seed", range(60))
def test_upfirdn2d_on_random_calls(device, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(list(TOLERANCES))
    special = rng.random() < 0.6  # the factors with a fast path
    up, down = rng.choice([(1, 1), (2, 1), (1, 2)]) if special else ([rng.randint(1, 4) for _ in "xy"] for _ in "ud")
    fw, fh = (rng.randint(1, 4 if special else 13) for _ in "xy")
    f = torch.randn([fw] if rng.random() < 0.3 else [fh, fw], device=device)
    padding = [rng.randint(-3, 16) for _ in range(4)]
    x = torch.randn(rng.randint(1, 3), rng.choice([1, 3, 8, 16]), rng.randint(20, 40), rng.randint(20, 40))
    x = random_layout(x.to(device, dtype), rng)
    args = {"up": up, "down": down, "padding": padding, "flip_filter": rng.random() < 0.5, "gain": rng.uniform(-2, 2)}
    compare(lambda x, b: upfirdn2d.upfirdn2d(x, f, **args), x, torch.zeros(1, device=device), f"{list(x.shape)} {args}")


@pytest.mark.parametrize("act", bias_act.activation_funcs)
@pytest.mark.parametrize("seed", range(6))
def test_bias_act_on_random_calls(device, act, seed):
    rng = random.Random(f"{act}{seed}")
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float64, torch.float32])
    if seed >= 3:
        dtype = rng.choice([torch.float16, torch.bfloat16])
    shape = rng.choice([[3, 8, 5, 7], [2, 16, 8, 8], [5, 32], [4, 9, 3], [2, 3, 33, 31], [7]])
    dim = rng.randrange(len(shape))
    x = torch.randn(shape).to(device, dtype) * 2
    x = random_layout(x, rng) if x.ndim == 4 else x
    b = torch.randn(shape[dim]).to(device, dtype)
    clamp = rng.choice([None, 0.8]) if seed < 3 else None  # in half precision rounding decides what is clamped
    args = {"dim": dim, "act": act, "gain": rng.choice([None, 0.7, -1.4]), "clamp": clamp}
    compare(lambda x, b: bias_act.bias_act(x, b, **args), x, b, f"{shape} {args}")


def test_empty_batches(device):
    f = upfirdn2d.setup_filter([1, 3, 3, 1], device=device)
    x = torch.zeros(0, 3, 8, 8, device=device, requires_grad=True)
    y = bias_act.bias_act(upfirdn2d.upsample2d(x, f), torch.zeros(3, device=device), act="lrelu")
    assert y.shape == (0, 3, 16, 16)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_what_the_compiled_form_cannot_do_is_said(device):
    x, f = torch.zeros(1, 2, 8, 8, device=device), torch.ones(4, device=device, requires_grad=True)
    with pytest.raises(ValueError, match="does not take a filter that requires a gradient; use impl='ref'"):
        upfirdn2d.upfirdn2d(x, f)
    with pytest.raises(ValueError, match="does not take a negative alpha"):
        bias_act.bias_act(x, act="lrelu", alpha=-0.1)
    with custom_ops.use("auto"):
        assert upfirdn2d.upfirdn2d(x, f).requires_grad
        assert bias_act.bias_act(x, act="lrelu", alpha=-0.1).shape == x.shape


@pytest.mark.parametrize("act", ["tanh", "sigmoid", "softplus", "swish", "selu"])
def test_third_derivative(device, act):
    x = torch.randn(2, 3, 4, device=device, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, device=device, dtype=torch.float64, requires_grad=True)

    def third(impl):
        value = bias_act.bias_act(x, b, act=act, gain=1.3, impl=impl).sin().sum()
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(first.cos().sum(), x, create_graph=True)
        return torch.autograd.grad(second.sin().sum(), [x, b])

    for got, want in zip(third("auto"), third("ref")):
        assert relative_error(got.cpu(), want.cpu()) < 1e-10


def sample_calls(device):
    """Return operands of every registered operator, as opcheck takes them."""
    x, b = (torch.randn(s, device=device, requires_grad=True) for s in ([2, 4, 6, 6], [4]))
    v, ref = (torch.randn(2, 4, 6, 6, device=device, requires_grad=True) for _ in range(2))
    f = upfirdn2d.setup_filter([1, 3, 3, 1], device=device)
    lrelu, swish = (1, 2, 0.2, 1.4, 0.9), (1, 8, 0.0, 1.4, -1.0)
    channels_last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    return {
        "bias_act": [(x, b, *lrelu), (x, None, *lrelu), (channels_last, b, *swish)],
        "bias_act_grad": [(v, ref, None, *lrelu), (v, x, b, *swish)],
        "bias_act_grad2": [(v.detach(), v.detach(), x.detach(), b.detach(), *swish)],
        "upfirdn2d": [
            (x, f, [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0),
            (channels_last, f, [1, 1], [2, 2], [1, 1, 1, 1], True, 1.0),
            (x, None, [1, 2], [3, 1], [0, 0, -1, 2], False, 1.0),
        ],
    }


@pytest.mark.parametrize("op", SCHEMA_OPS)
def test_opcheck(device, op):
    for args in sample_calls(device)[op]:
        torch.library.opcheck(getattr(torch.ops.di_refine, op).default, args)


def layer(x, w, b, f):
    x = conv2d_resample.conv2d_resample(x, w, f, up=2, padding=1)
    x = bias_act.bias_act(x, b, act="lrelu", clamp=1.0)
    return conv2d_resample.conv2d_resample(x, w, f, down=2, padding=1)


def layer_operands(device):
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, device=device, requires_grad=True) for s in ([2, 4, 8, 8], [4, 4, 3, 3], [4]))
    return x, w, b, upfirdn2d.setup_filter([1, 3, 3, 1], device=device)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(device, dynamic):
    operands = layer_operands(device)
    backend = "inductor" if device == "cuda" else "aot_eager"  # inductor's C++ takes long to build on a CPU
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    got = torch.autograd.grad(compiled(*operands).square().sum(), operands[:3])
    want = torch.autograd.grad(layer(*operands).square().sum(), operands[:3])
    for g, w in zip(got, want):
        assert relative_error(g.cpu(), w.cpu()) < 1e-5


def test_autocast(device):
    x, w, b, f = layer_operands(device)
    with torch.autocast(device, torch.bfloat16):
        y = layer(x, w, b, f)  # the convolution returns bfloat16, the bias is float32
        assert upfirdn2d.upsample2d(x, f).dtype == torch.float32
        assert upfirdn2d.upsample2d(x, f, impl="ref").dtype == torch.float32
    assert relative_error(y.float().cpu(), layer(x, w, b, f).cpu()) < 3e-2
    y.float().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_distributed_data_parallel(device, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:

        class Layer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.randn(4, 4, 3, 3))
                self.bias = torch.nn.Parameter(torch.zeros(4))

            def forward(self, x, f):
                return layer(x, self.weight, self.bias, f)

        x, _, _, f = layer_operands(device)
        module = Layer().to(device)
        torch.nn.parallel.DistributedDataParallel(module)(x, f).square().sum().backward()
        got = module.bias.grad.clone()
        module.bias.grad = None
        module(x, f).square().sum().backward()
        assert relative_error(got.cpu(), module.bias.grad.cpu()) < 1e-6
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_cuda_graph_capture():
    with custom_ops.use("cuda"), torch.no_grad():
        x, w, b, f = layer_operands("cuda")
        layer(x, w, b, f)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x, w, b, f)
        x.normal_()
        graph.replay()
        assert relative_error(y.cpu(), layer(x, w, b, f).cpu()) < 1e-6


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    with custom_ops.use("cuda"), torch.no_grad():
        x = torch.zeros(2, 1, 2**15, 2**15 + 64, device="cuda", dtype=torch.float16)
        x[-1, :, -8:, -8:] = 1
        f = upfirdn2d.setup_filter([1, 3, 3, 1], device="cuda")
        assert bias_act.bias_act(x, act="relu", gain=2)[-1, :, -8:, -8:].eq(2).all()
        assert upfirdn2d.filter2d(x, f)[-1, 0, -4:-2, -4:-2].eq(1).all()


def test_networks_agree_end_to_end(device):
    torch.manual_seed(0)
    size = {"img_resolution": 32, "img_channels": 3, "c_dim": 0}
    small = {"channel_base": 512, "channel_max": 32, "num_fp16_res": 2, "conv_clamp": 256}
    G = Generator(z_dim=32, w_dim=32, **size, synthesis_kwargs={**small, "architecture": "skip"}).to(device)
    D = Discriminator(**size, **small).to(device)
    z = torch.randn(4, 32, device=device)
    half = device == "cuda"

    def run(mode):
        with custom_ops.use(mode):
            images = G(z, None, noise_mode="const")
            logits = D(images, None)
            (dz,) = torch.autograd.grad(torch.nn.functional.softplus(-logits).sum(), images, create_graph=True)
            gradients = torch.autograd.grad(dz.square().sum(), list(D.parameters()), allow_unused=True)
        return [images, logits, dz, *(g for g in gradients if g is not None)]

    for got, want in zip(run("compiled"), run("native")):
        assert relative_error(got.float().cpu(), want.float().cpu()) < (3e-2 if half else 1e-4)
