"""What `mkdocs.yml` cannot say: pages that are made from files outside docs/ and from the code.

The Markdown files stay as they are read in the repository. A link from one to another leads to its page here, a link to
a module to the page of the module, and of a link to any other file the text is left.
"""

import ast
import logging
import os
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
VENDORED = ROOT / "build" / "docs" / "npm"
log = logging.getLogger("mkdocs.hooks.site")

PAGES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "pretrained/README.md": "pretrained.md",
    "scripts/cifar10/README.md": "cifar10.md",
}
"""Pages of files outside docs/."""

LIBRARY = {
    "The method": [
        "di_refine.trainer",
        "di_refine.objectives",
        "di_refine.generators",
        "di_refine.denoisers",
        "di_refine.noise",
        "di_refine.labels",
        "di_refine.bridge",
        "di_refine.ratio",
        "di_refine.critic",
        "di_refine.presets",
    ],
    "Metrics": [
        "di_refine.metrics.distances",
        "di_refine.metrics.statistics",
        "di_refine.metrics.kinds",
        "di_refine.metrics.detectors",
        "di_refine.metrics.evaluate",
    ],
    "Files": [
        "torch_utils.persistence",
        "di_refine.files.networks",
        "di_refine.files.datasets",
        "di_refine.files.pictures",
        "di_refine.files.registry",
        "di_refine.files.label_laws",
    ],
    "Networks": [
        "stylegan2_ada.networks",
        "stylegan2_ada.adversarial",
        "stylegan2_ada.augment",
        "di_refine.edm.networks",
        "di_refine.edm.sampler",
        "di_refine.edm.loss",
        "di_refine.edm.augment",
        "di_refine.ddpm.networks",
    ],
    "Operators and helpers": [
        "torch_utils.ops.upfirdn2d",
        "torch_utils.ops.bias_act",
        "torch_utils.ops.conv2d_resample",
        "torch_utils.settings",
        "torch_utils.training",
        "torch_utils.distributed",
    ],
}
"""The modules whose documentation is shown, in the order of the navigation."""

API = {name: f"api/{name}.md" for names in LIBRARY.values() for name in names}

NEEDS = {
    'class="arithmatex"': '<link rel="stylesheet" href="{assets}/katex/katex.min.css">'
    '<script defer src="{assets}/katex/katex.min.js"></script><script defer src="{assets}/formulas.js"></script>',
    'class="mermaid"': '<script defer src="{assets}/mermaid.min.js"></script>',
}
"""What is loaded into a page with formulas or diagrams."""

PACKAGES = ("di_refine", "stylegan2_ada", "torch_utils")


def on_config(config):
    """Put the modules into the navigation."""
    for entry in config.nav:
        if "Library" in entry:
            entry["Library"] += [{group: [{name: API[name]} for name in names]} for group, names in LIBRARY.items()]
    return config


def on_files(files, config):
    """Add the pages and the scripts that are not in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name, page in API.items():
        text = f"::: {name}\n    options:\n      heading_level: 1\n"
        files.append(File.generated(config, page, content=text))
    katex = VENDORED / "katex/dist"
    assets = {f"assets/katex/{path.relative_to(katex).as_posix()}": path for path in katex.rglob("*.woff2")}
    assets |= {f"assets/katex/{name}": katex / name for name in ("katex.min.js", "katex.min.css")}
    assets["assets/mermaid.min.js"] = VENDORED / "mermaid/dist/mermaid.min.js"
    assets["assets/iframe-worker.js"] = VENDORED / "iframe-worker/shim/index.js"
    assets |= {f"assets/{name}": ROOT / "scripts/site" / name for name in ("site.css", "formulas.js")}
    for uri, path in assets.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead links of the repository to pages, and put the list of files where the architecture asks for it."""
    uri = page.file.src_uri
    if uri.startswith("api/"):
        return markdown
    source = {page: source for source, page in PAGES.items()}.get(uri, f"docs/{uri}")
    markdown = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", lambda m: _link(m, source, uri, files), markdown)
    markdown = re.sub(r"`((?:di_refine|stylegan2_ada|torch_utils)(?:\.\w+)+)`", _reference, markdown)
    return markdown.replace("<!-- every file -->", _every_file())


def on_post_page(output, page, config):
    """Load what renders formulas and diagrams into the pages that have some; nothing comes from the network."""
    assets = posixpath.relpath("assets", posixpath.dirname(page.file.dest_uri) or ".")
    for needs, tags in NEEDS.items():
        if needs in output:
            output = output.replace("</head>", tags.format(assets=assets) + "</head>", 1)
    return output.replace("https://unpkg.com/iframe-worker/shim", f"{assets}/iframe-worker.js")


def _reference(match):
    """A name of ours in backticks, as a link where it has a place in the site."""
    return f'<autoref identifier="{match[1]}" optional>`{match[1]}`</autoref>'


def _link(match, source, uri, files):
    image, text, target = match.groups()
    path, _, anchor = target.partition("#")
    if re.match(r"[a-z]+:", target) or not path:
        return match[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / path).exists():
        log.warning("%s: there is no %s, which it links to", source, path)
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    page = PAGES.get(path) or API.get(module) or path.removeprefix("docs/")
    if files.get_file_from_path(page) is None:
        return text
    place = os.path.relpath(page, posixpath.dirname(uri) or ".")
    return f"{image}[{text}]({place}{'#' + anchor if anchor else ''})"


def _every_file():
    """A table for each package: its files, and the first sentence of each."""
    lines = ["## Every file", "", "In the words of its docstring."]
    for package in PACKAGES:
        folders = sorted({path.parent for path in (ROOT / package).rglob("*.py")})
        for folder in folders:
            lines += [
                "",
                f"### {folder.relative_to(ROOT).as_posix()}/",
                "",
                "| file | what it says of itself |",
                "|---|---|",
            ]
            for path in sorted(folder.glob("*.py")):
                said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
                if said:
                    first = re.sub(r"\s+", " ", said.split("\n\n")[0]).replace("|", "\\|")
                    page = API.get(".".join(path.relative_to(ROOT).with_suffix("").parts))
                    lines.append(f"| {f'[`{path.name}`]({page})' if page else f'`{path.name}`'} | {first} |")
    return "\n".join(lines)
