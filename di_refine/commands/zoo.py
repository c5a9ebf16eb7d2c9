"""The command `python -m di_refine zoo`: it lists, fetches and verifies public networks, data and statistics."""

import click

from di_refine import terminal
from di_refine.commands import cli
from di_refine.errors import RunError
from di_refine.files import download, registry
from di_refine.files.download import sha256_of


@cli.group()
def main():
    """List, fetch and verify the public networks, data and statistics that the registry names.

    Downloads go to $DI_REFINE_CACHE, else ~/.cache/di-refine. DI_REFINE_OFFLINE=1 forbids them for every command.
    """


@main.command("list")
@click.option("--kind", type=click.Choice(registry.KINDS), help="List only entries of this kind.")
def list_(kind):
    """List the names, and say which of their files are on this machine."""
    names = [name for name, record in registry.registry().items() if kind in (None, record["kind"])]
    columns = ("kind", "resolution", "classes", "state", "licence")
    entries = {name: {**registry.entry(name), "state": registry.state(name)} for name in names}
    terminal.table([[name, *map(record.get, columns)] for name, record in entries.items()], ["name", *columns])
    terminal.print_result({"cache": str(registry.cache_folder()), "entries": entries})


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME|URL...")
@click.option(
    "--companions/--no-companions",
    default=False,
    help="Also fetch the teacher, the feature network and the statistics that go with each.",
)
@click.option("--offline/--no-offline", default=False, help="Take files only from this machine; do not download.")
def fetch(names, companions, offline):
    """Download files, or find those that are here, and check them."""
    files = {name: registry.resolve(name, setting="name", offline=offline) for name in names}
    for role in ("teacher", "detector", "statistics") if companions else ():
        for path in list(files.values()):
            other = registry.companion(path, role, offline=offline)
            if other is not None:
                files.setdefault(other.name, other)
    for name, path in files.items():
        terminal.show(f"{name}: {path}")
    terminal.print_result({"files": files, "sha256": {name: sha256_of(path) for name, path in files.items()}})


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME...]")
def verify(names):
    """Check files against their checksums.

    Without names, all files that are on this machine are checked. The exit status is 1 if one is wrong or missing.
    """
    wanted = [registry.entry(name)["name"] for name in names] or [
        name for name in registry.registry() if registry.state(name) in ("shipped", "cached")
    ]
    verdicts = {}
    for name in wanted:
        record, where = registry.registry()[name], registry.state(name)
        path = registry.pretrained_folder() / record["file"] if "file" in record else registry.cache_folder() / name
        if where == "missing":
            verdicts[name] = where
        elif where == "cached":
            known = record.get("sha256") or download.remembered(path)
            problem = download.fault(path, record["url"], record.get("sha256"))
            verdicts[name] = problem or ("ok" if known else "recorded")
        else:
            digest, expected = sha256_of(path), record.get("sha256", "")
            verdicts[name] = "ok" if digest.startswith(expected) else f"its SHA-256 is {digest} instead of {expected}"
    terminal.table([[name, verdict] for name, verdict in verdicts.items()], ["name", "verdict"])
    terminal.print_result({"cache": str(registry.cache_folder()), "verdicts": verdicts})
    bad = [name for name, verdict in verdicts.items() if verdict not in ("ok", "recorded")]
    if bad:
        raise RunError(f"not as they should be: {', '.join(bad)}")


if __name__ == "__main__":
    main()
