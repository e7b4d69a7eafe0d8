"""What is trained of a conversation, of every template and kind of row; `chat.CASES` is the table."""

import datetime
import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax.data.rows import Conversation, Message, Refusal
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.errors import UserError
from tests.chat import (
    CASES,
    HERMES_CALL,
    SHARED,
    SYSTEM,
    TALK,
    TEMPLATES,
    THOUGHT,
    TOOLS,
    USE,
    Case,
    Kit,
    Refused,
    base,
    chatml,
    tokenizer,
)

EXACT = [name for name, case in CASES.items() if isinstance(case.answer, str)]


@pytest.fixture(scope="session")
def plain() -> Tokenizer:
    return base()


@pytest.fixture(scope="session")
def kits(plain: Tokenizer):
    """Makes the kit of a name, once."""
    made: dict[str, Kit] = {}

    def make(name: str, shared: pathlib.Path | None) -> Kit:
        if name not in made:
            made[name] = _kit(name, shared, plain)
        return made[name]

    return make


def _kit(name: str, shared: pathlib.Path | None, plain: Tokenizer) -> Kit:
    if name in SHARED:
        assert shared is not None
        file = None if name == "minimind" else str(TEMPLATES / "chatml.jinja")
        return Kit(AutoTokenizer.from_pretrained(shared / "data/tokenizers" / name), file)
    return Kit(tokenizer(CASES[name], plain), str(TEMPLATES / f"{name}.jinja"))


@pytest.fixture
def kit(request: pytest.FixtureRequest, name: str, kits) -> Kit:
    return kits(name, request.getfixturevalue("shared") if name in SHARED else None)


every = pytest.mark.parametrize("name", CASES)
exact = pytest.mark.parametrize("name", EXACT)


def check(kit: Kit, encoder: Encoder, prompt, completion, tools: str, expected: list[str] | Refused) -> None:
    """The trained texts are those, and begin behind what a completion is drawn behind; or the reason is that."""
    (row,) = encoder.encode_many([(prompt, completion, tools)])
    if isinstance(expected, Refused):
        assert isinstance(row, Refusal) and expected.why in str(row), row
        return
    assert isinstance(row, Tokens), row
    assert kit.trained(row) == expected
    turns = prompt + completion
    starts = [i for i, m in enumerate(turns) if m.role == "assistant" and i >= len(prompt)][-len(expected) :]
    edges = np.flatnonzero(np.diff(row.mask.astype(np.int8)) == 1) + 1
    for start, edge in zip(starts, edges, strict=True):
        (drawn,) = encoder.prompts([turns[:start]], [tools])
        assert isinstance(drawn, np.ndarray)
        np.testing.assert_array_equal(drawn, row.ids[:edge])


def answers(case: Case, *texts: str) -> list[str] | Refused:
    return case.answer if isinstance(case.answer, Refused) else [case.answer.format(text) for text in texts]


@every
def test_one_answer(kit, name):
    check(kit, kit.all, TALK[:1], TALK[1:2], "", answers(CASES[name], "Good day."))
    check(kit, kit.last, TALK[:1], TALK[1:2], "", answers(CASES[name], "Good day."))


@every
def test_three_answers(kit, name):
    texts = [message.content for message in TALK[1::2]]
    check(kit, kit.all, (), TALK, "", CASES[name].talk or answers(CASES[name], *texts))
    check(kit, kit.last, (), TALK, "", answers(CASES[name], texts[-1]))
    check(kit, kit.all, TALK[:-1], TALK[-1:], "", answers(CASES[name], texts[-1]))


@every
def test_a_system_message(kit, name):
    check(kit, kit.all, (SYSTEM, *TALK[:1]), TALK[1:2], "", CASES[name].system or answers(CASES[name], "Good day."))


@every
def test_a_tool_is_called(kit, name):
    check(kit, kit.all, USE[:1], USE[1:], TOOLS, CASES[name].tools)


@every
def test_an_answer_with_thinking(kit, name):
    expected = CASES[name].thought
    check(kit, kit.all, TALK[4:5], (THOUGHT,), "", [expected] if isinstance(expected, str) else expected)


# Special tokens in the text of a row


def steering(kit: Kit) -> tuple[list[str], list[str]]:
    """Special tokens, and the other added ones that a template may write."""
    added = kit.tokenizer.added_tokens_decoder.values()
    other = [t.content for t in added if not t.special and t.content in kit.source and t.content.startswith("<")]
    return [t.content for t in added if t.special], other


def check_text(kit: Kit, case: Case, messages: Conversation, harmless: Conversation) -> None:
    """The row has the special tokens of the `harmless` one, its ids decode to its text, and the mask is exact."""
    row, other = kit.all.encode(messages[:-1], messages[-1:]), kit.all.encode(harmless[:-1], harmless[-1:])
    special = [kit.tokenizer.convert_tokens_to_ids(token) for token in itertools.chain(*steering(kit))]
    assert [i for i in row.ids.tolist() if i in special] == [i for i in other.ids.tolist() if i in special]
    (drawn,) = kit.all.prompts([messages[:-1]])
    assert isinstance(drawn, np.ndarray)
    np.testing.assert_array_equal(drawn, row.prompt)
    whole, before = kit.rendered(messages, False), kit.rendered(messages[:-1], True)
    (trained,) = kit.trained(row)
    assert isinstance(case.answer, str) and trained.endswith(case.answer.rpartition("{}")[2])
    assert whole.startswith(before)
    after = whole.removeprefix(before)
    if case.swallow:  # such a token takes in the white space behind it, also that of the answer
        after = after.lstrip()
    rest = after.removeprefix(trained)
    assert trained + rest == after and rest.strip() in ("", case.eos)
    decoded = kit.tokenizer.decode(row.ids, skip_special_tokens=False)
    if case.swallow:
        whole, decoded = (re.sub(r"(<\|\w+\|>)\s+", r"\1", text) for text in (whole, decoded))
    assert decoded == whole


@exact
def test_special_tokens_in_a_text_stay_text(kit, name):
    special, other = steering(kit)
    every = "a " + "b".join((*special, *other)) + " c<|im_start|>assistant\nd"

    def talk(asked: str, said: str) -> Conversation:
        first = () if CASES[name].system else (Message("system", asked),)
        return (*first, Message("user", asked), Message("assistant", said), Message("user", asked), *TALK[1:2])

    check_text(kit, CASES[name], talk(every, "".join(special)), talk("x", "x"))
    last = Message("assistant", "a " + "b".join(special) + " c")
    check_text(kit, CASES[name], (*TALK[:1], last), TALK[:2])


@exact
def test_no_text_moves_a_boundary(kit, name):
    special, other = steering(kit)

    def texts(tokens: list[str]):
        pieces = st.one_of(st.sampled_from(tokens), st.text("ab <|/>n\n{é", max_size=4))
        return st.lists(pieces, max_size=4).map("".join)

    def harmless(text: str) -> str:
        return re.sub("|".join(map(re.escape, sorted((*special, *other), key=len, reverse=True))), "x", text)

    @settings(max_examples=12, deadline=None)
    @example("", " ")
    @example(" ", " a")
    @given(texts([*special, *other]), texts(special))
    def law(asked, said):
        messages = (Message("user", asked), Message("assistant", said))
        try:
            check_text(kit, CASES[name], messages, tuple(Message(m.role, harmless(m.content)) for m in messages))
        except Refusal as refusal:
            assert re.search("joins what stands before and after|changes text that holds a special token", str(refusal))

    law()


def test_special_tokens_in_tools_and_their_results_stay_text(kits):
    kit = kits("qwen25", None)
    tools = TOOLS.replace("Looks up.", "<|im_end|></tool_call>")
    call = USE[1]._replace(more=USE[1].more.replace("Oslo", "<|im_end|>"))
    row = kit.all.encode(USE[:1], (call, USE[2]._replace(content="</tool_response><|im_end|>"), USE[3]), tools)
    assert kit.trained(row)[0] == HERMES_CALL.replace("Oslo", "<|im_end|>")
    plain = kit.all.encode(USE[:1], USE[1:], TOOLS)
    assert kit.special(row) == kit.special(plain)


def test_what_an_assistant_thinks_in_its_text_is_its_tokens(kits):
    kit = kits("qwen3", None)
    thought = Message("assistant", "<think>\nClouds.\n</think>\n\nIt will.")
    row = kit.all.encode(TALK[:1], (thought,))
    np.testing.assert_array_equal(row.ids, kit.all.encode(TALK[:1], (THOUGHT,)).ids)
    assert kit.tokenizer.convert_tokens_to_ids("<think>") in row.ids
    asked = kit.all.encode((Message("user", "What is <think>?"),), TALK[1:2])
    assert asked.ids.tolist().count(kit.tokenizer.convert_tokens_to_ids("<think>")) == 1


def test_special_tokens_in_strings_stay_text(kits):
    kit = kits("llama2", None)
    row = kit.all.encode("a</s><s>b", "</s>c<s></s>")
    assert kit.tokenizer.decode(row.ids, skip_special_tokens=False) == "a</s><s>b</s>c<s></s>"
    assert kit.special(row) == [kit.tokenizer.eos_token_id] and row.ids[-1] == kit.tokenizer.eos_token_id
    (drawn,) = kit.all.prompts(["a</s><s>b"])
    np.testing.assert_array_equal(drawn, row.prompt)
    with pytest.raises(Refusal, match="tools on offer need messages"):
        kit.all.encode("a", "b", TOOLS)


@pytest.mark.parametrize(
    ("messages", "template", "reason"),
    [
        ((Message("user", "a\ufdd0"), TALK[1]), "", "holds a character of U.FDD0"),
        ((Message("user", "<|im_end|>"), TALK[1]), "{{ messages[0].content | length }}", "changes text that holds"),
    ],
)
def test_a_text_that_cannot_be_kept_is_refused(plain, tmp_path, messages, template, reason):
    encoder = chatml(plain, tmp_path, template + (TEMPLATES / "chatml.jinja").read_text()).all
    with pytest.raises(Refusal, match=reason):
        encoder.encode((), messages)
    assert isinstance(encoder.prompts([messages[:1]])[0], Refusal)


def test_a_vocabulary_that_makes_a_special_token_of_plain_text_refuses_it():
    pieces = {piece: i for i, piece in enumerate(["<", "/", "s", ">", "</", "s>", "</s>"])}
    bare = Tokenizer(models.BPE(pieces, [("<", "/"), ("s", ">"), ("</", "s>")]))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>"))
    assert encoder.encode("<s", "s").ids.tolist() == [0, 2, 2, 6]
    for prompt, answer in (("s</s>", "s"), ("s", "s</s>s")):
        with pytest.raises(Refusal, match="makes a special token of plain text"):
            encoder.encode(prompt, answer)
    assert isinstance(encoder.prompts(["s</s>"])[0], Refusal)


def test_numbers_that_a_vocabulary_leaves_out_are_not_taken_for_others():
    bare = Tokenizer(models.BPE({"a": 0, "<": 1, "/": 2, "</s>": 4, "s": 6, ">": 7}, []))
    bare.add_special_tokens(["</s>"])
    named = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>")
    row = Encoder(named).encode("a>s", "s</s>></s>")
    assert named.convert_ids_to_tokens(row.ids.tolist()) == [*"a>ss</s>>", "</s>"]


# What a template says and does not say


HEADER = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
FOOTER = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OTHERS = "{% if m.role != 'assistant' %}{{ m.content + '<|im_end|>\n' }}{% else %}"
THINKING = "{% if loop.last %}{{ '<think>\n</think>\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}", ["{}<|im_end|>"] * 3),
        ("{%- generation -%} {{ m.content }} {%- endgeneration -%} <|im_end|>\n", ["{}<|im_end|>"] * 3),
        (
            "{% generation %}" + THINKING + "{{ m.content }}<|im_end|>\n{% endgeneration %}",
            ["{}<|im_end|>", "{}<|im_end|>", "<think>\n</think>\n{}<|im_end|>"],
        ),
        (
            "{% generation %}" + THINKING + "{% endgeneration %}note {% generation %}"
            "{{ m.content }}<|im_end|>{% endgeneration %}\n",
            ["{}<|im_end|>", "{}<|im_end|>", "<think>\n</think>\n", "{}<|im_end|>"],
        ),
        ("{% generation %}{{ m.content }}{% endgeneration %} <|im_end|>\n", "writes no end token"),
        ("{{ m.content }}<|im_end|>{% if loop.last %}{% generation %}!{% endgeneration %}{% endif %}", "hold nothing"),
    ],
)
def test_generation_blocks_say_what_is_the_assistants(plain, tmp_path, block, expected):
    kit = chatml(plain, tmp_path, HEADER + OTHERS + block + "{% endif %}" + FOOTER)
    (row,) = kit.all.encode_many([((), TALK)])
    if isinstance(expected, str):
        assert isinstance(row, Refusal) and expected in str(row)
        return
    assert isinstance(row, Tokens)
    texts = iter(message.content for message in TALK[1::2])
    whole = [pattern.format(next(texts)) if "{}" in pattern else pattern for pattern in expected]
    assert kit.trained(row) == whole


def test_a_turn_that_is_written_otherwise_later_is_named_and_the_last_can_be_trained(kits):
    kit = kits("qwen3", None)
    with pytest.raises(Refusal, match=r"\(assistant turn 2 of 3\); --config.data.train_on=last would train the last"):
        kit.all.encode(TALK[:2], TALK[2:])
    with pytest.raises(Refusal, match="of 2"):
        kit.all.encode(USE[:1], USE[1:], TOOLS)
    assert kit.trained(kit.last.encode(USE[:1], USE[1:], TOOLS)) == [kit_answer("qwen3", "It will.")]
    thought = USE[1]._replace(more=json.dumps(json.loads(USE[1].more) | {"reasoning_content": "Clouds?"}))
    both = kit.trained(kit.all.encode(USE[:1], (thought, *USE[2:]), TOOLS))
    assert both == ["<think>\nClouds?\n</think>\n\n" + HERMES_CALL, kit_answer("qwen3", "It will.")]


def kit_answer(name: str, text: str) -> str:
    answer = CASES[name].answer
    assert isinstance(answer, str)
    return answer.format(text)


def test_tools_that_are_written_before_the_last_question_alone_leave_the_last_answer(kits):
    kit = kits("mistral3", None)
    with pytest.raises(Refusal, match=r"renders the prompt differently .* turn 1 of 3\); --config.data.train_on=last"):
        kit.all.encode((), TALK, TOOLS)
    assert kit.trained(kit.last.encode((), TALK, TOOLS)) == [" It will.</s>"]


@pytest.mark.parametrize("name", ["chatml", "qwen25"])
def test_a_prompt_with_tools_is_asked_as_it_is_trained(kits, name):
    (ids,) = kits(name, None).all.prompts([USE[:1]], [TOOLS])
    assert ("the tools on offer" in str(ids)) == (name == "chatml")
    (ids,) = kits(name, None).all.prompts(["Will it rain?"], [TOOLS])
    assert isinstance(ids, Refusal)


def test_what_stands_after_the_last_answer_is_never_trained(kits):
    kit = kits("chatml", None)
    assert kit.trained(kit.last.encode((), TALK[:5])) == ["Fine, thanks.<|im_end|>"]
    with pytest.raises(Refusal, match="nothing stands before the first assistant turn"):
        kit.all.encode((), TALK[1:])
    assert kit.trained(kit.last.encode((), TALK[1:])) == ["It will.<|im_end|>"]
    with pytest.raises(Refusal, match="no token is left to train"):
        kit.all.encode(TALK[:1], TALK[2:3])


def test_a_turn_may_end_with_another_special_token(plain, tmp_path):
    call = "{{ m.content }}{{ '<|im_start|>' if m.tool_calls else '<|im_end|>' }}"
    kit = chatml(plain, tmp_path, HEADER + call + "\n" + FOOTER)
    with pytest.raises(Refusal, match="leaves out calls of tools|leaves out the tools"):
        kit.all.encode(USE[:1], USE[1:], TOOLS)
    rows = kit.all.encode(USE[:1], USE[1:])
    assert kit.trained(rows) == ["<|im_start|>", "It will.<|im_end|>"]


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_template_that_leaves_out_a_message_is_refused(plain, tmp_path, role):
    kit = chatml(plain, tmp_path, HEADER + "{{ m.content if m.role != '" + role + "' }}<|im_end|>\n" + FOOTER)
    with pytest.raises(Refusal, match=f"leaves out messages of the role {role}"):
        kit.all.encode((*TALK[:1], Message(role, "Now."), *TALK[:1]), TALK[1:2])


@pytest.mark.parametrize(("name", "date"), [("llama31", "26 Jul 2024"), ("smollm3", "26 July 2024")])
def test_today_is_always_the_same_day(kits, name, date):
    kit = kits(name, None)
    (ids,) = kit.all.prompts([TALK[:1]])
    assert f"Today Date: {date}\n" in kit.tokenizer.decode(ids)


@pytest.mark.parametrize("form", ["%d/%m/%y", "%A, %-d %B %Y", "%Y-%m-%dT%H:%M:%S", "%j %F %e %p %%"])
def test_the_day_is_written_in_every_form(plain, tmp_path, form):
    source = (
        "  {% if true %}{{ strftime_now('" + form + "') }}|{% endif %}\n" + (TEMPLATES / "chatml.jinja").read_text()
    )
    kit = chatml(plain, tmp_path, source)
    (ids,) = kit.all.prompts([TALK[:1]])
    written, _, _ = kit.tokenizer.decode(ids).partition("|")
    assert written == datetime.datetime(2024, 7, 26, 12).strftime(form)


def test_a_tokenizer_may_have_another_template_for_tools(kits, plain):
    named = tokenizer(CASES["qwen25"], plain)
    plainly, tools = ((TEMPLATES / f"{name}.jinja").read_text() for name in ("chatml", "qwen25"))
    named.chat_template = {"default": plainly, "tool_use": tools}
    encoder = Encoder(named)
    calls = kits("qwen25", None).all.encode(USE[:1], USE[1:], TOOLS)
    np.testing.assert_array_equal(encoder.encode(USE[:1], USE[1:], TOOLS).ids, calls.ids)
    assert str(named.decode(encoder.encode(TALK[:1], TALK[1:2]).ids)).startswith("<|im_start|>user\nHello?<|im_end|>")
    empty, none = (encoder.encode(TALK[:1], TALK[1:2], tools) for tools in ("[]", ""))
    np.testing.assert_array_equal(empty.ids, none.ids)
    for tools, reason in (('{"name": "sky"}', "no list"), ("{", "not JSON"), ('["sky"]', "fails on the row")):
        with pytest.raises(Refusal, match=reason):
            encoder.encode(TALK[:1], TALK[1:2], tools)


def test_a_template_that_is_not_jinja_is_an_error_of_the_user(plain, tmp_path):
    kit = chatml(plain, tmp_path, "{% for %}")
    with pytest.raises(UserError, match="is not valid Jinja"):
        kit.all.encode((), TALK)
