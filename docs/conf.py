"""The site that `make docs` builds: README.md is its first page, and every page of docs/ has a place in it by itself.

The pages are plain Markdown that reads the same beside the code; what only the site has is made here: its navigation,
and a look at the finished pages for anything that they would ask of another host. docs/adr/019-the-site.md says why.
"""

import pathlib
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ConfigError, ExtensionError

ROOT = pathlib.Path(__file__).resolve().parents[1]
VERSION = re.findall(r'__version__ = "(.+)"', (ROOT / "rlhf_jax/__init__.py").read_text())[0]

# The pages of docs/ in the order in which a newcomer would want them; those that nobody named stand under Further.
SECTIONS = {
    "Start": ("guide", "chain", "methods/README"),
    "Data and labels": ("data", "world", "rankings", "labelling", "aggregation", "judges"),
    "Rewards and rollouts": ("rewards", "sampling", "experts"),
    "What it is worth": (
        "evaluation", "reward-evaluation", "comparing", "ablation", "lab", "metrics", "results/README",
    ),
    "Further": (),
    "Background": ("papers", "adr/README"),
}  # fmt: skip
# A method's page says `algorithm=NAME` in its first lines, and that is its group.
METHODS = {
    "Demonstrations": ("sft",),
    "Preferences": ("preference",),
    "Reward models": ("reward",),
    "The model's own answers": ("ppo", "group", "online", "rejection", "nash", "distill"),
    "With any of these": (None,),  # names none
}

project = "rlhf_jax"
html_title = f"rlhf_jax {VERSION}"
extensions = ["myst_parser"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/**"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in ("docs", *include_patterns)]
highlight_language = "none"  # of a block that names no language
smartquotes = False  # two hyphens in a text are a flag's
myst_heading_anchors = 6  # by GitHub's rule, so that links to headings lead to the same place in both
html_theme = "furo"
html_copy_source = html_show_copyright = html_use_index = html_domain_indices = False


def _contents(caption: str, pages: list[str], hidden: bool) -> str:
    """A table of contents as MyST writes it; pages are paths below docs/ or, with a slash before, the root."""
    lines = [f":caption: {caption}", *[":hidden:"] * hidden, "", *(p if p[0] == "/" else f"/docs/{p}" for p in pages)]
    return "\n".join(["", "```{toctree}", ":maxdepth: 1", *lines, "```", ""])


def _below(folder: str) -> list[str]:
    """The pages of a folder of docs/, but for the one that lists them."""
    names = sorted(path.stem for path in (ROOT / "docs" / folder).glob("*.md"))
    return [f"{folder}/{name}".removeprefix("/") for name in names if name != "README"]


def _group(page: str) -> str:
    """The group of a method's page. Raises ConfigError for an algorithm that no group has."""
    told = re.search(r"`algorithm=(\w+)`", "".join((ROOT / f"docs/{page}.md").read_text().splitlines()[1:4]))
    algorithm = told[1] if told else None
    for name, algorithms in METHODS.items():
        if algorithm in algorithms:
            return name
    raise ConfigError(f"docs/{page}.md is of algorithm={algorithm}; add that to a group of METHODS in docs/conf.py.")


def _navigation() -> dict[str, str]:
    """What is added to the pages that list others."""
    named = {page for pages in SECTIONS.values() for page in pages}
    sections = {name: [*pages] for name, pages in SECTIONS.items()}
    sections["Further"] += [page for page in _below("") if page not in named]
    sections["Background"] += ["/CHANGELOG", "/CONTRIBUTING"]
    methods: dict[str, list[str]] = {name: [] for name in METHODS}
    for page in _below("methods"):
        methods[_group(page)].append(page)
    return {
        "README": "".join(_contents(name, pages, True) for name, pages in sections.items() if pages),
        "docs/methods/README": "".join(_contents(name, pages, False) for name, pages in methods.items()),
        "docs/results/README": _contents("Further results", [*_below("results"), "results/lab/README"], True),
        "docs/results/lab/README": _contents("Studies", _below("results/lab"), True),
        "docs/adr/README": _contents("Decisions", _below("adr"), False),
    }


NAVIGATION = _navigation()


def _add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] += NAVIGATION.get(page, "")


def _finish(app: Sphinx, error: Exception | None) -> None:
    """Makes the folder open at its first page. Raises ExtensionError if a page would ask another host for anything."""
    if error:
        return
    out = pathlib.Path(app.outdir)
    (out / "index.html").write_text('<!doctype html><meta http-equiv="refresh" content="0; url=README.html">\n')
    asked = re.compile(
        r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
    )
    styled = re.compile(r"""(?:url\(|@import )\s*["']?(?:https?:)?//""")
    for file in sorted(out.rglob("*")):
        pattern = {".html": asked, ".css": styled}.get(file.suffix)
        if pattern and (found := pattern.search(file.read_text())):
            raise ExtensionError(f"{file.relative_to(out)} would ask another host: {found[0]}")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
