"""Whose judgements a chain's models rest on: who judged, as rows say it, and on what of that was trained."""

import contextlib
import dataclasses
import datetime
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from rlhf_jax import fields
from rlhf_jax.build import build
from rlhf_jax.chain.config import Chain
from rlhf_jax.data import formats, sources
from rlhf_jax.data.config import Data
from rlhf_jax.data.dataset import Dataset, format_of
from rlhf_jax.data.formats.choices import Choice, choices
from rlhf_jax.data.rows import Left, Preference, Ranking, Refusal
from rlhf_jax.workdir import load_config

PERSON, SIMULATED, SCORER, JUDGE, UNKNOWN = "person", "simulated person", "scorer", "judge", "not named"
TRAINED, HELD_OUT, LEFT_OUT = "trained", "held out", "left out"


class Said(NamedTuple):
    """A judgement, as its row tells of it.

    Attributes:
      who: "" if the row names nobody. kind: a person, simulated or not, a scorer, a judge, or not named.
      prompt: what was asked. where: file and line.
      ranking: whether it ranks answers; else it is of a pair, or of one answer.
      pairs: how many two answers of different text it compares.
      at, seconds, guidelines: None, None and "" where the row doesn't say.
    """

    who: str
    kind: str
    prompt: Hashable
    where: str
    ranking: bool
    pairs: int
    tied: bool
    at: datetime.datetime | None = None
    seconds: float | None = None
    guidelines: str = ""


class Person(NamedTuple):
    """What one labeller said of that which was trained on, and how many judgements more were held out."""

    name: str
    kind: str
    judgements: int
    prompts: int
    comparisons: int
    ties: int
    held_out: int
    seconds: float | None  # median


class Share(NamedTuple):
    """What became of the judgements of a file in one stage. Left out are those of rows that it can't use."""

    trained: int
    held_out: int
    left_out: int


@dataclasses.dataclass(frozen=True)
class Rests:
    """What the models of a chain rest on. All but `rows`, `stages` and `held_out` are of what any stage was trained on.

    Attributes:
      file: that the chain read; rows: its records.
      rankings, others: how many judgements rank, and how many do not.
      people: the labellers, those of the most judgements first.
      stages: by stage what became of the file's judgements.
      since, until: UTC in ISO form, of `timed` judgements; None where no row says when.
      seconds: the median; None where no row says it.
      guidelines: how many judgements were made under each version.
    """

    file: str
    rows: int
    rankings: int
    others: int
    prompts: int
    comparisons: int
    people: Sequence[Person]
    stages: Mapping[str, Share]
    since: str | None = None
    until: str | None = None
    timed: int = 0
    seconds: float | None = None
    guidelines: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def judgements(self) -> int:
        """How many were trained on."""
        return self.rankings + self.others


# Out of rows


def read(path: str, config: Data) -> tuple[list[Said], int]:
    """The judgements in a file, and how many records it has; a record that holds none is left out."""
    records = list(sources.read(path, config.split, "--config.inputs.labels"))
    name = format_of(path, records, config.format, [Ranking, Preference])
    found: list[Said] = []
    for record in records:
        if isinstance(record, sources.Record):
            with contextlib.suppress(Refusal, Left):
                found += _said(name, record)
    return found, len(records)


def _said(name: str, record: sources.Record) -> Iterator[Said]:
    columns, where = record.columns, record.where
    if formats.FORMATS[name].row is Preference:
        said = choices(name, columns, True)
        for place, (who, tied) in enumerate(_voters(columns, said)):
            prompt = said[0].prompt, said[0].tools
            yield Said(who, kind_of(name, columns, who), prompt, where, False, 1, tied, *_beside(columns, place))
        return
    who = _name(columns.get("labeller"))
    for row in formats.adapt(name, columns, True, ties=True):
        texts, ranks = (row.completions, row.ranks) if isinstance(row, Ranking) else ((), ())
        duos = [(i, j) for i, j in itertools.combinations(range(len(texts)), 2) if texts[i] != texts[j]]
        tied = any(ranks[i] == ranks[j] for i, j in duos)
        told = (row.prompt, row.tools), where, isinstance(row, Ranking), len(duos), tied, *_beside(columns, 0)
        yield Said(who, kind_of(name, columns, who), *told)


def _voters(columns: Mapping[str, Any], said: Sequence[Choice]) -> list[tuple[str, bool]]:
    """Of one pair everyone who judged it, and whether they saw no difference; "" for somebody without a name."""
    if len(said) != 1 or said[0].who:
        return [(one.who, one.grade == 0.5) for one in said]
    people, votes, count = (columns.get(name) for name in ("labellers", "votes", "labels"))
    if isinstance(people, list) and people:  # of weighed labels, which keep no votes
        return [(_name(one), False) for one in people]
    if isinstance(votes, list) and votes:
        return [("", vote == 0.5) for vote in votes]
    return [("", False)] * (count if type(count) is int and count > 0 else 1)


def kind_of(format: str, columns: Mapping[str, Any], who: str) -> str:
    """What stands behind a name, by the columns that programs of this project write beside it.

    A scorer's rankings have its scores, those of the world's people their gold and numbers for names, verdicts of
    judges a chance without votes; whatever else is named is taken for a person.
    """
    labellers = columns.get("labellers", columns.get("labeller"))
    numbered = all(type(one) is int for one in (labellers if isinstance(labellers, list) else [labellers]))
    if numbered and "scores" in columns and "ranks" in columns:
        return SCORER
    if numbered and not {"gold", "gold_margin"}.isdisjoint(columns):
        return SIMULATED
    if not who:
        return UNKNOWN
    verdict = "probability" in columns and "labeller" in columns and "votes" not in columns
    return JUDGE if verdict or format == "judged_pair" else PERSON


def _name(value: Any) -> str:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _beside(columns: Mapping[str, Any], place: int) -> tuple[datetime.datetime | None, float | None, str]:
    """When, in how many seconds and under which guidelines; of several labellers each column is a list."""
    found = []
    for name in ("at", "seconds", "guidelines"):
        value = columns.get(name)
        several = isinstance(value, list)
        found.append(value[place] if several and place < len(value) else None if several else value)
    at, seconds, guidelines = found
    known = type(seconds) in (int, float) and math.isfinite(seconds) and seconds >= 0
    return _time(at), float(seconds) if known else None, guidelines if isinstance(guidelines, str) else ""


def _time(value: Any) -> datetime.datetime | None:
    """None for what is no time in ISO form, or of nobody knows which zone."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        at = datetime.datetime.fromisoformat(value)
        return at.astimezone(datetime.UTC) if at.tzinfo else None
    return None


# What was trained on


def rests(chain: Chain, place: epath.Path, file: str | None) -> Rests | None:
    """What the stages that were trained here rest on; None if none was trained on judgements."""
    stages = [stage for stage in ("reward", "dpo") if stage in chain.made]
    if not stages or file is None:
        return None
    said, rows = read(file, getattr(chain, stages[0]).data)
    sides = {stage: sides_of(said, _data(place / stage)) for stage in stages}
    return summed(chain.inputs.labels or "labels/rankings.jsonl", rows, said, sides)


def _data(folder: epath.Path) -> Dataset:
    """The rows of a run as it had them; of an ensemble those of its first member."""
    members = folder / "members"
    config = load_config(next(iter(sorted(members.iterdir()))) if members.exists() else folder)
    return build(fields.replace(config, {"reward.demonstrations": ()}), folder).data


def sides_of(said: Sequence[Said], data: Dataset) -> list[str]:
    """What became of each judgement in a run: trained, held out or left out.

    A row that was merged with another of its prompt is where that one is. Of a record of several prompts, a tree, all
    are where its last row is.
    """
    sides = {one.where: TRAINED for one in data.train} | {one.where: HELD_OUT for one in data.evaluation}
    merged = set(data.report.merged)
    beside = {one.prompt: sides[one.where] for one in said if one.where in sides}
    own = lambda one: sides.get(one.where) or (beside.get(one.prompt) if one.where in merged else None)
    return [own(one) or LEFT_OUT for one in said]


def summed(file: str, rows: int, said: Sequence[Said], sides: Mapping[str, Sequence[str]]) -> Rests:
    """The figures of judgements, of which `sides` has what became of each, by stage.

    Rows of one ranking, which pairs out of a record are, count as one judgement: those of one labeller, prompt and
    time.
    """
    at = lambda side: [one for one, *of in zip(said, *sides.values(), strict=True) if side in of]
    used = _whole(at(TRAINED))
    spared = Counter((one.who, one.kind) for one in _whole(_without(at(HELD_OUT), at(TRAINED))))
    stages = {}
    for stage, of in sides.items():
        count = lambda side, of=of: len(_whole(one for one, its in zip(said, of, strict=True) if its == side))
        stages[stage] = Share(count(TRAINED), count(HELD_OUT), count(LEFT_OUT))
    by: dict[tuple[str, str], list[Said]] = {key: [] for key in spared}
    for one in used:
        by.setdefault((one.who, one.kind), []).append(one)
    people = [
        Person(
            *key, len(of), _prompts(of), sum(one.pairs for one in of), sum(one.tied for one in of), spared[key],
            _seconds(of),
        ) for key, of in by.items()
    ]  # fmt: skip
    times = sorted(one.at for one in used if one.at is not None)
    since, until = (time.isoformat(timespec="seconds") for time in (times[0], times[-1])) if times else (None, None)
    rankings = sum(one.ranking for one in used)
    return Rests(
        file, rows, rankings, len(used) - rankings, _prompts(used), sum(one.pairs for one in used),
        sorted(people, key=lambda one: (-one.judgements, one.name)), stages, since, until, len(times), _seconds(used),
        dict(Counter(one.guidelines for one in used if one.guidelines)),
    )  # fmt: skip


def _without(said: Iterable[Said], others: Iterable[Said]) -> list[Said]:
    there = {*others}
    return [one for one in said if one not in there]


def _whole(said: Iterable[Said]) -> list[Said]:
    """Judgements, with the pairs of one ranking as one."""
    found: dict[Hashable, Said] = {}
    for place, one in enumerate(said):
        key = (one.who, one.prompt, one.at) if one.who and one.at and not one.ranking else place
        first = found.get(key)
        more = one if first is None else first._replace(pairs=first.pairs + one.pairs, tied=first.tied or one.tied)
        found[key] = more
    return [*found.values()]


def _prompts(said: Iterable[Said]) -> int:
    return len({one.prompt for one in said})


def _seconds(said: Iterable[Said]) -> float | None:
    known = [one.seconds for one in said if one.seconds is not None]
    return statistics.median(known) if known else None
