"""lm-evaluation-harness runs local tasks on a real model through the adapter, and agrees with the suite and its own hf.

The harness's `hf` computes in torch. Nothing is fetched: a connection fails the tests.
"""

# pyright: reportMissingImports=false

import json
import pathlib
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from experiments import harness as program
from rlhf_jax import flags
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import harness
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.suite import choice, tasks
from rlhf_jax.evaluate.suite.items import Item
from rlhf_jax.evaluate.suite.subject import LanguageModel
from rlhf_jax.feedback.judges import read_template
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.workdir import open_policy
from tests.parity.sides import TOLERANCE

EACH = {"mmlu": 24, "truthfulqa": 16}  # rows of each
SHOTS = {"mmlu": 0, "truthfulqa": 1}
FITS = range(130, 256)  # tokens of a text with an option: a length is a program that is compiled
BEGIN = "Once upon a time, there was a little {}. One"
WHO = ("girl named", "boy", "dog", "cat called", "bird", "fish", "frog", "red bear", "king", "tree")
CHOICE = """
output_type: multiple_choice
doc_to_choice: options
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """
output_type: generate_until
doc_to_target: ""
generation_kwargs: {until: [".", "\\n"], max_gen_toks: 48}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_target: text
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
"""
KINDS = {"mmlu": CHOICE, "truthfulqa": CHOICE, "stories": WRITTEN, "texts": ROLLING}


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    """No network, and one thread of torch: several wait for each other longer than these sizes take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *given: pytest.fail("a connection"))
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def items(shared: pathlib.Path, subject: Subject) -> dict[str, list[Item]]:
    """Rows of public sets as the suite asks them, the first of their length."""
    found = {}
    size = lambda item, option: len(subject.tokenizer(f"{item.plain or item.prompt} {option}")["input_ids"])
    for name, count in EACH.items():
        read = tasks.read(name, str(shared / "data"), count=SHOTS[name]).items
        found[name] = [item for item in read if all(size(item, option) in FITS for option in item.options)][:count]
        assert len(found[name]) == count
    return found


@pytest.fixture(scope="module")
def folder(items: dict[str, list[Item]], shared: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four tasks: a YAML file and rows each."""
    made = tmp_path_factory.mktemp("tasks")
    rows: dict[str, list[dict[str, Any]]] = {
        name: [{"text": i.plain or i.prompt, "options": i.options, "right": i.right[0]} for i in some]
        for name, some in items.items()
    }
    play = (shared / "data/tinyshakespeare/input.txt").read_text()
    rows["stories"] = [{"text": text} for text in (*map(BEGIN.format, WHO), play[:3000])]
    rows["texts"] = [{"text": play[start : start + size]} for start, size in ((0, 300), (9000, 4000))]
    for name, lines in rows.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (made / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {made / name}.jsonl}}}}\n"
            f"test_split: test\ndoc_to_text: {'text' if KINDS[name] != ROLLING else repr('')}\n{KINDS[name]}"
        )
    return str(made)


@pytest.fixture(scope="module")
def subject(stories: pathlib.Path) -> Subject:
    policy = open_policy(str(stories))
    return Subject("stories", policy.model, policy.params, policy.tokenizer, policy.end_ids)


@pytest.fixture(scope="module")
def ours(subject: Subject) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "SLOTS", 12)  # as many as there are stories
        yield harness.adapt(subject)


@pytest.fixture(scope="module")
def theirs(stories: pathlib.Path) -> HFLM:
    return HFLM(pretrained=str(stories), device="cpu", dtype="float32", batch_size=16)


def run(model: Any, folder: str) -> dict[str, Any]:
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=list(KINDS), task_manager=manager, bootstrap_iters=0)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def found(ours: Any, folder: str) -> dict[str, Any]:
    return run(ours, folder)


@pytest.fixture(scope="module")
def wanted(theirs: HFLM, folder: str) -> dict[str, Any]:
    return run(theirs, folder)


def told(results: dict[str, Any], task: str) -> list[Any]:
    """What the model said, of each row in their order, for each of its requests."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [resps[0] for sample in samples for resps in sample["resps"]]


def asked(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in args]


def agree(ours: Any, theirs: Any, counts: Any) -> None:
    """To the tolerance of the project, a token."""
    np.testing.assert_allclose(np.divide(ours, counts), np.divide(theirs, counts), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", EACH)
def test_the_harness_finds_what_the_suite_finds(
    name: str, items: dict[str, list[Item]], subject: Subject, found: dict[str, Any]
) -> None:
    """To the bit: the same function of the same tokens."""
    model = LanguageModel(subject, read_template(None), sampling=Sampling())
    weighed, left = choice.weigh(items[name], model)
    assert not left
    assert [logprob for logprob, _ in told(found, name)] == [value for one in weighed for value in one.logprobs]
    hits = [float(np.argmax(one.logprobs) == one.item.right[0]) for one in weighed]
    assert found["results"][name]["acc,none"] == np.mean(hits)
    if name == "mmlu":
        assert choice.accuracy(items[name], model).figures[0].estimate.mean == np.mean(hits)


@pytest.mark.parametrize("name", EACH)
def test_likelihoods_are_those_of_hf(
    name: str, subject: Subject, ours: Any, found: dict[str, Any], wanted: dict[str, Any]
) -> None:
    counts = [len(subject.tokenizer(f" {o}")["input_ids"]) for s in found["samples"][name] for o in s["doc"]["options"]]
    mine, other = told(found, name), told(wanted, name)
    agree([logprob for logprob, _ in mine], [logprob for logprob, _ in other], counts)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    assert found["results"][name]["acc,none"] == wanted["results"][name]["acc,none"]


def test_greedy_answers_are_those_of_hf(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Also behind a prompt whose oldest tokens go, so that the answer has room."""
    answers = told(found, "stories")
    assert answers == told(wanted, "stories")
    assert len(set(answers)) >= 5 and not any("." in answer or "\n" in answer for answer in answers)
    assert found["config"]["texts_cut"] == 1


def test_rolling_likelihoods_are_those_of_hf(ours: Any, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    texts = [sample["doc"]["text"] for sample in found["samples"]["texts"]]
    counts = [len(tokens) for tokens in ours._encode(texts).values()]
    assert counts[0] < ours.max_length < counts[-1] / 3, "one fits, one has several windows"
    agree(told(found, "texts"), told(wanted, "texts"), counts)
    assert found["results"]["texts"]["bits_per_byte,none"] == pytest.approx(
        wanted["results"]["texts"]["bits_per_byte,none"], abs=TOLERANCE
    )


def test_greedy_continuations_are_those_of_hf(ours: Any, theirs: HFLM, found: dict[str, Any]) -> None:
    """What the model writes is greedy, and with another word in it it isn't."""
    written = [f" {answer}" for answer in told(found, "stories")[: len(WHO)]]
    pairs = [(BEGIN.format(who), answer) for who, answer in zip(WHO, written, strict=True)]
    pairs += [(text, answer.replace(" a ", " an ") + " cow") for text, answer in pairs]
    mine, other = ours.loglikelihood(asked(*pairs)), theirs.loglikelihood(asked(*pairs), disable_tqdm=True)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    assert sum(greedy for _, greedy in mine) == len(WHO)


def test_what_is_over_the_context_is_cut_as_hf_cuts_it(ours: Any, theirs: HFLM, shared: pathlib.Path) -> None:
    play = (shared / "data/tinyshakespeare/input.txt").read_text()
    before = ours.cut
    pairs = [(play[:3000], " the king"), (play[:3000] + " ", "the king"), ("", " the king"), (play[:200], "\nAll:")]
    mine, other = ours.loglikelihood(asked(*pairs)), theirs.loglikelihood(asked(*pairs), disable_tqdm=True)
    agree([logprob for logprob, _ in mine], [logprob for logprob, _ in other], 2)
    assert ours.cut == before + 2


def call(stories: pathlib.Path, folder: str, out: pathlib.Path, *words: str) -> None:
    flags.run(program.main, program.Harness, ["harness", f"--model={stories}", f"--include_path={folder}",
                                              f"--out={out}", *words])  # fmt: skip


def test_the_program_tells_the_harness_own_table(
    stories: pathlib.Path,
    folder: str,
    found: dict[str, Any],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(program.run, "use_compile_cache", lambda: None)
    call(stories, folder, tmp_path / "out", "--tasks=mm*,mmlu")
    said = capsys.readouterr().out
    value = found["results"]["mmlu"]["acc,none"]
    assert "|mmlu " in said and f"|{value:g}" in said.replace(" ", "") and "wrote" in said
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["results"]["mmlu"]["acc,none"] == value
    assert results["config"]["model"] == str(stories) and results["config"]["texts_cut"] == 0
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(lines) == EACH["mmlu"] and {line["task"] for line in lines} == {"mmlu"}
    assert [x for line in lines for (x,) in line["resps"]] == [[*x] for x in told(found, "mmlu")]


WRONG = {
    "absent": ("data_files: {test: nowhere.jsonl}", "the task absent can't be read .FileNotFoundError: .*nowhere"),
    "hub": ("", "the task hub can't be read .*; rows of the Hub need --hub"),
    "column": ("", "the task column can't be read .*'nothing' is undefined"),
    "metric": ("", "the task metric asks for the metric 'acd', which the harness doesn't have; the nearest is 'acc'"),
}


@pytest.mark.parametrize("name", [*WRONG, "mmul"])
def test_a_task_that_cannot_be_run_is_one_sentence(
    name: str, folder: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (pathlib.Path(folder) / "mmlu.yaml").read_text()
    change = {
        "absent": (f"{folder}/mmlu.jsonl", "nowhere.jsonl"), "hub": ("dataset_path: json", "dataset_path: some/rows"),
        "column": ("doc_to_text: text", "doc_to_text: '{{nothing}}'"), "metric": ("metric: acc", "metric: acd"),
    }  # fmt: skip
    for one, pair in change.items():
        (tmp_path / f"{one}.yaml").write_text(text.replace("task: mmlu", f"task: {one}").replace(*pair))
    monkeypatch.setattr(program, "open_policy", lambda *given: pytest.fail("a model was opened"))
    says = WRONG[name][1] if name in WRONG else "there is no task 'mmul'; the nearest is 'hub'.*own need --hub"
    made = program.Harness(model="m", tasks=(name,), include_path=str(tmp_path), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=says):
        program.main(made)
