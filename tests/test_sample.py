"""The sampling program, end to end on a real model: what it prints, what it writes, what it refuses."""

import io
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from experiments import sample
from rlhf_jax import flags

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GREEDY = ("--temperature=0", "--max_new_tokens=64")
SHORT = ("--temperature=0", "--max_new_tokens=10")


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(sample.run, "use_compile_cache", lambda: None)


@pytest.fixture(scope="module")
def chatty(stories, tmp_path_factory):
    """The same model with a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chatty"
    shutil.copytree(stories, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def call(*words: object) -> None:
    flags.run(sample.main, sample.Sample, ["sample", *map(str, words)])


def error(capsys, *words: object) -> str:
    """The one line that a refused command line is answered with."""
    with pytest.raises(SystemExit) as exit:
        call(*words)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2 and out == "" and err.endswith(f"{lines[0]}\n"), err
    return lines[0].removeprefix("error: ")


def test_greedy_text_is_the_published_one_and_nothing_else_is_on_stdout(stories):
    command = [sys.executable, "-m", "experiments.sample", f"--model={stories}", "--prompt=", *GREEDY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=sample.__file__.rsplit("/", 2)[0], check=True)
    text = done.stdout.removesuffix("\n")
    assert len(text) > 150 and (stories / "greedy.txt").read_text().startswith(text)
    assert f"{stories}: 260,032 parameters, context 512" in done.stderr and "64 tokens in" in done.stderr


def test_prompts_of_a_file_are_completed_in_their_order(stories, tmp_path, capsys):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "made" / "out.jsonl"
    texts = ["Once upon a time", "Lily", "The dog was very happy and"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    lengths = ("--max_new_tokens=10", "--seed=3")
    call(f"--model={stories}", f"--prompts={file}", f"--out={out}", "--samples=2", *lengths)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [text for text in texts for _ in range(2)]
    printed = capsys.readouterr()
    assert printed.out == "\n".join(row["completion"] + "\n" for row in rows)
    assert f"[{file}:3, sample 2 of 2: 10 tokens, length]" in printed.err
    assert all(row["stop"] == "length" and row["tokens"] == 10 and -200 < row["logprob"] < -1 for row in rows)
    plain = tmp_path / "prompts.txt"
    plain.write_text("\n".join(["", *texts]) + "\n")
    call(f"--model={stories}", f"--prompts={plain}", "--samples=2", *lengths)
    assert capsys.readouterr().out == printed.out
    assert "already exists" in error(capsys, f"--model={stories}", f"--prompts={file}", f"--out={out}")


def speaker(text_of, parts: list[str]) -> sample.Speaker:
    """One that draws these characters' bytes, three a look."""
    whole = "".join(parts).encode()
    looks = [np.frombuffer(whole[:end], np.uint8) for end in (*range(3, len(whole), 3), len(whole))]
    completion = lambda tokens: sample.Completion(0, 0, tokens, tokens, tokens, "length" * (len(tokens) == len(whole)))
    made = sample.Speaker.__new__(sample.Speaker)
    made.complete = lambda ids, steps=None, rows=None: ((completion(look), text_of(look)) for look in looks)
    return made


@pytest.mark.parametrize("text", ["Zoë sagte: „naïve Füße“", "日本語のテキスト", "a 👩‍👩‍👧 b", "ends in half \ufffd"])
def test_streamed_characters_are_whole(text, monkeypatch):
    pieces: list[str] = []
    stdout = types.SimpleNamespace(write=pieces.append, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", stdout)
    talker = speaker(lambda tokens: tokens.tobytes().decode(errors="replace"), [text])
    assert talker.say(np.zeros(1, np.int32))[1] == text
    assert "".join(pieces) == text + "\n"
    assert sum(bool(piece) for piece in pieces) > 3
    assert text.endswith("\ufffd") or "\ufffd" not in "".join(pieces)


def test_a_prompt_may_hold_any_character(stories, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    call(f"--model={stories}", "--prompt=Zoë 日 é", "--max_new_tokens=10", "--temperature=1.5", f"--out={out}")
    row = json.loads(out.read_text())
    assert row["prompt"] == "Zoë 日 é" and row["completion"] + "\n" == capsys.readouterr().out


def test_a_conversation_keeps_its_history_and_ends_with_stdin(chatty, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nSo?"))
    call(f"--model={chatty}", "--chat", f"--out={out}", *SHORT)
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert capsys.readouterr().out == f"{first['completion']}\n{second['completion']}\n"
    assert first["prompt"] == [{"role": "user", "content": "Hi"}]
    assert second["prompt"] == [
        *first["prompt"],
        {"role": "assistant", "content": first["completion"]},
        {"role": "user", "content": "So?"},
    ]
    call(f"--model={chatty}", "--chat", "--prompt=Hi", *SHORT)
    assert capsys.readouterr().out == first["completion"] + "\n"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": second["prompt"][:2]}))  # its answer is what is asked for
    call(f"--model={chatty}", f"--prompts={rows}", *SHORT)
    assert capsys.readouterr().out == first["completion"] + "\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to complete; give --prompt=TEXT"),
        (("--prompt=a", "--prompts=b"), "--prompt and --prompts are both given"),
        (("--prompt=a", "--temperature=-1"), "--temperature=-1.0 is not allowed; it must be at least 0"),
        (("--prompt=a", "--top_p=0"), "--top_p=0.0 is not allowed"),
        (("--prompt=a", "--samples=0"), "--samples=0 is not allowed; it must be at least 1"),
        (("--prompt=a", "--seed=-1"), "--seed=-1 is not allowed"),
        (("--chat", "--samples=2"), "drop --samples"),
        (("--prompts=missing.jsonl",), "there is no file missing.jsonl; check --prompts"),
        (("--prompt=a", "--step=3"), "holds no run, so it has no checkpoint 3"),
        (("--chat",), "--chat needs a chat template and the tokenizer of"),
        (("--chat", "--prompt=a"), "--chat needs a chat template and the tokenizer of"),
        (("--prompt=" + "word " * 600,), "it must have fewer than the model's context of 512"),
        (("--prompt=a", "--model=nowhere"), "model folder 'nowhere' doesn't exist; give --model"),
    ],
)
def test_bad_flags_are_answered_in_one_sentence(stories, capsys, words, said):
    assert said in error(capsys, f"--model={stories}", *words)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b'{"prompt": "a"}\n{"prompt": 3}', "prompts.jsonl:2 can't be used ('prompt' is int"),
        (b'{"prompt": "a"}\n{"text": "a"}', "prompts.jsonl:2 has neither a column prompt nor messages"),
        (b'{"prompt": "a"}\n{"prompt', "prompts.jsonl:2 can't be used (invalid JSON"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "prompts.jsonl:1 holds messages and the tokenizer of"),
        (b'\n{"prompt": "' + b"word " * 600 + b'"}', "prompts.jsonl:2 has 1"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_named_by_its_line(stories, tmp_path, capsys, content, said):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    assert said in error(capsys, f"--model={stories}", f"--prompts={file}")


def test_a_reader_that_has_seen_enough_ends_the_program_without_a_traceback(stories, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as exit:
            call(f"--model={stories}", "--prompt=", *SHORT)
    assert exit.value.code == 1  # and closing it, as Python does at its end, raised nothing
