"""How fast upfirdn2d and bias_act are: ours, the PyTorch composition, torch.compile of it, and what memory allows.

    python benchmarks/ops.py                    on a CPU: batch 32, 32x32 and 256x256, and the shapes of the demo
    python benchmarks/ops.py --device=cuda      on a GPU: the shapes of StyleGAN2 in float16 and float32

The floor is the time that moving each operand and result once would take at the bandwidth of a copy, measured here.
Columns of one row are measured in turns, several times, and the fastest of each counts, so that other work on the
machine hits them alike. On CUDA the calls are captured as a graph over operands that together exceed the L2 cache.
The last line of stdout is the table as JSON.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch_utils import custom_ops
from torch_utils.ops import bias_act, upfirdn2d

SHAPES = {
    "cpu": ([64, 32, 16, 16], [32, 64, 32, 32], [32, 16, 256, 256]),
    "cuda": ([32, 512, 32, 32], [16, 128, 256, 256]),
}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float16, torch.float32)}
FORMS = ("ours", "pytorch", "torch.compile")
OPERANDS_BYTES = 2**30  # on CUDA; several times the L2 cache


def calls(shape: list[int], dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """What is measured, as functions of x."""
    b = torch.randn(shape[1], device=device, dtype=dtype)
    f = upfirdn2d.setup_filter([1, 3, 3, 1], device=device)
    return {
        "bias_act lrelu": lambda x: bias_act.bias_act(x, b, act="lrelu", clamp=256),
        "bias_act linear": lambda x: bias_act.bias_act(x, b, clamp=256),
        "bias_act swish": lambda x: bias_act.bias_act(x, b, act="swish"),
        "upfirdn2d up 2": lambda x: upfirdn2d.upsample2d(x, f),
        "upfirdn2d down 2": lambda x: upfirdn2d.downsample2d(x, f),
        "upfirdn2d filter": lambda x: upfirdn2d.filter2d(x, f, gain=4),
    }


def with_gradient(op: Callable) -> Callable:
    """The call together with its derivative with respect to x."""

    def run(x):
        x = x.detach().requires_grad_()
        y = op(x)
        return y, *torch.autograd.grad(y, x, y.detach())

    return run


def form(op: Callable, name: str) -> Callable:
    """`op` in one of FORMS."""
    mode = "compiled" if name == "ours" else "native"
    inner = torch.compile(op, dynamic=False) if name == "torch.compile" else op

    def run(x):
        with custom_ops.use(mode):
            return inner(x)

    return run


def timer(run: Callable, operands: list[torch.Tensor]) -> Callable[[], float]:
    """A function that measures one call in microseconds."""
    for x in operands[:2]:
        run(x)
    if operands[0].is_cuda:
        return _cuda_timer(run, operands)
    start = time.perf_counter()
    run(operands[0])
    repeats = max(1, int(0.03 / (time.perf_counter() - start)))

    def measure():
        start = time.perf_counter()
        for _ in range(repeats):
            run(operands[0])
        return (time.perf_counter() - start) / repeats * 1e6

    return measure


def _cuda_timer(run, operands):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(x) for x in operands]  # kept, so that results do not share memory that is still in the cache
    del kept
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def measure():
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / (5 * len(operands)) * 1e3

    return measure


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy of tensors far larger than the caches."""
    source = torch.empty(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    measure = timer(lambda x: target.copy_(x), [source])
    return 2 * source.numel() / (min(measure() for _ in range(10)) * 1e-6)


def moved_bytes(op: Callable, x: torch.Tensor, gradient: bool) -> int:
    """Bytes of operands and results; the derivative reads the value's gradient, and for bias_act the value."""
    y = op(x)
    forward = x.nbytes + y.nbytes
    saved = y.nbytes if x.shape == y.shape else 0
    return forward + (y.nbytes + saved + x.nbytes if gradient else 0)


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each column.")
@click.option(
    "--compile/--no-compile", "with_compile", default=None, help="The torch.compile column  [default: on CUDA]"
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads.")
def main(device, rounds, with_compile, threads):
    """Measure both operators, forward and with their derivative."""
    torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device=cuda: PyTorch sees no CUDA GPU")
    custom_ops.insist(device)
    forms = FORMS if (device == "cuda" if with_compile is None else with_compile) else FORMS[:2]
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} thread(s)"
    print(f"{name}, PyTorch {torch.__version__}; a copy moves {bandwidth / 1e9:.1f} GB/s (read + write)")
    print("microseconds; share: of the copy's bandwidth that ours reaches\n")
    header = ["op", "pass", "shape", "dtype", *forms, "floor", "share", "pytorch / ours"]
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * 4 + " ---: |" * (len(header) - 4))
    rows = []
    for shape in SHAPES[device]:
        for dtype in DTYPES[device]:
            bytes_each = dtype.itemsize * torch.Size(shape).numel()
            count = max(2, min(16, OPERANDS_BYTES // bytes_each)) if device == "cuda" else 1
            operands = [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)]
            for op_name, op in calls(shape, dtype, device).items():
                for gradient in (False, True):
                    row = measure_row(op, operands, gradient, forms, rounds)
                    row |= {"op": op_name, "pass": "forward + backward" if gradient else "forward"}
                    row |= {"shape": shape, "dtype": str(dtype)[6:]}
                    row["floor"] = moved_bytes(op, operands[0], gradient) / bandwidth * 1e6
                    row["share"] = row["floor"] / row["ours"]
                    row["pytorch / ours"] = row["pytorch"] / row["ours"]
                    rows.append(row)
                    cells = [f"{row[key]:.2f}" if key in header[-2:] else _cell(row[key]) for key in header]
                    print("| " + " | ".join(cells) + " |", flush=True)
    print(json.dumps({"device": name, "torch": torch.__version__, "copy_bytes_per_second": bandwidth, "rows": rows}))


def measure_row(op, operands, gradient, forms, rounds) -> dict[str, float]:
    """Microseconds of each form."""
    whole = with_gradient(op) if gradient else op
    with torch.set_grad_enabled(gradient):
        timers = {name: timer(form(whole, name), operands) for name in forms}
        measured = {name: [] for name in forms}
        for _ in range(rounds):
            for name, measure in timers.items():
                measured[name].append(measure())
    return {name: min(values) for name, values in measured.items()}


def _cell(value) -> str:
    return (
        f"{value:.0f}"
        if isinstance(value, float) and value >= 100
        else f"{value:.1f}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    main()
