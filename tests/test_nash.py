"""Nash-MD: what a completion earns against the mixture, the equilibrium that it is learnt towards, and whole runs.

The arithmetic is that of a model that says what its parameters are, see tests/test_group.py; the mixture's sampler is
in tests/test_sampling_mixture.py.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import checks, run
from rlhf_jax.algorithms.nash import (
    LOSSES,
    NashConfig,
    earned,
    make_advance,
    make_carry,
    make_judge,
    make_objective,
    make_prepare,
    make_skip,
    refers,
)
from rlhf_jax.algorithms.online import OnlineConfig
from rlhf_jax.algorithms.optimizers import adamw
from rlhf_jax.algorithms.rollouts import Around, Models, RolloutConfig
from rlhf_jax.algorithms.step import Optimizer, TrainState, make_state, make_step
from rlhf_jax.config import Loss
from rlhf_jax.errors import UserError
from rlhf_jax.metrics import Log
from rlhf_jax.sampling.mixture import Both
from rlhf_jax.workdir import open_policy
from tests import problem
from tests import test_group as told
from tests.problem import scores
from tests.test_group import ENDED, GROUPS, LENGTH, LENGTHS, LOGPROBS, MASK, REF, ROWS, SAMPLES, TOLD, part
from tests.test_online import config_of as online_config
from tests.test_online import mean_of, params_of, place, scores_of
from tests.test_policy_losses import NUMBERS
from tests.test_ppo_runs import figures, same
from tests.test_rollouts import Tables, tables
from tests.test_run import Killed, lines

__all__ = ["place"]  # a fixture
AS_SCORED = NashConfig(missing_end="subtract", missing_end_score=0.0, kl=0.25)
KL = np.where(MASK, np.float64(LOGPROBS) - REF, 0).sum(axis=1)  # nats a completion, [ROWS]
MIRRORED = np.arange(ROWS)[::-1]  # which of them the mixture says: those of the first prompt are the last one's
VALUES = np.asarray([0.5, 2, -1, math.nan, 3, 1, -2, math.nan, -1, 7, 7, 6.5], np.float32)


def hyper_of(name: str, config: NashConfig, temperature: float = 1.0) -> Any:
    own = {"nash": config.numbers, "rollout": {"temperature": temperature}}
    return jax.tree.map(jnp.float32, problem.numbers_of(name, **NUMBERS[name]) | own)


def mixed(seen: list[Any]) -> Any:
    """Draws as many completions of the same prompts; keeps what it was asked for."""

    def draw(params: Both, rows: Any, key: Any) -> Any:
        seen.append((params, np.asarray(key)))
        made = told.draw(None, rows, key)
        number = np.where(made["weight"] > 0, made["tokens"][:, 0, 0] // LENGTH, -1)
        said = MIRRORED[np.maximum(number, 0)]
        return made | {
            "tokens": (said[:, None] * LENGTH + np.arange(LENGTH))[:, None].astype(np.int32),
            "mask": MASK[said][:, None], "ended": ENDED[said],
        }  # fmt: skip

    return draw


def prepared(
    config: NashConfig = AS_SCORED,
    values: Any = VALUES,
    *,
    name: str = "reinforce",
    more: int = 0,
    held_out: bool = False,
    temperature: float = 1.0,
    seen: list[Any] | None = None,
    keys: list[Any] | None = None,
) -> Any:
    """The one batch of the four prompts in their order; `more` prompts of padding behind them."""
    keys = [] if keys is None else keys

    def draw(params: Any, rows: Any, key: Any) -> Any:
        keys.append(np.asarray(key))
        return told.draw(params, rows, key)

    hyper = hyper_of(name, config, temperature)
    state = TrainState(params_of(LOGPROBS), None, None, jnp.int32(0), told.key(), None, hyper)
    rollout = RolloutConfig(max_new_tokens=told.MOST, samples=SAMPLES)
    around = Around(draw, scores_of(values), rollout, held_out=held_out, mixed=mixed([] if seen is None else seen))
    prepare = make_prepare(TOLD, (part(name),), config, (TOLD.policy, params_of(REF)), jax.jit, around)
    (made,) = prepare(state, {"index": np.arange(GROUPS + more)})
    made = jax.tree.map(np.asarray, made)
    if held_out:
        return made
    order = np.lexsort((made["tokens"][:, 0, 0], made["weight"] == 0))
    return jax.tree.map(lambda x: x[order], made)


def objective_of(batch: Any, config: NashConfig = AS_SCORED, name: str = "reinforce", moved: float = 0.0) -> Any:
    objective = make_objective(TOLD, (part(name),), config)
    return objective(params_of(LOGPROBS + np.float32(moved)), None, hyper_of(name, config), batch, told.key())


def counted(config: NashConfig, values: Any) -> tuple[np.ndarray, np.ndarray]:
    """The scores as they count, and which are judged, float64 [ROWS]."""
    given, missing = np.nan_to_num(np.float64(values)), config.missing_end_score
    lost = missing if config.missing_end == "replace" else given - abs(missing)
    return np.where(ENDED, given, lost), np.isfinite(values)


def oracle(config: NashConfig, values: Any = VALUES) -> tuple[np.ndarray, np.ndarray]:
    """The chance of being preferred of each completion, NaN for one that isn't compared, and its advantage."""
    mine, judged = counted(config, values)
    theirs, known = mine[MIRRORED], judged[MIRRORED]
    chances = np.full(ROWS, math.nan)
    for row in np.flatnonzero(judged):
        others = [j for j in range(ROWS) if j // SAMPLES == row // SAMPLES and known[j]]
        if others:
            chances[row] = np.mean([1 / (1 + math.exp(theirs[j] - mine[row])) for j in others])
    return chances, np.nan_to_num(chances - 0.5 - config.kl * KL)


# ---- what a completion earns


@pytest.mark.parametrize("more", [0, 2])
@pytest.mark.parametrize(
    "config", [AS_SCORED, NashConfig(kl=0.1, missing_end_score=-3.0), dataclasses.replace(AS_SCORED, kl=0.0)]
)
def test_a_completion_earns_how_often_it_would_win_less_its_kl(config, more):
    batch = prepared(config, more=more)
    chances, advantages = oracle(config)
    assert np.isnan(chances).sum() == 2, "nothing judges them"
    np.testing.assert_allclose(told.by_row(batch)[:ROWS], advantages, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch["weight"], [1] * ROWS + [0] * SAMPLES * more)
    np.testing.assert_array_equal(batch["tokens"][:ROWS, 0, 0], np.arange(ROWS) * LENGTH)
    means = objective_of(batch, config)[1]
    assert mean_of(means["nash/win_rate"]) == pytest.approx(np.nanmean(chances), rel=1e-5)
    scored, _ = counted(config, VALUES)
    assert mean_of(means["objective/score"]) == pytest.approx(scored.mean(), rel=1e-5)
    assert mean_of(means["nash/mixture_score"]) == pytest.approx(scored[MIRRORED].mean(), rel=1e-5)
    assert mean_of(means["objective/kl"]) == pytest.approx(KL.mean(), rel=1e-5)
    assert mean_of(means["completions/length"]) == pytest.approx(LENGTHS.mean())


def test_a_prompt_whose_opponents_are_not_judged_teaches_nothing():
    values = np.where(np.arange(ROWS) < SAMPLES, np.float32(math.nan), np.arange(ROWS, dtype=np.float32))
    batch = prepared(values=values)
    advantages = oracle(AS_SCORED, values)[1]
    assert not advantages[:SAMPLES].any() and not advantages[-SAMPLES:].any()
    np.testing.assert_allclose(told.by_row(batch), advantages, rtol=1e-5, atol=1e-6)
    assert objective_of(batch)[1]["nash/win_rate"].count == ROWS - 2 * SAMPLES


def test_among_equals_only_the_kl_is_left():
    batch = prepared(values=np.full(ROWS, 0.1, np.float32))
    np.testing.assert_array_equal(batch["preferred"], 0.5)
    np.testing.assert_allclose(told.by_row(batch), -0.25 * KL, rtol=1e-5, atol=1e-6)
    free = dataclasses.replace(AS_SCORED, kl=0.0)
    assert not prepared(free, np.full(ROWS, 0.1, np.float32))["advantages"].any()


def test_prompts_and_opponents_in_another_order_earn_the_same():
    rng = np.random.default_rng(0)
    mine = {"score": rng.normal(size=ROWS), "sequence_kl": rng.normal(size=ROWS), "judged": rng.random(ROWS) > 0.2}
    mine |= {"mask": MASK[:, None], "weight": np.ones(ROWS)}
    theirs = {"score": rng.normal(size=ROWS), "judged": rng.random(ROWS) > 0.3}
    of = lambda one, other: jax.tree.map(np.asarray, earned(one, other, jnp.float32(0.1), SAMPLES))
    plain, rows = of(mine, theirs), lambda order: (SAMPLES * order[:, None] + np.arange(SAMPLES)).reshape(-1)
    order = rows(rng.permutation(GROUPS))
    at = lambda tree, order: jax.tree.map(lambda x: x[order], tree)
    jax.tree.map(np.testing.assert_array_equal, of(at(mine, order), at(theirs, order)), at(plain, order))
    within = np.concatenate([SAMPLES * g + rng.permutation(SAMPLES) for g in range(GROUPS)])
    np.testing.assert_allclose(of(mine, at(theirs, within))["advantages"], plain["advantages"], rtol=1e-5, atol=1e-6)


def test_the_mixture_is_of_policy_and_reference_and_draws_with_randomness_of_its_own():
    seen, keys = [], []
    prepared(dataclasses.replace(AS_SCORED, mixture=0.375), seen=seen, keys=keys)
    ((both, key),) = seen
    np.testing.assert_array_equal(both.policy["logprobs"], LOGPROBS)
    np.testing.assert_array_equal(both.reference["logprobs"], REF)
    assert both.share == 0.375 and (key != keys[0]).any()


def test_held_out_rollouts_are_the_policys_alone():
    seen: list[Any] = []
    config = NashConfig(missing_end_score=-3.0)
    batch = prepared(config, np.nan_to_num(VALUES), more=2, held_out=True, seen=seen)
    assert not seen and {"opponent", "preferred"}.isdisjoint(batch)
    terms, means, rows = make_judge(TOLD, ())({}, None, {}, batch, told.key())
    scored = np.where(ENDED, np.nan_to_num(VALUES), -3)
    np.testing.assert_allclose(rows["loss"][:ROWS], -scored)
    np.testing.assert_allclose(rows["kl"][:ROWS], KL, rtol=1e-5)
    assert terms["loss"].count == ROWS and mean_of(terms["loss"]) == pytest.approx(-scored.mean())
    assert mean_of(means["kl"]) == pytest.approx(KL.mean(), rel=1e-5)


# ---- the loss


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_gradient_is_that_of_the_policy_at_ratio_1(name):
    """-A of the row at each token over the loss's own denominator; and nothing of padding or of the mixture."""
    batch = prepared(name=name, more=2)
    terms, means = objective_of(batch, name=name)
    assert means["policy/ratio"].total == means["policy/ratio"].count == LENGTHS.sum()
    assert means["policy/approxkl"].total == 0
    objective, hyper = make_objective(TOLD, (part(name),), AS_SCORED), hyper_of(name, AS_SCORED)
    loss = lambda p: objective(p, None, hyper, batch, told.key())[0]["policy"].total
    slope = np.asarray(jax.grad(loss)(params_of(np.nan_to_num(LOGPROBS)))["logprobs"])
    each = {"grpo": LENGTHS, "gspo": LENGTHS, "sapo": LENGTHS, "gmpo": LENGTHS}.get(name, np.ones(ROWS))
    each = np.full(ROWS, NUMBERS[name]["length"]) if name == "dr_grpo" else each
    expected = np.where(MASK, -(oracle(AS_SCORED)[1] / each)[:, None], 0)
    if name not in ("sapo", "vespo"):
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.sign(slope), np.sign(expected))


def test_log_ratios_and_the_price_are_of_the_samplers_temperature():
    batch = prepared(temperature=0.5)
    np.testing.assert_allclose(batch["sequence_kl"], 2 * KL, rtol=1e-5)
    with_it = dataclasses.replace(AS_SCORED, kl=2 * AS_SCORED.kl)
    np.testing.assert_allclose(told.by_row(batch), oracle(with_it)[1], rtol=1e-5, atol=1e-6)


# ---- the equilibrium, of two tables of logits


DRAWN, ITERATIONS, PRICE = 512, 100, 0.15


def draw_from_tables(logits: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    row = jnp.arange(2 * DRAWN)
    which = row // DRAWN
    tokens = jnp.stack([which, jax.random.categorical(key, logits[which])], axis=1)[:, None]
    place = jnp.broadcast_to(jnp.arange(2)[None, None], tokens.shape)
    return {
        "tokens": tokens, "mask": place > 0, "segments": jnp.ones_like(tokens), "positions": place,
        "weight": jnp.ones(row.shape), "index": which, "ended": row >= 0,
    }  # fmt: skip


def strength() -> np.ndarray:
    """Rewards that are wide enough for preferences to be far from a straight line."""
    return 2 * tables()[0]


@functools.cache
def learner() -> tuple[Any, Any, Any]:
    """The optimiser, prepare and the step that all shares of the reference have together."""
    models = Models(cast(Any, Tables()), None)
    score = lambda batch: scores(strength()[tuple(np.asarray(batch["tokens"])[:, 0].T)])
    policy = jax.jit(lambda params, rows, key: draw_from_tables(params["logits"], key))
    mixture = jax.jit(
        lambda both, rows, key: draw_from_tables(
            (1 - both.share) * both.policy["logits"] + both.share * both.reference["logits"], key
        )
    )
    around = Around(policy, score, RolloutConfig(samples=DRAWN), mixed=mixture)
    parts, reference = (part("reinforce"),), (models.policy, {"logits": jnp.asarray(tables()[1])})
    prepare = make_prepare(models, parts, AS_SCORED, reference, jax.jit, around)
    optimizer = Optimizer(adamw, optax.cosine_decay_schedule(1.0, ITERATIONS))
    step = make_step(make_objective(models, parts, AS_SCORED), optimizer)
    return optimizer, prepare, jax.jit(step, donate_argnums=0)


def fixed_point(share: float) -> np.ndarray:
    """pi = ref exp(P(y > pi') / price) / Z with pi' of pi and ref, [2, actions] float64; at share 0 the equilibrium."""
    rewards, logits = (np.asarray(x, np.float64) for x in (strength(), tables()[1]))
    chance = 1 / (1 + np.exp(rewards[:, None] - rewards[:, :, None]))
    soft = lambda z: (p := np.exp(z - z.max(axis=1, keepdims=True))) / p.sum(axis=1, keepdims=True)
    z = logits.copy()
    for _ in range(4000):
        opponent = soft((1 - share) * z + share * logits)
        new = logits + np.einsum("gab,gb->ga", chance, opponent) / PRICE
        z += 0.05 * (new - new.max(axis=1, keepdims=True) - z)
    assert np.abs(soft(new) - soft(z)).max() < 1e-9
    return soft(z)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_it_reaches_the_regularised_equilibrium(share):
    """At share 0 the Nash equilibrium of the game whose payoff is P(y > y') with each side's KL at that price."""
    optimizer, prepare, step = learner()
    config = dataclasses.replace(AS_SCORED, mixture=share, kl=PRICE)
    hyper: Any = problem.numbers_of("reinforce")
    rates = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-5, "weight_decay": 0.0, "clip_norm": math.inf}
    hyper |= {"nash": config.numbers, "rollout": {"temperature": 1.0}, "optimizer": rates}
    state = make_state({"logits": jnp.array(tables()[1])}, hyper, optimizer, told.key())
    for _ in range(ITERATIONS):
        (batch,) = prepare(state, {})
        state, _ = step(state, batch)
    found, reference = (np.asarray(jax.nn.softmax(x)) for x in (state.params["logits"], tables()[1]))
    distance = lambda p, q: 0.5 * np.abs(p - q).sum(axis=1)
    assert distance(reference, fixed_point(share)).min() > 0.3, "there must be something to learn"
    assert distance(fixed_point(0.5 - share), fixed_point(share)).max() > 0.05, "the share must matter"
    assert distance(found, fixed_point(share)).max() < 0.02, distance(found, fixed_point(share))


# ---- whole runs


def config_of(place: pathlib.Path, **changes: Any) -> Any:
    """Rollouts of 16 prompts with two answers each, learnt from in four updates of sixteen completions."""
    config = dataclasses.replace(online_config(place, **changes), online=OnlineConfig())
    nash = dataclasses.replace(config.nash, missing_end="subtract", missing_end_score=0.0)
    return dataclasses.replace(config, algorithm="nash", loss=Loss(name="ppo"), nash=nash)


def train(place: pathlib.Path, name: str, **changes: Any) -> pathlib.Path:
    run.train(config_of(place, **changes), str(place / name), resume=True)
    return place / name


REFUSED = {
    "a share above 1": ({"nash__mixture": 1.5}, "nash.mixture=1.5 is not allowed; it must be from 0 to 1"),
    "a negative price": ({"nash__kl": -0.1}, "nash.kl=-0.1 is not allowed; it must be at least 0"),
    "no number": ({"nash__mixture": math.nan}, "nash.mixture=nan is not allowed; it must be finite"),
    "another's section": ({"rejection__least": 0.0}, "'nash' would ignore --config.rejection.least"),
    "samples that don't divide": ({"rollout__samples": 3}, "= 32 completions, which --config.rollout.samples=3"),
    "rows": ({"train__batch_size": 17, "train__microbatches": 2}, "=17 does not divide into 2 microbatches over"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_means_nothing_is_one_sentence(place, case):
    changes, says = REFUSED[case]
    with pytest.raises(UserError, match=says):
        checks.check(config_of(place, **changes))


def test_what_it_is_is_said_and_the_ends_of_the_mixture_are_allowed(place):
    for changes in ({}, {"nash__mixture": 0.0}, {"nash__mixture": 1.0, "nash__kl": 0.0}, {"rollout__samples": 1}):
        checks.check(config_of(place, **changes))
    with pytest.raises(UserError, match=r"'nash' can't run the loss 'dpo'; .* or use --config.algorithm=preference"):
        checks.check(dataclasses.replace(config_of(place), loss=Loss(name="dpo")))
    assert NashConfig().numbers == {"missing_end_score": -1.0, "mixture": 0.125, "kl": 0.008} and refers(NashConfig())
    assert [make_carry((), None, {}, {}), make_advance((), None), make_skip((), None)] == [None] * 3


@pytest.fixture(scope="module")
def whole(place) -> pathlib.Path:
    return train(place, "nash")


def test_a_run_begins_even_and_moves(whole):
    rows, evaluations = lines(whole / "metrics.jsonl"), lines(whole / "eval.jsonl")
    assert rows[0]["policy/ratio"] == 1 and rows[0]["policy/approxkl"] == 0
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6) and abs(rows[4]["objective/kl"]) > 1e-6
    assert 0 < rows[0]["nash/win_rate"] < 1 and abs(rows[1]["policy/ratio"] - 1) > 1e-7
    assert {"kl", "entropy", "nash/mixture_score", "objective/score", "clip_ratio/low"} <= set(rows[0])
    assert [row["step"] for row in evaluations] == [0, 4, 8]
    for row in evaluations:
        assert row["eval/loss"] == pytest.approx(-row["eval/score"], rel=1e-6)
    samples = lines(whole / "samples.jsonl")
    assert len(samples) == 3 * 2 * len(lines(whole / "held_out.jsonl")) and "kl" in samples[0]
    assert open_policy(str(whole)).model.shape.head == "words"


def test_without_a_learning_rate_ratios_stay_1_and_the_kl_from_an_adapters_base_0(place):
    still = train(place, "still", optimizer__learning_rate=0.0, lora__rank=2, nash__mixture=0.5, train__steps=4)
    rows = lines(still / "metrics.jsonl")
    assert len(rows) == 4
    for row in rows:
        assert row["policy/ratio"] == 1 and row["kl"] == row["objective/kl"] == row["policy/approxkl"] == 0
        assert row["nash/mixture_score"] != row["objective/score"] and abs(row["nash/win_rate"] - 0.5) < 0.1


def test_a_run_that_was_killed_in_a_rollout_goes_on_to_the_same_bits(whole, place, monkeypatch):
    write = Log.step

    def killed(self: Log, row: dict[str, float], tokens: int) -> None:
        if row["step"] == 6:
            raise Killed
        write(self, row, tokens)

    with monkeypatch.context() as context, pytest.raises(Killed):
        context.setattr(Log, "step", killed)
        train(place, "killed_nash", checkpoint__every=1)
    train(place, "killed_nash", checkpoint__every=1)
    assert same(whole, place / "killed_nash") and figures(place / "killed_nash")[-1] == figures(whole)[-1]
    assert figures(place / "killed_nash", "eval.jsonl")[-1] == figures(whole, "eval.jsonl")[-1]
