"""Pictures as inline SVG, drawn by matplotlib's objects: no pyplot, no setting left changed.

They are narrow, so that a phone shows their text in a size that can be read; the page puts two side by side.
Legends are HTML, because names of any length wrap there. Colours are variables of the page's style.
"""

import dataclasses
import io
import math
import re
import warnings
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from markupsafe import Markup

from rlhf_jax.report.blocks import Bars, Cell, Frontier, Lines, Picture, Points
from rlhf_jax.report.wording import number, shortened, tick, visible

WIDTH, HEIGHT = 380, 265  # of a picture, in its own pixels
# Colours while drawing, and the variable that each becomes.
INK, SOFT, GRID, PAPER = "#111111", "#222222", "#333333", "#444444"
SERIES = tuple(f"#aa000{i}" for i in range(7))
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "card"} | {c: f"c{i}" for i, c in enumerate(SERIES)}
# Seven colours, six markers, four dashes: no two series of one picture look alike, also without colour.
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
SETTINGS: Any = {  # typed loosely: their keys are an enumeration of matplotlib's
    "svg.fonttype": "none", "svg.hashsalt": "rlhf_jax", "font.size": 12, "path.simplify_threshold": 0.3,
    "text.color": INK, "axes.edgecolor": SOFT, "axes.labelcolor": SOFT, "axes.titlecolor": SOFT,
    "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": GRID, "grid.linewidth": 0.8, "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "figure.dpi": 72,
    "xtick.labelsize": 12, "ytick.labelsize": 12, "axes.titlesize": 12, "axes.labelsize": 12,
    "lines.linewidth": 1.8, "lines.markersize": 5.5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A picture, its legend of (swatch, name), the same in numbers, and what had to be left out."""

    svg: Markup
    legend: tuple[tuple[Markup, str], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    omitted: tuple[str, ...]


def draw(block: Picture, prefix: str) -> Drawing:
    """Draws the block; every id in it begins with `prefix`. Not for several threads at once."""
    if isinstance(block, Bars):
        return _bars(block, prefix)
    if isinstance(block, Frontier):
        return _frontier(block, prefix)
    return _lines(block, prefix) if isinstance(block, Lines) else _points(block, prefix)


def _lines(block: Lines, prefix: str) -> Drawing:
    curves: dict[str, list[tuple[float, float]]] = {}
    omitted = []
    for name, (x, y) in block.series.items():
        pairs = [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
        curves[name] = [(a, b) for a, b in pairs if math.isfinite(a + b) and (b > 0 or not block.log_y)]
        omitted += _omitted(name, len(pairs) - len(curves[name]), len(pairs), block.log_y)

    def onto(axes: Any) -> None:
        if block.log_y:
            logarithmic(axes.yaxis, [b for curve in curves.values() for _, b in curve])
        for index, (name, curve) in enumerate(curves.items()):
            every = max(1, math.ceil(len(curve) / 8))
            axes.plot([a for a, _ in curve], [b for _, b in curve], markevery=every, **_look(index))
            if band := banded(block, name):
                axes.fill_between(*zip(*band, strict=True), color=_look(index)["color"], alpha=0.15, linewidth=0)
        _label(axes, block.x_label, block.y_label)

    rows = [
        (name, curve[0][1], curve[-1][1], min(b for _, b in curve), max(b for _, b in curve))
        for name, curve in curves.items()
        if curve
    ]
    alt = f"{block.title}. {block.y_label} against {block.x_label}: {', '.join(curves)}."
    columns = ("", "first", "last", "lowest", "highest")
    if block.bands:
        columns = ("", block.x_label, block.y_label, "low", "high")
        rows = [row for name in curves for row in _points_of(block, name)]
    return Drawing(_svg(onto, prefix, alt), _legend(prefix, curves), columns, tuple(rows), tuple(omitted))


def banded(block: Lines, name: str) -> list[tuple[float, float, float]]:
    """The band of a series, (x, low, high) where it can be drawn; [] if it has none."""
    if name not in block.bands:
        return []
    band = zip(block.series[name][0], *block.bands[name], strict=True)
    return [
        (float(x), float(a), float(b)) for x, a, b in band if math.isfinite(x + a + b) and (a > 0 or not block.log_y)
    ]


def _points_of(block: Lines, name: str) -> Iterator[tuple[Cell, ...]]:
    """A row a point, with the ends of its band if it has one."""
    x, y = block.series[name]
    low, high = block.bands.get(name, ([""] * len(x), [""] * len(x)))
    for a, b, *ends in zip(x, y, low, high, strict=True):
        if math.isfinite(float(a) + float(b)):
            yield name, a, b, *ends


def _points(block: Points, prefix: str) -> Drawing:
    finite = {name: point for name, point in block.points.items() if math.isfinite(sum(point))}
    omitted = [line for name in block.points if name not in finite for line in _omitted(name, 1, 1, False)]

    def onto(axes: Any) -> None:
        for index, point in enumerate(finite.values()):
            look = _look(index) | {"linestyle": "none", "markersize": 8}
            x, y, low, high = (*point, point[1], point[1])[:4]
            if len(point) > 2:
                axes.vlines(x, low, high, color=look["color"], linewidth=1.6)
            axes.plot([x], [y], **look)
        axes.margins(0.12)
        _label(axes, block.x_label, block.y_label)

    intervals = any(len(point) > 2 for point in finite.values())
    columns = ("", block.x_label, block.y_label) + (("low", "high") if intervals else ())
    rows = tuple((name, *point, *[""] * (len(columns) - 1 - len(point))) for name, point in finite.items())
    alt = f"{block.title}. {block.y_label} against {block.x_label}: {', '.join(finite)}."
    svg, legend = _svg(onto, prefix, alt), _legend(prefix, finite, joined=False)
    return Drawing(svg, legend, columns, rows, tuple(omitted))


@dataclasses.dataclass(frozen=True)
class Mean:
    """A point of a frontier: the seeds that can be drawn, and their mean."""

    label: str
    x: float
    y: float
    seeds: tuple[tuple[float, float], ...]


def means(block: Frontier) -> tuple[dict[str, list[Mean]], tuple[str, ...]]:
    """What of a frontier can be drawn, and a sentence for each curve of which something can't."""
    curves: dict[str, list[Mean]] = {}
    omitted = []
    for name, spots in block.curves.items():
        curves[name] = []
        for label, seeds in spots:
            good = tuple((float(x), float(y)) for x, y in seeds if math.isfinite(x + y) and (x > 0 or not block.log_x))
            if good:
                x, y = (sum(column) / len(good) for column in zip(*good, strict=True))
                curves[name].append(Mean(label, x, y, good))
        drawn, of = sum(len(mean.seeds) for mean in curves[name]), sum(len(seeds) for _, seeds in spots)
        omitted += _omitted(name, of - drawn, of, block.log_x)
    return curves, tuple(omitted)


def _frontier(block: Frontier, prefix: str) -> Drawing:
    curves, omitted = means(block)

    def onto(axes: Any) -> None:
        if block.log_x:
            logarithmic(axes.xaxis, [mean.x for curve in curves.values() for mean in curve])
        for index, curve in enumerate(curves.values()):
            look = _look(index)
            every = [seed for mean in curve if len(mean.seeds) > 1 for seed in mean.seeds]
            axes.plot(*_columns(every), ".", color=look["color"], alpha=0.45, markersize=4)
            axes.plot([mean.x for mean in curve], [mean.y for mean in curve], **look)
        _label(axes, block.x_label, block.y_label)
        if block.x_names:
            axes.set_xticks(range(len(block.x_names)), [shortened(name, 12) for name in block.x_names])
            for text in axes.get_xticklabels():
                text.set_parse_math(False)

    rows = [
        (name, mean.label, mean.x, mean.y, "; ".join(f"{number(x)}, {number(y)}" for x, y in mean.seeds))
        for name, curve in curves.items()
        for mean in curve
    ]
    alt = f"{block.title}. {block.y_label} against {block.x_label}: {', '.join(curves)}."
    columns = ("", "point", block.x_label, block.y_label, "every seed")
    return Drawing(_svg(onto, prefix, alt), _legend(prefix, curves), columns, tuple(rows), omitted)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _bars(block: Bars, prefix: str) -> Drawing:
    finite = {name: bar for name, bar in block.bars.items() if math.isfinite(sum(bar))}
    omitted = [line for name in block.bars if name not in finite for line in _omitted(name, 1, 1, False)]

    def onto(axes: Any) -> None:
        over = {"transform": axes.get_yaxis_transform(), "va": "center", "parse_math": False}
        for index, (name, (mean, low, high)) in enumerate(finite.items()):
            axes.barh(index, mean, height=0.42, color=SERIES[index % len(SERIES)], alpha=0.85)
            axes.hlines(index, low, high, color=INK, linewidth=1.4)
            axes.vlines([low, high], index - 0.1, index + 0.1, color=INK, linewidth=1.4)
            axes.text(0.008, index - 0.42, shortened(name, 28), ha="left", **over)
            said = f"{number(mean)}  ({number(low)} to {number(high)})"
            axes.text(1, index - 0.42, said, ha="right", color=SOFT, **over)
        axes.axvline(0, color=SOFT, linewidth=0.8)
        axes.set_ylim(max(len(finite), 1) - 0.6, -0.75)
        _label(axes, block.y_label, "")
        axes.yaxis.set_visible(False)
        axes.spines["left"].set_visible(False)

    rows = tuple((name, *bar) for name, bar in finite.items())
    alt = f"{block.title}. {block.y_label}: " + "; ".join(f"{name} {number(bar[0])}" for name, bar in finite.items())
    svg = _svg(onto, prefix, alt, height=62 + 50 * max(len(finite), 1))
    return Drawing(svg, (), ("", "mean", "low", "high"), rows, tuple(omitted))


def _omitted(name: str, left_out: int, of: int, log_y: bool) -> Iterator[str]:
    reason = "not finite" if not log_y else "not finite or not above zero"
    if left_out and left_out == of:
        yield f"{name} is not drawn: its values are {reason}."
    elif left_out:
        yield f"{name}: {left_out:,} of {of:,} values are {reason} and are left out."


def _look(index: int) -> dict[str, Any]:
    return {
        "color": SERIES[index % len(SERIES)], "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)], "markeredgecolor": PAPER, "markeredgewidth": 0.8,
    }  # fmt: skip


def _label(axes: Any, x_label: str, y_label: str) -> None:
    """Names the axes, y along the top where it can be read, with few ticks."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "linear":
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.set_xlabel(shortened(x_label, 46), parse_math=False)
    axes.set_title(shortened(y_label, 46), loc="left", parse_math=False)
    axes.grid(True)
    axes.tick_params(which="both", length=0)


def logarithmic(axis: Any, values: list[float]) -> None:
    """Gives an axis, of axes, powers of ten, or their steps 1, 2, 5 where the values lie close together."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    {"x": axis.axes.set_xscale, "y": axis.axes.set_yscale}[axis.axis_name]("log")
    narrow = bool(values) and max(values) < 100 * min(values)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axis.set_minor_formatter(NullFormatter())


def _legend(prefix: str, names: Any, joined: bool = True) -> tuple[tuple[Markup, str], ...]:
    def swatch(index: int) -> Markup:
        def onto(axes: Any) -> None:
            look = _look(index) | ({} if joined else {"linestyle": "none", "markersize": 7})
            axes.plot([0, 1, 2], [0, 0, 0], markevery=[1], clip_on=False, **look)
            axes.axis("off")

        return _svg(onto, f"{prefix}s{index}-", "", width=34, height=14)

    return tuple((swatch(index), name) for index, name in enumerate(names))


def _svg(onto: Callable[[Any], None], prefix: str, alt: str, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    """What `onto` draws on axes of this size; without `alt` it is decoration."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's own font lacks; only a width is guessed here.
        warnings.filterwarnings("ignore", message=r"Glyph|Matplotlib currently does not support")
        matplotlib.rcdefaults()  # whatever a matplotlibrc of the user's says
        matplotlib.rcParams.update(SETTINGS)
        figure = Figure((width / 72, height / 72), layout="constrained")
        onto(figure.subplots())
        written = io.StringIO()
        figure.savefig(
            written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _inline(written.getvalue(), prefix, alt)


def _inline(document: str, prefix: str, alt: str) -> Markup:
    """An SVG document as an element of a page: no name spaces, styles or ids that could meet another's."""
    root = xml.etree.ElementTree.fromstring(document)
    for element in list(root.iter()):
        element.tag = _local(element.tag)
        for child in [child for child in element if _local(child.tag) in ("style", "metadata")]:
            element.remove(child)
        attributes = {_local(key): _attribute(_local(key), value, prefix) for key, value in element.attrib.items()}
        if element.tag == "g":
            attributes.pop("id", None)  # nothing refers to a group
        element.attrib.clear()
        element.attrib.update(attributes)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": visible(alt)} if alt else {"aria-hidden": "true"})
    text = xml.etree.ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
    return Markup(re.sub(r">\s+<", "><", text).strip())


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        for colour, variable in VARIABLES.items():
            value = value.replace(colour, f"var(--{variable})")
    elif value.startswith(("#", "url(#")):
        value = value.replace("#", f"#{prefix}", 1)
    return " ".join(value.split())
