"""A model of this project as lm-evaluation-harness asks it: likelihoods, rolling likelihoods and answers.

Texts are tokenised, cut and decoded as the harness's own `hf` does, so that a figure means what theirs means: text and
continuation are tokenised as one (the suite does it apart), special tokens written out are tokens, the oldest tokens of
what is longer than the context go. Likelihoods are the suite's, answers the sampler's.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.suite.subject import Likelihood, Span, check_ids, likelihoods
from rlhf_jax.sampling.distribution import Sampling, check
from rlhf_jax.sampling.sampler import Completion, Sampler, number_of

MOST = 256  # tokens of an answer where the task doesn't say, as in `hf`
SLOTS = 64  # answers that are drawn at a time
STEPS = 32  # tokens between two looks for a text that ends an answer
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # all say it; the first that is set
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")
READ = ("until", *LENGTHS, "do_sample", "temperature", *FILTERS)
IDLE = {"num_beams": 1}  # what changes nothing at this value and can't have another


class Wanted(NamedTuple):
    """How answers are drawn, and the texts that end them."""

    sampling: Sampling
    until: tuple[str, ...]


class HarnessModel:
    """What the harness asks of a model, without its base class: `adapt` adds that.

    Attributes:
      tokenizer, max_length, eot_token_id: what the harness notes of a model.
      cut: texts so far, a continuation each, that were longer than the context and lost their oldest tokens.
    """

    def __init__(self, subject: Subject, *, seed: int = 0):
        """Args:
        subject: with a word head, on a mesh.
        seed: of answers that are drawn above temperature 0; one depends on it, its prompt, and how often the harness
          asks for that before it at the same time.
        """
        super().__init__()
        self.tokenizer, self.max_length, self.cut = subject.tokenizer, subject.model.shape.length, 0
        self.eot_token_id: int | None = self.tokenizer.eos_token_id
        self._subject, self._key = subject, jax.random.PRNGKey(seed)
        self._sampler = Sampler(subject.model, slots=SLOTS)
        self._stop_ids = Encoder(subject.tokenizer).stop_ids(subject.end_ids)
        own = self.tokenizer.bos_token_id, self.eot_token_id
        self._prefix = next((token for token in own if token is not None), None)
        # An end token that is written out ends an answer too.
        self._end = "" if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)

    # Likelihoods

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (text, continuation) what the continuation's tokens have, nats, and whether they are the likeliest.

        Errors: UserError for a continuation without a token of its own or longer than the context, and for a model
          whose likelihoods are no numbers.
        """
        pairs = [_parted(*request.args) for request in requests]
        begun = self._encode(text for before, after in pairs if before for text in (before, before + after))
        alone = self._encode((after for before, after in pairs if not before), special=False)
        spans = []
        for before, after in pairs:
            start = begun[before] if before else []
            whole = begun[before + after] if before else alone[after]
            spans.append(self._span(start, whole[len(start) :], after))
        return [(one.logprob, one.greedy) for one in self._weighed(spans)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each text the log-probability of all its tokens, nats: the first behind the beginning token, each window
        of the context's length behind as much as fits before it. Errors: UserError as `loglikelihood`.
        """
        texts = [text for (text,) in (request.args for request in requests)]
        encoded = self._encode(texts)
        windows = [list(self._windows(encoded[text])) for text in texts]
        told = iter(self._weighed([span for each in windows for span in each]))
        return [sum((next(told).logprob for _ in each), 0.0) for each in windows]

    def _span(self, before: list[int], after: list[int], text: str) -> Span:
        if not before:
            before, after = (after[:1], after[1:]) if after[:1] == [self._prefix] else ([self._begins()], after)
        if not after:
            raise UserError(f"the continuation {text!r} has no token of its own behind its text; ask for another.")
        if len(after) > self.max_length:
            raise UserError(
                f"the continuation {text[:40]!r}... has {len(after)} tokens, more than the model's context of "
                f"{self.max_length}; leave its task away."
            )
        ids = self._cut([*before, *after], self.max_length + 1)
        return Span(ids, len(ids) - len(after))

    def _windows(self, tokens: list[int]) -> Iterator[Span]:
        """Each token is weighed once; the row of a window begins as far before it as the context reaches."""
        whole = [self._begins(), *tokens]
        for start in range(1, len(whole), self.max_length):
            stop = min(start + self.max_length, len(whole))
            first = max(0, stop - self.max_length - 1)
            yield Span(np.asarray(whole[first:stop], np.int32), start - first)

    def _weighed(self, spans: Sequence[Span]) -> list[Likelihood]:
        for span in spans:
            check_ids(self._subject, span.ids)
        told = likelihoods(self._subject, spans)
        if not all(math.isfinite(one.logprob) for one in told):
            raise UserError(f"{self._subject.name} gives likelihoods that are no numbers; give another checkpoint.")
        return told

    # Answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written behind each (text, settings), up to the first of its `until`, which isn't part of it.

        Errors: UserError for settings that mean nothing here, or leave no room for a prompt.
        """
        asked = [request.args for request in requests]
        encoded = self._encode(text for text, _ in asked)
        groups: dict[Wanted, list[int]] = {}
        for place, (_, settings) in enumerate(asked):
            groups.setdefault(wanted(settings), []).append(place)
        for want in groups:
            if want.sampling.max_new_tokens >= self.max_length:
                raise UserError(
                    f"a task asks for answers of up to {want.sampling.max_new_tokens} tokens, and the model's context "
                    f"of {self.max_length} leaves no room for a prompt; give max_gen_toks below that."
                )
        found: dict[int, str] = {}
        for want, places in groups.items():
            prompts = [self._prompt(encoded[asked[place][0]], want) for place in places]
            found |= zip(places, self._drawn(prompts, want), strict=True)
        return [found[place] for place in range(len(asked))]

    def _prompt(self, tokens: list[int], want: Wanted) -> np.ndarray:
        ids = self._cut(tokens or [self._begins()], self.max_length - want.sampling.max_new_tokens)
        check_ids(self._subject, ids)
        return ids

    def _drawn(self, prompts: Sequence[np.ndarray], want: Wanted) -> list[str]:
        """The answers, some prompts of like length at a time, until each of them has ended."""
        numbers, before = [], collections.Counter()
        for ids in prompts:
            again = before[key := ids.tobytes()]
            numbers.append(number_of(np.append(ids, again).astype(np.int32) if again else ids))
            before[key] += 1
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        found: dict[int, str] = {}
        for first in range(0, len(order), SLOTS):
            part = order[first : first + SLOTS]
            drawn = self._sampler.stream(
                self._subject.params, [prompts[place] for place in part], want.sampling, self._key,
                stop_ids=self._stop_ids, rows=[numbers[place] for place in part], steps=STEPS,
            )  # fmt: skip
            for one in drawn:
                if (place := part[one.row]) in found:
                    continue
                text, ended = self._ended(one, want.until)
                if ended:
                    found[place] = text
                if len(found) == first + len(part):
                    break
        return [found[place] for place in range(len(prompts))]

    def _ended(self, drawn: Completion, until: Sequence[str]) -> tuple[str, bool]:
        """The text before the first that ends it, and whether it has ended."""
        tokens = drawn.tokens[: len(drawn.tokens) - (drawn.stop == "end")].tolist()
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        stops = (*until, self._end) if self._end else until
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))], bool(ends or drawn.stop)

    # Texts

    def _encode(self, texts: Iterable[str], special: bool = True) -> dict[str, list[int]]:
        """Tokens of each distinct text, with those that the tokenizer adds, unless it begins with them or `special` is
        False.
        """
        start = "" if self._prefix is None else self.tokenizer.decode(self._prefix)
        own: dict[bool, list[str]] = {}
        for text in dict.fromkeys(texts):
            own.setdefault(special and not (start and text.startswith(start)), []).append(text)
        ids: dict[str, list[int]] = {}
        for adds, some in own.items():
            ids |= zip(some, self.tokenizer(some, add_special_tokens=adds)["input_ids"], strict=True)
        return ids

    def _begins(self) -> int:
        """The token that stands before a text. Errors: UserError for a tokenizer without one."""
        if self._prefix is None:
            raise UserError("the tokenizer has neither a beginning nor an end token, and a task needs one.")
        return self._prefix

    def _cut(self, tokens: list[int], most: int) -> np.ndarray:
        """The last `most` of them, int32."""
        self.cut += len(tokens) > most
        return np.asarray(tokens[-most:], np.int32)

    # What the harness asks of a model besides

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the text of a prompt. Errors: UserError for a tokenizer without a chat template."""
        if not self.tokenizer.chat_template:
            raise UserError(f"the tokenizer of {self._subject.name} has no chat template; ask without one.")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template, where it is used."""
        return self.tokenizer.get_chat_template() if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of prompts is named after."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What stands among the results' `config`."""
        leaves = jax.tree.leaves(self._subject.params)
        return {"model": self._subject.name, "model_num_parameters": sum(x.size for x in leaves), "texts_cut": self.cut}


def wanted(settings: Mapping[str, Any]) -> Wanted:
    """A task's `generation_kwargs` as what the sampler takes; without `do_sample`, a temperature above 0 draws.

    Errors: UserError for one that isn't read here, and for numbers that mean nothing.

    >>> wanted({"until": "Q:", "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}).sampling.temperature
    0.0
    """
    if unread := [name for name, value in settings.items() if name not in READ and IDLE.get(name) != value]:
        raise UserError(
            f"generation_kwargs.{unread[0]}={settings[unread[0]]} of a task isn't read; it takes {', '.join(READ)}."
        )
    given = {name: value for name, value in settings.items() if value is not None}
    numbers: dict[str, Any] = {name: given[name] for name in ("temperature", *FILTERS) if name in given}
    numbers["max_new_tokens"] = next((given[name] for name in LENGTHS if name in given), MOST)
    for name, value in numbers.items():
        whole = isinstance(getattr(Sampling, name), int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            what = "a whole number" if whole else "a number"
            raise UserError(f"generation_kwargs.{name}={value} of a task is not allowed; it must be {what}.")
    numbers.setdefault("temperature", 0.0)
    sampling = Sampling(**numbers)
    check(sampling, "generation_kwargs.")
    if given.get("do_sample") and sampling.temperature == 0:
        raise UserError("generation_kwargs.do_sample=True of a task needs a temperature above 0; set both or neither.")
    if not given.get("do_sample", True):
        sampling = dataclasses.replace(sampling, temperature=0.0)
    until = given.get("until", ())
    return Wanted(sampling, tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop))


def _parted(before: str, after: str) -> tuple[str, str]:
    """White space that ends a text goes to what follows it, where tokenizers expect it."""
    text = before.rstrip()
    return text, before[len(text) :] + after


def require() -> Any:
    """The harness. Errors: UserError where it isn't installed."""
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"this needs lm-evaluation-harness ({error}); pip install 'rlhf_jax[harness]'.") from None
    return lm_eval


def adapt(subject: Subject, *, seed: int = 0) -> Any:
    """A model as `lm_eval.simple_evaluate(model=...)` takes it, a `HarnessModel`. Errors: UserError as `require`."""
    require()
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class Adapter(HarnessModel, LM):
        """Asked by the harness."""

    return Adapter(subject, seed=seed)
