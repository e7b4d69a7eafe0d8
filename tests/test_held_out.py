"""Whole runs of preference learning: a moving reference at its two ends, and what is left of held-out rows."""

import math
import pathlib
from typing import Any

import numpy as np
import pytest
from etils import epath

from rlhf_jax import run
from rlhf_jax.algorithms.preference import PreferenceConfig
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Train
from rlhf_jax.data import dataset
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.models.tokenizers import load_tokenizer
from tests import tiny
from tests.test_run import lines, make_config


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model and rows, and the runs that are compared."""
    folder = tmp_path_factory.mktemp("preference")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl")
    runs = {"fixed": {}, "late": {"sync_every": 100}, "always": {"sync_every": 1, "sync_mix": 1.0}}
    short: Any = {"train": Train(steps=8, batch_size=4), "checkpoint": CheckpointConfig(every=0)}
    for name, changes in runs.items():
        run.train(make_config(folder, "dpo", preference=PreferenceConfig(**changes), **short), str(folder / name))
    run.train(make_config(folder, "nll", algorithm="sft", **short), str(folder / "sft"))
    return folder


def losses(folder: pathlib.Path) -> list[float]:
    several = {"metrics.jsonl": "loss", "eval.jsonl": "eval/loss"}
    return [row[name] for file, name in several.items() for row in lines(folder / file)]


def test_a_reference_that_has_not_moved_yet_is_a_fixed_one(place):
    fixed, late = losses(place / "fixed"), losses(place / "late")
    assert len(fixed) == 8 + 3 and np.ptp(fixed) > 1e-2
    np.testing.assert_allclose(late, fixed, rtol=1e-5)


def test_a_reference_that_is_the_policy_teaches_each_step_as_the_first(place):
    found = losses(place / "always")
    np.testing.assert_allclose(found, math.log(2), atol=1e-6)
    margins = [row["logps/chosen"] - row["logps/rejected"] for row in lines(place / "always" / "metrics.jsonl")]
    assert len(found) == 8 + 3 and np.ptp(margins) > 0.1


@pytest.mark.parametrize("name", ["fixed", "sft"])
def test_held_out_rows_add_up_to_the_evaluation(place, name):
    """One line a row. The loss of pairs is the mean over rows; that of tokens is theirs weighed by their tokens."""
    rows, last = lines(place / name / "held_out.jsonl"), lines(place / name / "eval.jsonl")[-1]
    form = "pair" if name == "fixed" else "demonstration"
    config = make_config(place, "dpo")
    encoder = Encoder(load_tokenizer(epath.Path(str(config.model.path))))
    kept = {example.index: example for example in dataset.load(config.data, encoder, form, 64, config.seed).evaluation}
    assert len(rows) == len(kept) == last["eval/rows"] > 4 and {row["index"] for row in rows} == set(kept)
    assert all(row["row"] == kept[row["index"]].where for row in rows)
    tokens = np.asarray([sum(kept[row["index"]].completions[0].mask) for row in rows])
    share = tokens / tokens.sum() if name == "sft" else np.full(len(rows), 1 / len(rows))
    assert share @ [row["loss"] for row in rows] == pytest.approx(last["eval/loss"], rel=1e-5)
    if name == "sft":
        assert np.ptp(tokens) > 5 and all(set(row) == {"row", "index", "loss"} for row in rows)
        return
    assert np.mean([row["correct"] for row in rows]) == pytest.approx(last["eval/rewards/accuracies"], rel=1e-5)
    assert {row["correct"] for row in rows} == {0.0, 1.0}
    assert all(row["correct"] == (row["margin"] > 0) for row in rows)
