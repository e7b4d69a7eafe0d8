"""What data files are taken for, on a terminal: a page for one file, a line or two for each of several.

Rows are other people's text: nothing in them is markup, and what can't be seen is named in its place.
"""

import itertools
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rlhf_jax.data.conversions import HOLDS
from rlhf_jax.data.inspection import Found, Piece
from rlhf_jax.report.wording import visible

MOST = 600  # characters of one piece that are shown
STYLES = {"prompt": "cyan", "trained": "green"}
FIRST = 5  # reasons named of each kind


def page(found: Found, length: int | None) -> Group:
    """Everything that was found out about one file."""
    return Group(_facts(found, length), *_reasons(found), *_samples(found))


def _facts(found: Found, length: int | None) -> Table:
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in _lines(found, length):
        facts.add_row(name, Text(value))
    return facts


def _lines(found: Found, length: int | None) -> Iterator[tuple[str, str]]:
    yield "file", visible(found.path)
    yield "format", found.format + (f" (or read as {', '.join(found.others)})" if found.others else "")
    yield "rows", f"{found.read} read, {len(found.refused)} refused, {len(found.left)} left out"
    yield "kind", f"{HOLDS[found.kind]}: {found.rows}"
    yield from found.facts
    median, high, longest = found.typical
    yield found.unit, f"median {median}, 95% are at most {high}, longest {longest}"
    if found.unit == "tokens":
        split = f"{found.in_pieces} would be cut into pieces, " * (found.in_pieces > 0)
        over = f"{found.cut} would lose the beginning of their prompt, {split}{found.too_long} would be left out"
        yield "over the length", "no length is known; give --length" if length is None else f"{over} ({length} tokens)"
    if found.note:
        yield "no tokens", found.note


def _reasons(found: Found) -> Iterator[RenderableType]:
    for rows, what in ((found.refused, "refused"), (found.left, "left out")):
        if rows:
            more = f", the first {FIRST}" if len(rows) > FIRST else ""
            yield Text(f"\n{what}: {len(rows)}{more}", "bold")
            yield from (Text(visible(f"  {where}: {why}"), overflow="fold") for where, why in rows[:FIRST])


def _samples(found: Found) -> Iterator[RenderableType]:
    for sample in found.samples:
        yield Text(visible(f"\n{sample.where}"), "bold", overflow="fold")
        for number, (name, pieces) in enumerate(sample.parts):
            yield Text(f"  {name}", "italic")
            # The prompt is the same before every completion of a row, so it is shown once.
            again = number > 0 and len(pieces) > 1
            yield _column(_merged(pieces), again)


def _merged(pieces: Sequence[Piece]) -> list[tuple[str, Text]]:
    """Runs of pieces of one role, each as one text."""
    runs: list[tuple[str, Text]] = []
    for piece in pieces:
        if not runs or runs[-1][0] != piece.role:
            runs.append((piece.role, Text()))
        style = f"bold {STYLES[piece.role]}" if piece.special else STYLES[piece.role]
        runs[-1][1].append(visible(piece.text).replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n"), style)
    for _, text in runs:
        if text.plain.endswith("\n"):  # the arrow says it
            text.right_crop(1)
    return runs


def _column(runs: list[tuple[str, Text]], again: bool) -> Table:
    """Each run behind its role, so that they can be told apart without colour."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", width=11)
    table.add_column(width=1)
    table.add_column(overflow="fold")
    for place, (role, text) in enumerate(runs):
        if again and place == 0 and role == "prompt":
            text = Text("(as above)", "dim")
        name = "not trained" if place and role == "prompt" else role
        table.add_row(Text(name, STYLES[role]), "|", _shortened(text))
    return table


def _shortened(text: Text) -> Text:
    """The beginning and the end of a long text, with what stands between counted."""
    if len(text) <= MOST:
        return text
    gap = Text(f" ... {len(text) - MOST} characters more ... ", "dim")
    return Text.assemble(text[: MOST // 2], gap, text[-(MOST // 2) :])


def _clause(sentence: str) -> str:
    """What is wrong, without what to do about it."""
    return sentence.partition("; ")[0]


def several(found: Sequence[tuple[str, Found | str]], length: int | None, console: Console) -> Group:
    """What each of several files was taken for, or the sentence that says why it can't be read.

    A table in Markdown if the console is wide enough for it, else a name and a line or two for each file.

    Args:
      found: each file's name with what was found out about it.
    """
    good = [(name, one) for name, one in found if isinstance(one, Found)]
    drawn = _table(good, length)
    needs = Measurement.get(console, console.options.update(max_width=10**4), drawn).maximum
    if not good or needs > console.width:
        drawn = Group(*itertools.starmap(_brief, good))
    bad = [Text(visible(_clause(why)), overflow="fold") for _, why in found if isinstance(why, str)]
    notes = [Text(visible(f"{name}: counted in words, for {one.note}")) for name, one in good if one.note]
    return Group(drawn, *bad, *notes)


def _brief(name: str, found: Found) -> Text:
    figures = f"{len(found.refused):,} refused, {len(found.left):,} left out"
    kind = f"{found.format}: {found.rows:,} {_kind(found)}"
    median, _, longest = found.typical
    lengths = f"median {median:,} {found.unit}, longest {longest:,}"
    return Text.assemble((visible(name), "bold"), f"\n  {found.read:,} rows of {kind}, {figures}, {lengths}")


def _kind(found: Found) -> str:
    return found.kind.__name__.lower()


def _table(found: Sequence[tuple[str, Found]], length: int | None) -> Table:
    unit = " and ".join(dict.fromkeys(one.unit for _, one in found)) or "words"
    drawn = Table(box=box.MARKDOWN)
    names = ["file", "format", "rows", "kind", "examples", "refused / left", f"{unit}: median / longest"]
    for name in [*names, *([] if length is None else [f"over {length}"])]:
        drawn.add_column(name, justify="left" if name in ("file", "format", "kind") else "right")
    for name, one in found:
        median, _, longest = one.typical
        figures = [f"{one.rows:,}", f"{len(one.refused):,} / {len(one.left):,}", f"{median:,} / {longest:,}"]
        over = [] if length is None else [f"{one.cut + one.in_pieces + one.too_long:,}"]
        drawn.add_row(Text(visible(name)), one.format, f"{one.read:,}", _kind(one), *figures, *over)
    return drawn
