"""What gives an answer its score: Python functions, by name or from outside."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.data import world, world_harm
from rlhf_jax.data.rows import Text
from rlhf_jax.errors import UserError

# scorer(prompts, completions, **columns) -> one number an answer, the higher the better. Prompts and completions
# are strings, or lists of role/content messages where the data has them; columns are the other columns of the
# prompts' rows, lists as long as prompts.
Scorer = Callable[..., Sequence[float]]
SCORERS: dict[str, Scorer] = {"gold": world.gold, "harmless": world_harm.harmless, "refused": world_harm.refused}


def plain(text: Text) -> str | list[dict[str, Any]]:
    """A prompt as scorers get it."""
    return text if isinstance(text, str) else [turn.fields for turn in text]


def score(
    scorer: Scorer, prompts: Sequence[Text], texts: Sequence[Sequence[str]], columns: Mapping[str, Sequence[Any]]
) -> list[list[float]]:
    """The score of every answer, in one call of the scorer.

    Args:
      texts: for each prompt, its answers.
      columns: what else the prompts' rows say, one entry a prompt.
    Errors: UserError if the scorer doesn't give one finite number an answer.
    """
    index = [i for i, answers in enumerate(texts) for _ in answers]
    asked = [plain(prompts[i]) for i in index]
    told: list[Any] = [
        text if isinstance(prompts[i], str) else [{"role": "assistant", "content": text}]
        for i, answers in enumerate(texts)
        for text in answers
    ]
    scores = [
        float(x) for x in scorer(asked, told, **{name: [column[i] for i in index] for name, column in columns.items()})
    ]
    if len(scores) != len(told):
        raise UserError(f"the scorer gave {len(scores)} scores for {len(told)} answers; it must give one each.")
    for text, value in zip(told, scores, strict=True):
        if not math.isfinite(value):
            raise UserError(f"the scorer gave {value} for the answer {str(text)[:80]!r}; it must give a finite number.")
    values = iter(scores)
    return [[next(values) for _ in answers] for answers in texts]
