"""Labels of several labellers are the share of them, ties are one half, and a bootstrap draws with replacement."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_jax.data.config import Data
from rlhf_jax.data.conversions import Form
from rlhf_jax.data.dataset import Dataset, bootstrap, load
from rlhf_jax.data.items import preferred
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from tests.test_data_loader import examples

FEW = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(shared):
    return AutoTokenizer.from_pretrained(shared / "models/stories260k")


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer)


@pytest.fixture
def read(tmp_path, encoder):
    """The data of some rows."""

    def read(rows, form: Form = "pair", **settings) -> Dataset:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load(Data(path=(str(file),), **{"eval_share": 0.0, **settings}), encoder, form, 64, 0)

    return read


def pair(chosen, rejected, prompt="Q:", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def ranking(completions, ranks, prompt="Q:", **more):
    return {"prompt": prompt, "completions": list(completions), "ranks": list(ranks), **more}


def answers(tokenizer, example) -> list[str]:
    return [tokenizer.decode(c.ids[c.mask], skip_special_tokens=True).strip() for c in example.completions]


def same(one, other) -> None:
    assert dataclasses.replace(one, completions=()).__dict__ == dataclasses.replace(other, completions=()).__dict__
    for a, b in zip(one.completions, other.completions, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)


# Shares


ranks = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(ranks)
def test_of_two_answers_one_is_preferred_or_both_by_half(given_ranks):
    shares = np.asarray(preferred(given_ranks, ties=True))
    np.testing.assert_array_equal(preferred(given_ranks), np.where(shares == 0.5, 0, shares))
    assert (shares + shares.T == 1 - np.eye(len(given_ranks))).all() and not shares.diagonal().any()
    a, b = np.asarray(given_ranks)[:, None], np.asarray(given_ranks)
    assert (shares[a < b] == 1).all()


@given(ranks.flatmap(lambda r: st.tuples(st.just(r), st.permutations(range(len(r))))))
def test_permuting_the_completions_permutes_what_is_preferred(case):
    given_ranks, order = case
    shares = np.asarray(preferred(given_ranks))
    np.testing.assert_array_equal(preferred([given_ranks[i] for i in order]), shares[np.ix_(order, order)])


@pytest.mark.parametrize("pack", [False, True])
def test_batches_hold_the_shares_and_nothing_where_there_is_no_answer(read, pack):
    rows = [ranking([" a", " b", " c"], [1, 0, 1], "P:"), pair(" a", " b"), ranking([" a", " b"], [1, 0], "R:")]
    data = read(rows[:1] + rows[2:], "ranking")
    loader = Loader(data.train, batch_size=2, length=64, pack=pack, shuffle=False)
    batch = loader.batch(0)
    assert batch["preferred"].dtype == np.float32
    assert batch["preferred"].shape == ((2, 2, 3, 3) if pack else (2, 3, 3))
    found = dict(zip(batch["index"].ravel().tolist(), batch["preferred"].reshape(-1, 3, 3).tolist(), strict=True))
    assert found[0] == [[0, 0, 0], [1, 0, 1], [0, 0, 0]]
    assert found[1] == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert "preferred" not in Loader(read(rows[1:2]).train, batch_size=1, length=64).batch(0)


# Several labellers


def test_pairs_of_several_labellers_become_one_with_the_share_of_them(read, tokenizer):
    rows = [pair(" a", " b", labeller="one"), pair(" b", " a", labeller=2), pair(" a", " b"), pair(" c", " b"),
            pair(" b", " a", "other", labeller=3)]  # fmt: skip
    apart, data = read(rows), read(rows, merge=True)
    assert [e.labeller for e in apart.train] == ["one", "2", "", "", "3"]
    assert [(answers(tokenizer, e), e.probability, e.labeller) for e in data.train] == [
        (["a", "b"], 2 / 3, ""), (["c", "b"], 1.0, ""), (["b", "a"], 1.0, "3")
    ]  # fmt: skip
    assert [e.index for e in data.train] == [0, 3, 4] and all(e.labels == (True, False) for e in data.train)
    assert [place.rpartition(":")[2] for place in data.report.merged] == ["2", "3"] and data.report.read == 5
    assert any("2 merged with an earlier row" in line for line in data.report.lines())
    by_hand = read([pair(" a", " b", p=2 / 3), pair(" c", " b", p=1.0), pair(" b", " a", "other", p=1.0)],
                   probability="p")  # fmt: skip
    for one, other in zip(data.train, by_hand.train, strict=True):
        assert one.probability == other.probability
        np.testing.assert_array_equal(one.completions[0].ids, other.completions[0].ids)


def test_the_likelier_answer_is_the_chosen_one_and_in_doubt_the_first_rows(read, tokenizer):
    rows = [pair(" a", " b"), pair(" b", " a"), pair(" b", " a")]
    (lost,) = read(rows, merge=True).train
    assert (answers(tokenizer, lost), lost.probability) == (["b", "a"], 2 / 3)
    (doubt,) = read(rows[:2], merge=True).train
    assert (answers(tokenizer, doubt), doubt.probability) == (["a", "b"], 0.5)
    rows = [pair(" a", " b", p=0.75), pair(" b", " a", p=[1, 0, 1, 1])]
    (soft,) = read(rows, merge=True, probability="p").train
    assert (answers(tokenizer, soft), soft.probability) == (["a", "b"], 0.5)


@FEW
@given(st.lists(st.permutations(range(3)), min_size=1, max_size=5), st.data())
def test_rankings_of_several_labellers_are_aligned_by_text_and_averaged(read, tokenizer, votes, data):
    """However each row orders its answers; the shares are those of the votes one by one."""
    rows = []
    for vote in votes:
        order = data.draw(st.permutations(range(3)))
        rows.append(ranking([f" {'abc'[i]}" for i in order], [vote[i] for i in order]))
    (merged,) = read(rows, "ranking", merge=True).train
    place = ["abc".index(text) for text in answers(tokenizer, merged)]
    shares = np.mean([preferred(vote) for vote in votes], axis=0)
    np.testing.assert_allclose(merged.preferred, shares[np.ix_(place, place)], atol=1e-12)
    np.testing.assert_allclose(merged.ranks, np.mean(votes, axis=0)[place], atol=1e-12)
    (first, *_) = read(rows, "ranking").train
    assert answers(tokenizer, first) == answers(tokenizer, merged) and first.index == merged.index == 0


def test_equal_answers_of_one_row_are_aligned_by_their_ranks(read):
    rows = [ranking([" a", " b", " a"], [0, 1, 2]), ranking([" a", " a", " b"], [2, 0, 1])]
    (merged,) = read(rows, "ranking", merge=True).train
    assert merged.ranks == (0, 1, 2) and merged.preferred == preferred((0, 1, 2))


def test_what_nobody_else_labelled_stays_as_it_is(read):
    rows = [ranking([" a", " b"], [0, 1]), ranking([" a", " b", " b"], [0, 1, 1]), pair(" a", " b", "other")]
    for one, other in zip(read(rows[:2], "ranking").train, read(rows[:2], "ranking", merge=True).train, strict=True):
        same(one, other)
    assert read(rows[:2], "ranking").fingerprint == read(rows[:2], "ranking", merge=True).fingerprint


def test_rows_that_are_held_out_are_not_merged_with_those_that_are_trained(tmp_path, encoder):
    files = []
    for name, rows in (("train", [pair(" a", " b"), pair(" a", " b", "other")]), ("held", [pair(" b", " a")] * 2)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(Data(path=(str(files[0]),), eval_path=(str(files[1]),), merge=True), encoder, "pair", 64, 0)
    assert len(data.train) == 1 and len(data.report.shared) == 1
    assert [(e.source, e.probability) for e in data.evaluation] == [(1, 1.0)]


def test_shares_change_the_fingerprint_and_labellers_do_not(read):
    rows = [ranking([" a", " b"], [0, 1]), ranking([" a", " b"], [1, 0])]
    tied = read([ranking([" a", " b"], [0.5, 0.5])], "ranking", ties=True)
    assert read(rows, "ranking", merge=True).fingerprint == tied.fingerprint
    third = read([*rows, rows[0]], "ranking", merge=True)
    implied = read([ranking([" a", " b"], third.train[0].ranks)], "ranking")
    assert third.train[0].ranks == implied.train[0].ranks and third.fingerprint != implied.fingerprint
    assert read([rows[0] | {"labeller": "x"}], "ranking").fingerprint == read(rows[:1], "ranking").fingerprint


# Ties


def test_ties_are_kept_where_they_are_asked_for(read, tokenizer):
    rows = [ranking([" a", " b", " b", " c"], [1, 1, 1, 0]), ranking([" a", " b"], [2, 2], "other")]
    strict, soft = read(rows), read(rows, ties=True)
    assert [answers(tokenizer, e) for e in strict.train] == [["c", "a"], ["c", "b"], ["c", "b"]]
    assert [why for _, why in strict.report.left] == ["all 'ranks' are the same"] and not soft.report.left
    found = [(answers(tokenizer, e), e.probability) for e in soft.train]
    assert found == [*((answers(tokenizer, e), 1.0) for e in strict.train),
                     (["a", "b"], 0.5), (["a", "b"], 0.5), (["a", "b"], 0.5)]  # fmt: skip
    assert [e.index for e in soft.train] == list(range(6))
    groups = read(rows, "ranking", ties=True).train
    assert groups[1].preferred == ((0, 0.5), (0.5, 0)) and len(read(rows, "ranking").train) == 1


def test_a_tie_counts_half_among_the_labels_of_several(read):
    rows = [ranking([" a", " b"], [0, 1]), ranking([" b", " a"], [3, 3])]
    (merged,) = read(rows, merge=True, ties=True).train
    assert merged.probability == 0.75
    (group,) = read(rows, "ranking", merge=True, ties=True).train
    assert group.preferred == ((0, 0.75), (0.25, 0))


def test_one_answer_or_one_text_ranks_nothing_with_ties_either(read):
    rows = [ranking([" a"], [0]), ranking([" a", " a"], [1, 1]), ranking([" a", " b"], [1, 1])]
    report = read(rows, ties=True).report
    assert [why for _, why in report.left] == ["all 'ranks' are the same", "no two answers of different rank and text"]


@pytest.mark.parametrize(
    ("form", "settings", "says"),
    [
        ("labelled", {"merge": True}, "needs answers with a label; drop --config.data.merge"),
        ("stepwise", {"merge": True}, "drop --config.data.merge"),
        ("demonstration", {"ties": True}, "data.ties keeps ties of pairs and rankings.*drop --config.data.ties"),
        ("labelled", {"ties": True}, "drop --config.data.ties"),
        ("pair", {"merge": True, "margin": "m"}, "drop --config.data.margin or --config.data.merge"),
    ],
)
def test_what_has_no_place_for_soft_labels_says_so_before_any_file_is_read(encoder, form, settings, says):
    with pytest.raises(UserError, match=says):
        load(Data(path=("nowhere.jsonl",), **settings), encoder, form, 64, 0)


# Members of an ensemble


def test_a_bootstrap_draws_as_many_with_replacement_by_the_seed():
    made = examples(400)
    drawn = bootstrap(made, 3)
    assert len(drawn) == 400 and set(drawn) <= set(made)
    assert len(set(drawn)) / 400 == pytest.approx(1 - np.exp(-1), abs=0.07)
    assert drawn == bootstrap(made, 3) != bootstrap(made, 4)
    assert [e.index for e in drawn[:6]] == [100 + i for i in np.random.RandomState(3).randint(400, size=400)[:6]]
    assert bootstrap((), 0) == () and len(bootstrap(made, 2**40)) == 400
