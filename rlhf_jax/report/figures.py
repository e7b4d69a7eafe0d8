"""Pictures as PNG files, for pages that can't hold the report's: a README, a paper, a message.

Drawn by matplotlib's objects on white: no pyplot, no setting left changed, and the same block gives the same bytes
under one version of matplotlib.
"""

import io
import math
import os
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from rlhf_jax.errors import UserError
from rlhf_jax.report.blocks import Frontier, Lines
from rlhf_jax.report.pictures import DASHES, banded, logarithmic, means
from rlhf_jax.report.wording import shortened, tick, visible

WIDTH, HEIGHT = 9.0, 5.6  # inches; on a page 900 pixels wide an inch is 100 of them
DPI = 150
INK, SOFT, GRID = "#1c2128", "#57606a", "#e3e7ec"
# Told apart by eyes that see fewer colours too (after Okabe and Ito 2008, Color Universal Design).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b3589a", "#d99000", "#45a5de", "#555f6b")
MARKERS = ("o", "s", "^", "D", "v", "<")
SETTINGS: Any = {  # typed loosely: their keys are an enumeration of matplotlib's
    "figure.dpi": DPI, "figure.facecolor": "white", "axes.facecolor": "white", "font.size": 11, "text.color": INK,
    "axes.edgecolor": SOFT, "axes.labelcolor": INK, "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "lines.linewidth": 1.8, "lines.markersize": 6.5, "axes.labelsize": 11,
}  # fmt: skip
# Where a label may stand beside its point: points to the right and above, and how it is aligned.
PLACES = (
    (7, 4, "left", "bottom"), (7, -4, "left", "top"), (-7, 4, "right", "bottom"), (-7, -4, "right", "top"),
    (0, 8, "center", "bottom"), (0, -8, "center", "top"), (9, 0, "left", "center"), (-9, 0, "right", "center"),
    (12, 10, "left", "bottom"), (12, -10, "left", "top"), (-12, 10, "right", "bottom"), (-12, -10, "right", "top"),
)  # fmt: skip
Look = dict[str, Any]
Name = tuple[str, float, float, str]  # of a point: its label, where it lies, its colour
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


def save(block: Lines | Frontier, path: str | os.PathLike[str]) -> epath.Path:
    """Writes the picture whole or not at all, and its folder where that is missing; returns its path.

    Not for several threads at once. What can't be drawn is left out, and the picture says so.

    Errors: UserError where nothing of it can be drawn.
    """
    content = _drawn(block)
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.parent / (file.name + ".part")
    part.write_bytes(content)
    part.replace(file)
    return file


def _drawn(block: Lines | Frontier) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph|Matplotlib currently does not support")
        matplotlib.rcdefaults()  # whatever a matplotlibrc of the user's says
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure((WIDTH, HEIGHT), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        shown, omitted, spots = (_lines if isinstance(block, Lines) else _frontier)(axes, block)
        if not shown:
            raise UserError(f"the picture {block.title!r} has nothing to show: {' '.join(omitted)}")
        _frame(figure, axes, block, omitted)
        if set(shown) - set(getattr(block, "x_names", ())):  # the axis has not named them all
            _legend(figure, shown)
        canvas.draw()
        figure.set_layout_engine("none")  # what follows must not move what is there
        _name(axes, canvas.get_renderer(), spots)
        written = io.BytesIO()
        canvas.print_png(written, metadata={"Software": None})
    return written.getvalue()


def _look(index: int, joined: bool = True) -> Look:
    return {
        "color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)] if joined else "",
        "marker": MARKERS[index % len(MARKERS)], "markeredgecolor": "white", "markeredgewidth": 0.9,
    }  # fmt: skip


def _lines(axes: Any, block: Any) -> tuple[dict[str, Look], list[str], list[Name]]:
    """Draws; returns each drawn name with its look, what is left out, and no points to name."""
    shown, omitted, low = {}, [], 0.0 if block.log_y else -math.inf
    for index, (name, (x, y)) in enumerate(block.series.items()):
        points = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
        good = [(a, b) for a, b in points if math.isfinite(a + b) and b > low]
        if lost := len(points) - len(good):
            omitted.append(f"{name}: {lost:,} of {len(points):,} values can't be drawn.")
        if good:
            shown[name] = _look(index)
            every = max(1, math.ceil(len(good) / 10))
            axes.plot([a for a, _ in good], [b for _, b in good], markevery=every, **shown[name])
            if band := banded(block, name):
                axes.fill_between(*zip(*band, strict=True), color=shown[name]["color"], alpha=0.15, linewidth=0)
    if block.log_y and shown:
        logarithmic(axes.yaxis, [y for line in axes.lines for y in line.get_ydata()])
    return shown, omitted, []


def _frontier(axes: Any, block: Any) -> tuple[dict[str, Look], list[str], list[Name]]:
    """Draws; returns each drawn name with its look, what is left out, and the means that have a label."""
    curves, omitted = means(block)
    shown = {name: _look(i, len(curve) > 1) for i, (name, curve) in enumerate(curves.items()) if curve}
    if block.log_x and shown:
        values = sorted({mean.x for curve in curves.values() for mean in curve})
        logarithmic(axes.xaxis, values)
        if len(values) <= 10:
            axes.set_xticks(values)
    for name, look in shown.items():
        for mean in curves[name]:
            if len(mean.seeds) > 1:
                xs, ys = zip(*mean.seeds, strict=True)
                axes.scatter(xs, ys, s=14, color=look["color"], alpha=0.4, linewidths=0, zorder=1.5)
        axes.plot([mean.x for mean in curves[name]], [mean.y for mean in curves[name]], **look)
    axes.margins(0.07)
    names = [(m.label, m.x, m.y, look["color"]) for name, look in shown.items() for m in curves[name] if m.label]
    return shown, list(omitted), names


def _frame(figure: Any, axes: Any, block: Lines | Frontier, omitted: Sequence[str]) -> None:
    """Title, axes, and in small the note and what is left out."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(7))
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if isinstance(block, Frontier) and block.x_names:
        long = max(map(len, block.x_names)) * len(block.x_names) > 70
        names = [shortened(name, 28) for name in block.x_names]
        axes.set_xticks(range(len(names)), names, rotation=25 if long else 0, ha="right" if long else "center")
        for text in axes.get_xticklabels():
            text.set_parse_math(False)
    axes.set_xlabel(shortened(block.x_label, 90), parse_math=False)
    axes.set_ylabel(shortened(block.y_label, 60), parse_math=False)
    axes.grid(True)
    axes.tick_params(which="both", length=0)
    told = textwrap.wrap(visible(" ".join([block.note, *omitted])), 118, max_lines=4, placeholder=" …")
    under = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 9.5, "color": SOFT}
    axes.annotate("\n".join(told), (0, 1), (0, 7), va="bottom", linespacing=1.25, parse_math=False, **under)
    title = "\n".join(textwrap.wrap(visible(block.title), 76)[:3])
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=11 + 13 * len(told), parse_math=False)


def _legend(figure: Any, shown: Mapping[str, Look]) -> None:
    """Below the axes, in as many columns as the longest name leaves room for."""
    from matplotlib.lines import Line2D

    names = [shortened(name, 60) for name in shown]
    columns = max(1, min(4, len(names), 100 // (max(map(len, names)) + 9)))
    handles = [Line2D([], [], **look) for look in shown.values()]
    # A name may begin with _ or hold a $, which mean something in a legend until it stands.
    legend = figure.legend(
        handles, [str(i) for i in range(len(names))], loc="outside lower left", ncols=columns, frameon=False,
        fontsize=10.5, handlelength=3.4, columnspacing=1.6,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
        text.set_parse_math(False)


def _name(axes: Any, renderer: Any, spots: Sequence[Name]) -> None:
    """Writes each label beside its point where it covers nothing; one that fits nowhere is left away."""
    from matplotlib.patheffects import withStroke

    frame = axes.get_window_extent(renderer)
    dots = [tuple(dot) for some in axes.collections for dot in axes.transData.transform(some.get_offsets())]
    lines = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    strokes = [stroke for line in lines for stroke in _along(line)]
    spots_at = [(float(x), float(y)) for line in lines for x, y in line]
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in spots_at]
    for label, x, y, colour in spots:
        free = []
        for place, (right, up, ha, va) in enumerate(PLACES):
            text = axes.annotate(
                shortened(label, 24), (x, y), (right, up), textcoords="offset points", ha=ha, va=va, fontsize=9,
                color=colour, parse_math=False, path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            left, bottom, end, top = map(float, text.get_window_extent(renderer).extents)
            box = (left, bottom, end, top)
            inside = frame.x0 <= left and end <= frame.x1 and frame.y0 <= bottom and top <= frame.y1
            on = lambda points, box=box: sum(box[0] < a < box[2] and box[1] < b < box[3] for a, b in points)
            near = min(spots_at, key=lambda spot, box=box: _gap(box, *spot))
            ours = _gap(box, *near) >= _gap(box, *axes.transData.transform((x, y)))
            covers = not (inside and ours) or any(_meet(box, other) for other in taken) or on(strokes) > 0
            free.append((covers, on(dots), place, box, text))
        best = min(free, key=lambda one: one[:3])
        for one in free:
            if one is not best or one[0]:
                one[-1].remove()
        if not best[0]:
            taken.append(best[3])


def _along(line: Any) -> Iterator[tuple[float, float]]:
    """Points a few pixels apart along a line, to see what crosses it."""
    for (x, y), (to_x, to_y) in zip(line, line[1:], strict=False):
        parts = max(1, int(math.hypot(to_x - x, to_y - y) / 4))
        yield from ((x + (to_x - x) * i / parts, y + (to_y - y) * i / parts) for i in range(parts + 1))


def _gap(box: Box, x: float, y: float) -> float:
    """How far a point lies from a box."""
    return math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3]))


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
