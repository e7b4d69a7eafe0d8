"""The ranking program, end to end: what it writes and prints, and what it refuses before anything is opened."""

import json
import pathlib
from typing import Any

import pytest

from experiments import rank
from rlhf_jax import flags
from rlhf_jax.data import formats, world, world_rows
from rlhf_jax.data.rows import Ranking
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.rankings import agreement, read_rankings
from tests import tiny


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(rank.run, "use_compile_cache", lambda: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model, prompts of the world, and others."""
    folder = tmp_path_factory.mktemp("rank")
    tiny.write_model(folder / "model", tiny.CONFIG | {"max_position_embeddings": 96})
    rows = world_rows.prompts(6, 0, kinds=("fact",))
    (folder / "world.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.txt").write_text("Where is the key?\nTell me a story.\n")
    return folder


def call(place: pathlib.Path, out: pathlib.Path, *words: str, prompts: str = "world.jsonl") -> list[dict[str, Any]]:
    """The rows that a command line writes."""
    given = [f"--model={place / 'model'}", f"--prompts={place / prompts}", f"--out={out}", "--max_new_tokens=6"]
    flags.run(rank.main, rank.Rank, ["rank", *given, *words])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_simulated_people_rank_what_a_model_answers(place, tmp_path, capsys):
    rows = call(place, tmp_path / "new" / "out.jsonl", "--answers=3", "--labels=2", "--labeller.noise=0", "--rows=4")
    told = capsys.readouterr().out
    prompts = [row["prompt"] for row in map(json.loads, (place / "world.jsonl").read_text().splitlines())]
    assert [row["prompt"] for row in rows] == [prompt for prompt in prompts[:4] for _ in range(2)]
    for row in rows:
        assert len(row["completions"]) == 3 and len(set(row["completions"])) > 1
        assert row["gold"] == pytest.approx(world.gold([row["prompt"]] * 3, row["completions"]))
        assert 0 <= row["labeller"] < 5
        (read,) = formats.adapt("ranking", row, False)
        assert isinstance(read, Ranking)
    assert "8 rows of 4 prompts; 0 left out" in told and f"{agreement(rows):.1%} (coins: 50%)" in told
    assert read_rankings(tmp_path / "new" / "out.jsonl") == rows
    once = call(place, tmp_path / "once.jsonl", "--answers=3", "--labels=1", "--labeller.noise=1", "--rows=4")
    assert [row["completions"] for row in once] == [row["completions"] for row in rows[::2]]
    assert [row["ranks"] for row in once] != [row["ranks"] for row in rows[::2]]
    assert "two people" not in capsys.readouterr().out


def test_ranks_are_left_for_people_whatever_the_prompts(place, tmp_path, capsys):
    rows = call(place, tmp_path / "out.jsonl", "--labellers=0", "--answers=3", prompts="mine.txt")
    assert [row["prompt"] for row in rows] == ["Where is the key?", "Tell me a story."]
    assert all(row.keys() == {"prompt", "completions", "ranks", "labeller"} for row in rows)
    assert all(row["ranks"] is row["labeller"] is None for row in rows)
    assert "2 rows of 2 prompts" in (told := capsys.readouterr().out) and "fill in ranks" in told
    with pytest.raises(UserError, match=r"out.jsonl:1 has no ranks; fill them in"):
        read_rankings(tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--answers=1",), "--answers=1 is not allowed; it must be at least 2"),
        (("--labels=0",), "--labels=0 is not allowed; it must be at least 1"),
        (("--labellers=-1",), "--labellers=-1 is not allowed; it must be at least 0"),
        (("--rows=0",), "--rows=0 is not allowed; it must be at least 1"),
        (("--seed=-1",), "--seed=-1 is not allowed; it must be from 0 to 4294967295"),
        (("--temperature=-1",), "--temperature=-1.0 is not allowed; it must be at least 0"),
        (("--temperature=0",), "all answers to a prompt would be the same; give a --temperature above 0"),
        (("--labeller.noise=2",), "noise=2.0 must be from 0 to 1"),
        (("--labellers=0", "--labels=2"), "--labellers=0 asks no simulated people and does not read --labels; drop it"),
        (("--labellers=0", "--labeller.noise=0"), "does not read --labeller; drop it"),
        (("--prompts=nowhere.txt",), "there is no file nowhere.txt; check --prompts"),
        (("--prompts=PLACE/mine.txt",), "mine.txt:2 is no prompt of the synthetic world, and its people rank"),
        (("--out=PLACE/mine.txt",), "mine.txt already exists; give a new file"),
        (("--out=PLACE/mine.txt/out.jsonl",), "lies on a file, which is no folder; give another --out"),
        (("--out=",), "there is no file to write; give --out=FILE.jsonl"),
        (("--model=nowhere/at/all",), "nowhere/at/all"),
    ],
)
def test_what_can_be_mended_is_one_sentence_before_anything_is_opened(
    place, tmp_path, capsys, monkeypatch, words, says
):
    monkeypatch.setattr(rank, "answer", None)
    if "model" not in words[0]:
        monkeypatch.setattr(rank, "open_policy", None)
    with pytest.raises(SystemExit) as exit:
        call(place, tmp_path / "out.jsonl", *(word.replace("PLACE", str(place)) for word in words))
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert exit.value.code == 2 and len(lines) == 1 and says in lines[0], error
    assert not (tmp_path / "out.jsonl").exists()
