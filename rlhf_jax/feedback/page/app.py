"""The server's replies: a labeller's next task, what they say of it, and the owner's figures and rows."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, cast

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from rlhf_jax.data.formats import values
from rlhf_jax.data.rows import Refusal as Unreadable
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import assignment, exchange
from rlhf_jax.feedback.assignment import Terms, Turn
from rlhf_jax.feedback.judgement import FLAGS, Judgement, Said, Task, check
from rlhf_jax.feedback.overview import overview
from rlhf_jax.feedback.page.guard import Guard, Refusal
from rlhf_jax.feedback.record import Record, Taken

STATIC = pathlib.Path(__file__).parent / "static"
LABELLER, OWNER = "labeller", "owner"


@dataclasses.dataclass(frozen=True)
class Desk:
    """What the server serves.

    Attributes:
      guidelines: their text, and the version that judgements name.
      scale: answers are also rated, 1 to this; 0: they aren't.
      labellers: whose links work; None: everyone's who has one.
    """

    record: Record
    terms: Terms = Terms()
    guidelines: tuple[str, str] = ("", "")
    scale: int = 0
    cost_per_hour: float | None = None
    labellers: tuple[str, ...] | None = None


# What is asked of the server: by whom, and the reply to (desk, name, body or path).


def turn(desk: Desk, name: str, _: Any) -> dict[str, Any]:
    """What the labeller does next."""
    now = assignment.turn(desk.record, name, desk.terms)
    text, version = desk.guidelines
    told = {"state": now.state, "name": name, "done": now.done, "left": now.left, "undo": now.undo}
    told |= {"qualifying": now.qualifying, "guidelines": {"text": text, "version": version}, "scale": desk.scale}
    # Where the browser keeps what isn't sent: the same with a new link, another for another person or record.
    told |= {"flags": FLAGS, "shelf": desk.record.mark("shelf", name)}
    return told | ({} if now.task is None else {"task": _shown(desk, name, now, now.task)})


def _shown(desk: Desk, name: str, now: Turn, task: Task) -> dict[str, Any]:
    """A task as a labeller may see it: in the blind order, without models and gold."""
    order = assignment.order(desk.record, name, now.id, task)
    shown = {"id": now.id, "kind": task.kind, "prompt": _turns(task.prompt), "replaces": now.replaces}
    shown["answers"] = [_text(task.answers[place]) for place in order]
    shown["draft"] = desk.record.draft(now.id, name)
    if (before := now.before) is not None:
        places = {place: at for at, place in enumerate(order)}
        of = lambda some: [some[place] for place in order] if some else []
        shown["before"] = {"kind": before.kind, "ranks": of(before.ranks), "marks": of(before.marks)}
        shown["before"] |= {"ratings": of(before.ratings), "flags": of(before.flags), "note": before.note}
        shown["before"]["rewrites"] = [[places[place], text] for place, text in before.rewrites]
    return shown


def _turns(prompt: Any) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "", "text": prompt}]
    return [{"role": one["role"], "text": _text([one])} for one in prompt]


def _text(text: Any) -> str:
    """An answer as people read it; what a message calls stands as JSON."""
    if isinstance(text, str):
        return text
    parts = []
    for one in text:
        more = {name: value for name, value in one.items() if name not in ("role", "content")}
        parts += [part for part in (one["content"], json.dumps(more, indent=2) if more else "") if part]
    return "\n\n".join(parts)


def judge(desk: Desk, name: str, body: Any) -> dict[str, Any]:
    """Writes a judgement down; the same one again is no second."""
    id, place, kind = (_string(body, field, 200) for field in ("id", "task", "kind"))
    task = desk.record.task(place)
    order = assignment.order(desk.record, name, place, task)
    count = len(order)

    def placed(field: str, one: Callable[[Any], Any]) -> tuple[Any, ...]:
        """A list in the order shown, in the task's."""
        some = body.get(field) or []
        if not isinstance(some, list) or len(some) not in (0, count):
            raise UserError(f"{field} must be a list of {count} values, one an answer.")
        found = dict(zip(order, map(one, some), strict=False))
        return tuple(found[place] for place in range(count)) if some else ()

    rewrites = body.get("rewrites") or []
    if not isinstance(rewrites, list) or not all(isinstance(one, list) and len(one) == 2 for one in rewrites):
        raise UserError("rewrites must be a list of [place, text].")
    written = ((order[_place(at, count)], _readable(text, "rewrites")) for at, text in rewrites)
    # Who opens the box and changes nothing has written nothing. Browsers end lines in their own way.
    rewritten = tuple((at, text) for at, text in written if _unix(text) != _unix(_text(task.answers[at])))
    version = _string(body, "guidelines", 100)
    if version and not desk.record.knows(version):
        raise UserError(f"there are no guidelines of the version {version!r}; load the page anew.")
    if kind not in ("ranking", "steps", "unsure"):
        raise UserError("kind must be ranking, steps or unsure.")
    if not isinstance(body.get("replaces"), str | None):
        raise UserError("replaces must be the id of a judgement, or null.")
    seconds = body.get("seconds")
    said = Judgement(
        id=id, task=place, labeller=name, kind=cast(Said, kind),
        ranks=placed("ranks", _number), marks=placed("marks", _number),
        ratings=placed("ratings", lambda one: None if one is None else _rating(one, desk.scale)),
        flags=placed("flags", lambda some: tuple(_each(some, "flags"))),
        rewrites=rewritten, note=_string(body, "note", 10_000), guidelines=version, shown=order,
        seconds=None if seconds is None else _number(seconds), replaces=body.get("replaces"),
    )  # fmt: skip
    check(said, task)
    return {"new": assignment.answer(desk.record, said)}


def draft(desk: Desk, name: str, body: Any) -> dict[str, Any]:
    """Keeps what a labeller has begun to say."""
    begun = body.get("draft")
    if not isinstance(begun, dict):
        raise UserError("draft must be an object.")
    assignment.keep(desk.record, _string(body, "task", 200), name, begun, desk.terms)
    return {"kept": True}


def undo(desk: Desk, name: str, body: Any) -> dict[str, Any]:
    """Takes the labeller's last judgement back."""
    last, id = _string(body, "last", 200), _string(body, "id", 200)
    return {"new": assignment.undo(desk.record, name, last, id, desk.terms)}


def figures(desk: Desk, name: str, _: Any) -> dict[str, Any]:
    """The owner's dashboard."""
    return overview(desk.record, desk.cost_per_hour) | {"exports": list(exchange.EXPORTS)}


def rows(desk: Desk, name: str, kind: Any) -> Response:
    """Rows to train on, as a file."""
    if kind not in exchange.EXPORTS:
        raise Refusal(404, f"there are no rows called {kind!r}; there are {', '.join(exchange.EXPORTS)}.")
    text = exchange.lines(exchange.EXPORTS[kind](desk.record))
    return Response(
        text, headers={"content-disposition": f'attachment; filename="{kind}.jsonl"'}, media_type="text/plain"
    )


# What a body holds


def _string(body: Any, field: str, most: int) -> str:
    value = body.get(field, "")
    if not isinstance(value, str) or len(value) > most:
        raise UserError(f"{field} must be a string of at most {most} characters.")
    return _readable(value, field)


def _readable(value: Any, field: str) -> str:
    try:
        return values.string(value, field)
    except Unreadable as reason:
        raise UserError(f"{reason}.") from None


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n")


def _number(value: Any) -> float:
    if type(value) not in (int, float) or abs(value) > 1e9:
        raise UserError(f"{str(value)[:40]!r} is not a number that is allowed here.")
    return value


def _rating(value: Any, scale: int) -> float:
    if type(value) is not int or not 1 <= value <= scale:
        raise UserError(f"a rating is {str(value)[:40]!r}; allowed are whole numbers from 1 to {scale}.")
    return float(value)


def _place(value: Any, count: int) -> int:
    if type(value) is not int or not 0 <= value < count:
        raise UserError(f"{str(value)[:40]!r} is not the place of an answer, 0 to {count - 1}.")
    return value


def _each(some: Any, field: str) -> list[str]:
    if not isinstance(some, list) or len(some) > len(FLAGS) or not all(isinstance(one, str) for one in some):
        raise UserError(f"{field} must hold a list for each answer, of {', '.join(FLAGS)}.")
    return some


# The application

Reply = Callable[[Desk, str, Any], Any]
API: dict[tuple[str, str], tuple[str, Reply]] = {
    ("GET", "/api/turn"): (LABELLER, turn),
    ("POST", "/api/judgement"): (LABELLER, judge),
    ("POST", "/api/draft"): (LABELLER, draft),
    ("POST", "/api/undo"): (LABELLER, undo),
    ("GET", "/api/overview"): (OWNER, figures),
    ("GET", "/api/rows/{kind}"): (OWNER, rows),
}


def make(desk: Desk, host: str, address: str = "") -> Guard:
    """The application, which listens at `host` and is opened at `address`, as Guard has them."""
    api = [Route(path, _endpoint(desk, role, reply), methods=[method]) for (method, path), (role, reply) in API.items()]
    pages = [Route("/", _file("label.html")), Route("/board", _file("board.html"))]
    return Guard(Starlette(routes=[*pages, *api, Mount("/static", StaticFiles(directory=STATIC))]), host, address)


def _file(name: str) -> Any:
    async def reply(request: Request) -> Response:
        return FileResponse(STATIC / name)

    return reply


def _endpoint(desk: Desk, role: str, reply: Reply) -> Any:
    """One of the replies as Starlette calls it: the secret is checked first, and every mistake is one sentence."""

    def work(secret: str, given: Any) -> Any:
        found = desk.record.whose(secret) if secret else None
        # Who is no longer among the labellers is as good as unknown.
        if found is None or (found[1] == LABELLER and desk.labellers is not None and found[0] not in desk.labellers):
            raise Refusal(401, "this link is not known here; ask for a new one.")
        name, has = found
        if has != role:
            raise Refusal(403, f"this link is that of the {has}, and only the {role} may do this.")
        return reply(desk, name, given)

    async def endpoint(request: Request) -> Response:
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        try:
            given = request.path_params.get("kind")
            if request.method == "POST":
                given = _parsed(await request.body())
            done = await run_in_threadpool(work, secret.strip() if kind.lower() == "bearer" else "", given)
        except Refusal as refusal:
            return JSONResponse({"error": refusal.says}, refusal.status)
        except Taken as error:
            return JSONResponse({"error": str(error)}, 409)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        return done if isinstance(done, Response) else JSONResponse(done)

    return endpoint


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, parse_constant=_no_number, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair could never be sent back
    except (ValueError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError("the body is not a JSON object.")
    return value


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):  # 1e999 could never be sent back
        _no_number(text)
    return value
