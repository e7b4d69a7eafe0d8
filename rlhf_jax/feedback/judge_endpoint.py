"""A model behind an address as a judge: chat completions in OpenAI's form, over HTTP.

Whatever the other side does ends in a verdict or in None with a reason, within a deadline and a budget: docs/adr/018.
"""

import asyncio
import concurrent.futures
import dataclasses
import email.utils
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Annotated, Any

from etils import epath

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judge_replies
from rlhf_jax.feedback.judge_replies import Reply
from rlhf_jax.feedback.judges import Pair, Template, Verdict, both

LARGEST = 4 << 20  # bytes of a reply that are read
BUSY = (408, 409, 425, 429)  # and 500 up: another time the same question may be answered
CLOSED = (401, 403, 404)  # nothing that is asked here will be answered
LOCAL = ("localhost", "127.0.0.1", "::1")
TOP = 5  # likeliest tokens that are asked for; the options are among them, or have next to no chance


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """How a judge behind an address is asked."""

    key_from: Annotated[str | None, "environment variable that holds the key; none: no key is sent"] = None
    logprobs: Annotated[bool, "ask for log-probabilities; an address that refuses that needs --noendpoint.logprobs"] = (
        True
    )
    body: Annotated[str, "JSON object of more fields of each request; a null takes one of ours away"] = "{}"
    at_once: Annotated[int, "calls that wait at a time"] = 8
    wait: Annotated[float, "seconds that a call may take"] = 60.0
    deadline: Annotated[float, "seconds that all calls of each judge together may take"] = 3600.0
    tries: Annotated[int, "calls for one question that is not answered: busy, broken or late"] = 6
    calls: Annotated[int | None, "most calls of each judge; none: any number"] = None
    tokens: Annotated[int | None, "a judge that has used so many tokens begins no call; none: any number"] = None
    cache: Annotated[str, "folder of what was answered; empty: none"] = "~/.cache/rlhf_jax/judges"


@dataclasses.dataclass
class Spent:
    """What was used so far: calls, tokens of questions and answers, and questions that the cache answered."""

    calls: int = 0
    tokens: int = 0
    cached: int = 0


class Stopped(Exception):
    """No other call is worth while, as when the budget is used up; the argument is the reason, a clause."""


class Again(Exception):
    """A call that another one may mend; the argument is the reason, a clause."""

    def __init__(self, reason: str, after: float = 0.0):
        """Args: after: seconds that the other side wants to be left alone."""
        super().__init__(reason)
        self.after = after


def check(settings: Endpoint, flag: str = "--endpoint.") -> Mapping[str, Any]:
    """The fields of `body`. Errors: UserError naming the first setting that means nothing."""
    for name, least in (("at_once", 1), ("tries", 1), ("calls", 1), ("tokens", 1)):
        if (value := getattr(settings, name)) is not None and value < least:
            raise UserError(f"{flag}{name}={value} is not allowed; it must be at least {least}.")
    for name in ("wait", "deadline"):
        if not 0 < (value := getattr(settings, name)) < math.inf:
            raise UserError(f"{flag}{name}={value} is not allowed; it must be finite seconds above 0.")
    try:
        body = json.loads(settings.body)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UserError(f'{flag}body is no JSON object; give one such as {{"max_completion_tokens": 500}}.')
    return body


class EndpointJudge:
    """Asks `URL/chat/completions` which of two answers is better, in both orders; the verdict is their mean.

    The chance of an order is that of the tokens A and B where the reply says its letter, normalised over the two;
    without log-probabilities there 1 or 0 by the letter. With a template of reasoning it is clamped to 0.4..0.6 before
    the mean. A reply that says neither is None, and is not asked for again.

    Attributes: spent: what was used, over all calls of the judge.
    """

    def __init__(
        self,
        name: str,
        url: str,
        model: str,
        template: Template,
        settings: Endpoint = Endpoint(),
        *,
        temperature: float = 0.0,
        most: int = 8,
        seed: int = 0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        """Args:
          name: what messages call it.
          url: as far as `/v1`, without a key in it.
          model: the name that the address knows it by.
          temperature, most: of the reply, and its most tokens.
          seed: of a reply whose temperature isn't 0; it is sent, and such a reply is found again by it.
          sleep: waits between two calls for one question.
        Errors: UserError for an address that can't be asked, a key that isn't there, and as `check`.
        """
        more = check(settings)
        self.name, self.template, self.settings, self.spent = name, template, settings, Spent()
        self._key = _key(settings.key_from)
        self._url, self._sleep = _address(url, self._key), sleep
        self._cache = epath.Path(os.path.expanduser(settings.cache)) if settings.cache else None
        asks = {"logprobs": True, "top_logprobs": TOP} if settings.logprobs else {}
        drawn = more.get("temperature", temperature) != 0
        self._seed = seed if drawn else None
        asks |= {"seed": seed} if drawn else {}
        body = {"model": model, "temperature": temperature, "max_tokens": most, **asks, **more}
        self._ends, self._answered = math.inf, False
        self._body = {name: value for name, value in body.items() if value is not None}

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Errors: UserError where the address refuses everything: no such model, or not with this key."""
        asked = [self.template.fill(pair, swapped) for pair in pairs for swapped in (False, True)]
        said = _run(self._all(list(dict.fromkeys(asked))))
        verdicts = []
        for ahead, behind in zip(asked[::2], asked[1::2], strict=True):
            first, second = said[ahead], said[behind]
            last = None if second.probability is None else 1 - second.probability
            verdicts.append(both(first.probability, last, first.why or second.why))
        return verdicts

    async def _all(self, questions: Sequence[str]) -> dict[str, Reply]:
        """The reply to each question, until all are there or the deadline passes."""
        import httpx

        room = asyncio.Semaphore(self.settings.at_once)
        late = f"not answered before the deadline of {self.settings.deadline:g} s"
        said = dict.fromkeys(questions, Reply(None, late))
        self._ends = time.monotonic() + self.settings.deadline

        async def one(client: Any, question: str) -> None:
            def again(state: Any) -> None:
                said[question] = Reply(None, f"{late}; before that {state.outcome.exception()}")

            async with room:
                said[question] = await self._reply(client, question, again)

        # The time of a call is ours to watch: theirs is of each piece of it. Nor may calls wait inside the client,
        # whose usual limit is 100. A proxy of the environment is for other machines than this one.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self.settings.at_once)
        outside = httpx.URL(self._url).host not in LOCAL
        async with httpx.AsyncClient(timeout=None, limits=limits, trust_env=outside) as client:
            tasks = [asyncio.create_task(one(client, question)) for question in questions]
            if tasks:
                _, rest = await asyncio.wait(tasks, timeout=self.settings.deadline, return_when=asyncio.FIRST_EXCEPTION)
                for task in rest:
                    task.cancel()
                await asyncio.gather(*rest, return_exceptions=True)
            failed = [error for task in tasks if not task.cancelled() and (error := task.exception())]
        for error in failed[:1]:
            raise error
        return said

    async def _reply(self, client: Any, question: str, again: Callable[[Any], None]) -> Reply:
        """Of one question, from the cache or the other side; `again` is told before it is asked for again."""
        import tenacity

        body = self._body | {"messages": [{"role": "user", "content": question}]}
        known = judge_replies.name_of(self._url, body, self.template, self._seed)
        if (stored := judge_replies.load(self._cache, known)) is not None:
            self.spent.cached += 1
            return stored
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.settings.tries), wait=_pause, sleep=self._sleep, reraise=True,
            retry=tenacity.retry_if_exception_type(Again), before_sleep=again,
        )  # fmt: skip
        try:
            reply = await retrying(self._call, client, body)
        except Stopped as stop:
            return Reply(None, str(stop))
        except Again as error:
            return Reply(None, f"{error}, {self.settings.tries} times")
        if reply.keep:
            judge_replies.store(self._cache, known, reply)
        return reply

    async def _call(self, client: Any, body: Mapping[str, Any]) -> Reply:
        """One call. Raises: Stopped, Again, and UserError where no other question would be answered either."""
        import httpx

        self._check_budget()
        self.spent.calls += 1
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with asyncio.timeout(self.settings.wait):
                async with client.stream("POST", self._url, json=body, headers=headers) as response:
                    content = await _content(response)
        except asyncio.CancelledError:  # the deadline; what is broken off is paid for too
            self.spent.tokens += judge_replies.most_of(body)
            raise
        except TimeoutError:
            self.spent.tokens += judge_replies.most_of(body)
            raise Again(f"no answer within {self.settings.wait:g} s") from None
        except httpx.DecodingError:
            self.spent.tokens += judge_replies.most_of(body)
            return Reply(None, "the reply can't be unpacked")
        except httpx.RequestError as error:  # its own words may hold what was sent
            raise Again(f"the connection failed ({type(error).__name__})") from None
        status = response.status_code
        if status in BUSY or status >= 500:
            after = _after(response.headers.get("Retry-After"))
            if after > self._ends - time.monotonic():
                raise Stopped(f"status {status}, and it wants to be left alone until the deadline has passed")
            raise Again(f"status {status}", after)
        if status in CLOSED and not self._answered:
            raise UserError(
                f"{self.name} answers {status} ({self._shown(content)}); check the address and the model of --judge "
                "and the key that --endpoint.key_from names."
            )
        self.spent.tokens += judge_replies.tokens_of(content, body)
        self._answered = self._answered or status == 200
        if status != 200:
            return Reply(None, f"refused with status {status} ({self._shown(content)})")
        return judge_replies.read(content, self.template, self._hide)

    def _check_budget(self) -> None:
        for name in ("calls", "tokens"):
            most = getattr(self.settings, name)
            if most is not None and getattr(self.spent, name) >= most:
                raise Stopped(f"the budget of {most} {name} is used up")

    def _hide(self, text: str) -> str:
        """A text of the other side, which may repeat the key."""
        return text.replace(self._key, "***") if self._key else text

    def _shown(self, content: bytes) -> str:
        return " ".join(self._hide(content.decode(errors="replace")).split())[:200] or "without a word"


def _key(name: str | None) -> str:
    """The key that an environment variable holds. Errors: UserError if it holds none."""
    if name is None:
        return ""
    if not re.fullmatch(r"[A-Za-z_]\w*", name):  # and may be the key itself, so it isn't shown
        raise UserError("--endpoint.key_from must name an environment variable that holds the key; give such a name.")
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(f"the environment variable {name} holds no key; set it, or leave --endpoint.key_from away.")
    return key


def _address(url: str, key: str) -> str:
    """Where completions are asked for. Errors: UserError for what is no address, or would give a key away."""
    if any(importlib.util.find_spec(package) is None for package in ("httpx", "tenacity")):
        raise UserError("a judge behind an address needs the packages httpx and tenacity; run: pip install "
                        "'rlhf_jax[judge]'.")  # fmt: skip
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError("the address of a judge must begin with https:// or http:// and name a machine; mend --judge.")
    if parsed.userinfo or parsed.query:
        raise UserError(
            f"the address of a judge at {parsed.host} holds a password or a query, and addresses are shown; leave it "
            "away and name the environment variable of the key with --endpoint.key_from."
        )
    if key and parsed.scheme == "http" and parsed.host not in LOCAL:
        raise UserError(f"http://{parsed.host} would carry the key where all can read it; give --judge=https://...")
    return f"{str(parsed).rstrip('/')}/chat/completions"


async def _content(response: Any) -> bytes:
    """The body, or as much as is read of one."""
    content = b""
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > LARGEST:
            break
    return content


def _after(header: str | None) -> float:
    """The seconds of a Retry-After, a number or a date; 0 without one.

    >>> _after("7"), _after("soon"), _after("Wed, 21 Oct 2015 07:28:00 GMT")
    (7.0, 0.0, 0.0)
    """
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(str(header)).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0


def _pause(state: Any) -> float:
    """Seconds before the next call: what the other side asked for, and a random part that doubles each time."""
    import tenacity

    error = state.outcome.exception()
    return error.after + tenacity.wait_random_exponential(multiplier=1, max=60)(state)


def _run(work: Coroutine[Any, Any, dict[str, Reply]]) -> dict[str, Reply]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # a loop runs here already, as in a notebook
        return pool.submit(asyncio.run, work).result()
