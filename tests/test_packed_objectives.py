"""Packed equals unpacked: every kind of objective on real rows, log-probabilities to 1e-5 and gradients to 1e-4.

The same examples go through the same model twice: as the loader packs them, and each completion in a row of its
own. What a neighbour in the row could spoil (attention, positions, the first token, the reduction) would show.
"""

import dataclasses
import functools
import pathlib
import types
from typing import Any, cast

import jax
import numpy as np
import pytest
from etils import epath

from rlhf_jax.algorithms import preference
from rlhf_jax.algorithms.step import Batch, flat_rows, ratio
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.losses.preference import MeanPair, Pair, PolicyPair, SortedRatios
from rlhf_jax.losses.ranked import Ranked
from rlhf_jax.losses.supervised import SmoothTokens, Tokens
from rlhf_jax.losses.unpaired import Answer, ShiftedAnswer
from rlhf_jax.models.decoder import Model
from rlhf_jax.models.tokenizers import load_tokenizer
from tests.problem import PARTNERS, part
from tests.problem import SHAPE as SMALL
from tests.test_step import FAMILIES, every_loss, norm_of

LENGTH, ROWS, MOST, EXAMPLES = 256, 2, 4, 8
SHAPE = dataclasses.replace(SMALL, vocab=6400, width=16, length=LENGTH)
# What is read, as which format, for which form.
FILES = {
    "alpaca-en-demo": ("alpaca-en-demo/train.jsonl", "auto", "demonstration"),
    "oasst": ("oasst-en-100-trees/train.jsonl", "oasst", "demonstration"),
    "oasst ranked": ("oasst-en-100-trees/train.jsonl", "oasst_ranking", "pair"),
    "oasst in groups": ("oasst-en-100-trees/train.jsonl", "oasst_ranking", "ranking"),
    "hh-helpful-cleaned": ("hh-helpful-cleaned/train.jsonl", "auto", "pair"),
    "hh-helpful-cleaned as answers": ("hh-helpful-cleaned/train.jsonl", "auto", "labelled"),
    "llama-factory pairs": ("llama-factory-feedback/dpo_en_demo.train.jsonl", "auto", "pair"),
    "llama-factory labels": ("llama-factory-feedback/kto_en_demo.train.jsonl", "auto", "labelled"),
}


class Problem:
    """A model with its weights and tokenizer, and its programs, which all files share."""

    def __init__(self, model: Model, params: Any, encoder: Encoder):
        self.model, self.params, self.encoder = model, params, encoder

    @functools.cached_property
    def tokens(self) -> Any:
        """(params, rows) -> the log-probability of each token."""
        return jax.jit(lambda params, rows: self.model.token_stats(params, flat_rows(rows)).logprobs)

    @functools.cache  # noqa: B019 (lives as long as the module)
    def gradient(self, form: str) -> Any:
        """(params, batch, which) -> value and gradient of one of the losses of a form, in one program; their names."""
        single = (Tokens, SmoothTokens, Answer, ShiftedAnswer)
        kept = {"pair": (Pair, SortedRatios, PolicyPair, MeanPair, Tokens), "ranking": (Ranked,)}
        names = [FAMILIES[takes][0] for takes in kept.get(form, single)]  # packing sees what a loss takes
        objective = every_loss(self.model, names)

        def value(params: Any, batch: Batch, which: Any) -> Any:
            hyper = {"loss": {"which": which, "mix": 0.5, "beta": 0.1}}
            terms, _ = objective(params, None, hyper, batch, jax.random.PRNGKey(0))
            return sum(term.weight * ratio(term.total, term.count) for term in terms.values())

        return jax.jit(jax.value_and_grad(value)), names


@pytest.fixture(scope="module")
def problem(shared: pathlib.Path) -> Problem:
    """A random model with a tokenizer and chat template that people use."""
    tokenizer = load_tokenizer(epath.Path(shared / "data" / "tokenizers" / "minimind"))
    model = Model(SHAPE)
    return Problem(model, jax.jit(model.init)(jax.random.key(0)), Encoder(tokenizer))


def packed_batch(file: pathlib.Path, reading: str, form: Any, encoder: Encoder) -> Batch:
    """One batch of rows that fit together, with the columns that every objective reads; M is the same for all files."""
    config = Data(path=(str(file),), format=cast(Any, reading), eval_share=0.0, max_refused=1.0)
    examples = dataset.load(config, encoder, form, LENGTH // 2, seed=0).train
    if form == "labelled":
        examples = dataset.unpaired(examples)
    third = lambda example: abs(max(map(len, example.completions)) - LENGTH / 3)  # so that two or three fit a row
    if form == "ranking":
        examples = [
            dataclasses.replace(e, completions=e.completions[:3], ranks=e.ranks[:3], preferred=()) for e in examples
        ]
    examples = sorted(examples, key=third)[:EXAMPLES]
    loader = Loader(examples, batch_size=ROWS, length=LENGTH, pack=True, mismatched=form == "labelled")
    loader.most = MOST
    batch = loader.batch(0)
    rng = np.random.default_rng(0)
    shape = (ROWS, MOST, batch["tokens"].shape[1])
    if "ranks" not in batch:
        batch.setdefault("labels", np.ones(shape, np.bool_))
    return batch | {
        "ref_logprob": rng.normal(-60, 20, shape).astype(np.float32),
        "baseline": np.full(shape[:2], 0.4, np.float32),
        "shift": np.full(shape[:2], 0.2, np.float32),
        **{name: rng.normal(size=shape[:2]).astype(np.float32) for name in PARTNERS},
    }


TOKENS = ("tokens", "mask", "positions", "segments")


def spread(columns: Batch, places: np.ndarray) -> Batch:
    """The examples at `places` (row, number), each completion in a row of its own and left-aligned."""
    out = {n: np.zeros((ROWS * MOST, *columns[n].shape[1:]), columns[n].dtype) for n in TOKENS}
    for place, (b, m) in enumerate(places):
        for lane in range(columns["tokens"].shape[1]):
            here = columns["segments"][b, lane] == m + 1
            for name in TOKENS:
                out[name][place, lane, : here.sum()] = 1 if name == "segments" else columns[name][b, lane][here]
    return out


def unpacked(batch: Batch) -> Batch:
    """The batch's examples a row each, the rest padding rows."""
    used = batch["weight"] > 0
    out = spread(batch, np.argwhere(used))
    for name in {"weight", "labels", "ranks", "ref_logprob", "baseline", "shift", *PARTNERS} & batch.keys():
        out[name] = np.zeros((ROWS * MOST, *batch[name].shape[2:]), batch[name].dtype)
        out[name][: used.sum()] = batch[name][used]
    if "mismatched" in batch:
        out["mismatched"] = spread(batch["mismatched"], np.argwhere(used))
    return out


def by_token(logprobs: jax.Array, rows: Batch) -> np.ndarray:
    """Log-probabilities of the trained tokens, completion by completion: lane, row, segment, place."""
    found = np.asarray(logprobs).reshape(rows["tokens"].shape)
    lanes = range(found.shape[1])
    return np.concatenate([found[:, lane][rows["mask"][:, lane]] for lane in lanes])


@pytest.mark.parametrize("name", FILES)
def test_packed_rows_say_and_teach_what_single_rows_do(name, problem, shared):
    file, reading, form = FILES[name]
    batch = packed_batch(shared / "data" / file, reading, form, problem.encoder)
    alone = unpacked(batch)
    assert batch["weight"].sum() >= 1.5 * ROWS, "rows must be shared"
    pairs = [(batch, alone)] + [(rows["mismatched"] for rows in (batch, alone))] * (form == "labelled")
    for packed, single in pairs:
        said = [by_token(problem.tokens(problem.params, {n: x[n] for n in TOKENS}), x) for x in (packed, single)]
        assert len(said[0]) == len(said[1]) == packed["mask"].sum() > 0
        np.testing.assert_allclose(*said, rtol=0, atol=1e-5)
    gradient, names = problem.gradient("single" if form in ("demonstration", "labelled") else form)
    drop = lambda rows: {name: column for name, column in rows.items() if name not in ("mismatched", "index")}
    for which, loss in enumerate(names):
        (value, grads), (expected, expected_grads) = (
            gradient(problem.params, drop(rows), np.float32(which)) for rows in (batch, alone)
        )
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=loss)
        off = jax.tree.map(np.subtract, grads, expected_grads)
        assert norm_of(off) < 1e-4 * norm_of(expected_grads), loss


def test_the_live_baseline_is_the_same(problem, shared):
    file, reading, form = FILES["llama-factory labels"]
    batch = packed_batch(shared / "data" / file, reading, form, problem.encoder)
    surer = jax.tree.map(lambda x: x * 1.5, problem.params)  # and more often wrong: the policy is likelier than it
    parts, config = [part("kto")], preference.PreferenceConfig()
    prepare = preference.make_prepare(problem.model, parts, config, (problem.model, surer))
    state = types.SimpleNamespace(params=problem.params, frozen=None, carry=None, hyper={})
    (packed,), (single,) = (list(prepare(cast(Any, state), rows)) for rows in (batch, unpacked(batch)))
    np.testing.assert_allclose(packed["baseline"][0, 0], single["baseline"][0], rtol=1e-5)
    assert packed["baseline"].shape == (ROWS, MOST) and packed["baseline"][0, 0] > 0
