"""Rewards that a program decides: agreement with labels of real rows, and what texts can do to the checks."""

import importlib.util
import json
import pathlib
import re
import time
from typing import Any

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import ifeval, verifiable
from rlhf_jax.feedback.verifiable import gsm8k, math


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# School mathematics


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 6 * 3 = 18", "18"),
        ("It is 18.", "18"),
        ("It is 12.0", "12"),
        ("She earns $1,234.50.", "1234.5"),
        ("She earns \\$1{,}234", "1234"),
        ("a loss of -$5", "-5"),
        ("a loss of $-5.", "-5"),
        ("a loss of −5", "-5"),
        ("5-3", "3"),
        ("between 10 - 20", "20"),
        (".5 of it", "1/2"),
        ("3/4 of it", "3/4"),
        ("18%", "18"),
        ("7\n#### 18\nand 3 more", "18"),
        ("#### 3\n#### **$1,000**", "1000"),
        ("#### -5", "-5"),
        ("#### Step 2\nso it is 9", "9"),
        ("\\boxed{18} in 2 days", "18"),
        ("\\boxed{x = \\$18\\text{ for } \\frac{1}{2}}", "1/2"),
        ("\\boxed{7} no, \\boxed{18}", "18"),
        ("\\boxed{\\frac{3}{4}}", "3/4"),
        ("\\boxed{\\dfrac12}", "1/2"),
        ("\\boxed{none}, the answer is 4", "4"),
        ("the answer is 5. No: the Answer is: $18 for 2 days", "18"),
        ("The answer is 6 * 3 = 18 dollars\nin 2 days", "18"),
        ("The answer is\n**18** in 2 days", "18"),
        ("the answer is <<6*3=18>>18", "18"),
    ],
)
def test_the_final_number_is_found(text, number):
    assert gsm8k([""], [text], [f"a\n#### {number}" if "/" not in number else number]) == [1.0]
    assert gsm8k([""], [text], ["99"]) == [0.0]


@pytest.mark.parametrize("text", ["", "none", "\\boxed{}", "####", "9" * 50, "$"])
def test_a_text_without_a_number_is_wrong(text):
    assert gsm8k([""], [text], [0]) == [0.0]


def test_messages_are_read_and_a_row_without_a_reference_is_left_out():
    said = [{"role": "assistant", "content": "18"}, {"role": "tool", "content": "7"}]
    called = [{"role": "assistant", "content": None}]
    assert gsm8k([""] * 4, [said, called, "18", "18"], [18, 18, 18.0, None]) == [1.0, 0.0, 1.0, None]


@pytest.mark.parametrize("answer", ["eighteen", "so 18 apples", "#### ?", "", float("nan"), True])
def test_a_reference_that_is_no_number_is_named(answer):
    with pytest.raises(UserError, match=f"the reference {str(answer)!r} is no number".replace("?", "\\?")):
        gsm8k([""], ["18"], [answer])


def test_labels_of_model_solutions_are_met(shared):
    rows = read(shared / "data/gsm8k/example_model_solutions.jsonl")
    solutions = [(row["ground_truth"], made) for row in rows for made in row.values() if isinstance(made, dict)]
    rewards = gsm8k([], [made["solution"] for _, made in solutions], [t.rpartition("A: ")[2] for t, _ in solutions])
    assert len(rewards) == 4 * len(rows) == 3136
    assert rewards == [float(made["is_correct"]) for _, made in solutions]


def test_every_reference_solution_is_right_and_that_of_another_row_wrong(shared):
    answers = [row["answer"] for row in read(shared / "data/gsm8k/test.jsonl")]
    assert gsm8k([], answers, answers) == [1.0] * len(answers)
    other = answers[1:] + answers[:1]
    last = [text.rpartition("#### ")[2] for text in answers]
    assert gsm8k([], other, answers) == [float(a == b) for a, b in zip(last, last[1:] + last[:1], strict=True)]


# Competition mathematics


@pytest.fixture
def installed() -> None:
    pytest.importorskip("math_verify", reason="needs the extra `verify` (math-verify)")


def test_the_last_closed_box_is_read():
    assert verifiable.boxed(r"\boxed{1} and $\fbox{\frac{1}{2}}$.") == r"\frac{1}{2}"
    assert verifiable.boxed(r"\boxed{\left\{ x \right.}") == r"\left\{ x \right."
    assert verifiable.boxed(r"\boxed{1} and \boxed{2") is None and verifiable.boxed("1") is None


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("run: pip install 'rlhf_jax[verify]'.")):
        math([""], [r"\boxed{1}"], ["1"])


def test_equal_mathematics_is_right_and_other_wrong(installed):
    equal = [
        (r"\frac12", "0.5"), ("x=5", "5"), ("10,080", "10080"), (r"\sqrt{8}", r"2\sqrt{2}"), ("(x+1)^2", "x^2+2x+1"),
        ("5", r"so \boxed{5\text{ cm}}"), (r"\{1, 2\}", "2, 1"), (r"\text{Evelyn}", r"\mathrm{Evelyn}"),
    ]  # fmt: skip
    other = [
        ("5", "6"),
        ("(1,2)", "(2,1)"),
        (r"\frac12", "0.49"),
        ("x+1", "y+1"),
        ("5", ""),
        (r"\text{A}", r"\text{B}"),
    ]
    rewards = math([], [rf"It is \boxed{{{given}}}." for _, given in equal + other], [a for a, _ in equal + other])
    assert rewards == [1.0] * len(equal) + [0.0] * len(other)
    assert math([], ["5", r"\boxed{5}", r"\boxed{5}"], ["5", r"So it is \boxed{5}.", None]) == [0.0, 1.0, None]


def test_every_reference_is_equal_to_its_solution_and_not_to_that_of_another_row(installed, shared):
    rows = read(shared / "data/math500/math500.jsonl")[:60]
    solutions, answers = [row["solution"] for row in rows], [row["answer"] for row in rows]
    assert math([], solutions, answers) == [1.0] * len(rows)
    # x=5 is 5, and equal answers are equal; nothing else is.
    plain = [answer.removeprefix("x=") for answer in answers]
    same = [float(a == b) for a, b in zip(plain, plain[1:] + plain[:1], strict=True)]
    assert math([], solutions[1:] + solutions[:1], answers) == same


def test_the_comparison_itself_knows_every_reference(installed, shared):
    answers = [row["answer"] for row in read(shared / "data/math500/math500.jsonl")[:60]]
    given = [rf"\boxed{{\displaystyle {answer}}}" for answer in answers]  # other texts, so not compared as texts
    assert math([], given, answers) == [1.0] * 60


def test_a_sum_without_an_end_costs_its_answer_alone(installed, monkeypatch):
    monkeypatch.setattr(verifiable, "CHECKER", verifiable.CHECKER.replace("; ", "; verifiable.SECONDS = 1; ", 1))
    given = ["0.5", "10^{10^{10}}", r"\frac12", "1+" * 200 + "1"]
    assert math([], [rf"\boxed{{{text}}}" for text in given], ["1/2"] * 4) == [1.0, 0.0, 1.0, 0.0]


def test_a_checker_that_is_killed_between_two_answers_is_started_again(installed, monkeypatch):
    dies = "import os; print('ready', flush=True); input(); print('true', flush=True); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(verifiable, "CHECKER", dies)
    assert math([], [rf"\boxed{{{i}}}" for i in "234"], ["1"] * 3) == [1.0, 0.0, 1.0]


def test_a_checker_that_can_not_start_is_no_wrong_answer(installed, monkeypatch):
    monkeypatch.setattr(verifiable, "CHECKER", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="status 3"):
        math([], [r"\boxed{0.5}"], ["1/2"])


@pytest.mark.parametrize(
    "text", ["__import__('os').getpid()", r"\text{__import__('os')}", "f(print)", "1_000", "lambda"]
)
def test_no_answer_is_run_as_python(installed, monkeypatch, text):
    from math_verify import LatexExtractionConfig, parse  # pyright: ignore[reportMissingImports]
    from sympy.parsing import sympy_parser  # pyright: ignore[reportMissingImports]

    ran = []
    inner = sympy_parser.eval_expr
    monkeypatch.setattr(sympy_parser, "eval_expr", lambda code, *rest: ran.append(code) or inner(code, *rest))
    untimed: Any = None
    parse(rf"\boxed{{{text} + 31415}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=untimed)
    # SymPy makes its numbers, and those alone, through Python's parser.
    assert all(re.fullmatch(r"(Integer|Float) \('?[\d.]+'? ?\)", code) for code in ran)


# Constraints on form

# For each kind: its arguments, an answer that keeps to it and one that does not.
EXAMPLES = {
    "keywords:existence": ({"keywords": ["mom", "c++"]}, "My MOM knows C++.", "My mom knows C."),
    "keywords:frequency": (
        {"keyword": "dog", "frequency": 2, "relation": "at least"}, "Dog and dogs.", "Dog and cat.",
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["rock"]}, "Rocks fall.", "A Rock falls."),
    "keywords:letter_frequency": (
        {"letter": "o", "let_frequency": 2, "let_relation": "less than"}, "One is.", "One dog.",
    ),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "It's so.", "It is"),
    "length_constraints:number_sentences": (
        {"num_sentences": 3, "relation": "less than"}, "Dr. No is 3.5 m. Is he?", "Yes. No! Well?",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "One\n***\ntwo\n***", "One\n******\ntwo"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"}, 'One\n\n"So, two', "So\n\none",
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] of [place]", "[name] of [\nplace]"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "Bye.\n\np.p.s. hi", "Bye.\n\nP.S. hi"),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "Two:\n* a\n  - b\n**c**", "Two:\n* a\n* b\n* c"),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "My answer is perhaps."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*One* and **two**", "*One* and * *"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\na\nSECTION 2\nb", "SECTION 1\na\nSection 2",
    ),
    "detectable_format:json_format": ({}, '```json\n{"a": [1]}\n```', "{'a': 1}"),
    "detectable_format:title": ({}, "<<A day>>\nIt rains.", "<< >>\nIt rains."),
    "combination:two_responses": ({}, "Yes.\n******\nNo.", "Yes.\n******\nYes."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Why so? "}, "why so?\nBecause.", "Well, why so? Because."),
    "startend:end_checker": ({"end_phrase": "Any questions?"}, '"So. any questions?"\n', "Any questions? No."),
    "startend:quotation": ({}, ' "So." ', '"So".'),
    "change_case:english_capital": ({}, "NO 3!", "No 3!"),
    "change_case:english_lowercase": ({}, "no 3!", "No 3!"),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "A WELL-KNOWN man", "A Well-KNOWN man",
    ),
    "punctuation:no_comma": ({}, "No; never.", "No, never."),
}  # fmt: skip


@pytest.mark.parametrize("kind", ifeval.CHECKS)
def test_every_check_tells_who_keeps_to_it_from_who_does_not(kind):
    arguments, good, bad = EXAMPLES[kind]
    assert verifiable.ifeval([""] * 3, [good, bad, " "], [[kind]] * 3, [[arguments]] * 3) == [1, 0, 0]


def test_every_kind_of_the_real_rows_is_checked_or_listed(shared):
    rows = read(shared / "data/ifeval/input_data.jsonl")
    kinds = {kind for row in rows for kind in row["instruction_id_list"]}
    assert kinds == {*ifeval.CHECKS, *ifeval.NOT_CHECKED} and len(kinds) == 25
    prompts, columns = (
        [row["prompt"] for row in rows],
        ([r["instruction_id_list"] for r in rows], [r["kwargs"] for r in rows]),
    )
    shares = verifiable.ifeval(prompts, prompts, *columns)
    assert all(
        (share is None) == (set(k) <= set(ifeval.NOT_CHECKED)) for share, k in zip(shares, columns[0], strict=True)
    )
    assert verifiable.ifeval(prompts, [""] * len(rows), *columns) == [None if share is None else 0 for share in shares]


def test_the_share_is_of_the_kinds_that_are_checked():
    kinds = ["punctuation:no_comma", "language:response_language", "startend:quotation"]
    unset = {"language": None, "num_words": None}  # as a table with one column for each argument has them
    rewards = verifiable.ifeval(
        [""] * 3, ["So."] * 3, [kinds, kinds[1:2], None], [[unset, {"language": "de"}, {}], [{}], None]
    )
    assert rewards == [0.5, None, None]


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        ("keywords:existence", [{}], "missing a required argument: 'keywords'"),
        ("keywords:existence", [{"keywords": ["a"], "word": "b"}], "unexpected keyword argument 'word'"),
        ("length_constraints:number_words", [{"num_words": 1, "relation": "most"}], "no relation 'most'"),
        ("punctuation:no_comma", [], "0 kwargs for the constraints punctuation:no_comma"),
    ],
)
def test_arguments_that_a_kind_does_not_take_are_named(kind, arguments, says):
    with pytest.raises(UserError, match=says):
        verifiable.ifeval([""], ["So."], [[kind]], [arguments])


@pytest.mark.parametrize(
    "piece", ["[", "<", "<<", "*", "#", "\n", "{", "-", "1,", "1/", ". ", "\\boxed{", "answer is "]
)
def test_a_text_that_repeats_itself_is_soon_read(piece):
    text, begun = piece * (60_000 // len(piece)), time.process_time()
    for kind, (arguments, *_) in EXAMPLES.items():
        ifeval.share(text, [kind], [arguments])
    gsm8k([""], [text], [1])
    verifiable.boxed(text)
    assert time.process_time() - begun < 2
