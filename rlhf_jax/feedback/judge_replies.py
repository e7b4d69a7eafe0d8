"""What a judge behind an address replied: its verdict, what it cost, and the folder that keeps it."""

import bisect
import hashlib
import itertools
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from rlhf_jax.feedback.judges import Template, clamped

VERSION = 2  # of how a reply is read; another one reads all of them anew
LETTER = re.compile(r"[\s*_`\"'(\[]*(?:Response\s+)?([AB])[\s*_`\"')\].!]*")
KEPT = 4000  # characters of a reply that the cache keeps
SIZE = 4  # bytes that count as a token where a reply doesn't say how many it used


class Reply(NamedTuple):
    """Of one question in one order.

    Attributes:
      probability: that the answer shown first is better, 0 to 1; None: the reply doesn't say.
      why: why it doesn't, a clause; "" where it does.
      text: what the judge wrote.
      keep: whether it is a judge's word, which another call would only repeat.
    """

    probability: float | None
    why: str = ""
    text: str = ""
    keep: bool = False


def read(content: bytes, template: Template, hide: Callable[[str], str] = str) -> Reply:
    """The verdict of a chat completion.

    Args:
      content: the body of the reply.
      hide: takes out of a text what may not be kept.
    """
    try:
        choice = json.loads(content)["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return Reply(None, "the reply is no chat completion")
    if not isinstance(text, str):
        return Reply(None, "the reply has no text")
    found = _found(text, template)
    if found is None:
        return Reply(None, "the reply says neither A nor B", hide(text), keep=True)
    letter, place = found
    chance = _chance(choice, text, letter, place)
    if chance is None:
        chance = float(letter == "A")
    return Reply(clamped(chance) if template.reasoning else chance, "", hide(text), keep=True)


def verdict(text: str, template: Template) -> str | None:
    """The letter that a reply says: on the line behind the last cue, or without a cue as all that it says.

    >>> template = Template("", "The better response is:")
    >>> [verdict(text, template) for text in ("**A**", "the better response is: [[B]].\\nBye", "A cat", "Neither")]
    ['A', 'B', None, None]
    """
    found = _found(text, template)
    return found[0] if found else None


def _found(text: str, template: Template) -> tuple[str, int] | None:
    """The letter, and where in the text it stands."""
    cues = [cue.end() for cue in re.finditer(re.escape(template.cue), text, re.IGNORECASE)]
    if not cues and template.reasoning:
        return None
    start, end = 0, len(text)
    if cues:
        start = end - len(text[cues[-1] :].lstrip(" *_\n"))
        end = start + len(text[start:].partition("\n")[0])
    found = LETTER.fullmatch(text, start, end)
    return (found[1], found.start(1)) if found else None


def _chance(choice: Mapping[str, Any], text: str, letter: str, place: int) -> float | None:
    """P(A) / (P(A) + P(B)) at the token of the letter at a place of the text; None where log-probabilities don't tell.

    Tokens may stand before the text and behind it, such as those of an end; they are counted in bytes, since one
    character may be several of them.
    """
    try:
        tokens = choice["logprobs"]["content"]
        pieces = [_bytes(token) for token in tokens]
        start = b"".join(pieces).rfind(text.encode(errors="surrogatepass"))
        place = start + len(text[:place].encode(errors="surrogatepass"))
        ends = list(itertools.accumulate(map(len, pieces)))
        token = tokens[bisect.bisect_right(ends, place)]
        if start < 0 or _letter(token["token"]) != letter:
            return None
        options = {one["token"]: float(one["logprob"]) for one in [*token["top_logprobs"], token]}
    except (LookupError, TypeError, ValueError, AttributeError):
        return None
    if any(math.isnan(value) or value > 1e-3 for value in options.values()):
        return None
    mass = {name: math.fsum(math.exp(v) for t, v in options.items() if _letter(t) == name) for name in "AB"}
    total = mass["A"] + mass["B"]
    return mass["A"] / total if total > 0 else None


def _bytes(token: Mapping[str, Any]) -> bytes:
    """Of a token, as the reply has them, or those of its text."""
    said = token.get("bytes")
    return bytes(said) if isinstance(said, list) else token["token"].encode(errors="surrogatepass")


def _letter(token: Any) -> str | None:
    """A or B where a token says that and nothing else: " A", "A", "**B"."""
    found = LETTER.fullmatch(token) if isinstance(token, str) else None
    return found[1] if found else None


def most_of(body: Mapping[str, Any]) -> int:
    """Tokens that a call may have used of which nothing is known: those of the question, and the most of a reply."""
    most = [body[name] for name in ("max_tokens", "max_completion_tokens") if isinstance(body.get(name), int)]
    return -(-len(json.dumps(body)) // SIZE) + max(most, default=0)


def tokens_of(content: bytes, body: Mapping[str, Any]) -> int:
    """Tokens that a call used, as its reply says; if it doesn't, one for each 4 bytes that were sent and received."""
    try:
        used = json.loads(content)["usage"]["total_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):
        used = None
    if isinstance(used, int) and not isinstance(used, bool) and used >= 0:
        return used
    return -(-(len(json.dumps(body)) + len(content)) // SIZE)


# What is kept


def name_of(url: str, body: Mapping[str, Any], template: Template, seed: int | None = None) -> str:
    """A reply's name: another address, model, setting, template, text or order has another.

    The key is no part of what is named.

    Args:
      seed: of a reply that is drawn at random.
    """
    asked = [VERSION, url, body, template, seed]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def load(folder: epath.Path | None, name: str) -> Reply | None:
    """A reply that was kept; None if there is none, or none that can be read."""
    if folder is None:
        return None
    file = _file(folder, name)
    try:
        kept = json.loads(file.read_text())
        chance = kept["probability"]
        if chance is not None and not 0 <= chance <= 1:
            return None
        return Reply(chance, str(kept["why"]), str(kept["text"]), keep=True)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def store(folder: epath.Path | None, name: str, reply: Reply) -> None:
    """Keeps a reply: whole or not at all, also when two programs write."""
    if folder is None:
        return
    file = _file(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.parent / f"{file.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    part.write_text(json.dumps({"probability": reply.probability, "why": reply.why, "text": reply.text[:KEPT]}))
    part.replace(file)


def _file(folder: epath.Path, name: str) -> epath.Path:
    return folder / name[:2] / f"{name}.json"
