"""Pairs of answers as data files have them, with what people said of them, ties too: for judges, not for training.

What the formats read as pairs or rankings is read here as well, pairs without those that they leave as ties, but for
fine-grained feedback. Beside it there are answers by number, such as `output_1` and `output_2`, of which a column says
the better one: there the order of the file and its ties are kept. Some of those files are for evaluation alone and have
no format.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data import dataset, formats, sources
from rlhf_jax.data.conversions import HOLDS
from rlhf_jax.data.formats.choices import READERS, choices
from rlhf_jax.data.formats.published import GRADES
from rlhf_jax.data.rows import Left, Preference, Ranking, Refusal, Row
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.judges import Pair, Recorded

Columns = Mapping[str, Any]
FLAG = "--rows"


class Compared(NamedTuple):
    """A pair with what its row says of it.

    Attributes:
      pair: as a judge reads it: a question or a transcript as messages.
      plain: the same as texts, as rows are trained on with a tokenizer that has no chat template.
      label: share of the row's labels that put the first answer above the second, a tie half of one; None: no label.
      models: who wrote the first and the second answer; None where the row doesn't say.
      source: what the file is called.
      where: file and line.
      tools: what the prompt offers (`data.rows`), which a judge is not shown.
    """

    pair: Pair
    plain: Pair
    label: float | None
    models: tuple[str, str] | None
    source: str = ""
    where: str = ""
    tools: str = ""


class Read(NamedTuple):
    """What a file holds.

    Attributes:
      pairs: those that can be used; refused: why others can't, by where they stand.
      said: what a column says of each pair, if asked.
      evaluation: whether its authors made it for evaluation alone, so that nothing may be trained on it.
      chances: whether its labels are a column that somebody names (`probability`).
    """

    pairs: list[Compared]
    refused: dict[str, str]
    said: list[float]
    evaluation: bool = False
    chances: bool = False


class Numbered(NamedTuple):
    """Rows of two answers by number, of which columns name the better one.

    Attributes:
      format: that reads the texts, once the columns are renamed and `first` says that the first answer is better.
      needs: columns that tell such rows.
      first: see format.
      votes: the column with the label; of several labellers with a number behind it.
      models: columns that name who wrote the answers.
      renamed: our name of a column -> the row's.
      evaluation: whether the rows are for evaluation alone.
    """

    format: str
    needs: tuple[str, ...]
    first: Mapping[str, Any]
    votes: str
    models: tuple[str, str] = ("", "")
    renamed: Mapping[str, str] = {}
    evaluation: bool = False


NUMBERED = {
    "pandalm": Numbered("pandalm", ("instruction", "response1", "response2"), {"annotator1": 1}, "annotator"),
    "judged_pair": Numbered(
        "judged_pair", ("instruction", "output_1", "output_2"), {"preference": 1}, "preference",
        ("generator_1", "generator_2"),
    ),
    "graded_pair": Numbered(
        "graded_pair", ("prompt", "completion_a", "completion_b"), {"preference": "a-is-better"}, "preference",
        ("model_a", "model_b"),
    ),
    # LLMBar and its sheet of MT-Bench, Zeng et al. 2023, arXiv:2310.07641: no format trains on them.
    "llmbar": Numbered(
        "judged_pair", ("input", "output_1", "output_2"), {"preference": 1}, "label",
        renamed={"instruction": "input"}, evaluation=True,
    ),
}  # fmt: skip
AUTHORS = ("chosen_model", "rejected_model")  # columns of rows of chosen and rejected


def read(path: str, source: str, probability: str | None = None, column: str | None = None) -> Read:
    """The pairs of a file.

    Args:
      path: pairs, rankings, answers by number, or prompt and completions without ranks (`experiments.rank`).
      source: what the file is called.
      probability: column of rows of chosen and rejected: the chance that chosen is better, or votes; None: it is 1.
      column: what `said` is read of: numbered answers by `vote`, of chosen and rejected as `probability`.
    Errors: UserError for a file that isn't there, or holds nothing that can be compared.
    """
    records = list(sources.read(path, flag=FLAG))
    usable = [record.columns for record in records if isinstance(record, sources.Record)]
    first = set().union(*usable[: dataset.FIRST_ROWS])
    numbered = next((form for form in NUMBERED.values() if first.issuperset(form.needs)), None)
    blank = {"prompt", "completions"} <= first and not first & {"ranks", "labels", "ratings"}
    name = numbered.format if numbered else "ranking" if blank else _format(path, records)
    chances = numbered is None and formats.FORMATS[name].row is Preference
    found = Read([], {}, [], numbered is not None and numbered.evaluation, chances)
    for record in records:
        try:
            if isinstance(record, sources.Refused):
                raise Refusal(record.reason)
            if numbered:
                pairs, said = _of_numbers(numbered, record.columns, column)
            else:
                pairs, said = _of_rows(name, record.columns, probability, column, blank)
        except (Refusal, Left) as reason:
            found.refused.setdefault(record.where, str(reason))
            continue
        found.pairs.extend(one._replace(source=source, where=record.where) for one in pairs)
        found.said.extend(said)
    if not found.pairs:
        where, why = next(iter(found.refused.items()))
        raise UserError(f"{path} holds no two answers to compare (the first row, {where}: {why}); leave it away.")
    return found


def recorded(path: str, column: str, name: str) -> Recorded:
    """A judge whose verdicts stand in a column of a file. Errors: UserError as `read`, and without any verdict."""
    found = read(path, name, column=column)
    return Recorded(name, [(one.pair, said) for one, said in zip(found.pairs, found.said, strict=True)])


def _format(path: str, records: Sequence[sources.Record | sources.Refused]) -> str:
    kinds: list[type[Row]] = [Preference, Ranking]
    name = dataset.format_of(path, records, "auto", kinds)
    if (kind := formats.FORMATS[name].row) not in kinds:
        raise UserError(f"{path} holds {HOLDS[kind]}; give {FLAG} files of pairs, rankings or two answers by number.")
    return name


class _Told(NamedTuple):
    """The pairs of a row, which don't know yet where it stands, and what the column says of its one pair, if asked."""

    pairs: list[Compared]
    said: list[float]


def _of_numbers(form: Numbered, columns: Columns, column: str | None) -> _Told:
    labels = {name: value for name, value in columns.items() if re.fullmatch(rf"{form.votes}\d*", name)}
    votes = [vote(value, name) for name, value in labels.items()]
    if not votes:
        raise Refusal(f"no column {form.votes!r}")
    texts = {name: value for name, value in columns.items() if name not in labels}
    texts |= {ours: columns[theirs] for ours, theirs in form.renamed.items() if theirs in columns}
    ((pair, _, tools),), ((plain, *_),) = (_pairs(form.format, {**texts, **form.first}, chat) for chat in (True, False))
    said = [] if column is None else [vote(_cell(columns, column), column)]
    share, models = sum(votes) / len(votes), _models(columns, form.models)
    return _Told([Compared(pair, plain, share, models, tools=tools)], said)


def _of_rows(name: str, columns: Columns, probability: str | None, column: str | None, blank: bool) -> _Told:
    if blank:
        many = columns.get("completions")
        columns = {**columns, "ranks": list(range(len(many))) if isinstance(many, list) else None}
    of = _of_sheet if name in READERS else _pairs
    pairs, plain = (of(name, columns, chat) for chat in (True, False))
    if not pairs:
        raise Refusal("no two answers of different text")
    is_pair = formats.FORMATS[name].row is Preference
    if column is not None and not (is_pair and len(pairs) == 1):
        raise Refusal(f"the column {column!r} is read of single pairs, and this row holds something else")
    label = _chance(columns, probability) if is_pair and probability is not None else None
    models = _models(columns, AUTHORS) if is_pair else None
    told = [
        Compared(one, as_text, None if blank else share if label is None else label, models, tools=tools)
        for (one, share, tools), (as_text, *_) in zip(pairs, plain, strict=True)
    ]
    return _Told(told, [] if column is None else [_chance(columns, column)])


def _pairs(name: str, columns: Columns, chat: bool) -> list[tuple[Pair, float, str]]:
    """Every two answers of a record with the share of the first and the tools, in the order of the row."""
    pairs = []
    for row in formats.adapt(name, columns, chat, ties=True):
        if isinstance(row, Preference):
            pairs.append((Pair(row.prompt, row.chosen, row.rejected), 1.0, row.tools))
            continue
        assert isinstance(row, Ranking)
        for (a, first), (b, second) in itertools.combinations(zip(row.ranks, row.completions, strict=True), 2):
            if first != second:
                share = 0.5 if a == b else float(a < b)
                pairs.append((Pair(row.prompt, first, second), share, row.tools))
    return pairs


def _of_sheet(name: str, columns: Columns, chat: bool) -> list[tuple[Pair, float, str]]:
    """The same of a sheet whose ties the formats leave away."""
    return [(Pair(one.prompt, one.first, one.second), one.grade, one.tools) for one in choices(name, columns, chat)]


def vote(value: Any, name: str) -> float:
    """A label of two numbered answers as the share of the first: 1 is 1, 2 is 0, between them what it is nearer to.

    0 and 1.5 are ties; "a-is-better" and its kin are Tulu's grades.

    >>> vote(1, "label"), vote(2, "label"), vote(1.25, "preference"), vote(0, "annotator1")
    (1.0, 0.0, 0.75, 0.5)
    """
    if isinstance(value, str) and value in GRADES:
        better = GRADES[value]
        return 0.5 if better is None else 1.0 - better
    if isinstance(value, bool) or not isinstance(value, int | float) or not (value == 0 or 1 <= value <= 2):
        raise Refusal(f"{name!r} is {str(value)[:40]!r}, not 0 (a tie), or from 1 (the first) to 2 (the second)")
    return 0.5 if value == 0 else 2.0 - value


def _chance(columns: Columns, name: str) -> float:
    """A share of votes for chosen, or a chance."""
    value = _cell(columns, name)
    several: list[Any] = value if isinstance(value, list) and value else [value]
    if any(not isinstance(one, int | float) or not 0 <= one <= 1 for one in several):
        raise Refusal(f"{name!r} is {str(value)[:40]!r}, not from 0 to 1, or such votes")
    return sum(several) / len(several)


def _cell(columns: Columns, name: str) -> Any:
    if name not in columns:
        raise Refusal(f"it has no column {name!r}")
    return columns[name]


def _models(columns: Columns, names: tuple[str, str]) -> tuple[str, str] | None:
    first, second = (columns.get(name) for name in names)
    return (first, second) if isinstance(first, str) and isinstance(second, str) else None
