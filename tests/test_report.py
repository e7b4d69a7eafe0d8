"""A report is one file that asks for nothing, shows what anybody wrote as text, and is the same every time."""

import dataclasses
import html.parser
import math
import re

import matplotlib
import numpy as np
import pytest

from rlhf_jax import report
from rlhf_jax.errors import UserError
from rlhf_jax.report import Bars, Code, Lines, Points, Samples, Table, Text

# Everything that a model, a path or a config might hold and a page must not obey.
HOSTILE = (
    "<script>alert(1)</script> ' \" & </svg></style></pre> {{ 7 * 7 }} $x_1$ --> \x00\x1b[31m \u202eabc \ud800 \ufffe"
)
FETCHING = re.compile(
    r"\s(src|href|srcset|data|action|poster|background|formaction)=|url\((?!#)|@import|<link|<base", re.I
)
VOID = {"meta", "br", "hr", "img", "link", "input"}


def every_block(word: str) -> list[report.Block]:
    return [
        Text(f"text {word}", [word, "second"], note=word),
        Table(f"table {word}", ("method", word), ((word, 0.12345), ("b", 2))),
        Lines(f"lines {word}", word, word, {word: ([0, 1, 2], [1.0, 2.0, 1.5]), "b": ([0, 2], [3, 4])}, word),
        Points(f"points {word}", word, word, {word: (0.0, 1.0), "b": (1.0, 2.0, 1.5, 2.5)}, word),
        Bars(f"bars {word}", word, {word: (0.5, 0.4, 0.6), "b": (-0.1, -0.2, 0.1)}, word),
        Samples(f"samples {word}", (word, "b"), ((word, ((word, 1.0), ("", None))),), word),
        Code(f"code {word}", word, word),
    ]


class Page(html.parser.HTMLParser):
    """What a browser would make of it: elements, attributes and texts; tags must be balanced."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.ids, self.attributes, self.texts = [], [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def hostile() -> str:
    return report.render(HOSTILE, every_block(HOSTILE), subtitle=HOSTILE)


def test_what_anybody_wrote_is_text(hostile):
    page = Page(hostile)
    assert not {"script", "iframe", "img", "object", "embed", "a"} & set(page.tags)
    assert page.tags.count("style") == 1, "matplotlib's own style would reach the whole page"
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    shown = "<script>alert(1)</script> ' \" & </svg></style></pre> {{ 7 * 7 }} $x_1$ --> ‹U+0000›‹U+001B›[31m ‹U+202E›"
    for title in ("text", "table", "lines", "points", "bars", "samples", "code"):
        assert any(text.startswith(f"{title} {shown}") for text in page.texts), title
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff\ufffe\uffff]", hostile)
    assert hostile.encode()


def test_nothing_is_fetched(hostile):
    outside = [a for a in Page(hostile).attributes if a[1] in ("src", "href", "xlink:href") and a[2][0] != "#"]
    assert not outside
    plain = report.render("t", every_block("w"))
    found = {hit[0] for hit in FETCHING.finditer(plain)} - {" href="}
    assert not found and "http:" not in plain and "https:" not in plain and "//" not in plain
    policy = ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'")
    assert (
        policy in Page(plain).attributes and ("meta", "http-equiv", "Content-Security-Policy") in Page(plain).attributes
    )


def test_ids_are_unique_and_all_that_is_referred_to_is_there(hostile):
    page = Page(report.render("t", every_block("w") * 2))
    assert len(set(page.ids)) == len(page.ids)
    referred = [value[1:] for _, name, value in page.attributes if name == "href"]
    referred += [value for _, name, value in page.attributes if name == "aria-labelledby"]
    referred += [value[5:-1] for _, name, value in page.attributes if name == "clip-path"]
    assert len(referred) > 40 and set(referred) <= set(page.ids)


def test_the_same_blocks_give_the_same_bytes_whatever_the_settings(tmp_path):
    first = report.write(tmp_path / "new" / "report.html", "t", every_block("w"))
    with matplotlib.rc_context({"axes.xmargin": 0.3, "axes.facecolor": "red", "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        second = report.write(tmp_path / "second.html", "t", every_block("w"))
        assert dict(matplotlib.rcParams) == before
    assert first.read_bytes() == second.read_bytes()
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["new", "report.html", "second.html"]


def test_numbers_stand_to_three_digits_on_the_right():
    rows = (("dpo", 0.123456, 12_345, np.float32(-0.5)), ("ppo", 2e-5, 7, math.nan))
    page = report.render("t", [Table("t", ("method", "a", "b", "c"), rows)])
    cells = re.findall(r'<td class="number">(.*?)</td>', page)
    assert cells == ["0.123", "12,345", "−0.500", "2.00e−5", "7", "nan"]
    assert re.findall(r'<th scope="row">(.*?)</th>', page) == ["dpo", "ppo"]


def test_what_cannot_be_drawn_is_told():
    gap = {"dpo": ([0, 1, 2], [1.0, math.nan, 2.0]), "ppo": ([0, 1], [math.inf, math.nan])}
    page = report.render("t", [Lines("t", "x", "y", gap), Bars("u", "y", {"sft": (math.nan, 0, 1)})])
    assert "dpo: 1 of 3 values are not finite and are left out." in page
    assert "ppo is not drawn: its values are not finite." in page and "sft is not drawn" in page
    log = report.render("t", [Lines("t", "x", "y", {"dpo": ([0, 1], [0.0, 2.0])}, log_y=True)])
    assert "dpo: 1 of 2 values are not finite or not above zero and are left out." in log


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("y", [[5.0], [1e-30, 1e30], [1.0, 1.0], [1e-5, 1.00001e-5]])
def test_any_scale_is_drawn(y, log_y):
    page = report.render(
        "t", [Lines("学習曲線 مرحبا", "ステップ", "報酬 🙂", {"方策": (range(len(y)), y)}, log_y=log_y)]
    )
    assert "is not drawn" not in page and "報酬 🙂" in page


def test_nothing_to_show_is_said():
    empty = [
        lambda: report.render("t", []), lambda: Table("t", ("a",), ()), lambda: Lines("t", "x", "y", {}),
        lambda: Lines("t", "x", "y", {"dpo": ([], [])}), lambda: Points("t", "x", "y", {}),
        lambda: Bars("t", "y", {}), lambda: Samples("t", ("a",), ()), lambda: Text("t", ()), lambda: Code("t", ""),
    ]  # fmt: skip
    for make in empty:
        with pytest.raises(UserError, match="'t'"):
            make()


def test_what_does_not_fit_together_is_a_fault():
    for make in (
        lambda: Table("t", ("a", "b"), (("x",),)),
        lambda: Lines("t", "x", "y", {"dpo": ([0, 1], [0])}),
        lambda: Samples("t", ("a", "b"), (("p", (("x", None),)),)),
    ):
        with pytest.raises(ValueError, match="entries, not"):
            make()


def test_pictures_stand_in_pairs():
    picture = Points("t", "x", "y", {"a": (0, 1)})
    halves = lambda *blocks: [" half" in s for s in re.findall(r'<section class="(.*?)"', report.render("t", blocks))]
    words = Text("t", ["w"])
    assert halves(picture, picture, picture) == [True, True, False]
    assert halves(picture, words, picture, picture) == [False, False, True, True]


def test_blocks_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Text("t", ["w"]).title = "u"  # pyright: ignore[reportAttributeAccessIssue]
