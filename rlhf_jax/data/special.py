"""Special tokens in the text of a row stay text.

A tokenizer takes "</s>" for its end token wherever it stands. In a conversation that would let a user's text end
its turn and open another. So the tokens that steer are taken as such only where the chat template writes them:

- Before rendering, those in the row's text are wrapped in two characters that no text may hold.
- After it, the wrapping is turned over: it goes from the row's tokens and comes to the template's.
- Such a text is tokenised by a copy of the tokenizer that knows these tokens by their wrapped names alone. All
  else is as in the tokenizer: what stands between tokens, what they swallow, how a text begins.

Steering are the special tokens, and other added ones that are markup and stand in the template's source
("<tool_call>", "<think>"; not white space or words). The latter stay tokens in an assistant's text, because it is
the assistant that writes them.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from rlhf_jax.data.rows import Refusal

Ids = list[int]

# Noncharacters: Unicode keeps them out of the texts that programs exchange.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
NONCHARACTERS = re.compile("[\ufdd0-\ufdd3]")
_MARKUP = re.compile(r"[<>\[\]{}|]")


class Specials:
    """The tokens that steer, and how they are told from the same text in a row."""

    def __init__(self, added: Sequence[Any], named: Collection[str], template: str):
        """Args:
        added: `added_tokens` of a tokenizer.json.
        named: tokens with a part to play (beginning, end, padding), special or not.
        template: source of the chat template, "" without one.
        """
        special = {token["content"] for token in added if token["special"] or token["content"] in named}
        steering = {token["content"] for token in added if token["content"] in template}
        steering = {token for token in steering if _MARKUP.search(token)}
        self.special = frozenset(special - {""})
        self.control = self.special | steering
        self._special, self._control = _any(self.special), _any(self.control)
        self._wrapped = re.compile(f"{OPEN}({self._control.pattern}){CLOSE}|[{OPEN}{CLOSE}]")

    def holds(self, text: str) -> bool:
        """Whether a special token's text stands in it."""
        return self._special.search(text) is not None

    def wrap(self, value: Any, all_of_them: bool) -> Any:
        """A JSON value with the tokens in its strings wrapped: the special ones, or all that steer.

        Raises: Refusal for a string that holds the wrapping's characters.
        """
        if isinstance(value, str):
            if NONCHARACTERS.search(value):
                raise Refusal("the text holds a character of U+FDD0 to U+FDD3, which Unicode keeps out of texts")
            pattern = self._control if all_of_them else self._special
            return pattern.sub(_wrapped, value)
        if isinstance(value, dict):
            return {self.wrap(k, all_of_them): self.wrap(v, all_of_them) for k, v in value.items()}
        return [self.wrap(v, all_of_them) for v in value] if isinstance(value, list) else value

    def turn_over(self, rendering: str) -> str:
        """A rendering with the template's tokens wrapped and the row's bare."""
        if OPEN not in rendering and CLOSE not in rendering:
            return self._control.sub(_wrapped, rendering)
        # A filter of the template may have parted a token from its wrapping, which then says nothing.
        pieces = self._wrapped.split(rendering)
        return "".join(
            (piece or "") if i % 2 else self._control.sub(_wrapped, piece or "") for i, piece in enumerate(pieces)
        )


def wrapped(token: str) -> str:
    return f"{OPEN}{token}{CLOSE}"


def bare(text: str) -> str:
    """Without wrapping."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def _wrapped(match: re.Match[str]) -> str:
    return wrapped(match[0])


def _any(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches any of them, the longest first, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=lambda t: (-len(t), t)))) or "(?!)")


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A text in which only wrapped tokens are tokens; a plain string is tokenised as the tokenizer does."""

    text: str


class Vocabulary:
    """One tokenizer for plain and guarded texts.

    Attributes:
      control: numbers of the tokens that steer.
    """

    def __init__(self, state: dict[str, Any], specials: Specials, unknown: str | None):
        """Args:
        state: a tokenizer.json.
        unknown: the token for what the vocabulary lacks: plain text may give it.
        """
        self._state = state
        self._plain = _tokenizer(state)
        self._specials = specials
        self._unknown = unknown
        self.control = frozenset(t["id"] for t in state["added_tokens"] if t["content"] in specials.control)

    @functools.cached_property
    def _guarded(self) -> tuple[Tokenizer, dict[int, int], set[int]]:
        """The copy, the numbers of its added tokens in the tokenizer, and those that no plain text may give."""
        added = self._state["added_tokens"]
        control = self._specials.control
        names = [wrapped(token["content"]) if token["content"] in control else token["content"] for token in added]
        # The copy numbers renamed tokens anew, from the size of the vocabulary on: that must be above all numbers.
        vocabulary = self._state["model"]["vocab"]
        gap = max(vocabulary.values(), default=-1) + 1 - len(vocabulary) if isinstance(vocabulary, dict) else 0
        fill = [{**added[0], "content": wrapped(str(i)), "id": 0} for i in range(gap)] if added else []
        renamed = [{**token, "content": name} for token, name in zip(added, names, strict=True)]
        copy = _tokenizer({**self._state, "added_tokens": fill + renamed, "post_processor": None})
        numbers = {copy.token_to_id(name): token["id"] for token, name in zip(added, names, strict=True)}
        pieces = map(copy.token_to_id, control - {self._unknown})
        return copy, {i: number for i, number in numbers.items() if i is not None}, {i for i in pieces if i is not None}

    def __call__(self, texts: Iterable[str | Guarded]) -> dict[str | Guarded, Ids]:
        """Ids of each distinct text, without special tokens added; a guarded text that can't be kept is left out."""
        distinct = dict.fromkeys(texts)
        plain = [text for text in distinct if isinstance(text, str)]
        encodings = self._plain.encode_batch_fast(plain, add_special_tokens=False)
        ids: dict[str | Guarded, Ids] = {t: e.ids for t, e in zip(plain, encodings, strict=True)}
        return ids | dict(self._literal([text for text in distinct if isinstance(text, Guarded)]))

    def decode(self, ids: Ids) -> str:
        return self._plain.decode(ids, skip_special_tokens=False)

    def _literal(self, texts: Sequence[Guarded]) -> Iterator[tuple[Guarded, Ids]]:
        if not texts:
            return
        copy, numbers, forbidden = self._guarded
        tokens = {copy.token_to_id(wrapped(token)) for token in self._specials.control}
        encodings = copy.encode_batch_fast([text.text for text in texts], add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            # A vocabulary may have pieces of its own with the text of a special token.
            whole = sum(i in tokens for i in encoding.ids) == text.text.count(OPEN)
            if whole and forbidden.isdisjoint(encoding.ids):
                yield text, [numbers.get(i, i) for i in encoding.ids]


def _tokenizer(state: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(state))


def continuing(state: Any) -> Any:
    """A tokenizer.json told that its text does not stand at the beginning.

    SentencePiece-like tokenizers put a space before the text: as a `Prepend` normalizer, as `Metaspace` with
    a prepend scheme, or as `add_prefix_space` of a byte-level one. On a completion tokenised apart it would
    be a space that no one wrote: "Assistant:" + "Yes" would be trained as "Assistant: Yes". Only what runs
    before the vocabulary is changed; the decoder is not used.
    """
    return {
        **state,
        "normalizer": _unprefixed(state["normalizer"]),
        "pre_tokenizer": _unprefixed(state["pre_tokenizer"]),
    }


def _unprefixed(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    changed = {"prepend_scheme": "never", "add_prefix_space": False}
    part = {name: changed[name] if name in changed else value for name, value in part.items()}
    return {
        name: [_unprefixed(p) for p in value] if name in ("normalizers", "pretokenizers") else value
        for name, value in part.items()
    }
