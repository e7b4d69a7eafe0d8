"""Several examples in one row: which, so that little of the row stays empty.

Nothing is cut: an example goes into a row whole. The completions of an example lie side by side in lanes, the
j-th completion of each example of a row in the j-th lane, so that pairs and ranked groups keep their shape and
whatever is said of an example stands in its row.
"""

import numpy as np

WINDOW = 1 << 14  # examples packed at a time: the search grows with their square


def best_fit(lengths: np.ndarray, capacity: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Rows of examples whose lengths add up to at most `capacity` in every lane.

    Best fit decreasing: the longest example first, each into the row that it leaves the least room in, or into
    a row of its own. Examples of equal lengths are taken in an order drawn from the seed. More than 16,384
    examples are packed in parts that are drawn from the seed as well.

    Args:
      lengths: int [N, lanes], tokens; an example alone must fit, so each is at most `capacity`.
    Returns: the examples of each row, each example once; a pure function of the arguments.
    References: Ding et al. 2024, arXiv:2404.10830 (best-fit packing); Johnson 1973 for its bound in one lane.

    >>> best_fit(np.asarray([[5], [4], [3], [2]]), 7)
    [(0, 3), (1, 2)]
    """
    assert lengths.size == 0 or lengths.max() <= capacity, "an example is longer than a row"
    order = np.random.RandomState(seed % 2**32).permutation(len(lengths))
    rows: list[tuple[int, ...]] = []
    for start in range(0, len(order), WINDOW):
        part = order[start : start + WINDOW]
        part = part[np.argsort(-lengths[part].max(axis=1), kind="stable")]
        rows += _pack(part, lengths, capacity)
    return rows


def _pack(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Best fit of the examples in this order."""
    room = np.full((len(order), lengths.shape[1]), capacity)
    rows: list[list[int]] = []
    for example in order:
        left = room[: len(rows)] - lengths[example]
        fits = np.flatnonzero((left >= 0).all(axis=1))
        if len(fits):
            place = int(fits[left[fits].sum(axis=1).argmin()])
        else:
            place = len(rows)
            rows.append([])
        rows[place].append(int(example))
        room[place] -= lengths[example]
    return [tuple(row) for row in rows]
