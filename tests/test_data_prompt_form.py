"""What rollouts read: the prompt of any kind of row, once, with what else its row says."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_jax.data import formats, sources
from rlhf_jax.data.config import Data
from rlhf_jax.data.conversions import Form
from rlhf_jax.data.dataset import Dataset, load
from rlhf_jax.data.loader import Loader, once
from rlhf_jax.data.rows import Message, Refusal, Text
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from tests.chat import TEMPLATES

PLACES = {"strings": "models/stories260k", "chat": "data/tokenizers/minimind"}
KINDS = {
    "gsm8k/valid.jsonl": "question_answer",
    "alpaca-en-demo/valid.jsonl": "alpaca",
    "hh-harmless-base/valid.jsonl": "hh",
    "dsp-domain-preference/valid.jsonl": "domain_normal",
    "gsm8k/example_model_solutions.jsonl": "solutions",
    "mr-gsm8k-first-error/valid.jsonl": "first_error",
    "math500/math500.jsonl": "problem",
    "ifeval/input_data.jsonl": "prompt",
}


@pytest.fixture(scope="module")
def encoders(shared) -> dict[str, Encoder]:
    return {name: Encoder(AutoTokenizer.from_pretrained(shared / place)) for name, place in PLACES.items()}


@pytest.fixture
def read(tmp_path, encoders):
    """Rows, written to a file, as a data set of prompts."""

    def read(*files, length: int = 64, encoder: str = "strings", seed: int = 0, **config) -> Dataset:
        paths = []
        for number, rows in enumerate(files):
            path = tmp_path / f"{number}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            paths.append(str(path))
        held = {"eval_path": tuple(paths[1:])} if len(paths) > 1 else {"eval_share": 0.0}
        return load(Data(path=(paths[0],), **{**held, **config}), encoders[encoder], "prompt", length, seed)

    return read


def asked(rows: Dataset) -> list[Text]:
    return [example.text for example in rows.train]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("file", KINDS)
def test_every_kind_of_real_rows_gives_its_prompts_as_they_are_drawn_behind(shared, encoders, file, place):
    path, encoder = str(shared / "data" / file), encoders[place]
    data = load(Data(path=(path,), eval_share=0.0), encoder, "prompt", 10**5, 0)
    records = {record.where: record.columns for record in sources.read(path) if isinstance(record, sources.Record)}
    for example in data.train[:40]:
        rows = formats.adapt(KINDS[file], records[example.where], encoder.chat, ties=True)
        assert example.text in [row.prompt for row in rows]
        (tokens,), (ids,) = example.completions, encoder.prompts([example.text])
        np.testing.assert_array_equal(tokens.ids, ids)
        np.testing.assert_array_equal(tokens.prompt, ids)
        assert tokens.start == len(tokens) and not tokens.mask.any()
        assert example.labels == example.ranks == example.step_labels == example.preferred == ()
    assert data.report.read == data.report.used + len({*data.report.merged, *dict(data.report.refused)})


@pytest.mark.parametrize("place", PLACES)
def test_a_prompt_is_asked_as_its_answers_are_trained(shared, encoders, place):
    config = Data(path=(str(shared / "data/hh-harmless-base/valid.jsonl"),), eval_share=0.0)
    pairs, prompts = (load(config, encoders[place], form, 10**4, 0).train for form in ("pair", "prompt"))
    assert len(pairs) > 100
    for pair, prompt in zip(pairs, prompts, strict=True):
        np.testing.assert_array_equal(pair.completions[0].prompt, prompt.completions[0].ids)
        assert (pair.prompt, pair.index, pair.where) == (prompt.prompt, prompt.index, prompt.where)
        assert pair.completions[0].head == prompt.completions[0].head


def test_a_tree_of_conversations_is_asked_its_first_question_once(shared, encoders):
    path = str(shared / "data/oasst-en-100-trees/valid.jsonl")
    data = load(Data(path=(path,), eval_share=0.0), encoders["chat"], "prompt", 10**4, 0)
    trees = {r.where: r.columns for r in sources.read(path) if isinstance(r, sources.Record)}
    assert len({example.where for example in data.train}) == len(data.train) <= len(trees)
    for example in data.train:
        assert example.text == (Message("user", trees[example.where]["prompt"]["text"]),)
        assert "prompt" not in example.columns and "message_tree_id" in example.columns


def turns(*roles: str) -> list[dict]:
    return [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles)]


@given(st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_a_whole_conversation_is_asked_up_to_its_first_answer(read, roles):
    whole = turns(*roles, "assistant", "user")
    before = tuple(
        Message(turn["role"], turn["content"])
        for turn in itertools.takewhile(lambda turn: turn["role"] != "assistant", whole)
    )
    filler = [{"messages": turns("user", "assistant")}]
    report = (data := read([{"messages": whole}, *filler], encoder="chat", max_refused=1.0)).report
    if before:
        assert before in asked(data) and not report.refused
    else:
        assert [why for _, why in report.refused] == ["nothing stands before the first answer"]


def test_a_text_is_no_prompt_and_an_empty_prompt_is_one(read, encoders):
    with pytest.raises(UserError, match="2 of 2 rows can't be used.*0.jsonl:1: the row is a text without a prompt"):
        read([{"text": "Once upon a time."}, {"text": "The end."}])
    with pytest.raises(UserError, match="the row is a text without a prompt"):
        read([{"prompt": "", "completion": "Once upon a time."}])
    (empty,) = read([{"prompt": ""}]).train
    assert empty.text == "" and empty.completions[0].ids.tolist() == [encoders["strings"].bos_id]


def test_columns_are_what_stands_beside_the_prompt_and_the_answer(read):
    rows = [
        {"prompt": "Q", "completion": "A", "prompts": 1, "completions": 2, "messages": 3, "answer": {"value": [7]}},
        {"prompt": "Q", "completion": "A", "labeller": "first", "split": None},
    ]
    first, second = read(rows).train
    assert first.columns == {"answer": {"value": [7]}} and second.columns == {"labeller": "first"}
    assert first.text == second.text == "Q"


def test_other_forms_carry_neither_text_nor_columns(tmp_path, encoders):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Q", "completion": "A", "answer": 7}) + "\n")
    config = Data(path=(str(tmp_path / "rows.jsonl"),), eval_share=0.0)
    (example,) = load(config, encoders["strings"], "demonstration", 64, 0).train
    assert example.text == "" and example.columns == {}


def test_prompts_of_the_same_text_and_columns_are_one(read):
    rows = [
        {"prompt": "Q", "completion": "A", "more": {"a": 1, "b": 2}},
        {"prompt": "Q", "completion": "B", "more": {"b": 2, "a": 1}},  # the same, in another order
        {"prompt": "Q", "completion": "C", "more": {"a": True, "b": 2}},
        {"prompt": "Q ", "completion": "D", "more": {"a": 1, "b": 2}},
    ]
    data = read(rows)
    assert [example.where[-1] for example in data.train] == ["1", "3", "4"]
    assert [where[-1] for where in data.report.merged] == ["2"]
    assert any(line.startswith("1 merged with an earlier row of the same prompt") for line in data.report.lines())
    assert [example.index for example in data.train] == [0, 2, 3]  # numbers are of the files alone


def test_a_prompt_that_is_held_out_is_not_one_with_a_trained_one(read):
    held = [{"prompt": "Q"}, {"prompt": "R"}]
    data = read([{"prompt": "Q"}, {"prompt": "S"}], held)
    assert asked(data) == ["S"] and [e.text for e in data.evaluation] == ["Q", "R"]
    assert len(data.report.shared) == 1 and not data.report.merged


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(st.integers(0, 2**40), st.integers(2, 30))
def test_the_split_is_by_prompt(read, seed, prompts):
    rows = [{"prompt": f"Q{i % prompts}", "answer": i} for i in range(60)]
    try:
        data = read(rows, seed=seed, eval_share=0.3)
    except UserError as error:
        assert "held out" in str(error)
        return
    assert data.report.used == 60
    for of in (lambda e: e.text, lambda e: e.prompt):
        assert not {*map(of, data.train)} & {*map(of, data.evaluation)}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(st.integers(2, 80))
def test_a_long_prompt_keeps_its_end_and_the_beginning_token(read, encoders, length):
    text = "Once there was a cat who sat on a mat, and then it slept all day."
    (whole,) = encoders["strings"].prompts([text])
    assert not isinstance(whole, Refusal)
    data = read([{"prompt": text}], length=length)
    (example,) = data.train
    (tokens,) = example.completions
    assert len(tokens) == min(length, len(whole)) and tokens.ids[0] == encoders["strings"].bos_id
    np.testing.assert_array_equal(tokens.ids[1:], whole[len(whole) - len(tokens) + 1 :])
    assert example.text == text and tokens.start == len(tokens)
    report = data.report
    assert (report.tokens, report.lost, len(report.cut)) == (
        len(whole), len(whole) - len(tokens), int(length < len(whole))
    )  # fmt: skip


def test_a_long_prompt_is_left_out_or_stops_the_run_where_that_is_asked(read):
    rows = [{"prompt": "Q"}, {"prompt": "Once there was a cat who sat on a mat."}]
    data = read(rows, length=8, too_long="refuse")
    assert asked(data) == ["Q"] and [where[-1] for where in data.report.too_long] == ["2"] and data.report.lost > 0
    with pytest.raises(UserError, match="0.jsonl:2 has a prompt of .* tokens and the length leaves it 8; raise"):
        read(rows, length=8, too_long="stop")
    with pytest.raises(UserError, match="leaves 1 tokens to a prompt, which needs 2 at least"):
        read(rows, length=1)


def test_a_row_that_cannot_be_asked_is_counted(read, encoders):
    rows: list[dict] = [{"prompt": f"Q{i}"} for i in range(50)]
    rows[3], rows[5] = {"prompt": 7}, {"answer": "A"}
    report = read(rows).report
    assert [(where[-1], why) for where, why in report.refused] == [
        ("4", "'prompt' is int, not a string or a list of messages"),
        ("6", "no column 'prompt'"),
    ]
    assert report.train == 48
    with pytest.raises(UserError, match="the rows hold messages and the tokenizer has no chat template"):
        read([{"prompt": turns("user")}])


def test_tools_on_offer_stand_in_the_prompt_or_the_row_is_refused(read, encoders, shared):
    offered = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]
    rows = [{"prompt": turns("user")}, {"prompt": turns("user"), "tools": offered}]
    short, long = read(rows, encoder="chat").train
    assert len(long.completions[0]) > len(short.completions[0]) and long.columns == {"tools": offered}
    tokenizer = AutoTokenizer.from_pretrained(shared / PLACES["chat"])
    encoders["without tools"] = Encoder(tokenizer, str(TEMPLATES / "chatml.jinja"))
    report = read(rows, encoder="without tools", max_refused=1.0).report
    ((where, why),) = report.refused
    assert where.endswith(":2") and "leaves out the tools on offer" in why and report.train == 1


def test_a_row_that_is_scored_ends_where_a_sampled_answer_ends(shared):
    """ChatML writes a newline behind the end-of-turn token, which no completion has."""
    tokenizer = AutoTokenizer.from_pretrained(shared / PLACES["chat"])
    written, scored = (
        Encoder(tokenizer, str(TEMPLATES / "chatml.jinja"), trailing=trailing) for trailing in (True, False)
    )
    prompt, answer = turns("user"), (Message("assistant", "Good day."),)
    whole, cut = (one.encode(tuple(Message(**turn) for turn in prompt), answer) for one in (written, scored))
    assert len(cut) < len(whole) and cut.mask[-1] and cut.ids[-1] in written.stop_ids()
    np.testing.assert_array_equal(cut.ids, whole.ids[: len(cut)])
    np.testing.assert_array_equal(cut.mask, whole.mask[: len(cut)])


def test_a_tied_ranking_still_has_its_prompt(read):
    assert asked(read([{"prompt": "Q", "completions": ["A", "B"], "ranks": [1, 1]}])) == ["Q"]


def test_the_fingerprint_follows_tokens_texts_and_columns(read):
    rows = [{"prompt": f"Q{i} and what else there is", "answer": i} for i in range(5)]
    first = read(rows).fingerprint
    assert read([dict(reversed(row.items())) for row in rows]).fingerprint == first
    changed = [{**rows[0], "answer": 9}, {**rows[0], "prompt": "R"}, {**rows[0], "more": ""}]
    seen = {read([row, *rows[1:]]).fingerprint for row in changed}
    assert len(seen | {first}) == 4
    cut = [read([{"prompt": f"{start} sat on the mat"}], length=4) for start in ("He", "We")]
    np.testing.assert_array_equal(*(data.train[0].completions[0].ids for data in cut))
    assert cut[0].fingerprint != cut[1].fingerprint  # rewards are given the whole text


@pytest.mark.parametrize(("form", "file", "fingerprint"), [
    ("pair", "hh-harmless-base/valid.jsonl", "4f2702e514059b6732fc731f0d246daf"),
    ("demonstration", "alpaca-en-demo/valid.jsonl", "90990b71133bd1e2350988781bc38d71"),
    ("demonstration", "c4-demo/valid.jsonl", "2f549fa004f2b5949e60c8f7baa11570"),
    ("ranking", "dsp-domain-preference/valid.jsonl", "2059a340fa7b3b5bf19e48b2e9584b21"),
    ("labelled", "gsm8k/example_model_solutions.jsonl", "f4d631acdf2a8b79f6a711125724af59"),
    ("stepwise", "mr-gsm8k-first-error/valid.jsonl", "cc5f279226761d71e7dbb399035a65b2"),
])  # fmt: skip
def test_the_fingerprints_of_before_there_were_prompts_stay(shared, form: Form, file, fingerprint):
    """Written down from the code without this form, but for the tokenizer's own part, which its library writes."""
    encoder = Encoder(AutoTokenizer.from_pretrained(shared / PLACES["strings"]))
    encoder.fingerprint = "literal"
    assert load(Data(path=(str(shared / "data" / file),)), encoder, form, 512, 0).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"merge": True}, "data.merge .* this loss needs prompts; drop --config.data.merge"),
        ({"ties": True}, "data.ties .* this loss needs prompts; drop --config.data.ties"),
        ({"probability": "votes"}, "data.probability names a column of pairs.*drop --config.data.probability"),
        ({"margin": "gap"}, "data.margin names a column of pairs.*drop --config.data.margin"),
    ],
)
def test_labels_of_pairs_are_refused(read, config, message):
    with pytest.raises(UserError, match=message):
        read([{"prompt": "Q", "chosen": "A", "rejected": "B", "votes": 1, "gap": 1}], **config)


def test_batches_hold_each_prompt_once_an_epoch_and_nothing_to_train(read):
    data = read([{"prompt": f"Q{i} " + "and so on " * i} for i in range(10)], length=48)
    examples = {example.index: example for example in data.train}
    loader = Loader(data.train, batch_size=5, seed=3, length=48, buckets=(16, 32))
    epoch = [loader.batch(0), loader.batch(1)]
    assert sorted(i for batch in epoch for i in batch["index"]) == sorted(examples)
    for batch in [*epoch, *once(data.train, batch_size=4, length=48)]:
        assert batch.keys() == {"tokens", "mask", "segments", "positions", "weight", "index"}
        assert batch["tokens"].shape[1] == 1 and not batch["mask"].any()
        for row, index in enumerate(batch["index"]):
            ids = examples[index].completions[0].ids if index >= 0 else []
            n, length = len(ids), batch["tokens"].shape[2]
            assert batch["weight"][row] == (index >= 0)
            np.testing.assert_array_equal(batch["tokens"][row, 0], [*ids, *[0] * (length - n)])
            np.testing.assert_array_equal(batch["segments"][row, 0], np.arange(length) < n)
            np.testing.assert_array_equal(batch["positions"][row, 0], [*range(n), *[0] * (length - n)])
    assert [batch["index"].tolist() for batch in once(data.train, batch_size=4, length=48)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, -1, -1]
    ]  # fmt: skip
