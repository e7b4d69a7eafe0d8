"""The study of the tax: losses against the whole softmax in float64, averages and rows by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.data import world
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.lab.studies import tax
from rlhf_jax.workdir import open_policy

TEXTS = ["Who is it?\nDan.", "What is 3 + 4?\nSure! It is 7.", "No end"]


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    policy = open_policy(str(tiny.write_model(tmp_path_factory.mktemp("tax") / "model")))
    return Subject("tiny", policy.model, policy.params, policy.tokenizer)


def logprobs(subject: Subject, ids: np.ndarray) -> np.ndarray:
    """Of every token but the first, in float64."""
    row, ones = ids[None], np.ones((1, len(ids)), np.int32)
    places = np.arange(len(ids), dtype=np.int32)[None]
    hidden = subject.model.apply(subject.params, *map(jnp.asarray, (row, ones, places)))
    logits = subject.model.logits(subject.params, hidden)
    told = np.asarray(logits, np.float64)[0, :-1]
    told -= told.max(axis=-1, keepdims=True)
    told -= np.log(np.exp(told).sum(axis=-1, keepdims=True))
    return told[np.arange(len(ids) - 1), ids[1:]]


def test_losses_are_nats_a_token_of_all_and_of_the_first_lines(subject):
    whole, questions = [], []
    for text in TEXTS:
        row = Encoder(subject.tokenizer).encode("", text)
        told = logprobs(subject, row.ids)[row.start - 1 :]
        whole += told.tolist()
        first = text.index("\n") + 1 if "\n" in text else len(text) + 1  # bytes are tokens; the end token is one more
        questions += told[: first - row.start].tolist()
    found = tax.losses(subject, TEXTS)
    assert found == pytest.approx((-np.mean(whole), -np.mean(questions)), abs=1e-4)


def test_the_first_line_ends_with_its_newline(subject):
    ids = np.asarray(subject.tokenizer("ab\ncd\n")["input_ids"])
    assert tax.lines(subject.tokenizer, ids) == 3
    assert tax.lines(subject.tokenizer, ids[:2]) == 2


def test_an_average_of_weights_is_between(subject):
    other = subject._replace(params=jax.tree.map(lambda x: 3 * x + 1, subject.params))
    made = tax.averaged("half", subject, other, 0.5)
    assert made.name == "half"
    for ours, theirs in zip(jax.tree.leaves(made.params), jax.tree.leaves(subject.params), strict=True):
        np.testing.assert_allclose(np.asarray(ours), 2 * np.asarray(theirs) + 0.5, rtol=1e-6, atol=1e-6)
    for share, end in ((0.0, subject), (1.0, other)):
        jax.tree.map(np.testing.assert_array_equal, tax.averaged("end", subject, other, share).params, end.params)


def test_rows_are_chosen_by_what_they_ask():
    rows = [{"prompt": p} for p in ("Where is the key?\n", "What is 3 + 4?\n", "Say backwards: drum, hat.\n")]
    assert tax.of_kinds(rows, ["fact"]) == rows[:1]
    assert tax.of_kinds(rows, ["sum", "backwards"]) == rows[1:]
    assert tax.of_kinds(rows, world.KINDS) == rows


def test_every_run_is_declared_and_changes_one_thing():
    assert {tax.PRETRAINED, tax.START, *tax.RUNS, *tax.AVERAGES.values()} == set(tax.STUDY.conditions)
    knobs = {name for name in vars(tax.STUDY.knobs)} | {"text"}
    values = [value for changes in tax.RUNS.values() for value in changes.values()]
    assert set(values) <= knobs
