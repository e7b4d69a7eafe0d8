"""The labelling page through its own door: who is let in, what is refused, and that everything said stands once."""

import contextlib
import http.client
import json
import pathlib
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from experiments import label
from rlhf_jax import flags
from rlhf_jax.feedback import exchange, rankings
from rlhf_jax.feedback.assignment import Terms
from rlhf_jax.feedback.record import Record
from tests.judged import task

app = pytest.importorskip("rlhf_jax.feedback.page.app", reason="needs the extra label: pip install 'rlhf_jax[label]'")
uvicorn = pytest.importorskip("uvicorn")
HTML = "<script>document.title = 'ran'</script><img src=x onerror=alert(1)>"
Reply = tuple[int, Any]


class Place:
    """A served record and ways to ask it."""

    def __init__(self, record: Record, port: int, secrets: dict[str, str]) -> None:
        self.record, self.port, self.secrets = record, port, secrets

    def raw(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[Any, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            return reply, reply.read().decode()

    def ask(self, who: str, path: str, body: Any = None, **headers: str) -> Reply:
        """What is replied to someone: the status, and JSON if it is some."""
        given = {"authorization": f"Bearer {self.secrets.get(who, who)}"}
        given |= {} if body is None else {"content-type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        reply, text = self.raw("GET" if body is None else "POST", path, data, given)
        return reply.status, json.loads(text) if reply.headers["content-type"] == "application/json" else text

    def turn(self, who: str) -> dict[str, Any]:
        status, told = self.ask(who, "/api/turn")
        assert status == 200, told
        return told

    def judge(self, who: str, id: str, shown: dict[str, Any], ranks: list[float], **more: Any) -> Reply:
        body = {"id": id, "task": shown["id"], "kind": "ranking", "ranks": ranks, "replaces": shown["replaces"]}
        return self.ask(who, "/api/judgement", body | more)


@contextlib.contextmanager
def served(record: Record, host: str = "127.0.0.1", address: str = "", **more: Any) -> Iterator[Place]:
    desk = app.Desk(record, **{"terms": Terms(tests=0.0), "guidelines": ("Be kind.", record.guide("Be kind.")), **more})
    secrets = {who: record.link(who, "labeller") or "" for who in ("ann", "ben")}
    secrets["owner"] = record.link("owner", "owner") or ""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        probe.listen()
        server = uvicorn.Server(uvicorn.Config(app.make(desk, host, address), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [probe]})
        thread.start()
        try:
            yield Place(record, probe.getsockname()[1], secrets)
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture
def place(tmp_path) -> Iterator[Place]:
    record = Record(tmp_path / "record.db")
    record.add([task(number, labels=2, models=("m0", "m1", "m2")) for number in range(4)])
    with served(record) as place:
        yield place


def test_a_stranger_is_told_nothing(place):
    for secret in ("", "wrong", place.secrets["ann"][:-1], place.secrets["ann"] + "x"):
        for path in ("/api/turn", "/api/overview", "/api/rows/rankings"):
            status, told = place.ask(secret, path)
            assert status == 401 and told == {"error": "this link is not known here; ask for a new one."}
        assert place.ask(secret, "/api/judgement", {"id": "1"})[0] == 401
    assert place.raw("GET", "/api/turn", None, {})[0].status == 401
    assert place.ask("ann", "/api/overview")[0] == 403 and place.ask("ann", "/api/rows/rankings")[0] == 403
    assert place.ask("owner", "/api/turn")[0] == 403 and place.ask("owner", "/api/overview")[0] == 200
    assert place.record.judgements(all=True) == []


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "same-site"}, 403),
        ({"content_type": "text/plain"}, 415),
        ({"content_type": "application/x-www-form-urlencoded"}, 415),
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example"}, 421),
        ({"host": ""}, 421),
        ({"host": "[::1"}, 421),
        ({"host": "["}, 421),
        ({"origin": "http://["}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"content_length": "99999999"}, 413),
    ],
    ids=str,
)
def test_a_forged_request_does_nothing_even_with_the_secret(place, headers, status):
    shown = place.turn("ann")["task"]
    found, told = place.ask("ann", "/api/judgement", _said(shown), **headers)
    assert found == status and set(told) == {"error"}
    assert place.record.judgements(all=True) == []
    own = {"origin": f"http://127.0.0.1:{place.port}", "sec_fetch_site": "same-origin"}
    assert place.ask("ann", "/api/judgement", _said(shown), **own) == (200, {"new": True})


def _said(shown: dict[str, Any]) -> dict[str, Any]:
    return {"id": "1", "task": shown["id"], "kind": "ranking", "ranks": [0, 1, 2], "replaces": None}


def test_a_page_of_another_site_may_lead_here_and_no_more(place):
    navigate = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert place.raw("GET", "/", None, navigate)[0].status == 200
    assert place.raw("GET", "/static/label.js", None, {"sec-fetch-site": "cross-site"})[0].status == 403
    reply, _ = place.raw("GET", "/", None, {})
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert "set-cookie" not in reply.headers and reply.headers["x-content-type-options"] == "nosniff"


def test_a_server_for_others_answers_to_its_number_and_its_name(tmp_path):
    record = Record(tmp_path / "record.db")
    with served(record, host="desk.example") as place:
        for host, status in (("desk.example:80", 200), ("192.168.0.7:80", 200), ("evil.example", 421)):
            assert place.raw("GET", "/", None, {"host": host})[0].status == status


def test_behind_a_proxy_it_answers_to_the_address_of_the_links(tmp_path):
    record = Record(tmp_path / "record.db")
    record.add([task()])
    with served(record, address="https://desk.example") as place:
        shown, local = place.turn("ann")["task"], f"127.0.0.1:{place.port}"
        for host in ("desk.example", local):  # some proxies pass the name on, some put ours in its place
            own = {"host": host, "origin": "https://desk.example", "sec_fetch_site": "same-origin"}
            assert place.ask("ann", "/api/judgement", _said(shown), **own)[0] == 200
            assert place.ask("ann", "/api/judgement", _said(shown), host=host, origin="https://evil.example")[0] == 403
        assert place.ask("ann", "/api/turn", host="evil.example")[0] == 421


def test_whoever_is_no_longer_among_the_labellers_is_not_let_in(tmp_path):
    record = Record(tmp_path / "record.db")
    record.add([task()])
    with served(record, labellers=("ben",)) as place:
        status, told = place.ask("ann", "/api/turn")
        assert status == 401 and "ask for a new one" in told["error"]
        assert place.ask("ben", "/api/turn")[0] == 200 and place.ask("owner", "/api/overview")[0] == 200


def test_the_page_asks_no_other_server_and_has_no_script_of_its_own(place):
    for path in ("/", "/board"):
        page = place.raw("GET", path, None, {})[1]
        assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|https?://", page)
        for file in re.findall(r'(?:src|href)="(/[^"]*)"', page):
            assert place.raw("GET", file, None, {})[0].status == 200
    for file in app.STATIC.iterdir():
        text = file.read_text()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), file
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text), file
    assert place.raw("GET", "/static/../app.py", None, {})[0].status == 404


def test_a_body_is_bounded_and_must_be_an_object(place):
    for body, status in (
        (b"x" * 600_000, 413), (b"", 400), (b"[1]", 400), (b"{", 400), (b'{"draft": NaN}', 400), (b"[" * 100_000, 400),
        (b'{"task": "x", "draft": {"seconds": 1e999}}', 400), (b'{"task": "x", "draft": {"seconds": -1e999}}', 400),
        (b'{"task": "\\ud800"}', 400), ("{\"task\": \"\xff\"}".encode("latin-1"), 400),
    ):  # fmt: skip
        found, told = place.ask("ann", "/api/draft", body)
        assert found == status and set(told) == {"error"}, (body[:20], told)


def test_a_doubled_request_is_one_judgement_and_a_second_window_is_told(place):
    shown = place.turn("ann")["task"]
    replies = [place.judge("ann", "one", shown, [0, 1, 2]) for _ in range(3)]
    assert replies == [(200, {"new": True}), (200, {"new": False}), (200, {"new": False})]
    assert place.judge("ann", "two", shown, [2, 1, 0])[0] == 409
    assert place.judge("ann", "one", shown, [2, 1, 0])[0] == 409
    assert len(place.record.judgements(all=True)) == 1
    many = place.turn("ann")["task"]
    threads = [threading.Thread(target=place.judge, args=("ann", "many", many, [0, 0, 1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.id for one in place.record.judgements(all=True)] == ["one", "many"]


def test_what_is_said_in_the_order_shown_stands_in_the_order_of_the_task(place):
    for who in ("ann", "ben"):
        for _ in range(4):
            shown = place.turn(who)["task"]
            assert "models" not in shown and "gold" not in shown and "m0" not in json.dumps(shown)
            best = min(range(3), key=lambda k: shown["answers"][k])
            ranks = [0 if k == best else 1 for k in range(3)]
            more = {"flags": [["false"] if k == best else [] for k in range(3)], "rewrites": [[best, "mine"]]}
            assert place.judge(who, f"{who}{shown['id']}", shown, ranks, **more)[0] == 200
        assert place.turn(who)["state"] == "done"
    for one in place.record.judgements():
        assert one.ranks == (0, 1, 1) and one.flags == (("false",), (), ()) and one.rewrites == ((0, "mine"),)
        assert sorted(one.shown) == [0, 1, 2]
    assert len({one.shown for one in place.record.judgements()}) > 1
    status, text = place.ask("owner", "/api/rows/rankings")
    assert status == 200 and text.count("\n") == 8 and place.ask("owner", "/api/rows/nothing")[0] == 404


def test_an_answer_that_was_not_changed_is_no_rewriting(place):
    shown = place.turn("ann")["task"]
    rewrites = [[0, shown["answers"][0]], [1, "mine"], [2, shown["answers"][2]]]
    assert place.judge("ann", "1", shown, [0, 1, 2], rewrites=rewrites)[0] == 200
    ((_, text),) = place.record.judgements()[0].rewrites
    assert text == "mine" and len(exchange.demonstrations(place.record)) == 1


def test_a_new_link_finds_what_the_old_one_left_and_nobody_elses(tmp_path, place):
    before = place.turn("ann")["shelf"]
    place.secrets["ann"] = place.record.link("ann", "labeller", renew=True) or ""
    assert place.turn("ann")["shelf"] == before != place.turn("ben")["shelf"]
    with served(Record(tmp_path / "other.db")) as other:
        assert other.turn("ann")["shelf"] != before


def test_a_draft_and_an_undo_go_round(place):
    shown = place.turn("ann")["task"]
    begun = {"task": shown["id"], "draft": {"places": [1, 0, 0]}}
    assert place.ask("ann", "/api/draft", begun) == (200, {"kept": True})
    assert place.turn("ann")["task"]["draft"] == {"places": [1, 0, 0]} and place.turn("ben")["task"]["draft"] is None
    said = {"flags": [["false"], [], []], "note": "hm", "rewrites": [[2, "mine"]]}
    place.judge("ann", "1", shown, [2, 0, 1], **said)
    assert place.ask("ann", "/api/draft", {"task": shown["id"], "draft": {}})[0] == 409
    assert place.ask("ben", "/api/undo", {"last": "1", "id": "u"})[0] == 409
    for new in (True, False):
        assert place.ask("ann", "/api/undo", {"last": "1", "id": "u"})[1] == {"new": new}
    again = place.turn("ann")["task"]
    assert again["before"] == {"kind": "ranking", "ranks": [2, 0, 1], "marks": [], "ratings": []} | said
    assert place.judge("ann", "2", again, [0, 1, 2])[0] == 200
    assert [one.id for one in place.record.judgements()] == ["2"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ranks": [0, 1]}, "ranks must be a list of 3 values"),
        ({"ranks": [0, 1, "2"]}, "'2' is not a number"),
        ({"ranks": [0, 1, True]}, "'True' is not a number"),
        ({"ranks": []}, "they must be 3 finite numbers"),
        ({"kind": "undo"}, "kind must be ranking, steps or unsure"),
        ({"kind": "steps", "ranks": []}, "is none of a task of kind 'ranking'"),
        ({"flags": [["rude"], [], []]}, "of harmful, false, off-topic"),
        ({"flags": "false"}, "flags must be a list of 3"),
        ({"ratings": [1, None, None]}, "allowed are whole numbers from 1 to 0"),
        ({"rewrites": [[0]]}, "rewrites must be a list of"),
        ({"rewrites": [[9, "x"]]}, "is not the place of an answer, 0 to 2"),
        ({"rewrites": [[0, "x" * 100_001]]}, "at most 100000"),
        ({"note": 1}, "note must be a string"),
        ({"guidelines": "nowhere"}, "no guidelines of the version 'nowhere'"),
        ({"task": "nowhere"}, "there is no task 'nowhere'"),
        ({"seconds": -1}, "at least 0"),
        ({"id": ""}, "1 to 100"),
        ({"replaces": 1}, "replaces must be the id"),
    ],
)
def test_what_is_wrong_with_a_judgement_is_one_clear_sentence(place, change, says):
    shown = place.turn("ann")["task"]
    status, told = place.ask("ann", "/api/judgement", _said(shown) | change)
    assert status == 400 and says in told["error"] and "\n" not in told["error"]
    assert place.record.judgements(all=True) == []


def test_an_answer_full_of_html_is_text(tmp_path):
    record = Record(tmp_path / "record.db")
    talk = [{"role": "user", "content": HTML}]
    record.add([app.Task(prompt=talk, answers=(HTML, "b"))])
    with served(record, scale=5) as place:
        reply, text = place.raw("GET", "/api/turn", None, {"authorization": f"Bearer {place.secrets['ann']}"})
        assert reply.headers["content-type"] == "application/json" and HTML in json.loads(text)["task"]["answers"]
        shown = place.turn("ann")["task"]
        assert shown["prompt"] == [{"role": "user", "text": HTML}]
        assert place.judge("ann", "1", shown, [0, 1], ratings=[5, None], rewrites=[[0, f"{HTML}!"]])[0] == 200
    assert exchange.demonstrations(record)[0]["completion"] == f"{HTML}!"


# The program


def run(*words: str) -> None:
    flags.run(label.main, label.Label, ["label", *words])


def test_rows_go_in_and_out_of_the_program(tmp_path, capsys, monkeypatch):
    blank = [{"prompt": f"q{n}", "completions": ["a", "b"], "ranks": None, "labeller": None} for n in range(3)]
    said = [{"prompt": "q0", "completions": ["b", "a"], "ranks": [0, 0], "labeller": "cy"}]
    for name, rows in (("blank", blank), ("said", said)):
        (tmp_path / f"{name}.jsonl").write_text(exchange.lines(rows))
    served: list[Any] = []
    monkeypatch.setattr(uvicorn, "run", lambda *args, **more: served.append(more))
    run(f"--tasks={tmp_path}/blank.jsonl", "--labellers=ann,ben", "--port=8019")
    told = capsys.readouterr().out
    assert "3 new tasks of 3" in told and re.search(r"ann: http://127.0.0.1:8019/#[\w-]{32}\n", told)
    assert re.search(r"owner: http://127.0.0.1:8019/board#[\w-]{32}\n", told) and "warning" not in told
    assert served[0]["host"] == "127.0.0.1" and served[0]["port"] == 8019
    run(f"--tasks={tmp_path}/blank.db", "--labellers=ann", "--port=8019")
    assert "ann: has a link already" in capsys.readouterr().out
    run(f"--tasks={tmp_path}/blank.db", "--labellers=ann", "--new_links", "--host=0.0.0.0", "--port=8019")
    told, name = capsys.readouterr().out, socket.gethostname().lower()
    assert "warning: --host=0.0.0.0 lets other machines in" in told and f"ann: http://{name}:8019/#" in told
    run(f"--tasks={tmp_path}/blank.db", "--new_links", "--address=https://Desk.example/", "--port=8019")
    told = capsys.readouterr().out
    assert "owner: https://desk.example/board#" in told and "ann" not in told, "the owner's link alone"
    run(f"--tasks={tmp_path}/blank.db", f"--judged={tmp_path}/said.jsonl", f"--export={tmp_path}/out/rows.jsonl")
    assert "1 new judgements of 1" in capsys.readouterr().out
    (row,) = rankings.read_rankings(tmp_path / "out/rows.jsonl")
    assert row.pop("at").endswith("+00:00")
    assert row == {"prompt": "q0", "completions": ["a", "b"], "ranks": [0.0, 0.0], "labeller": "cy"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--labels=0",), "--labels=0 is not allowed; it must be at least 1"),
        (("--port=0",), "--port=0 is not allowed"),
        (("--scale=1",), "it must be 0, or from 2 to 10"),
        (("--tests=2",), "--tests=2.0 is not allowed; it must be from 0 to 1"),
        (("--cost_per_hour=-1",), "it must be at least 0"),
        (("--labellers=a,,b",), "is no name for a labeller"),
        (("--labellers=",), "nobody is to label; give --labellers=ann,ben"),
        (("--tasks=gs://bucket/t.jsonl",), "is not on this machine"),
        (("--tasks=gs://bucket/t.db",), "is not on this machine"),
        (("--address=desk.example",), "is no address; give https://NAME"),
        (("--address=https://desk.example/page",), "is no address; give https://NAME"),
        (("--address=https://[",), "is no address; give https://NAME"),
        (("--export=PLACE/t.jsonl",), "already exists; give a new file"),
        (("--export=PLACE/new.jsonl",), "there is no record"),
        (("--export=PLACE/new.jsonl", "--tasks=PLACE/empty.db"), "holds no rankings yet; let people label"),
        (("--tasks=PLACE/nowhere.db",), "there is no record"),
        (("--tasks=PLACE/nowhere.jsonl",), "there is no data file or folder"),
        (("--judged=PLACE/t.jsonl", "--labellers="), "holds no judgement"),
        (("--guidelines=PLACE/nowhere.md",), "can't be read"),
        (("--host=not.a.name.invalid",), "nothing can listen at not.a.name.invalid"),
    ],
)
def test_what_can_be_mended_is_one_sentence(tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.setattr(uvicorn, "run", None)
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "q", "completions": ["a", "b"]}) + "\n")
    Record(tmp_path / "empty.db")
    with pytest.raises(SystemExit) as exit:
        run(f"--tasks={tmp_path}/t.jsonl", "--labellers=ann", *(word.replace("PLACE", str(tmp_path)) for word in words))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and says in error and error.count("\n") == 1, error


def test_a_taken_port_is_told_before_any_link(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "q", "completions": ["a", "b"]}) + "\n")
    with contextlib.closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(SystemExit):
            run(f"--tasks={tmp_path}/t.jsonl", "--labellers=ann", f"--port={other.getsockname()[1]}")
    told = capsys.readouterr()
    assert "give another --port" in told.err and "#" not in told.out


def test_without_the_web_framework_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "q", "completions": ["a", "b"]}) + "\n")
    with pytest.raises(SystemExit):
        run(f"--tasks={tmp_path}/t.jsonl", "--labellers=ann")
    assert "run pip install 'rlhf_jax[label]'." in capsys.readouterr().err


def test_nothing_but_the_page_imports_the_web_framework():
    root = pathlib.Path(__file__).resolve().parents[1]
    files = [*(root / "rlhf_jax").rglob("*.py"), *(root / "experiments").rglob("*.py")]
    users = {
        f.relative_to(root).as_posix()
        for f in files
        if re.search(r"^\s*(from|import) (starlette|uvicorn)", f.read_text(), re.M)
    }
    assert users == {"rlhf_jax/feedback/page/app.py", "experiments/label.py"}
