"""Figures: what is drawn is on the file, readable, and the same every time."""

import io
import math

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from rlhf_jax import report
from rlhf_jax.errors import UserError
from rlhf_jax.report import Frontier, Lines
from rlhf_jax.report.figures import COLOURS, WIDTH, save
from rlhf_jax.report.pictures import means

LINES = Lines("Margins", "step", "reward", {"dpo": ([0, 1, 2], [0.0, 1.0, 1.5]), "_ipo $x$": ([0, 2], [0.5, 0.75])})
FRONTIER = Frontier(
    "Frontier", "KL", "score",
    {
        "dpo": [("beta 0.1", [(1.0, 2.0), (3.0, 4.0)]), ("beta 1", [(0.5, 1.0)])],
        "start": [("", [(0.0, 0.25), (0.0, 0.5)])],
    },
)  # fmt: skip


def pixels(block, tmp_path) -> np.ndarray:
    """The picture as whole numbers [height, width, 3]."""
    return np.asarray(
        imread(io.BytesIO(save(block, tmp_path / "new" / "f.png").read_bytes()))[..., :3] * 255 + 0.5, int
    )


def count(image: np.ndarray, colour: str) -> int:
    """How many pixels have this colour, exactly."""
    return int(np.all(image == [int(colour[i : i + 2], 16) for i in (1, 3, 5)], axis=-1).sum())


def colours(image: np.ndarray) -> int:
    return len(np.unique(image @ [65536, 256, 1]))


@pytest.mark.parametrize("block", [LINES, FRONTIER], ids=["lines", "frontier"])
def test_the_picture_opens_is_white_and_shows_every_curve(block, tmp_path):
    image = pixels(block, tmp_path)
    height, width, _ = image.shape
    assert width == WIDTH * 150 and 0.5 < height / width < 0.8
    assert (image[0, 0] == 255).all() and count(image, "#ffffff") > 0.8 * height * width
    assert colours(image) > 100
    for colour in COLOURS[:2]:
        assert count(image, colour) > 30, colour
    assert count(image, COLOURS[2]) == 0
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["f.png"]


def test_the_same_block_gives_the_same_bytes_whatever_the_settings(tmp_path):
    first = save(FRONTIER, tmp_path / "a.png").read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "red", "lines.linewidth": 9, "savefig.dpi": 10}):
        before = dict(matplotlib.rcParams)
        assert save(FRONTIER, tmp_path / "b.png").read_bytes() == first
        assert dict(matplotlib.rcParams) == before
    assert b"Software" not in first and b"tIME" not in first and b"Creation" not in first


def test_a_curve_goes_through_the_means_of_its_seeds():
    curves, omitted = means(FRONTIER)
    assert [(m.label, m.x, m.y, len(m.seeds)) for m in curves["dpo"]] == [("beta 0.1", 2, 3, 2), ("beta 1", 0.5, 1, 1)]
    assert [(m.x, m.y) for m in curves["start"]] == [(0, 0.375)] and not omitted


def test_what_is_not_finite_is_left_out_and_told():
    block = Frontier("t", "x", "y", {"a": [("", [(math.nan, 1.0), (1.0, 2.0)]), ("", [(1.0, math.inf)])]})
    curves, omitted = means(block)
    assert [(m.x, m.y) for m in curves["a"]] == [(1, 2)]
    assert omitted == ("a: 2 of 3 values are not finite and are left out.",)
    assert omitted[0] in report.render("t", [block])


def test_nothing_to_draw_leaves_no_file(tmp_path):
    for block in (
        Lines("t", "x", "y", {"a": ([0], [math.nan])}),
        Lines("t", "x", "y", {"a": ([0], [0.0])}, log_y=True),
        Frontier("t", "x", "y", {"a": [("", [(0.0, 1.0)])]}, log_x=True),
    ):
        with pytest.raises(UserError, match="'t' has nothing to show"):
            save(block, tmp_path / "f.png")
    for empty in ({}, {"a": []}, {"a": [("label", [])]}):
        with pytest.raises(UserError, match="'t'"):
            Frontier("t", "x", "y", empty)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["$x_1$ \\frac{", "_hidden", "学習 مرحبا 🙂", "a\x00b\ud800", "word " * 40, ""])
def test_any_text_is_drawn(word, tmp_path):
    curve = [(word, [(1.0, 2.0), (1.5, 2.5)])]
    for block in (
        Lines(word, word, word, {word: ([0, 1], [1, 2])}, word),
        Frontier(word, word, word, {word: curve, "b": curve}, word),
        Frontier(word, word, word, {word: curve}, word, x_names=[word, "$b$", "c"]),
    ):
        assert colours(pixels(block, tmp_path)) > 50
        assert "is not drawn" not in report.render("t", [block])


@pytest.mark.parametrize("curves", [1, 12, 40])
@pytest.mark.parametrize("y", [[5.0], [1e-30, 1e30], [1.0, 1.0]])
def test_any_scale_and_number_of_curves_is_drawn(y, curves, tmp_path):
    x = list(range(1, len(y) + 1))
    series = {f"method number {i}": (x, y) for i in range(curves)}
    spots = [(f"beta {a}", [(float(a), b)]) for a, b in zip(x, y, strict=True)]
    pixels(Lines("t", "x", "y", series, log_y=True), tmp_path)
    pixels(Frontier("t", "x", "y", dict.fromkeys(series, spots), log_x=True), tmp_path)


def test_labels_cover_neither_each_other_nor_a_point(tmp_path):
    """Drawn with and without labels, a crowded picture has the same markers."""
    rng = np.random.default_rng(0)
    spots = {f"m{i}": [(f"beta {j}", [tuple(rng.random(2))]) for j in range(8)] for i in range(5)}
    bare = {name: [("", seeds) for _, seeds in curve] for name, curve in spots.items()}
    named, plain = (pixels(Frontier("t", "x", "y", curves), tmp_path) for curves in (spots, bare))
    assert (named != plain).any(), "no label was drawn"
    for colour in COLOURS[:5]:
        of_curve = np.all(plain == [int(colour[i : i + 2], 16) for i in (1, 3, 5)], axis=-1)
        changed = np.any(named != plain, axis=-1) & of_curve
        assert changed.sum() < 0.01 * of_curve.sum()


def test_the_report_draws_a_frontier_with_every_seed_in_numbers():
    page = report.render("t", [FRONTIER])
    assert page.count("<svg") == 1 + len(FRONTIER.curves) and "beta 0.1" in page
    assert "1.00, 2.00; 3.00, 4.00" in page
