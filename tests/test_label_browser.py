"""The labelling page in a real browser: two people at once, by mouse and by keyboard, through closed tabs and kills."""

import itertools
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlhf_jax.feedback import exchange
from rlhf_jax.feedback.record import Record

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytest.importorskip("uvicorn", reason="needs the extra label: pip install 'rlhf_jax[label]'")

ROOT = pathlib.Path(__file__).resolve().parents[1]
HTML = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\"><b>bold</b>"
# Whoever ranks finds the better one first: so what stands in the record says whether the page told it right.
WORDS = ("first", "second", "third")


class Server:
    """The program as people start it, which may be killed and started again."""

    def __init__(self, folder: pathlib.Path, *words: str) -> None:
        self.folder, self.words, self.port, self.links = folder, words, 0, {}
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Starts it on the port that it had, if it had one; returns when it replies."""
        command = [sys.executable, "-m", "experiments.label", f"--tasks={self.folder / 'tasks.jsonl'}", *self.words]
        self.port = self.port or _free_port()
        self.process = subprocess.Popen([*command, f"--port={self.port}"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout
        for line in self.process.stdout:
            if found := re.match(r"\s*(\w+): (http\S+)", line):
                self.links[found[1]] = found[2]
            if line.startswith("each link"):
                break
        _wait_for(self.port)

    def kill(self) -> None:
        """As kill -9: nothing is tidied up."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout
            self.process.stdout.close()
            self.process = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server did not start")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def serve(tmp_path) -> Iterator[Any]:
    started: list[Server] = []

    def start(tasks: list[dict[str, Any]], *words: str) -> Server:
        (tmp_path / "tasks.jsonl").write_text(exchange.lines(tasks))
        started.append(Server(tmp_path, *words))
        return started[-1]

    yield start
    for server in started:
        server.kill()


def tasks(count: int) -> list[dict[str, Any]]:
    """Three answers each, but for every fourth, of two; the first is the best."""
    kinds = [WORDS if number % 4 else WORDS[:2] for number in range(count)]
    return [{"prompt": f"Q{number}", "completions": [f"{w} of {number}" for w in k]} for number, k in enumerate(kinds)]


def page_of(browser: Any, link: str, **more: Any) -> Any:
    page = browser.new_context(viewport={"width": 1366, "height": 768}, **more).new_page()
    page.set_default_timeout(15_000)
    page.goto(link)
    return page


def shown(page: Any) -> list[int]:
    """Which of the WORDS stands at each letter."""
    page.wait_for_selector(".card")
    return [WORDS.index(text.split()[0]) for text in page.locator(".card > .text").all_inner_texts()]


def drag(page: Any, answer: int, place: int) -> None:
    chip, row = page.locator(f".chip[data-answer='{answer}']"), page.locator(f".place[data-place='{place}']")
    start, end = chip.bounding_box(), row.bounding_box()
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    page.mouse.down()
    page.mouse.move(end["x"] + end["width"] / 2, end["y"] + end["height"] / 2, steps=4)
    page.mouse.up()


def by_mouse(page: Any) -> None:
    for answer, word in enumerate(shown(page)):
        drag(page, answer, word + 1)


def by_keys(page: Any) -> None:
    """The letter of an answer and then the digit of its place; once with the arrows on a chip."""
    words = shown(page)
    for answer, word in enumerate(words[1:], start=1):
        page.keyboard.press("abc"[answer])
        page.keyboard.press(str(word + 1))
    page.locator(".chip[data-answer='0']").focus()
    for _ in range(words[0] + 1):  # from the tray to the first place, and on
        page.keyboard.press("ArrowDown")


def finish(page: Any, press: Any) -> None:
    """Saves, and waits for whatever comes next."""
    before = page.locator("#count").inner_text()
    press()
    page.wait_for_function("before => document.getElementById('count').innerText !== before", arg=before)


SAVE = {"mouse": lambda page: page.click("#save"), "keys": lambda page: page.keyboard.press("Control+Enter")}
RANK = {"mouse": by_mouse, "keys": by_keys}


def test_two_people_rank_at_once_through_a_closed_tab_and_a_killed_server(browser, serve):
    server = serve(tasks(20), "--labellers=ann,ben", "--labels=2", "--tests=0")
    people = {"ann": "mouse", "ben": "keys"}
    pages = {who: page_of(browser, server.links[who]) for who in people}
    for turn in range(20):
        for who, how in people.items():
            RANK[how](pages[who])
        if turn == 7:  # she closes the tab, and finds what she had begun
            context = pages["ann"].context
            pages["ann"].wait_for_timeout(1200)
            pages["ann"].close()
            pages["ann"] = context.new_page()
            pages["ann"].goto(server.links["ann"])
            shown(pages["ann"])
            assert pages["ann"].locator(".places .place[data-place='0'] .chip").count() == 0
        if turn == 12:  # the server dies under both of them, and comes back
            server.kill()
        for who, how in people.items():
            SAVE[how](pages[who])
        if turn == 12:
            pages["ben"].wait_for_selector("#warning:not([hidden])")
            assert "kept in this browser" in pages["ben"].locator("#warning").inner_text()
            server.start()
        for page in pages.values():
            playwright.expect(page.locator("#count")).to_have_text(re.compile(f"^{turn + 1} done"), timeout=15_000)
    for who, page in pages.items():
        page.wait_for_selector(".message")
        assert "All done" in page.inner_text("main") and "You judged 20" in page.inner_text("main"), who
    said = Record(server.folder / "tasks.db").judgements(all=True)
    assert len(said) == 40 and len({(one.task, one.labeller) for one in said}) == 40, "every judgement once, none lost"
    for row in exchange.rankings(Record(server.folder / "tasks.db")):
        assert row["ranks"] == list(range(len(row["ranks"]))), "what was dragged and typed is what was meant"
    assert all(one.seconds and one.seconds < 60 and one.shown for one in said)


def test_a_tab_closed_on_an_unsent_answer_sends_it_when_it_is_opened_again(browser, serve):
    server = serve(tasks(3), "--labellers=ann", "--labels=1")
    page = page_of(browser, server.links["ann"])
    by_mouse(page)
    server.kill()
    page.click("#save")
    page.wait_for_selector("#warning:not([hidden])")
    assert page.evaluate("document.getElementById('main').inert"), "nothing is edited that would not be sent"
    context = page.context
    page.close()
    server.words += ("--new_links",)
    server.start()
    page = context.new_page()
    page.goto(server.links["ann"])
    playwright.expect(page.locator("#count")).to_have_text(re.compile("^1 done"), timeout=15_000)
    assert len(Record(server.folder / "tasks.db").judgements(all=True)) == 1


def test_what_a_server_started_otherwise_refuses_is_kept_and_can_be_mended(browser, serve):
    server = serve(tasks(3)[1:], "--labellers=ann", "--labels=1", "--scale=5", "--tests=0")
    page = page_of(browser, server.links["ann"])
    by_mouse(page)
    card = page.locator(".card[data-answer='0']")
    card.get_by_role("group", name="Rating").get_by_text("4", exact=True).click()
    card.get_by_role("button", name="Rewrite").click()
    server.kill()
    page.click("#save")
    page.wait_for_selector("#warning:not([hidden])")
    server.words = ("--labellers=ann", "--labels=1", "--tests=0", "--new_links")
    server.start()
    page.wait_for_selector(".message")
    assert "This link does not work" in page.inner_text("main")
    page.goto(server.links["ann"])
    shown(page)
    assert page.locator(".places .place[data-place='0'] .chip").count() == 0, "as it was ranked"
    finish(page, lambda: page.click("#save"))
    (one,) = Record(server.folder / "tasks.db").judgements(all=True)
    assert (one.ranks, one.ratings, one.rewrites) == ((0, 1, 2), (), ())
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.includes('outbox'))") == []


def test_who_waits_is_told_when_it_is_over_and_nothing_is_redrawn_before(browser, serve):
    server = serve(tasks(1), "--labellers=ann,ben", "--labels=1", "--tests=0")
    ann, ben = page_of(browser, server.links["ann"]), None
    by_mouse(ann)
    ben = page_of(browser, server.links["ben"])
    ben.get_by_text("Nothing to do at the moment").wait_for()
    ben.evaluate("document.querySelector('.message').dataset.mark = 'same'")
    with ben.expect_response("**/api/turn"):
        pass
    ben.wait_for_timeout(200)
    assert ben.locator(".message[data-mark='same']").count() == 1
    ann.click("#save")
    ben.get_by_text("All done").wait_for()


def test_ties_undo_flags_rewriting_and_cant_judge(browser, serve):
    server = serve(tasks(3)[1:], "--labellers=ann", "--labels=1", "--scale=5", "--tests=0")
    page = page_of(browser, server.links["ann"])
    words = shown(page)
    page.click("#save")
    assert "Still to rank: A, B, C" in page.locator("#missing").inner_text()
    for answer in range(3):
        drag(page, answer, 2 if words[answer] else 1)
    best = words.index(0)
    card = page.locator(f".card[data-answer='{best}']")
    card.get_by_role("button", name="Rewrite").click()
    card.get_by_role("textbox").fill("mine")
    card.get_by_text("false", exact=True).click()
    card.get_by_role("group", name="Rating").get_by_text("4", exact=True).click()
    finish(page, lambda: page.click("#save"))
    record = Record(server.folder / "tasks.db")
    (one,) = record.judgements()
    assert (one.ranks, one.flags, one.rewrites) == ((0, 1, 1), (("false",), (), ()), ((0, "mine"),))
    assert one.ratings == (4.0, None, None)
    finish(page, lambda: page.click("#undo"))
    assert page.locator(f".card[data-answer='{best}'] textarea").input_value() == "mine"
    assert page.locator(".place[data-place='1'] .chip").count() == 1 and record.judgements() == []
    finish(page, lambda: page.click("#unsure"))
    assert [one.kind for one in record.judgements(all=True)] == ["ranking", "undo", "unsure"]


def test_the_first_round_and_the_overview(browser, serve):
    known = [{"prompt": f"T{k}", "completions": ["first", "second"], "gold_ranks": [0, 1]} for k in range(2)]
    unlike = [row | {"completions": [f"{word} {k}" for word in row["completions"]]} for k, row in enumerate(known)]
    server = serve([*tasks(1), *unlike], "--labellers=ann", "--labels=1", "--qualify=2", "--cost_per_hour=20")
    page = page_of(browser, server.links["ann"])
    for number in range(2):
        assert f"First round, task {number + 1} of 2" in page.inner_text("main") or page.wait_for_selector(".first")
        words = shown(page)
        for answer, word in enumerate(words):
            drag(page, answer, 2 - word)  # the wrong way round
        finish(page, lambda: page.click("#save"))
    assert "Thank you for trying" in page.inner_text("main")
    board = page_of(browser, server.links["owner"])
    board.wait_for_selector("table")
    assert (
        "ann" in board.inner_text("tbody") and "0%" in board.inner_text("tbody") and "Cost" in board.inner_text("thead")
    )
    with board.expect_download() as download:
        board.get_by_role("button", name="History").click()
    assert len(pathlib.Path(download.value.path()).read_text().splitlines()) == 2
    board.get_by_role("button", name="Refresh").click()
    assert page_of(browser, server.links["ann"].replace("/#", "/board#")).wait_for_selector(".message")


def test_html_wrong_links_and_forged_requests_do_nothing(browser, serve):
    server = serve([{"prompt": HTML, "completions": [HTML, "plain"]}], "--labellers=ann", "--labels=1")
    page = page_of(browser, server.links["ann"])
    page.wait_for_selector(".card")
    page.wait_for_timeout(200)
    assert page.title() == "Labelling" and page.locator("main img, main script, main b").count() == 0
    assert (
        HTML in page.locator(".card > .text").all_inner_texts() and page.locator(".prompt .text").inner_text() == HTML
    )
    for wrong in ("wrong", ""):
        other = page_of(browser, f"http://127.0.0.1:{server.port}/#{wrong}")
        assert "link" in other.locator(".message").inner_text()
    # Another site's page that even knows the secret: its request is asked about first, and refused.
    secret = server.links["ann"].split("#")[1]
    forged = """async ([address, secret]) => {
      const ways = [{method: "POST", body: "{}"}, {method: "POST", body: "{}", mode: "no-cors"},
        {method: "POST", body: "{}", headers: {authorization: `Bearer ${secret}`, "content-type": "application/json"}}];
      return Promise.all(ways.map((way) => fetch(address, way).then((reply) => reply.type, () => "refused")));
    }"""
    evil = page_of(browser, "data:text/html,evil")
    seen = evil.evaluate(forged, [f"http://127.0.0.1:{server.port}/api/judgement", secret])
    assert seen[0] == seen[2] == "refused" and Record(server.folder / "tasks.db").judgements(all=True) == []


@pytest.mark.parametrize("size", [(1366, 768), (390, 844)], ids=["laptop", "phone"])
def test_it_fits_its_window_and_every_control_has_a_name(browser, serve, size):
    long = [{"prompt": "unbroken" * 60, "completions": ["word " * 300, "unbroken" * 80, "c"]}]
    steps = [{"prompt": "2 + 3?", "steps": ["2 + 3 = 6.", "So 6."]}]
    server = serve([*long, *steps], "--labellers=ann", "--labels=1", "--scale=7")
    page = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True))).new_page()
    page.goto(server.links["ann"])
    page.wait_for_selector(".card")
    names = """() => [...document.querySelectorAll("button, input, textarea, progress")].filter((e) => e.offsetParent)
      .filter((e) => !(e.innerText || e.getAttribute("aria-label") || e.closest("label")?.innerText))
      .map((e) => e.outerHTML)"""
    for look in itertools.count():
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1] and page.evaluate(names) == []
        if look:
            break
        page.click("#unsure")
        page.wait_for_selector(".steps")
    for number, mark in enumerate(("Bad", "Neutral")):
        page.locator(".steps li").nth(number).get_by_text(mark, exact=True).click()
    page.click("#save")
    page.wait_for_selector(".message")
    assert exchange.steps(Record(server.folder / "tasks.db"))[0]["ratings"] == [-1, 0]


def test_a_finger_drags_a_letter(browser, serve):
    server = serve(tasks(1), "--labellers=ann", "--labels=1")
    page = page_of(browser, server.links["ann"], has_touch=True, is_mobile=True)
    words = shown(page)
    touch = page.context.new_cdp_session(page)
    for answer, word in enumerate(words):
        chip = page.locator(f".chip[data-answer='{answer}']")
        chip.scroll_into_view_if_needed()
        start, end = chip.bounding_box(), page.locator(f".place[data-place='{word + 1}']").bounding_box()
        points = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in (start, end)]
        for kind, (x, y) in zip(("touchStart", "touchMove"), points, strict=True):
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.click("#save")
    page.wait_for_selector(".message")
    assert exchange.rankings(Record(server.folder / "tasks.db"))[0]["ranks"] == [0, 1]
