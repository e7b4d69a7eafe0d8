"""Every row that is read is used, or counted and named."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_jax.data.config import Data
from rlhf_jax.data.conversions import Form
from rlhf_jax.data.dataset import load
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError


@pytest.fixture(scope="module")
def encoder(shared):
    return Encoder(AutoTokenizer.from_pretrained(shared / "models/stories260k"))


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(n: int, prompts: int | None = None, start: int = 0):
    return [{"prompt": f"Q{start + i % (prompts or n)}:", "chosen": f" yes {i}", "rejected": " no"} for i in range(n)]


def test_the_real_hh_file(shared, encoder):
    path = str(shared / "data/hh-harmless-base/train.jsonl")
    data = load(Data(path=(path,)), encoder, "pair", 512, seed=0)
    report = data.report
    assert report.read == 1547
    reasons = [reason for _, reason in report.refused]
    assert sum("diverge" in reason for reason in reasons) == sum("empty" in reason for reason in reasons) == 2
    assert len(reasons) == 4 and all(where.startswith(f"{path}:") for where, _ in report.refused)
    assert report.used + len(report.refused) + len(report.too_long) == report.read
    assert report.used == len(data.train) + len(data.evaluation)
    longest = max(len(c) for e in data.train for c in e.completions)
    assert longest == 512 and len(report.cut) > 100
    prompts = [{e.prompt for e in part} for part in (data.train, data.evaluation)]
    assert not prompts[0] & prompts[1]
    assert 0.02 < len(data.evaluation) / report.used < 0.09
    for example in data.train[:200]:
        assert example.labels == (True, False)
        chosen, rejected = example.completions
        np.testing.assert_array_equal(chosen.prompt, rejected.prompt)
        assert chosen.ids[0] == 1 and (chosen.ids == 1).sum() == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 30), st.floats(0, 0.9))
def test_no_prompt_is_both_trained_and_held_out(tmp_path, encoder, seed, prompts, share):
    config = Data(path=(write(tmp_path / "rows.jsonl", pairs(60, prompts)),), eval_share=share)
    try:
        data = load(config, encoder, "pair", 64, seed)
    except UserError as error:
        assert "no row to train on is left" in str(error)
        return
    assert not {e.prompt for e in data.train} & {e.prompt for e in data.evaluation}
    assert sorted(e.index for e in (*data.train, *data.evaluation)) == list(range(60))


def test_the_seed_decides_what_is_held_out_and_nothing_else_does(tmp_path, encoder):
    config = Data(path=(write(tmp_path / "rows.jsonl", pairs(200)),), eval_share=0.3)

    def held(config, seed, length=64):
        return {e.index for e in load(config, encoder, "pair", length, seed).evaluation}

    assert held(config, 0) == held(config, 0, length=32)
    assert held(config, 0) != held(config, 1)
    shuffled = dataclasses.replace(config, path=(write(tmp_path / "other.jsonl", pairs(200)[::-1]),))
    assert {199 - i for i in held(shuffled, 0)} == held(config, 0)


def test_rows_of_eval_path_are_held_out_and_their_prompts_not_trained(tmp_path, encoder):
    train = write(tmp_path / "train.jsonl", pairs(20))
    held = write(tmp_path / "held.jsonl", pairs(10, start=15))
    data = load(Data(path=(train,), eval_path=(held,)), encoder, "pair", 64, 0)
    assert (len(data.train), len(data.evaluation)) == (15, 10)
    assert data.report.shared == tuple(f"{train}:{n}" for n in range(16, 21))
    assert {e.source for e in data.evaluation} == {1}
    assert not {e.prompt for e in data.train} & {e.prompt for e in data.evaluation}


def test_documents_are_held_out_one_by_one(tmp_path, encoder):
    """Their prompt is empty, so that it can't tell them apart; the same document stays on one side."""
    rows = [{"prompt": "", "completion": f"Once there were {i % 50} cats."} for i in range(100)]
    data = load(Data(path=(write(tmp_path / "rows.jsonl", rows),), eval_share=0.3), encoder, "demonstration", 64, 0)
    held = {e.index for e in data.evaluation}
    assert 10 < len(held) < 50 and {(i + 50) % 100 for i in held} == held
    train, other = write(tmp_path / "train.jsonl", rows[:20]), write(tmp_path / "held.jsonl", rows[15:30])
    data = load(Data(path=(train,), eval_path=(other,)), encoder, "demonstration", 64, 0)
    assert (len(data.train), len(data.evaluation)) == (15, 15)
    assert data.report.shared == tuple(f"{train}:{n}" for n in range(16, 21))


def test_too_many_refused_rows_stop_the_run_with_the_first(tmp_path, encoder):
    rows = pairs(20)
    rows[6]["chosen"] = ""
    path = write(tmp_path / "rows.jsonl", rows)
    data = load(Data(path=(path,)), encoder, "pair", 64, 0)  # 1 of 20 is 5%
    assert data.report.refused == ((f"{path}:7", "'chosen' is an empty answer"),)
    assert 6 not in {e.index for e in (*data.train, *data.evaluation)}
    with pytest.raises(UserError, match=rf"1 of 20 rows.*{path}:7: 'chosen' is an empty answer.*max_refused"):
        load(Data(path=(path,), max_refused=0.04), encoder, "pair", 64, 0)


def test_invalid_json_on_line_7_is_named(tmp_path, encoder):
    path = tmp_path / "rows.jsonl"
    write(path, pairs(8))
    rows = path.read_text().splitlines()
    rows[6] = rows[6][:-4]
    path.write_text("\n".join(rows))
    with pytest.raises(UserError, match=rf"{path}:7: invalid JSON"):
        load(Data(path=(str(path),)), encoder, "pair", 64, 0)


@pytest.mark.parametrize("policy", ["cut_prompt", "refuse", "stop"])
def test_rows_over_the_length_follow_the_policy_and_are_never_refusals(tmp_path, encoder, policy):
    rows = pairs(20)
    rows[3]["prompt"] = "Once upon a time " * 20
    rows[4]["chosen"] = "and then " * 30
    path = write(tmp_path / "rows.jsonl", rows)
    config = Data(path=(path,), too_long=policy, max_refused=0.0, eval_share=0.0)
    if policy == "stop":
        with pytest.raises(UserError, match=rf"{path}:4 has \d+ tokens and the length is 64"):
            load(config, encoder, "pair", 64, 0)
        return
    report = load(config, encoder, "pair", 64, 0).report
    cut = (f"{path}:4",)
    assert report.cut == (cut if policy == "cut_prompt" else ())
    assert report.too_long == (*(cut if policy == "refuse" else ()), f"{path}:5")
    assert report.refused == ()


def test_the_report_names_every_row_in_its_file(tmp_path, encoder):
    rows = pairs(40)
    rows[6]["chosen"] = ""
    rows[3]["prompt"] = "Once upon a time " * 20
    rows[4]["chosen"] = "and then " * 30
    path = write(tmp_path / "rows.jsonl", rows)
    report = load(Data(path=(path,)), encoder, "pair", 64, 0).report
    report.write(str(tmp_path / "left_out.jsonl"))
    written = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert [(w["where"], w["what"]) for w in written] == [
        (f"{path}:7", "refused"),
        (f"{path}:4", "cut"),
        (f"{path}:5", "too long"),
    ]
    said = "\n".join(report.lines())
    assert "40 rows read" in said and all(w["where"] in said for w in written)


RANKED = {"prompt": "Q:", "completions": [" a", " b", " c", " b"], "ranks": [2, 1, 1, 0]}
LABELLED = {"prompt": "Q:", "completion": " a", "label": False}
SHOWN = {"prompt": "Q:", "completion": " a"}


@pytest.mark.parametrize(
    ("row", "form", "answers"),
    [
        (pairs(1)[0], "pair", [" yes 0", " no"]),
        (pairs(1)[0], "demonstration", [" yes 0"]),
        (pairs(1)[0], "labelled", [" yes 0", " no"]),
        (LABELLED, "labelled", [" a"]),
        (SHOWN, "demonstration", [" a"]),
        (RANKED, "demonstration", [" b"]),
        # Ties give no pair, nor do equal texts: b>c, b>a, b>a, c>a.
        (RANKED, "pair", [" b", " c", " b", " a", " b", " a", " c", " a"]),
    ],
)
def test_a_row_becomes_what_the_loss_takes(tmp_path, encoder, row, form, answers):
    data = load(Data(path=(write(tmp_path / "rows.jsonl", [row]),), eval_share=0.0), encoder, form, 64, 0)
    completions = [c for e in data.train for c in e.completions]
    wanted = [encoder.encode(row["prompt"], answer) for answer in answers]
    assert [c.ids.tolist() for c in completions] == [w.ids.tolist() for w in wanted]
    assert [e.index for e in data.train] == list(range(len(data.train)))


def test_rows_that_cannot_become_what_the_loss_takes_say_what_to_type(tmp_path, encoder):
    path = write(tmp_path / "rows.jsonl", [LABELLED])
    with pytest.raises(UserError, match="needs pairs .* labelled single answers .* --config.loss.name=kto"):
        load(Data(path=(path,)), encoder, "pair", 64, 0)
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Q"}])
    with pytest.raises(UserError, match="prompts without answers"):
        load(Data(path=(path,)), encoder, "demonstration", 64, 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Data(), "--config.data.path"),
        (Data(path=("a.jsonl",), weights=(1.0, 2.0)), "2 numbers for 1 paths"),
        (Data(path=("a.jsonl",), weights=(0.0,)), "above 0"),
        (Data(path=("a.jsonl",), eval_share=1.0), "below 1"),
        (Data(path=("a.jsonl",), max_refused=2.0), "from 0 to 1"),
    ],
)
def test_a_config_that_means_nothing_is_refused_before_any_file_is_read(encoder, config, message):
    with pytest.raises(UserError, match=message):
        load(config, encoder, "pair", 64, 0)


def test_the_fingerprint_follows_the_tokens(tmp_path, encoder):
    rows = pairs(30)
    config = Data(path=(write(tmp_path / "rows.jsonl", rows),))
    first = load(config, encoder, "pair", 64, 0).fingerprint
    assert load(config, encoder, "pair", 64, 0).fingerprint == first
    rows[3]["rejected"] = " maybe"
    write(tmp_path / "rows.jsonl", rows)
    assert load(config, encoder, "pair", 64, 0).fingerprint != first


@pytest.mark.parametrize(("form", "file"), [
    ("pair", "hh-harmless-base/valid.jsonl"),
    ("ranking", "dsp-domain-preference/valid.jsonl"),
    ("demonstration", "alpaca-en-demo/valid.jsonl"),
])  # fmt: skip
def test_the_fingerprint_of_what_older_runs_read_stays(shared, encoder, form: Form, file):
    """A run of before there were steps and shares of labels resumes: its checkpoint names these bytes."""
    data = load(Data(path=(str(shared / "data" / file),)), encoder, form, 256, 0)
    digest = hashlib.blake2b(encoder.fingerprint.encode(), digest_size=16)
    for part in (data.train, data.evaluation):
        digest.update(b"part%d" % len(part))
        for example in part:
            digest.update(np.asarray([example.index, example.source, *example.labels], np.int64).tobytes())
            numbers = (*example.ranks, example.probability, example.margin)
            digest.update(np.asarray(numbers, np.float64).tobytes())
            for tokens in example.completions:
                digest.update(np.int64(len(tokens)).tobytes() + tokens.ids.tobytes() + tokens.mask.tobytes())
    assert data.fingerprint == digest.hexdigest()


def test_chat_rows_of_three_real_files(shared):
    encoder = Encoder(AutoTokenizer.from_pretrained(shared / "data/tokenizers/minimind"))
    files: list[tuple[str, Form]] = [
        ("llama-factory-feedback/dpo_en_demo.valid.jsonl", "pair"),
        ("llama-factory-feedback/kto_en_demo.valid.jsonl", "labelled"),
        ("alpaca-en-demo/valid.jsonl", "demonstration"),
    ]
    for file, form in files:
        data = load(Data(path=(str(shared / "data" / file),)), encoder, form, 4096, 0)
        assert data.report.refused == data.report.too_long == ()
        assert data.report.used == data.report.read


def test_a_row_of_many_pairs_with_special_tokens_is_told_once(tmp_path, encoder):
    rows = [{"prompt": "a </s> b", "completions": ["c", "d", "e"], "ranks": [1, 2, 3]}]
    report = load(Data(path=(write(tmp_path / "r.jsonl", rows),), eval_share=0.0), encoder, "pair", 64, 0).report
    assert (report.train, report.kept_as_text) == (3, 1)


@pytest.mark.parametrize("length", [2, 64, 512])
def test_a_document_over_the_length_is_cut_into_pieces_and_loses_nothing(shared, encoder, length):
    """Each token but the first of a document is trained once, in order; pieces share the token between them."""
    path = str(shared / "data/c4-demo/valid.jsonl")
    data = load(Data(path=(path,), eval_share=0), encoder, "demonstration", length, seed=0)
    whole = load(Data(path=(path,), eval_share=0), encoder, "demonstration", 10**6, seed=0)
    assert data.report.lost == 0 and not data.report.too_long and len(data.report.split) > 10
    trained = {}
    for example in data.train:
        (piece,) = example.completions
        assert len(piece) <= length and not piece.mask[0]
        trained.setdefault(example.where, []).append(piece.ids[piece.mask])
    for example in whole.train:
        (document,) = example.completions
        np.testing.assert_array_equal(np.concatenate(trained[example.where]), document.ids[document.mask])
    assert f"{len(data.report.split)} texts cut into pieces" in "\n".join(data.report.lines())
    refused = load(Data(path=(path,), eval_share=0, too_long="refuse"), encoder, "demonstration", 512, seed=0).report
    assert refused.lost > 0 and refused.too_long and not refused.split
