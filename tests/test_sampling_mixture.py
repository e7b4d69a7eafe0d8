"""Drawing from the mixture of two models: at its ends one of them, in between the oracle's distribution."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import fields, sharding
from rlhf_jax.config import Config
from rlhf_jax.models import lora
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.mixture import Both, Mixture
from rlhf_jax.sampling.sampler import Completion, Sampler
from tests import problem

KEY = jax.random.PRNGKey(3)
STOP = (11, 12, 13)
TEMPERATURE = 0.8
NEW = 12
Rows = list[list[Completion]]


def model_on(shape: tuple[int, int, int] = (1, 1, 1)) -> Model:
    return problem.make_model(sharding.make_mesh(sharding.MeshShape(*shape)))


@functools.cache
def other() -> Any:
    """The reference: weights that are near the policy's and say something else."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: (x + rng.normal(0, 0.2, x.shape)).astype(np.float32), problem.initial())


def prompts() -> list[np.ndarray]:
    """Seven of 1 to 13 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, problem.SHAPE.vocab, 1 + 5 * i % 13) for i in range(7)]


@functools.cache
def mixed(shape: tuple[int, int, int] = (1, 1, 1)) -> Sampler:
    """Slots for fewer rows than there are, so that some are filled again."""
    return Sampler(Mixture(model_on(shape), model_on(shape)), slots=8, samples=2)


def draw(sampler: Sampler, params: Any) -> Rows:
    return sampler.generate(params, prompts(), Sampling(TEMPERATURE, max_new_tokens=NEW), KEY, stop_ids=STOP)


def both(share: float) -> Both:
    return Both(problem.initial(), other(), jnp.float32(share))


def numbers(rows: Rows) -> list[Any]:
    return [(one.tokens.tolist(), one.old_logprobs.tolist(), one.stop) for row in rows for one in row]


@jax.jit
def _logits(params: Any, rows: Any) -> jax.Array:
    model = problem.make_model()
    return model.logits(params, model.apply(params, rows["tokens"], rows["segments"], rows["positions"]))


def forced(params: Any, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    """What one model says of each token of a completion, tempered and normalised, [n, V] float64."""
    row = np.zeros((1, problem.SHAPE.length), np.int32)
    length = len(prompt) + len(completion)
    row[0, :length] = [*prompt, *completion]
    place = np.arange(row.shape[1])[None]
    real = place < length
    rows = {"tokens": row, "segments": real.astype(np.int32), "positions": np.where(real, place, 0)}
    z = np.asarray(_logits(params, rows), np.float64)[0, len(prompt) - 1 : length - 1] / TEMPERATURE
    return z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)


def oracle(share: float, prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    """The mixture of two tempered distributions, log-probabilities [n, V]."""
    weighted = (1 - share) * forced(problem.initial(), prompt, completion) + share * forced(other(), prompt, completion)
    return weighted - np.log(np.exp(weighted).sum(axis=1, keepdims=True))


def test_at_its_ends_the_mixture_is_one_of_its_models_bit_for_bit():
    alone = Sampler(model_on(), slots=8, samples=2)
    policy, reference = (numbers(draw(alone, params)) for params in (problem.initial(), other()))
    assert policy != reference
    assert numbers(draw(mixed(), both(0.0))) == policy
    assert numbers(draw(mixed(), both(1.0))) == reference
    assert {stop for *_, stop in policy} == {"end", "length"}


@pytest.mark.parametrize("share", [0.125, 0.6])
def test_what_is_said_of_a_token_is_the_mixture_of_what_both_models_say_of_it(share):
    rows = draw(mixed(), both(share))
    for completion in [one for row in rows for one in row]:
        said = oracle(share, prompts()[completion.row], completion.tokens)
        expected = said[np.arange(len(completion.tokens)), completion.tokens]
        np.testing.assert_allclose(completion.old_logprobs, expected, atol=1e-5)
        np.testing.assert_allclose(completion.behaviour_logprobs, expected, atol=1e-5)
    assert numbers(rows) not in (numbers(draw(mixed(), both(end))) for end in (0.0, 1.0))


def test_tokens_come_as_often_as_the_mixture_says():
    drawn, share, prompt = 4096, 0.5, prompts()[2]
    sampler = Sampler(Mixture(model_on(), model_on()), slots=drawn, samples=drawn)
    (row,) = sampler.generate(both(share), [prompt], Sampling(TEMPERATURE, max_new_tokens=1), KEY)
    found = np.bincount([int(one.tokens[0]) for one in row], minlength=problem.SHAPE.vocab) / drawn
    expected, *ends = (np.exp(oracle(x, prompt, np.zeros(1, int))[0]) for x in (share, 0.0, 1.0))
    distance = lambda p: 0.5 * np.abs(found - p).sum()
    assert distance(expected) < 0.06 and min(map(distance, ends)) > 0.12


def test_another_share_compiles_nothing_and_every_mesh_draws_the_same():
    plain = draw(mixed(), both(0.3))
    draw(mixed(), both(0.4))
    assert mixed().compiles == 1
    for one, ours in zip(draw(mixed((2, 2, 2)), both(0.3)), plain, strict=True):
        assert [c.tokens.tolist() for c in one] == [c.tokens.tolist() for c in ours]
        for a, b in zip(one, ours, strict=True):
            np.testing.assert_allclose(a.old_logprobs, b.old_logprobs, atol=1e-5)


def test_the_reference_of_an_adapted_policy_is_its_base():
    mesh = sharding.make_mesh(sharding.MeshShape(1, 1, 1))
    base = model_on()
    model = lora.attach(fields.replace(Config().lora, {"rank": 2}), base)
    rng = np.random.default_rng(2)
    adapter = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), lora.split(model.shapes())[0])
    adapted = jax.device_put(lora.join(adapter, problem.initial()), sharding.param_shardings(model.shapes(), mesh))
    sampler = Sampler(Mixture(model, model.without_adapter()), slots=8, samples=2)
    ends = [numbers(draw(sampler, Both(adapted, problem.initial(), jnp.float32(share)))) for share in (0.0, 1.0)]
    alone = lambda model, params: numbers(draw(Sampler(model, slots=8, samples=2), params))
    assert ends == [alone(model, adapted), alone(base, problem.initial())] and ends[0] != ends[1]


def test_the_share_is_published_as_it_is_and_the_weights_in_the_compute_dtype():
    model = dataclasses.replace(problem.make_model(compute_dtype="bfloat16"), layout=model_on().layout)
    params = Both(problem.initial(), other(), jnp.float32(0.3))
    made = jax.jit(lambda params: sharding.for_decoding(params, Mixture(model, model)))(params)
    assert made.share == np.float32(0.3) and made.share.dtype == jnp.float32
    assert {made.policy["head"].dtype, made.reference["head"].dtype} == {jnp.dtype("bfloat16")}
    assert made.reference["final_norm"].dtype == jnp.float32


def test_models_that_dont_fit_together_are_no_mixture():
    model = model_on()
    wider = dataclasses.replace(model, shape=dataclasses.replace(model.shape, vocab=128))
    with pytest.raises(ValueError, match="two models of one shape on one mesh"):
        Mixture(model, wider)
    with pytest.raises(ValueError, match="two models of one shape on one mesh"):
        Mixture(model, dataclasses.replace(model, layout=Layout()))
    with pytest.raises(ValueError, match="must lie on a mesh"):
        Mixture(problem.make_model(), problem.make_model())
