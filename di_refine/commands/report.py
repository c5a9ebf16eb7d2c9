"""The command `python -m di_refine report`: the page of a run, or one that compares several."""

from pathlib import Path

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import InputError


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "--film",
    metavar="FILE.gif|.webp|.mp4",
    help="Write a film of the same latents from snapshot to snapshot instead; of several runs, beside each other.",
)
@click.option(
    "--dest", metavar="FILE.html", help="Write this file; without it, report.html in the folder of the one run."
)
def main(runs, dest, film):
    """Write the page of a run from the files in its folder, or a page that compares several runs.

    \b
    python -m di_refine report runs/00000-mine
    python -m di_refine report runs/00000-mine runs/00001-mine --dest=both.html
    python -m di_refine report runs/00000-mine --film=refinement.gif

    The page is one file, which needs neither the run's folder nor the network. Trainings write it by themselves, at
    every snapshot and at the end.
    """
    # These import PyTorch and plotly, which --help must not wait for.
    from di_refine.files.run_files import RunFiles
    from di_refine.report import page

    folders = [Path(run) for run in runs]
    if film is not None:
        if dest is not None:
            raise InputError("--film and --dest each name what is written; give one of them")
        _film(film, folders)
        return
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


def _film(path: str, folders: list[Path]) -> None:
    """Write a film of runs, and print the JSON result."""
    from di_refine.commands import films
    from di_refine.files import film
    from di_refine.report.record import Run

    film.check(path, "--film")
    dest = cli.check_outfile(path, "--film")
    frames = films.of_runs([Run(folder) for folder in folders])
    dest.parent.mkdir(parents=True, exist_ok=True)
    count = film.save(dest, frames, films.SNAPSHOTS_PER_SECOND)
    terminal.print_result({"film": str(dest), "frames": count, "runs": [str(folder) for folder in folders]})


if __name__ == "__main__":
    main()
