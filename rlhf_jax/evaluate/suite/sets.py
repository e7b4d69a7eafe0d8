"""How the rows of public sets become items. Every text of a row is data, whatever it says.

A reader takes the columns of a row, where it stands, and what its group's worked examples are; it gives the item, None
for a row that belongs to another task, or raises Refusal with why the row can't be used.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.data.rows import Refusal
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.suite.items import Item
from rlhf_jax.feedback import verifiable

Columns = Mapping[str, Any]
Share = Callable[[str, Sequence[str], Sequence[Mapping[str, Any] | None]], float | None]
LETTERS = "ABCD"
CUE = "Answer:"
TRIED = "A text, 1."  # an answer that constraints are tried on, so that wrong ones are seen when they are read

# BIG-Bench Hard: tasks whose rows don't list their options, and those that have none.
BARE = {
    "boolean_expressions": ("True", "False"), "sports_understanding": ("yes", "no"), "web_of_lies": ("Yes", "No"),
}  # fmt: skip
COUNTED = ("multistep_arithmetic_two", "object_counting")
LISTED = re.compile(r"^(?:(\([A-Z]\)) |- )(.*\S)\s*$", re.MULTILINE)


def cell(columns: Columns, name: str, kind: type | tuple[type, ...] = str) -> Any:
    """A column of this type. Errors: Refusal for another, an empty text, or none."""
    value = columns.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, str) and not value.strip()):
        raise Refusal(f"{name!r} is {str(value)[:40]!r}, not what this set has there")
    return value


def place(value: Any, name: str, options: int) -> int:
    """A number as the place of an option, also one written as a text."""
    if not (isinstance(value, int | str) and str(value).isdecimal() and int(value) < options):
        raise Refusal(f"{name!r} is {str(value)[:40]!r}, not the place of one of {options} options")
    return int(value)


def stem(where: str) -> str:
    """What the file of a place is called, without its suffix.

    >>> stem("sets/no-shut-down.jsonl:7")
    'no-shut-down'
    """
    return where.rpartition("/")[2].partition(".")[0]


def question(text: str) -> str:
    """How a model without a chat template is asked."""
    return f"Question: {text.strip()}\n{CUE}"


# Options


def mmlu_question(columns: Columns) -> str:
    choices = [str(cell(columns, f"choice{i}", (str, int, float))).strip() for i in range(len(LETTERS))]
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
    return "\n".join([cell(columns, "question").strip(), *lines, CUE])


def mmlu_head(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def mmlu(columns: Columns, where: str, shots: str) -> Item:
    subject, asked = cell(columns, "subject"), mmlu_question(columns)
    right = place(cell(columns, "answer", (str, int)), "answer", len(LETTERS))
    prompt = mmlu_head(subject) + shots + asked
    return Item(where, prompt, options=tuple(LETTERS), right=(right,), group=subject)


def truthfulqa(columns: Columns, where: str, shots: str) -> Item:
    asked = cell(columns, "question").strip()
    one, many = (cell(columns, name, dict) for name in ("mc1_targets", "mc2_targets"))
    # About one row in twenty lists an empty text as an answer, which nobody can give.
    options = tuple(dict.fromkeys(option for option in (*many, *one) if option.strip()))
    right = tuple(i for i, option in enumerate(options) if many.get(option, one.get(option)) == 1)
    few = tuple(options.index(option) for option in one if option.strip())
    if len(set(right) & set(few)) != 1 or len(right) == len(options):
        raise Refusal("the single reading doesn't have one true answer, or there is no false one")
    plain = f"{shots}Q: {asked}\nA:"
    return Item(where, plain if shots else asked, plain, options, right, few)


def bbh(columns: Columns, where: str, shots: str) -> Item | None:
    task, asked, target = (cell(columns, name).strip() for name in ("task", "input", "target"))
    if task in COUNTED:
        return None
    listed = LISTED.findall(asked.rpartition("Options:")[2]) if "Options:" in asked else []
    options = BARE.get(task) or tuple(letter or text for letter, text in listed)
    if target not in options:
        raise Refusal(f"its target {target[:40]!r} is none of its {len(options)} options")
    return Item(where, f"Q: {asked}\nA:", options=options, right=(options.index(target),), group=task)


def evals(columns: Columns, where: str, shots: str) -> Item:
    asked = cell(columns, "question").rstrip()
    options = tuple(cell(columns, f"answer_{name}_behavior").strip() for name in ("matching", "not_matching"))
    return Item(where, cued(asked), options=options, right=(0,), group=stem(where))


def cued(text: str) -> str:
    return text if text.endswith(CUE) else f"{text}\n\n{CUE}"


# Llama 3's markup, in which the rows of the sycophancy set are written.
MARKUP = re.compile(r"<\|start_header_id\|>\w*<\|end_header_id\|>|<\|\w+\|>")
# What stands before an option there, which differs between the two sides of a row.
LAID = re.compile(r"\n+(?:Choices:\n+)? *(?=\([A-Z]\) )")


def sycophancy(columns: Columns, where: str, shots: str) -> Item:
    """The biography's side is the item, the neutral side its twin; right is what the user holds.

    Both lay out their options alike, so that the biography is all that they differ in.
    """
    bare = lambda name: MARKUP.sub("", cell(columns, f"{name}_prompt")).strip()
    biased, neutral = (cued(LAID.sub("\n ", bare(name))) for name in ("biased", "neutral"))
    options = tuple(sorted(cell(columns, f"{name}_target").strip() for name in ("sycophantic", "honest")))
    right = (options.index(cell(columns, "sycophantic_target").strip()),)
    group = stem(where)
    twin = Item(where, neutral, options=options, right=right, group=group)
    return Item(where, biased, options=options, right=right, group=group, unit=neutral, twin=twin)


# Pairs

HHH = re.compile(
    r"###The instruction to evaluate:\n(.*?)\n+###Response to evaluate:\n(.*?)\n+###Score Rubrics:", re.DOTALL
)


def hhh(columns: Columns, where: str, shots: str) -> Item:
    sides = [HHH.search(cell(columns, f"{name}_instruction")) for name in ("chosen", "rejected")]
    texts = [(side[1].strip(), side[2].strip()) for side in sides if side]
    if len(texts) < 2 or texts[0][0] != texts[1][0]:
        raise Refusal("the instruction and the response can't be told apart, or the two instructions differ")
    return pair(where, texts[0][0], (texts[0][1], texts[1][1]), 0, cell(columns, "source"))


def llmbar(columns: Columns, where: str, shots: str) -> Item:
    options = cell(columns, "output_1"), cell(columns, "output_2")
    label = place(cell(columns, "label", int) - 1, "label", 2)
    return pair(where, cell(columns, "input"), (options[0].strip(), options[1].strip()), label, stem(where))


def pair(where: str, prompt: str, options: tuple[str, str], better: int, group: str) -> Item:
    if not all(options) or options[0] == options[1]:
        raise Refusal("one of the two answers is empty, or they are the same")
    return Item(where, prompt.strip(), question(prompt), options, (better,), group=group)


# Answers


def number(columns: Columns, name: str) -> str:
    """A reference that answers can be held to. Errors: Refusal for one that is no number."""
    answer = cell(columns, name)
    try:
        verifiable.gsm8k([""], [""], answer=[answer])
    except UserError as error:
        raise Refusal(str(error).partition("; ")[0]) from None
    return answer


def gsm8k(columns: Columns, where: str, shots: str) -> Item:
    asked, answer = cell(columns, "question"), number(columns, "answer")
    plain = shots + question(asked)
    return Item(where, plain if shots else asked.strip(), plain, columns={"answer": answer})


def bbh_numbers(columns: Columns, where: str, shots: str) -> Item | None:
    task, asked = cell(columns, "task"), cell(columns, "input").strip()
    if task not in COUNTED:
        return None
    return Item(where, asked, f"Q: {asked}\nA:", group=task, columns={"answer": number(columns, "target").strip()})


def math500(columns: Columns, where: str, shots: str) -> Item:
    asked = f"{cell(columns, 'problem').strip()}\n\nPut the final answer in \\boxed{{}}."
    return Item(
        where, asked, question(asked), group=cell(columns, "subject"), columns={"answer": cell(columns, "answer")}
    )


def constrained(share: Share, columns: Columns, where: str, shots: str) -> Item:
    """IFEval and IFBench, each with its own check of an answer."""
    asked, kinds, given = cell(columns, "prompt"), *(cell(columns, n, list) for n in ("instruction_id_list", "kwargs"))
    if not kinds or len(kinds) != len(given):
        raise Refusal(f"{len(kinds)} constraints with {len(given)} kwargs")
    if not all(isinstance(x, str) for x in kinds) or not all(x is None or isinstance(x, dict) for x in given):
        raise Refusal("its constraints aren't texts, or their kwargs not objects")
    try:
        share(TRIED, kinds, given)
    except (UserError, TypeError, ValueError, AttributeError) as error:
        raise Refusal(f"its constraints can't be checked: {str(error).partition('; ')[0]}") from None
    return Item(where, asked.strip(), question(asked), columns={"instruction_id_list": kinds, "kwargs": given})


def xstest(columns: Columns, where: str, shots: str) -> Item:
    asked, label = cell(columns, "prompt"), cell(columns, "label")
    if label not in ("safe", "unsafe"):
        raise Refusal(f"its label is {label[:40]!r}, neither safe nor unsafe")
    return Item(where, asked.strip(), question(asked), group=label)


def prompts(columns: Columns, where: str, shots: str) -> Item:
    asked = cell(columns, "prompt")
    return Item(where, asked.strip(), question(asked))
