"""What a data file is taken for: its format, its rows, their lengths, and the first of them as training sees them."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from rlhf_jax.data import sources
from rlhf_jax.data.conversions import CONVERSIONS, joined
from rlhf_jax.data.cutting import fit
from rlhf_jax.data.dataset import format_of
from rlhf_jax.data.formats import FORMATS, adapt
from rlhf_jax.data.items import is_text
from rlhf_jax.data.rows import (
    Demonstration,
    Labelled,
    Left,
    Message,
    Preference,
    Prompt,
    Ranking,
    Refusal,
    Row,
    Stepwise,
    Text,
)
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.errors import UserError

Told = tuple[tuple[str, str], ...]  # where, and why
Role = Literal["prompt", "trained"]


class Piece(NamedTuple):
    """Text that is trained or not; `special` is one that stands for a special token."""

    role: Role
    text: str
    special: bool = False


class Sample(NamedTuple):
    """One row to show: where it stands, and each of its completions under a name, with the prompt before it.

    Of labelled steps each has a name, and the prompt stands before the first.
    """

    where: str
    parts: tuple[tuple[str, tuple[Piece, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Reader:
    """A tokenizer with the encoder that training would make of it, and the most tokens a row may have."""

    encoder: Encoder
    tokenizer: Any  # of transformers
    length: int | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found out about one source.

    Attributes:
      format, others: the format, and other readings of the same columns that may be asked for.
      kind: what its rows are.
      read, rows: records, and the rows that can be used of those that they gave.
      refused, left: records that can't be used, and those with nothing to learn from.
      facts: what else there is to say of the rows of this kind, name by name.
      unit: what lengths count.
      lengths: of every row the longest completion with its prompt.
      cut, in_pieces, too_long: rows over the length that would lose the beginning of their prompt, texts that would
        be cut into pieces, and rows that would be left out.
      note: why the tokenizer was not used; empty if it was, or if there is none.
      samples: the first rows, one a record.
    """

    path: str
    format: str
    others: tuple[str, ...]
    kind: type[Row]
    read: int
    rows: int
    refused: Told
    left: Told
    facts: tuple[tuple[str, str], ...]
    unit: Literal["tokens", "words"]
    lengths: tuple[int, ...]
    cut: int
    in_pieces: int
    too_long: int
    note: str
    samples: tuple[Sample, ...]

    @property
    def typical(self) -> tuple[int, int, int]:
        """Median, 95th percentile and largest of the lengths; 0 where there are none."""
        if not self.lengths:
            return 0, 0, 0
        middle, high = np.percentile(self.lengths, [50, 95], method="higher")
        return int(middle), int(high), max(self.lengths)


def inspect(
    path: str, wanted: str = "auto", reader: Reader | None = None, samples: int = 3, split: str = "train"
) -> Found:
    """Reads a source as training would, without a loss in mind.

    Args:
      path: a file, a folder or a Hub name, as `sources.read` takes it.
      wanted: a format, or auto.
      reader: the tokenizer. Without one, or if it can't write rows of this kind, lengths count words.
      samples: how many rows to show.
    Raises: UserError as the sources and formats do.
    """
    records = list(sources.read(path, split, "--path"))
    name = format_of(path, records, wanted)
    rows, refused, left = _adapted(records, name, reader is None or reader.encoder.chat)
    encoded, note = _encoded([row for _, row in rows], reader)
    used, lengths, cut, in_pieces, too_long, shown = [], [], 0, 0, 0, []
    for (where, row), tokens in zip(rows, encoded, strict=True):
        if isinstance(tokens, Refusal):
            refused.setdefault(where, _flags(tokens))
            continue
        used.append(row)
        if tokens is None or reader is None:
            lengths.append(max(_words(row.prompt) + _words(c) for _, c in _completions(row)))
        else:
            lengths.append(max(map(len, tokens)))
            if reader.length is not None and lengths[-1] > reader.length:
                fits = isinstance(row, Prompt) or fit(tokens, reader.length) is not None
                text = not isinstance(row, Stepwise) and is_text(row.prompt, [c for _, c in _completions(row)])
                cut, in_pieces = cut + fits, in_pieces + (not fits and text)
                too_long += not fits and not text
        if len(shown) < samples and (not shown or shown[-1].where != where):
            shown.append(_sample(where, row, tokens, reader))
    kind = FORMATS[name].row
    facts = [*FACTS[kind](used), *(() if reader is None or note else _of_special_tokens(used, reader.encoder))]
    others = [o for o, form in FORMATS.items() if form.columns == FORMATS[name].columns and o != name]
    return Found(
        path, name, tuple(others), kind, len(records), len(used), tuple(refused.items()), tuple(left.items()),
        tuple(facts), "tokens" if reader and not note else "words",
        tuple(lengths), cut, in_pieces, too_long, note, tuple(shown),
    )  # fmt: skip


def _adapted(
    records: Sequence[sources.Record | sources.Refused], name: str, chat: bool
) -> tuple[list[tuple[str, Row]], dict[str, str], dict[str, str]]:
    """(rows with their places, places refused, places left), each place with the reason."""
    rows: list[tuple[str, Row]] = []
    refused: dict[str, str] = {}
    left: dict[str, str] = {}
    for record in records:
        if isinstance(record, sources.Refused):
            refused[record.where] = record.reason
            continue
        try:
            rows += [(record.where, row) for row in adapt(name, record.columns, chat)]
        except Refusal as reason:
            refused[record.where] = str(reason)
        except Left as reason:
            left[record.where] = str(reason)
    return rows, refused, left


# Rows as sequences


def _completions(row: Row) -> list[tuple[str, Text]]:
    """What would stand behind the prompt, each under a name; of a bare prompt the empty text."""
    match row:
        case Demonstration():
            return [("completion", row.completion)]
        case Preference():
            return [("chosen", row.chosen), ("rejected", row.rejected)]
        case Labelled():
            return [(f"label {str(row.label).lower()}", row.completion)]
        case Ranking():
            order = sorted(zip(row.ranks, row.completions, strict=True), key=lambda pair: pair[0])
            return [(f"rank {rank:g}", completion) for rank, completion in order]
        case Stepwise():
            return [("steps", joined(row.completions)[0])]
        case Prompt():
            return [("prompt", "")]


def _words(text: Text) -> int:
    return len(text.split()) if isinstance(text, str) else sum(len(f"{m.content} {m.more}".split()) for m in text)


def _encoded(rows: Sequence[Row], reader: Reader | None) -> tuple[Sequence[tuple[Tokens, ...] | Refusal | None], str]:
    """The completions of each row as tokens, or why there are none; and why the tokenizer can't be used at all."""
    if reader is None:
        return [None] * len(rows), ""
    try:
        if rows and isinstance(rows[0], Prompt):
            prompts = reader.encoder.prompts([row.prompt for row in rows], [row.tools for row in rows])
            none = lambda ids: Tokens(ids, np.zeros(len(ids), np.bool_))
            return [p if isinstance(p, Refusal) else (none(p),) for p in prompts], ""
        ends = lambda row: joined(row.completions)[1] if isinstance(row, Stepwise) else ()
        items = [(row.prompt, text, row.tools, ends(row)) for row in rows for _, text in _completions(row)]
        made = iter(reader.encoder.encode_many(items))
    except UserError as error:
        return [None] * len(rows), _flags(error)
    return [_together([next(made) for _ in _completions(row)]) for row in rows], ""


def _flags(reason: Exception) -> str:
    """What was said of the flags of training, of those of the program that shows files."""
    return str(reason).replace("--config.data.", "--")


def _together(made: Sequence[Tokens | Refusal]) -> tuple[Tokens, ...] | Refusal:
    bad = next((one for one in made if isinstance(one, Refusal)), None)
    return bad or tuple(one for one in made if isinstance(one, Tokens))


# Rows to show


def _sample(where: str, row: Row, tokens: tuple[Tokens, ...] | None, reader: Reader | None) -> Sample:
    if isinstance(row, Stepwise):
        return Sample(where, tuple(_steps(row, tokens, reader)))
    completions = _completions(row)
    if tokens is None or reader is None:
        return Sample(where, tuple((name, tuple(_plain(row, c))) for name, c in completions))
    pieces = (tuple(_pieces(one, reader.tokenizer)) for one in tokens)
    return Sample(where, tuple((name, some) for (name, _), some in zip(completions, pieces, strict=True)))


STEPS = {1.0: "right", 0.0: "wrong", 0.5: "neutral"}


def _steps(
    row: Stepwise, tokens: tuple[Tokens, ...] | None, reader: Reader | None
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Each step under its number and label, the first behind the prompt and the last with what follows it."""
    if tokens is None or reader is None:
        texts = [joined([step])[0] for step in row.completions]
        whole = [tuple(_plain(row, text)) for text in texts]
        steps = [whole[0], *(pieces[-1:] for pieces in whole[1:])]
    else:
        (answer,) = tokens
        steps = [tuple(part) for part in _parted(answer, reader.tokenizer)]
    for number, (label, pieces) in enumerate(zip(row.labels, steps, strict=True), start=1):
        yield f"step {number}, {STEPS[label]}", pieces


def _parted(tokens: Tokens, tokenizer: Any) -> Iterator[list[Piece]]:
    """The pieces of tokens, cut behind the end of each step but the last."""
    ends = [0, *(tokens.ends[:-1] + 1).tolist(), len(tokens)]
    for start, stop in itertools.pairwise(ends):
        yield list(_pieces(tokens, tokenizer, start, stop))


def _plain(row: Row, completion: Text) -> Iterator[Piece]:
    """A row without a tokenizer: messages under their roles, and trained are the assistant's of the completion."""
    if row.tools:
        yield from (Piece("prompt", "<tools> ", True), Piece("prompt", f"{row.tools} "))
    for text, is_answer in ((row.prompt, False), (completion, not isinstance(row, Prompt))):
        if isinstance(text, str):
            if text:
                yield Piece("trained" if is_answer else "prompt", text)
            continue
        for turn in text:
            yield Piece("prompt", f"<{turn.role}> ", True)
            trained = is_answer and turn.role == "assistant"
            said = " ".join(filter(None, (turn.content, _more(turn))))
            yield Piece("trained" if trained else "prompt", f"{said} ")


def _more(turn: Message) -> str:
    return ", ".join(
        f"{name}: {json.dumps(v, ensure_ascii=False)}" for name, v in json.loads(turn.more or "{}").items()
    )


def _pieces(tokens: Tokens, tokenizer: Any, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
    """The text of tokens from `start` to `stop`, cut where training begins or ends and around special tokens.

    The text of a run is what it adds to the text before it: some tokenizers drop the space a text begins with.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = [(bool(m), int(i) in special) for i, m in zip(tokens.ids, tokens.mask, strict=True)][start:stop]
    decode: Callable[[int], str] = lambda end: tokenizer.decode(
        tokens.ids[:end].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    end, before = start, decode(start)
    for (trained, is_special), run in itertools.groupby(marks):
        end += len(list(run))
        text = decode(end)
        yield Piece("trained" if trained else "prompt", text[len(before) :], is_special)
        before = text


# Facts of each kind of row


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.0%})" if whole else "")


def _of_demonstrations(rows: Sequence[Demonstration]) -> Iterator[tuple[str, str]]:
    chats = [row.prompt + row.completion for row in rows if not isinstance(row.prompt, str)]  # pyright: ignore[reportOperatorIssue]
    several = sum(sum(turn.role == "assistant" for turn in chat) > 1 for chat in chats)
    if several:
        yield "with several assistant turns", _share(several, len(rows))
    yield from _of_tools(rows)


def _of_tools(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    if offered := sum(row.tools != "" for row in rows):
        yield "with tools on offer", _share(offered, len(rows))


def _of_preferences(rows: Sequence[Preference]) -> Iterator[tuple[str, str]]:
    longer = sum(_words(row.chosen) > _words(row.rejected) for row in rows)
    yield "chosen has more words", _share(longer, len(rows))
    yield from _of_tools(rows)


def _of_labelled(rows: Sequence[Labelled]) -> Iterator[tuple[str, str]]:
    yield "label is true", _share(sum(row.label for row in rows), len(rows))
    yield from _of_tools(rows)


def _of_rankings(rows: Sequence[Ranking]) -> Iterator[tuple[str, str]]:
    couples = [pair for row in rows for pair in itertools.combinations(row.ranks, 2)]
    yield "answers a row", f"{sum(len(row.ranks) for row in rows) / max(len(rows), 1):.1f}"
    yield "pairs for a loss", str(sum(len(list(CONVERSIONS[Ranking, "pair"](row))) for row in rows))
    yield "ties, which give no pair", _share(sum(a == b for a, b in couples), len(couples))


def _of_steps(rows: Sequence[Stepwise]) -> Iterator[tuple[str, str]]:
    labels = [label for row in rows for label in row.labels]
    yield "steps a row", f"{len(labels) / max(len(rows), 1):.1f}"
    yield "right steps", _share(labels.count(1.0), len(labels))
    if 0.5 in labels:
        yield "neutral steps", _share(labels.count(0.5), len(labels))
    yield "rows without a wrong step", _share(sum(0.0 not in row.labels for row in rows), len(rows))


def _of_special_tokens(rows: Sequence[Row], encoder: Encoder) -> Iterator[tuple[str, str]]:
    answers = lambda row: [completion for _, completion in _completions(row)] or [""]
    keeps = lambda row: any(encoder.keeps_as_text(row.prompt, answer) for answer in answers(row))
    if kept := sum(map(keeps, rows)):
        yield (
            "special tokens",
            f"stay text in {_share(kept, len(rows))}; if these rows were rendered ahead, give --special=tokens",
        )


FACTS: dict[type[Row], Callable[..., Iterator[tuple[str, str]]]] = {
    Demonstration: _of_demonstrations,
    Preference: _of_preferences,
    Labelled: _of_labelled,
    Ranking: _of_rankings,
    Stepwise: _of_steps,
    Prompt: _of_tools,
}
