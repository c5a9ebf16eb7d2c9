"""The command `python -m di_refine report`: the page of a run, or one that compares several."""

from pathlib import Path

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "--dest", metavar="FILE.html", help="Write this file; without it, report.html in the folder of the one run."
)
def main(runs, dest):
    """Write the page of a run from the files in its folder, or a page that compares several runs.

    \b
    python -m di_refine report runs/00000-mine
    python -m di_refine report runs/00000-mine runs/00001-mine --dest=both.html

    The page is one file, which needs neither the run's folder nor the network. Trainings write it by themselves, at
    every snapshot and at the end.
    """
    # These import PyTorch and plotly, which --help must not wait for.
    from di_refine.files.run_files import RunFiles
    from di_refine.report import page

    folders = [Path(run) for run in runs]
    if dest is None and len(folders) > 1:
        raise InputError("--dest is needed where there are several runs; name the file to write")
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; name the folder of a run")
    path = RunFiles(folders[0]).report if dest is None else Path(dest)
    if not path.parent.is_dir():
        raise InputError(f"--dest={path}: there is no folder {path.parent}; make it, or choose another place")
    cli.check_outfile(path, "--dest")
    page.write(path, folders)
    terminal.print_result(
        {"report": str(path), "bytes": path.stat().st_size, "runs": [str(folder) for folder in folders]}
    )


if __name__ == "__main__":
    main()
