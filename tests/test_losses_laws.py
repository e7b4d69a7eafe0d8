"""Laws that every loss obeys, over the registries by what a loss reads: a new entry is covered as it is added."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import losses
from rlhf_jax.losses import SUMS
from rlhf_jax.losses.distillation import DISTILLATION
from rlhf_jax.losses.policy import POLICY
from rlhf_jax.losses.preference import MeanPair, Pair, PolicyPair, SortedMargins, SortedRatios, dpo, exo, robust
from rlhf_jax.losses.ranked import Ranked, dpo_pl
from rlhf_jax.losses.reward import (
    ScoredAnswer,
    ScoredSteps,
    ScoreGroup,
    ScorePair,
    ScoreRanking,
    all_pairs,
    bradley_terry,
    plackett_luce,
)
from rlhf_jax.losses.supervised import SmoothTokens, Tokens
from rlhf_jax.losses.unpaired import Answer, BareAnswer, ShiftedAnswer

ROWS = 6
few = settings(max_examples=10, deadline=None)
seeds = st.integers(0, 2**32 - 1)

# Those of a policy and of two heads have tests of their own, test_policy_losses.py and test_distill.py.
LOSSES = {name: loss for name, loss in losses.LOSSES.items() if name not in {**POLICY, **DISTILLATION}}


def reads(name: str) -> type:
    """The columns that a loss reads: the type of its first argument."""
    return next(iter(get_type_hints(LOSSES[name]).values()))


def defaults(name: str) -> dict[str, Any]:
    arguments = list(inspect.signature(LOSSES[name]).parameters.values())[1:]
    return {argument.name: argument.default for argument in arguments}


def numeric(name: str) -> dict[str, float]:
    return {argument: value for argument, value in defaults(name).items() if type(value) is float}


# What each column holds, in dyadic numbers, so that their sums and differences are exact in float32.
def dyadic(rng: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    return (np.round(rng.uniform(low, high, shape) * 64) / 64).astype(np.float32)


def draw(columns: type, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    real = lambda low, high: dyadic(rng, low, high, ROWS)
    table = lambda low, high: dyadic(rng, low, high, ROWS, 3)
    made: dict[type, Callable[[], tuple]] = {
        Pair: lambda: (*(real(-50, -1) for _ in range(4)), *(rng.integers(1, 20, (2, ROWS)).astype(np.float32))),
        PolicyPair: lambda: (real(-50, -1), real(-50, -1), *(rng.integers(1, 20, (2, ROWS)).astype(np.float32))),
        MeanPair: lambda: (real(-5, -0.1), real(-5, -0.1)),
        SortedMargins: lambda: (real(-9, 9), real(-9, 9)),
        SortedRatios: lambda: tuple(real(-9, 9) for _ in range(4)),
        Answer: lambda: (real(-50, -1), real(-50, -1), rng.random(ROWS) < 0.5, real(0, 3)),
        BareAnswer: lambda: (real(-50, -1), real(-50, -1), rng.random(ROWS) < 0.5),
        ShiftedAnswer: lambda: (real(-50, -1), real(-50, -1), rng.random(ROWS) < 0.5, real(-2, 2)),
        Ranked: lambda: (table(-50, -1), table(-50, -1), table(0, 4), rng.random((ROWS, 3)) < 0.8),
        ScorePair: lambda: (real(-9, 9), real(-9, 9)),
        ScoreGroup: lambda: (table(-9, 9), rng.random((ROWS, 3, 3), np.float32), rng.random((ROWS, 3)) < 0.8),
        ScoreRanking: lambda: (table(-9, 9), table(0, 4), rng.random((ROWS, 3)) < 0.8),
        ScoredAnswer: lambda: (real(-9, 9), rng.random(ROWS) < 0.5),
        ScoredSteps: lambda: (table(-9, 9), rng.choice(np.asarray([0, 0.5, 1], np.float32), (ROWS, 3))),
        Tokens: lambda: (table(-5, -0.1), table(1, 9)),
        SmoothTokens: lambda: (table(-5, -0.1), table(-20, -5)),
    }
    return columns(*(jnp.asarray(column) for column in made[columns]()))


# Of each column of the policy, the one that it is measured from.
REFERENCES: dict[type, dict[str, str]] = {
    Pair: {"chosen": "ref_chosen", "rejected": "ref_rejected"},
    SortedMargins: {"margin": "partner"},
    SortedRatios: {"chosen": "chosen_partner", "rejected": "rejected_partner"},
    Answer: {"logprob": "ref_logprob"},
    BareAnswer: {"logprob": "ref_logprob"},
    ShiftedAnswer: {"logprob": "ref_logprob"},
    Ranked: {"logprob": "ref_logprob"},
}
OWN = {"chosen", "rejected", "margin", "logprob", "logprobs", "logsumexp", "mean_logprobs", "score"}  # the policy's
REFERENCED = [name for name in LOSSES if reads(name) in REFERENCES]
SMOOTHED = [name for name in LOSSES if "label_smoothing" in defaults(name) and not hasattr(reads(name), "logprobs")]


def at_reference(columns: Any) -> Any:
    """The policy is the reference: every log-ratio 0, and so are a baseline and a shift."""
    pairs = REFERENCES[type(columns)]
    rest = {field: jnp.zeros(ROWS) for field in ("baseline", "shift") if field in columns._fields}
    return columns._replace(**{ref: getattr(columns, own) for own, ref in pairs.items()}, **rest)


def swap(columns: Any) -> Any:
    """The same rows with the other completion as the chosen one."""
    if isinstance(columns, SortedMargins):
        return SortedMargins(-columns.margin, -columns.partner)
    other = {"chosen": "rejected", "rejected": "chosen"}
    turned = {field: field.replace(word, other[word]) for field in columns._fields for word in other if word in field}
    return type(columns)(*(getattr(columns, turned[field]) for field in columns._fields))


@functools.cache
def compiled(name: str) -> Callable[..., jax.Array]:
    """The loss with its default numbers, compiled once for all examples."""
    return jax.jit(LOSSES[name])


@pytest.mark.parametrize("name", REFERENCED)
@few
@given(seeds, st.integers(-512, 512))
def test_a_constant_added_to_policy_and_reference_changes_nothing(name, seed, eighths):
    columns, loss = draw(reads(name), seed), compiled(name)
    both = [field for pair in REFERENCES[type(columns)].items() for field in pair]
    moved = columns._replace(**{field: getattr(columns, field) + eighths / 8 for field in both})
    np.testing.assert_array_equal(loss(moved), loss(columns))


@pytest.mark.parametrize("name", LOSSES)
@few
@given(seeds, st.permutations(range(ROWS)))
def test_permuting_rows_permutes_the_losses(name, seed, order):
    columns, loss = draw(reads(name), seed), compiled(name)
    turned = type(columns)(*(column[jnp.array(order)] for column in columns))
    np.testing.assert_allclose(loss(turned), loss(columns)[jnp.array(order)], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
@few
@given(seeds, seeds, st.integers(0, ROWS - 1))
def test_a_row_depends_on_itself_alone(name, seed, other, row):
    columns, strange, loss = draw(reads(name), seed), draw(reads(name), other), compiled(name)
    mixed = jax.tree.map(lambda x, y: x.at[row].set(y[row]), columns, strange)
    kept = np.arange(ROWS) != row
    np.testing.assert_array_equal(np.asarray(loss(mixed))[kept], np.asarray(loss(columns))[kept])
    np.testing.assert_allclose(loss(mixed)[row], loss(strange)[row], rtol=1e-6, atol=1e-7)


HALF = 1 / (2 * 0.1)
START = {
    "dpo": math.log(2), "robust": math.log(2), "ipo": HALF**2, "hinge": 1.0, "nca": 2 * math.log(2),
    "exo": math.log(0.5) - (math.log(1e-3) + math.log1p(-1e-3)) / 2, "bco_pair": 2 * math.log(2),
    "sppo": 2 * HALF**2, "apo_zero": 1.0, "apo_down": 1.0, "discopop": (1 + math.log(2)) / 2,
    "dpo_norm": math.log(2), "aot": math.log(2), "aot_unpaired": math.log(2), "kto": 0.5, "kto_zero": 0.5,
    "bco": math.log(2),
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCED)
@few
@given(seeds, seeds)
def test_the_first_loss_at_the_reference(name, seed, other):
    """It is the number that it is known to be, and no log-probability changes it."""
    columns, again = draw(reads(name), seed), draw(reads(name), other)
    unlike = columns._replace(**{field: getattr(again, field) for field in REFERENCES[type(columns)]})
    found = compiled(name)(at_reference(columns))
    np.testing.assert_array_equal(found, compiled(name)(at_reference(unlike)))
    if name in START:
        np.testing.assert_allclose(found, START[name], rtol=2e-6)


@pytest.mark.parametrize("name", SMOOTHED)
@few
@given(seeds, st.floats(0.0625, 0.375, width=16))
def test_swapping_the_two_is_flipping_the_label(name, seed, flipped):
    columns = draw(reads(name), seed)
    alone = {"alpha": 0.0} if "alpha" in defaults(name) else {}  # without the likelihood of one of the two
    found = compiled(name)(swap(columns), label_smoothing=flipped, **alone)
    np.testing.assert_allclose(
        found, compiled(name)(columns, label_smoothing=1 - flipped, **alone), rtol=1e-5, atol=1e-6
    )


FAR = [-200.0, 200.0, -200.0, 200.0, 0.0, -1e-30]


def extremes(columns: type) -> Any:
    """Log-ratios of 200 nats either way and in every combination; means of nearly 0 and of -200."""
    drawn = draw(columns)
    shape = np.shape(drawn[0])
    spread = lambda values: jnp.broadcast_to(
        jnp.asarray(values, jnp.float32).reshape(ROWS, *[1] * (len(shape) - 1)), shape
    )
    first, second = spread(FAR), spread([-200.0, 200.0, 200.0, -200.0, 200.0, 0.0])
    if columns in (MeanPair, PolicyPair, Tokens, SmoothTokens):
        first, second = -jnp.abs(first), -jnp.abs(second)
    values = dict(zip([field for field in drawn._fields if field in OWN], (first, second), strict=False))
    references = REFERENCES.get(columns, {}).values()
    return drawn._replace(**values, **{field: jnp.zeros(shape) for field in references})


def divergences(name: str) -> list[dict[str, str]]:
    if "divergence" not in defaults(name):
        return [{}]
    return [{"divergence": divergence} for divergence in ("reverse_kl", "forward_kl", "js", "alpha")]


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_infinite_far_from_the_reference(name):
    columns = extremes(reads(name))
    own = {field: getattr(columns, field) for field in columns._fields if field in OWN}
    for how in divergences(name):
        for beta in [{"beta": 0.1}, {"beta": 1.0}] if "beta" in defaults(name) else [{}]:
            total = lambda own, how=how | beta: jnp.sum(LOSSES[name](columns._replace(**own), **how))
            value, slopes = jax.jit(jax.value_and_grad(total))(own)
            assert np.isfinite(value), (how, beta)
            assert all(np.isfinite(slope).all() for slope in slopes.values()), (how, beta)


@pytest.mark.parametrize("name", [name for name in LOSSES if numeric(name)])
def test_numbers_are_traced_and_a_leading_axis_of_them_is_the_loop(name):
    """One trace for all values, and the members of a sweep under one vmap are each what it would be alone."""
    columns, names = draw(reads(name)), list(numeric(name))
    members = {argument: jnp.asarray([0.75, 1.0, 1.25]) * (value or 0.25) for argument, value in numeric(name).items()}
    traces = []

    @jax.jit
    def once(columns: Any, numbers: dict[str, jax.Array]) -> jax.Array:
        traces.append(name)
        return LOSSES[name](columns, **numbers)

    alone = [once(columns, {argument: members[argument][i] for argument in names}) for i in range(3)]
    assert len(traces) == 1
    together = jax.jit(jax.vmap(lambda numbers: LOSSES[name](columns, **numbers)))(members)
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-6, atol=1e-6)
    plain = [LOSSES[name](columns, **{argument: float(members[argument][i]) for argument in names}) for i in range(3)]
    np.testing.assert_allclose(together, np.stack(plain), rtol=1e-5, atol=1e-6)


# ---- scores


@few
@given(seeds, st.integers(-512, 512))
def test_a_constant_added_to_scores_changes_no_loss_of_comparisons(seed, eighths):
    for name in ("all_pairs", "plackett_luce", "bradley_terry"):
        columns = draw(reads(name), seed)
        moved = columns._replace(**{f: getattr(columns, f) + eighths / 8 for f in columns._fields if f in OWN})
        np.testing.assert_allclose(compiled(name)(moved), compiled(name)(columns), rtol=1e-5, atol=1e-6)


@few
@given(seeds, st.permutations(range(3)))
def test_the_order_in_which_answers_stand_is_no_matter(seed, order):
    turn = lambda x: x[:, jnp.array(order)] if x.ndim == 2 else x[:, jnp.array(order)][:, :, jnp.array(order)]
    for name in ("all_pairs", "plackett_luce"):
        columns = draw(reads(name), seed)
        turned = type(columns)(*map(turn, columns))
        np.testing.assert_allclose(compiled(name)(turned), compiled(name)(columns), rtol=1e-5, atol=1e-6)


@few
@given(seeds, st.floats(0, 1, width=16))
def test_a_group_of_two_is_a_pair_with_a_soft_label(seed, share):
    pair = draw(ScorePair, seed)
    score, rank = jnp.stack(pair, axis=1), jnp.tile(jnp.array([[0.0, 1.0]]), (ROWS, 1))
    preferred = jnp.zeros((ROWS, 2, 2)).at[:, 0, 1].set(share).at[:, 1, 0].set(1 - share)
    present = jnp.ones((ROWS, 2), bool)
    group, ranking = ScoreGroup(score, preferred, present), ScoreRanking(score, rank, present)
    expected = bradley_terry(pair, label_smoothing=1 - share, centre=0.25)
    np.testing.assert_allclose(all_pairs(group, centre=0.25), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plackett_luce(ranking), bradley_terry(pair), rtol=1e-5, atol=1e-6)


def test_what_an_absent_answer_holds_reaches_no_value_and_no_gradient():
    for loss in (all_pairs, plackett_luce):
        group = draw(reads(loss.__name__))
        poisoned = group._replace(score=jnp.where(group.present, group.score, jnp.nan))
        total = lambda score, loss=loss, poisoned=poisoned: jnp.sum(loss(poisoned._replace(score=score)))
        assert np.isfinite(jax.grad(total)(poisoned.score)).all()
        empty = group._replace(score=jnp.where(group.present, group.score, 0))
        np.testing.assert_array_equal(loss(poisoned), loss(empty))


def test_the_best_scores_are_the_log_odds_of_the_labels():
    """Of three answers with true scores, the all-pairs loss of exact label shares is least at their differences."""
    true = jnp.array([[1.0, 0.2, -0.7]])
    shares = jax.nn.sigmoid(true[:, :, None] - true[:, None, :]) * ~jnp.eye(3, dtype=bool)[None]
    loss = lambda score: all_pairs(ScoreGroup(score, shares, true == true))[0]
    score, grad = jnp.zeros((1, 3)), jax.jit(jax.grad(loss))
    for _ in range(300):
        score = score - 2.0 * grad(score)
    np.testing.assert_allclose(score - score.mean(), true - true.mean(), atol=1e-4)


# ---- sums and rankings


def test_sums_are_of_known_losses():
    for name, parts in SUMS.items():
        assert name not in LOSSES and set(parts) <= set(LOSSES) and all(weight > 0 for weight in parts.values())


NATS = st.lists(st.floats(-50, -1, width=32), min_size=4, max_size=4)
SCALE = st.floats(1 / 64, 1, width=32)


@settings(max_examples=25, deadline=None)
@given(NATS, SCALE)
def test_a_ranking_of_two_is_a_pair_and_absent_completions_change_nothing(logprobs, beta):
    pair = Pair(*(jnp.asarray([x], jnp.float32) for x in (*logprobs, 5.0, 7.0)))
    two = lambda *columns: jnp.stack(columns, axis=1)
    policy, ref = two(pair.chosen, pair.rejected), two(pair.ref_chosen, pair.ref_rejected)
    rank, present = jnp.array([[0.0, 1.0]]), jnp.ones((1, 2), bool)
    expected = dpo(pair, beta=beta)
    np.testing.assert_allclose(dpo_pl(Ranked(policy, ref, rank, present), beta=beta), expected, rtol=1e-5, atol=1e-6)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 2)))
    more = Ranked(pad(policy), pad(ref), pad(rank), pad(present))
    np.testing.assert_allclose(dpo_pl(more, beta=beta), expected, rtol=1e-5, atol=1e-6)


def test_a_row_without_completions_has_no_loss_and_no_gradient():
    nothing = jnp.full((1, 3), -jnp.inf)
    empty = Ranked(nothing, nothing, jnp.zeros((1, 3)), jnp.zeros((1, 3), bool))
    value, slope = jax.value_and_grad(lambda x: jnp.sum(dpo_pl(empty._replace(logprob=x))))(empty.logprob)
    assert value == 0 and not np.asarray(slope).any()


# ---- the optimum

ACTIONS, BETA, FLIPPED = 16, 0.5, 0.2


def descend(loss: Callable[[jax.Array], jax.Array], start: jax.Array) -> jax.Array:
    """Adam with a learning rate that falls to 0, all steps in one scan."""
    steps = 3000
    tx = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def body(carry: tuple, _: None) -> tuple[tuple, None]:
        logits, state = carry
        updates, state = tx.update(jax.grad(loss)(logits), state)
        return (logits + updates, state), None

    return jax.lax.scan(body, (start, tx.init(start)), None, steps)[0][0]


# For each: the weight of a pair (i chosen, j rejected) given p = P(i is better), and the loss's numbers.
LABELS: dict[str, tuple[Callable, Callable[[jax.Array], tuple[jax.Array, dict[str, Any]]]]] = {
    "dpo, hard labels": (dpo, lambda p: (p, {})),
    "dpo, soft labels": (dpo, lambda p: (jnp.ones_like(p), {"label_smoothing": 1 - p})),
    "exo, soft labels": (exo, lambda p: (jnp.ones_like(p), {"label_smoothing": 1 - p})),
    "robust, flipped labels": (
        robust,
        lambda p: (p * (1 - FLIPPED) + (1 - p) * FLIPPED, {"label_smoothing": FLIPPED}),
    ),
}


@pytest.mark.parametrize("name", LABELS)
def test_optimum(name):
    """Over all pairs drawn from the reference and labelled by sig(r_i - r_j): pi is ref exp(r / beta), normalised."""
    loss, label = LABELS[name]
    rng = np.random.default_rng(1)
    rewards, ref = rng.normal(0, 1, ACTIONS), rng.dirichlet(np.full(ACTIONS, 3.0))
    i, j = (index.ravel() for index in np.indices((ACTIONS, ACTIONS)))
    with jax.enable_x64(True):
        log_ref, ones = jnp.log(jnp.asarray(ref)), jnp.ones(ACTIONS**2)
        weight, numbers = label(jax.nn.sigmoid(jnp.asarray(rewards[i] - rewards[j])))

        def population(logits: jax.Array) -> jax.Array:
            log_pi = jax.nn.log_softmax(logits)
            pair = Pair(log_pi[i], log_pi[j], log_ref[i], log_ref[j], ones, ones)
            return jnp.sum(jnp.asarray(ref[i] * ref[j]) * weight * loss(pair, beta=BETA, **numbers))

        found = np.asarray(jax.nn.softmax(jax.jit(functools.partial(descend, population))(log_ref)))
    best = ref * np.exp(rewards / BETA)
    best /= best.sum()
    distance = lambda p, q: 0.5 * np.abs(p - q).sum()
    assert distance(ref, best) > 0.2  # there is something to learn
    assert distance(found, best) < 0.005
