"""Text to token ids, with the tokens that are trained.

Strings are taken as they are: prompt and completion are tokenised apart, so that the boundary is exact and no
token straddles it, and the end token follows the completion. Conversations go through the chat template
(`templates` says where an answer begins and ends there), and every boundary is verified on token ids: what a
completion is drawn behind is what its row is trained behind, token for token, or the row is refused.

Trained is what the model has to write: the answer as the template renders it (text, thinking, calls of tools), with
its end token. What a template writes behind that token (the newline of ChatML) is not trained, because sampling
ends at the token. Special tokens in the text of a row stay text (`special`).

Conventions shared with TRL 1.16: an end token that the completion already ends with is not written twice; a
template's rendering is final, no special token is added to it. Not shared: TRL trains everything after the prompt,
so also the newline of ChatML; it tokenises prompt + completion strings together and lets the completion begin at
the first token that differs; it takes special tokens in a row's text for tokens.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from rlhf_jax.data.rows import Refusal, Text
from rlhf_jax.data.special import NONCHARACTERS, Guarded, Ids, Specials, Vocabulary, continuing, wrapped
from rlhf_jax.data.steps import Ends, check_steps, cut, placed
from rlhf_jax.data.templates import Plan, Render, Template, TrainOn
from rlhf_jax.errors import UserError

Special = Literal["text", "tokens"]
# Prompt, completion, tools on offer, and where in the completion's text each step ends, if it has any.
Item = tuple[Text, Text] | tuple[Text, Text, str] | tuple[Text, Text, str, Ends]
Tokenised = Mapping[str | Guarded, Ids]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One prompt with one completion, one conversation, or a prompt alone.

    Attributes:
      ids: int32 [n].
      mask: bool [n], True on trained tokens: on none of a prompt alone. Never True on the first token: nothing stands
        before it, so it has no log-probability.
      head: leading tokens (0 or 1: the beginning token) that stay when the prompt is cut.
      ends: int32 [steps], ascending, the place in `ids` of the last token of each step; empty without steps.
    """

    ids: np.ndarray
    mask: np.ndarray
    head: int = 0
    ends: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def start(self) -> int:
        """Tokens before the first trained one, all where none is: the length of the prompt, at least 1."""
        return int(self.mask.argmax()) if self.mask.any() else len(self)

    @property
    def prompt(self) -> np.ndarray:
        return self.ids[: self.start]


_NO_TEXT = "the tokenizer makes a special token of plain text"


class Encoder:
    """A tokenizer with its chat template.

    Attributes:
      chat: whether conversations can be rendered.
      fingerprint: hexadecimal; changes with vocabulary, merges, special tokens and template.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        *,
        train_on: TrainOn = "all",
        special: Special = "text",
        trailing: bool = True,
    ):
        """Args:
          tokenizer: of transformers, with a tokenizer.json behind it. It is not changed.
          chat_template: path of a Jinja file used in the place of the tokenizer's own template.
          train_on: every assistant turn of a row's messages, or the last.
          special: what special tokens written out in strings are; in messages they always stay text.
          trailing: False leaves out what a template writes behind the last trained token: a score is read at a row's
            end, and a sampled answer ends at that token.
        Raises: UserError for a tokenizer without a `tokenizer.json`, or a template file that isn't there.
        """
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json; save it as a fast one "
                "with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
            )
        source = tokenizer.chat_template if chat_template is None else _file(chat_template)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["truncation"] = state["padding"] = None  # some tokenizer.json files come with a truncation
        named = "of the tokenizer" if chat_template is None else chat_template
        written = source if isinstance(source, str) else "".join((source or {}).values())
        self._specials = Specials(state["added_tokens"], tokenizer.all_special_tokens, written)
        self._template = Template(tokenizer, source, named, self._specials, train_on) if source else None
        self.chat: bool = self._template is not None
        self._start = Vocabulary(state, self._specials, tokenizer.unk_token)
        later = continuing(state)
        self._middle = self._start if later == state else Vocabulary(later, self._specials, tokenizer.unk_token)
        # Ask instead of reading `add_bos_token`: it is False for tokenizers whose post-processor adds one.
        self._adds_bos = self.bos_id is not None and list(tokenizer("")["input_ids"])[:1] == [self.bos_id]
        self._bos = tokenizer.bos_token if self._adds_bos else ""
        self._eos = tokenizer.eos_token or ""
        self._special: Special = special
        self._trailing = trailing
        self._added = {token["content"]: token["id"] for token in state["added_tokens"]}
        parts = [state, source, self.bos_id, self.eos_id, self._adds_bos]
        self.fingerprint: str = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def encode(self, prompt: Text, completion: Text, tools: str = "", ends: Ends = ()) -> Tokens:
        """One row as tokens.

        Args:
          tools: JSON text of the functions on offer, "" for none.
          ends: of a completion in steps, the character of its text (a message's content) at which each ends; the
            last is the text's length.
        Raises: Refusal if the template fails on the row or doesn't give its boundaries, or a step has no token of
          its own; UserError if nothing of the kind can be encoded with this tokenizer.
        """
        (tokens,) = self.encode_many([(prompt, completion, tools, ends)])
        if isinstance(tokens, Refusal):
            raise tokens
        return tokens

    def encode_many(self, items: Sequence[Item]) -> list[Tokens | Refusal]:
        """`encode` for many rows at once, in parallel; a refusal stands in the place of its row."""
        rows: list[Tokens | Refusal | None] = [None] * len(items)
        strings = [
            i
            for i, (prompt, completion, *_) in enumerate(items)
            if isinstance(prompt, str) and isinstance(completion, str)
        ]
        for i, tokens in zip(strings, self._strings([items[i] for i in strings]), strict=True):
            rows[i] = tokens
        chats = [i for i, row in enumerate(rows) if row is None]
        for i, tokens in zip(chats, self._conversations([items[i] for i in chats]), strict=True):
            rows[i] = tokens
        return [row for row in rows if row is not None]

    def keeps_as_text(self, prompt: Text, completion: Text = "") -> bool:
        """Whether a row of strings holds special tokens written out that stay text; in one rendered ahead they would
        have to be tokens."""
        if not isinstance(prompt, str) or not isinstance(completion, str) or self._special == "tokens":
            return False
        answer = completion if prompt else completion.removeprefix(self._bos)
        texts = prompt.removeprefix(self._bos), answer.removesuffix(self._eos)
        return any(map(self._specials.holds, texts))

    # Generation

    def prompts(self, prompts: Sequence[Text], tools: Sequence[str] | None = None) -> list[np.ndarray | Refusal]:
        """What a completion is drawn behind, int32 [n] with n >= 1: a prompt's tokens as training sees them.

        An empty string gives the beginning token, or the end token where there is none: what stands between
        texts. A refusal stands in the place of its prompt.

        Args:
          tools: the functions on offer, one JSON text a prompt.
        Errors: UserError if nothing of the kind can be encoded with this tokenizer.
        """
        texts: list[str | Guarded | Refusal] = []
        for prompt, offered in zip(prompts, tools or [""] * len(prompts), strict=True):
            try:
                texts.append(self._asked(prompt, offered))
            except Refusal as refusal:
                texts.append(refusal)
        ids = self._start([text for text in texts if not isinstance(text, Refusal)])
        return [
            text if isinstance(text, Refusal) else self._before(ids.get(text), isinstance(prompt, str))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def encode_prompts(self, prompts: Sequence[Text], tools: Sequence[str] | None = None) -> list[Tokens | Refusal]:
        """`prompts` as rows of which no token is trained."""
        none = lambda ids: Tokens(ids, np.zeros(len(ids), np.bool_), self._head(ids))
        return [ids if isinstance(ids, Refusal) else none(ids) for ids in self.prompts(prompts, tools)]

    def _asked(self, prompt: Text, tools: str) -> str | Guarded:
        if isinstance(prompt, str):
            return self._string_of(prompt, tools, begins=True)
        template = self._chat_template()
        if not prompt:
            raise Refusal("the prompt holds no message")
        return template.asked(prompt, tools).upto()

    def _before(self, ids: Ids | None, is_string: bool) -> np.ndarray | Refusal:
        if ids is None:
            return Refusal(_NO_TEXT)
        if is_string:
            ids = self._begun(ids)
        elif self._twice(ids):
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
        ending = None if self._template is None else self._template.ending
        turn = () if ending is None else (self._added[ending.token],)
        return tuple(dict.fromkeys((*own, *turn, *others)))

    # Strings

    def _strings(self, items: Sequence[Any]) -> Iterator[Tokens | Refusal]:
        if items and self.eos_id is None:
            raise UserError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
        rows: list[tuple[str | Guarded, list[str | Guarded], bool] | Refusal] = []
        for item in items:
            try:
                rows.append(self._parts(*item))
            except Refusal as refusal:
                rows.append(refusal)
        parts = [row for row in rows if not isinstance(row, Refusal)]
        prompts = self._start([prompt for prompt, _, _ in parts])
        # After an empty prompt the completion is the beginning of the text.
        first = self._start([answer[0] for prompt, answer, _ in parts if not prompt])
        later = self._middle([text for prompt, answer, _ in parts for text in (answer if prompt else answer[1:])])
        for row in rows:
            if isinstance(row, Refusal):
                yield row
                continue
            asked, answer, in_steps = row
            begun = (later if asked else first).get(answer[0])
            found = [prompts.get(asked), begun, *map(later.get, answer[1:])]
            known = [ids for ids in found if ids is not None]
            yield Refusal(_NO_TEXT) if len(known) < len(found) else self._string(known[0], known[1:], in_steps)

    def _parts(
        self, prompt: str, completion: str, tools: str = "", ends: Ends = ()
    ) -> tuple[str | Guarded, list[str | Guarded], bool]:
        """What is tokenised apart: the prompt, and the completion or each of its steps; and whether it has steps."""
        texts = cut(completion, ends)
        last = len(texts) - 1
        answer = [self._string_of(text, begins=not prompt and i == 0, ends=i == last) for i, text in enumerate(texts)]
        return self._string_of(prompt, tools, begins=True), answer, bool(ends)

    def _string_of(self, text: str, tools: str = "", *, begins: bool, ends: bool = False) -> str | Guarded:
        """A text as it is tokenised: only a beginning token that begins it and an end token that ends it are tokens."""
        if tools:
            raise Refusal("tools on offer need messages, and the prompt is a string")
        if self._special == "tokens" or not self._specials.holds(text):
            return text
        start = self._bos if begins and text.startswith(self._bos) else ""
        rest = text.removeprefix(start)
        end = self._eos if ends and rest.endswith(self._eos) else ""
        rest = rest.removesuffix(end)
        if not self._specials.holds(rest):
            return text
        if NONCHARACTERS.search(rest):
            raise Refusal("the text holds a special token and a character of U+FDD0 to U+FDD3")
        return Guarded((start and wrapped(start)) + rest + (end and wrapped(end)))

    def _string(self, prompt: Ids, answer: Sequence[Ids], in_steps: bool) -> Tokens | Refusal:
        prompt = self._begun(prompt)
        *before, last = answer
        if last[-1:] == [self.eos_id]:
            last = last[:-1]  # it is no step's
        ids, counts = list(prompt), []
        for part in (*before, last):
            ids += part
            counts.append(len(ids))
        spans = [(len(prompt), len(ids) + 1)]
        return self._tokens([*ids, self._known(self.eos_id)], spans, [len(prompt), *counts] if in_steps else ())

    def _begun(self, prompt: Ids) -> Ids:
        """With the beginning token, where the tokenizer writes one."""
        if self._adds_bos and prompt[:1] != [self.bos_id]:
            return [self._known(self.bos_id), *prompt]
        return prompt

    def _known(self, token: int | None) -> int:
        assert token is not None
        return token

    def _head(self, ids: Sequence[int] | np.ndarray) -> int:
        return int(self.bos_id is not None and ids[0] == self.bos_id)

    def _twice(self, ids: Ids) -> bool:
        return self.bos_id is not None and ids[:2] == [self.bos_id] * 2

    def _tokens(self, ids: Ids, spans: Sequence[tuple[int, int]], steps: Sequence[int] = ()) -> Tokens | Refusal:
        """Args:
        steps: tokens before the first step, and up to the end of each.
        """
        mask = np.zeros(len(ids), np.bool_)
        for start, stop in spans:
            mask[start:stop] = True
        mask[:1] = False
        if not mask.any():
            return Refusal("no token is left to train")
        if not self._trailing:
            end = len(ids) - int(mask[::-1].argmax())
            ids, mask = ids[:end], mask[:end]
        if steps and (bad := check_steps(steps)):
            return bad
        return Tokens(np.asarray(ids, np.int32), mask, self._head(ids), np.asarray(steps[1:], np.int32) - 1)

    # Conversations

    def _conversations(self, items: Sequence[Any]) -> list[Tokens | Refusal]:
        if not items:
            return []
        template = self._chat_template()
        plans: list[Plan | Refusal] = []
        # Both answers of a pair share their prompt, and the last answer ends where the conversation does.
        render = functools.cache(template.render)
        for item in items:
            try:
                plans.append(self._plan(template, render, *item))
            except Refusal as refusal:
                plans.append(refusal)
        ids = self._start([text for p in plans if isinstance(p, Plan) for text in _texts(p)])
        return [p if isinstance(p, Refusal) else self._planned(p, ids) for p in plans]

    def _chat_template(self) -> Template:
        if self._template is None:
            raise UserError(
                "the rows hold messages and the tokenizer has no chat template; give one with "
                "--config.data.chat_template=FILE, or rows with string columns"
            )
        return self._template

    def _plan(
        self, template: Template, render: Render, prompt: Text, completion: Text, tools: str = "", ends: Ends = ()
    ) -> Plan:
        if isinstance(prompt, str) or isinstance(completion, str):
            raise Refusal("one of prompt and completion is a string and the other a list of messages")
        plan = template.plan(prompt, completion, tools, render)
        return placed(plan, completion, ends) if ends else plan

    def _planned(self, plan: Plan, ids: Tokenised) -> Tokens | Refusal:
        full = ids.get(plan.upto())
        if full is None:
            return Refusal(_NO_TEXT)
        try:
            spans = [(self._place(plan, a, full, ids), self._place(plan, b, full, ids)) for a, b in plan.spans]
            steps = [self._place(plan, place, full, ids) for place in plan.steps]
        except Refusal as refusal:
            return refusal
        if self._twice(full):
            return Refusal("the chat template writes the beginning token twice")
        return self._tokens(full, spans, steps)

    def _place(self, plan: Plan, place: int, full: Ids, ids: Tokenised) -> int:
        """Tokens before a place of the text.

        Raises: Refusal if the text up to there alone isn't tokenised as in the whole.
        """
        if (count := plan.tokens_before(place)) is not None:
            written = [i for i, token in enumerate(full) if token in self._start.control]
            if len(written) == plan.tokens_before():
                return written[count - 1] + 1
        text = plan.upto(place)
        part = (ids if text in ids else self._start([text])).get(text)
        if part is None:
            raise Refusal(_NO_TEXT)
        if full[: len(part)] != part:
            same = next(i for i, token in enumerate(part) if full[i : i + 1] != [token])
            alone = self._start.decode(part[same : same + 8])
            raise Refusal(
                f"the tokenizer joins what stands before and after a boundary of an answer, from token {same} on "
                f"({alone!r} alone)"
            )
        return len(part)


def _texts(plan: Plan) -> list[str | Guarded]:
    """What is tokenised of a plan: the whole, and all up to each boundary that no special token shows."""
    places = [*(place for span in plan.spans for place in span), *plan.steps]
    return [plan.upto(), *(plan.upto(place) for place in places if plan.tokens_before(place) is None)]


def _file(path: str) -> str:
    file = epath.Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no chat template {path}; check --config.data.chat_template")
    return file.read_text()
