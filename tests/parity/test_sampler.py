"""The sampler's greedy completions are transformers' token for token, and its filters keep the same tokens."""

# pyright: reportMissingImports=false

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from rlhf_jax.models.decoder import Params
from rlhf_jax.sampling.distribution import Sampling, filtered, knobs
from rlhf_jax.sampling.sampler import Completion, Sampler
from tests.parity.checkpoints import EACH, VOCAB
from tests.parity.sides import TOLERANCE, Pair

NEW = 24
# The last ones are beyond every window, and the original length where the rope is stretched.
LENGTHS = (1, 2, 9, 16, 33, 57, 100)
SLOTS = 4  # fewer than prompts, so that slots are filled again
NEVER = VOCAB  # a token that the model does not have

Expected = list[tuple[np.ndarray, np.ndarray]]  # of each prompt, the tokens and their log-probabilities


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Torch's threads wait for each other longer than these sizes take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sampler(ours: Pair) -> Sampler:
    assert ours[0].numerics.compute_dtype == ours[0].numerics.param_dtype == "float32"
    return Sampler(ours[0], slots=SLOTS)


def _prompts(point: int | None) -> list[np.ndarray]:
    """None that a completion would carry past the point where longrope turns otherwise: that is refused."""
    random = np.random.default_rng(3)
    prompts = [random.integers(3, VOCAB, length).astype(np.int32) for length in LENGTHS]
    return [prompt for prompt in prompts if point is None or not len(prompt) <= point < len(prompt) + NEW]


def _ours(sampler: Sampler, params: Params, stop: int = NEVER, penalty: float = 1.0) -> list[Completion]:
    greedy = Sampling(temperature=0.0, max_new_tokens=NEW, repetition_penalty=penalty)
    prompts, key = _prompts(sampler.model.shape.turning_point), jax.random.key_data(jax.random.key(0))
    return [completion for (completion,) in sampler.generate(params, prompts, greedy, key, stop_ids=(stop,))]


def _theirs(model: PreTrainedModel, ours: Pair, stop: int = NEVER, penalty: float = 1.0) -> Expected:
    """Each prompt by itself: padding would count for the repetition penalty."""
    return [_completion(model, prompt, stop, penalty) for prompt in _prompts(ours[0].shape.turning_point)]


def _completion(model: PreTrainedModel, prompt: np.ndarray, stop: int, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, repetition_penalty=penalty,
        eos_token_id=stop, return_dict_in_generate=True, output_logits=True, output_scores=True,
    )  # fmt: skip
    likeliest = torch.cat(out.scores).topk(2).values
    margin = float((likeliest[:, 0] - likeliest[:, 1]).min())
    assert margin > TOLERANCE, f"two tokens are as good as tied ({margin:.1e}): draw other prompts"
    tokens = out.sequences[0, len(prompt) :]
    logprobs = torch.cat(out.logits).log_softmax(-1)
    return tokens.numpy(), logprobs[torch.arange(len(tokens)), tokens].numpy()


def _agree(got: list[Completion], expected: Expected) -> None:
    for completion, (tokens, logprobs) in zip(got, expected, strict=True):
        np.testing.assert_array_equal(completion.tokens, tokens)
        np.testing.assert_allclose(completion.old_logprobs, logprobs, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def plain(theirs: PreTrainedModel, ours: Pair) -> Expected:
    """Without an end token or a penalty."""
    return _theirs(theirs, ours)


@pytest.mark.parametrize("case", EACH, indirect=True, scope="session")
def test_greedy_completions_are_transformers(ours: Pair, sampler: Sampler, plain: Expected) -> None:
    assert all(len(tokens) == NEW for tokens, _ in plain)
    _agree(_ours(sampler, ours[1]), plain)


# What follows has nothing to do with the family.
few = pytest.mark.parametrize("case", ["llama3", "qwen2-windows", "pythia"], indirect=True, scope="session")


@few
def test_completions_end_where_transformers_do(
    ours: Pair, sampler: Sampler, theirs: PreTrainedModel, plain: Expected
) -> None:
    """With the end token as the last one of the completion on both sides."""
    stop = int(plain[2][0][NEW // 2])
    got = _ours(sampler, ours[1], stop)
    _agree(got, _theirs(theirs, ours, stop))
    assert got[2].stop == "end" and len(got[2].tokens) <= NEW // 2 + 1
    for completion in got:
        assert completion.stop == ("end" if stop in completion.tokens else "length")


@few
def test_the_repetition_penalty_is_transformers(
    ours: Pair, sampler: Sampler, theirs: PreTrainedModel, plain: Expected
) -> None:
    """Tokens of the prompt and of the completion count; the log-probabilities are those without a penalty."""
    expected = _theirs(theirs, ours, penalty=1.3)
    changed = [not np.array_equal(a, b) for (a, _), (b, _) in zip(expected, plain, strict=True)]
    assert sum(changed) > len(LENGTHS) // 2, "the penalty must be seen"
    _agree(_ours(sampler, ours[1], penalty=1.3), expected)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(40, 0.9, 0.02), (5, 0.95, 0.001), (90, 0.5, 0.01), (96, 0.99, 0.2), (1, 0.5, 0.5), (30, 1e-6, 0.1), (60, 0.8, 1)],
)
def test_the_filters_together_keep_the_tokens_that_transformers_keep(top_k: int, top_p: float, min_p: float) -> None:
    """Each after the other, in the order in which transformers' `generate` applies them."""
    scales = np.array([[0.3], [1.0], [3.0], [10.0]]).repeat(25, axis=0)
    logits = (np.random.default_rng(1).normal(size=(100, VOCAB)) * scales).astype(np.float32)
    warpers = LogitsProcessorList([TopKLogitsWarper(top_k), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)])
    expected = warpers(torch.zeros(100, 1, dtype=torch.int64), torch.from_numpy(logits.copy())).numpy()
    got = filtered(jnp.asarray(logits), knobs(Sampling(top_k=top_k, top_p=top_p, min_p=min_p), ()))
    np.testing.assert_array_equal(np.asarray(got), expected)
