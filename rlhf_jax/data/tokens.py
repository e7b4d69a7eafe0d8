"""Text to token ids, with the tokens that are trained.

Strings are taken as they are: prompt and completion are tokenised apart, so that the boundary is exact and no
token straddles it, and the end token follows the completion. Conversations go through the chat template, and
every boundary is found on token ids and verified: a row whose template renders the prompt differently once an
answer follows is refused, because the model would be asked with another context than it was trained on.

Conventions shared with TRL 1.16: everything after the prompt is trained, so also what a template writes after
the end-of-turn token of an answer (the newline of ChatML); an end token that the completion already ends with
is not written twice; a template's rendering is final, no special token is added to it. Not shared: TRL
tokenises prompt + completion strings together and lets the completion begin at the first token that differs.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2
import numpy as np
from etils import epath
from tokenizers import Tokenizer

from rlhf_jax.data.rows import Conversation, Message, Refusal, Text
from rlhf_jax.errors import UserError

Ids = list[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One prompt with one completion, or one conversation.

    Attributes:
      ids: int32 [n].
      mask: bool [n], True on trained tokens. Never True on the first token: nothing stands before it, so it
        has no log-probability.
      head: leading tokens (0 or 1: the beginning token) that stay when the prompt is cut.
    """

    ids: np.ndarray
    mask: np.ndarray
    head: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def start(self) -> int:
        """Tokens before the first trained one: the length of the prompt, at least 1."""
        return int(self.mask.argmax())

    @property
    def prompt(self) -> np.ndarray:
        return self.ids[: self.start]


def fit(rows: Sequence[Tokens], length: int) -> tuple[Tokens, ...] | None:
    """Rows with one prompt, cut to `length` tokens: the oldest prompt tokens go, the same from every row.

    A beginning token stays first, and one prompt token at least is kept, so that the first completion token
    keeps something to be predicted from. None if the longest completion doesn't fit even so.
    """
    over = max(len(row) for row in rows) - length
    if over <= 0:
        return tuple(rows)
    if over > min(row.start for row in rows) - 1:
        return None
    return tuple(_without(row, slice(row.head, row.head + over)) for row in rows)


def _without(row: Tokens, gone: slice) -> Tokens:
    return Tokens(np.delete(row.ids, gone), np.delete(row.mask, gone), row.head)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What must be tokenised for one row: texts, and which slices of the result are trained."""

    full: str
    spans: tuple[tuple[str, str], ...]  # (text before an answer, text up to its end), both rendered


class Encoder:
    """A tokenizer with its chat template.

    Attributes:
      chat: whether conversations can be rendered.
      fingerprint: hexadecimal; changes with vocabulary, merges, special tokens and template.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None):
        """Args:
          tokenizer: of transformers, with a tokenizer.json behind it. It is not changed.
          chat_template: path of a Jinja file used in the place of the tokenizer's own template.
        Raises: UserError for a tokenizer without a `tokenizer.json`, or a template file that isn't there.
        """
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json; save it as a fast one "
                "with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template if chat_template is None else _file(chat_template)
        self._named = "of the tokenizer" if chat_template is None else chat_template
        self.chat: bool = self._template is not None
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None  # some tokenizer.json files come with a truncation
        self._start = Tokenizer.from_str(json.dumps(state))
        self._middle = Tokenizer.from_str(json.dumps(_continuing(state)))
        # Ask instead of reading `add_bos_token`: it is False for tokenizers whose post-processor adds one.
        self._adds_bos = self.bos_id is not None and list(tokenizer("")["input_ids"])[:1] == [self.bos_id]
        parts = [state, self._template, self.bos_id, self.eos_id, self._adds_bos]
        self.fingerprint: str = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def encode(self, prompt: Text, completion: Text) -> Tokens:
        """One row as tokens.

        Raises: Refusal if the template fails on the row or renders its prompt differently; UserError if
          nothing of the kind can be encoded with this tokenizer.
        """
        (tokens,) = self.encode_many([(prompt, completion)])
        if isinstance(tokens, Refusal):
            raise tokens
        return tokens

    def encode_many(self, pairs: Sequence[tuple[Text, Text]]) -> list[Tokens | Refusal]:
        """`encode` for many rows at once, in parallel; a refusal stands in the place of its row."""
        rows: list[Tokens | Refusal | None] = [None] * len(pairs)
        strings = [i for i, pair in enumerate(pairs) if all(isinstance(text, str) for text in pair)]
        for i, tokens in zip(strings, self._strings([pairs[i] for i in strings]), strict=True):
            rows[i] = tokens
        chats = [i for i, row in enumerate(rows) if row is None]
        for i, tokens in zip(chats, self._conversations([pairs[i] for i in chats]), strict=True):
            rows[i] = tokens
        return [row for row in rows if row is not None]

    # Generation

    def prompts(self, prompts: Sequence[Text]) -> list[np.ndarray | Refusal]:
        """What a completion is drawn behind, int32 [n] with n >= 1: a prompt's tokens as training sees them.

        An empty string gives the beginning token, or the end token where there is none: what stands between
        texts. A refusal stands in the place of its prompt.

        Errors: UserError if nothing of the kind can be encoded with this tokenizer.
        """
        texts: list[str | Refusal] = []
        for prompt in prompts:
            try:
                texts.append(prompt if isinstance(prompt, str) else self._asked(prompt))
            except Refusal as refusal:
                texts.append(refusal)
        ids = _batch(self._start, [text for text in texts if isinstance(text, str)])
        return [
            text if isinstance(text, Refusal) else self._before(ids[text], isinstance(prompt, str))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def _asked(self, messages: Conversation) -> str:
        self._check_chat()
        if not messages:
            raise Refusal("the prompt holds no message")
        return self._render(messages, True)

    def _before(self, ids: Ids, is_string: bool) -> np.ndarray | Refusal:
        if is_string:
            ids = self._begun(ids)
        elif self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            return Refusal("the chat template writes the beginning token twice")
        if not ids and self.bos_id is None and self.eos_id is None:
            raise UserError("an empty prompt needs a beginning or an end token and the tokenizer has none; give a text")
        return np.asarray(ids or [self._known(self.eos_id if self.bos_id is None else self.bos_id)], np.int32)

    def stop_ids(self, others: Sequence[int] = ()) -> tuple[int, ...]:
        """Tokens that end a completion: the end token, and with a chat template the one that ends a turn.

        Args:
          others: more of them, those of the model's generation_config.json.
        """
        own = () if self.eos_id is None else (self.eos_id,)
        return tuple(dict.fromkeys((*own, *self._end_of_turn(), *others)))

    def _end_of_turn(self) -> Ids:
        """The added token that the template writes behind an answer; [] if it writes none."""
        answer = "answer"
        if not self.chat:
            return []
        try:
            text = self._render((Message("user", "question"), Message("assistant", answer)), False)
        except Refusal:
            return []
        _, found, after = text.rpartition(answer)
        ids = _batch(self._middle, [after])[after] if found else []
        first = next((i for i in ids if self._tokenizer.decode([i]).strip()), None)
        return [first] if first is not None and first in self._tokenizer.added_tokens_decoder else []

    # Strings

    def _strings(self, pairs: Sequence[tuple[Any, Any]]) -> Iterator[Tokens | Refusal]:
        if pairs and self.eos_id is None:
            raise UserError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
        prompts = _batch(self._start, [prompt for prompt, _ in pairs])
        # After an empty prompt the completion is the beginning of the text.
        first = _batch(self._start, [completion for prompt, completion in pairs if not prompt])
        later = _batch(self._middle, [completion for prompt, completion in pairs if prompt])
        for prompt, completion in pairs:
            yield self._string(prompts[prompt], (later if prompt else first)[completion])

    def _string(self, prompt: Ids, completion: Ids) -> Tokens | Refusal:
        prompt = self._begun(prompt)
        if completion[-1:] != [self.eos_id]:
            completion = [*completion, self._known(self.eos_id)]
        ids = prompt + completion
        return self._tokens(ids, [(len(prompt), len(ids))])

    def _begun(self, prompt: Ids) -> Ids:
        """With the beginning token, where the tokenizer writes one."""
        if self._adds_bos and prompt[:1] != [self.bos_id]:
            return [self._known(self.bos_id), *prompt]
        return prompt

    def _known(self, token: int | None) -> int:
        assert token is not None
        return token

    def _tokens(self, ids: Ids, spans: Sequence[tuple[int, int]]) -> Tokens | Refusal:
        mask = np.zeros(len(ids), np.bool_)
        for start, stop in spans:
            mask[start:stop] = True
        mask[:1] = False
        if not mask.any():
            return Refusal("no token is left to train")
        head = int(self.bos_id is not None and ids[0] == self.bos_id)
        return Tokens(np.asarray(ids, np.int32), mask, head)

    # Conversations

    def _conversations(self, pairs: Sequence[tuple[Text, Text]]) -> list[Tokens | Refusal]:
        plans: list[_Plan | Refusal] = []
        # Both answers of a pair share their prompt, and the last answer ends where the conversation does.
        render = functools.cache(self._render)
        for prompt, completion in pairs:
            try:
                plans.append(self._plan(prompt, completion, render))
            except Refusal as refusal:
                plans.append(refusal)
        texts = [t for p in plans if isinstance(p, _Plan) for t in (p.full, *itertools.chain(*p.spans))]
        ids = _batch(self._start, texts)
        return [p if isinstance(p, Refusal) else self._planned(p, ids) for p in plans]

    def _plan(self, prompt: Text, completion: Text, render: Callable[[Conversation, bool], str]) -> _Plan:
        self._check_chat()
        if isinstance(prompt, str) or isinstance(completion, str):
            raise Refusal("one of prompt and completion is a string and the other a list of messages")
        turns = prompt + completion
        answers = [i for i in range(len(prompt), len(turns)) if turns[i].role == "assistant"]
        spans = tuple((render(turns[:i], True), render(turns[: i + 1], False)) for i in answers)
        return _Plan(render(turns, False), spans)

    def _check_chat(self) -> None:
        if not self.chat:
            raise UserError(
                "the rows hold messages and the tokenizer has no chat template; give one with "
                "--config.data.chat_template=FILE, or rows with string columns"
            )

    def _render(self, messages: Conversation, generation: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                [{"role": m.role, "content": m.content, **json.loads(m.more or "{}")} for m in messages],
                chat_template=self._template,
                add_generation_prompt=generation,
                tokenize=False,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template {self._named} is not valid Jinja ({error}); mend it") from error
        except (jinja2.TemplateError, ValueError, TypeError, IndexError, KeyError) as error:
            raise Refusal(f"the chat template fails on the row ({error or type(error).__name__})") from error

    def _planned(self, plan: _Plan, ids: dict[str, Ids]) -> Tokens | Refusal:
        full = ids[plan.full]
        spans = [(ids[before], ids[upto]) for before, upto in plan.spans]
        for before, upto in spans:
            for prefix, what in ((before, "the prompt"), (upto, "an answer")):
                same = _common(prefix, full)
                if same < len(prefix):
                    other = self._tokenizer.decode(prefix[same : same + 8])
                    return Refusal(
                        f"the chat template renders {what} differently when more follows it, "
                        f"from token {same} on ({other!r} alone)"
                    )
        if self.bos_id is not None and full[:2] == [self.bos_id] * 2:
            return Refusal("the chat template writes the beginning token twice")
        return self._tokens(full, [(len(before), len(upto)) for before, upto in spans])


def _file(path: str) -> str:
    file = epath.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no chat template {path}; check --config.data.chat_template")
    return file.read_text()


def _batch(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, Ids]:
    """Ids of each distinct text, without special tokens added."""
    distinct = list(dict.fromkeys(texts))
    encodings = tokenizer.encode_batch_fast(distinct, add_special_tokens=False)
    return {text: encoding.ids for text, encoding in zip(distinct, encodings, strict=True)}


def _common(a: Ids, b: Ids) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _continuing(state: Any) -> Any:
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
