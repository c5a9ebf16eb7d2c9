"""Checks what `python -m build` put into dist/: `make wheel` runs it.

The wheel holds the packages and console scripts, and nothing else. The source distribution holds every file of the
checkout that the tests need.
"""

import sys
import tarfile
import zipfile
from pathlib import Path

PACKAGES = {"di_refine", "stylegan2_ada", "torch_utils"}
ROOT = Path(__file__).resolve().parents[1]


def problems(dist: Path, root: Path = ROOT) -> list[str]:
    """Return what is wrong with the one wheel and the one source distribution in a folder.

    Args:
        dist: the folder.
        root: the checkout that they were made from.
    """
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    own = {name for name in inside if ".dist-info/" not in name}
    found = [f"the wheel has {name}" for name in sorted(own) if name.partition("/")[0] not in PACKAGES]
    wanted = {path.relative_to(root).as_posix() for name in PACKAGES for path in (root / name).rglob("*.py")}
    wanted |= {path.relative_to(root).as_posix() for path in (root / "torch_utils/ops/csrc").iterdir()}
    wanted |= {f"di_refine/report/page.{kind}" for kind in ("html", "js")}
    wanted |= {f"di_refine/pretrained/{path.name}" for path in (root / "pretrained").iterdir() if path.is_file()}
    found += [f"the wheel lacks {name}" for name in sorted(wanted - own)]
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2] for member in archive if member.isfile()}
    kept = [path for name in (*PACKAGES, "tests", "scripts", "docs", "pretrained") for path in (root / name).rglob("*")]
    kept += [path for name in ("*.py", "*.md", "requirements*.txt") for path in root.glob(name)]
    kept += [root / "Makefile", root / "pyproject.toml"]
    files = {path.relative_to(root).as_posix() for path in kept if path.is_file() and "__pycache__" not in path.parts}
    return found + [f"the sdist lacks {name}" for name in sorted(files - members)]


if __name__ == "__main__":
    wrong = problems(Path(sys.argv[1]))
    print(*wrong or ["wheel and sdist hold what they should"], sep="\n")
    sys.exit(1 if wrong else 0)
