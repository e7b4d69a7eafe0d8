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

from rlhf_jax.data.dataset import Example
from rlhf_jax.data.tokens import Tokens, fit
from rlhf_jax.errors import UserError

Batch = dict[str, Any]
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

    A batch holds, for K completions an example (1, or 2 for pairs) and T the smallest bucket that holds its
    longest row:
      tokens    [B, K, T] int32
      mask      [B, K, T] bool, trained tokens
      segments  [B, K, T] int32, 1 on tokens, 0 on padding
      positions [B, K, T] int32, from 0 in a row, 0 on padding
      weight    [B] float32, 1, or 0 for padding rows
      index     [B] int32, the example's index, -1 for padding rows
      labels    [B, K] bool, if the examples have labels
    Rows are left-aligned.
    With `mismatched`, also a dict `mismatched` of tokens, mask, segments and positions of the same shapes:
    the prompt of a row with the completions of the next row of the order that has another prompt.
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
        pad_id: int = 0,
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
        self.examples, self.batch_size, self.pad_id = tuple(examples), batch_size, pad_id
        self.length, self.lengths = length, bucket_lengths(length, buckets)
        self._mismatched = mismatched
        self._prompts = np.asarray([e.prompt for e in self.examples], np.int64)
        self._starts = np.asarray([e.completions[0].start for e in self.examples])
        self._totals = np.asarray([[len(c) for c in e.completions] for e in self.examples])  # [examples, K]
        if self._totals.max() > length:
            where = self.examples[int(self._totals.max(axis=1).argmax())].where
            raise UserError(f"{where} has {self._totals.max()} tokens and the length is {length}")
        if mismatched and (self._prompts == self._prompts[0]).all():
            raise UserError(
                "all rows have one prompt, but this loss puts each answer behind another's prompt; "
                "give data with several prompts"
            )
        self._order = _order(self.examples, seed, weights, shuffle)

    def order(self, p: int) -> int:
        """The place in `examples` of global row p >= 0; rows are endless."""
        return int(cast(int, self._order[p]))

    def bucket(self, i: int) -> int:
        """T of batch i, without building it."""
        return self._bucket(*self._places(self._positions(i)))

    def buckets(self, start: int, stop: int) -> dict[int, int]:
        """Row length -> number of the batches [start, stop) that have it, ascending."""
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

    def _positions(self, i: int) -> range:
        return range(i * self.batch_size, (i + 1) * self.batch_size)

    def _places(self, positions: range) -> tuple[list[int], list[int]]:
        """Examples at the positions and, if asked for, the example whose completions mismatch each."""
        own = [self.order(p) for p in positions]
        if not self._mismatched:
            return own, []
        ahead = [*own[1:], self.order(positions.stop)] if own else []
        pairs = zip(positions, own, ahead, strict=True)
        return own, [b if self._differ(a, b) else self._partner(p, a) for p, a, b in pairs]

    def _differ(self, a: int, b: int) -> bool:
        return bool(self._prompts[a] != self._prompts[b])

    def _partner(self, p: int, place: int) -> int:
        """The next example of the order that has another prompt; there is one in every epoch."""
        while True:
            p += 1
            other = self.order(p)
            if self._differ(place, other):
                return other

    def _bucket(self, own: Sequence[int], partners: Sequence[int]) -> int:
        longest = self._totals[own].max()
        if partners:
            crossed = self._starts[own] + (self._totals[partners].max(axis=1) - self._starts[partners])
            longest = max(longest, min(crossed.max(), self.length))
        return next(b for b in self.lengths if b >= longest)

    def _build(self, positions: range, rows: slice, size: int | None = None) -> Batch:
        """Rows of the positions, filled up to `size` with padding rows."""
        own, partners = self._places(positions)
        t = self._bucket(own, partners)
        empty = [None] * ((size or len(own)) - len(own))
        examples = [*(self.examples[e] for e in own), *empty][rows]
        k = self._totals.shape[1]
        batch = _stack([e and e.completions for e in examples], k, t, self.pad_id)
        batch["weight"] = np.asarray([e is not None for e in examples], np.float32)
        batch["index"] = np.asarray([-1 if e is None else e.index for e in examples], np.int32)
        if self.examples[0].labels:
            labels = [(False,) * k if e is None else e.labels for e in examples]
            batch["labels"] = np.asarray(labels, np.bool_).reshape(len(examples), k)
        if self._mismatched:
            crossed = [*zip(own, partners, strict=True), *empty][rows]
            batch["mismatched"] = _stack([c and self._crossed(*c) for c in crossed], k, t, self.pad_id)
        return batch

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
    pad_id: int = 0,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Every example once in order, for evaluation; padding rows (weight 0) fill the last batch."""
    if not examples:
        return
    loader = Loader(
        examples,
        batch_size=batch_size,
        length=length,
        buckets=buckets,
        mismatched=mismatched,
        pad_id=pad_id,
        shuffle=False,
    )
    for start in range(0, len(examples), batch_size):
        yield loader._build(range(start, min(start + batch_size, len(examples))), rows, batch_size)


def _order(examples: Sequence[Example], seed: int, weights: Sequence[float], shuffle: bool) -> grain.MapDataset[int]:
    """Endless map from a global position to a place in `examples`."""
    groups: dict[int, list[int]] = {}
    for place, example in enumerate(examples):
        groups.setdefault(example.source if weights else 0, []).append(place)
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


def _stack(rows: Sequence[tuple[Tokens, ...] | None], k: int, t: int, pad_id: int) -> Batch:
    """Left-aligned arrays [rows, K, T]; None is a padding row."""
    shape = (len(rows), k, t)
    tokens = np.full(shape, pad_id, np.int32)
    mask = np.zeros(shape, np.bool_)
    segments = np.zeros(shape, np.int32)
    for b, completions in enumerate(rows):
        for j, completion in enumerate(completions or ()):
            n = len(completion)
            tokens[b, j, :n] = completion.ids
            mask[b, j, :n] = completion.mask
            segments[b, j, :n] = 1
    positions = np.arange(t, dtype=np.int32) * segments
    return {"tokens": tokens, "mask": mask, "segments": segments, "positions": positions}
