"""What a file is taken for is what training makes of it, and is told in plain text whatever its rows say."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from experiments import data as program
from rlhf_jax import flags
from rlhf_jax.data.config import Data
from rlhf_jax.data.dataset import load
from rlhf_jax.data.inspection import Reader, inspect
from rlhf_jax.data.tokens import Encoder

ROOT = pathlib.Path(__file__).resolve().parents[1]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer(shared):
    return AutoTokenizer.from_pretrained(shared / "models/stories260k")


def shown(capsys, *argv: str, status: int = 0) -> str:
    """What the program prints on a terminal of 80 columns that has no colours."""
    try:
        flags.run(program.main, program.Data, ["data", *argv])
        assert status == 0
    except SystemExit as stopped:
        assert stopped.code == status
    captured = capsys.readouterr()
    assert captured.err == "" and "\x1b" not in captured.out
    return captured.out


@pytest.mark.parametrize("length", [48, 128, None])
def test_what_is_counted_is_what_training_counts(tmp_path, tokenizer, length):
    rows = [{"prompt": "word " * n, "chosen": " yes" * (n % 7 + 1), "rejected": " no" * (40 if n == 5 else 1)}
            for n in range(1, 40)]  # fmt: skip
    rows[3] |= {"rejected": rows[3]["chosen"]}
    rows[9] |= {"rejected": " "}
    path = write(tmp_path / "rows.jsonl", rows)
    found = inspect(path, reader=Reader(Encoder(tokenizer), tokenizer, length))
    report = load(Data(path=(path,), max_refused=1.0), Encoder(tokenizer), "pair", length or 4096, 0).report
    assert found.refused == report.refused and len(found.refused) == 2 and found.read == report.read
    assert (found.cut, found.too_long) == (len(report.cut), len(report.too_long))
    assert (length == 48) == (found.too_long > 0) and found.rows == len(found.lengths) == 37
    assert found.typical[0] == sorted(found.lengths)[18] and found.typical[2] == max(found.lengths)


def test_the_pieces_of_a_row_are_its_text_with_what_is_trained(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Once upon", "chosen": " a time", "rejected": " no"}])
    (sample,) = inspect(path, reader=Reader(Encoder(tokenizer), tokenizer)).samples
    assert sample.where == f"{path}:1" and [name for name, _ in sample.parts] == ["chosen", "rejected"]
    pieces = sample.parts[0][1]
    assert "".join(piece.text for piece in pieces) == "<s> Once upon a time</s>"
    assert [(p.role, p.text) for p in pieces if p.special] == [("prompt", "<s>"), ("trained", "</s>")]
    assert "".join(p.text for p in pieces if p.role == "trained") == " a time</s>"


def test_a_single_file_is_told_on_one_page(tmp_path, capsys):
    rows = [
        {"prompt": f"How many?\n\x1b[31m[bold]{n}[/bold]\u202e", "completion_a": "few", "completion_b": "many",
         "preference": "tie" if n < 2 else "b-is-better"}
        for n in range(9)
    ]  # fmt: skip
    rows[8]["preference"] = "unheard of"
    told = shown(capsys, f"--path={write(tmp_path / 'r.jsonl', rows)}", "--rows=1")
    assert "9 read, 1 refused, 2 left out" in told and "graded_pair" in told and "pairs: 6" in told
    assert "'preference' is 'unheard of'; allowed are" in " ".join(told.split())
    assert "no preference: a tie" in " ".join(told.split())
    assert "‹U+001B›[31m[bold]2[/bold]‹U+202E›" in told and "How many?↵" in told
    assert re.search(r"trained \| many", told) and re.search(r"trained \| few", told) and "(as above)" in told
    assert max(map(len, told.splitlines())) <= 80


def test_with_a_tokenizer_lengths_special_tokens_and_trained_text_are_shown(tmp_path, shared, capsys):
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d " * 900)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]}]
    path = write(tmp_path / "r.jsonl", rows)
    model = f"--tokenizer={shared / 'models/stories260k'}"
    told = shown(capsys, f"--path={path}", model, f"--chat_template={template}")
    runs = re.findall(r"^ *(prompt|trained|not trained) \| (.*\S)", told, re.MULTILINE)
    assert [name for name, _ in runs] == ["prompt", "trained", "not trained", "trained", "not trained"]
    assert runs[1][1].endswith("b</s>") and "characters more" in told
    assert "0 would lose the beginning of their prompt, 1 would be left out (512 tokens)" in " ".join(told.split())
    told = shown(capsys, f"--path={path}", model, f"--chat_template={template}", "--train_on=last")
    runs = re.findall(r"^ *(prompt|trained|not trained) \|", told, re.MULTILINE)
    assert runs == ["prompt", "trained", "not trained"]
    told = shown(capsys, f"--path={path}", model)
    assert "no chat template; give one with --chat_template=FILE" in " ".join(told.split()) and "<user> a" in told


def test_several_files_are_a_table_where_there_is_room(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "b.jsonl", [{"text": "one two"}] * 3)
    write(folder / "a.jsonl", [{"prompt": "q", "completions": ["a", "b"], "ranks": [n % 2, 0]} for n in range(5)])
    write(folder / "c.jsonl", [{"unheard": "of"}])
    told = shown(capsys, f"--path={folder}", status=1)
    assert "set/a.jsonl\n  5 rows of ranking: 2 ranking, 0 refused, 3 left out" in told
    assert "c.jsonlhasthecolumns'unheard',whichnoformat" in "".join(told.split())  # a long path is folded
    monkeypatch.setenv("COLUMNS", "160")
    table = [line for line in shown(capsys, f"--path={folder}", status=1).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[2] == ["set/a.jsonl", "ranking", "5", "ranking", "2", "0 / 3", "2 / 2"]
    assert cells[3] == ["set/b.jsonl", "text", "3", "demonstration", "3", "0 / 0", "2 / 2"]


def test_another_reading_can_be_asked_for(shared, capsys):
    path = shared / "data/oasst-en-100-trees/valid.jsonl"
    assert "oasst (or read as oasst_ranking)" in shown(capsys, f"--path={path}", "--rows=0")
    told = shown(capsys, f"--path={path}", "--format=oasst_ranking", "--rows=1")
    assert "ranked answers: " in told and "pairs for a loss" in told and "rank 0" in told


def test_the_program_runs_by_itself_without_loading_jax(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"prompt": "q", "completion": "a"}])
    code = f"import sys; sys.argv = ['data', '--path={path}']\nimport runpy\n"
    code += "runpy.run_module('experiments.data', run_name='__main__')\nassert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "prompt_completion" in done.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "either --path=FILE, .* or --out=FOLDER"),
        (["--path=a", "--out=b"], "either --path=FILE, .* or --out=FOLDER"),
        (["--path=rows.jsonl"], "no data file or folder rows.jsonl; check --path"),
        (["--path={rows}", "--documents=3"], "--path shows files and does not read --documents"),
        (["--path={rows}", "--manner.right=0.1"], "does not read --manner"),
        (["--out=w", "--rows=1"], "--out writes the world and does not read --rows"),
        (["--path={rows}", "--rows=-1"], "--rows=-1 must be at least 0"),
        (["--path={rows}", "--length=64"], "--length says what becomes of tokens.* give --tokenizer"),
        (["--path={rows}", "--length=1"], "--length=1 must be at least 2"),
        (["--path={rows}", "--train_on=last"], "--train_on .* give --tokenizer"),
        (["--path={rows}", "--chat_template=x"], "give --tokenizer"),
        (["--path={rows}", "--tokenizer=nowhere"], "no folder nowhere; check --tokenizer"),
        (["--path={rows}", "--tokenizer={folder}"], "no tokenizer that transformers can read"),
        (["--path={rows}", "--format=hh"], "no column 'chosen', 'rejected'.*choose --format from auto"),
        (["--path={rows}", "--format=hhh"], "--format=hhh"),
    ],
)
def test_bad_input_is_one_sentence(argv, says, tmp_path, capsys):
    rows = write(tmp_path / "r.jsonl", [{"prompt": "q", "completion": "a"}])
    argv = [word.format(rows=rows, folder=tmp_path) for word in argv]
    with pytest.raises(SystemExit) as stopped:
        flags.run(program.main, program.Data, ["data", *argv])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and re.search(says, said.err) and said.err.count("\n") == 1


def test_rows_that_the_template_refuses_do_not_count_and_name_the_flag_of_the_program(tmp_path, shared, capsys):
    chat = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in chat]
    thought = [*messages[:1], messages[1] | {"reasoning_content": "hm"}, *messages[2:]]
    path = write(tmp_path / "r.jsonl", [{"messages": messages}, {"messages": thought}])
    told = shown(capsys, f"--path={path}", f"--tokenizer={shared / 'data/tokenizers/minimind'}")
    told = " ".join(told.split())
    assert "2 read, 1 refused" in told and "single answers: 1 " in told and "turns 1 of 1 (100%)" in told
    assert "; --train_on=last would train the last one alone" in told and "--config." not in told


def test_special_tokens_that_stay_text_are_told(tmp_path, shared, capsys):
    path = write(tmp_path / "r.jsonl", [{"prompt": "a </s> b", "completion": "c"}, {"prompt": "a", "completion": "c"}])
    argv = [f"--path={path}", f"--tokenizer={shared / 'models/stories260k'}"]
    told = " ".join(shown(capsys, *argv).split())
    assert "stay text in 1 of 2 (50%); if these rows were rendered ahead, give --special=tokens" in told
    assert "stay text" not in shown(capsys, *argv, "--special=tokens")
