"""The command `python -m di_refine view`: a local page on which networks are compared live."""

from __future__ import annotations

import errno
import functools
import os
import socket
import sys
import webbrowser
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.commands.config import LabelsConfig
from di_refine.commands.options import options
from di_refine.errors import InputError
from torch_utils.settings import WHAT

if TYPE_CHECKING:
    from di_refine.commands.viewer import Real, Viewer
    from di_refine.files.datasets import ImageDataset
    from di_refine.files.networks import NetworkFile

HERE = ("127.0.0.1", "localhost", "::1")
"""Names of the interface that only programs of this machine reach."""

option = functools.partial(click.option, cls=cli.Option)
PAGE = "The page"


@cli.command()
@click.argument("networks", metavar="FILE|URL|NAME...", nargs=-1, required=True)
@option(
    "--difference/--no-difference",
    default=None,
    help="Show how the second network's pictures differ from the first's.  [default: where they have one size]",
    group=WHAT,
)
@options(LabelsConfig)
@option("--data", metavar="PATH|URL|NAME", help="Show the nearest real pictures of this data set.", group=WHAT)
@option(
    "--detector",
    metavar="FILE|NAME",
    help="Measure how near they are by the features of this network.  [default: of the registry, of --teacher, or the "
    "2015 Inception]",
    group=WHAT,
)
@option("--teacher", metavar="FILE|URL|NAME", help="Show what this diffusion model makes of pictures.", group=WHAT)
@option(
    "--init-sigma",
    type=cli.POSITIVE_NUMBER,
    help="Let diffusion models make pictures in one step from this noise level.  [default: from the file]",
    group=WHAT,
)
@option("--host", default="127.0.0.1", metavar="ADDRESS", help="Serve the page at this interface.", group=PAGE)
@option("--port", type=cli.Integer(1, 65535), default=7860, help="... and at this port.", group=PAGE)
@option("--browser/--no-browser", default=True, help="Open the page in a browser.", group=PAGE)
@cli.ops_option
@cli.device_option
def main(networks, difference, labels, data, detector, teacher, init_sigma, host, port, browser, device):
    """Serve a page that compares networks live: seeds, classes, truncation, noise, styles, steps, differences.

    \b
    python -m di_refine view stylegan2-digits.pkl refined.pkl
    python -m di_refine view before.pkl after.pkl --data=digits-16x16.zip --teacher=edm-digits-16x16-cond.pkl

    Ctrl-C ends it. The page is served to this machine alone unless --host says otherwise, asks the internet for
    nothing, and opens no files: networks, data and teacher are those of the command line.
    """
    _check_gradio()
    with _listen(host, port) as listening:
        from di_refine.commands import view_page

        viewer = _viewer(networks, difference, labels, data, detector, teacher, init_sigma, cli.pick_device(device))
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        if host not in HERE:
            terminal.say(f"warning: --host={host}: anyone who reaches port {port} can draw from these networks")
        terminal.say(f"the page is at {url}; Ctrl-C ends it")
        if browser and not (_has_screen() and webbrowser.open(url)):
            terminal.say("note: no browser was found; open that address yourself")
        view_page.serve(viewer, listening)
    terminal.print_result({"url": url, "networks": list(networks)})


def _has_screen() -> bool:
    """Whether a browser would have a window; one of the terminal would wait for a page that is served after it ends."""
    return sys.platform != "linux" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _check_gradio() -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # is read when gradio is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        found = find_spec("gradio") is not None
    except ValueError:  # it is kept from being imported
        found = False
    if not found:
        raise InputError("the page needs gradio, which is not installed; pip install 'di-refine[view]' installs it")


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        InputError: the port is in use or not allowed, or there is no such interface.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except socket.gaierror:
        raise InputError(f"--host={host} is no address of this machine; 127.0.0.1 is the usual one") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port={port} is in use at {host}; choose another one") from None
        raise InputError(f"--host={host} --port={port} cannot be served at ({error.strerror})") from None


def _viewer(networks, difference, labels, data, detector, teacher, init_sigma, device) -> Viewer:
    """Load everything; PyTorch is imported here, so that --help is quick."""
    from di_refine.commands import viewer
    from di_refine.files import networks as files
    from di_refine.files import registry
    from di_refine.files.datasets import ImageDataset
    from di_refine.generators import load_sampler

    paths = [registry.resolve(name) for name in networks]
    dataset = None if data is None else ImageDataset(registry.resolve(data, setting="data", kind="dataset"))
    drawing = {"init_sigma": init_sigma, "noise_mode": "const", "labels": labels, "dataset": dataset}
    samplers = [load_sampler(path, device=device, **drawing) for path in paths]
    judge = None
    if teacher is not None:
        path = registry.resolve(teacher, setting="teacher", kind="edm")
        judge = files.load(path, "teacher").require(files.EDM, "teacher")
        judge.average.to(device)
    real = _real(dataset, detector, paths[0], judge, device)
    titled = list(zip(viewer.distinct_titles(networks), samplers))
    return viewer.Viewer(titled, difference, real, None if judge is None else judge.average)


def _real(dataset: ImageDataset | None, detector, network, judge: NetworkFile | None, device) -> Real | None:
    """The real pictures with their features, which `detector` computes, or a network that goes with what is given.

    Raises:
        InputError: as the parts do, or there is a detector without data.
    """
    if dataset is None:
        if detector is not None:
            raise InputError("--detector measures how near real pictures are; give --data, too")
        return None
    from di_refine import denoisers
    from di_refine.commands.viewer import Real
    from di_refine.files import registry
    from di_refine.metrics.detectors import load_detector
    from di_refine.metrics.evaluate import INCEPTION_WEIGHTS
    from di_refine.metrics.teacher_net import feature_net

    source = detector or registry.companion(dataset.path, "detector") or registry.companion(network, "detector")
    if source is None and judge is not None and denoisers.has_encoder(judge.average):
        net = feature_net(judge.average, judge.path, judge.digest, device)
    else:
        net = load_detector(source or INCEPTION_WEIGHTS, device)
    terminal.say(f"features of {len(dataset):,} pictures of {dataset.name}, by {net.identity.name}")
    return Real.of(dataset, net)


if __name__ == "__main__":
    main()
