"""The boundary between prompt and completion is exact on token ids, for every kind of tokenizer."""

import copy
import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax.data.cutting import fit
from rlhf_jax.data.formats import adapt
from rlhf_jax.data.rows import Message, Preference, Refusal
from rlhf_jax.data.sources import Record, read
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.errors import UserError

TALK = (
    Message("user", "Hello?"),
    Message("assistant", "Good day."),
    Message("user", "How are you?"),
    Message("assistant", "Fine, thanks."),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizers(shared):
    paths = {name: shared / "data/tokenizers" / name for name in ("minimind", "smollm2")}
    paths["stories"] = shared / "models/stories260k"
    return {name: AutoTokenizer.from_pretrained(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def encoders(tokenizers):
    return {name: Encoder(tokenizer) for name, tokenizer in tokenizers.items()}


def completion(tokenizer, tokens: Tokens) -> str:
    """Decoded after the prompt, so that a space that starts the completion is not taken for a prefix."""
    whole = tokenizer.decode(tokens.ids, skip_special_tokens=True)
    return whole.removeprefix(tokenizer.decode(tokens.prompt, skip_special_tokens=True))


# Strings


NAMES = ["stories", "smollm2", "minimind"]
# Special tokens are written with <, | and >; smollm2 has no entry for many control and higher-plane bytes.
words = st.text(
    st.characters(
        max_codepoint=0xFFFF, exclude_categories=["Cc", "Cs"], exclude_characters="<>|", include_characters="\n"
    ),
    max_size=30,
)


@pytest.mark.parametrize("name", NAMES)
def test_strings_survive_the_way_there_and_back(tokenizers, encoders, name):
    @given(words.map("Q".__add__), words.filter(bool))
    def law(prompt, answer):
        tokens = encoders[name].encode(prompt, answer)
        assert tokenizers[name].decode(tokens.ids, skip_special_tokens=True).lstrip(" ") == prompt + answer
        assert completion(tokenizers[name], tokens) == answer
        assert tokens.mask[tokens.start :].all() and tokens.ids.dtype == np.int32
        assert tokens.ids[-1] == tokenizers[name].eos_token_id

    law()


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_alone_is_the_prompt_of_its_row(encoders, name):
    @given(words.map("Q".__add__), words.filter(bool))
    def law(prompt, answer):
        (alone,) = encoders[name].prompts([prompt])
        assert isinstance(alone, np.ndarray) and alone.dtype == np.int32
        np.testing.assert_array_equal(alone, encoders[name].encode(prompt, answer).prompt)

    law()


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_prompt_is_what_stands_between_texts(encoders, name):
    np.testing.assert_array_equal(encoders[name].prompts([""]), [[encoders[name].bos_id]])


def test_an_empty_prompt_without_a_beginning_token_is_the_end_token():
    bare = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    named = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    np.testing.assert_array_equal(Encoder(named).prompts([""]), [[1]])
    nameless = Encoder(PreTrainedTokenizerFast(tokenizer_object=bare))
    assert nameless.stop_ids() == ()
    np.testing.assert_array_equal(nameless.prompts(["a"]), [[0]])
    with pytest.raises(UserError, match="an empty prompt needs a beginning or an end token"):
        nameless.prompts([""])


@pytest.mark.parametrize("name", NAMES)
def test_no_space_is_put_between_prompt_and_completion(tokenizers, encoders, name):
    for answer in ("Yes", " Yes", "  Yes", "\nYes"):
        assert completion(tokenizers[name], encoders[name].encode("Assistant:", answer)) == answer


def test_the_beginning_token_follows_the_tokenizers_own_convention(tokenizers, encoders):
    stories = encoders["stories"].encode("Once", " upon").ids.tolist()
    assert stories[: stories.index(2)] == tokenizers["stories"]("Once upon").input_ids
    assert stories.count(1) == 1
    written = encoders["stories"].encode("<s>Once", " upon").ids.tolist()
    assert written.count(1) == 1
    assert encoders["smollm2"].encode("Once", " upon").ids[0] != tokenizers["smollm2"].bos_token_id


def test_an_end_token_that_the_row_brings_is_not_doubled(encoders):
    for name, end in (("stories", "</s>"), ("smollm2", "<|im_end|>")):
        once, brought = (encoders[name].encode("Once", text) for text in (" upon", " upon" + end))
        np.testing.assert_array_equal(once.ids, brought.ids)


def test_a_truncation_in_tokenizer_json_is_not_applied(shared, encoders):
    state = json.loads((shared / "data/tokenizers/smollm2/tokenizer.json").read_text())
    assert state["truncation"]["max_length"] == 128
    assert len(encoders["smollm2"].encode("word " * 500, "word " * 500)) > 1000


def test_the_first_token_of_a_row_is_never_trained(encoders):
    tokens = encoders["smollm2"].encode("", "Once upon a time")
    assert tokens.mask.tolist() == [False] + [True] * (len(tokens) - 1)


def test_metaspace_tokenizers_are_continued_too():
    letters = {c: i for i, c in enumerate("▁Yesno:")}
    bare = Tokenizer(models.BPE({**letters, "</s>": 7}, []))
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bare.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    ids = Encoder(tokenizer).encode("no:", "Yes").ids.tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁", "n", "o", ":", "Y", "e", "s", "</s>"]


# Conversations


def test_the_masked_tokens_are_the_answers_with_their_end(tokenizers, encoders):
    tokenizer, encoder = tokenizers["minimind"], encoders["minimind"]
    tokens = encoder.encode(TALK[:3], TALK[3:])
    assert tokenizer.decode(tokens.ids[tokens.mask]) == "Fine, thanks.<|im_end|>"
    whole = tokenizer.apply_chat_template([m._asdict() for m in TALK], tokenize=True, return_dict=False)
    assert tokens.ids.tolist() == whole
    every = encoder.encode((), TALK)
    assert every.ids.tolist() == whole
    assert tokenizer.decode(every.ids[every.mask]) == "Good day.<|im_end|>Fine, thanks.<|im_end|>"
    assert tokenizer.decode(every.ids[~every.mask]).count("<|im_end|>") == 2


def test_the_prompts_of_conversations_are_those_of_their_rows(encoders):
    encoder = encoders["minimind"]
    strings, first, second, nothing = encoder.prompts(["Once", TALK[:1], TALK[:3], ()])
    np.testing.assert_array_equal(strings, encoder.encode("Once", " upon").prompt)
    np.testing.assert_array_equal(first, encoder.encode(TALK[:1], TALK[1:2]).prompt)
    np.testing.assert_array_equal(second, encoder.encode(TALK[:3], TALK[3:]).prompt)
    assert isinstance(nothing, Refusal)
    with pytest.raises(UserError, match="no chat template"):
        encoders["smollm2"].prompts([TALK[:1]])


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["<|endoftext|>", "<|im_end|>"]),
        (CHATML.replace("<|im_end|>", " <|im_end|>"), ["<|endoftext|>", "<|im_end|>"]),
        (CHATML.replace("<|im_end|>", "\nUser:"), ["<|endoftext|>"]),
        (CHATML.replace("{{ m.content }}", "{{ m.content[:1] }}"), ["<|endoftext|>"]),
        ("{{ raise_exception('no') }}", ["<|endoftext|>"]),
    ],
)
def test_a_completion_ends_with_its_text_or_its_turn(tokenizers, tmp_path, template, ends):
    file = tmp_path / "template.jinja"
    file.write_text(template)
    tokenizer = copy.deepcopy(tokenizers["minimind"])
    tokenizer.eos_token = "<|endoftext|>"
    encoder = Encoder(tokenizer, str(file))
    assert tokenizer.convert_ids_to_tokens(encoder.stop_ids()) == ends
    assert encoder.stop_ids([7, tokenizer.eos_token_id, 7]) == (*encoder.stop_ids(), 7)


def test_a_template_file_serves_a_tokenizer_that_has_none(tokenizers, encoders, tmp_path):
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    assert not encoders["smollm2"].chat
    with pytest.raises(UserError, match="--config.data.chat_template=FILE"):
        encoders["smollm2"].encode(TALK[:1], TALK[1:2])
    encoder = Encoder(tokenizers["smollm2"], str(file))
    tokens = encoder.encode(TALK[:1], TALK[1:2])
    assert encoder.chat and tokenizers["smollm2"].chat_template is None
    assert tokenizers["smollm2"].decode(tokens.ids[tokens.mask]) == "Good day.<|im_end|>"
    assert encoder.fingerprint != encoders["smollm2"].fingerprint
    with pytest.raises(UserError, match="no chat template"):
        Encoder(tokenizers["smollm2"], str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"),
            "renders the prompt differently",
        ),
        ("{{ messages | length }}" + CHATML, "renders the prompt differently"),
        (CHATML.replace("{{ m.content }}", "{{ m.content if loop.last else '' }}"), "differently"),
        ("{{ raise_exception('roles must alternate') }}", "fails on the row .*roles must alternate"),
        ("{{ bos_token }}" + CHATML, "beginning token twice"),
    ],
)
def test_a_row_whose_boundary_cannot_be_trusted_is_refused(tokenizers, tmp_path, template, reason):
    file = tmp_path / "template.jinja"
    file.write_text(template)
    encoder = Encoder(tokenizers["minimind"], str(file))
    with pytest.raises(Refusal, match=reason):
        encoder.encode((), TALK)
    (refusal,) = encoder.encode_many([((), TALK)])
    assert isinstance(refusal, Refusal)


def test_a_batch_is_the_rows_one_by_one_also_when_kinds_are_mixed(encoders):
    encoder = encoders["minimind"]
    pairs = [("Once", " upon"), (TALK[:1], TALK[1:2]), ((), TALK), ("", "a"), ("Once", TALK[1:2])]
    together = encoder.encode_many(pairs)
    for pair, row in zip(pairs[:4], together[:4], strict=True):
        alone = encoder.encode(*pair)
        assert isinstance(row, Tokens)
        np.testing.assert_array_equal(row.ids, alone.ids)
        np.testing.assert_array_equal(row.mask, alone.mask)
    assert isinstance(together[4], Refusal)


def test_template_and_vocabulary_decide_the_fingerprint(tokenizers, encoders):
    assert Encoder(tokenizers["minimind"]).fingerprint == encoders["minimind"].fingerprint
    assert len({encoder.fingerprint for encoder in encoders.values()}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_every_real_pair_is_encoded_and_its_sides_share_the_prompt(shared, encoders, name):
    rows = []
    for record in read(str(shared / "data/hh-harmless-base/valid.jsonl")):
        assert isinstance(record, Record)
        try:
            (row,) = adapt("hh", record.columns, encoders[name].chat)
        except Refusal:
            continue
        assert isinstance(row, Preference)
        rows += [(row.prompt, row.chosen), (row.prompt, row.rejected)]
    start = time.perf_counter()
    tokens = [t for t in encoders[name].encode_many(rows) if isinstance(t, Tokens)]
    assert time.perf_counter() - start < 5
    assert len(tokens) == len(rows)
    for chosen, rejected in zip(tokens[::2], tokens[1::2], strict=True):
        np.testing.assert_array_equal(chosen.prompt, rejected.prompt)


# The length


def row(head: int, prompt: int, answer: int) -> Tokens:
    n = head + prompt + answer
    return Tokens(np.arange(n, dtype=np.int32), np.arange(n) >= head + prompt, head)


@given(st.integers(0, 1), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(2, 40))
def test_cutting_takes_the_oldest_prompt_tokens_and_nothing_else(head, prompt, first, second, length):
    rows = [row(head, prompt, first), row(head, prompt, second)]
    cut = fit(rows, length)
    if cut is None:
        assert max(first, second) + 1 > length
        return
    assert max(map(len, cut)) == min(length, max(map(len, rows)))
    np.testing.assert_array_equal(cut[0].prompt, cut[1].prompt)
    for before, after in zip(rows, cut, strict=True):
        np.testing.assert_array_equal(after.ids[after.mask], before.ids[before.mask])
        kept = after.prompt[head:]
        np.testing.assert_array_equal(kept, before.prompt[before.start - len(kept) :])
        assert after.start >= 1 and (not head or after.ids[0] == 0)


def test_rows_rendered_ahead_can_have_their_special_tokens_read(tokenizers):
    """Text is the default; `special="tokens"` reads what is written out."""
    tokenizer = tokenizers["minimind"]
    end = tokenizer.eos_token
    text, tokens = Encoder(tokenizer), Encoder(tokenizer, special="tokens")
    row = f"one{end}two", "three"
    assert text.keeps_as_text(*row) and not text.keeps_as_text("one", f"two{end}") and not tokens.keeps_as_text(*row)
    assert text.keeps_as_text(f"one{end}", "two"), "an end token ends answers, not prompts"
    kept, read = text.encode(*row), tokens.encode(*row)
    assert (kept.ids == text.eos_id).sum() == 1 and (read.ids == text.eos_id).sum() == 2
    assert tokenizer.decode(kept.ids) == tokenizer.decode(read.ids)
