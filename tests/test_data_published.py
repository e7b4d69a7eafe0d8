"""The real files of published sets, every one that serves training, load through their formats without surprise."""

import collections
import contextlib
import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax.data.config import Data
from rlhf_jax.data.conversions import Form
from rlhf_jax.data.dataset import load
from rlhf_jax.data.formats import FORMATS, adapt
from rlhf_jax.data.inspection import inspect
from rlhf_jax.data.rows import Labelled, Left, Message, Preference, Ranking, Refusal, Stepwise
from rlhf_jax.data.sources import Record, read
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError

# File -> (format, rows given, records refused, records with nothing to learn from).
FILES = {
    "alpaca-en-demo/train.jsonl": ("alpaca", 789, 0, 0),
    "alpaca-en-demo/valid.jsonl": ("alpaca", 104, 0, 0),
    "self-instruct/seed_tasks.jsonl": ("self_instruct", 175, 0, 0),
    "self-instruct/user_oriented_instructions.jsonl": ("self_instruct", 159, 0, 0),
    "oasst-en-100-trees/train.jsonl": ("oasst", 70, 0, 0),
    "oasst-en-100-trees/valid.jsonl": ("oasst", 11, 0, 0),
    "gsm8k/example_model_solutions.jsonl": ("solutions", 4 * 784, 0, 0),
    "gsm8k/train.jsonl": ("question_answer", 6500, 0, 0),
    "gsm8k/valid.jsonl": ("question_answer", 524, 0, 0),
    "finegrained-qa-feedback/dev_feedback.train.jsonl": ("finegrained", 2 * 337 - 8, 0, 0),
    "finegrained-qa-feedback/dev_feedback.valid.jsonl": ("finegrained", 2 * 37 - 2, 0, 0),
    "hh-harmless-base/train.jsonl": ("hh", 1543, 4, 0),
    "hh-harmless-base/valid.jsonl": ("hh", 191, 3, 0),
    "hh-helpful-cleaned/train.jsonl": ("scored_transcripts", 1574, 8, 0),
    "hh-helpful-cleaned/valid.jsonl": ("scored_transcripts", 176, 1, 0),
    "llama-factory-feedback/dpo_en_demo.train.jsonl": ("sharegpt_preference", 192, 0, 0),
    "llama-factory-feedback/dpo_en_demo.valid.jsonl": ("sharegpt_preference", 22, 0, 0),
    "llama-factory-feedback/kto_en_demo.train.jsonl": ("labelled_messages", 217, 0, 0),
    "llama-factory-feedback/kto_en_demo.valid.jsonl": ("labelled_messages", 20, 0, 0),
    "dsp-domain-preference/train.jsonl": ("domain_normal", 463, 0, 1),
    "dsp-domain-preference/valid.jsonl": ("domain_normal", 46, 0, 0),
    "pandalm-three-annotators/testset-v1.train.jsonl": ("pandalm", 418, 6, 122),
    "pandalm-three-annotators/testset-v1.valid.jsonl": ("pandalm", 73, 0, 2),
    "tulu-human-eval/eval_annotations_tulu_1.train.jsonl": ("graded_pair", 453, 0, 219),
    "tulu-human-eval/eval_annotations_tulu_1.valid.jsonl": ("graded_pair", 62, 0, 27),
    "alpaca-eval-judges/gpt-3.5-turbo-0301.alpaca_eval_cot_gpt4_turbo_fn.jsonl": ("judged_pair", 230, 0, 0),
    "alpaca-eval-judges/gpt-3.5-turbo-0301.alpaca_eval_gpt4_turbo_fn.jsonl": ("judged_pair", 230, 0, 0),
    "alpaca-eval-judges/gpt-3.5-turbo-0301.weighted_alpaca_eval_gpt4_turbo.jsonl": ("judged_pair", 230, 0, 0),
    "alpaca-eval-judges/nullmodel.weighted_alpaca_eval_gpt4_turbo.jsonl": ("judged_pair", 60, 0, 0),
    "big-bench-mistake/dyck_languages.train.jsonl": ("mistake_index", 289, 0, 0),
    "big-bench-mistake/dyck_languages.valid.jsonl": ("mistake_index", 31, 0, 0),
    "big-bench-mistake/logical_deduction.train.jsonl": ("mistake_index", 189, 0, 0),
    "big-bench-mistake/logical_deduction.valid.jsonl": ("mistake_index", 25, 0, 0),
    "big-bench-mistake/multistep_arithmetic.train.jsonl": ("mistake_index", 182, 0, 0),
    "big-bench-mistake/multistep_arithmetic.valid.jsonl": ("mistake_index", 28, 0, 0),
    "big-bench-mistake/tracking_shuffled_objects.train.jsonl": ("mistake_index", 201, 0, 0),
    "big-bench-mistake/tracking_shuffled_objects.valid.jsonl": ("mistake_index", 30, 0, 0),
    "big-bench-mistake/word_sorting.train.jsonl": ("mistake_index", 213, 0, 0),
    "big-bench-mistake/word_sorting.valid.jsonl": ("mistake_index", 21, 0, 0),
    "mr-gsm8k-first-error/train.jsonl": ("first_error", 325, 0, 0),
    "mr-gsm8k-first-error/valid.jsonl": ("first_error", 34, 0, 0),
    "prm800k-examples/examples.jsonl": ("prm800k", 126, 0, 0),
    "math500/math500.jsonl": ("problem", 298, 0, 0),
    "ifeval/input_data.jsonl": ("prompt", 358, 0, 0),
    "ifbench/IFBench_test.jsonl": ("prompt", 151, 0, 0),
    "mt-bench/question.jsonl": ("first_turn", 49, 0, 0),
    "mt-bench/vicuna_bench_question.jsonl": ("first_turn", 54, 0, 0),
    "arena-hard-prompts/question.jsonl": ("prompt", 349, 0, 0),
    "c4-demo/train.jsonl": ("text", 260, 0, 0),
    "c4-demo/valid.jsonl": ("text", 40, 0, 0),
    "tinyshakespeare/input.txt": ("text", 7222, 0, 0),
    "tinystories/valid-excerpt.txt": ("text", 19, 0, 0),
}


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "data"


@pytest.fixture(scope="module")
def rows_of(folder):
    """The rows of a file in a format, with a chat template, in the order of the file."""

    def rows(file, name):
        found = []
        for record in read(str(folder / file)):
            assert isinstance(record, Record)
            with contextlib.suppress(Left):
                found += adapt(name, record.columns, True)
        return found

    return rows


def test_every_file_that_serves_training_is_read_in_its_format(folder):
    counts = {entry["file"]: entry.get("rows") for entry in json.loads((folder / "MANIFEST.json").read_text())}
    for file, (name, rows, refused, left) in FILES.items():
        found = inspect(str(folder / file), samples=0)
        assert (found.format, found.rows, len(found.refused), len(found.left)) == (name, rows, refused, left), file
        assert counts[file] in (found.read, None), file
        assert found.kind is FORMATS[name].row and len(found.lengths) == rows
        assert len(found.refused) <= Data().max_refused * found.read
        reasons = {reason.partition(" is ")[2] or reason for _, reason in found.refused}
        assert reasons <= {"the two dialogues diverge before the last answer", "an empty answer", "bool, not a string"}


@pytest.mark.parametrize(
    "file",
    [
        "hhh-alignment/hhh_alignment_eval.jsonl",
        "llmbar/llmbar_natural.jsonl",
        "anthropic-model-written-evals/agreeableness.jsonl",
        "sycophancy/nlp_survey.jsonl",
        "truthfulqa/mc_task.jsonl",
        "truthfulqa/TruthfulQA.jsonl",
        "mmlu/test.jsonl",
        "bbh/bbh.jsonl",
        "mt-bench/judge_prompts.jsonl",
    ],
)
def test_what_is_for_evaluation_alone_has_no_format(folder, file):
    with pytest.raises(UserError, match="which no format reads"):
        inspect(str(folder / file))


def test_the_trees_give_conversations_of_best_replies_and_rankings(rows_of):
    trees = "oasst-en-100-trees/train.jsonl"
    chats = [row.completion for row in rows_of(trees, "oasst")]
    for chat in chats:
        roles = [turn.role for turn in chat]
        assert roles == ["user", "assistant"] * (len(chat) // 2)
    rankings = rows_of(trees, "oasst_ranking")
    assert all(row.ranks == tuple(range(len(row.ranks))) for row in rankings)
    # At every place that was ranked, a conversation that comes by goes on with the best reply.
    best = {row.prompt: row.completions[0][0] for row in rankings}
    met = [(chat[i], best[chat[:i]]) for chat in chats for i in range(1, len(chat)) if chat[:i] in best]
    assert len(met) > 60 and all(taken == first for taken, first in met)
    assert len(rankings) + len(rows_of(trees.replace("train", "valid"), "oasst_ranking")) == 173


def test_comparisons_prefer_what_people_chose(folder, rows_of):
    pairs = rows_of("finegrained-qa-feedback/dev_feedback.valid.jsonl", "finegrained_pairs")
    assert len(pairs) == 103 + 83
    judged, *_ = rows_of("alpaca-eval-judges/nullmodel.weighted_alpaca_eval_gpt4_turbo.jsonl", "judged_pair")
    assert judged.rejected[0].content.startswith(" } }") and judged.chosen[0].content.startswith("The names of U.S.")
    record = next(iter(read(str(folder / "hh-helpful-cleaned/valid.jsonl"))))
    assert isinstance(record, Record)
    (row,) = adapt("scored_transcripts", record.columns, False)
    assert isinstance(row, Preference) and isinstance(row.prompt, str) and isinstance(row.chosen, str)
    assert row.prompt + row.chosen == record.columns["text"][0]


def test_domains_prefer_their_own_answer(rows_of):
    for name in ("normal", "academy", "literature"):
        for row in rows_of("dsp-domain-preference/valid.jsonl", f"domain_{name}"):
            assert isinstance(row, Ranking) and sorted(row.ranks) == [0, 1, 1, 1, 1]


def test_steps_are_the_solution_and_right_up_to_the_first_error(folder, rows_of):
    file = "mr-gsm8k-first-error/valid.jsonl"
    for record, row in zip(read(str(folder / file)), rows_of(file, "first_error"), strict=True):
        assert isinstance(record, Record) and isinstance(row, Stepwise)
        place = record.columns["model_output_solution_first_error_step"]
        assert row.labels == tuple(n + 1 < place for n in range(len(row.labels)))
        steps = [turn.content for step in row.completions for turn in step if isinstance(turn, Message)]
        assert "".join(steps) == "\n".join(record.columns["model_output_steps"])
    spans = rows_of("finegrained-qa-feedback/dev_feedback.valid.jsonl", "finegrained_spans")
    labels = collections.Counter(label for row in spans for label in row.labels)
    assert labels[True] > 50 and labels[False] > 50
    rated = rows_of("prm800k-examples/examples.jsonl", "prm800k")
    assert {label for row in rated for label in row.labels} == {0.0, 0.5, 1.0}
    assert rated[0].labels == (True, False)  # the second step's first try was rated -1


def test_predictions_are_ranked_by_how_often_they_were_preferred(folder, rows_of):
    file = "finegrained-qa-feedback/dev_feedback.valid.jsonl"
    rankings = rows_of(file, "finegrained_ranking")
    assert len(rankings) == 36 and all(-3 <= rank <= 0 for row in rankings for rank in row.ranks)
    better = {(row.prompt, row.chosen, row.rejected) for row in rows_of(file, "finegrained_pairs")}
    best = [(r.prompt, c) for r in rankings for c, rank in zip(r.completions, r.ranks, strict=True) if rank == -3]
    assert len(best) > 5  # preferred to all others, so never rejected
    assert not {(prompt, answer) for prompt, _, answer in better} & set(best)


STEPS = (
    "finegrained-qa-feedback/dev_feedback.train.jsonl",
    "big-bench-mistake/dyck_languages.valid.jsonl",
    "big-bench-mistake/word_sorting.valid.jsonl",
    "mr-gsm8k-first-error/valid.jsonl",
    "prm800k-examples/examples.jsonl",
)


@pytest.mark.parametrize("place", ["models/stories260k", "data/tokenizers/minimind"])
@pytest.mark.parametrize("file", STEPS)
def test_steps_of_real_files_are_read_and_end_where_their_text_does(shared, folder, file, place):
    tokenizer = AutoTokenizer.from_pretrained(shared / place)
    encoder = Encoder(tokenizer)
    data = load(Data(path=(str(folder / file),), eval_share=0.0, max_refused=0.0), encoder, "stepwise", 10**5, 0)
    for example in data.train[:40]:
        (tokens,) = example.completions
        assert (
            len(tokens.ends) == len(example.step_labels) and (np.diff(tokens.ends, prepend=tokens.start - 1) > 0).all()
        )
        assert tokens.mask[tokens.ends].all() and tokens.ids[tokens.ends[-1] + 1] == encoder.eos_id
        assert set(example.step_labels) <= {0.0, 0.5, 1.0}


def test_solutions_carry_their_own_label(rows_of):
    rows = rows_of("gsm8k/example_model_solutions.jsonl", "solutions")
    assert [row.label for row in rows[:4]] == [False, False, False, True]
    assert all(isinstance(row, Labelled) for row in rows)


@pytest.mark.parametrize(
    ("file", "form", "least"),
    [
        ("dsp-domain-preference/valid.jsonl", "pair", 4 * 46 - 7),  # some answers are the same
        ("finegrained-qa-feedback/dev_feedback.valid.jsonl", "pair", 186),
        ("finegrained-qa-feedback/dev_feedback.valid.jsonl", "demonstration", 72),
        ("tulu-human-eval/eval_annotations_tulu_1.valid.jsonl", "labelled", 62),
        ("tinystories/valid-excerpt.txt", "demonstration", 19),
    ],
)
def test_the_reading_follows_what_the_loss_takes(shared, folder, file, form: Form, least):
    encoder = Encoder(AutoTokenizer.from_pretrained(shared / "models/stories260k"))
    data = load(Data(path=(str(folder / file),), eval_share=0.0), encoder, form, 8192, 0)
    assert data.report.train == least and not data.report.refused
    indices = [example.index for example in data.train]
    assert indices == sorted(set(indices))


def test_ties_are_left_out_and_never_stop_a_run(shared, folder, tmp_path):
    encoder = Encoder(AutoTokenizer.from_pretrained(shared / "models/stories260k"))
    path = folder / "tulu-human-eval/eval_annotations_tulu_1.valid.jsonl"
    report = load(Data(path=(str(path),), max_refused=0.0), encoder, "pair", 8192, 0).report
    assert len(report.left) == 27 and not report.refused
    assert any("27 left out: nothing to learn from: " in line for line in report.lines())
    report.write(str(tmp_path / "rows.jsonl"))
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["what"] for row in written].count("left") == 27 and "tie" in written[0]["reason"]


def test_ties_alone_leave_nothing_to_train_on(shared, tmp_path):
    encoder = Encoder(AutoTokenizer.from_pretrained(shared / "models/stories260k"))
    row = {"prompt": "q", "completion_a": "a", "completion_b": "b", "preference": "tie"}
    (tmp_path / "ties.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    with pytest.raises(UserError, match="3 with nothing to learn from.*give rows that prefer one answer"):
        load(Data(path=(str(tmp_path / "ties.jsonl"),)), encoder, "pair", 512, 0)


def test_a_refused_row_of_several_kinds_is_named(folder):
    record = next(iter(read(str(folder / "oasst-en-100-trees/train.jsonl"))))
    assert isinstance(record, Record)
    spoilt = json.loads(json.dumps(record.columns))
    spoilt["prompt"]["replies"][0]["role"] = "robot"
    with pytest.raises(Refusal, match="role 'robot'"):
        adapt("oasst", spoilt, True)
