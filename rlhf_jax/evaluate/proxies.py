"""What a policy gains where a reward model picks the best of its answers, measured by a reward that is known."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rlhf_jax.evaluate.best_of import best_of, kl
from rlhf_jax.evaluate.intervals import Estimate, paired

GOLD = "gold"  # the best that picking can do


class Point(NamedTuple):
    """The best of n answers, as something ranks them; means over prompts with their intervals."""

    n: int
    kl: float  # nats, from the policy that drew
    gold: Estimate | None  # the known reward; None where there is none
    proxy: Estimate  # what ranks


def curves(
    proxies: Mapping[str, np.ndarray], gold: np.ndarray | None = None, *, seed: int = 0
) -> dict[str, list[Point]]:
    """The best of 1, 2, 4, ... up to all N answers by each proxy, and by the known reward itself.

    All are of the same answers and the same resampled prompts.

    Args:
      proxies: [P, N] scores by name.
      gold: [P, N].
    References: Gao et al. 2022, arXiv:2210.10760.
    """
    ranked = {**proxies, **({} if gold is None else {GOLD: gold})}
    draws = next(iter(ranked.values())).shape[1]
    sizes = [2**i for i in range(draws.bit_length()) if 2**i < draws] + [draws]
    columns = {}
    for name, scores in ranked.items():
        for n in sizes:
            columns[name, n, "proxy"] = best_of(scores, n)
            if gold is not None:
                columns[name, n, "gold"] = best_of(gold, n, by=scores)
    told = dict(zip(columns, paired({str(key): x for key, x in columns.items()}, seed=seed).values(), strict=True))
    return {
        name: [Point(n, kl(n), told.get((name, n, "gold")), told[name, n, "proxy"]) for n in sizes] for name in ranked
    }
