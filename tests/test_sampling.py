"""The sampler: its log-probabilities are the trainer's, and a completion doesn't depend on its neighbours."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest
from test_sampling_distribution import oracle

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models.decoder import Model
from rlhf_jax.models.rope import Rope
from rlhf_jax.models.shape import Kind
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Completion, Sampler, bucket

KEY = jax.random.PRNGKey(7)
STOP = (11, 12, 13)
SAMPLINGS = [
    Sampling(temperature=0.5),
    Sampling(),
    Sampling(temperature=1.5),
    Sampling(temperature=1.2, top_k=5),
    Sampling(temperature=0.9, top_p=0.7),
    Sampling(temperature=1.1, min_p=0.1),
    Sampling(temperature=1.5, top_k=30, top_p=0.9, min_p=0.02),
]


def prompts(count: int = 11) -> list[np.ndarray]:
    """Prompts of 1 to 14 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, problem.SHAPE.vocab, 1 + 5 * i % 14) for i in range(count)]


@functools.cache
def sampler(slots: int = 8, samples: int = 1, mesh: tuple[int, int, int] = (1, 1, 1)) -> Sampler:
    return Sampler(problem.make_model(sharding.make_mesh(sharding.MeshShape(*mesh))), slots=slots, samples=samples)


def run(sampler: Sampler, sampling: Sampling, rows: list[int] | None = None) -> list[list[Completion]]:
    """Completions of the prompts whose numbers are `rows`, of at most 20 tokens."""
    rows = list(range(len(prompts()))) if rows is None else rows
    sampling = dataclasses.replace(sampling, max_new_tokens=20)
    given = [prompts()[row] for row in rows]
    return sampler.generate(problem.initial(), given, sampling, KEY, stop_ids=STOP, rows=rows)


@functools.cache
def reference() -> list[list[Completion]]:
    return run(sampler(), Sampling())


def tokens(rows: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.tokens.tolist() for completion in row] for row in rows]


def everything_once(model: Model, prompt: np.ndarray, completion: np.ndarray) -> dict[str, np.ndarray]:
    """A prompt with its completion as one training row of the problem's own length, 64."""
    row = np.zeros((1, problem.SHAPE.length), np.int32)
    length = len(prompt) + len(completion)
    row[0, :length] = [*prompt, *completion]
    place = np.arange(row.shape[1])[None]
    real = place < length
    return {
        "tokens": row, "segments": real.astype(np.int32), "positions": np.where(real, place, 0).astype(np.int32),
        "mask": real & (place >= len(prompt)),
    }  # fmt: skip


_stats = jax.jit(
    lambda params, rows, temperature: problem.make_model().token_stats(params, rows, temperature=temperature).logprobs
)
_logits = jax.jit(
    lambda params, rows: (model := problem.make_model()).logits(
        params, model.apply(params, rows["tokens"], rows["segments"], rows["positions"])
    )
)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sampling_logprobs_are_the_teacher_forced_ones(sampling):
    for row in run(sampler(), sampling):
        for completion in row:
            prompt = prompts()[completion.row]
            rows = everything_once(problem.make_model(), prompt, completion.tokens)
            forced = np.asarray(_stats(problem.initial(), rows, sampling.temperature))[rows["mask"]]
            np.testing.assert_allclose(completion.old_logprobs, forced, atol=1e-5)
            logits = np.asarray(_logits(problem.initial(), rows))[0, len(prompt) - 1 :]
            expected = [np.log(oracle(z, sampling)[token]) for z, token in zip(logits, completion.tokens, strict=False)]
            np.testing.assert_allclose(completion.behaviour_logprobs, expected, atol=1e-5)


def test_without_a_filter_both_kinds_of_logprobs_are_the_same():
    for (completion,) in reference():
        np.testing.assert_allclose(completion.old_logprobs, completion.behaviour_logprobs, atol=1e-6)


def test_rows_of_the_reference_are_worth_comparing():
    stops = {completion.stop for (completion,) in reference()}
    assert stops == {"end", "length"}
    assert len({tuple(completion.tokens) for (completion,) in reference()}) == len(reference())


@pytest.mark.parametrize("row", [0, 4, 10])
def test_a_row_alone_is_the_row_in_a_batch(row):
    assert tokens(run(sampler(slots=1), Sampling(), [row])) == tokens(reference()[row : row + 1])


@pytest.mark.parametrize("slots", [2, 3, 64])
def test_the_number_of_slots_and_the_order_of_refills_change_nothing(slots):
    order = np.random.default_rng(slots).permutation(len(reference())).tolist()
    mixed = run(sampler(slots=slots), Sampling(), order)
    assert tokens(mixed) == tokens([reference()[row] for row in order])


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_every_mesh_draws_the_same(mesh):
    rows = run(sampler(mesh=mesh), Sampling())
    assert tokens(rows) == tokens(reference())
    for (ours,), (theirs,) in zip(rows, reference(), strict=True):
        np.testing.assert_allclose(ours.old_logprobs, theirs.old_logprobs, atol=1e-5)
        assert ours.stop == theirs.stop


def test_several_samples_share_a_pass_and_differ_and_the_first_is_the_single_one():
    rows = run(sampler(samples=3), Sampling())
    assert tokens([row[:1] for row in rows]) == tokens(reference())
    assert all(len({tuple(c.tokens) for c in row}) == 3 for row in rows if len(row[0].tokens) > 3)


def test_a_row_ends_with_its_end_token_or_at_its_length():
    for (completion,) in reference():
        ends = np.isin(completion.tokens, STOP)
        assert not ends[:-1].any()
        assert completion.stop == ("end" if ends[-1] else "length")
        assert completion.stop == "end" or len(completion.tokens) == 20


def test_the_context_ends_a_row_too():
    prompt = np.arange(60) % problem.SHAPE.vocab
    ((completion,),) = sampler().generate(problem.initial(), [prompt], Sampling(max_new_tokens=20), KEY)
    assert (completion.stop, len(completion.tokens)) == ("length", problem.SHAPE.length - 60)


def test_one_program_a_bucket_whatever_the_numbers():
    fresh = Sampler(problem.make_model(), slots=4)
    for sampling in (Sampling(), Sampling(temperature=0.0), Sampling(top_k=3, top_p=0.5, repetition_penalty=1.1)):
        run(fresh, sampling)
        run(fresh, sampling, [3, 1])
    assert fresh.compiles == 1
    fresh.generate(problem.initial(), [np.arange(17)], Sampling(max_new_tokens=20), KEY)
    assert fresh.compiles == 2


def test_a_stream_gives_what_there_is_and_ends_in_the_whole():
    seen: dict[int, list[int]] = {}
    sampling = Sampling(max_new_tokens=20)
    for part in sampler().stream(problem.initial(), prompts(), sampling, KEY, stop_ids=STOP, steps=3):
        before = seen.get(part.row, [])
        assert part.tokens.tolist()[: len(before)] == before
        assert part.stop or len(part.tokens) <= len(before) + 3
        seen[part.row] = part.tokens.tolist()
    assert [[seen[row]] for row in range(len(prompts()))] == tokens(reference())


def test_greedy_rows_do_not_repeat_under_a_strong_penalty():
    free = run(sampler(), Sampling(temperature=0.0))
    held = run(sampler(), Sampling(temperature=0.0, repetition_penalty=1e6))
    assert any(len(set(c.tokens)) < len(c.tokens) for (c,) in free)
    for (completion,) in held:
        whole = [*prompts()[completion.row], *completion.tokens]
        drawn = whole[len(prompts()[completion.row]) :]
        assert len(set(drawn)) == len(drawn) and not set(drawn) & set(prompts()[completion.row].tolist())


def test_samples_follow_the_exact_distribution_of_a_small_model():
    shape = dataclasses.replace(problem.SHAPE, vocab=6, length=16)
    model = Model(shape, layout=Layout(sharding.make_mesh(sharding.MeshShape(1, 1, 1))))
    params = jax.jit(model.init)(jax.random.key(3))
    prompt, sampling, count = np.asarray([1, 4], np.int32), Sampling(temperature=1.3, max_new_tokens=2), 20_000
    rows = jnp.asarray([[*prompt, a, b] for a in range(6) for b in range(6)], jnp.int32)
    places = jnp.broadcast_to(jnp.arange(4), rows.shape)
    batch = {"tokens": rows, "segments": jnp.ones_like(rows), "positions": places, "mask": places >= 2}
    exact = np.exp(model.token_stats(params, batch, temperature=1.3).logprobs.sum(axis=1, dtype=jnp.float32))
    assert abs(exact.sum() - 1) < 1e-4
    drawn = Sampler(model, slots=2000, samples=2000).generate(params, [prompt] * 10, sampling, KEY)
    cells = np.bincount([6 * c.tokens[0] + c.tokens[1] for row in drawn for c in row], minlength=36)
    chi = float(np.sum((cells - count * exact) ** 2 / (count * exact)))
    assert chi < chi_squared_999(35), chi
    wrong = np.roll(exact, 1)
    assert np.sum((cells - count * wrong) ** 2 / (count * wrong)) > 10 * chi_squared_999(35)


def chi_squared_999(freedom: int) -> float:
    """The 99.9% point of chi-squared (Wilson and Hilferty 1931), right to 0.3% from 10 degrees of freedom on."""
    return freedom * (1 - 2 / (9 * freedom) + 3.0902 * math.sqrt(2 / (9 * freedom))) ** 3


def test_a_cached_token_sees_what_a_whole_row_sees():
    model = problem.make_model()
    rows = problem.make_rows(completions=1)
    row = {name: jnp.asarray(rows[name][:, 0]) for name in ("tokens", "segments", "positions")}
    whole = model.apply(problem.initial(), **row)
    hidden, cache = model.prefill(problem.initial(), **row)
    chex.assert_trees_all_close(hidden, whole, atol=1e-6)
    last = jnp.maximum(row["segments"].sum(axis=1) - 1, 0)
    at = lambda x: jnp.take_along_axis(x, last.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]
    order = np.random.default_rng(0).permutation(problem.LENGTH)  # columns may lie in any order
    shuffled = jax.tree.map(lambda x: x[:, :, :, order], cache)
    distance = (last[:, None] - jnp.arange(problem.LENGTH)[None])[:, order]
    alone, new = model.decode(problem.initial(), at(row["tokens"]), last, shuffled, distance)
    real = row["segments"].sum(axis=1) > 0
    np.testing.assert_allclose(alone[real], at(whole)[real], atol=1e-5)
    own = jnp.take_along_axis(cache.keys, last[None, :, None, None, None], axis=3)
    np.testing.assert_allclose(new.keys[:, real], own[:, real], atol=1e-5)


@pytest.mark.parametrize("prompt", [np.arange(0), np.zeros(64, np.int64)], ids=["empty", "as long as the context"])
def test_a_prompt_that_does_not_fit_is_one_sentence(prompt):
    with pytest.raises(UserError, match="prompt number 2 has .* it must have at least 1 and fewer than the model's"):
        sampler().generate(problem.initial(), [np.arange(3), prompt], Sampling(), KEY)


def test_a_row_never_passes_the_point_where_its_rope_turns_otherwise():
    """A cache holds keys that are turned already."""
    rope = Rope(kind="longrope", short_factor=(1.0,) * 4, long_factor=(2.0,) * 4, original_length=20)
    shape = dataclasses.replace(problem.SHAPE, kinds=(Kind(rope=rope),))
    sampler = Sampler(Model(shape), slots=1)
    with pytest.raises(UserError, match="prompt number 2 has 15 tokens .* may pass 20, .* at most 5 new tokens"):
        sampler.generate(problem.initial(), [np.arange(21), np.arange(15)], Sampling(max_new_tokens=6), KEY)


@pytest.mark.parametrize(("size", "expected"), [(1, 16), (16, 16), (17, 32), (40, 60), (60, 60)])
def test_buckets_are_powers_of_two_up_to_the_context(size, expected):
    assert bucket(size, 60) == expected


def test_the_real_model_tells_the_published_story(stories):
    from transformers import AutoTokenizer

    from rlhf_jax.models import checkpoint as hf

    model, params = hf.read(str(stories))
    greedy = Sampling(temperature=0.0, max_new_tokens=256)
    ((completion,),) = Sampler(model, slots=1).generate(params, [np.asarray([1], np.int32)], greedy, KEY, stop_ids=(2,))
    told = AutoTokenizer.from_pretrained(stories).decode(completion.tokens)
    assert told == (stories / "greedy.txt").read_text().removesuffix("\n")
