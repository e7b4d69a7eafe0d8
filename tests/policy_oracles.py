"""Policy losses, baselines, advantages and KL estimators once more, in float64 and with plain loops.

They share no code with what they are held against. A policy loss reads p = (logprobs, old_logprobs, advantages,
mask); where a weight is held fixed, `at` are the log-probabilities that it is taken at.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Oracle = Callable[..., np.ndarray]
Columns = list[np.ndarray]

# ---- policy losses


def each(p: Columns) -> Iterator[tuple[int, list[int]]]:
    """Every row and its tokens."""
    for row, mask in enumerate(p[3]):
        yield row, [t for t in range(len(mask)) if mask[t]]


def by_token(p: Columns, of: Callable[[int, int], float]) -> np.ndarray:
    out = np.zeros(p[3].shape)
    for row, tokens in each(p):
        for t in tokens:
            out[row, t] = of(row, t)
    return out


def by_row(p: Columns, of: Callable[[int, list[int]], float]) -> np.ndarray:
    return np.asarray([of(row, tokens) if tokens else 0.0 for row, tokens in each(p)])


def clipped64(ratio: float, a: float, low: float, high: float, cap: float) -> float:
    """By cases, for cap > 1 + high: a gain counts up to the clip; a loss counts down to it, and up to the cap."""
    return -a * min(ratio, 1 + high) if a >= 0 else -a * max(min(ratio, cap), 1 - low)


def ppo64(p: Columns, clip_low: float, clip_high: float, cap: float) -> np.ndarray:
    ratio = lambda i, t: math.exp(p[0][i, t] - p[1][i, t])
    return by_token(p, lambda i, t: clipped64(ratio(i, t), p[2][i, t], clip_low, clip_high, cap))


def grpo64(p: Columns, **numbers: float) -> np.ndarray:
    losses = ppo64(p, **numbers)
    return by_row(p, lambda i, tokens: sum(losses[i, t] for t in tokens) / len(tokens))


def dr_grpo64(p: Columns, length: float, **numbers: float) -> np.ndarray:
    losses = ppo64(p, **numbers)
    return by_row(p, lambda i, tokens: sum(losses[i, t] for t in tokens) / length)


def luspo64(p: Columns, clip_low: float, clip_high: float, cap: float) -> np.ndarray:
    def of(i: int, tokens: list[int]) -> float:
        ratio = math.prod(math.exp(p[0][i, t] - p[1][i, t]) for t in tokens) ** (1 / len(tokens))
        return sum(clipped64(ratio, p[2][i, t], clip_low, clip_high, cap) for t in tokens)

    return by_row(p, of)


def gspo64(p: Columns, **numbers: float) -> np.ndarray:
    sums = luspo64(p, **numbers)
    return by_row(p, lambda i, tokens: sums[i] / len(tokens))


def cispo64(p: Columns, cap: float, at: np.ndarray | None = None) -> np.ndarray:
    fixed = p[0] if at is None else at
    weight = lambda i, t: min(math.exp(fixed[i, t] - p[1][i, t]), cap)
    return by_token(p, lambda i, t: -weight(i, t) * p[2][i, t] * p[0][i, t])


def sapo64(p: Columns, temperature: float, temperature_negative: float) -> np.ndarray:
    def term(i: int, t: int) -> float:
        tau = temperature if p[2][i, t] > 0 else temperature_negative
        return -p[2][i, t] * 4 / tau / (1 + math.exp(-tau * (math.exp(p[0][i, t] - p[1][i, t]) - 1)))

    return by_row(p, lambda i, tokens: sum(term(i, t) for t in tokens) / len(tokens))


def gmpo64(p: Columns, clip_low: float, clip_high: float) -> np.ndarray:
    """The product of clipped ratios, or of their inverses where the advantage is negative, and its root."""

    def of(i: int, tokens: list[int]) -> float:
        root = 1.0
        for t in tokens:
            sign = -1 if p[2][i, t] < 0 else 1
            ratio = math.exp(p[0][i, t] - p[1][i, t])
            clipped = min(max(ratio, math.exp(-clip_low)), math.exp(clip_high))
            root *= min(ratio**sign, clipped**sign) ** (sign / len(tokens))
        return -root * sum(p[2][i, t] for t in tokens) / len(tokens)

    return by_row(p, of)


def vespo64(
    p: Columns,
    power: float,
    decay: float,
    power_negative: float,
    decay_negative: float,
    at: np.ndarray | None = None,
) -> np.ndarray:
    fixed = p[0] if at is None else at
    whole = {i: math.exp(sum(fixed[i, t] - p[1][i, t] for t in tokens)) for i, tokens in each(p)}

    def of(i: int, t: int) -> float:
        k, lam = (power, decay) if p[2][i, t] >= 0 else (power_negative, decay_negative)
        return -math.exp(lam) * whole[i] ** k * math.exp(-lam * whole[i]) * p[2][i, t] * p[0][i, t]

    return by_token(p, of)


def reinforce64(p: Columns) -> np.ndarray:
    return by_row(p, lambda i, tokens: -sum(p[2][i, t] * p[0][i, t] for t in tokens))


POLICY64: dict[str, Oracle] = {
    "ppo": ppo64, "grpo": grpo64, "bnpo": ppo64, "dr_grpo": dr_grpo64, "dapo": ppo64, "gspo": gspo64,
    "cispo": cispo64, "sapo": sapo64, "gmpo": gmpo64, "vespo": vespo64, "luspo": luspo64, "reinforce": reinforce64,
}  # fmt: skip
HELD = {"cispo", "vespo"}  # those with a weight that is held fixed


def value64(values: np.ndarray, old: np.ndarray, returns: np.ndarray, mask: np.ndarray, clip: float) -> np.ndarray:
    def of(i: int, t: int) -> float:
        near = min(max(values[i, t], old[i, t] - clip), old[i, t] + clip)
        return 0.5 * max((values[i, t] - returns[i, t]) ** 2, (near - returns[i, t]) ** 2)

    return by_token([values, old, returns, mask], of)


# ---- advantages


def gae64(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """The sum over k of (gamma lam)^k delta_{t + k}, over the tokens that count."""
    out = np.zeros(mask.shape)
    for row in range(len(mask)):
        tokens = np.flatnonzero(mask[row])
        r, v = rewards[row, tokens], [*values[row, tokens], 0.0]
        for i, t in enumerate(tokens):
            later = range(len(tokens) - i)
            out[row, t] = sum((gamma * lam) ** k * (r[i + k] + gamma * v[i + k + 1] - v[i + k]) for k in later)
    return out


def returns64(rewards: np.ndarray, mask: np.ndarray, gamma: float) -> np.ndarray:
    out = np.zeros(mask.shape)
    for row in range(len(mask)):
        tokens = np.flatnonzero(mask[row])
        for i, t in enumerate(tokens):
            out[row, t] = sum(gamma**k * rewards[row, later] for k, later in enumerate(tokens[i:]))
    return out


def token_rewards64(score: np.ndarray, kl: np.ndarray, mask: np.ndarray, coefficient: float) -> np.ndarray:
    out = np.zeros(mask.shape)
    for row in range(len(mask)):
        for t in np.flatnonzero(mask[row]):
            out[row, t] = -coefficient * kl[row, t]
            if not mask[row, t + 1 :].any():
                out[row, t] += score[row]
    return out


def deviation(values: Any) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def whiten64(x: np.ndarray, mask: np.ndarray, shift: bool = True) -> np.ndarray:
    values = [v for v, counts in zip(x.ravel(), mask.ravel(), strict=True) if counts]
    mean = float(np.mean(values)) if values else 0.0
    scaled = (x - mean) / math.sqrt(deviation(values) ** 2 + 1e-8)
    return np.where(mask, scaled + (0 if shift else mean), 0)


# ---- baselines, of rewards and applies [G, K, R] and weights [R]


def totals(p: Columns) -> list[dict[int, float]]:
    """Of each group the weighted sums of those samples to which a reward applies."""
    rewards, applies, weights = p
    return [
        {
            k: sum(w * x for w, x, counts in zip(weights, group[k], there[k], strict=True) if counts)
            for k in range(len(group))
            if any(there[k])
        }
        for group, there in zip(rewards, applies, strict=True)
    ]


def table(p: Columns, groups: list[dict[int, float]]) -> np.ndarray:
    out = np.zeros(p[0].shape[:2])
    for g, group in enumerate(groups):
        for k, value in group.items():
            out[g, k] = value
    return out


def less_mean(group: dict[int, float]) -> dict[int, float]:
    return {k: r - float(np.mean(list(group.values()))) for k, r in group.items()}


def flat(groups: list[dict[int, float]]) -> list[float]:
    return [r for group in groups for r in group.values()]


def grpo_baseline64(p: Columns, scale: str) -> np.ndarray:
    groups, batch = totals(p), deviation(flat(totals(p))) + 1e-4
    by = {"none": lambda group: 1, "batch": lambda group: batch, "group": lambda g: deviation([*g.values()]) + 1e-4}
    return table(p, [{k: r / by[scale](group) for k, r in less_mean(group).items()} for group in groups])


def rloo64(p: Columns) -> np.ndarray:
    out = []
    for group in totals(p):
        rest = {k: [r for other, r in group.items() if other != k] for k in group}
        out.append({k: r - float(np.mean(rest[k])) if rest[k] else 0.0 for k, r in group.items()})
    return table(p, out)


def reinforce_pp64(p: Columns, baseline: bool) -> np.ndarray:
    groups = [less_mean(group) if baseline else group for group in totals(p)]
    mean, scale = float(np.mean(flat(groups))), math.sqrt(deviation(flat(groups)) ** 2 + 1e-8)
    return table(p, [{k: (r - mean) / scale for k, r in group.items()} for group in groups])


def gdpo64(p: Columns) -> np.ndarray:
    rewards, applies, weights = p
    groups = [dict.fromkeys(group, 0.0) for group in totals(p)]
    for g, group in enumerate(groups):
        for j, weight in enumerate(weights):
            own = {k: rewards[g, k, j] for k in group if applies[g, k, j]}
            for k, r in less_mean(own).items():
                group[k] += weight * r / (deviation([*own.values()]) + 1e-4)
    scale = deviation(flat(groups)) + 1e-4
    return table(p, [{k: r / scale for k, r in less_mean(group).items()} for group in groups])


BASELINES64: dict[str, Oracle] = {
    "grpo": grpo_baseline64, "rloo": rloo64, "reinforce_pp": reinforce_pp64, "gdpo": gdpo64,
    "dr_grpo": lambda p: table(p, [less_mean(group) for group in totals(p)]),
}  # fmt: skip

# ---- estimators of KL(pi || ref), of d = log pi - log ref: value and slope

ESTIMATORS64: dict[str, tuple[Oracle, Oracle]] = {
    "k1": (lambda d: d, np.ones_like),
    "k2": (lambda d: d**2 / 2, lambda d: d),
    "k3": (lambda d: np.expm1(-d) + d, lambda d: -np.expm1(-d)),
    "k3_plus": (lambda d: np.expm1(-d) + d, lambda d: d),
}
