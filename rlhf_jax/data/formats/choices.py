"""Each labeller's own choice of two answers, where the other adapters keep what most of them said, or one of it.

A ranking is a choice of each two of its answers; a pair one choice; the sheets of published sets hold several.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rlhf_jax.data import formats
from rlhf_jax.data.formats.columns import instructed
from rlhf_jax.data.formats.published import GRADES, from_passages, six_choices
from rlhf_jax.data.formats.values import Columns, asked, entries, number, reply, string, whole
from rlhf_jax.data.rows import Preference, Ranking, Refusal, Text


class Choice(NamedTuple):
    """What one labeller said of two answers to a prompt.

    Attributes:
      first, second: the answers; `shown`: whether `first` was shown first, or nobody knows the order.
      grade: from 1 (the first is better) to 0 (the second is), 0.5 for neither.
      who: the labeller, "" for nobody known.
      ranked: whether it is a part of a ranking of three answers or more, whose choices follow from each other.
    """

    prompt: Text
    first: Text
    second: Text
    grade: float
    who: str = ""
    shown: bool = True
    tools: str = ""
    ranked: bool = False


Reader = Callable[[Columns, bool], Iterator[Choice]]


def choices(name: str, columns: Columns, chat: bool) -> list[Choice]:
    """The choices in one record of format `name`, those of two equal or empty answers left out.

    Args:
      name: of `formats.FORMATS`, one of pairs or of rankings.
      columns: of the record, as `sources.Record` has them.
      chat: whether prompts of sheets become messages, or texts.
    Raises: Refusal and Left as `formats.adapt`.
    """
    made = READERS[name](columns, chat) if name in READERS else _adapted(name, columns, chat)
    return [one for one in made if one.first != one.second and _said(one.first) and _said(one.second)]


def _said(text: Text) -> bool:
    return bool(text.strip()) if isinstance(text, str) else bool(text)


def _person(columns: Columns, *names: str) -> str:
    """The text of the first of these columns that holds a name or a number."""
    found = (columns.get(name) for name in names)
    return next((str(said) for said in found if isinstance(said, str | int) and not isinstance(said, bool)), "")


# Forms that many files share


def _adapted(name: str, columns: Columns, chat: bool) -> Iterator[Choice]:
    who = _person(columns, "labeller")
    for row in formats.adapt(name, columns, chat, ties=True):
        if isinstance(row, Ranking):
            for i, j in itertools.combinations(range(len(row.ranks)), 2):
                grade = 0.5 if row.ranks[i] == row.ranks[j] else float(row.ranks[i] < row.ranks[j])
                pair = row.completions[i], row.completions[j]
                yield Choice(row.prompt, *pair, grade, who, True, row.tools, len(row.ranks) > 2)
        elif isinstance(row, Preference):
            for person, grade in _votes(columns, who):
                yield Choice(row.prompt, row.chosen, row.rejected, grade, person, False, row.tools)
        else:
            raise Refusal(f"rows of format {name!r} compare no answers")


def _votes(columns: Columns, who: str) -> Iterator[tuple[str, float]]:
    """A pair's labels: one each of `votes`, by `labellers`, as the synthetic world writes them; else the pair's own.

    The pair's own is the `probability` of a soft label, where there is one.
    """
    if "votes" not in columns or "labellers" not in columns:
        chance = columns.get("probability")
        grade = 1.0 if chance is None else number(chance, "probability")
        if not 0 <= grade <= 1:
            raise Refusal(f"'probability' is {grade}, not from 0 to 1")
        yield who, grade
        return
    votes, people = entries(columns["votes"], "votes"), entries(columns["labellers"], "labellers")
    said = [float(vote) if isinstance(vote, bool) else number(vote, "votes") for vote in votes]
    if len(said) != len(people) or not all(0 <= vote <= 1 for vote in said):
        raise Refusal(f"{len(votes)} 'votes' of {len(people)} 'labellers'; each has one, true or false or from 0 to 1")
    yield from zip(map(str, people), said, strict=True)


# Sheets of published sets


def _sheet(prompt: Text, answers: Sequence[str], grade: float, who: str, chat: bool) -> Choice:
    first, second = (reply(text, chat) if text.strip() else "" for text in answers)
    return Choice(prompt, first, second, grade, who)


def _pandalm(columns: Columns, chat: bool) -> Iterator[Choice]:
    """A choice each of the columns annotator1, annotator2 and so on."""
    texts = [string(columns[name], name) for name in ("instruction", "response1", "response2")]
    prompt = instructed(texts[0], string(columns.get("input", ""), "input"), chat)
    for name, value in columns.items():
        if name.startswith("annotator"):
            if (choice := whole(value, name)) not in (0, 1, 2):
                raise Refusal(f"an annotator's choice is {choice}; allowed are 0, 1, 2")
            yield _sheet(prompt, texts[1:], (0.5, 1.0, 0.0)[choice], name, chat)


FIVE = dict(zip(GRADES, (1.0, 0.75, 0.5, 0.25, 0.0), strict=True))


def _graded(columns: Columns, chat: bool) -> Iterator[Choice]:
    """One choice in five grades, by an evaluator."""
    prompt, *texts = (string(columns[name], name) for name in ("prompt", "completion_a", "completion_b"))
    if (grade := string(columns["preference"], "preference")) not in FIVE:
        raise Refusal(f"'preference' is {grade!r}; allowed are {', '.join(FIVE)}")
    yield _sheet(asked(prompt, chat), texts, FIVE[grade], _person(columns, "labeller", "evaluator"), chat)


def _judged(columns: Columns, chat: bool) -> Iterator[Choice]:
    """A judge's choice; of a preference between 1 and 2 the nearer one, 0 and 1.5 are ties."""
    prompt, *texts = (string(columns[name], name) for name in ("instruction", "output_1", "output_2"))
    judged = number(columns["preference"], "preference")
    if judged and not 1 <= judged <= 2:
        raise Refusal(f"'preference' is {judged}, not from 1 to 2")
    grade = 0.5 if judged in (0, 1.5) else float(judged < 1.5)
    yield _sheet(instructed(prompt, "", chat), texts, grade, _person(columns, "labeller", "annotator"), chat)


def _finegrained(columns: Columns, chat: bool) -> Iterator[Choice]:
    """Six choices among four predictions, by one person."""
    predictions, said = six_choices(columns)
    prompt, who = from_passages(columns, chat), _person(columns, "labeller")
    for pair, choice in zip(itertools.combinations(predictions, 2), said, strict=True):
        yield _sheet(prompt, pair, (0.5, 1.0, 0.0)[choice], who, chat)


READERS: dict[str, Reader] = {
    "pandalm": _pandalm,
    "graded_pair": _graded,
    "judged_pair": _judged,
    "finegrained": _finegrained,
    "finegrained_pairs": _finegrained,
    "finegrained_ranking": _finegrained,
    "finegrained_spans": _finegrained,
}
