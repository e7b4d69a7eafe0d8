"""The columns that data files have, and how a record of them becomes rows.

Text is passed through as it is. `columns` has the forms that many files share, `published` those of single
data sets, `values` what may stand in a column.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_jax.data.formats import columns as shared
from rlhf_jax.data.formats import published, solutions, values
from rlhf_jax.data.formats.values import Columns
from rlhf_jax.data.rows import Demonstration, Labelled, Left, Preference, Prompt, Ranking, Refusal, Row, Stepwise
from rlhf_jax.errors import UserError

Adapter = Callable[[Columns, bool], Any]  # gives a row or a tuple of rows


@dataclasses.dataclass(frozen=True)
class Format:
    """Columns that a record must have, the kind of row it becomes, the adapter, and what else marks its records."""

    columns: tuple[str, ...]
    row: type[Row]
    adapter: Adapter
    marks: Callable[[Columns], bool] | None = None


# Forms that many files share. Searched in this order: one stands before those whose columns are a part of its own.
SHARED: dict[str, Format] = {
    "sharegpt_preference": Format(
        ("conversations", "chosen", "rejected"), Preference, shared.sharegpt_preference
    ),
    "preference": Format(("prompt", "chosen", "rejected"), Preference, shared.preference),
    "ranking": Format(("prompt", "completions", "ranks"), Ranking, shared.ranking),
    "stepwise": Format(("prompt", "completions", "labels"), Stepwise, shared.stepwise),
    "rated_steps": Format(("prompt", "completions", "ratings"), Stepwise, shared.rated_steps),
    "labelled": Format(("prompt", "completion", "label"), Labelled, shared.labelled),
    "hh": Format(("chosen", "rejected"), Preference, shared.hh, shared.is_transcript),
    "implicit_preference": Format(("chosen", "rejected"), Preference, shared.implicit_preference),
    "prompt_completion": Format(("prompt", "completion"), Demonstration, shared.prompt_completion),
    "alpaca": Format(("instruction", "output"), Demonstration, shared.alpaca),
    "sharegpt": Format(("conversations",), Demonstration, shared.sharegpt),
    "labelled_messages": Format(("messages", "label"), Labelled, shared.labelled_messages),
    "messages": Format(("messages",), Demonstration, shared.messages),
    "question_answer": Format(
        ("question", "answer"), Demonstration, shared.question_answer, shared.is_open_question
    ),
    "prompt": Format(("prompt",), Prompt, lambda columns, chat: Prompt(values.prompt(columns["prompt"]))),
    "text": Format(("text",), Demonstration, shared.document, lambda columns: isinstance(columns.get("text"), str)),
}  # fmt: skip
SPANS = ("question", "passages", "feedback", "prediction 1")
# Those of one data set or one family of them, searched before the others. Of several readings of the same records
# the first that the loss takes is taken.
PUBLISHED: dict[str, Format] = {
    "self_instruct": Format(("instruction", "instances"), Demonstration, published.self_instruct),
    "oasst": Format(("message_tree_id", "prompt"), Demonstration, published.oasst, published.is_tree),
    "oasst_ranking": Format(("message_tree_id", "prompt"), Ranking, published.oasst_ranking, published.is_tree),
    "scored_transcripts": Format(
        ("text", "score"), Preference, published.scored_transcripts, published.is_scored_pair
    ),
    "domain_normal": Format(
        ("query", "responses"), Ranking, functools.partial(published.domain, "normal"), published.is_by_domain
    ),
    "domain_academy": Format(
        ("query", "responses"), Ranking, functools.partial(published.domain, "academy"), published.is_by_domain
    ),
    "domain_business": Format(
        ("query", "responses"), Ranking, functools.partial(published.domain, "business"), published.is_by_domain
    ),
    "domain_entertainment": Format(
        ("query", "responses"), Ranking, functools.partial(published.domain, "entertainment"), published.is_by_domain
    ),
    "domain_literature": Format(
        ("query", "responses"), Ranking, functools.partial(published.domain, "literature"), published.is_by_domain
    ),
    "pandalm": Format(("instruction", "response1", "response2", "annotator1"), Preference, published.pandalm),
    "graded_pair": Format(("prompt", "completion_a", "completion_b", "preference"), Preference, published.graded_pair),
    "judged_pair": Format(("instruction", "output_1", "output_2", "preference"), Preference, published.judged_pair),
    "finegrained": Format((*SPANS, "gold", "preference"), Demonstration, published.finegrained),
    "finegrained_pairs": Format((*SPANS, "gold", "preference"), Preference, published.finegrained_pairs),
    "finegrained_ranking": Format((*SPANS, "gold", "preference"), Ranking, published.finegrained_ranking),
    "finegrained_spans": Format((*SPANS, "gold", "preference"), Stepwise, published.finegrained_spans),
    "first_error": Format(
        ("question", "model_output_steps", "model_output_solution_first_error_step"), Stepwise, solutions.first_error
    ),
    "mistake_index": Format(("input", "steps", "target", "answer"), Stepwise, solutions.mistake_index),
    "prm800k": Format(("question", "label"), Stepwise, solutions.prm800k, solutions.is_rated_solution),
    "solutions": Format(("question", "ground_truth"), Labelled, solutions.solutions, solutions.are_judged),
    "problem": Format(("problem", "solution", "answer"), Prompt, published.problem, published.is_unanswered),
    "first_turn": Format(("turns", "question_id"), Prompt, published.first_turn, published.is_unanswered),
}  # fmt: skip
FORMATS: dict[str, Format] = PUBLISHED | SHARED


def detect(records: Sequence[Columns], where: str, kinds: Sequence[type[Row]] = ()) -> str:
    """The name of the first format whose columns the first usable records have.

    Args:
      records: columns of the first usable records of a source.
      where: the source, for the message.
      kinds: kinds of row to prefer among several readings of the same columns.
    Raises: UserError that names the columns found and the formats allowed.
    """
    found = _names(records)
    fitting = [name for name, form in FORMATS.items() if _fits(form, found, records)]
    if not fitting:
        raise UserError(f"{where} has the columns {_listed(found)}, which no format reads; allowed are {_allowed()}")
    readings = [name for name in fitting if FORMATS[name].columns == FORMATS[fitting[0]].columns]
    return next((name for name in readings if FORMATS[name].row in kinds), fitting[0])


def _fits(form: Format, found: set[str], records: Sequence[Columns]) -> bool:
    return found.issuperset(form.columns) and (form.marks is None or any(map(form.marks, records)))


def check(name: str, records: Sequence[Columns], where: str) -> None:
    """Raises UserError if a column that format `name` needs stands in none of the records."""
    found = _names(records)
    missing = [column for column in FORMATS[name].columns if column not in found]
    if missing:
        fitting = ", ".join(["auto", *(other for other, form in FORMATS.items() if found.issuperset(form.columns))])
        raise UserError(
            f"{where} has no column {_listed(missing)}, which the format {name!r} needs; it has {_listed(found)}; "
            f"add the column or choose --config.data.format from {fitting}"
        )


def lacking(kinds: Sequence[type[Row]], records: Sequence[Columns]) -> str:
    """Which columns stand in the records, and which the nearest shared form of the kinds of row needs besides.

    Where it needs none, the columns have an earlier reading, and it has to be asked for.
    """
    found = _names(records)
    lacks = {name: [c for c in form.columns if c not in found] for name, form in SHARED.items() if form.row in kinds}
    nearest = min(lacks, key=lambda name: len(lacks[name]))
    if not lacks[nearest]:
        return f"it has the columns {_listed(found)}, which --config.data.format={nearest} would read"
    return f"it has the columns {_listed(found)}, and the format {nearest} also needs {_listed(lacks[nearest])}"


def adapt(name: str, columns: Columns, chat: bool, ties: bool = False) -> tuple[Row, ...]:
    """One record as rows of format `name`, at least one.

    Args:
      chat: whether the tokenizer has a chat template.
      ties: whether rankings of equal ranks alone are rows, or left.
    Raises: Refusal if a column is missing or doesn't hold what the format needs; Left if the record is as it
      should be and holds nothing to learn from.
    """
    missing = [column for column in FORMATS[name].columns if column not in columns]
    if missing:
        raise Refusal(f"no column {_listed(missing)}")
    try:
        made = FORMATS[name].adapter(columns, chat)
    except RecursionError:
        raise Refusal("nested too deeply") from None
    rows: tuple[Row, ...] = made if isinstance(made, tuple) else (made,)
    for row in rows:
        if isinstance(row, Preference) and row.chosen == row.rejected:
            raise Refusal("chosen and rejected are the same")
    if all(isinstance(row, Ranking) and _ranks_nothing(row, ties) for row in rows):
        raise Left("all 'ranks' are the same")
    return tuple(_with_tools(row, columns) for row in rows) if columns.get("tools") else rows


def _ranks_nothing(row: Ranking, ties: bool) -> bool:
    return len(row.ranks) < 2 or (not ties and len(set(row.ranks)) < 2)


def _with_tools(row: Row, columns: Columns) -> Row:
    """The row with the functions that its record offers. Only a template writes them: a text has no place for any."""
    if row.tools:
        return row
    if not isinstance(row.prompt, str):
        return dataclasses.replace(row, tools=values.tools(columns["tools"]))
    try:
        offered = values.tools(columns["tools"])
    except Refusal:  # beside a text a column of this name may hold anything
        return row
    if offered:
        raise Refusal("'tools' stand beside a text, and only a chat template writes them; give messages")
    return row


def _names(records: Sequence[Columns]) -> set[str]:
    return set().union(*records)


def _listed(names: Sequence[str] | set[str]) -> str:
    return ", ".join(repr(name) for name in (sorted(names) if isinstance(names, set) else names)) or "none"


def _allowed() -> str:
    shapes = "; ".join(f"{name} ({', '.join(form.columns)})" for name, form in SHARED.items())
    return f"{shapes}; and {len(PUBLISHED)} shapes of published sets, which docs/data.md lists"
