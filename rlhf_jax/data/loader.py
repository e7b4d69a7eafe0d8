"""Batches of fixed shape in a seeded order, each found by its number alone.

The order is planned globally: one shuffled index map per source, reshuffled every epoch, mixed by grain if
there are weights and read ahead on grain's threads. `order(p)` and `batch(i)` are pure functions of
(seed, examples), so a position is one integer, any process count gives the same batches, and a restart reads
nothing twice.
"""

import collections
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex, cast

import grain
import numpy as np

from rlhf_jax.data.cutting import fit
from rlhf_jax.data.dataset import Example
from rlhf_jax.data.items import preferred
from rlhf_jax.data.packing import best_fit
from rlhf_jax.data.tokens import Tokens
from rlhf_jax.errors import UserError

Batch = dict[str, Any]
Row = tuple[int, ...]  # places of the examples of one row of a batch
SMALLEST_BUCKET = 64


def bucket_lengths(length: int, buckets: Sequence[int] = ()) -> tuple[int, ...]:
    """The row lengths batches are padded to, ascending; the last is `length`.

    Without `buckets`, powers of two from 64 up. Buckets above `length` are left out.
    """
    if any(b < 1 for b in buckets):
        raise UserError(f"data.buckets={tuple(buckets)} must be lengths of at least 1 token")
    powers = (SMALLEST_BUCKET << n for n in range(length.bit_length()))
    return (*sorted({b for b in buckets or powers if b < length}), length)


class Loader:
    """An endless stream of batches over shuffled epochs.

    A batch holds, for at most K completions an example (1, 2 for pairs) and T the smallest bucket that holds its
    longest row:
      tokens    [B, K, T] int32
      mask      [B, K, T] bool, trained tokens: none where the examples are prompts alone (K is 1)
      segments  [B, K, T] int32, 1 on tokens, 0 on padding
      positions [B, K, T] int32, from 0 in a row, 0 on padding
      weight    [B] float32, 1, or 0 for padding rows
      index     [B] int32, the example's index, -1 for padding rows
      labels    [B, K] bool, if the examples have labels
      ranks     [B, K] float32, if the examples have ranks; a completion that an example lacks has no token
      probability, margin [B] float32, of pairs: what their columns say, 1 and 0 where none is read
      preferred [B, K, K] float32, if the examples have ranks: the share of labels that put completion i above j; 0
                where an example lacks one of them
      step_ends [B, K, T] bool, if the examples have labelled steps (K is 1): the last token of each step
      step_labels [B, K, T] float32, with them: a step's label at its last token, else 0
    Rows are left-aligned.
    With `mismatched`, also a dict `mismatched` of tokens, mask, segments and positions of the same shapes:
    the prompt of a row with the completions of the next row of the order that has another prompt.

    With `pack`, a row holds up to M examples one behind the other, M what the fullest row holds: segments count
    them from 1, positions begin anew with each, T is the length, and what is [B] above is [B, M], labels and
    ranks [B, M, K], preferred [B, M, K, K]. Which examples share a row is decided once, from the seed and the
    lengths; each epoch shuffles the rows.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seed: int = 0,
        length: int,
        buckets: Sequence[int] = (),
        weights: Sequence[float] = (),
        mismatched: bool = False,
        pack: bool = False,
        shuffle: bool = True,
    ):
        """Args:
          batch_size: B, rows of a global batch.
          length: most tokens of a row.
          weights: share of the rows drawn from each source; empty: every example once an epoch.
          shuffle: False keeps the order of `examples`, over and over.
        Raises: UserError for a batch size below 1, no example, a row over the length, a weighted source
          without rows, or `mismatched` on a single prompt.
        """
        if batch_size < 1:
            raise UserError(f"train.batch_size={batch_size} must be at least 1")
        if not examples:
            raise UserError("there are no rows to load; check --config.data.path and --config.data.eval_share")
        self.examples, self.batch_size, self.packed = tuple(examples), batch_size, pack
        self.length, self.lengths = length, (length,) if pack else bucket_lengths(length, buckets)
        self._mismatched = mismatched
        self._prompts = np.asarray([e.prompt for e in self.examples], np.int64)
        self._starts = np.asarray([e.completions[0].start for e in self.examples])
        self._totals = _totals(self.examples)
        if self._totals.max() > length:
            where = self.examples[int(self._totals.max(axis=1).argmax())].where
            raise UserError(f"{where} has {self._totals.max()} tokens and the length is {length}")
        if mismatched and (self._prompts == self._prompts[0]).all():
            raise UserError(
                "all rows have one prompt, but this loss puts each answer behind another's prompt; "
                "give data with several prompts"
            )
        sources = np.asarray([e.source if weights else 0 for e in self.examples])
        self.rows = self._pack(sources, seed) if pack else tuple((place,) for place in range(len(self.examples)))
        self.most = max(map(len, self.rows))
        self._order = _order([int(sources[row[0]]) for row in self.rows], seed, weights, shuffle)

    def _pack(self, sources: np.ndarray, seed: int) -> tuple[tuple[int, ...], ...]:
        """The examples of each packed row; those of one source stay together, because rows are what is mixed."""
        lengths = self._totals
        if self._mismatched:  # who crosses whom must be known before it is packed, so that it fits as well
            order = np.random.RandomState(seed % 2**32).permutation(len(self.examples))
            self._partners = self._next_with_another_prompt(order)
            lengths = np.concatenate([lengths, self._crossed_lengths(np.arange(len(order)), self._partners)], axis=1)
        rows = []
        for source in np.unique(sources):
            places = np.flatnonzero(sources == source)
            rows += [tuple(places[list(row)].tolist()) for row in best_fit(lengths[places], self.length, seed)]
        return tuple(rows)

    def _next_with_another_prompt(self, order: np.ndarray) -> np.ndarray:
        """For each example the one behind it in a cyclic order whose prompt is another."""
        prompts, count = self._prompts[order], len(order)
        partners = np.empty(count, np.int64)
        ahead = int((prompts != prompts[0]).argmax())  # of the last in the order, round the end
        for place in reversed(range(count)):
            after = (place + 1) % count
            ahead = after if prompts[after] != prompts[place] else ahead
            partners[order[place]] = order[ahead]
        return partners

    def _crossed_lengths(self, own: np.ndarray, partners: np.ndarray) -> np.ndarray:
        """Tokens of the prompts of `own` with the completions of `partners`, cut to the length, int [n, K]."""
        crossed = self._starts[own][:, None] + self._totals[partners] - self._starts[partners][:, None]
        return np.where(self._totals[partners] > 0, np.minimum(crossed, self.length), 0)

    def order(self, p: int) -> int:
        """Which of `rows` global row p >= 0 is: without packing a place in `examples`. Rows are endless."""
        return int(cast(int, self._order[p]))

    def bucket(self, i: int) -> int:
        """T of batch i, without building it."""
        return self._bucket(*self._places(self._positions(i)))

    def buckets(self, start: int, stop: int) -> dict[int, int]:
        """Row length -> number of the batches [start, stop) that have it, ascending."""
        if self.packed:
            return {self.length: stop - start} if stop > start else {}
        counts = collections.Counter(self.bucket(i) for i in range(start, stop))
        return dict(sorted(counts.items()))

    def batch(self, i: int, rows: slice = slice(None)) -> Batch:
        """Global rows [i * B, (i + 1) * B), or the `rows` of them that a process feeds; T is that of all."""
        return self._build(self._positions(i), rows)

    def iterate(
        self, start: int, stop: int, threads: int = 2, rows: slice = slice(None)
    ) -> Iterator[tuple[int, Batch]]:
        """(i, batch i) for i in [start, stop) in order, built ahead on `threads` threads (0: none)."""
        batches = grain.MapDataset.range(start, stop).map(lambda i: (int(i), self.batch(int(i), rows)))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        return iter(batches.to_iter_dataset(options))

    def padding(self) -> float:
        """Share of an epoch's tokens that are padding, if all its rows had the length."""
        return 1 - float(self._totals.sum()) / (len(self.rows) * self._totals.shape[1] * self.length)

    def describe(self) -> str:
        """What packing made of the examples, in a line."""
        return (
            f"{len(self.examples)} examples in {len(self.rows)} rows of {self.length} tokens, at most {self.most} a "
            f"row; {self.padding():.1%} of the tokens are padding, none was lost"
        )

    def _positions(self, i: int) -> range:
        return range(i * self.batch_size, (i + 1) * self.batch_size)

    def _places(self, positions: range) -> tuple[list[Row], list[Row]]:
        """Examples at the positions and, if asked for, the examples whose completions mismatch each."""
        own = [self.rows[self.order(p)] for p in positions]
        if not self._mismatched:
            return own, []
        if self.packed:
            return own, [tuple(int(self._partners[place]) for place in row) for row in own]
        ahead = [*own[1:], self.rows[self.order(positions.stop)]] if own else []
        pairs = zip(positions, own, ahead, strict=True)
        return own, [b if self._differ(a[0], b[0]) else self._partner(p, a[0]) for p, a, b in pairs]

    def _differ(self, a: int, b: int) -> bool:
        return bool(self._prompts[a] != self._prompts[b])

    def _partner(self, p: int, place: int) -> Row:
        """The next example of the order that has another prompt; there is one in every epoch."""
        while True:
            p += 1
            other = self.rows[self.order(p)]
            if self._differ(place, other[0]):
                return other

    def _bucket(self, own: Sequence[Row], partners: Sequence[Row]) -> int:
        if self.packed:
            return self.length
        places = [row[0] for row in own]
        longest = self._totals[places].max()
        if partners:
            crossed = self._crossed_lengths(np.asarray(places), np.asarray([row[0] for row in partners]))
            longest = max(longest, crossed.max())
        return next(b for b in self.lengths if b >= longest)

    def _build(self, positions: range, rows: slice, size: int | None = None) -> Batch:
        """Rows of the positions, filled up to `size` with padding rows."""
        own, partners = self._places(positions)
        shape = self.most, self._totals.shape[1], self._bucket(own, partners)
        empty: list[Row] = [()] * ((size or len(own)) - len(own))
        examples = [[self.examples[place] for place in row] for row in [*own, *empty][rows]]
        batch = _stack([[e.completions for e in row] for row in examples], *shape)
        batch |= self._columns(examples, *shape[:2])
        if any(example.step_labels for example in self.examples):
            batch |= _steps(examples, *shape[1:])
        if self._mismatched:
            pairs = [*zip(own, partners, strict=True), *((row, row) for row in empty)][rows]
            crossed = [[self._crossed(*both) for both in zip(*pair, strict=True)] for pair in pairs]
            batch["mismatched"] = _stack(crossed, *shape)
        return batch

    def _columns(self, rows: Sequence[Sequence[Example]], most: int, k: int) -> Batch:
        """What is said of each example of each row."""
        weight, probability, margin = (np.zeros((len(rows), most), np.float32) for _ in range(3))
        index = np.full((len(rows), most), -1, np.int32)
        labels, ranks = (np.zeros((len(rows), most, k), kind) for kind in (np.bool_, np.float32))
        shares = np.zeros((len(rows), most, k, k), np.float32)
        for b, row in enumerate(rows):
            for m, example in enumerate(row):
                weight[b, m], index[b, m] = 1, example.index
                probability[b, m], margin[b, m] = example.probability, example.margin
                labels[b, m, : len(example.labels)] = example.labels
                count = len(example.ranks)
                ranks[b, m, :count] = example.ranks
                if count:
                    shares[b, m, :count, :count] = example.preferred or preferred(example.ranks)
        columns = {"weight": weight, "index": index}
        if self.examples[0].labels:
            columns["labels"] = labels
        if len(self.examples[0].labels) == 2:
            columns |= {"probability": probability, "margin": margin}
        if self.examples[0].ranks:
            columns |= {"ranks": ranks, "preferred": shares}
        return columns if self.packed else {name: column[:, 0] for name, column in columns.items()}

    def _crossed(self, place: int, partner: int) -> tuple[Tokens, ...]:
        """The prompt of one example with the completions of another, cut to the length."""
        prompt = self.examples[place].completions[0]
        ids, start = prompt.prompt, prompt.start
        fitted = fit(
            [
                Tokens(
                    np.concatenate([ids, c.ids[c.start :]]),
                    np.concatenate([np.zeros(start, np.bool_), c.mask[c.start :]]),
                    prompt.head,
                    c.ends + (start - c.start),
                )
                for c in self.examples[partner].completions
            ],
            self.length,
        )
        assert fitted is not None  # the partner fits with a prompt token of its own
        return fitted


def once(
    examples: Sequence[Example],
    *,
    batch_size: int,
    length: int,
    buckets: Sequence[int] = (),
    mismatched: bool = False,
    pack: bool = False,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Every example once, in order if not packed, for evaluation; padding rows (weight 0) fill the last batch."""
    if not examples:
        return
    loader = Loader(
        examples,
        batch_size=batch_size,
        length=length,
        buckets=buckets,
        mismatched=mismatched,
        pack=pack,
        shuffle=False,
    )
    for start in range(0, len(loader.rows), batch_size):
        yield loader._build(range(start, min(start + batch_size, len(loader.rows))), rows, batch_size)


def _totals(examples: Sequence[Example]) -> np.ndarray:
    """Tokens of each completion with its prompt, int [examples, K], 0 where an example has fewer than K."""
    totals = np.zeros((len(examples), max(len(e.completions) for e in examples)), np.int64)
    for place, example in enumerate(examples):
        totals[place, : len(example.completions)] = [len(c) for c in example.completions]
    return totals


def _order(sources: Sequence[int], seed: int, weights: Sequence[float], shuffle: bool) -> grain.MapDataset[int]:
    """Endless map from a global position to the number of a row, given each row's source."""
    groups: dict[int, list[int]] = {}
    for place, source in enumerate(sources):
        groups.setdefault(source, []).append(place)
    missing = [number for number in range(len(weights)) if number not in groups]
    if missing:
        raise UserError(f"path number {missing[0] + 1} of --config.data.path has a weight but no usable row")
    streams = [
        grain.MapDataset.source(cast(Any, _Epochs(np.asarray(groups[source]), (seed, source), shuffle)))
        for source in sorted(groups)
    ]
    return grain.MapDataset.mix(streams, [float(w) for w in weights]) if weights else streams[0]


class _Epochs:
    """Places, epoch after epoch, each epoch in an order of its own; a random access source for grain.

    grain's own `shuffle` walks cycles of at least 2**16 steps, which takes milliseconds an access on the few
    hundred rows of a first run; a permutation an epoch takes a microsecond. `RandomState` is the generator
    whose streams numpy has frozen, so the order also survives an upgrade.
    """

    def __init__(self, places: np.ndarray, seed: tuple[int, int], shuffle: bool):
        self._places = places
        self._seed = tuple(number % 2**32 for number in seed)
        self._shuffle = shuffle
        self._epoch = functools.lru_cache(maxsize=8)(self._permuted)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, p: SupportsIndex) -> int:
        epoch, within = divmod(int(p), len(self._places))
        return int(self._epoch(epoch)[within])

    def _permuted(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return self._places
        return np.random.RandomState((*self._seed, epoch % 2**32)).permutation(self._places)


def _stack(rows: Sequence[Sequence[tuple[Tokens, ...]]], most: int, k: int, t: int) -> Batch:
    """Left-aligned arrays [rows, K, T]: the completions of at most `most` examples a row, lane by lane."""
    shape = (len(rows), k, t)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, np.bool_)
    for b, examples in enumerate(rows):
        assert len(examples) <= most
        ends = [0] * k
        for number, completions in enumerate(examples, start=1):
            for lane, completion in enumerate(completions):
                here = slice(ends[lane], ends[lane] + len(completion))
                tokens[b, lane, here] = completion.ids
                mask[b, lane, here] = completion.mask
                segments[b, lane, here] = number
                positions[b, lane, here] = np.arange(len(completion))
                ends[lane] = here.stop
    return {"tokens": tokens, "mask": mask, "segments": segments, "positions": positions}


def _steps(rows: Sequence[Sequence[Example]], k: int, t: int) -> Batch:
    """Where in the rows of `_stack` the steps of each example end, and what is said of them there."""
    ends, labels = (np.zeros((len(rows), k, t), kind) for kind in (np.bool_, np.float32))
    for b, examples in enumerate(rows):
        before = 0
        for example in examples:
            places = before + example.completions[0].ends
            ends[b, 0, places], labels[b, 0, places] = True, example.step_labels
            before += len(example.completions[0])
    return {"step_ends": ends, "step_labels": labels}
