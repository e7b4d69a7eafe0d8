"""Critique and revision: what is asked, what is kept, and that nothing depends on what stands beside it."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from rlhf_jax.constitutional.writing import Samplers, Writer
from rlhf_jax.data.rows import Message, Text
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.feedback import ai_preference
from rlhf_jax.feedback.ai_preference import SAME, UNSURE, Form, label
from rlhf_jax.feedback.constitution import Constitution, Principle
from rlhf_jax.feedback.judge_local import LocalJudge
from rlhf_jax.feedback.judges import Pair, Template, Verdict
from rlhf_jax.feedback.revision import (
    CUT,
    EMPTY,
    NO_CRITIQUE,
    Revised,
    Written,
    as_conversation,
    counted,
    demonstrations,
    from_row,
    revise,
    told,
)
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.workdir import open_policy
from tests import tiny

RULES = Constitution("two", (Principle("a", "Bad?", "Mend."), Principle("b", "Rude?", "Be polite.")))


class Scripted:
    """Writes what a function of the text and the number says, and keeps what it was asked."""

    def __init__(self, says: Any):
        self.says, self.asked = says, []

    def __call__(self, asked: Sequence[Text], places: Sequence[int], number: int) -> list[Written]:
        self.asked += [(number, place, text) for place, text in zip(places, asked, strict=True)]
        said = [self.says(text, place, number) for place, text in zip(places, asked, strict=True)]
        return [one if isinstance(one, Written) else Written(one) for one in said]


def numbered(text: Text, place: int, number: int) -> str:
    return f" said {place}.{number}\nand more"


# ---- what is asked


def test_a_plain_model_goes_on_behind_lines():
    write = Scripted(numbered)
    (one,) = revise(["Where?\n"], [" Here. "], RULES, write, rounds=2, seed=1, before="An example.")
    first, second = (next(p for p in RULES.principles if p.name == name) for name in one.principles)
    assert [text for _, _, text in write.asked] == [
        f"An example.\n\nWhere?\nHere.\n{first.critique}\n",
        f"An example.\n\nWhere?\nHere.\n{first.critique}\nsaid 0.2\n{first.revision}\n",
        f"An example.\n\nWhere?\nsaid 0.3\n{second.critique}\n",
        f"An example.\n\nWhere?\nsaid 0.3\n{second.critique}\nsaid 0.4\n{second.revision}\n",
    ]
    # Behind some prompts the space before an answer is part of its first word.
    assert one.answers == (" Here. ", " said 0.3", " said 0.5")
    assert one.critiques == ("said 0.2", "said 0.4") and one.kept == ("", "")


def test_a_chat_model_has_a_conversation():
    write = Scripted(lambda text, place, number: f" {number}\n\nlines ")
    talk = (Message("system", "Be brief."), Message("user", "Hi"))
    one, other = revise([talk, "Yo\n"], ["Go.", "No."], RULES, write, rounds=1, chat=True, before="Look:")
    principle = next(p for p in RULES.principles if p.name == one.principles[0])
    assert write.asked[2][2] == (
        Message("system", "Be brief."), Message("user", "Look:\n\nHi"), Message("assistant", "Go."),
        Message("user", principle.critique), Message("assistant", "2\n\nlines"), Message("user", principle.revision),
    )  # fmt: skip
    assert one.answers == ("Go.", "3\n\nlines") and other.answers[1] == "3\n\nlines"
    assert as_conversation("", "Yo\n", "No.") == (Message("user", "Yo"), Message("assistant", "No."))


# ---- what is kept


def test_what_is_no_revision_leaves_the_answer_and_is_counted():
    whys = [
        (lambda n: Written("  ", True) if n % 2 else "Bad.", EMPTY, "Bad."),
        (lambda n: Written("half a", False) if n % 2 else "Bad.", CUT, "Bad."),
        (lambda n: Written(None, why="too long") if n % 2 else "Bad.", "too long", "Bad."),
        (lambda n: Written(None, why="longer still") if not n % 2 else "never", "longer still", ""),
        (lambda n: "\n" if not n % 2 else "never", NO_CRITIQUE, ""),
        (lambda n: Written("Bad as it", False) if not n % 2 else "Good.", "", "Bad as it"),
    ]
    write = Scripted(lambda text, place, number: whys[place][0](number))
    found = revise([f"{n}?" for n in range(6)], ["No."] * 6, RULES, write, rounds=1)
    assert [one.kept[0] for one in found] == [why for _, why, _ in whys]
    assert [one.critiques[0] for one in found] == [critique for _, _, critique in whys]
    assert [one.answers[1] for one in found] == ["No."] * 5 + ["Good."]
    assert counted(found) == [{why: 1 for _, why, _ in whys if why}]
    assert told(found).startswith("round 1 changed 1 of 6 answers; 1 stayed as they were: it was empty")
    # Nobody asks for a revision without a critique.
    assert [place for number, place, _ in write.asked if number == 3] == [0, 1, 2, 5]


def test_a_prompt_is_revised_alike_whatever_stands_beside_it():
    prompts, answers = [f"{n}?" for n in range(20)], [f"No {n}." for n in range(20)]
    say = lambda text, place, number: f"{hash((text, place, number))}"
    whole = revise(prompts, answers, RULES, Scripted(say), rounds=3, seed=5)
    assert {name for one in whole for name in one.principles} == {"a", "b"}
    some = [11, 3]
    part = revise(
        [prompts[i] for i in some], [answers[i] for i in some], RULES, Scripted(say), rounds=3, seed=5, places=some
    )
    assert part == [whole[11], whole[3]]
    assert revise(prompts, answers, RULES, Scripted(say), rounds=0) == [
        Revised(prompt, (answer,)) for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_rows_are_written_and_read_again():
    talk = (Message("user", "Hi"), Message("assistant", "Yo", '{"thinking":"x"}'), Message("user", "So?"))
    found = revise([talk, "Hi\n", "Hi\n"], ["Ugh.", " Ugh.", " "], RULES, Scripted(lambda *a: "No."), rounds=2)
    found[2] = found[2]._replace(answers=(" ", "No.", " "))
    assert [from_row(json.loads(json.dumps(one.row))) for one in found] == found
    rows = list(demonstrations(found))
    assert rows[1] == {"prompt": "Hi\n", "completion": " No."} and len(rows) == 2
    assert rows[0]["completion"] == [{"role": "assistant", "content": "No."}]
    assert rows[0]["prompt"][1] == {"role": "assistant", "content": "Yo", "thinking": "x"}


def test_only_what_a_round_has_revised_is_imitated():
    once = lambda text, place, number: "Sorry." if (place, number) in {(0, 2), (0, 3), (2, 4), (2, 5)} else ""
    found = revise(["A\n", "B\n", "C\n"], ["Harm."] * 3, RULES, Scripted(once), rounds=2)
    assert [one.kept for one in found] == [("", NO_CRITIQUE), (NO_CRITIQUE, NO_CRITIQUE), (NO_CRITIQUE, "")]
    assert [row["prompt"] for row in demonstrations(found)] == ["A\n", "C\n"]
    assert told(found).endswith("; 2 stayed as they were: there was no critique of it. 1 answers were never revised, "
                                "and are not imitated")  # fmt: skip
    assert "never revised" not in told([found[0], found[2]])


# ---- the model that writes


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    folder = tiny.write_model(
        tmp_path_factory.mktemp("writes") / "model", tiny.CONFIG | {"max_position_embeddings": 96}
    )
    policy = open_policy(str(folder))
    return Subject("tiny", policy.model, policy.params, policy.tokenizer, policy.end_ids)


def test_what_a_model_writes_is_of_its_place_and_number(subject):
    write = Writer(subject, Sampling(max_new_tokens=6), seed=1, samplers=Samplers())
    asked = ["One?\n", "Another?\n", "x" * 91, "Third?\n"]
    whole = write(asked, [0, 1, 2, 3], 2)
    assert whole[2] == Written(None, whole[2].ended, "the model's context had no room for it") and not write.chat
    assert write([asked[3], asked[1]], [3, 1], 2) == [whole[3], whole[1]]
    assert write([asked[3]], [3], 3) != [whole[3]] and write([asked[3]], [2], 2) != [whole[3]]
    assert write(["x" * 91], [0], 2)[0].text is None and write([], [], 2) == []


def test_a_tokenizer_of_another_model_is_named(subject):
    smaller = subject.model.__class__(subject.model.shape.__class__(**{**vars(subject.model.shape), "vocab": 9}))
    with pytest.raises(UserError, match="the tokenizer of tiny gives token .* vocabulary ends at 8; give a folder"):
        Writer(subject._replace(model=smaller), Sampling(max_new_tokens=6), seed=1, samplers=Samplers())(
            ["One?\n"], [0], 2
        )


# ---- a model's preferences

WAYS = (Principle("kind", preference="Which is kinder?"), Principle("short", preference="Which is shorter?"))


def by_length(form: Form):
    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        sign = 1 if "shorter" in form.template.cue else -1
        said = []
        for pair in pairs:
            chance = 1 / (1 + math.exp(sign * (len(str(pair.first)) - len(str(pair.second)))))
            said.append(Verdict(None, why="too long") if "#" in str(pair.first) else Verdict(chance, chance - 0.1, 0.9))
        return said

    return judge


def test_pairs_are_judged_under_their_principles_and_become_soft_labels():
    form = Form(Template("{prompt} {first} {second}", "{question}"))
    answers = [[" ab", " abcd"], [" ab", " abcd"], [" same", "same "], [" ab", " cd"], ["#", "##"]]
    principles = [*WAYS, *WAYS, WAYS[0]]
    found = label(["Q\n"] * 5, answers, principles, form, by_length)
    assert found.left == {SAME: 1, UNSURE: 1, "too long": 1}
    chance = 1 / (1 + math.exp(-2))
    kind, short = found.rows
    assert (kind["chosen"], kind["rejected"], kind["principle"]) == (" abcd", " ab", "kind")
    assert (short["chosen"], short["rejected"], short["principle"]) == (" ab", " abcd", "short")
    assert kind["probability"] == pytest.approx(chance) == short["probability"]
    assert short["by_order"] == pytest.approx([chance - 0.1, 0.9])
    assert kind["by_order"] == pytest.approx([chance + 0.1, 0.1])
    assert ai_preference.told(found, 5) == (
        "2 of 5 pairs labelled, 50% of them the other way round when the answers change places; left out 1: both "
        "answers are the same; 1: the judge holds both for as good; 1: too long"
    )
    clamped = label(["Q\n"] * 5, answers, principles, form, by_length, clamp=True)
    assert [row["probability"] for row in clamped.rows] == [0.6, 0.6]


def test_pairs_with_an_empty_answer_are_left_out():
    form = Form(Template("{prompt} {first} {second}", "{question}"))
    found = label(["Q\n"] * 3, [[" ", "abcd"], ["ab", ""], ["ab", "abcd"]], WAYS[:1] * 3, form, by_length)
    assert found.left == {ai_preference.EMPTY: 2} and [row["chosen"] for row in found.rows] == ["abcd"]


def test_pairs_of_messages_stay_messages():
    form = Form(Template("{prompt} {first} {second}", "{question}"))
    talk = (Message("user", "Hi"),)
    (row,) = label([talk], [["ab", "abcd"]], WAYS[:1], form, by_length).rows
    assert row["prompt"] == [{"role": "user", "content": "Hi"}]
    assert row["chosen"] == [{"role": "assistant", "content": "abcd"}]


def test_templates_have_a_place_for_the_question(tmp_path):
    general = ai_preference.under(ai_preference.read("general"), WAYS[0])
    assert "Which is kinder?" in general.template.asked and "{question}" not in "".join(general.template[:2])
    file = tmp_path / "mine.txt"
    file.write_text("{prompt} {first} {second}\n---\nBest:")
    with pytest.raises(UserError, match=r"mine.txt has no \{question\}; write it where a principle"):
        ai_preference.read(str(file))
    with pytest.raises(UserError, match="there is no template nowhere; check --flag"):
        ai_preference.read("nowhere", "--flag")


def test_in_lines_the_option_stands_on_a_line_of_its_own(subject):
    form = ai_preference.under(ai_preference.read("lines"), WAYS[0])
    judge = LocalJudge(
        "tiny", subject.model, subject.params, subject.tokenizer, form.template, options=form.options, gap=form.gap
    )
    asked = form.template.fill(Pair("Hi\n", " one", " two"), False)
    spans = judge._options(asked, form.template.cue)
    assert not isinstance(spans, str)
    decode = lambda ids: subject.tokenizer.decode(ids.tolist())
    assert decode(spans[0].ids) == "Hi\nA: one\nB: two\nWhich is kinder?\nA"
    assert [decode(span.ids[span.start : span.stop]) for span in spans] == ["A", "B"]
