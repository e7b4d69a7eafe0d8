"""Steps end at the tokens that their text ends with, whatever is done to a row after that."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_jax.data.config import Data
from rlhf_jax.data.cutting import fit, pieces
from rlhf_jax.data.dataset import Example, load
from rlhf_jax.data.inspection import Reader, inspect
from rlhf_jax.data.loader import Loader
from rlhf_jax.data.rows import Message, Refusal
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.errors import UserError

QUESTION = (Message("user", "1 + 2 + 3?"),)
NAMES = ["stories", "smollm2", "minimind"]
TRIMMED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
words = st.text(st.characters(max_codepoint=0x2FF, exclude_categories=["Cc", "Cs"], exclude_characters="<>|"))
texts = st.lists(words.filter(bool), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def tokenizers(shared):
    paths = {name: shared / "data/tokenizers" / name for name in ("minimind", "smollm2")}
    paths["stories"] = shared / "models/stories260k"
    return {name: AutoTokenizer.from_pretrained(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def encoders(tokenizers):
    return {name: Encoder(tokenizer) for name, tokenizer in tokenizers.items()}


def ends_of(steps) -> tuple[int, ...]:
    return tuple(itertools.accumulate(map(len, steps)))


def parts(tokenizer, tokens: Tokens) -> list[str]:
    """The text that each step adds to what stands before it."""
    upto = [tokenizer.decode(tokens.ids[:end].tolist()) for end in (tokens.start, *(tokens.ends + 1))]
    return [after.removeprefix(before) for before, after in itertools.pairwise(upto)]


# Tokens


@pytest.mark.parametrize("name", NAMES)
def test_each_step_of_strings_is_its_own_tokens(tokenizers, encoders, name):
    @settings(deadline=None)
    @given(words.map("Q".__add__), texts)
    def law(prompt, steps):
        tokens = encoders[name].encode(prompt, "".join(steps), ends=ends_of(steps))
        assert tokens.ends.dtype == np.int32 and (np.diff(tokens.ends, prepend=tokens.start - 1) > 0).all()
        assert parts(tokenizers[name], tokens) == steps
        assert tokens.ends[-1] == len(tokens) - 2 and tokens.ids[-1] == encoders[name].eos_id
        np.testing.assert_array_equal(tokens.prompt, encoders[name].encode(prompt, "a").prompt)
        whole = tokenizers[name].decode(tokens.ids, skip_special_tokens=True)
        assert whole.lstrip(" ") == prompt + "".join(steps)

    law()


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_completion(encoders, name):
    for prompt in ("Q", ""):
        whole, stepped = (encoders[name].encode(prompt, "a few words", ends=ends) for ends in ((), (11,)))
        np.testing.assert_array_equal(whole.ids, stepped.ids)
        assert whole.ends.shape == (0,) and stepped.ends.tolist() == [len(whole) - 2]


def test_an_end_token_that_the_last_step_brings_is_no_steps(encoders):
    encoder = encoders["stories"]
    brought, once = (encoder.encode("Q", text, ends=(2, len(text))) for text in ("a b</s>", "a b"))
    np.testing.assert_array_equal(brought.ids, once.ids)
    np.testing.assert_array_equal(brought.ends, once.ends)
    with pytest.raises(Refusal, match="step 2 of 2 has no token of its own"):
        encoder.encode("Q", "a</s>", ends=(1, 5))
    with pytest.raises(Refusal, match="step 1 of 2 has no token of its own"):
        encoder.encode("Q", "ab", ends=(0, 2))
    guarded = encoder.encode("Q", "a </s> b c", ends=(7, 10))
    assert (guarded.ids == encoder.eos_id).sum() == 1 and len(guarded.ends) == 2


@pytest.mark.parametrize("steps", [["One.\n", "Two.\n", "Three."], ["One", " and two", " is <|im_end|> three."]])
def test_steps_of_a_message_are_found_in_its_rendering(tokenizers, encoders, steps):
    tokenizer, encoder = tokenizers["minimind"], encoders["minimind"]
    answer = (Message("assistant", "".join(steps)),)
    tokens = encoder.encode(QUESTION, answer, ends=ends_of(steps))
    whole = encoder.encode(QUESTION, answer)
    np.testing.assert_array_equal(tokens.ids, whole.ids)
    np.testing.assert_array_equal(tokens.mask, whole.mask)
    assert parts(tokenizer, tokens)[1:] == steps[1:] and parts(tokenizer, tokens)[0].endswith(steps[0])
    assert tokens.ids[tokens.ends[-1] + 1] == encoder.eos_id


def test_markup_that_the_assistant_writes_belongs_to_its_step(tokenizers, encoders):
    steps = ["<tool_call>", "one", "</tool_call>", " two"]
    answer = (Message("assistant", "".join(steps)),)
    tokens = encoders["minimind"].encode(QUESTION, answer, ends=ends_of(steps))
    assert np.diff(tokens.ends).tolist()[1] == 1 and len(tokens.ends) == 4
    assert [tokenizers["minimind"].decode(tokens.ids[e]) for e in tokens.ends[[0, 2]]] == [
        "<tool_call>",
        "</tool_call>",
    ]


def test_white_space_that_a_template_trims_belongs_to_no_step(tokenizers, tmp_path):
    (tmp_path / "trim.jinja").write_text(TRIMMED)
    encoder = Encoder(tokenizers["smollm2"], str(tmp_path / "trim.jinja"))
    steps = [" One.\n", "Two.\n"]
    tokens = encoder.encode(QUESTION, (Message("assistant", "".join(steps)),), ends=ends_of(steps))
    assert parts(tokenizers["smollm2"], tokens) == ["One.\n", "Two."]
    with pytest.raises(Refusal, match="step 2 of 2 has no token of its own"):
        encoder.encode(QUESTION, (Message("assistant", "One.\n"),), ends=(4, 5))


def test_boundaries_that_are_none_of_the_tokens_are_refused(tokenizers, encoders, tmp_path):
    with pytest.raises(Refusal, match="joins what stands before and after a boundary"):
        encoders["minimind"].encode(QUESTION, (Message("assistant", "together"),), ends=(2, 8))
    (tmp_path / "upper.jinja").write_text(TRIMMED.replace("trim", "upper"))
    encoder = Encoder(tokenizers["smollm2"], str(tmp_path / "upper.jinja"))
    with pytest.raises(Refusal, match="changes the text of an answer"):
        encoder.encode(QUESTION, (Message("assistant", "one two"),), ends=(3, 7))
    (row,) = encoder.encode_many([(QUESTION, (Message("assistant", "one two"),), "", (3, 7))])
    assert isinstance(row, Refusal)


# Rows


def stepped(rng, prompt: int, steps: int, index: int = 0) -> Example:
    counts = rng.integers(1, 6, steps)
    n = 1 + prompt + counts.sum() + 1
    ids = rng.integers(3, 99, n).astype(np.int32)
    ends = (prompt + counts.cumsum()).astype(np.int32)
    labels = tuple(rng.choice([0.0, 0.5, 1.0], steps).tolist())
    tokens = Tokens(ids, np.arange(n) > prompt, 1, ends)
    return Example((tokens,), (), index, index, 0, f"rows:{index}", step_labels=labels)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(2, 60))
def test_cutting_keeps_the_tokens_that_steps_end_with(prompt, steps, length):
    (row,) = stepped(np.random.default_rng(prompt), prompt, steps).completions
    cut = fit([row], length)
    if cut is not None:
        np.testing.assert_array_equal(cut[0].ids[cut[0].ends], row.ids[row.ends])
        assert cut[0].ends.dtype == np.int32


@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 20))
def test_each_step_ends_in_one_piece_of_a_text(prompt, steps, length):
    (row,) = stepped(np.random.default_rng(prompt), prompt, steps).completions
    parts = pieces(row, length)
    ended = np.concatenate([part.ids[part.ends] for part in parts])
    np.testing.assert_array_equal(ended, row.ids[row.ends])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.booleans(), st.integers(0, 5))
def test_the_columns_say_where_steps_end_packed_or_not(n, pack, seed):
    rng = np.random.default_rng(seed)
    made = [stepped(rng, int(rng.integers(1, 9)), int(rng.integers(1, 5)), i) for i in range(n)]
    loader = Loader(made, batch_size=1, length=64, pack=pack, seed=seed)
    seen = []
    for i in range(len(loader.rows)):
        batch = loader.batch(i)
        ends, labels = batch["step_ends"][0, 0], batch["step_labels"][0, 0]
        assert ends.dtype == np.bool_ and labels.dtype == np.float32 and batch["step_ends"].shape == batch["mask"].shape
        assert not labels[~ends].any()
        for number, index in enumerate(np.atleast_1d(batch["index"][0])):
            here = batch["segments"][0, 0] == number + 1
            if index >= 0:
                (tokens,) = made[index].completions
                np.testing.assert_array_equal(np.flatnonzero(ends[here]), tokens.ends)
                np.testing.assert_array_equal(labels[here][tokens.ends], np.float32(made[index].step_labels))
                seen.append(index)
    assert sorted(seen) == list(range(n))


def test_a_crossed_row_has_the_steps_of_its_answer():
    rng = np.random.default_rng(0)
    made = [stepped(rng, prompt, 3, i) for i, prompt in enumerate((4, 9))]
    loader = Loader(made, batch_size=1, length=64, mismatched=True)
    (crossed,) = loader._crossed(0, 1)
    (answer,) = made[1].completions
    np.testing.assert_array_equal(crossed.ids[crossed.ends], answer.ids[answer.ends])
    np.testing.assert_array_equal(crossed.prompt, made[0].completions[0].prompt)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


STEPS = [
    {"prompt": "Q:", "completions": [" one", " two", " three"], "labels": [True, 0, 1]},
    {"prompt": "Q:", "completions": [" one", " four"], "ratings": [1, 0]},
]


def test_rows_of_steps_become_what_the_loss_takes(tmp_path, encoders):
    files = tuple(write(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate(STEPS))
    config = Data(path=files, eval_share=0.0)
    steps = load(config, encoders["stories"], "stepwise", 64, 0)
    assert [e.step_labels for e in steps.train] == [(1.0, 0.0, 1.0), (1.0, 0.5)]
    assert [len(e.completions[0].ends) for e in steps.train] == [3, 2]
    wholes = load(config, encoders["stories"], "labelled", 64, 0).train
    assert [e.labels for e in wholes] == [(False,), (True,)] and not any(e.step_labels for e in wholes)
    wanted = encoders["stories"].encode("Q:", " one two three")
    np.testing.assert_array_equal(wholes[0].completions[0].ids, wanted.ids)
    with pytest.raises(UserError, match=r"holds labelled steps .*--config.algorithm=reward --config.loss.name=process"):
        load(config, encoders["stories"], "pair", 64, 0)
    labelled = write(tmp_path / "l.jsonl", [{"prompt": "Q", "completion": "a", "label": True}])
    with pytest.raises(UserError, match="needs solutions with a label for each step .*loss.name=kto.*=outcome"):
        load(Data(path=(labelled,)), encoders["stories"], "stepwise", 64, 0)


def test_a_solution_without_a_prompt_is_never_cut_into_pieces(tmp_path, encoders):
    rows = [STEPS[0], {"prompt": "", "completions": [" word" * 40, " end"], "labels": [1, 0]}]
    path = write(tmp_path / "rows.jsonl", rows)
    report = load(Data(path=(path,), eval_share=0.0), encoders["stories"], "stepwise", 32, 0).report
    assert report.too_long == (f"{path}:2",) and not report.split


def test_labels_and_ends_of_steps_change_the_fingerprint(tmp_path, encoders):
    said = set()
    for change in ({}, {"labels": [1, 1, 1]}, {"completions": [" one", " two th", "ree"]}):
        path = write(tmp_path / "rows.jsonl", [STEPS[0] | change])
        said.add(load(Data(path=(path,), eval_share=0.0), encoders["stories"], "stepwise", 64, 0).fingerprint)
    assert len(said) == 3


# Rows to show


@pytest.mark.parametrize("name", [None, "stories", "minimind"])
def test_steps_are_shown_one_by_one(tmp_path, tokenizers, encoders, name):
    prompt = "Q:" if name != "minimind" else [{"role": "user", "content": "Q:"}]
    path = write(tmp_path / "rows.jsonl", [STEPS[0] | {"prompt": prompt}])
    (sample,) = inspect(path, reader=name and Reader(encoders[name], tokenizers[name])).samples
    assert [name for name, _ in sample.parts] == ["step 1, right", "step 2, wrong", "step 3, right"]
    trained = ["".join(p.text for p in pieces if p.role == "trained" and not p.special) for _, pieces in sample.parts]
    assert [text.strip() for text in trained] == ["one", "two", "three"]
    assert [any(p.role == "prompt" and p.text.strip() for p in pieces) for _, pieces in sample.parts] == [
        True,
        False,
        False,
    ]


def test_facts_of_steps_count_neutral_ones(tmp_path):
    rows = [{"prompt": "q", "completions": ["a", "b", "c"], "ratings": ratings} for ratings in ([1, 0, 1], [1, 1, -1])]
    facts = dict(inspect(write(tmp_path / "rows.jsonl", rows)).facts)
    assert facts["right steps"].startswith("4 of 6") and facts["neutral steps"].startswith("1 of 6")
    assert facts["rows without a wrong step"].startswith("1 of 2")
