"""Simulated people who say which of two answers of the synthetic world is better.

What a labeller sees in an answer is the gold reward bent by its own tastes; what it says of two answers follows
Bradley and Terry, of more Plackett and Luce, with slips. Every label is a pure function of the labeller, the texts
and the number of the label.

References: Bradley and Terry 1952, Biometrika 39; Plackett 1975, Applied Statistics 24; the biases are those of Saito
et al. 2023, arXiv:2310.10076 (length) and Sharma et al. 2023, arXiv:2310.13548 (agreement with the user).
"""

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from typing import Annotated, Any

from rlhf_jax.data import world
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Labeller:
    """One simulated person; the numbers are in units of the gold reward.

    With d = value(prompt, a) - value(prompt, b), a is preferred with the probability
    (1 - noise) s + noise (1 - s), s = sigmoid(d / temperature).
    """

    seed: Annotated[int, "of the labeller, its confusion and its slips"] = 0
    noise: Annotated[float, "share of labels that are turned round, 0 to 1"] = 0.15
    length_bias: Annotated[float, "what a word more is worth to it; below 0 it likes short answers"] = 0.05
    agreeableness: Annotated[float, "what it is worth to repeat the user's opinion, right or wrong"] = 0.0
    confusion: Annotated[float, "standard deviation of its lasting error about an answer, at least 0"] = 0.0
    temperature: Annotated[float, "difference of value at which 73% of its labels follow it, above 0"] = 0.5

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not math.isfinite(value):
                raise UserError(f"a labeller's {name}={value} must be finite.")
        if not 0 <= self.noise <= 1:
            raise UserError(f"a labeller's noise={self.noise} must be from 0 to 1.")
        if self.confusion < 0:
            raise UserError(f"a labeller's confusion={self.confusion} must be at least 0.")
        if self.temperature <= 0:
            raise UserError(f"a labeller's temperature={self.temperature} must be above 0.")

    def value(self, prompt: str, answer: str) -> float:
        """What the labeller thinks an answer is worth: gold, plus its biases, plus its lasting error."""
        prompt, answer = prompt.strip(), answer.strip()
        error = 0.0
        if self.confusion:
            error = statistics.NormalDist(sigma=self.confusion).inv_cdf(_uniform("value", self.seed, prompt, answer))
        bias = self.length_bias * world.length(answer) + self.agreeableness * world.echoes(prompt, answer)
        return world.judge(prompt, answer).total + bias + error

    def probability(self, prompt: str, a: str, b: str) -> float:
        """Probability that a label prefers a; exactly 0.5 if the answers are the same.

        >>> calm = Labeller(noise=0.1, length_bias=0.0)
        >>> print(round(calm.probability("Who has the key?", "Dan has the key.", "Eva has the key."), 3))
        0.886
        """
        difference = self.value(prompt, a) - self.value(prompt, b)
        return 0.5 + (0.5 - self.noise) * math.tanh(difference / (2 * self.temperature))

    def prefers(self, prompt: str, a: str, b: str, label: int = 0) -> bool:
        """Whether the labeller's label number `label` of this item prefers a; the order of a and b is no matter."""
        first, second = sorted((a.strip(), b.strip()))
        draw = _uniform("label", self.seed, prompt.strip(), first, second, label)
        return (draw < self.probability(prompt, first, second)) == (a.strip() == first)

    def ranks(self, prompt: str, answers: Sequence[str], label: int = 0) -> tuple[float, ...]:
        """The labeller's ranking number `label` of the answers: a rank each, 0 the best; equal texts rank equally.

        The order is that of value / temperature plus Gumbel noise, which is Plackett and Luce's: the best is a_1
        with the probability softmax(value / temperature)_1, and so on among those that are left. With the
        probability `noise` all of it is turned round. So a ranks above b with exactly probability(prompt, a, b).

        The noise is of an answer's own text: the order in which answers stand is no matter, and a ranking of
        some of them is that of all of them without the others.

        References: Plackett 1975; Yellott 1977, Journal of Mathematical Psychology 15 (the Gumbel noise).
        """
        prompt, texts = prompt.strip(), [answer.strip() for answer in answers]
        noisy = {}
        for text in set(texts):
            draw = _uniform("gumbel", self.seed, prompt, text, label)
            noisy[text] = self.value(prompt, text) / self.temperature - math.log(-math.log(draw))
        turned = _uniform("turned", self.seed, prompt, label) < self.noise
        order = sorted(noisy, key=lambda text: (noisy[text], text), reverse=not turned)
        places = {text: float(place) for place, text in enumerate(order)}
        return tuple(places[text] for text in texts)


def panel(count: int, seed: int, **knobs: Any) -> list[Labeller]:
    """`count` labellers with the same knobs (those of Labeller) and each a seed of its own."""
    if count < 1:
        raise UserError(f"a panel of {count} labellers labels nothing; it takes at least 1.")
    return [Labeller(_integer("panel", seed, member), **knobs) for member in range(count)]


def label(
    prompt: str, a: str, b: str, panel: Sequence[Labeller], labels: int = 3, seed: int = 0
) -> list[tuple[int, bool]]:
    """Several labels of one item: who of the panel was asked (its index), and whether a was preferred.

    The item and the seed decide who is asked; nobody is asked twice before all were asked once.
    """
    item = prompt.strip(), *sorted((a.strip(), b.strip()))
    turns = asked(item, len(panel), labels, seed)
    return [(member, panel[member].prefers(prompt, a, b, number)) for member, number in turns]


def asked(item: Sequence[str], people: int, labels: int, seed: int) -> list[tuple[int, int]]:
    """Who of a panel gives each of several labels of an item (the index), and the number that this label has.

    The item's texts and the seed decide; nobody is asked twice before all were asked once.
    """
    order = sorted(range(people), key=lambda member: _integer("asked", seed, *item, member))
    turns = (divmod(number, people) for number in range(labels))
    return [(order[place], _integer("turn", seed, turn)) for turn, place in turns]


def label_pairs(
    prompts: Sequence[str],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    panel: Sequence[Labeller],
    labels: int = 3,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Preference rows of the majority of several labels; pairs of the same answer are left out.

    Returns: rows with the columns prompt, chosen, rejected (strings, as given), votes (for each label whether it
      was for the chosen answer), labellers (for each label the index in the panel of who gave it) and
      gold_margin (gold reward of chosen less that of rejected; below 0 where the majority errs). A tie falls to
      either answer by a coin that the texts and the seed decide.
    Raises: UserError for less than one label or labeller, and a prompt of another world.
    """
    if labels < 1 or not panel:
        raise UserError(f"{labels} labels an item by {len(panel)} labellers; both must be at least 1.")
    rows = []
    for prompt, a, b in zip(prompts, answers_a, answers_b, strict=True):
        if a.strip() == b.strip():
            continue
        votes = label(prompt, a, b, panel, labels, seed)
        lead = 2 * sum(for_a for _, for_a in votes) - labels
        first, second = sorted((a.strip(), b.strip()))
        coin = (_uniform("tie", seed, prompt.strip(), first, second) < 0.5) == (a.strip() == first)
        for_a = lead > 0 or (lead == 0 and coin)
        chosen, rejected = (a, b) if for_a else (b, a)
        margin = world.judge(prompt, chosen).total - world.judge(prompt, rejected).total
        rows.append(
            {"prompt": prompt, "chosen": chosen, "rejected": rejected, "votes": [v == for_a for _, v in votes]}
            | {"labellers": [member for member, _ in votes], "gold_margin": round(margin, 6)}
        )
    return rows


def _integer(*parts: str | int) -> int:
    """A 63-bit hash of texts and numbers, the same in every process."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _uniform(*parts: str | int) -> float:
    """A number above 0 and below 1 that the parts decide."""
    return ((_integer(*parts) >> 11) + 0.5) / 2**52
