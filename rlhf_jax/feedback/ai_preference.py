"""Preferences of a model in the place of people's: each pair is compared under a principle of a constitution.

A template of pairs (`judges`) has one more place, {question}, for what the principle asks; the judge's chance is the
label. References: Bai et al. 2022, arXiv:2212.08073, sec. 4.1; Lee et al. 2023, arXiv:2309.00267.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from rlhf_jax.data.rows import Text
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.constitution import Principle
from rlhf_jax.feedback.judges import OPTIONS, Judge, Pair, Template, Verdict, clamped, read_template

QUESTION = "{question}"
SAME, UNSURE = "both answers are the same", "the judge holds both for as good"
EMPTY = "an answer is empty"  # training refuses it


class Form(NamedTuple):
    """How a judge is asked: a template with a place for the question, and what `LocalJudge` puts around its cue."""

    template: Template
    options: tuple[str, str] = OPTIONS
    gap: str = "\n\n"


MakeJudge = Callable[[Form], Judge]


GENERAL, LINES = "general", "lines"
TEMPLATES = (
    GENERAL,
    LINES,
)  # that are shipped; the latter for models that read nothing but lines, such as those of the world


class Labels(NamedTuple):
    """What came of pairs.

    Attributes:
      rows: prompt, chosen, rejected, probability (0.5 to 1), principle, and the chance in each order of the answers.
      left: how many pairs gave no row, by the reason.
    """

    rows: list[dict[str, Any]]
    left: Mapping[str, int]


def read(path: str, flag: str = "--template") -> Form:
    """The template of a file, or a name in TEMPLATES. Errors: UserError as `read_template`, and without {question}."""
    if path == LINES:
        return Form(Template("{prompt}\nA: {first}\nB: {second}", f"{QUESTION}\n"), ("A", "B"), "\n")
    file = str(epath.Path(__file__).parent / "judge_principle.txt") if path == GENERAL else path
    template = read_template(file, flag=flag)
    if QUESTION not in template.asked + template.cue:
        raise UserError(
            f"the template {path} has no {QUESTION}; write it where a principle is to ask which answer is better."
        )
    return Form(template)


def under(form: Form, principle: Principle) -> Form:
    """The same with what a principle asks."""
    asked, cue = (text.replace(QUESTION, principle.preference) for text in (form.template.asked, form.template.cue))
    return form._replace(template=form.template._replace(asked=asked, cue=cue))


def compare(pairs: Sequence[Pair], principles: Sequence[Principle], form: Form, make_judge: MakeJudge) -> list[Verdict]:
    """What a judge says of each pair under its principle. Errors: UserError as the judge.

    Args:
      make_judge: opens the judge that asks so.
    """
    said: dict[int, Verdict] = {}
    for principle in dict.fromkeys(principles):
        places = [place for place, one in enumerate(principles) if one == principle]
        verdicts = make_judge(under(form, principle))([pairs[place] for place in places])
        said |= dict(zip(places, verdicts, strict=True))
    return [said[place] for place in range(len(pairs))]


def label(
    prompts: Sequence[Text],
    answers: Sequence[Sequence[str]],
    principles: Sequence[Principle],
    form: Form,
    make_judge: MakeJudge,
    *,
    clamp: bool = False,
) -> Labels:
    """Rows to train on: of two answers to each prompt the likelier one as chosen, with its chance.

    Answers that are the same but for the space around them, pairs with an empty one, those without a verdict, and those
    of which the judge holds neither for better are left out and counted.

    Args:
      answers: two to each prompt.
      clamp: whether chances are brought to between 0.4 and 0.6, as behind a rationale; of chosen it is at most 0.6.
    Errors: UserError as the judge.
    """
    unlike = [place for place, (a, b) in enumerate(answers) if a.strip() != b.strip()]
    places = [place for place in unlike if all(text.strip() for text in answers[place])]
    left = collections.Counter({SAME: len(prompts) - len(unlike), EMPTY: len(unlike) - len(places)})
    pairs = [Pair(prompts[place], *answers[place]) for place in places]
    verdicts = compare(pairs, [principles[place] for place in places], form, make_judge)
    rows = []
    for place, pair, verdict in zip(places, pairs, verdicts, strict=True):
        if verdict.probability is None or verdict.probability == 0.5:
            left[verdict.why or UNSURE] += 1
            continue
        rows.append(_row(pair, verdict, principles[place].name, clamp))
    return Labels(rows, +left)


def _row(pair: Pair, verdict: Verdict, principle: str, clamp: bool) -> dict[str, Any]:
    assert verdict.probability is not None
    ahead = verdict.probability > 0.5
    chance = max(verdict.probability, 1 - verdict.probability)
    chosen, rejected = (pair.first, pair.second) if ahead else (pair.second, pair.first)
    orders = [one if one is None or ahead else 1 - one for one in (verdict.ahead, verdict.behind)]
    texts: dict[str, Any] = {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}
    if not isinstance(pair.prompt, str):
        texts = {name: _messages(text) for name, text in texts.items()}
    return texts | {"probability": clamped(chance) if clamp else chance, "principle": principle, "by_order": orders}


def _messages(text: Text) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}] if isinstance(text, str) else [turn.fields for turn in text]


def told(labels: Labels, pairs: int) -> str:
    """What was said of so many pairs, in a line."""
    flips = [(a - 0.5) * (b - 0.5) < 0 for a, b in (row["by_order"] for row in labels.rows) if None not in (a, b)]
    line = f"{len(labels.rows)} of {pairs} pairs labelled"
    if flips:
        line += f", {sum(flips) / len(flips):.0%} of them the other way round when the answers change places"
    left = "; ".join(f"{count}: {why}" for why, count in labels.left.items())
    return f"{line}; left out {left}" if left else line
