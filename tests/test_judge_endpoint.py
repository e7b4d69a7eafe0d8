"""Judges behind an address, against a small server of faults: what they survive, what they cost, what they keep."""

import asyncio
import json
import re
import threading
import time
from typing import Any

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judge_endpoint
from rlhf_jax.feedback.judge_endpoint import Endpoint, EndpointJudge
from rlhf_jax.feedback.judges import Pair, Template
from tests.chat_server import completion, say, serve

PLAIN = Template("{prompt}|{first}|{second}", "Best:")
KEY = "sk-very-secret-1234"
PAIRS = [Pair(f"q{n}", "yes", "no") for n in range(4)]


@pytest.fixture
def server(monkeypatch):
    with serve(monkeypatch) as made:
        yield made


@pytest.fixture
def make(server):
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await asyncio.sleep(0)

    def judge(template: Template = PLAIN, most: int = 8, **settings: Any) -> EndpointJudge:
        settings = {"cache": "", "wait": 5.0} | settings
        return EndpointJudge("far", server.url, "m", template, Endpoint(**settings), most=most, sleep=sleep)

    judge.waits = waits  # pyright: ignore[reportFunctionMemberAccess]
    return judge


# What a reply says


def test_the_chance_is_that_of_the_letters_in_both_orders(server, make):
    shares = {"q0|yes|no": {"A": 0.6, " B": 0.2, "C": 0.1}, "q0|no|yes": {"B": 0.7, "A": 0.2, " A": 0.1}}
    server.reply = lambda question, number: say(completion("A" if "|yes|no" in question else "B", shares[question]))
    (verdict,) = make()(PAIRS[:1])
    assert (verdict.ahead, verdict.behind) == pytest.approx((0.75, 0.7))
    assert verdict.probability == pytest.approx(0.725)
    body = server.calls[0]
    assert body["model"] == "m" and body["temperature"] == 0.0 and body["max_tokens"] == 8
    assert body["logprobs"] is True and body["top_logprobs"] == 5


def test_without_log_probabilities_the_letter_counts(server, make):
    server.reply = lambda question, number: say(completion("B." if "|no|yes" in question else "**A**"))
    judge = make(logprobs=False, body='{"max_tokens": null, "max_completion_tokens": 9, "seed": 3}')
    (verdict,) = judge(PAIRS[:1])
    assert (verdict.probability, verdict.ahead, verdict.behind) == (1.0, 1.0, 1.0)
    assert server.calls[0].keys() == {"model", "temperature", "messages", "max_completion_tokens", "seed"}


def test_a_judge_that_always_says_the_first_is_undecided(server, make):
    (verdict,) = make()(PAIRS[:1])
    assert (verdict.probability, verdict.ahead, verdict.behind) == (0.5, 1.0, 0.0)


def test_behind_a_rationale_the_chance_is_clamped(server, make):
    text = "Answer B is worse.\n**Best:** A\n"
    server.reply = lambda question, number: say(
        completion(text.replace("**Best:** A", "Best: A"), {"A": 0.9, "B": 0.1})
    )
    (verdict,) = make(PLAIN._replace(reasoning=True), most=100)(PAIRS[:1])
    assert (verdict.ahead, verdict.behind) == (0.6, 0.4) and server.calls[0]["max_tokens"] == 100


# Faults


BAD = {
    "garbage": (say(b"<html>\xff"), "the reply is no chat completion"),
    "deep": (say(b"[" * 100_000), "the reply is no chat completion"),
    "wrong JSON": (say({"choices": []}), "the reply is no chat completion"),
    "a list": (say([1, 2]), "the reply is no chat completion"),
    "no text": (say(completion(None)), "the reply has no text"),
    "no letter": (say(completion("I can't say.")), "the reply says neither A nor B"),
    "refused": (say({"error": f"bad {KEY}"}, 400), 'refused with status 400 ({"error": "bad ***"})'),
    "packed wrongly": (say(b"not gzip", Content_Encoding="gzip"), "the reply can't be unpacked"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_reply_is_none_with_its_reason_and_not_asked_again(server, make, monkeypatch, fault):
    monkeypatch.setenv("MY_KEY", KEY)
    reply, why = BAD[fault]
    server.reply = lambda question, number: reply if question == "q1|no|yes" else say(completion("A"))
    verdicts = make(key_from="MY_KEY")(PAIRS[:3])
    assert [verdict.probability for verdict in verdicts] == [0.5, None, 0.5]
    assert verdicts[1].why == why and verdicts[1].ahead == 1.0 and verdicts[1].behind is None
    assert len(server.calls) == 6


@pytest.mark.parametrize("first", [None, say(b"", 500), say(b"", 503), say(b"busy", 429), say(b"", 408)])
def test_what_another_call_may_mend_is_asked_again(server, make, first):
    server.reply = lambda question, number: first if number <= 2 else say(completion("A"))
    (verdict,) = make(at_once=1)(PAIRS[:1])
    assert verdict.probability == 0.5 and len(server.calls) == 4
    assert len(make.waits) == 2 and 0 <= make.waits[0] <= 1 and 0 <= make.waits[1] <= 2


def test_it_is_left_alone_as_long_as_it_asks_for(server, make):
    server.reply = lambda question, number: say(b"", 429, Retry_After="7") if number == 1 else say(completion("A"))
    assert make(at_once=1)(PAIRS[:1])[0].probability == 0.5
    assert len(make.waits) == 1 and 7 <= make.waits[0] <= 8


def test_one_that_stays_broken_is_given_up(server, make):
    server.reply = lambda question, number: say(b"", 500)
    assert [verdict.why for verdict in make(tries=3)(PAIRS[:2])] == ["status 500, 3 times"] * 2
    assert len(server.calls) == 12
    server.reply = lambda question, number: None
    (verdict,) = make(tries=2)(PAIRS[:1])
    assert re.fullmatch(r"the connection failed \(\w+\), 2 times", verdict.why)


def test_a_slow_call_ends_at_its_time_and_is_asked_again(server, make):
    server.reply = lambda question, number: (number == 1 and time.sleep(0.8)) or say(completion("A"))
    judge = make(wait=0.5, at_once=1)
    assert judge(PAIRS[:1])[0].probability == 0.5 and judge.spent.calls == 3
    server.pause = 0.2
    judge = make(wait=0.05, tries=1, most=1000)
    assert judge(PAIRS[:1])[0].why == "no answer within 0.05 s, 1 times"
    asked = sum(-(-len(json.dumps(body)) // 4) for body in server.calls[-2:])
    assert judge.spent.tokens == asked + 2 * 1000  # the other side may have written all that it was allowed to


def test_all_calls_end_at_the_deadline_with_what_was_judged(server, make):
    server.reply = lambda question, number: (not question.startswith("q0") and time.sleep(0.3)) or say(completion("A"))
    start = time.monotonic()
    verdicts = make(deadline=0.15)(PAIRS)
    assert time.monotonic() - start < 2
    assert [verdict.probability for verdict in verdicts] == [0.5, None, None, None]
    assert {verdict.why for verdict in verdicts[1:]} == {"not answered before the deadline of 0.15 s"}


def test_calls_that_the_deadline_breaks_off_are_paid_for(server, make):
    server.pause = 0.4
    judge = make(deadline=0.15, most=1000)
    assert judge(PAIRS[:1])[0].probability is None and judge.spent.tokens > 1000 * judge.spent.calls > 0


def test_at_the_deadline_it_is_said_why_it_was_asked_again(server, make):
    server.reply = lambda question, number: say(b"", 503) if number <= 2 else (time.sleep(0.4), say(completion("A")))[1]
    (verdict,) = make(deadline=0.2)(PAIRS[:1])
    assert verdict.why == "not answered before the deadline of 0.2 s; before that status 503"


def test_one_that_wants_to_be_left_alone_for_too_long_is_given_up_at_once(server, make):
    server.reply = lambda question, number: say(b"", 429, Retry_After="86400")
    (verdict,) = make(deadline=60.0)(PAIRS[:1])
    assert verdict.why == "status 429, and it wants to be left alone until the deadline has passed"
    assert len(server.calls) == 2 and not make.waits


@pytest.mark.parametrize("status", [401, 403, 404])
def test_one_question_that_is_forbidden_is_one_without_a_verdict(server, make, status):
    server.reply = lambda question, number: say(b"no", status) if question == "q1|yes|no" else say(completion("A"))
    verdicts = make(at_once=1)(PAIRS[:3])
    assert [verdict.probability for verdict in verdicts] == [0.5, None, 0.5] and len(server.calls) == 6
    assert verdicts[1].why == f"refused with status {status} (no)"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_address_that_refuses_everything_stops_at_once_without_the_key(server, make, monkeypatch, status):
    monkeypatch.setenv("MY_KEY", KEY)
    server.reply = lambda question, number: say({"error": f"no {KEY}!"}, status)
    with pytest.raises(UserError) as error:
        make(key_from="MY_KEY")(PAIRS)
    assert f"far answers {status}" in str(error.value) and "no ***!" in str(error.value)
    assert KEY not in str(error.value) and server.keys[0] == f"Bearer {KEY}"


def test_a_body_without_an_end_is_not_read_to_it(server, make, monkeypatch):
    monkeypatch.setattr(judge_endpoint, "LARGEST", 1000)
    server.reply = lambda question, number: say(b" " * 100_000 + json.dumps(completion("A")).encode())
    assert make()(PAIRS[:1])[0].why == "the reply is no chat completion"


# Bounds


def test_no_more_calls_wait_than_may(server, make):
    server.pause = 0.02
    assert all(verdict.probability == 0.5 for verdict in make(at_once=3)(PAIRS))
    assert server.most_waiting <= 3 and len(server.calls) == 8


def test_more_than_a_hundred_calls_may_wait(server, make):
    enough = threading.Event()

    def reply(question, number):
        if server.waiting > 105:
            enough.set()
        enough.wait(10)
        return say(completion("A"))

    server.reply = reply
    verdicts = make(at_once=110, wait=60.0)([Pair(f"q{n}", "yes", "no") for n in range(55)])
    assert all(verdict.probability == 0.5 for verdict in verdicts)
    assert 105 < server.most_waiting <= 110


def test_the_budget_of_calls_stops_with_what_was_judged(server, make):
    judge = make(calls=5, at_once=1)
    verdicts = judge(PAIRS)
    assert [verdict.probability for verdict in verdicts] == [0.5, 0.5, None, None]
    assert {verdict.why for verdict in verdicts[2:]} == {"the budget of 5 calls is used up"}
    assert len(server.calls) == judge.spent.calls == 5
    assert judge(PAIRS[3:])[0].probability is None and len(server.calls) == 5


def test_repeated_calls_are_a_part_of_the_budget(server, make):
    server.reply = lambda question, number: say(b"", 500)
    assert make(calls=4, at_once=1, tries=3)(PAIRS)[0].why == "status 500, 3 times"
    assert len(server.calls) == 4


@pytest.mark.parametrize(("used", "each"), [(10, 10), (None, None)])
def test_the_budget_of_tokens_stops_too(server, make, used, each):
    server.reply = lambda question, number: say(completion("A", used=used))
    judge = make(tokens=25, at_once=1)
    assert judge(PAIRS)[-1].why == "the budget of 25 tokens is used up"
    assert judge.spent.tokens == 30 if each else judge.spent.tokens >= 25
    assert judge.spent.calls == (3 if each else 1)


def test_equal_questions_are_one_call(server, make):
    assert len(make()([PAIRS[0]] * 3)) == 3 and len(server.calls) == 2
    assert make()([]) == []


# The cache


def test_what_was_answered_is_not_asked_again(server, make, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    told = {"q1|yes|no": completion(f"I hold {KEY}"), "q2|yes|no": {"oh": "no"}}
    server.reply = lambda question, number: say(told.get(question, completion("A", {"A": 0.8, "B": 0.2})))
    settings = {"cache": str(tmp_path / "kept"), "key_from": "MY_KEY"}
    first = make(**settings)(PAIRS[:3])
    assert len(server.calls) == 6 and [verdict.probability for verdict in first] == [0.5, None, None]
    again = make(**settings)
    assert again(PAIRS[:3])[:2] == first[:2]
    # A judge's word is kept, also where it says nothing; what is none of its words is asked for again.
    assert len(server.calls) == 7 and (again.spent.calls, again.spent.cached) == (1, 5)
    files = [file for file in (tmp_path / "kept").rglob("*") if file.is_file()]
    assert len(files) == 5
    assert all(KEY not in file.read_text() and KEY not in str(file) for file in files)


def test_another_question_setting_or_order_is_asked(server, make, tmp_path):
    kept = {"cache": str(tmp_path)}
    make(**kept)(PAIRS[:1])
    for other in (
        make(**kept, body='{"seed": 1}'),
        make(PLAIN._replace(asked="!{prompt}|{first}|{second}"), **kept),
        make(PLAIN._replace(cue="Better:"), **kept),
        make(most=9, **kept),
    ):
        other(PAIRS[:1])
        assert other.spent.calls == 2 and other.spent.cached == 0
    swapped = make(**kept)
    assert swapped([Pair("q0", "no", "yes")])[0].probability == 0.5 and swapped.spent.calls == 0


def test_replies_that_are_drawn_at_random_have_a_seed_and_are_kept_by_it(server, make, tmp_path):
    def ask(seed: int, **more: Any) -> EndpointJudge:
        settings = Endpoint(cache=str(tmp_path), wait=5.0, body=more.pop("body", "{}"))
        judge = EndpointJudge("far", server.url, "m", PLAIN, settings, seed=seed, **more)
        judge(PAIRS[:1])
        return judge

    ask(0)
    assert "seed" not in server.calls[-1] and ask(1).spent.cached == 2
    for more in ({"temperature": 0.7}, {"body": '{"temperature": 1}'}, {"body": '{"temperature": null, "seed": null}'}):
        assert ask(3, **more).spent.calls == 2 and server.calls[-1].get("seed") == (None if "null" in str(more) else 3)
        assert ask(3, **more).spent.cached == 2 and ask(4, **more).spent.calls == 2


def test_a_broken_file_of_the_cache_is_asked_for_again(server, make, tmp_path):
    make(cache=str(tmp_path))(PAIRS[:1])
    for file, text in zip(
        sorted(tmp_path.rglob("*.json")), ("{", '{"probability": 3, "why": "", "text": ""}'), strict=True
    ):
        file.write_text(text)
    judge = make(cache=str(tmp_path))
    assert judge(PAIRS[:1])[0].probability == 0.5 and judge.spent.calls == 2


# What is refused


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://host/v1", "must begin with https:// or http:// and name a machine"),
        ("https://", "must begin with https:// or http:// and name a machine"),
        ("https://me:pass@host/v1", "judge at host holds a password or a query"),
        ("https://host/v1?key=abc", "judge at host holds a password or a query"),
        ("http://host/v1", "http://host would carry the key where all can read it; give --judge=https://"),
    ],
)
def test_addresses_that_give_something_away_are_refused(monkeypatch, url, says):
    monkeypatch.setenv("MY_KEY", KEY)
    with pytest.raises(UserError, match=says) as error:
        EndpointJudge("far", url, "m", PLAIN, Endpoint(key_from="MY_KEY", cache=""))
    assert "pass" not in str(error.value).replace("password", "") and "abc" not in str(error.value)
    if url == "http://host/v1":
        EndpointJudge("far", url, "m", PLAIN, Endpoint(cache=""))


def test_a_key_goes_to_this_machine_through_no_proxy(server, make, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert make(key_from="MY_KEY", tries=1)(PAIRS[:1])[0].probability == 0.5 and len(server.keys) == 2


def test_a_key_in_the_place_of_its_name_is_not_shown():
    with pytest.raises(UserError, match="key_from must name an environment variable that holds the key") as error:
        EndpointJudge("far", "https://host/v1", "m", PLAIN, Endpoint(key_from="sk-abc123"))
    assert "abc123" not in str(error.value)


def test_a_key_that_is_not_there_is_named(monkeypatch):
    for value in (None, " ", "a\nb"):
        monkeypatch.delenv("MY_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(UserError, match="the environment variable MY_KEY holds no key; set it, or leave"):
            EndpointJudge("far", "https://host/v1", "m", PLAIN, Endpoint(key_from="MY_KEY"))


def test_without_the_extra_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(judge_endpoint.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the packages httpx and tenacity; run: pip install 'rlhf_jax\[judge\]'"):
        EndpointJudge("far", "https://host/v1", "m", PLAIN, Endpoint())


def test_it_can_be_asked_where_an_event_loop_runs_already(server, make):
    async def notebook():
        return make()(PAIRS[:1])

    assert asyncio.run(notebook())[0].probability == 0.5
