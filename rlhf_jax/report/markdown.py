"""Blocks of a report as Markdown, for pages that stand beside the code; pictures are files that they name."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from rlhf_jax.report.blocks import Block, Cell, Code, Frontier, Lines, Table, Text
from rlhf_jax.report.wording import number, visible


def markdown(title: str, blocks: Sequence[Block], pictures: Mapping[str, str], plain: Collection[str] = ()) -> str:
    """A page: each block a section below its title, a picture without one.

    Args:
      blocks: tables, texts, code, and pictures that have a file.
      pictures: by a picture's title the file that it was saved to, as the page names it.
      plain: titles that the page doesn't show: these blocks go on with what stands before them.
    Raises: KeyError for a picture without a file, TypeError for a block that Markdown has no form for.

    >>> print(markdown("A study", [Table("Figures", ["name", "value"], [["a|b", 0.5]], "Note.")], {}), end="")
    # A study
    <BLANKLINE>
    ## Figures
    <BLANKLINE>
    | name | value |
    | --- | ---: |
    | a\\|b | 0.500 |
    <BLANKLINE>
    Note.
    """
    parts = [f"# {title}"]
    for block in blocks:
        if block.title not in plain and not isinstance(block, Lines | Frontier):
            parts.append(f"## {block.title}")
        parts += _body(block, pictures)
        parts += [block.note] if block.note else []
    return "\n\n".join(parts) + "\n"


def _body(block: Block, pictures: Mapping[str, str]) -> Iterator[str]:
    if isinstance(block, Table):
        yield table(block.columns, block.rows)
    elif isinstance(block, Text):
        yield from block.paragraphs
    elif isinstance(block, Code):
        yield f"```sh\n{block.text}\n```"
    elif isinstance(block, Lines | Frontier):
        yield f"![{block.title}]({pictures[block.title]})"
    else:
        raise TypeError(f"{type(block).__name__} {block.title!r} has no form in Markdown")


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table; numbers are shown as on the other pages and stand on the right, as columns of them do."""
    right = [any(not isinstance(cell, str) for cell in column) for column in zip(*rows, strict=True)]
    said = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    lines = [list(columns), ["---:" if one else "---" for one in right], *said]
    escaped = lambda cell: visible(cell).replace("|", "\\|").replace("\n", " ")
    return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines)
