"""Packed rows hold every example once and whole, and are a pure function of the seed and the lengths."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.loader import Loader, once
from rlhf_jax.data.packing import best_fit
from rlhf_jax.errors import UserError
from tests.test_data_loader import LENGTH, examples, same

FEW = settings(deadline=None, max_examples=30)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), max_size=60), st.integers(40, 90), st.integers(0, 9))
def test_every_example_stands_in_one_row_and_no_row_is_too_full(lengths, capacity, seed):
    sizes = np.asarray(lengths, int).reshape(-1, 2)
    rows = best_fit(sizes, capacity, seed)
    assert sorted(place for row in rows for place in row) == list(range(len(sizes)))
    assert all((sizes[list(row)].sum(axis=0) <= capacity).all() for row in rows)
    assert rows == best_fit(sizes, capacity, seed)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.integers(0, 9))
def test_at_most_one_row_is_half_empty(lengths, seed):
    """What fits into a row that stands is put there, so two half-empty rows would have been one."""
    sizes = np.asarray(lengths)
    full = [sizes[list(row)].sum() for row in best_fit(sizes[:, None], 100, seed)]
    assert sum(total <= 50 for total in full) <= 1


def test_lengths_alone_decide_how_many_rows_there_are_and_the_seed_who_sits_together():
    sizes = np.random.default_rng(0).integers(1, 20, (200, 1))
    first, second = (best_fit(sizes, 50, seed) for seed in (0, 1))
    assert first != second
    described = lambda rows: collections.Counter(tuple(sorted(sizes[list(row), 0])) for row in rows)
    assert described(first) == described(second)
    assert sizes.sum() / (50 * len(first)) > 0.98


def test_a_large_set_is_packed_in_parts(monkeypatch):
    monkeypatch.setattr("rlhf_jax.data.packing.WINDOW", 16)
    rows = best_fit(np.random.default_rng(0).integers(1, 20, (100, 1)), 50)
    assert sorted(place for row in rows for place in row) == list(range(100))


def test_an_example_longer_than_a_row_is_a_fault():
    with pytest.raises(AssertionError, match="longer than a row"):
        best_fit(np.asarray([[9]]), 8)


def unpacked(batch, mismatched: bool):
    """The examples of a packed batch as (index, its columns), each completion cut out by its segment number."""
    for b in range(len(batch["weight"])):
        for m in range(batch["weight"].shape[1]):
            parts = []
            for columns in (batch, batch["mismatched"]) if mismatched else (batch,):
                here = columns["segments"][b] == m + 1
                for lane in range(len(here)):
                    names = ("tokens", "mask", "positions")
                    parts.append({name: columns[name][b, lane][here[lane]] for name in names})
            if batch["weight"][b, m]:
                yield int(batch["index"][b, m]), batch["labels"][b, m] if "labels" in batch else None, parts
            else:
                assert batch["index"][b, m] == -1 and not any(len(part["tokens"]) for part in parts)


@FEW
@given(st.integers(1, 30), st.sampled_from([1, 2]), st.integers(0, 5))
def test_no_token_of_an_epoch_is_lost(n, k, seed):
    made = {example.index: example for example in examples(n, k, seed)}
    rows = Loader(tuple(made.values()), batch_size=1, seed=seed, length=LENGTH, pack=True)
    seen = []
    for i in range(len(rows.rows)):
        batch = rows.batch(i)
        assert batch["tokens"].shape == (1, k, LENGTH) and batch["weight"].shape == (1, rows.most)
        for index, labels, parts in unpacked(batch, False):
            seen.append(index)
            assert labels is not None and tuple(labels) == made[index].labels
            for part, completion in zip(parts, made[index].completions, strict=True):
                np.testing.assert_array_equal(part["tokens"], completion.ids)
                np.testing.assert_array_equal(part["mask"], completion.mask)
                np.testing.assert_array_equal(part["positions"], np.arange(len(completion)))
    assert sorted(seen) == sorted(made)
    total = sum(len(c) for e in made.values() for c in e.completions)
    np.testing.assert_allclose(rows.padding(), 1 - total / (len(rows.rows) * k * LENGTH))


def test_examples_may_have_unlike_numbers_of_completions():
    """Ranked groups: a lane without a completion stays empty."""
    made = [e for k in (2, 3, 4) for e in examples(5, k, seed=k)]
    ranked = lambda e, i: dataclasses.replace(e, labels=(), ranks=tuple(range(len(e.completions))), index=i)
    made = [ranked(example, place) for place, example in enumerate(made)]
    for batch in once(made, batch_size=4, length=LENGTH, pack=True):
        assert "labels" not in batch and batch["ranks"].shape == (4, batch["weight"].shape[1], 4)
        for b, m in zip(*np.nonzero(batch["weight"]), strict=True):
            example = made[batch["index"][b, m]]
            sizes = [int((batch["segments"][b, lane] == m + 1).sum()) for lane in range(4)]
            assert sizes == [len(c) for c in example.completions] + [0] * (4 - len(example.completions))
            assert batch["ranks"][b, m, : len(example.ranks)].tolist() == list(example.ranks)


@FEW
@given(st.integers(2, 20), st.sampled_from([1, 2]), st.integers(2, 5))
def test_a_mismatched_segment_is_a_prompt_with_the_answers_to_another(n, k, prompts):
    length = 80
    made = {example.index: example for example in examples(n, k, prompts=prompts, longest=35)}
    rows = Loader(tuple(made.values()), batch_size=2, length=length, pack=True, mismatched=True)
    for index, _, parts in unpacked(rows.batch(0), True):
        crossed = parts[k:]
        for lane, part in enumerate(crossed):
            answer, kept = part["tokens"][part["mask"]], part["tokens"][~part["mask"]]
            homes = [
                e for e in made.values()
                if np.array_equal(e.completions[lane].ids[e.completions[lane].mask], answer)
            ]  # fmt: skip
            assert homes and all(home.prompt != made[index].prompt for home in homes)
            prompt = made[index].completions[0].prompt
            np.testing.assert_array_equal(kept[1:], prompt[len(prompt) - len(kept) + 1 :])


@pytest.mark.parametrize("threads", [0, 2])
def test_seeking_slicing_and_iterating_give_the_same_rows(threads):
    make = lambda: Loader(examples(40, 2), batch_size=4, length=LENGTH, pack=True, mismatched=True)
    for i, batch in make().iterate(2, 5, threads):
        same(batch, make().batch(i))
        half = make().batch(i, slice(2, 4))
        np.testing.assert_array_equal(half["tokens"], batch["tokens"][2:])
    assert make().buckets(0, 9) == {LENGTH: 9} and make().buckets(3, 3) == {}


def test_each_epoch_shuffles_the_rows_and_sources_are_mixed_by_rows():
    rows = Loader(examples(60, sources=2), batch_size=4, length=LENGTH, pack=True, weights=(3.0, 1.0))
    source = lambda row: {rows.examples[place].source for place in row}
    assert all(len(source(row)) == 1 for row in rows.rows)
    drawn = [source(rows.rows[rows.order(p)]) for p in range(400)]
    assert drawn.count({0}) == 300
    with pytest.raises(UserError, match="has a weight but no usable row"):
        Loader(examples(4), batch_size=1, length=LENGTH, pack=True, weights=(1.0, 1.0))
