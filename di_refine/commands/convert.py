"""The command `python -m di_refine convert`: network files from one form into another, generators to ONNX."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError

if TYPE_CHECKING:
    from di_refine.files.onnx_export import OneStepModel, StyleGAN2Model

_FORMATS = {
    ".pkl": "pickle",
    ".safetensors": "safetensors",
    ".json": "safetensors",
    ".onnx": "onnx",
    ".pt": "weights",
    "": "folder",
}
_AVERAGES = ("G_ema", "ema")  # what people use a file for


@cli.command()
@click.option(
    "--source",
    required=True,
    metavar="FILE|FOLDER|URL|NAME",
    help="Read this pickle, pair of NAME.safetensors and NAME.json, diffusers folder, or .pt file of a diffusion model "
    "or of rosinality's StyleGAN2.",
)
@click.option(
    "--source-config",
    metavar="FILE.json",
    help="Take from this JSON file what the source does not say: the flags of a .pt file's training, or a scheduler's "
    "settings.  [default: the JSON file that has the .pt file's name]",
)
@click.option(
    "--dest",
    required=True,
    metavar="FILE",
    help="Write this file; its ending, .pkl, .safetensors, .onnx or .pt, says in what form. A name without one is that "
    "of a diffusers folder.",
)
@click.option("--overwrite/--no-overwrite", default=False, help="Replace the destination if it is there.")
@click.option(
    "--refresh-source/--keep-source",
    default=False,
    help="Embed the source text of this release instead of the text that each network came with; the weights stay.",
)
@click.option("--key", help="Export the network with this key of the source to ONNX.  [default: G_ema, else ema]")
@click.option(
    "--noise-mode",
    type=click.Choice(["const", "none"]),
    default="const",
    help="Export a StyleGAN2 network to ONNX with its constant noise inputs, or without noise.",
)
@click.option(
    "--truncation",
    type=cli.Number(),
    default=1.0,
    help="Export a StyleGAN2 network to ONNX with this truncation psi; 1 truncates nothing.",
)
@click.option(
    "--init-sigma",
    type=cli.POSITIVE_NUMBER,
    help="Export an EDM network to ONNX as a generator that makes an image in one step from this noise level.  "
    "[default: from the file]",
)
@click.pass_context
def main(ctx, source, source_config, dest, overwrite, refresh_source, key, noise_mode, truncation, init_sigma):
    """Convert a network file, after checking it as every command does; nothing in it is executed.

    \b
    python -m di_refine convert --source=network.pkl --dest=network.safetensors
    python -m di_refine convert --source=network.safetensors --dest=network.pkl
    python -m di_refine convert --source=old.pkl --dest=new.pkl --refresh-source
    python -m di_refine convert --source=stylegan2-digits.pkl --dest=digits.onnx --noise-mode=none
    python -m di_refine convert --source=network-snapshot-001000.pkl --dest=student
    python -m di_refine convert --source=rosinality.pt --dest=network.pkl

    Pickles and safetensors keep everything: networks, settings, embedded source. ONNX has the one generator, for any
    batch size, with the inputs z and (if conditional) c and the output images. A diffusion model that came from a
    diffusers folder or from a .pt file can be written as one again; a StyleGAN2 generator as .pt is what rosinality's
    code reads.
    """
    # These, and those in _model, import PyTorch, which --help must not wait for.
    import torch

    from di_refine.files import adm_checkpoint, diffusers_folder, onnx_export, registry, rosinality, safetensors_pair
    from di_refine.files.networks import digest, read, say
    from di_refine.labels import KEY
    from stylegan2_ada.networks import Generator
    from torch_utils import persistence

    dest = Path(dest)
    form = _FORMATS.get(dest.suffix.lower())
    if form is None:
        raise InputError(f"--dest={dest} must end in .pkl, .safetensors, .onnx or .pt, or be a folder's name")
    if form != "onnx":
        _refuse_onnx_options(ctx)
    elif refresh_source:
        raise InputError("--refresh-source is for pickles and safetensors; an ONNX file holds no source text")
    outputs = (
        [safetensors_pair.tensors_path(dest), safetensors_pair.config_path(dest)] if form == "safetensors" else [dest]
    )
    for output in outputs:
        if form == "folder":
            _check_folder(output, overwrite)
        else:
            cli.check_outfile(output, "--dest", overwrite)
    path = registry.resolve(source, setting="source")
    networks = read(path, "source", source_config)
    dest.parent.mkdir(parents=True, exist_ok=True)
    modules = [name for name, value in networks.items() if isinstance(value, torch.nn.Module)]
    if refresh_source:
        for name in modules:
            persistence.refresh_source(networks[name])
        for name, value in networks.items():
            if isinstance(value, persistence.Record):
                what = f"'{name}' ({persistence.printable(value.class_name)})"
                terminal.say(f"note: {what} keeps its source text, since no class here fits it")
    if form == "pickle":
        persistence.save(networks, dest)
    elif form in ("weights", "folder"):
        is_generator = isinstance(networks.get("G_ema"), Generator)
        try:
            if form == "weights" and is_generator:
                for note in rosinality.save(networks, dest):
                    say(f"{dest}: {note}")
            else:
                (adm_checkpoint if form == "weights" else diffusers_folder).save(networks, dest)
        except persistence.NetworkFormatError as error:
            raise InputError(f"--dest={error}") from None
        modules = ["G_ema" if is_generator else "ema"]
    elif form == "safetensors":
        for left_out in safetensors_pair.save(networks, dest):
            say(f"{dest}: '{left_out}' is left out, since only pickles hold what is of a class that is not known here")
            del networks[left_out]
    else:
        key, model = _model(networks, path, key, noise_mode, truncation, init_sigma)
        facts = {"network": type(model.net).__name__, "key": key, "source": path.name}
        _check_pictures(model, path)
        onnx_export.save(model, dest, {**facts, **_labels(networks.get(KEY))})
        modules = [key]
    terminal.print_result(
        {
            "source": str(path),
            "dest": [str(output) for output in outputs],
            "sha256": [digest(output) for output in outputs],
            "networks": modules,
            **({"opset": onnx_export.OPSET} if form == "onnx" else {}),
        }
    )


def _labels(law: Any) -> dict[str, str]:
    """Return what an ONNX file says of the labels: the names of classes, and how often each is drawn, as JSON."""
    if not isinstance(law, dict):
        return {}
    return {f"label_{key}": json.dumps(law[key]) for key in ("classes", "counts") if law.get(key) is not None}


def _check_pictures(model: "StyleGAN2Model | OneStepModel", path: Path) -> None:
    """Say where a model makes no pictures: whoever opens the ONNX file would look for the fault elsewhere."""
    import torch

    from di_refine.generators import check_pictures, latents

    inputs = [latents([0, 1], model.inputs["z"])]
    if "c" in model.inputs:
        classes = model.inputs["c"][0]
        inputs.append(torch.eye(classes)[[0, classes - 1]])
    with torch.no_grad():
        check_pictures(model.eval()(*inputs), str(path))


def _check_folder(path: Path, overwrite: bool) -> None:
    """Raise InputError unless a diffusers folder can be written."""
    from di_refine.files import diffusers_folder

    cli.check_outdir(path.parent, "--dest")
    if path.exists() and not (path.is_dir() and diffusers_folder.is_folder(path)):
        raise InputError(f"--dest={path} exists already, and is no diffusers folder; choose another name")
    if path.exists() and not overwrite:
        raise InputError(f"--dest={path} exists already; choose another name or give --overwrite")


def _refuse_onnx_options(ctx: click.Context) -> None:
    given = click.core.ParameterSource.COMMANDLINE
    for name in ("key", "noise_mode", "truncation", "init_sigma"):
        if ctx.get_parameter_source(name) is given:
            raise InputError(f"--{name.replace('_', '-')} is for --dest=...onnx")


def _model(
    networks: dict[str, Any], path: Path, key: str | None, noise_mode: str, truncation: float, init_sigma: float | None
) -> "tuple[str, StyleGAN2Model | OneStepModel]":
    """Return the key of the network to export, and the network as a model of known inputs and outputs."""
    import torch

    from di_refine.files.networks import DENOISERS
    from di_refine.files.onnx_export import OneStepModel, StyleGAN2Model
    from stylegan2_ada.networks import Generator

    modules = [name for name, value in networks.items() if isinstance(value, torch.nn.Module)]
    key = key or next((name for name in _AVERAGES if name in modules), None)
    if key is None or key not in modules:
        raise InputError(f"--key={key}: {path} holds {', '.join(modules) or 'no networks'}")
    net = networks[key]
    if isinstance(net, Generator):
        if init_sigma is not None:
            raise InputError(f"--init-sigma is for one-step EDM generators, and {key} is a StyleGAN2 generator")
        return key, StyleGAN2Model(net, noise_mode, truncation)
    if isinstance(net, DENOISERS):
        sigmas = networks.get("distilled_sigmas", []) if init_sigma is None else [init_sigma]
        if len(sigmas) > 1:
            raise InputError(f"{path} makes images in {len(sigmas)} steps; only one-step generators go into ONNX files")
        if not sigmas:
            raise InputError(
                f"--init-sigma is needed: {key} is an EDM network, which generates images in one step only if it was "
                "distilled to do so, from that noise level"
            )
        return key, OneStepModel(net, sigmas[0])
    raise InputError(f"--key={key} is a {type(net).__name__}, not a generator")


if __name__ == "__main__":
    main()
