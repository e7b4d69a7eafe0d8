"""Public sets as items: every row of the real files is read, and an item asks what its row asks."""

import json
import pathlib

import pytest

from rlhf_jax.data.rows import Refusal
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.suite import sets, shots, tasks

# Items of each task in the real files, none of whose rows is refused, and the number of their groups.
REAL = {
    "mmlu": (1500, 57), "truthfulqa": (532, 1), "bbh": (640, 20), "bbh_numbers": (64, 2), "gsm8k": (784, 1),
    "math500": (298, 7), "ifeval": (358, 1), "ifbench": (151, 1), "hhh": (132, 4), "llmbar": (389, 6),
    "evals": (1280, 8), "sycophancy": (559, 2), "xstest": (307, 2), "wins": (349, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(shared: pathlib.Path) -> str:
    return str(shared / "data")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_row_of_the_real_files_is_an_item(data, name):
    found = tasks.read(name, data)
    assert not found.refused
    assert (len(found.items), len({item.group for item in found.items})) == REAL[name]
    assert len({item.where for item in found.items}) == len(found.items)
    for item in found.items:
        assert item.prompt.strip() and all(option == option.strip() != "" for option in item.options)
        assert len(set(item.options)) == len(item.options) and all(place < len(item.options) for place in item.right)
        assert bool(item.right) == bool(item.options) and len(item.right) < max(1, len(item.options)) + (
            not item.options
        )


def test_every_number_and_every_rest_of_bbh_is_somewhere(data, shared):
    lines = (shared / "data/bbh/bbh.jsonl").read_text().splitlines()
    both = [item.where for name in ("bbh", "bbh_numbers") for item in tasks.read(name, data).items]
    assert len(lines) == len(both) == len(set(both))


def test_no_letters_of_a_markup_are_left(data):
    for item in tasks.read("sycophancy", data).items:
        assert item.twin is not None and item.twin.prompt == item.unit != item.prompt
        # All that the two sides differ in is the biography, which stands before the question.
        assert item.prompt.endswith(item.unit)
        for text in (item.prompt, item.unit):
            assert "<|" not in text and text.endswith("\n\nAnswer:") and not text.startswith(("user", "\n"))


def test_mmlu_reads_as_its_authors_ask_it():
    row = {"subject": "high_school_physics", "question": "How many? ", "answer": "2"}
    item = sets.mmlu(row | {f"choice{i}": str(i) for i in range(4)}, "f:1", "X\nAnswer: B\n\n")
    assert item.prompt == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "X\nAnswer: B\n\nHow many?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    )
    assert item.options == ("A", "B", "C", "D") and item.right == (2,) and item.group == "high_school_physics"


def test_truthfulqa_has_both_readings():
    row = {"question": "Q?", "mc1_targets": {"a": 1, "b": 0, "": 0}, "mc2_targets": {"c": 1, "a": 1, "": 1, "b": 0}}
    item = sets.truthfulqa(row, "f:1", "")
    assert item.options == ("c", "a", "b") and item.right == (0, 1) and item.few == (1, 2)
    assert item.asked("a") == ("Q?", "Q: Q?\nA:", "a")


@pytest.mark.parametrize(
    ("task", "text", "target", "options"),
    [
        ("date", "When?\nOptions:\n(A) 1\n(B) 2", "(B)", ("(A)", "(B)")),
        ("formal_fallacies", "Valid?\nOptions:\n- valid \n- invalid", "invalid", ("valid", "invalid")),
        ("web_of_lies", "Does he?", "No", ("Yes", "No")),
    ],
)
def test_bbh_lists_its_options(task, text, target, options):
    item = sets.bbh({"task": task, "input": text, "target": target}, "f:1", "")
    assert item is not None and item.options == options and item.options[item.right[0]] == target


BAD = {
    "mmlu": {
        "subject": "a",
        "question": "b",
        "choice0": "1",
        "choice1": "1",
        "choice2": "1",
        "choice3": "1",
        "answer": "4",
    },
    "truthfulqa": {"question": "q", "mc1_targets": {"a": 0}, "mc2_targets": {"a": 0}},
    "bbh": {"task": "date", "input": "x\nOptions:\n(A) y", "target": "(B)"},
    "bbh_numbers": {"task": "object_counting", "input": " ", "target": "3"},
    "gsm8k": {"question": "q"},
    "math500": {"problem": 3, "answer": "1", "subject": "s"},
    "ifeval": {"prompt": "p", "instruction_id_list": ["a"], "kwargs": []},
    "ifbench": {"prompt": "p", "instruction_id_list": [], "kwargs": []},
    "hhh": {"source": "s", "chosen_instruction": "x", "rejected_instruction": "x"},
    "llmbar": {"input": "i", "output_1": "a", "output_2": "a", "label": 1},
    "evals": {"question": "q", "answer_matching_behavior": " Yes"},
    "sycophancy": {"biased_prompt": "b", "neutral_prompt": None, "sycophantic_target": "(A)", "honest_target": "(B)"},
    "xstest": {"prompt": "p", "label": "unknown"},
    "wins": {"text": "p"},
}


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_row_of_another_kind_is_refused_with_a_reason(name):
    with pytest.raises(Refusal, match="."):
        tasks.TASKS[name].reader(BAD[name], "f:1", "")


def test_refused_rows_are_named_and_few_rows_are_taken_from_all_over(tmp_path):
    rows = [{"prompt": f"p{i}", "label": "safe"} for i in range(9)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "p", "label": 1}\nno JSON\n')
    found = tasks.read("xstest", "nowhere", str(file), most=3)
    assert [item.prompt for item in found.items] == ["p0", "p3", "p6"]
    assert [where.rpartition(":")[2] for where in found.refused] == ["10", "11"]


def test_examples_stand_before_the_question(data):
    three = tasks.read("mmlu", data, count=3, most=1).items[0].prompt
    assert three.count("\nAnswer:") == 4 and three.endswith("Answer:") and three.count("The following are") == 1
    asked = tasks.read("truthfulqa", data, count=6, most=1).items[0].asked("x")
    assert asked.plain.count("\nA:") == 7 and asked.prompt == asked.plain
    assert "\n" not in tasks.read("truthfulqa", data, most=1).items[0].prompt
    solved = tasks.read("gsm8k", data, count=2, most=1).items[0].asked()
    assert solved.plain.count("####") == 2 and solved.plain.endswith("\nAnswer:") and solved.prompt == solved.plain
    assert "####" not in tasks.read("gsm8k", data, most=1).items[0].prompt


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("gsm8k", {"question": "q", "answer": "#### many"}, "'#### many' is no number"),
        ("bbh_numbers", {"task": "object_counting", "input": "q", "target": "three"}, "'three' is no number"),
        ("ifeval", {"kwargs": [{"commas": 1}]}, r"no_comma' can't be checked with the kwargs \{'commas'"),
        ("ifeval", {"kwargs": [3]}, "their kwargs not objects"),
        ("ifeval", {"instruction_id_list": [["a"]], "kwargs": [{}]}, "its constraints aren't texts"),
        ("ifbench", {"instruction_id_list": ["count:numbers"], "kwargs": [{"M": 1}]}, "can't be checked with the kw"),
        ("ifbench", {"instruction_id_list": ["count:word_count_range"],
                     "kwargs": [{"min_words": "a", "max_words": 3}]}, "its constraints can't be checked"),
    ],
)  # fmt: skip
def test_what_no_answer_could_be_held_to_is_seen_when_it_is_read(name, row, says):
    given = {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"]} if name.startswith("if") else {}
    with pytest.raises(Refusal, match=says):
        tasks.TASKS[name].reader(given | row, "f:1", "")


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("mmlu", "mmlu/dev.jsonl", {"subject": "s", "question": "q", "choice0": 1}),
        ("mmlu", "mmlu/dev.jsonl", {"question": "q", "answer": "0"} | {f"choice{i}": "1" for i in range(4)}),
        ("mmlu", "mmlu/dev.jsonl", {"subject": "s", "question": "q", "answer": "7"} | dict.fromkeys(
            (f"choice{i}" for i in range(4)), "1")),
        ("gsm8k", "gsm8k/train.jsonl", {"question": "q"}),
        ("gsm8k", "gsm8k/train.jsonl", {"question": 3, "answer": "#### 1"}),
    ],
)  # fmt: skip
def test_an_example_that_is_none_is_named(tmp_path, name, file, row):
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"{file}:1 can't be used as an example \(.*not .*\); mend it or drop --shots"):
        tasks.read(name, str(tmp_path), count=1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: tasks.chosen(["mmluu"]), "there is no task 'mmluu'; the nearest is 'mmlu'"),
        (lambda: tasks.check(["xstest"], 2), "--shots=2 is of mmlu, truthfulqa, gsm8k, and --tasks has none of them"),
        (lambda: shots.primer("", 7), "--shots=7 is more than the 6 examples of truthfulqa"),
        (lambda: tasks.read("mmlu", "/nowhere"), "there is no /nowhere/mmlu/test.jsonl for the task mmlu; give --data"),
        (lambda: tasks.read("mmlu", "x", "/nowhere.jsonl"), "there is no data file or folder /nowhere.jsonl; check"),
    ],
)  # fmt: skip
def test_what_can_be_mended_is_one_sentence(call, says):
    with pytest.raises(UserError, match=says):
        call()


def test_files_without_a_usable_row_and_too_few_examples_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "p", "label": "maybe"}\n')
    with pytest.raises(UserError, match=r"no row for the task xstest \(.*x.jsonl:1: its label is 'maybe'"):
        tasks.read("xstest", "", str(tmp_path / "x.jsonl"))
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k/train.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    with pytest.raises(UserError, match="--shots=2 is more than the 1 examples in"):
        tasks.read("gsm8k", str(tmp_path), count=2)
