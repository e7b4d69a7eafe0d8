"""One HTML file that shows what a study found: tables, pictures, samples, where they come from.

It opens anywhere, from a disk or a mail: it asks the network for nothing and runs no script, and what a model
wrote is text there, whatever it wrote. The same blocks give the same bytes.

>>> html = render("A study", [Table("Win rates", ["method", "win rate"], [["dpo", 0.61], ["<b>", 0.5]])])
>>> "0.610" in html, "<b>" in html
(True, False)
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

from rlhf_jax.errors import UserError
from rlhf_jax.report import page, pictures
from rlhf_jax.report.blocks import Bars, Block, Cell, Code, Frontier, Lines, Picture, Points, Samples, Table, Text
from rlhf_jax.report.wording import number, visible

__all__ = ["Bars", "Block", "Code", "Frontier", "Lines", "Points", "Samples", "Table", "Text", "render", "write"]

KINDS = {
    Table: "table", Samples: "samples", Text: "words", Code: "code",
    Lines: "picture", Points: "picture", Frontier: "picture", Bars: "picture",
}  # fmt: skip


def write(path: str | os.PathLike[str], title: str, blocks: Sequence[Block], subtitle: str = "") -> epath.Path:
    """Writes the report whole or not at all, and its folder where that is missing; returns its path.

    Errors: UserError where there is nothing to show.
    """
    content = render(title, blocks, subtitle).encode()
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.parent / (file.name + ".part")
    part.write_bytes(content)
    part.replace(file)
    return file


def render(title: str, blocks: Sequence[Block], subtitle: str = "") -> str:
    """The report as a text. Pictures that follow each other stand in pairs where the window is wide."""
    if not blocks:
        raise UserError(f"the report {title!r} has nothing to show; give it at least one block.")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_seen, trim_blocks=True
    )
    environment.filters["number"] = number
    views = list(_views(blocks))
    template = environment.from_string(page.TEMPLATE)
    return template.render(title=title, subtitle=subtitle, views=views, style=Markup(page.STYLE))


def _seen(value: Any) -> Any:
    """Every text that isn't the page's own passes here before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@dataclasses.dataclass(frozen=True)
class _View:
    """A block and what the template can't work out by itself."""

    block: Block
    kind: str
    half: bool = False
    drawing: pictures.Drawing | None = None
    rows: tuple[tuple[str, ...], ...] = ()
    right: tuple[bool, ...] = ()  # which columns hold numbers
    omitted: tuple[str, ...] = ()


def _views(blocks: Sequence[Block]) -> Iterator[_View]:
    kinds = [KINDS[type(block)] for block in blocks]
    for index, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
        if isinstance(block, Picture):
            drawing = pictures.draw(block, f"b{index + 1}-")
            rows, right = _cells(drawing.rows)
            yield _View(block, kind, _paired(kinds, index), drawing, rows, right, drawing.omitted)
        elif isinstance(block, Table):
            yield _View(block, kind, False, None, *_cells(block.rows))
        else:
            yield _View(block, kind)


def _paired(kinds: Sequence[str], index: int) -> bool:
    """Whether the picture shares its line: all of a run do but the last of an odd number."""
    first, last = index, index
    while first and kinds[first - 1] == "picture":
        first -= 1
    while last + 1 < len(kinds) and kinds[last + 1] == "picture":
        last += 1
    return index < last or (last - first) % 2 == 1


def _cells(rows: Sequence[Sequence[Cell]]) -> tuple[tuple[tuple[str, ...], ...], tuple[bool, ...]]:
    """The cells as text, and for each column whether it holds numbers."""
    right = tuple(any(not isinstance(cell, str) for cell in column) for column in zip(*rows, strict=True))
    return tuple(tuple(c if isinstance(c, str) else number(c) for c in row) for row in rows), right
