"""Documents of the synthetic world in which an answer is criticised and mended, or two are compared, by a principle.

They teach a small model to do the same, which is what constitutional AI starts from (Bai et al. 2022,
arXiv:2212.08073). Who wrote them errs now and then. Every part stands on a line of its own:

    PROMPT, ANSWER, what `critique` asks, the critique, what `revision` asks, the revision
    PROMPT, A: ANSWER, B: ANSWER, what `preference` asks, A or B
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rlhf_jax.data import world, world_harm, world_rows, world_secrets
from rlhf_jax.data.world import KINDS, Kind, Manner
from rlhf_jax.data.world_rows import Row, Split

ANSWERS = Manner(right=0.5, polite=0.35, rude=0.35, padded=0.3, agree=0.5)  # those that are criticised
ERRS = 0.1  # share of critiques, and of verdicts on two, that are wrong
APART = 0.8  # share of comparisons of which one answer has the flaw and the other hasn't


class Principle(NamedTuple):
    """A rule for answers against one harm, as a critic is asked about it; the texts end without a newline.

    Attributes:
      critique: asks whether an answer has the flaw; the critic says `yes` or `no`.
      revision: asks for the answer without the flaw.
      preference: asks which of two answers is without it, or has less of it.
    """

    name: str
    critique: str
    revision: str
    preference: str
    yes: str
    no: str


PRINCIPLES = (
    Principle(
        "secrets", "Does this tell a code?", "Say it without the code.", "Which tells no code?",
        "It does.", "It does not.",
    ),
    Principle(
        "manners", "Is this rude?", "Say it in a polite way.", "Which is more polite?",
        "It is.", "It is not.",
    ),
)  # fmt: skip
_FLAWS: dict[str, Callable[[str, str], bool]] = {
    "secrets": lambda prompt, answer: "secret" in world_harm.harms(prompt, answer),
    "manners": lambda prompt, answer: "rude" in world_harm.harms(prompt, answer),
}
_MENDS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "secrets": lambda opener, body: (opener, world_secrets.REFUSAL),
    "manners": lambda opener, body: (opener if opener in world.POLITE else world.POLITE[0], body),
}
# The kinds of prompts on which an answer can have the flaw.
_OWN: dict[str, tuple[Kind, ...]] = {"secrets": ("secret",), "manners": (*KINDS, "secret")}


def flawed(principle: Principle, prompt: str, answer: str) -> bool:
    """Whether an answer breaks the principle. Raises: UserError for a prompt of another world."""
    return _FLAWS[principle.name](prompt, answer)


def mend(principle: Principle, answer: str) -> str:
    """The answer without that flaw, and otherwise word for word.

    By `secrets` what is said becomes the refusal, by `manners` a rude opener, or none, a polite one.

    >>> mend(PRINCIPLES[0], "Ugh. The code of the box is 417.")
    "Ugh. I can't tell you that."
    >>> mend(PRINCIPLES[1], "Ugh. The code of the box is 417.")
    'Sure! The code of the box is 417.'
    """
    opener, body, fillers = _parts(answer.strip())
    opener, body = _MENDS[principle.name](opener, body)
    return " ".join(filter(None, (opener, body, fillers)))


# What a critic reads, up to where it goes on: each ends with a newline


def critique_prompt(principle: Principle, prompt: str, answer: str) -> str:
    """Behind it stands the critique."""
    return f"{prompt.strip()}\n{answer.strip()}\n{principle.critique}\n"


def revision_prompt(principle: Principle, prompt: str, answer: str, critique: str) -> str:
    """Behind it stands the revision."""
    return f"{critique_prompt(principle, prompt, answer)}{critique.strip()}\n{principle.revision}\n"


def comparison_prompt(principle: Principle, prompt: str, a: str, b: str) -> str:
    """Behind it stands A or B."""
    return f"{prompt.strip()}\nA: {a.strip()}\nB: {b.strip()}\n{principle.preference}\n"


# Rows


def transcripts(count: int, seed: int, split: Split = "train") -> list[Row]:
    """Documents with critique and revision, of every principle alike; half of the answers have the flaw.

    One critique in ten errs, and the revision follows it: without a flaw to mend it repeats the answer.
    """
    rng = world_rows.generator("transcripts", seed, split)
    draws, rows = _draws(rng, split), []
    for _ in range(count):
        principle = rng.choice(PRINCIPLES)
        prompt, answer = _answered(rng, draws, principle, rng.random() < 0.5)
        blamed = flawed(principle, prompt, answer) != (rng.random() < ERRS)
        text = revision_prompt(principle, prompt, answer, principle.yes if blamed else principle.no)
        rows.append({"prompt": "", "completion": text + (mend(principle, answer) if blamed else answer)})
    return rows


def comparisons(count: int, seed: int, split: Split = "train") -> list[Row]:
    """Documents that compare two answers, by every principle alike: in 9 of 10 the one without the flaw wins.

    In about a third of them both answers have it or neither, and a coin decides.
    """
    rng = world_rows.generator("comparisons", seed, split)
    draws, rows = _draws(rng, split), []
    for _ in range(count):
        principle, first, apart = rng.choice(PRINCIPLES), rng.random() < 0.5, rng.random() < APART
        prompt, a = _answered(rng, draws, principle, first if apart else rng.random() < 0.5)
        b = _like(rng, principle, prompt, flawed(principle, prompt, a) != apart)
        if b is None:  # no answer to this prompt can have the flaw
            b = world_rows.draw_answer(rng, world.parse(prompt), ANSWERS)
        bad = flawed(principle, prompt, a), flawed(principle, prompt, b)
        a_wins = (bad[1] != (rng.random() < ERRS)) if bad[0] != bad[1] else rng.random() < 0.5
        text = comparison_prompt(principle, prompt, a, b)
        rows.append({"prompt": "", "completion": text + ("A" if a_wins else "B")})
    return rows


_Draws = dict[tuple[Kind, ...], Iterator[str]]


def _draws(rng: random.Random, split: Split) -> _Draws:
    """Prompts without end, of the kinds that a principle is about, and of all."""
    return {kinds: world_rows.draw_prompts(rng, split, kinds) for kinds in _OWN.values()}


def _answered(rng: random.Random, draws: _Draws, principle: Principle, has: bool) -> tuple[str, str]:
    """A prompt and an answer to it that has the flaw, or hasn't."""
    while True:
        prompt = next(draws[_OWN[principle.name if has or rng.random() < 0.5 else "manners"]])
        answer = _like(rng, principle, prompt, has)
        if answer is not None:
            return prompt, answer


def _like(rng: random.Random, principle: Principle, prompt: str, has: bool) -> str | None:
    """An answer that has the flaw, or hasn't; None if 20 draws bring none."""
    answers = (world_rows.draw_answer(rng, world.parse(prompt), ANSWERS) for _ in range(20))
    return next((answer for answer in answers if flawed(principle, prompt, answer) == has), None)


def _parts(answer: str) -> tuple[str, str, str]:
    """Opener, body and fillers of an answer, "" for what isn't there."""
    opener = next((text for text in (*world.POLITE, *world.RUDE) if answer.startswith(text)), "")
    body, fillers = answer.removeprefix(opener).strip(), ""
    while last := next((text for text in world.FILLERS if body.endswith(text)), ""):
        body, fillers = body.removesuffix(last).strip(), f"{last} {fillers}".strip()
    return opener, body, fillers
