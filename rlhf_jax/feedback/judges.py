"""Judges that compare two answers to a prompt: what they are asked, what they say, and verdicts that a file holds.

A judge is a function of pairs that gives a verdict each, among them the chance that the first answer is better. A model
of this project is one (`judge_local`), a model behind an address another (`judge_endpoint`), and so is a file in which
somebody has written verdicts down (`Recorded`).
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from etils import epath

from rlhf_jax.data.rows import Text
from rlhf_jax.errors import UserError

OPTIONS = (" A", " B")  # what stands behind the cue, for the answer shown first and the one shown second
CLAMP = (0.4, 0.6)  # a chance that is read behind a rationale is near 0 or 1 whether or not it is right
RULE = "---"  # the line of a template between what is asked and how the answer begins
PLACES = ("{prompt}", "{first}", "{second}")
SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System", "tool": "Tool"}
# Of every template that is shipped, by whether the judge writes a rationale first.
SHIPPED = {False: "judge.txt", True: "judge_reasoning.txt"}


class Pair(NamedTuple):
    """A prompt and two answers to it; which of them is first means nothing."""

    prompt: Text
    first: Text
    second: Text


class Verdict(NamedTuple):
    """What a judge says of a pair.

    Attributes:
      probability: that the first answer is better, 0 to 1; None: it couldn't be judged.
      ahead, behind: the same as said when the first answer is shown before the second, and behind it; None where that
        wasn't asked, or has no answer.
      why: why it couldn't be judged, a clause; "" where it was.
    """

    probability: float | None
    ahead: float | None = None
    behind: float | None = None
    why: str = ""


Judge = Callable[[Sequence[Pair]], list[Verdict]]


def both(ahead: float | None, behind: float | None, why: str = "") -> Verdict:
    """The verdict of a judge that was asked in both orders: their mean, or None if one of them has no answer.

    >>> both(0.75, 0.25).probability
    0.5
    """
    probability = None if ahead is None or behind is None else (ahead + behind) / 2
    return Verdict(probability, ahead, behind, why if probability is None else "")


def average(verdicts: Sequence[Sequence[Verdict]]) -> list[Verdict]:
    """The mean of several judges on the same pairs, in the orders too.

    A pair that one of them couldn't judge has no mean: it would be another panel's label beside those of the whole.
    """
    made = []
    for row in zip(*verdicts, strict=True):
        failed = next((one.why for one in row if one.probability is None), "")
        chances = [one.probability for one in row], [one.ahead for one in row], [one.behind for one in row]
        probability, ahead, behind = map(_mean, chances)
        made.append(Verdict(probability, ahead, behind, failed))
    return made


def _mean(chances: Sequence[float | None]) -> float | None:
    known = [chance for chance in chances if chance is not None]
    return math.fsum(known) / len(known) if len(known) == len(chances) else None


def clamped(probability: float) -> float:
    """Brought to between 0.4 and 0.6. References: Bai et al. 2022, arXiv:2212.08073, sec. 4.1.

    >>> clamped(0.999), clamped(0.45)
    (0.6, 0.45)
    """
    return min(max(probability, CLAMP[0]), CLAMP[1])


# What is asked


class Template(NamedTuple):
    """What a judge is asked, and how its answer begins.

    Attributes:
      asked: text with {prompt}, {first} and {second}, the answers in the order in which they are shown.
      cue: what stands before the option that an answer ends with.
      reasoning: whether a rationale is written before the cue.
    """

    asked: str
    cue: str
    reasoning: bool = False

    def fill(self, pair: Pair, swapped: bool) -> str:
        """What is asked of a pair; `swapped` shows the second answer before the first."""
        answers = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        texts: dict[str, str] = dict(zip(PLACES, map(written, (pair.prompt, *answers)), strict=True))
        # At once: a place that is named inside an answer is text.
        return re.sub("|".join(map(re.escape, PLACES)), lambda found: texts[found[0]], self.asked)


def read_template(path: str | None = None, reasoning: bool = False, flag: str = "--template") -> Template:
    """A template's file: what is asked, a line `---`, and the cue.

    Args:
      path: None: the one that is shipped.
      reasoning: whether the judge is to write a rationale first.
      flag: what gave the path, for messages.
    Errors: UserError for a file that isn't there, or lacks a place or the cue.
    """
    file = epath.Path(__file__).parent / SHIPPED[reasoning] if path is None else epath.Path(os.path.expanduser(path))
    if not file.is_file():
        raise UserError(f"there is no template {path}; check {flag}.")
    try:
        asked, _, cue = file.read_text().rpartition(f"\n{RULE}\n")
    except UnicodeDecodeError:
        raise UserError(f"the template {file} is not UTF-8 text; check {flag}.") from None
    if lacking := [place for place in PLACES if place not in asked]:
        raise UserError(
            f"the template {file} has no {lacking[0]}; before a line {RULE} it must have {', '.join(PLACES)}, and "
            "behind it how the answer begins, such as `The better response is:`."
        )
    if not cue.strip():
        raise UserError(f"the template {file} has nothing behind its line {RULE}; write how the answer begins.")
    return Template(asked.strip(), cue.strip(), reasoning)


def written(text: Text) -> str:
    """A prompt or an answer as a judge reads it: a lone message is its content, several are told with who speaks.

    >>> from rlhf_jax.data.rows import Message
    >>> print(written((Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?"))))
    User: Hi
    <BLANKLINE>
    Assistant: Hello
    <BLANKLINE>
    User: Why?
    """
    if isinstance(text, str):
        return text.strip()
    if len(text) == 1:
        return text[0].content.strip()
    return "\n\n".join(f"{SPEAKERS.get(turn.role, turn.role)}: {turn.content.strip()}" for turn in text)


# What was said before


def key_of(pair: Pair) -> tuple[str, str, str]:
    """What two pairs share that are the same to a judge, in this order of the answers."""
    return written(pair.prompt), written(pair.first), written(pair.second)


class Recorded:
    """Verdicts that were written down, found again by prompt and answers, in either order of these.

    A pair that was judged several times has the mean. What stands first says nothing of how the judge was asked, so
    there is no verdict by order.
    """

    def __init__(self, name: str, verdicts: Sequence[tuple[Pair, float]]):
        """Args:
        name: what messages call it.
        verdicts: pairs with the chance that the first answer is better, 0 to 1.
        """
        self.name = name
        self._said: dict[tuple[str, str, str], list[float]] = {}
        for pair, probability in verdicts:
            self._said.setdefault(key_of(pair), []).append(probability)

    def __call__(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [self._verdict(pair) for pair in pairs]

    def _verdict(self, pair: Pair) -> Verdict:
        swapped = [1 - said for said in self._said.get(key_of(Pair(pair.prompt, pair.second, pair.first)), [])]
        said = [*self._said.get(key_of(pair), []), *swapped]
        if not said:
            return Verdict(None, why=f"{self.name} has no verdict on it")
        return Verdict(math.fsum(said) / len(said))


def counted(verdicts: Sequence[Verdict]) -> Mapping[str, int]:
    """How many pairs couldn't be judged, by the reason."""
    reasons = [one.why for one in verdicts if one.probability is None]
    return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
