"""One data set for one run: read, adapted, tokenised, cut to length, split into train and held out."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data import formats, items, sources
from rlhf_jax.data.config import Data
from rlhf_jax.data.conversions import CONVERSIONS, Form, Made, columns_of_pairs, impossible, tied_pairs
from rlhf_jax.data.cutting import fit, pieces
from rlhf_jax.data.items import Item, Shares, is_text, prompt_text
from rlhf_jax.data.outcome import Report
from rlhf_jax.data.rows import Left, Ranking, Refusal, Row, Text
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.errors import UserError

FIRST_ROWS = 64  # records looked at to find out the format


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """What a loss sees of one row.

    Attributes:
      completions: prompt and completion as tokens; pairs hold (chosen, rejected) with the same prompt.
      labels: one a completion: (True, False) for pairs, the row's own if labelled, () for demonstrations.
      prompt: signed 64-bit hash of the prompt's token ids before any cut.
      index: number of the row over all sources; it depends on the files alone, not on the tokenizer, the
        length or the seed.
      source: which path, counted from 0; those of `eval_path` continue those of `path`.
      where: file and line.
      ranks: of a group one a completion, the smaller the better; else ().
      probability, margin: of a pair what its columns say, see `Data`; 1 and 0 where none is read.
      step_labels: 1 right, 0 wrong, 0.5 neutral, one for each of `completions[0].ends`; else ().
      labeller: who labelled the row, the text of its column of this name; "" for none, or several.
      preferred: of a group [K][K], the share of labels that put completion i above j; else ().
      text: of a prompt alone, as its row gives it, before any cut; else "". Its tokens are the one completion, of
        which none is trained.
      columns: of a prompt alone what else its row says, see `items.beside`; else {}.
    """

    completions: tuple[Tokens, ...]
    labels: tuple[bool, ...]
    prompt: int
    index: int
    source: int
    where: str
    ranks: tuple[float, ...] = ()
    probability: float = 1.0
    margin: float = 0.0
    step_labels: tuple[float, ...] = ()
    labeller: str = ""
    preferred: Shares = ()
    text: Text = ""
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Examples and what was left out; `fingerprint` changes with any token, mask, label or column of any example."""

    train: tuple[Example, ...]
    evaluation: tuple[Example, ...]
    report: Report
    fingerprint: str


@dataclasses.dataclass
class _Notes:
    """What is noted on the way from records to examples; a row is noted once."""

    read: int = 0
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    left: dict[str, str] = dataclasses.field(default_factory=dict)
    cut: dict[str, None] = dataclasses.field(default_factory=dict)
    split: dict[str, None] = dataclasses.field(default_factory=dict)
    too_long: dict[str, None] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    lost: int = 0
    kept_as_text: dict[str, None] = dataclasses.field(default_factory=dict)
    merged: dict[str, None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """All examples of a config's sources, not yet split, and what was noted on the way; `split` takes it."""

    kept: tuple[tuple[Item, Example], ...]
    notes: _Notes
    encoder: Encoder
    length: int


def load(config: Data, encoder: Encoder, form: Form, length: int, seed: int) -> Dataset:
    """`read`, then `split`."""
    return split(read(config, encoder, form, length), config, seed)


def read(config: Data, encoder: Encoder, form: Form, length: int) -> Read:
    """Reads every source of `config` and makes the examples of one `form`.

    Args:
      form: what the loss takes: single answers, pairs, rankings, labelled answers, labelled steps or prompts. A prompt
        of the same text and columns as an earlier one is left out, and counted as merged.
      length: most tokens a row may have (`config.length`, or the model's context); of prompts alone, that a prompt
        may have beside what is written behind it.
    Raises: UserError as the sources and formats do; for rows the form can't be made of; for more refused rows
      than `max_refused`.
    """
    _check(config, length, form)
    items.check(config, form)
    notes = _Notes()
    found: list[Item] = []
    index = 0
    for source, path in enumerate([*config.path, *config.eval_path]):
        flag = "--config.data.path" if source < len(config.path) else "--config.data.eval_path"
        records = list(sources.read(path, config.split, flag))
        more, index = _items(records, path, source, config, encoder.chat, form, index, notes)
        found += more
    if config.merge:
        found, merged = items.merge(found, len(config.path), config.ties)
        notes.merged = dict.fromkeys(merged)
    if form == "prompt":
        found, merged = items.distinct(found, len(config.path))
        notes.merged = dict.fromkeys(merged)
    if config.ties:
        found = [items.with_ties(item) for item in found]
    kept = _encoded(found, encoder, length, config.too_long, notes)
    refused = tuple(notes.refused.items())
    if len(refused) > config.max_refused * notes.read:
        raise UserError(
            f"{len(refused)} of {notes.read} rows can't be used, more than "
            f"data.max_refused={config.max_refused} allows; the first is {refused[0][0]}: {refused[0][1]}; "
            "mend the rows or raise --config.data.max_refused"
        )
    return Read(tuple(kept), notes, encoder, length)


def split(read: Read, config: Data, seed: int) -> Dataset:
    """What is trained on and what is held out.

    Args:
      seed: decides, with the prompt alone, which rows are held out.
    Raises: UserError if no row to train on is left.
    """
    notes = read.notes
    train, evaluation, shared = _split(read.kept, config, seed)
    report = Report(
        notes.read, len(train), len(evaluation), tuple(notes.refused.items()), tuple(notes.cut), tuple(notes.too_long),
        shared, tuple(notes.left.items()), notes.tokens, notes.lost, len(notes.kept_as_text), tuple(notes.split),
        tuple(notes.merged),
    )  # fmt: skip
    if not train:
        raise UserError(_nothing_left(report, config.path, read.length))
    return Dataset(tuple(train), tuple(evaluation), report, _fingerprint(train, evaluation, read.encoder))


def _check(config: Data, length: int, form: Form) -> None:
    if not config.path:
        raise UserError("no data to train on; give --config.data.path=FILE")
    if config.weights and len(config.weights) != len(config.path):
        raise UserError(f"data.weights has {len(config.weights)} numbers for {len(config.path)} paths; give one each")
    if any(not 0 < w < float("inf") for w in config.weights):
        raise UserError(f"data.weights={config.weights} must be above 0; leave out a path that is not wanted")
    if not 0 <= config.eval_share < 1:
        raise UserError(f"data.eval_share={config.eval_share} must be at least 0 and below 1")
    if not 0 <= config.max_refused <= 1:
        raise UserError(f"data.max_refused={config.max_refused} must be from 0 to 1")
    if length < 2 and form == "prompt":
        raise UserError(
            f"the length leaves {length} tokens to a prompt, which needs 2 at least: a beginning and one besides; "
            "raise --config.data.length, or let fewer new tokens be written"
        )
    if length < 2:
        raise UserError(f"data.length={length} must be at least 2: one token of a prompt and one of an answer")


def _nothing_left(report: Report, paths: Sequence[str], length: int) -> str:
    held = len(report.shared) + report.evaluation
    why = (
        f"{len(report.refused)} refused, {len(report.left)} with nothing to learn from, "
        f"{len(report.too_long)} longer than {length} tokens, {held} held out"
    )
    first = f"; the first refused is {': '.join(report.refused[0])}" if report.refused else ""
    mend = (
        (len(report.refused), "mend the rows"),
        (len(report.too_long), "raise --config.data.length or choose --config.data.too_long=cut_prompt"),
        (report.evaluation * (not report.shared), "lower --config.data.eval_share"),
        (len(report.shared), "give other prompts in --config.data.eval_path"),
        (len(report.left), "give rows that prefer one answer to another"),
    )
    _, advice = max(mend, key=lambda one: one[0])
    return f"no row to train on is left of {report.read} in {', '.join(paths)}: {why}{first}; {advice}"


# From records to items


def _items(
    records: Sequence[sources.Record | sources.Refused], path: str, source: int, config: Data, chat: bool,
    form: Form, index: int, notes: _Notes,
) -> tuple[list[Item], int]:  # fmt: skip
    """The items of one source, numbered from `index`, and the next free number."""
    notes.read += len(records)
    kinds = [row for row, wanted in CONVERSIONS if wanted == form]
    name = format_of(path, records, config.format, kinds)
    kind = formats.FORMATS[name].row
    if kind not in kinds:
        columns = [record.columns for record in records if isinstance(record, sources.Record)]
        raise UserError(impossible(path, formats.lacking(kinds, columns[:FIRST_ROWS]), kind, form))
    found: list[Item] = []
    for record in records:
        try:
            if isinstance(record, sources.Refused):
                raise Refusal(record.reason)
            # A ranking of ties has a prompt to answer all the same.
            rows = formats.adapt(name, record.columns, chat, config.ties or form == "prompt")
            said = columns_of_pairs(record.columns, config, rows)
            examples = [(made, row.tools) for row in rows for made in _made(row, form, config.ties)]
        except (Refusal, Left) as reason:
            noted = notes.refused if isinstance(reason, Refusal) else notes.left
            noted.setdefault(record.where, str(reason))
            index += 1  # numbers do not move when a row is refused
            continue
        labeller = _labeller(record.columns)
        columns = items.beside(record.columns) if form == "prompt" else {}
        for made, tools in examples:
            made = made._replace(probability=said.get("probability", made.probability))
            place = index, source, record.where, tools
            found.append(Item(*made, *place, said.get("margin", 0.0), labeller, columns=columns))
            index += 1
        if not examples:
            notes.left.setdefault(record.where, "no two answers of different rank and text")
    return found, index


def _made(row: Row, form: Form, ties: bool) -> Iterator[Made]:
    yield from CONVERSIONS[type(row), form](row)
    if ties and form == "pair" and isinstance(row, Ranking):
        yield from tied_pairs(row)


def _labeller(columns: Mapping[str, Any]) -> str:
    said = columns.get("labeller")
    return str(said) if isinstance(said, str | int) and not isinstance(said, bool) else ""


def format_of(
    path: str, records: Sequence[sources.Record | sources.Refused], wanted: str, kinds: Sequence[type[Row]] = ()
) -> str:
    """The name of the format that the records of `path` are read in; of several readings the first of `kinds`.

    Raises: UserError if no record can be read, or the format `wanted` doesn't fit them.
    """
    columns = [record.columns for record in records if isinstance(record, sources.Record)]
    if not columns:
        bad = next(record for record in records if isinstance(record, sources.Refused))
        raise UserError(
            f"none of the {len(records)} rows of {path} can be read ({bad.where}: {bad.reason}); give JSON Lines, "
            "an object of columns a line, or a file with the suffix of what it is"
        )
    if wanted == "auto":
        return formats.detect(columns[:FIRST_ROWS], path, kinds)
    formats.check(wanted, columns, path)
    return wanted


# From items to examples


def _encoded(
    found: Sequence[Item],
    encoder: Encoder,
    length: int,
    policy: str,
    notes: _Notes,
) -> list[tuple[Item, Example]]:
    kept = []
    for item, whole in zip(found, _tokens(found, encoder), strict=True):
        bad = next((row for row in whole if isinstance(row, Refusal)), None)
        if bad is not None:
            notes.refused.setdefault(item.where, str(bad))
            continue
        completions = tuple(row for row in whole if isinstance(row, Tokens))
        longest, tokens = max(map(len, completions)), sum(map(len, completions))
        notes.tokens += tokens
        if any(encoder.keeps_as_text(item.prompt, completion) for completion in item.completions or [""]):
            notes.kept_as_text[item.where] = None
        if longest > length and policy == "stop":
            has = f"{longest} tokens and the length is {length}"
            if not item.completions:
                has = f"a prompt of {longest} tokens and the length leaves it {length}"
            raise UserError(
                f"{item.where} has {has}; "
                "raise --config.data.length or choose --config.data.too_long=cut_prompt or refuse"
            )
        fitted = fit(completions, length) if policy == "cut_prompt" or longest <= length else None
        parts = [fitted] if fitted is not None else []
        if not parts and policy == "cut_prompt" and not item.ends and is_text(item.prompt, item.completions):
            parts = [(piece,) for piece in pieces(completions[0], length)]
            notes.split[item.where] = None
        elif not parts:
            notes.lost += tokens
            notes.too_long[item.where] = None
        elif longest > length:
            notes.lost += tokens - sum(map(len, parts[0]))
            notes.cut[item.where] = None
        kept += [(item, _example(item, part, _hash(completions[0].prompt.tobytes()))) for part in parts]
    return kept


def _tokens(found: Sequence[Item], encoder: Encoder) -> Iterator[list[Tokens | Refusal]]:
    """Of each item its completions behind its prompt, or its prompt where there are none."""
    texts = [(item.prompt, text, item.tools, item.ends) for item in found for text in item.completions]
    asked = [item for item in found if not item.completions]
    rows = iter(encoder.encode_many(texts))
    prompts = iter(encoder.encode_prompts([item.prompt for item in asked], [item.tools for item in asked]))
    for item in found:
        yield [next(rows) for _ in item.completions] or [next(prompts)]


def _example(item: Item, completions: tuple[Tokens, ...], prompt: int) -> Example:
    return Example(
        completions, item.labels, prompt, item.index, item.source, item.where, item.ranks, item.probability,
        item.margin, item.step_labels, item.labeller, item.preferred or items.preferred(item.ranks),
        "" if item.completions else item.prompt, item.columns,
    )  # fmt: skip


def _hash(*parts: bytes) -> int:
    """A signed 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "big", signed=True)


def _split(
    kept: Sequence[tuple[Item, Example]], config: Data, seed: int
) -> tuple[list[Example], list[Example], tuple[str, ...]]:
    """(training examples, held-out examples, places of rows left out of training for sharing a prompt)."""
    if config.eval_path:
        evaluation = [(item, e) for item, e in kept if item.source >= len(config.path)]
        prompts = {prompt_text(item) for item, _ in evaluation}
        ours = [(e, prompt_text(item) in prompts) for item, e in kept if item.source < len(config.path)]
        return (
            [e for e, held in ours if not held],
            [e for _, e in evaluation],
            tuple(dict.fromkeys(e.where for e, held in ours if held)),
        )
    drawn = [(e, _hash(str(seed).encode(), prompt_text(item)) % 2**53 / 2**53) for item, e in kept]
    return (
        [e for e, u in drawn if u >= config.eval_share],
        [e for e, u in drawn if u < config.eval_share],
        (),
    )


def _fingerprint(train: Sequence[Example], evaluation: Sequence[Example], encoder: Encoder) -> str:
    digest = hashlib.blake2b(encoder.fingerprint.encode(), digest_size=16)
    for part in (train, evaluation):
        digest.update(b"part%d" % len(part))
        for example in part:
            digest.update(np.asarray([example.index, example.source, *example.labels], np.int64).tobytes())
            numbers = (*example.ranks, example.probability, example.margin)
            digest.update(np.asarray(numbers, np.float64).tobytes())
            for tokens in example.completions:
                digest.update(np.int64(len(tokens)).tobytes() + tokens.ids.tobytes() + tokens.mask.tobytes())
            # What older data sets don't have adds nothing to them: their checkpoints resume.
            if example.step_labels:
                digest.update(b"steps" + np.asarray(example.step_labels, np.float64).tobytes())
                digest.update(example.completions[0].ends.tobytes())
            if example.preferred not in ((), items.preferred(example.ranks)):
                digest.update(b"preferred" + np.asarray(example.preferred, np.float64).tobytes())
            if example.text or example.columns:  # what rewards are given of a prompt alone
                digest.update(b"asked" + items.written({"text": example.text, "columns": example.columns}).encode())
    return digest.hexdigest()


def unpaired(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Each completion as an example of its own, with a number of its own: 2 i and 2 i + 1 from example i."""
    return tuple(
        dataclasses.replace(example, completions=(completion,), labels=(label,), index=2 * example.index + place)
        for example in examples
        for place, (completion, label) in enumerate(zip(example.completions, example.labels, strict=True))
    )


def bootstrap(examples: Sequence[Example], seed: int) -> tuple[Example, ...]:
    """As many examples as there are, drawn with replacement; a pure function of their order and the seed."""
    drawn = np.random.RandomState(seed % 2**32).randint(max(len(examples), 1), size=len(examples))
    return tuple(examples[place] for place in drawn)
