"""The command `python -m di_refine inspect`: it says what is in a network file."""

from pathlib import Path
from typing import Any

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError


@cli.command()
@click.argument("network", metavar="FILE|URL|NAME")
@click.option("--layers/--no-layers", default=False, help="List every tensor.")
@click.option("--dump-source", metavar="DIR", help="Write the embedded source texts into this folder, to be read.")
def main(network, layers, dump_source):
    """Say what a network file holds: classes, constructor arguments, parameters, training options, embedded source.

    \b
    python -m di_refine inspect network-snapshot-000100.pkl
    python -m di_refine inspect network.safetensors --layers

    The official tools run the source text that a pickle carries; nothing here does. A text that was not seen before on
    this machine gets a warning: read it before opening the file with other tools.
    """
    # These import PyTorch, which --help must not wait for.
    from di_refine.files import network_report, registry
    from di_refine.files.foreign import explained
    from torch_utils import misc
    from torch_utils.persistence import NetworkFormatError

    path = registry.resolve(network, setting="network")
    if dump_source is not None:
        cli.check_outdir(dump_source, "--dump-source")
    try:
        report, texts = network_report.describe(path)
    except NetworkFormatError as error:
        raise InputError(explained(error, path)) from None
    _print(report, layers)
    report["sources"] = network_report.judge_sources(texts, path.name)
    for digest, verdict in report["sources"].items():
        where = "new: " if verdict["new"] else ""
        terminal.show(f"source {digest[:16]}  {len(texts[digest])} characters, {where}{verdict['seen']}")
        if verdict["new"]:
            terminal.say(
                f"warning: {path.name} embeds source text that was not seen before ({digest[:16]}); the official tools "
                "would run it, so read it first (--dump-source=DIR writes it out)"
            )
    if dump_source is not None:
        Path(dump_source).mkdir(parents=True, exist_ok=True)
        for digest, text in texts.items():
            with misc.open_atomic(Path(dump_source) / f"{digest[:16]}.txt", "wb") as file:
                file.write(text.encode("utf-8", "surrogatepass"))
    if not layers:
        for entry in report["networks"].values():
            del entry["tensor_list"]
    terminal.print_result(report)


def _print(report: dict[str, Any], layers: bool) -> None:
    terminal.show(f"{report['file']}: {report['bytes']} bytes, SHA-256 {report['sha256']}")
    rows = [
        [key, entry["kind"], entry["class"], entry["parameters"], entry["tensors"], " ".join(entry["dtypes"])]
        for key, entry in {**report["networks"], **report["objects"]}.items()
    ]
    terminal.table(rows, ["key", "kind", "class", "parameters", "tensors", "dtypes"])
    for key, entry in {**report["networks"], **report["objects"]}.items():
        arguments = [*map(repr, entry["init_args"]), *(f"{name}={v!r}" for name, v in entry["init_kwargs"].items())]
        terminal.show(f"{key}: {entry['class']}({', '.join(arguments)})")
    for key, value in report["settings"].items():
        terminal.show(f"{key}: {value!r}")
    if layers:
        rows = [
            [f"{key}.{name}", str(shape)]
            for key, entry in report["networks"].items()
            for name, shape in entry["tensor_list"].items()
        ]
        terminal.table(rows, ["tensor", "shape"])


if __name__ == "__main__":
    main()
