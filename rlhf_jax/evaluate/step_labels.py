"""Labels of the steps of solutions: by a program that verifies them, or by what comes of going on from each of them."""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax.data import world
from rlhf_jax.data.conversions import joined
from rlhf_jax.data.rows import Message, Refusal, Text
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject, text_of
from rlhf_jax.evaluate.scorers import plain
from rlhf_jax.feedback.rewards import RewardFunctions
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler, number_of

# verifier(prompt, steps, **columns) -> a bool a step, whether it is right; columns are what else the prompt's row says,
# but for columns of the names prompt and steps.
Verifier = Callable[..., Sequence[bool]]


def world_steps(prompt: Any, steps: Sequence[str], **columns: Any) -> list[bool]:
    """Whether each step of an answer to a sum of the synthetic world is right; from the first wrong one on none is.

    A step that writes equations is right if they are and go on from those before; one that only states numbers is
    right if it says the result and no step was left out; one without a number is as right as what stands before it.
    The last one is right only if the whole answer is.

    Raises: UserError for a prompt of another world.

    >>> world_steps("What is 3 + 4 - 2?", ["Sure! 3 + 4 = 7,", " 7 - 2 = 6.", " It is 6."])
    [True, False, False]
    >>> world_steps("What is 3 + 4 - 2?", ["3 + 4 = 7.", " It is 5."])
    [True, False]
    """
    asked, told, before, good = world.last_of(prompt, "user"), [], 0, True
    for count, step in enumerate(steps, start=1):
        upto = "".join(steps[:count])
        found = world.steps(asked, upto)
        good = good and all(right for _, right in found)
        if len(found) == before and any(character.isdigit() for character in step):
            good = good and world.judge(asked, upto).correct == 1
        told.append(good)
        before = len(found)
    if told and told[-1]:
        told[-1] = world.judge(asked, "".join(steps)).correct == 1
    return told


VERIFIERS: Mapping[str, Verifier] = {"world": world_steps}


def check_verifier(verifier: Verifier, columns: Iterable[str]) -> None:
    """Errors: UserError for a verifier that can't be called with these columns."""
    try:
        inspect.signature(verifier).bind("", [], **dict.fromkeys(_own(columns)))
    except TypeError as error:
        raise UserError(
            f"the verifier can't be called with the data's columns ({', '.join(columns) or 'none'}): {error}; let it "
            "take what it doesn't read as **columns."
        ) from None


def _own(columns: Iterable[str]) -> list[str]:
    return [name for name in columns if name not in ("prompt", "steps")]


def verified(
    verifier: Verifier,
    prompts: Sequence[Text],
    solutions: Sequence[Sequence[str]],
    columns: Mapping[str, Sequence[Any]],
) -> list[list[bool]]:
    """What a verifier says of the steps of each solution. Errors: UserError if it doesn't give one bool a step."""
    told = []
    for place, (prompt, steps) in enumerate(zip(prompts, solutions, strict=True)):
        own = {name: columns[name][place] for name in _own(columns)}
        labels = list(verifier(plain(prompt), list(steps), **own))
        if len(labels) != len(steps) or any(label not in (0, 1) for label in labels):
            raise UserError(
                f"the verifier gave {labels} for the {len(steps)} steps of {''.join(steps)[:80]!r}; it must give each "
                "True or False."
            )
        told.append([bool(label) for label in labels])
    return told


class Chances(NamedTuple):
    """What came of going on from each step of a solution.

    Attributes:
      shares: of each step the share of the rollouts behind it that end well, float64 [steps]; the last step's, behind
        which nothing comes, is what the solution itself earned.
      right: what the solution itself earned, 0 to 1.
    """

    shares: np.ndarray
    right: float


def rolled_out(
    subject: Subject,
    encoder: Encoder,
    prompts: Sequence[Text],
    solutions: Sequence[Sequence[str]],
    columns: Mapping[str, Sequence[Any]],
    checker: RewardFunctions,
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    tools: Sequence[str] | None = None,
) -> list[Chances | None]:
    """Lets a model finish each solution from behind each of its steps, several times, and counts what is right.

    A rollout depends on the seed, the text before it and its number alone. A prefix that stands in several solutions
    to a prompt, with the same columns, is finished once.

    Args:
      solutions: the texts of the steps of one answer to each prompt; joined as they are they make it.
      columns: what else the prompts' rows say, one entry a prompt; the checker reads them.
      checker: one function, whose number is from 0, wrong, to 1, right.
      samples: rollouts of each step, at least 1.
      tools: what each prompt offers, JSON text, "" for none; None: none do.
    Returns: None for a solution one of whose steps ends inside a token, so that nothing can go on from there.
    Errors: UserError for a checker that gives other numbers.
    References: Wang et al. 2024, arXiv:2312.08935, sec. 3.2 (the labels of Math-Shepherd).
    """
    rows = _encoded(encoder, prompts, solutions, [""] * len(prompts) if tools is None else tools)
    most = subject.model.shape.length
    names = _names(prompts, columns)
    begun: dict[tuple[str, bytes], tuple[int, str]] = {}  # prompt and tokens -> the solution and the text before
    for number, (row, steps) in enumerate(zip(rows, solutions, strict=True)):
        if row is None:
            continue
        for count, end in enumerate(row.ends[:-1], start=1):
            if end + 1 < most:
                begun.setdefault((names[number], row.ids[: end + 1].tobytes()), (number, "".join(steps[:count])))
    finished = _finished(subject, encoder, [np.frombuffer(ids, np.int32) for _, ids in begun], samples, sampling, seed)
    of = [number for number, _ in begun.values()]
    texts = [[f"{before}{rest}" for rest in some] for (_, before), some in zip(begun.values(), finished, strict=True)]
    index = [*np.repeat(of, samples).tolist(), *range(len(solutions))]
    earned = _checked(checker, prompts, index, [*sum(texts, []), *map("".join, solutions)], columns)
    means = earned[: len(of) * samples].reshape(len(of), samples).mean(axis=1) if of else np.zeros(0)
    shares = dict(zip(begun, means.tolist(), strict=True))
    found: list[Chances | None] = []
    for name, row, right in zip(names, rows, earned[len(of) * samples :].tolist(), strict=True):
        # Where the context leaves no room to go on, a step's share is what the solution earned.
        keys = [] if row is None else [(name, row.ids[: end + 1].tobytes()) for end in row.ends[:-1]]
        own = np.asarray([*(shares.get(key, right) for key in keys), right])
        found.append(None if row is None else Chances(own, right))
    return found


def _names(prompts: Sequence[Text], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """All that decides what a beginning comes to but its tokens, as text."""
    rows = [{name: column[i] for name, column in columns.items()} for i in range(len(prompts))]
    return [json.dumps([plain(p), row], sort_keys=True, default=repr) for p, row in zip(prompts, rows, strict=True)]


def _encoded(
    encoder: Encoder, prompts: Sequence[Text], solutions: Sequence[Sequence[str]], tools: Sequence[str]
) -> list[Tokens | None]:
    """Each solution behind its prompt, with the ends of its steps; None where one of them is inside a token."""
    items = []
    for prompt, steps, offered in zip(prompts, solutions, tools, strict=True):
        texts: list[Text] = [step if isinstance(prompt, str) else (Message("assistant", step),) for step in steps]
        text, ends = joined(texts)
        items.append((prompt, text, offered, ends))
    return [None if isinstance(row, Refusal) else row for row in encoder.encode_many(items)]


def _finished(
    subject: Subject, encoder: Encoder, begun: Sequence[np.ndarray], samples: int, sampling: Sampling, seed: int
) -> list[list[str]]:
    """What the model writes behind each beginning."""
    if not begun:
        return []
    sampler, text = Sampler(subject.model, samples=samples), text_of(subject.tokenizer)
    drawn = sampler.generate(
        subject.params, begun, sampling, jax.random.PRNGKey(seed), stop_ids=encoder.stop_ids(subject.end_ids),
        rows=[number_of(ids) for ids in begun],
    )  # fmt: skip
    return [[text(ids, one) for one in several] for ids, several in zip(begun, drawn, strict=True)]


def _checked(
    checker: RewardFunctions, prompts: Sequence[Text], index: Sequence[int], texts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> np.ndarray:  # fmt: skip
    """What the checker says of each text, an answer to the prompt of that number."""
    told = checker([prompts[i] for i in index], texts, {n: [column[i] for i in index] for n, column in columns.items()})
    for text, value, applies in zip(texts, told.rewards[:, 0], told.applies[:, 0], strict=True):
        if not applies or not 0 <= value <= 1:
            raise UserError(
                f"the checker {told.names[0]} gave {value if applies else None} for the answer {text[:80]!r}; it must "
                "give each a number from 0, wrong, to 1, right."
            )
    return told.rewards[:, 0].astype(np.float64)
