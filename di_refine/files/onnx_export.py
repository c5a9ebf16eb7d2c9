"""Generators as ONNX models, for use without PyTorch. Needs the optional packages of `pip install di-refine[onnx]`."""

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch

from di_refine.errors import InputError
from stylegan2_ada.networks import Generator
from torch_utils import misc

OPSET = 18  # of the standard operators; every operator that these networks need is in it, and ONNX Runtime has had it
# since version 1.14

OLDEST_TORCH = "2.13"  # whose exporter is known to trace these networks; those of 2.6 and 2.9 do not


class StyleGAN2Model(torch.nn.Module):
    """A StyleGAN2 generator with the inputs and the output that it has in ONNX, all in float32.

    It maps `z [N, z_dim]` and, if it is conditional, `c [N, c_dim]` to `images [N, C, R, R]`.

    Args:
        net: the generator, on the CPU.
        noise_mode: 'const' or 'none'; ONNX models draw no random numbers.
        truncation_psi: truncation, which is built into the model.

    Attributes:
        inputs: shape of one sample of each input, by its name.
    """

    inputs: dict[str, tuple[int, ...]]

    def __init__(self, net: Generator, noise_mode: str = "const", truncation_psi: float = 1.0):
        super().__init__()
        self.net = net
        self.noise_mode, self.truncation_psi = noise_mode, truncation_psi
        self.inputs = {"z": (net.z_dim,), **({"c": (net.c_dim,)} if net.c_dim else {})}

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        ws = self.net.mapping(z, c, truncation_psi=self.truncation_psi)
        return self.net.synthesis(ws, noise_mode=self.noise_mode, force_fp32=True, fused_modconv=False)


class OneStepModel(torch.nn.Module):
    """A one-step generator with the inputs and the output that it has in ONNX, all in float32.

    It maps unit normals `z [N, C, R, R]` and, if it is conditional, `c [N, label_dim]` to `images [N, C, R, R]`.

    Args:
        net: the network that was distilled, a `di_refine.denoisers.Denoiser`, on the CPU.
        init_sigma: the noise level it generates from.

    Attributes:
        inputs: shape of one sample of each input, by its name.
    """

    inputs: dict[str, tuple[int, ...]]
    init_sigma: torch.Tensor

    def __init__(self, net: Any, init_sigma: float):
        super().__init__()
        self.net = net
        self.register_buffer("init_sigma", torch.tensor(float(init_sigma)))
        image = (net.img_channels, net.img_resolution, net.img_resolution)
        self.inputs = {"z": image, **({"c": (net.label_dim,)} if net.label_dim else {})}

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return self.net(z * self.init_sigma, self.init_sigma, c, force_fp32=True)


def save(model: StyleGAN2Model | OneStepModel, path: str | os.PathLike, properties: dict[str, str]) -> None:
    """Write a model with the inputs that `model.inputs` names, any batch size, and the output `images`.

    Args:
        model: what to export, on the CPU.
        path: file to write.
        properties: what is kept in the file, beside the opset and the shapes.

    Raises:
        InputError: PyTorch is too old, or the optional packages are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"dest={os.fspath(path)}: ONNX needs the package {error.name}; pip install 'di-refine[onnx]'"
        ) from None
    if torch.__version__ < OLDEST_TORCH:  # which compares as versions do
        raise InputError(
            f"dest={os.fspath(path)}: the ONNX export of PyTorch {torch.__version__} cannot trace these networks; use "
            f"PyTorch {OLDEST_TORCH} or newer for this command"
        )
    batch = torch.export.Dim("batch", min=1, max=2**16)
    example = tuple(torch.zeros(2, *shape) for shape in model.inputs.values())
    with torch.no_grad(), _quiet():
        exported = torch.onnx.export(
            model.eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(model.inputs),
            output_names=["images"],
            dynamic_shapes=({0: batch},) * len(example),
            verbose=False,
        )
    proto = cast("torch.onnx.ONNXProgram", exported).model_proto  # as it is with dynamo=True
    for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.functions):
        del part.metadata_props[:]  # where in whose file system each line of code stood
    for key, value in {**properties, "inputs": json.dumps(model.inputs), "opset": str(OPSET)}.items():
        proto.metadata_props.add(key=key, value=value)
    with misc.open_atomic(path) as file:
        file.write(proto.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which reports on stdout, and warns about packages that nobody here needs."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
