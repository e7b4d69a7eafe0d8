"""Examinees whose every answer a test decides: by functions, or by seeing what is right."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.rows import Refusal
from rlhf_jax.evaluate.suite.items import Asked, Item
from rlhf_jax.feedback.judges import Pair, Verdict, both


@dataclasses.dataclass
class Made:
    """By functions of what is asked; a Refusal that one of them returns is passed on."""

    name: str = "made"
    weigh: Callable[[Asked], float | Refusal] = lambda asked: -1.0
    write: Callable[[Asked], str | Refusal] = lambda asked: ""
    better: Callable[[Pair], float | None] = lambda pair: 0.5  # the chance of the first, in either order
    writes: bool = True

    def likelihoods(self, asked: Sequence[Asked]) -> list[float | Refusal]:
        return [self.weigh(one) for one in asked]

    def answers(self, asked: Sequence[Asked]) -> list[str | Refusal]:
        return [self.write(one) for one in asked]

    def scores(self, asked: Sequence[Asked]) -> list[float | Refusal]:
        return self.likelihoods(asked)

    def verdicts(self, pairs: Sequence[Pair]) -> list[Verdict]:
        said = [self.better(pair) for pair in pairs]
        return [both(chance, chance, "" if chance is not None else "it was told not to") for chance in said]


def cheat(items: Sequence[Item], answers: Mapping[str, str] | None = None, **changes: Any) -> Made:
    """Sees what is right: its options are likely, its answers are those that are given by prompt.

    An answer may be the better of one pair and the worse of another: it stands between. Likelihoods are so far apart
    that the mean over bytes orders them alike; those of a twin are all the same.
    """
    steps: dict[Asked, int] = {item.asked(option): 0 for item in items for option in item.options}
    for _ in range(9):  # how far above the worst one each answer stands
        for item in items:
            worst = max((steps[item.asked(o)] for i, o in enumerate(item.options) if i not in item.right), default=0)
            for place in item.right:
                steps[item.asked(item.options[place])] = max(steps[item.asked(item.options[place])], worst + 1)
    pairs = {Pair(item.prompt, *item.options): float(0 in item.right) for item in items if len(item.options) == 2}
    weigh = lambda asked: -(10.0 ** (9 - 6 * steps[asked])) if asked in steps else -1.0
    write = lambda asked: (answers or {})[asked.prompt]
    return dataclasses.replace(Made("cheat", weigh, write, lambda pair: pairs[pair]), **changes)
