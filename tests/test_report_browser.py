"""The report in a real browser: everything has a size, nothing is fetched, no page is wider than its window."""

import html
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from rlhf_jax import report
from rlhf_jax.report import Bars, Code, Lines, Points, Samples, Table, Text

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")

LONG = "unbroken" * 60
WILD = f"\u202e{LONG} " + "e" + "\u0301" * 300 + " مرحبا\x00\n\tindented <script>document.title = 'ran'</script>"
BLOCKS = [
    Text(LONG, [WILD]),
    Table("table", ["method", *[f"a column {i}" for i in range(12)]], [[LONG, *range(12)], ["b", *[0.5] * 12]], WILD),
    Lines("lines", LONG, LONG, {LONG: ([0, 1, 2], [1, 2, 3]), "b": ([0, 1], [3e-9, 2e9])}, log_y=True),
    Points("points", "x", "y", {f"{i} {LONG[: 10 * i]}": (i, i * i, i, 2 * i * i) for i in range(9)}),
    Bars("bars", LONG, {f"{i} {LONG}": (-0.1 * i, -0.5, 0.5) for i in range(5)}),
    Samples("samples", ("a", LONG, "c"), [(WILD, ((WILD, 1.0), ("short", None), ("", 0.0)))] * 2),
    Code("code", LONG * 3),
]
# Reads a frame of the page as it was written: its policy forbids scripts inside, not the window around it.
MEASURE = """
const size = (frame) => {
  const page = frame.contentDocument, root = page.documentElement, text = [...page.querySelectorAll(".text")];
  const boxes = (query) => [...page.querySelectorAll(query)].map((e) => e.getBoundingClientRect());
  const visible = (box) => box.width > 0 && box.height > 0;
  return {
    width: root.clientWidth, scrolls: root.scrollWidth, title: page.title,
    pictures: boxes("svg").map(visible), rows: boxes(".table tr").map(visible),
    wider: boxes("section *:not(.scroll *):not(pre *):not(svg *)").filter((b) => b.right > root.clientWidth + 1).length,
    columns: boxes("article:first-of-type .columns > div").map((b) => Math.round(b.top)),
    spaces: text.every((e) => page.defaultView.getComputedStyle(e).whiteSpace.startsWith("pre-wrap")),
  };
};
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(size);
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
};
"""


def browse(file: pathlib.Path, profile: pathlib.Path, *flags: str) -> str:
    """The page's elements after it has loaded."""
    assert BROWSER
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    own = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--disable-extensions")
    command = [BROWSER, *own, *quiet, *flags, "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def fetched(file: pathlib.Path, folder: pathlib.Path) -> set[str]:
    """The addresses that a page asks the network for; those that the browser asks for by itself have no origin."""
    log = folder / f"{file.stem}.json"
    browse(file, folder / "profile", "--proxy-server=http://127.0.0.1:9", f"--log-net-log={log}")
    events = [json.loads(line.rstrip(",\n")) for line in log.read_text().splitlines() if '"initiator":' in line]
    assert all("url" in event["params"] for event in events)
    return {event["params"]["url"] for event in events if event["params"]["initiator"] != "not an origin"}


def test_nothing_is_fetched(tmp_path):
    telltale = tmp_path / "telltale.html"
    telltale.write_text("<!DOCTYPE html><img src='http://telltale.invalid/picture.png'>")
    assert fetched(telltale, tmp_path) == {"http://telltale.invalid/picture.png"}, "a request would not be seen"
    file = report.write(tmp_path / "report.html", "t", BLOCKS)
    assert fetched(pathlib.Path(file), tmp_path) == set()


def test_it_fits_a_phone_and_a_laptop(tmp_path):
    source = html.escape(report.render("t", BLOCKS), quote=True)
    frame = '<iframe srcdoc="{}" style="border: 0; height: 800px; width: {}px"></iframe>'
    outer = tmp_path / "outer.html"
    frames = "".join(frame.format(source, width) for width in (390, 1280))
    outer.write_text(f'<!DOCTYPE html><meta charset="utf-8"><script>{MEASURE}</script><body>{frames}</body>')
    found = re.search(r"FOUND(\[.*\])END", browse(outer, tmp_path / "profile"))
    assert found, "the page was not measured"
    phone, laptop = json.loads(found[1])
    for seen, width in ((phone, 390), (laptop, 1280)):
        assert width - 20 <= seen["width"] <= width and seen["scrolls"] <= seen["width"] and seen["wider"] == 0, seen
        assert len(seen["pictures"]) == 3 + 2 + 9 and all(seen["pictures"]), seen
        assert len(seen["rows"]) == 3 and all(seen["rows"]) and seen["spaces"] and seen["title"] == "t", seen
    assert len(set(laptop["columns"])) == 1, "side by side on a laptop"
    assert len(set(phone["columns"])) == 3, "one below the other on a phone"
