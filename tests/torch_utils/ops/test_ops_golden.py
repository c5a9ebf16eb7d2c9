"""Operators against the golden values of the public implementation; derivatives against finite differences. In every
form: see the fixture `form`.
"""

import pytest
import torch
from golden_io import assert_close, case_arrays, cases

from stylegan2_ada.networks import modulated_conv2d
from torch_utils.ops import bias_act, conv2d_resample, fma, upfirdn2d

UPFIRDN, BIAS_ACT = "ops/upfirdn2d.npz", "ops/bias_act.npz"
CONV, MODULATED = "ops/conv2d_resample.npz", "ops/modulated_conv2d.npz"


def arrays(file, case, device):
    return {name: array.to(device) for name, array in case_arrays(file, case).items()}


def by_name(file, *ops):
    return [
        pytest.param(c, id=c["case"]) for c in cases(file) if c["case"] != "defaults" and (not ops or c["op"] in ops)
    ]


@pytest.mark.parametrize("case", by_name(UPFIRDN, "upfirdn2d", "filter2d", "upsample2d", "downsample2d"))
def test_upfirdn2d_family(case, form):
    a = case_arrays(UPFIRDN, case)
    keys = ("up", "down", "padding", "flip_filter", "gain")
    args = {k: case[k] for k in keys} if case["op"] == "upfirdn2d" else case["args"]
    x, dy = a["x"].requires_grad_(), a["dy"].requires_grad_()
    y = getattr(upfirdn2d, case["op"])(x, a.get("f"), **args)
    assert_close(y, a["y"], 2e-6, "y")
    (dx,) = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
    assert_close(dx, a["dx"], 2e-6, "dx")
    if "v" in a:
        (ddy,) = torch.autograd.grad((dx * a["v"]).sum(), dy)
        assert_close(ddy, a["ddy"], 2e-6, "ddy")


@pytest.mark.parametrize("case", by_name(UPFIRDN, "setup_filter"))
def test_setup_filter(case):
    f = upfirdn2d.setup_filter(**case["args"])
    assert f.dtype == torch.float32
    assert_close(f, case_arrays(UPFIRDN, case)["y"], 2e-6)


def test_bias_act_defaults():
    case = cases(BIAS_ACT)[0]
    a = case_arrays(BIAS_ACT, case)
    for name, alpha, gain in zip(case["activations"], a["def_alpha"].tolist(), a["def_gain"].tolist()):
        spec = bias_act.activation_funcs[name]
        assert (spec.def_alpha, spec.def_gain) == pytest.approx((alpha, gain), rel=1e-7)


@pytest.mark.parametrize("case", by_name(BIAS_ACT))
def test_bias_act(case, form):
    a = arrays(BIAS_ACT, case, form)
    x, dy = a["x"].requires_grad_(), a["dy"].requires_grad_()
    b = a["b"].requires_grad_() if case["bias"] else None
    y = bias_act.bias_act(x, b, **{k: case[k] for k in ("dim", "act", "alpha", "gain", "clamp")})
    assert_close(y, a["y"], 5e-6, "y")
    (dx,) = torch.autograd.grad((y * dy).sum(), x, create_graph=True)
    assert_close(dx, a["dx"], 5e-6, "dx")
    if b is not None:
        (db,) = torch.autograd.grad((y * dy).sum(), b, retain_graph=True)
        assert_close(db, a["db"], 5e-6, "db")
    d2x, d2dy = torch.autograd.grad((dx * a["v"]).sum(), [x, dy], allow_unused=True)
    assert_close(torch.zeros_like(x) if d2x is None else d2x, a["d2x"], 5e-6, "d2x")
    assert_close(d2dy, a["d2dy"], 5e-6, "d2dy")


@pytest.mark.parametrize("case", by_name(CONV))
def test_conv2d_resample(case, form):
    a = arrays(CONV, case, form)
    x, w = a["x"].requires_grad_(), a["w"].requires_grad_()
    keys = ("up", "down", "padding", "groups", "flip_weight", "flip_filter")
    y = conv2d_resample.conv2d_resample(x, w, f=a.get("f"), **{k: case[k] for k in keys})
    assert_close(y, a["y"], 5e-6, "y")
    dx, dw = torch.autograd.grad((y * a["dy"]).sum(), [x, w])
    assert_close(dx, a["dx"], 5e-6, "dx")
    assert_close(dw, a["dw"], 5e-6, "dw")


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", by_name(MODULATED))
def test_modulated_conv2d(case, fused, form):
    a = arrays(MODULATED, case, form)
    half = a["x"].dtype == torch.float16
    tol = 5e-3 if half else 5e-6
    inputs = [a[k].requires_grad_(not half) for k in ("x", "w", "s")]
    keys = ("up", "down", "padding", "demodulate", "flip_weight")
    args = {k: case[k] for k in keys if k in case}
    y = modulated_conv2d(*inputs, noise=a.get("noise"), resample_filter=a.get("f"), fused_modconv=fused, **args)
    assert_close(y, a["y"], tol, "y")
    if not half:
        for name, grad in zip(("dx", "dw", "ds"), torch.autograd.grad((y * a["dy"]).sum(), inputs)):
            assert_close(grad, a[name], tol, name)


def test_double_backward_in_float64(form):
    torch.manual_seed(0)
    f = upfirdn2d.setup_filter([1, 3, 3, 1], device=form)
    x, w, b = (
        torch.randn(shape, dtype=torch.float64).to(form).requires_grad_() for shape in ([2, 2, 5, 5], [3, 2, 3, 3], [2])
    )
    for up, down in [(2, 1), (1, 2), (1, 1)]:
        assert torch.autograd.gradgradcheck(
            lambda x, w, u=up, d=down: conv2d_resample.conv2d_resample(x, w, f, u, d, padding=1),
            (x, w),
            nondet_tol=1e-9,
        )
    for act in bias_act.activation_funcs:
        assert torch.autograd.gradgradcheck(lambda x, b, act=act: bias_act.bias_act(x, b, act=act), (x, b))
    assert torch.autograd.gradgradcheck(lambda a, b: fma.fma(a, b, a * b), (x, x))


def test_channels_last_gives_the_same_values(form):
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1)).to(form)
    f = upfirdn2d.setup_filter([1, 3, 3, 1], device=form)
    for op in (upfirdn2d.upsample2d, upfirdn2d.downsample2d, upfirdn2d.filter2d):
        assert_close(op(x.to(memory_format=torch.channels_last), f), op(x, f), 2e-6, op.__name__)


def test_shapes_without_data():
    x = torch.empty(2, 3, 8, 8, device="meta")
    f = upfirdn2d.setup_filter([1, 3, 3, 1], device="meta")
    assert bias_act.bias_act(upfirdn2d.upsample2d(x, f), act="lrelu").shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, f: upfirdn2d.upfirdn2d(x[0], f), r"must be \[N, C, H, W\]"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, f, up=0), "up must be a positive integer"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, f, down=[1, 2, 3]), "down must be a positive integer"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, f, padding=[1, 2, 3]), "padding must be one, two or four integers"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, f, padding=-2), "smaller than the 4x4 filter"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, f.double()), "float32"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, f, impl="fast"), "impl must be"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, f, impl="cuda"), "needs tensors on a CUDA device"),
        (lambda x, f: upfirdn2d.upfirdn2d(x.int(), f), "floating dtype, not torch.int32"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, torch.ones(33), padding=40), "at most 32x32 taps, not 33x33"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, torch.ones(1, 33), padding=40), "at most 32x32 taps, not 33x1"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, f, padding=-40), "smaller than the 4x4 filter"),
        (lambda x, f: upfirdn2d.upfirdn2d(x[:, :, :0], f), "a 4x0 image .* smaller than the 4x4 filter"),
        (lambda x, f: upfirdn2d.upfirdn2d(x, f.to("meta")), "filter is on meta, x on cpu"),
        (lambda x, f: bias_act.bias_act(x.int()), "floating dtype, not torch.int32"),
        (lambda x, f: bias_act.bias_act(x, torch.zeros(2).half()), "bias is torch.float16, x is torch.float32; cast"),
        (lambda x, f: bias_act.bias_act(x, torch.zeros(2, device="meta")), "bias is on meta, x on cpu"),
        (lambda x, f: bias_act.bias_act(x, impl="cuda"), "needs tensors on a CUDA device"),
        (lambda x, f: upfirdn2d.setup_filter([[[1.0]]]), "one or two axes"),
        (lambda x, f: bias_act.bias_act(x, torch.zeros(7)), "does not fit axis 1"),
        (lambda x, f: bias_act.bias_act(x, act="gelu"), "act must be one of linear"),
        (lambda x, f: bias_act.bias_act(x, clamp=-1), "must not be negative"),
        (lambda x, f: conv2d_resample.conv2d_resample(x, f), "must have four axes"),
    ],
)
def test_bad_arguments_are_named(call, message, cpu_form):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2, 4, 4), upfirdn2d.setup_filter([1, 3, 3, 1]))
