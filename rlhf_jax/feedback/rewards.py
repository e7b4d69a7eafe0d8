"""Rewards of sampled answers: several functions, weighted, some of which may wait for other machines."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from rlhf_jax import registry
from rlhf_jax.data import world, world_harm
from rlhf_jax.data.rows import Text
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import verifiable

# f(prompts, completions, **columns) -> one number an answer, the higher the better, or None where it doesn't apply.
# Prompts and completions are strings, or lists of role/content messages where the data has them; columns are the
# other columns of the prompts' rows, lists as long as prompts. An `async def` of the same form is called once an
# answer, with lists of one.
RewardFunction = Callable[..., Any]
REWARD_FUNCTIONS: dict[str, RewardFunction] = {
    "gold": world.gold,
    "right": world.right,
    "harmless": world_harm.harmless,
    "refused": world_harm.refused,
    **verifiable.REWARDS,
}


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """What completions are scored by: a reward model or an ensemble, functions, or both; their weighted sum counts."""

    model: Annotated[str | None, "reward model: the folder of a run, of an ensemble, or of Hugging Face"] = None
    model_weight: Annotated[float, "of its score beside those of functions"] = 1.0
    how: Annotated[
        Literal["mean", "minimum", "mean_less_variance"], "one score from those of an ensemble's members"
    ] = "mean"
    lam: Annotated[float, "of mean_less_variance: what a unit of variance costs"] = 0.5
    step_end: Annotated[
        str | None,
        "regular expression of the text that ends a step, for a model of steps (loss.name=process); none: the model "
        "scores whole completions",
    ] = None
    verifier: Annotated[
        str | None, "what judges steps in the place of a model: world, or my_pkg.module:function; it reads step_end"
    ] = None
    step_score: Annotated[
        Literal["product", "minimum", "last"], "one score from those of a completion's steps, in nats"
    ] = "product"
    functions: Annotated[
        tuple[str, ...], f"{', '.join(REWARD_FUNCTIONS)}, or my_pkg.module:function; they read the rows' other columns"
    ] = ()
    weights: Annotated[tuple[float, ...], "of the functions; empty: 1 each"] = ()
    deadline: Annotated[float, "seconds that asynchronous functions may take for a rollout"] = 600.0


LARGEST = float(np.finfo(np.float32).max)
SHOWN = 80  # characters of a text in a message
GRACE = 2.0  # seconds past the deadline after which a function that blocks the event loop is left behind


class Rewards(NamedTuple):
    """Of N answers by R functions; reshaped to [G, K, R] the first two are those of an `ops.advantages.Group`."""

    rewards: np.ndarray  # [N, R] float32, 0 where the function doesn't apply
    applies: np.ndarray  # [N, R] bool; all False for an answer to which no function applies
    weights: np.ndarray  # [R] float32
    names: tuple[str, ...]


class _Answer(NamedTuple):
    prompt: Any
    completion: Any
    columns: dict[str, Any]

    def __str__(self) -> str:
        return f"the answer {_short(self.completion)} to the prompt {_short(self.prompt)}"


@dataclasses.dataclass(frozen=True)
class RewardFunctions:
    """Reward functions by their names, in an order that counts.

    Attributes:
      functions: at least one.
      weights: finite, one a function; not applied here.
      deadline: seconds, over 0: how long all asynchronous functions together may take for one call.
      flag: where the user sets the deadline.
      at_once: how many calls of asynchronous functions wait at a time, 1 or more.
    Raises: UserError for none of them, and for values out of their range.
    """

    functions: Mapping[str, RewardFunction]
    weights: Sequence[float]
    deadline: float = 600.0
    flag: str = "--config.rewards.deadline"
    at_once: int = 64

    def __post_init__(self):
        if not self.functions or len(self.weights) != len(self.functions):
            raise UserError(
                f"{len(self.weights)} weights for {len(self.functions)} reward functions "
                f"({', '.join(self.functions)}); give at least one function, and a weight each."
            )
        for name, weight in zip(self.functions, self.weights, strict=True):
            if not math.isfinite(weight):
                raise UserError(f"the weight of reward function {name!r} is {weight}; give a finite number.")
        if not (0 < self.deadline < math.inf and self.at_once >= 1):
            raise UserError(
                f"{self.flag} is {self.deadline} s for {self.at_once} calls at once; give finite seconds over 0 and "
                "1 call or more."
            )

    @classmethod
    def named(
        cls,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        known: Mapping[str, RewardFunction] = REWARD_FUNCTIONS,
        **options: Any,
    ) -> "RewardFunctions":
        """Each an entry of `known`, or `my_pkg.module:function`.

        Args:
          weights: None is 1 each.
          options: deadline, flag, at_once.
        Raises: UserError for a name that is unknown or stands there twice, and as the class does.
        """
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"reward function {twice[0]!r} is named twice; name it once, with the sum of its weights.")
        functions = {name: registry.resolve(known, name, "reward function") for name in names}
        return cls(functions, tuple([1.0] * len(functions) if weights is None else weights), **options)

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]
    ) -> Rewards:
        """The rewards of N answers.

        A function that isn't asynchronous is called once with all of them, in the thread of the caller. Then the
        asynchronous ones run side by side in an event loop of a private thread, so a loop that runs here is no matter.

        Args:
          prompts: of each answer; that of a conversation is asked as a list of messages, and so is its answer.
          columns: what else the prompts' rows say, one entry an answer.
        Raises: UserError for a function that doesn't read the columns there are, gives another number of rewards, or
          one that isn't a finite float32 or None, and when the deadline passes. What a function raises itself passes
          through with a note of the function and the answer.
        """
        answers = _answers(prompts, completions, columns)
        for name, function in self.functions.items():
            _check_columns(name, function, columns)
        slow = {name: function for name, function in self.functions.items() if is_async(function)}
        found = {name: _ask(name, f, answers) for name, f in self.functions.items() if name not in slow}
        if slow and answers:
            found |= self._wait(slow, answers)
        rewards = np.zeros((len(answers), len(self.functions)), np.float32)
        applies = np.zeros(rewards.shape, bool)
        for r, name in enumerate(self.functions):
            for n, value in enumerate(found.get(name, ())):
                applies[n, r] = value is not None
                rewards[n, r] = 0 if value is None else value
        return Rewards(rewards, applies, np.asarray(self.weights, np.float32), tuple(self.functions))

    def _wait(self, slow: Mapping[str, RewardFunction], answers: Sequence[_Answer]) -> dict[str, list[float | None]]:
        """The rewards by asynchronous functions, or the UserError of the deadline."""
        got: dict[tuple[str, int], float | None] = {}
        _apart(_gather(slow, answers, got, self.deadline, self.at_once), self.deadline + GRACE)
        got = dict(got)  # a function that was left behind may still add to it
        for name in slow:
            missing = [n for n in range(len(answers)) if (name, n) not in got]
            if missing:
                raise UserError(
                    f"reward function {name!r} had done {len(answers) - len(missing)} of {len(answers)} answers when "
                    f"the deadline of {self.deadline:g} s passed, and not {answers[missing[0]]}; raise {self.flag} "
                    "or make it faster."
                )
        return {name: [got[name, n] for n in range(len(answers))] for name in slow}


def _answers(prompts: Sequence[Text], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]):
    """As functions get them."""
    told = []
    for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True)):
        row = {name: column[i] for name, column in columns.items()}
        if isinstance(prompt, str):
            told.append(_Answer(prompt, text, row))
        else:
            told.append(_Answer([turn.fields for turn in prompt], [{"role": "assistant", "content": text}], row))
    return told


def is_async(function: RewardFunction) -> bool:
    """Whether calls of a function wait for something, side by side."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _check_columns(name: str, function: RewardFunction, columns: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind([], [], **columns)
    except TypeError as error:
        raise UserError(
            f"reward function {name!r} can't be called with the data's columns ({', '.join(columns) or 'none'}): "
            f"{error}; add the column it needs to the data, or let it take what it doesn't read as **columns."
        ) from None


def _call(function: RewardFunction, answers: Sequence[_Answer]) -> Any:
    columns = {key: [answer.columns[key] for answer in answers] for key in (answers[0].columns if answers else ())}
    return function([answer.prompt for answer in answers], [answer.completion for answer in answers], **columns)


def _ask(name: str, function: RewardFunction, answers: Sequence[_Answer]) -> list[float | None]:
    if not answers:
        return []
    with _noted(name, answers):
        return _numbers(name, _call(function, answers), answers)


@contextlib.contextmanager
def _noted(name: str, answers: Sequence[_Answer]) -> Iterator[None]:
    """What is raised inside says afterwards which function raised it, and on what."""
    try:
        yield
    except BaseException as error:
        many = f"{len(answers)} answers, the first of them " if len(answers) > 1 else ""
        error.add_note(f"reward function {name!r} raised this on {many}{answers[0]}")
        raise


# Asynchronous functions


async def _gather(
    slow: Mapping[str, RewardFunction],
    answers: Sequence[_Answer],
    got: dict[tuple[str, int], float | None],
    deadline: float,
    at_once: int,
) -> None:
    """Fills in `got`, until all is there, one function raises or the deadline passes."""
    room = asyncio.Semaphore(at_once)

    async def one(name: str, n: int) -> None:
        async with room:
            with _noted(name, answers[n : n + 1]):
                got[name, n] = _numbers(name, await _call(slow[name], answers[n : n + 1]), answers[n : n + 1])[0]

    tasks = [asyncio.create_task(one(name, n)) for n in range(len(answers)) for name in slow]
    done, late = await asyncio.wait(tasks, timeout=deadline, return_when=asyncio.FIRST_EXCEPTION)
    for task in late:
        task.cancel()
    failed = [task for task in tasks if task in done and (task.cancelled() or task.exception())]
    for task in failed[:1]:
        task.result()


def _apart(work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Runs it in an event loop of its own thread, which is left behind if it takes longer than that."""
    end: concurrent.futures.Future[None] = concurrent.futures.Future()

    def body() -> None:
        try:
            end.set_result(asyncio.run(work))
        except BaseException as error:
            end.set_exception(error)

    threading.Thread(target=body, name="rewards", daemon=True).start()
    if concurrent.futures.wait([end], seconds).done:
        end.result()


# What a function may give


def _numbers(name: str, values: Any, answers: Sequence[_Answer]) -> list[float | None]:
    try:
        if isinstance(values, str | bytes | Mapping):
            raise TypeError
        each = iter(values)
    except TypeError:
        raise UserError(
            f"reward function {name!r} gave {_short(values)} for {len(answers)} answers, the first of them "
            f"{answers[0]}; let it return a list with a number or None for each."
        ) from None
    values = list(each)
    if len(values) != len(answers):
        raise UserError(
            f"reward function {name!r} gave {len(values)} rewards for {len(answers)} answers, the first of them "
            f"{answers[0]}; let it return one each, None where it doesn't apply."
        )
    return [_number(name, value, answer) for value, answer in zip(values, answers, strict=True)]


def _number(name: str, value: Any, answer: _Answer) -> float | None:
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:
        raise UserError(
            f"reward function {name!r} gave {_short(value)} for {answer}; let it return a finite number that a "
            "float32 holds, or None where it doesn't apply."
        )
    return number


def _short(text: Any) -> str:
    """A text, or what the last message says, in at most SHOWN characters and on one line."""
    if isinstance(text, list) and text and isinstance(text[-1], Mapping):
        text = text[-1].get("content")
    said = text[: SHOWN + 1] if isinstance(text, str) else repr(text)
    said = said if len(said) <= SHOWN else said[: SHOWN - 3] + "..."
    return repr(said) if isinstance(text, str) else said
