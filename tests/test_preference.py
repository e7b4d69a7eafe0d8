"""Preference learning beyond single losses: sums, LD-DPO, WPO, AOT, and the state of BCO and TR-DPO.

What is differentiated is held against the same loss written down directly, in float64, of whole completions; its
gradient reaches the parameters through the model's token log-probabilities alone.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.algorithms import preference
from rlhf_jax.algorithms.completions import READS, completion_sums
from rlhf_jax.algorithms.preference import PreferenceConfig, make_advance, make_carry, make_prepare
from rlhf_jax.algorithms.step import flat_rows, make_state, make_step
from rlhf_jax.losses.supervised import SUPERVISED
from rlhf_jax.losses.unpaired import Answer, BareAnswer
from rlhf_jax.ops.logprobs import TokenStats
from tests import problem
from tests.problem import part
from tests.test_step import norm_of

MODEL = problem.make_model()
KEY, PLAIN = jax.random.PRNGKey(0), PreferenceConfig()
BETA = 0.3
SUM = {"dpo": 0.7, "nll": 0.3}
CASES: dict[str, tuple[tuple[str, ...], PreferenceConfig]] = {
    "dpo+nll": (("dpo", "nll"), PLAIN),
    "wpo": (("dpo",), PreferenceConfig(weighting="wpo")),
    "ld": (("dpo",), PreferenceConfig(length_alpha=0.5)),
    **{name: ((name,), PLAIN) for name in ("aot", "aot_unpaired", "kto", "kto_zero")},
}


class Seen:
    """A model that looks at the rows of one trace once; an objective gets what it asked for and no more."""

    def __init__(self, params: Any, batch: Any):
        want = ("logprobs", "logsumexp", "log_sum_sq")
        self.shape, self.stats = MODEL.shape, MODEL.token_stats(params, flat_rows(batch), want=want)

    def token_stats(self, params: Any, rows: Any, *, want: tuple[str, ...]) -> TokenStats:
        return TokenStats(**{name: getattr(self.stats, name) for name in want})


@jax.jit
def differentiated(params: Any, hyper: Any, batch: Any) -> Any:
    """Of each case and term the gradient of its total; the terms and means. One program, a backward pass a term."""

    def totals(params: Any) -> Any:
        seen = cast(Any, Seen(params, batch))
        weights = dict.fromkeys(problem.LOSSES, 1.0)
        made = {"dpo": problem.objective_of("dpo", seen)}
        for case, (names, config) in CASES.items():
            made[case] = preference.make_objective(seen, [part(name) for name in names], config)
        weigh = lambda case: hyper | {"weights": weights | SUM if case == "dpo+nll" else weights}
        found = {case: objective(params, None, weigh(case), batch, KEY) for case, objective in made.items()}
        return {case: {n: t.total for n, t in terms.items()} for case, (terms, _) in found.items()}, found

    # One after the other: XLA's CPU back end in JAX 0.10 gets a backward pass wrong that is mapped over by vmap.
    out, back, found = jax.vjp(totals, params, has_aux=True)
    leaves, shape = jax.tree.flatten(out)
    each = jax.lax.map(lambda one: back(jax.tree.unflatten(shape, list(one)))[0], jnp.eye(len(leaves)))
    grads = [jax.tree.map(lambda x, i=i: x[i], each) for i in range(len(leaves))]
    return jax.tree.unflatten(shape, grads), found


@jax.jit
def pull(params: Any, batch: Any, cotangent: Any) -> tuple[Any, Any]:
    """Token log-probabilities [B, K, T], and what their cotangent is for the parameters."""
    of = lambda params: MODEL.token_stats(params, flat_rows(batch)).logprobs.reshape(batch["tokens"].shape)
    logprobs, back = jax.vjp(of, params)
    return logprobs, back(cotangent)[0]


def logprobs_of(params: Any, batch: Any) -> np.ndarray:
    """[B, K, T], float64."""
    return np.asarray(pull(params, batch, np.zeros(batch["tokens"].shape, np.float32))[0], np.float64)


def numbers(length_alpha: float = 0.5) -> dict[str, Any]:
    loss = {name: {} if name in SUPERVISED else {"beta": BETA} for name in problem.LOSSES}
    return {"loss": loss, "preference": {"length_alpha": length_alpha}}


def moved(params: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (x + 0.05 * rng.normal(size=x.shape)).astype(np.float32), params)


@functools.cache
def batch_of() -> dict[str, np.ndarray]:
    """Rows with the columns of a fixed reference, and partners; padding rows hold what must not matter."""
    rows, reference = problem.make_rows(), moved(problem.initial(), 1)
    rows["mask"][0, 0, 0] = True  # a first token, which nothing predicts
    logprobs, real = logprobs_of(reference, rows), rows["weight"][:, None] > 0
    of = lambda tokens: np.where(real, np.where(tokens, logprobs, 0).sum(-1), 1e3).astype(np.float32)
    rows |= {"ref_logprob": of(rows["mask"]), "ref_shared": of(shared_mask(rows))}
    rows["baseline"] = np.zeros(problem.ROWS, np.float32)
    parts = [part("aot"), part("aot_unpaired")]
    prepare, state = (make_prepare(MODEL, parts, PLAIN, (MODEL, reference)), state_of(problem.initial(), parts, PLAIN))
    (batch,) = prepare(state, {name: x for name, x in rows.items() if name not in problem.PARTNERS})
    assert set(batch) == set(rows)
    return jax.tree.map(np.asarray, batch)


def shared_mask(batch: Any) -> np.ndarray:
    """The completion tokens up to the length of the shorter one, [B, K, T]."""
    number = np.cumsum(batch["mask"], axis=-1)
    return batch["mask"] & (number <= number[..., -1:].min(axis=1, keepdims=True))


def state_of(params: Any, parts: Any, config: PreferenceConfig) -> Any:
    every = problem.hyper({}, 0.1, 1.0) | numbers() | {"preference": {"sync_mix": 0.25}}
    every |= {"weights": {part.name: 1.0 for part in parts}}
    return make_state(params, every, problem.OPTIMIZER, KEY, carry=make_carry(parts, config, params))


@functools.cache
def found_in(pieces: int) -> dict[str, Any]:
    return found_of(batch_of(), pieces)


def found_of(batch: Any, pieces: int = 1, length_alpha: float = 0.5) -> dict[str, tuple[float, Any, dict[str, float]]]:
    """Loss, gradient and means of each case on a batch, taken in pieces; every sum is divided once."""
    split = [{name: column[i::pieces] for name, column in batch.items()} for i in range(pieces)]
    each = [differentiated(problem.initial(), numbers(length_alpha), rows) for rows in split]
    grads, found = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *each)
    out = {}
    for case, (terms, means) in found.items():
        share = {n: float(t.weight) / pieces / float(t.count) for n, t in terms.items()}  # a weight is no sum
        loss = sum(share[n] * float(t.total) for n, t in terms.items())
        grad = jax.tree.map(lambda *x: sum(x), *(scaled(grads[case][n], share[n]) for n in terms))
        out[case] = loss, grad, {n: float(np.sum(m.total / m.count)) for n, m in means.items()}
    return out


def scaled(tree: Any, by: float) -> Any:
    return jax.tree.map(lambda x: by * np.asarray(x, np.float64), tree)


def assert_near(found: Any, loss: float, grad: Any, nats: float = 1e-5) -> None:
    np.testing.assert_allclose(found[0], loss, rtol=nats)
    off, norm = norm_of(jax.tree.map(np.subtract, found[1], grad)), norm_of(grad)
    assert norm > 1e-3 and off < nats * norm, (off, norm)


def direct(loss: Any, batch: Any) -> tuple[float, Any]:
    """Value and gradient of a function of (policy, reference) log-probabilities [n, 2] of the rows that count."""
    real = batch["weight"] > 0
    sums = logprobs_of(problem.initial(), batch).sum(-1)
    with jax.enable_x64(True):
        value, slope = jax.value_and_grad(loss)(jnp.asarray(sums[real]), np.float64(batch["ref_logprob"][real]))
    cotangent = np.zeros(batch["tokens"].shape, np.float32)
    cotangent[real] = np.where(batch["mask"][real], np.asarray(slope)[..., None], 0)
    return float(value), pull(problem.initial(), batch, cotangent)[1]


def test_a_sum_is_a_weighted_sum_of_means_over_rows_and_over_tokens():
    batch = batch_of()
    trained = batch["mask"] & (batch["positions"] > 0) & batch["labels"][..., None]  # padding rows have no mask
    assert trained.sum() < batch["mask"][:, 0].sum()
    nll = -logprobs_of(problem.initial(), batch)[trained].mean()
    _, nll_grad = pull(problem.initial(), batch, (-1.0 * trained / trained.sum()).astype(np.float32))
    dpo, dpo_grad, _ = found_in(1)["dpo"]
    expected = jax.tree.map(np.add, scaled(dpo_grad, 0.7), scaled(nll_grad, 0.3))
    for pieces in (1, 4):
        found = found_in(pieces)["dpo+nll"]
        assert_near(found, 0.7 * dpo + 0.3 * nll, expected)
        assert found[2]["loss/dpo"] == pytest.approx(dpo, rel=1e-5)
        assert found[2]["loss/nll"] == pytest.approx(nll, rel=1e-5)


# ---- what a pair is seen with


@pytest.mark.parametrize("most", [1, 2])
def test_shared_sums_are_those_of_a_loop_over_tokens(most):
    rng = np.random.default_rng(most)
    rows, lanes, length = 12, 2, 20
    values = rng.normal(size=(rows, lanes, length)).astype(np.float32)
    ends = np.sort(rng.integers(0, length + 1, (most, rows, lanes, 1)), axis=0)
    segments = sum(((np.arange(length) < end) for end in ends), np.zeros((rows, lanes, length), int))
    segments = np.where(segments > 0, most + 1 - segments, 0)  # 1s, then 2s, then padding
    mask = (rng.random(segments.shape) < 0.6) & (segments > 0)
    weight = np.ones((rows, most) if most > 1 else rows, np.float32)
    expected = {shared: np.zeros((rows, most, lanes)) for shared in (False, True)}
    for row in range(rows):
        for number in range(most):
            mine = mask[row] & (segments[row] == number + 1)
            places = [[t for t in range(length) if mine[lane, t]] for lane in range(lanes)]
            least = min(map(len, places))
            for lane, every in enumerate(places):
                for shared, some in ((True, every[:least]), (False, every)):
                    expected[shared][row, number, lane] = sum(values[row, lane, t] for t in some)
    batch = {"segments": segments, "mask": mask, "weight": weight, "tokens": segments}
    masked = np.where(mask, values, 0).reshape(-1, length)
    assert np.abs(expected[True] - expected[False]).max() > 1
    for shared, sums in expected.items():
        found = completion_sums(jnp.asarray(masked), batch, shared)
        np.testing.assert_allclose(found, sums.reshape(-1, lanes), atol=1e-5)


def test_length_alpha_weighs_what_stands_past_the_shared_length():
    """1 changes nothing, 0 is a pair cut to its shared length, and between them the margin moves in proportion."""
    batch = batch_of()
    cut, real = shared_mask(batch), batch["weight"] > 0
    plain, short = found_in(1)["dpo"], found_of(batch | {"mask": cut, "ref_logprob": batch["ref_shared"]}, 1)["dpo"]
    assert abs(plain[0] - short[0]) > 1e-2
    assert_near(found_of(batch, 1, 1.0)["ld"], *plain[:2])
    assert_near(found_of(batch, 1, 0.0)["ld"], *short[:2])
    policy, reference = (logprobs_of(params, batch) for params in (problem.initial(), moved(problem.initial(), 1)))
    seen = np.where(batch["mask"], np.where(cut, 1, 0.25), 0)
    margin = ((policy - reference) * seen).sum(-1)[real] @ [1, -1]
    assert found_of(batch, 1, 0.25)["ld"][0] == pytest.approx(np.logaddexp(0, -BETA * margin).mean(), rel=1e-5)


def test_wpo_weighs_each_pair_by_how_likely_the_policy_would_write_it():
    batch, params = batch_of(), problem.initial()
    rows = {name: cast(Any, column) for name, column in flat_rows(batch).items()}
    hidden = jax.jit(MODEL.apply)(params, rows["tokens"], rows["segments"], rows["positions"])
    dense = np.asarray(MODEL.logits(params, hidden), np.float64)
    logp = dense - np.log(np.exp(dense).sum(-1, keepdims=True))
    said = np.take_along_axis(logp[:, :-1], rows["tokens"][:, 1:, None], axis=2)[..., 0]
    aligned = said - np.log(np.exp(2 * logp[:, :-1]).sum(-1))
    shape, predicted = batch["tokens"].shape, rows["mask"][:, 1:] & (rows["segments"][:, :-1] > 0)
    total = np.where(predicted, aligned, 0).sum(-1).reshape(shape[:2])
    factor = np.exp((total / np.maximum(batch["mask"].sum(-1), 1)).sum(-1))[batch["weight"] > 0]
    assert np.ptp(factor) > 0.1

    def loss(policy: Any, reference: Any) -> Any:
        return -jnp.mean(jax.nn.log_sigmoid(BETA * ((policy - reference) @ np.array([1.0, -1.0]))) * factor)

    for pieces in (1, 4):
        assert_near(found_in(pieces)["wpo"], *direct(loss, batch))


# ---- losses that sort the global batch


def aot(policy: Any, reference: Any) -> Any:
    ours, theirs = (jnp.sort(x[:, 0] - x[:, 1]) for x in (policy, jnp.asarray(reference)))
    return -jnp.mean(jax.nn.log_sigmoid(BETA * (ours - theirs)))


def aot_unpaired(policy: Any, reference: Any) -> Any:
    chosen, rejected = jnp.sort(policy - reference, axis=0).T
    return -jnp.mean(jax.nn.log_sigmoid(BETA * (chosen - rejected)))


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_a_loss_that_sorts_is_that_of_a_sort_of_the_whole_batch(loss, pieces):
    batch = batch_of()
    real = batch["weight"] > 0
    own = batch["ref_logprob"][:, 0] - batch["ref_logprob"][:, 1]
    assert np.mean(batch["margin_partner"][real] != own[real]) > 0.5, "the ranks must differ from the rows"
    assert_near(found_in(pieces)[loss.__name__], *direct(loss, batch))


# ---- single answers


def test_kto_zero_is_kto_without_a_baseline():
    found = found_in(1)
    assert_near(found["kto_zero"], *found["kto"][:2], nats=1e-6)
    other = found_of(batch_of() | {"baseline": np.full(problem.ROWS, 1.0, np.float32)})
    assert abs(other["kto"][0] - found["kto"][0]) > 1e-3
    assert other["kto_zero"][0] == found["kto_zero"][0]


def test_kto_zero_asks_for_no_mismatched_rows():
    """Its rows are its batch; nothing is compiled for it."""
    made, rows = [], problem.make_rows()
    note = lambda program: made.append(program) or program
    (batch,) = make_prepare(MODEL, [part("kto_zero")], PLAIN, None, note)(cast(Any, None), rows)
    assert not made and all(batch[name] is column for name, column in rows.items())
    make_prepare(MODEL, [part("kto")], PLAIN, None, note)
    assert len(made) == 1
    assert READS[Answer].mismatched and READS[BareAnswer] == READS[Answer]._replace(mismatched=False)


# ---- the carry


@functools.cache
def travelled() -> list[tuple[Any, Any, Any]]:
    """(state, batch, next state) of updates of BCO with a moving reference, on batches of unlike weights.

    The reference is the tests' first parameters, from which the policy has come some way.
    """
    parts, config = [part("bco")], PreferenceConfig(sync_every=2)
    prepare = make_prepare(MODEL, parts, config, None)
    objective, advance = preference.make_objective(MODEL, parts, config), make_advance(parts, config)
    step = jax.jit(make_step(objective, problem.OPTIMIZER, advance=advance))
    state, seen = state_of(problem.initial(), parts, config), []
    state = dataclasses.replace(state, params=moved(problem.initial(), 2))
    for number, scale in enumerate((1.0, np.arange(problem.ROWS) % 4 == 0, 1 + np.arange(problem.ROWS) % 3)):
        rows = problem.make_rows(number)
        rows["weight"] = (rows["weight"] * scale).astype(np.float32)
        (batch,) = prepare(state, {name: x for name, x in rows.items() if name not in ("ref_logprob", "shift")})
        after, _ = step(state, batch)
        seen.append(jax.tree.map(np.asarray, (state, batch, after)))
        state = after
    return seen


def test_the_shift_is_the_mean_reward_of_all_answers_before():
    total = count = 0.0
    means = [0.0]
    for state, batch, after in travelled():
        np.testing.assert_allclose(batch["shift"], np.full(problem.ROWS, means[-1]), rtol=1e-5)
        policy, reference = (logprobs_of(params, batch).sum(-1) for params in (state.params, state.carry["reference"]))
        total += (BETA * (policy - reference) * batch["weight"][:, None]).sum()
        count += 2 * batch["weight"].sum()
        means.append(total / count)
        np.testing.assert_allclose(after.carry["shift"]["mean"], means[-1], rtol=1e-5)
        assert after.carry["shift"]["count"] == count
    assert np.abs(np.diff(means)).min() > 1e-2, means


def same(one: Any, other: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_the_reference_moves_towards_the_policy_when_it_is_time():
    """Every second update, leaf by leaf; the columns of the batch after it are those of where it went."""
    begin = problem.initial()
    first, second, third = (after for _, _, after in travelled())
    assert same(first.carry["reference"], begin)
    mixed = jax.tree.map(lambda new, old: 0.25 * np.float64(new) + 0.75 * np.float64(old), second.params, begin)
    for leaf, expected, old in zip(*map(jax.tree.leaves, (second.carry["reference"], mixed, begin)), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7)
        assert np.abs(leaf - old).max() > 1e-3
    assert same(third.carry["reference"], second.carry["reference"]) and not same(third.params, second.params)
    for number, reference in enumerate((begin, begin, mixed)):
        batch = travelled()[number][1]
        columns = logprobs_of(jax.tree.map(np.float32, reference), batch).sum(-1)
        np.testing.assert_allclose(batch["ref_logprob"], columns, rtol=1e-5)
    assert np.abs(columns - logprobs_of(begin, batch).sum(-1)).max() > 0.1
