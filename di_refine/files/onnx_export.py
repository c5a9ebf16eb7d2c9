"""Generators as ONNX models, for use without PyTorch. Needs the optional packages of `pip install di-refine[onnx]`."""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator

import torch

from di_refine.errors import InputError
from torch_utils import misc

OPSET = 18  # of the standard operators; every operator that these networks need is in it, and ONNX Runtime has had it
# since version 1.14


class StyleGAN2Model(torch.nn.Module):
    """`z [N, z_dim]` and, for a conditional generator, `c [N, c_dim]` -> `images [N, C, R, R]`, all in float32.

    Args:
        net: StyleGAN2 generator, on the CPU.
        noise_mode: 'const' or 'none'; ONNX models draw no random numbers.
        truncation_psi: built into the model.
    """

    def __init__(self, net: torch.nn.Module, noise_mode: str = "const", truncation_psi: float = 1.0):
        super().__init__()
        self.net = net
        self.noise_mode, self.truncation_psi = noise_mode, truncation_psi
        self.inputs = {"z": (net.z_dim,), **({"c": (net.c_dim,)} if net.c_dim else {})}

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        ws = self.net.mapping(z, c, truncation_psi=self.truncation_psi)
        return self.net.synthesis(ws, noise_mode=self.noise_mode, force_fp32=True, fused_modconv=False)


class OneStepModel(torch.nn.Module):
    """`z [N, C, R, R]` (unit normal) and, if conditional, `c [N, label_dim]` -> `images [N, C, R, R]`.

    Args:
        net: EDM network that was distilled into a one-step generator, on the CPU.
        init_sigma: the noise level it generates from.
    """

    def __init__(self, net: torch.nn.Module, init_sigma: float):
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
        properties: kept in the file, beside the opset and the shapes.

    Raises:
        InputError: the optional packages are not there.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--dest={os.fspath(path)}: ONNX needs the package {error.name}; pip install 'di-refine[onnx]'"
        ) from None
    batch = torch.export.Dim("batch", min=1, max=2**16)
    example = tuple(torch.zeros(2, *shape) for shape in model.inputs.values())
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            model.eval(),
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(model.inputs),
            output_names=["images"],
            dynamic_shapes=({0: batch},) * len(example),
            verbose=False,
        )
    proto = program.model_proto
    for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.functions):
        del part.metadata_props[:]  # where in whose file system each line of code stood
    for key, value in {**properties, "inputs": json.dumps(model.inputs), "opset": str(OPSET)}.items():
        proto.metadata_props.add(key=key, value=value)
    with misc.open_atomic(path) as file:
        file.write(proto.SerializeToString())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports on stdout, which is for results, and warns about packages nobody here needs."""
    import logging

    logger = logging.getLogger("torch.onnx._internal.exporter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
