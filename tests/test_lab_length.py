"""The study of length: what it makes of labels, against counts by hand and a search over a grid."""

import collections

import numpy as np
import pytest

from rlhf_jax.lab.studies import length

SHORT, LONG = "Sure! The key is black.", "The key is black. I hope that this helps you."  # 5 and 10 words


def pair(chosen: int, rejected: int, prompt: str = "Q\n") -> dict[str, str]:
    """A pair of so many words."""
    return {"prompt": prompt, "chosen": " ".join("a" * chosen), "rejected": " ".join("b" * rejected)}


def test_brevity_is_how_many_words_are_saved():
    told = length.brevity(["What colour is the key?"] * 4, [SHORT, LONG, "", f"{LONG} {SHORT}"], other=[1, 2, 3, 4])
    assert told == [5.0, 0.0, 10.0, -5.0]


def test_slope_has_the_largest_likelihood():
    rng = np.random.default_rng(0)
    rows = [pair(8 + max(by, 0), 8 + max(-by, 0)) for by in rng.integers(-6, 9, 200)]
    by = np.asarray([length.longer(row) for row in rows])
    grid = np.linspace(-0.5, 0.5, 5001)
    likelihood = -np.logaddexp(0, -grid[:, None] * by).sum(axis=1)
    assert length.slope(rows) == pytest.approx(grid[likelihood.argmax()], abs=2e-4)
    turned = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert length.slope(turned) == pytest.approx(-length.slope(rows), abs=1e-6)


@pytest.mark.parametrize("rows", [[pair(3, 2), pair(5, 2)], [pair(2, 3)], [pair(2, 2)]])
def test_slope_of_what_always_goes_one_way_is_refused(rows):
    with pytest.raises(ValueError, match="no slope"):
        length.slope(rows)


def test_the_margin_is_what_lengths_are_worth_turned_round():
    """R-DPO, Park et al. 2024: -log sig(beta D + taste (|chosen| - |rejected|)), and a margin is taken off beta D."""
    rows = [pair(7, 4), pair(2, 6), pair(5, 5)]
    assert [row[length.MARGIN] for row in length.margined(rows, 0.25)] == [-0.75, 1.0, 0.0]
    assert [{name: row[name] for name in rows[0]} for row in length.margined(rows, 0.25)] == rows


def test_of_each_difference_as_many_longer_as_shorter_are_left():
    counts = {3: 9, -3: 4, 1: 2, -1: 5, 6: 3, 0: 7}  # by how much the chosen one is longer, how often
    rows = [pair(10 + by, 10, f"{by} {n}\n") for by, times in counts.items() for n in range(times)]
    left = length.balanced(rows, 5)
    kept = collections.Counter(length.longer(row) for row in left)
    assert kept == {3: 4, -3: 4, 1: 2, -1: 2, 0: 7}
    assert all(row in rows for row in left) and len({row["prompt"] for row in left}) == len(left)
    assert left == length.balanced(rows, 5) and left != length.balanced(rows, 6)
