"""Batches are pure functions of their number: any process, any restart, the same rows."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.dataset import Example
from rlhf_jax.data.loader import Loader, bucket_lengths, once
from rlhf_jax.data.tokens import Tokens
from rlhf_jax.errors import UserError

LENGTH = 128


def tokens(rng, prompt: np.ndarray, answer: int) -> Tokens:
    ids = np.concatenate([[1], prompt, rng.integers(3, 99, answer), [2]]).astype(np.int32)
    return Tokens(ids, np.arange(len(ids)) > len(prompt), 1)


def examples(n: int, k: int = 1, seed: int = 0, longest: int = 50, sources: int = 1, prompts: int = 10**9):
    rng = np.random.default_rng(seed)
    known = [np.append(rng.integers(3, 99, rng.integers(0, longest)), i) for i in range(min(n, prompts))]
    made = []
    for i in range(n):
        prompt = known[i % len(known)]
        rows = tuple(tokens(rng, prompt, int(rng.integers(1, longest))) for _ in range(k))
        labels = (True, False)[:k]
        made.append(Example(rows, labels, i % len(known), 100 + i, i % sources, f"rows:{i}"))
    return tuple(made)


def loader(rows, **settings) -> Loader:
    return Loader(rows, **{"batch_size": 4, "seed": 3, "length": LENGTH, **settings})


def same(a, b) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            same(value, b[name])
        else:
            np.testing.assert_array_equal(value, b[name])
            assert value.dtype == b[name].dtype


@given(st.integers(1, 40), st.integers(0, 2**63), st.integers(0, 5))
def test_an_epoch_is_a_permutation(n, seed, epoch):
    rows = loader(examples(n), seed=seed)
    assert sorted(rows.order(p) for p in range(epoch * n, (epoch + 1) * n)) == list(range(n))


def test_epochs_and_seeds_differ_and_the_order_is_written_down():
    rows = examples(20)
    first, second = ([loader(rows).order(p + e * 20) for p in range(20)] for e in (0, 1))
    assert first != second
    assert first != [loader(rows, seed=4).order(p) for p in range(20)]
    # A change of this line breaks the resumption of every run that is under way.
    assert [loader(examples(6)).order(p) for p in range(12)] == ORDER


ORDER = [1, 4, 5, 0, 2, 3, 1, 3, 0, 2, 5, 4]


@pytest.mark.parametrize("mismatched", [False, True])
@pytest.mark.parametrize("threads", [0, 3])
def test_seeking_equals_iterating(mismatched, threads):
    rows = examples(10, k=2)
    one, other = (loader(rows, mismatched=mismatched) for _ in range(2))
    walked = list(one.iterate(0, 12, threads=threads))
    assert [i for i, _ in walked] == list(range(12))
    for i in (11, 4, 0, 7):
        same(walked[i][1], other.batch(i))
    resumed = list(other.iterate(5, 8, threads=threads))
    for (i, a), (j, b) in zip(walked[5:8], resumed, strict=True):
        assert i == j
        same(a, b)
    assert list(one.iterate(5, 5, threads=threads)) == []


def test_far_seeks_are_as_quick_as_near_ones():
    assert 0 <= loader(examples(10)).order(10**15) < 10


@settings(deadline=None)
@given(st.integers(1, 4), st.booleans(), st.integers(0, 30))
def test_the_slices_of_two_processes_are_the_whole(half, mismatched, i):
    rows = loader(examples(11, k=2), batch_size=2 * half, mismatched=mismatched)
    whole = rows.batch(i)
    parts = [rows.batch(i, slice(0, half)), rows.batch(i, slice(half, 2 * half))]

    def joined(parts):
        return {
            name: joined([p[name] for p in parts])
            if isinstance(value, dict)
            else np.concatenate([p[name] for p in parts])
            for name, value in parts[0].items()
        }

    same(whole, joined(parts))
    assert whole["tokens"].shape[-1] == parts[0]["tokens"].shape[-1] == rows.bucket(i)


@settings(deadline=None)
@given(st.integers(1, 20), st.sampled_from([1, 2]), st.integers(0, 10))
def test_a_batch_holds_its_rows_and_padding_is_never_trained(n, k, i):
    made = examples(n, k)
    rows = loader(made)
    batch = rows.batch(i)
    t = rows.bucket(i)
    assert batch["tokens"].shape == (4, k, t) and t in rows.lengths
    dtypes = {"tokens": "i4", "mask": "?", "segments": "i4", "positions": "i4", "weight": "f4", "index": "i4"}
    assert {name: batch[name].dtype.str[1:] for name in dtypes} == {
        name: np.dtype(d).str[1:] for name, d in dtypes.items()
    }
    assert not (batch["mask"] & (batch["segments"] == 0)).any()
    assert not batch["mask"][..., 0].any()
    assert (batch["tokens"][batch["segments"] == 0] == 0).all()
    assert (batch["positions"][batch["segments"] == 0] == 0).all()
    for b in range(4):
        example = made[rows.order(4 * i + b)]
        assert batch["index"][b] == example.index and batch["weight"][b] == 1
        assert tuple(batch["labels"][b]) == example.labels
        for j, row in enumerate(example.completions):
            real = batch["segments"][b, j] == 1
            np.testing.assert_array_equal(real, np.arange(t) < len(row))
            np.testing.assert_array_equal(batch["tokens"][b, j][real], row.ids)
            np.testing.assert_array_equal(batch["mask"][b, j][real], row.mask)
            np.testing.assert_array_equal(batch["positions"][b, j][real], np.arange(len(row)))


@given(st.integers(2, 3000), st.lists(st.integers(1, 4000), max_size=5))
def test_buckets_ascend_to_the_length(length, wanted):
    lengths = bucket_lengths(length, wanted)
    assert lengths[-1] == length and list(lengths) == sorted(set(lengths))
    assert set(lengths[:-1]) <= set(wanted or [64 << n for n in range(12)])


def test_default_buckets_are_powers_of_two():
    assert bucket_lengths(512) == (64, 128, 256, 512)
    assert bucket_lengths(600) == (64, 128, 256, 512, 600)
    assert bucket_lengths(32) == (32,)
    with pytest.raises(UserError, match="at least 1"):
        bucket_lengths(32, (0,))


@pytest.mark.parametrize("mismatched", [False, True])
def test_buckets_are_counted_without_building_batches(mismatched):
    rows = loader(examples(30), buckets=(32, 48, 64), mismatched=mismatched)
    built = collections.Counter(batch["tokens"].shape[-1] for _, batch in rows.iterate(0, 40))
    assert rows.buckets(0, 40) == dict(sorted(built.items()))
    assert len(built) > 1


@pytest.mark.parametrize("n", [1, 4, 9])
def test_evaluation_sees_every_example_once(n):
    made = examples(n, k=2)
    batches = list(once(made, batch_size=4, length=LENGTH))
    assert all(batch["tokens"].shape[0] == 4 for batch in batches)
    index = np.concatenate([batch["index"] for batch in batches])
    weight = np.concatenate([batch["weight"] for batch in batches])
    assert index[weight == 1].tolist() == [e.index for e in made]
    assert (index[weight == 0] == -1).all() and weight[:n].all() and not weight[n:].any()
    for batch in batches:
        assert not batch["mask"][batch["weight"] == 0].any()
        assert not batch["segments"][batch["weight"] == 0].any()
    halves = [list(once(made, batch_size=4, length=LENGTH, rows=r)) for r in (slice(0, 2), slice(2, 4))]
    for whole, first, second in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(whole["tokens"], np.concatenate([first["tokens"], second["tokens"]]))
    assert list(once((), batch_size=4, length=LENGTH)) == []


def test_mismatched_evaluation_pads_too():
    (batch,) = once(examples(3), batch_size=4, length=LENGTH, mismatched=True)
    assert batch["mismatched"]["mask"].shape == batch["mask"].shape
    assert not batch["mismatched"]["segments"][3].any()


@settings(deadline=None)
@given(st.integers(2, 12), st.sampled_from([1, 2]), st.integers(0, 8), st.integers(2, 4))
def test_a_mismatched_row_is_its_prompt_with_the_answers_of_the_next_other_prompt(n, k, i, prompts):
    length = 70
    made = examples(n, k, prompts=prompts, longest=35)
    rows = loader(made, mismatched=True, length=length)
    batch = rows.batch(i)
    crossed = batch["mismatched"]
    assert crossed["tokens"].shape == batch["tokens"].shape
    for b in range(4):
        p = 4 * i + b
        own = made[rows.order(p)]
        other = next(e for e in (made[rows.order(p + d)] for d in range(1, 99)) if e.prompt != own.prompt)
        for j in range(k):
            real = crossed["segments"][b, j] == 1
            ids, mask = crossed["tokens"][b, j][real], crossed["mask"][b, j][real]
            answer = other.completions[j]
            np.testing.assert_array_equal(ids[mask], answer.ids[answer.mask])
            kept = ids[~mask]
            assert kept[0] == 1 and len(ids) <= length
            tail = own.completions[0].prompt[len(own.completions[0].prompt) - len(kept) + 1 :]
            np.testing.assert_array_equal(kept[1:], tail)


def test_a_single_prompt_cannot_be_mismatched():
    with pytest.raises(UserError, match="all rows have one prompt"):
        loader(examples(5, prompts=1), mismatched=True)


def test_weights_decide_the_share_of_each_source():
    made = examples(40, sources=2)
    rows = loader(made, weights=(3.0, 1.0))
    drawn = [made[rows.order(p)].source for p in range(400)]
    assert drawn.count(0) == 300
    seen = [rows.order(p) for p in range(400) if made[rows.order(p)].source == 1]
    assert sorted(seen[:20]) == sorted(seen[20:40]) and seen[:20] != seen[20:40]
    assert [rows.order(p) for p in range(40)] == [loader(made, weights=(3.0, 1.0)).order(p) for p in range(40)]


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="path number 2 .* has a weight but no usable row"):
        loader(examples(4), weights=(1.0, 1.0))
    with pytest.raises(UserError, match="no rows to load"):
        loader(())
    with pytest.raises(UserError, match="batch_size=0"):
        loader(examples(4), batch_size=0)
    with pytest.raises(UserError, match=r"rows:\d+ has \d+ tokens and the length is 8"):
        loader(examples(4), length=8)


def test_without_shuffling_the_order_is_that_of_the_rows():
    assert [loader(examples(3), shuffle=False).order(p) for p in range(7)] == [0, 1, 2, 0, 1, 2, 0]
