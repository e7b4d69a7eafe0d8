"""Soft labels and margins: what a column says of a row is what that row is trained with, wherever it ends up."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from rlhf_jax import build, run
from rlhf_jax.algorithms.completions import reference_columns
from rlhf_jax.algorithms.step import ratio
from rlhf_jax.config import Config, Evaluate, Loss, OptimizerConfig, Train
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.models.tokenizers import load_tokenizer
from tests import tiny
from tests.test_run import lines, make_config

ROWS = 48
CHANCE = np.random.default_rng(1).permutation(ROWS) % 5 / 4  # 0, 1/4, 1/2, 3/4 and 1
GAP = np.random.default_rng(2).normal(0, 2, ROWS).round(2)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model, and rows whose columns say how sure each label is and how far the answers differ."""
    folder = tmp_path_factory.mktemp("soft")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "plain.jsonl", ROWS)
    rows = lines(folder / "plain.jsonl")
    for i, row in enumerate(rows):
        votes = [vote < 4 * CHANCE[i] for vote in range(4)]
        row |= {"votes": list(map(bool, votes)), "chance": CHANCE[i], "gap": GAP[i]}
    write(folder / "pairs.jsonl", rows)
    return folder


def write(file: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def config_of(place: pathlib.Path, pack: bool = False, loss: str = "dpo", steps: int = 4, **columns: str) -> Config:
    """One row a batch, at a rate that moves the policy by nats a step."""
    config = make_config(
        place, loss, train=Train(steps=steps, batch_size=1), evaluate=Evaluate(every=0),
        optimizer=OptimizerConfig(learning_rate=0.02, schedule="constant"),
    )  # fmt: skip
    data = dataclasses.replace(config.data, pack=pack, **columns)
    return dataclasses.replace(config, loss=Loss(name=loss, beta=0.5), data=data)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def expected(margin: np.ndarray, chance: np.ndarray | float = 1.0, gap: np.ndarray | float = 0.0) -> np.ndarray:
    """-p log sig(x) - (1 - p) log sig(-x) of x = margin - gap."""
    return chance * softplus(gap - margin) + (1 - chance) * softplus(margin - gap)


COLUMNS = {
    "votes": ({"probability": "votes"}, CHANCE, np.zeros(ROWS)),
    "chances": ({"probability": "chance"}, CHANCE, np.zeros(ROWS)),
    "margins": ({"margin": "gap"}, np.ones(ROWS), GAP),
    "both": ({"probability": "chance", "margin": "gap"}, CHANCE, GAP),
}


def columns_of(file: pathlib.Path, *names: str) -> list[np.ndarray]:
    return [np.array([row[name] for row in lines(file)]) for name in names]


def test_each_row_is_trained_and_evaluated_with_its_own_chance(place, tmp_path):
    """A batch is one row: its loss must be that of its logged margin and its votes, at every step and held out."""
    config = config_of(place, probability="votes")
    run.train(config, str(tmp_path / "run"))
    index, margin, loss = columns_of(tmp_path / "run" / "held_out.jsonl", "index", "margin", "loss")
    assert len(index) > 5 and len(set(CHANCE[index])) > 3 and np.abs(margin).max() > 1
    np.testing.assert_allclose(loss, expected(margin, CHANCE[index]), rtol=1e-5, atol=1e-6)
    loader = build.build(config, epath.Path(tmp_path)).loader
    margin, loss = columns_of(tmp_path / "run" / "metrics.jsonl", "rewards/margins", "loss")
    index = np.array([loader.batch(i)["index"][0] for i in range(len(loss))])
    assert len(set(CHANCE[index])) > 1 and np.abs(margin[1:]).max() > 0.1 and abs(margin[0]) < 1e-4
    np.testing.assert_allclose(loss, expected(margin, CHANCE[index]), rtol=1e-5, atol=1e-6)


def test_a_margin_shifts_the_logit_row_by_row(place, tmp_path):
    """At the reference the loss of a batch is the mean of -log sig(-M), or of max(0, M), over its rows; packed."""
    config = config_of(place, pack=True, loss="dpo+hinge", margin="gap")
    config = dataclasses.replace(config, train=Train(steps=2, batch_size=4))
    run.train(config, str(tmp_path / "run"))
    batch = build.build(config, epath.Path(tmp_path)).loader.batch(0)
    gap = GAP[batch["index"][batch["weight"] > 0]]
    assert len(gap) > 6 and np.ptp(gap) > 2
    by_hand = {"dpo": softplus(gap).mean(), "hinge": np.maximum(0, gap).mean()}
    # Policy and reference are two programs: a sum of 100 nats has 7.6e-6 between two float32 numbers.
    first = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert {name: first[f"loss/{name}"] for name in by_hand} == pytest.approx(by_hand, abs=1e-5)
    index, margin, loss = columns_of(tmp_path / "run" / "held_out.jsonl", "index", "margin", "loss")
    assert len(index) > 5 and np.abs(margin).max() > 0.5
    both = expected(margin, gap=GAP[index]) + np.maximum(0, GAP[index] - margin)
    np.testing.assert_allclose(loss, both, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def whole_epochs(place) -> dict[str, tuple[np.ndarray, np.ndarray, Any]]:
    """Padded and packed: by index the loss and margin of all rows in one shuffled batch, and the gradient."""
    found = {}
    for pack in (False, True):
        built = build.build(config_of(place, pack, **COLUMNS["both"][0]), epath.Path(place / "run"))
        size = len(built.loader.rows)
        loader = Loader(built.data.train, batch_size=size, seed=3, length=built.loader.length, pack=pack)
        start = jax.jit(built.model.init)(jax.random.key(1))
        policy = jax.tree.map(lambda x: 1.2 * x, start)
        batch = loader.batch(0)
        columns = jax.jit(lambda rows, params, model=built.model: reference_columns(model, params, rows))(batch, start)
        batch["ref_logprob"] = np.asarray(columns["ref_logprob"]).reshape(batch["labels"].shape)

        def value(params: Any, batch: Any, built: build.Built = built) -> Any:
            terms, _, rows = built.judge(params, None, built.hyper, batch, None)
            return sum(term.weight * ratio(term.total, term.count) for term in terms.values()), rows

        (loss, rows), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(policy, batch)
        order = np.argsort(batch["index"].reshape(-1))[-len(built.data.train) :]  # of padding rows it is -1
        assert (size < len(order)) is pack and not (np.diff(batch["index"][batch["weight"] > 0]) > 0).all()
        index = batch["index"].reshape(-1)[order]
        assert len(set(index)) == len(index) and index[0] >= 0
        by_row = (np.asarray(rows[name]).reshape(-1)[order] for name in ("loss", "margin"))
        found["packed" if pack else "padded"] = (index, *by_row, float(loss), gradient)
    return found


@pytest.mark.parametrize("way", ["padded", "packed"])
def test_numbers_stay_with_their_rows_through_shuffling_and_packing(way, whole_epochs):
    index, loss, margin, mean, _ = whole_epochs[way]
    np.testing.assert_allclose(loss, expected(margin, CHANCE[index], GAP[index]), rtol=1e-5, atol=1e-6)
    assert mean == pytest.approx(loss.mean(), rel=1e-5) and np.ptp(margin) > 2
    astray = expected(margin, np.roll(CHANCE[index], 1), np.roll(GAP[index], 1))
    assert np.median(np.abs(loss - astray)) > 0.1


def test_packed_equals_padded(whole_epochs):
    padded, packed = whole_epochs["padded"], whole_epochs["packed"]
    np.testing.assert_array_equal(padded[0], packed[0])
    for ours, theirs in zip(padded[1:4], packed[1:4], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each[4])]) for each in (padded, packed)]
    assert np.linalg.norm(flat[0] - flat[1]) < 1e-4 * np.linalg.norm(flat[0]) and np.linalg.norm(flat[0]) > 0.1


# ---- rows


@pytest.fixture(scope="module")
def encoder(place) -> Encoder:
    return Encoder(load_tokenizer(epath.Path(place / "model")))


def load(file: str, encoder: Encoder, form: Any = "pair", **more: Any) -> dataset.Dataset:
    return dataset.load(Data(path=(file,), **{"eval_share": 0.0, **more}), encoder, form, 64, 0)


@pytest.mark.parametrize("name", COLUMNS)
def test_votes_and_numbers_are_read(name, place, encoder):
    columns, chance, gap = COLUMNS[name]
    examples = load(str(place / "pairs.jsonl"), encoder, **columns).train
    assert [e.probability for e in examples] == list(chance) and [e.margin for e in examples] == list(gap)


ABSENT = "absent"
BAD: list[tuple[str, Any, str]] = [
    ("probability", ABSENT, "it has no column 'said', which data.probability names"),
    ("probability", "0.5", "'said' holds '0.5', not a finite number or votes"),
    ("probability", {"a": 1}, "'said' holds \"{'a': 1}\", not a finite number or votes"),
    ("probability", float("nan"), "'said' holds 'nan', not a finite number or votes"),
    ("probability", [], r"'said' holds '[]', not a finite number or votes"),
    ("probability", [True, "no"], "'said' holds 'no', not a finite number or votes"),
    ("probability", 1.25, "'said' is 1.25, not from 0 to 1"),
    ("probability", -0.25, "'said' is -0.25, not from 0 to 1"),
    ("probability", [1, 2], "'said' is 1.5, not from 0 to 1"),
    ("margin", ABSENT, "it has no column 'said', which data.margin names"),
    ("margin", "wide", "'said' holds 'wide', not a finite number"),
    ("margin", float("inf"), "'said' holds 'inf', not a finite number"),
    ("margin", [1.0, 2.0], "'said' holds '[1.0, 2.0]', not a finite number"),
]


@pytest.mark.parametrize(("what", "value", "reason"), BAD)
def test_a_row_whose_column_says_nothing_usable_is_refused_and_counted(what, value, reason, place, encoder, tmp_path):
    rows = [row | {"said": 0.5} for row in lines(place / "plain.jsonl")]
    rows[6] = {name: x for name, x in (rows[6] | {"said": value}).items() if value is not ABSENT or name != "said"}
    file = write(tmp_path / "rows.jsonl", rows)
    report = load(file, encoder, **{what: "said"}).report
    assert report.refused == ((f"{file}:7", reason),) and (report.read, report.used) == (ROWS, ROWS - 1)
    with pytest.raises(UserError, match=rf"^1 of {ROWS} rows can't be used.* the first is {file}:7: .*mend the rows"):
        load(file, encoder, max_refused=0.0, **{what: "said"})
    held_out = load(str(place / "pairs.jsonl"), encoder, eval_path=(file,), max_refused=0.6, **{what: "chance"})
    assert len(held_out.report.refused) == ROWS and not held_out.evaluation, "held-out rows must have it too"


@pytest.mark.parametrize("what", ["probability", "margin"])
def test_rankings_and_single_answers_have_no_chance_and_no_margin(what, encoder, tmp_path):
    ranked = [{"prompt": f"{i}:", "completions": [" a", " b"], "ranks": [1, 2], "said": 0.5} for i in range(8)]
    labelled = [{"prompt": f"{i}:", "completion": " a", "label": True, "said": 0.5} for i in range(8)]
    for rows, form in ((ranked, "pair"), (ranked, "ranking"), (labelled, "labelled")):
        file = write(tmp_path / "rows.jsonl", rows)
        assert len(load(file, encoder, form).train) == 8
        says = rf"8 of 8 rows can't be used.*{file}:1: the column 'said' is read of single pairs"
        with pytest.raises(UserError, match=says):
            load(file, encoder, form, **{what: "said"})


def test_another_column_is_another_data_set(place, encoder):
    """A run on other numbers is not resumed as if they were the same."""
    found = [load(str(place / "pairs.jsonl"), encoder, **columns).fingerprint for columns, *_ in COLUMNS.values()]
    assert found[0] == found[1], "votes whose share is the chance say the same"
    assert len({load(str(place / "pairs.jsonl"), encoder).fingerprint, *found}) == 4
