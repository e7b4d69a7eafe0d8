"""The ablation program: its table holds what the members' own folders say, however the sweep came to its end."""

import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from experiments import ablate
from rlhf_jax import flags
from rlhf_jax.config import Evaluate, Train
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.best_of import best_of, kl
from tests import tiny
from tests.test_run import ROOT, lines, make_config

SWEEP = "loss.name=dpo,simpo;loss.beta=0.1,1;seed=0,1"


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A scorer."""
    return [float(sum(map(str.isalpha, text))) for text in completions]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny model, rows, and prompts."""
    folder = tmp_path_factory.mktemp("ablations")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl")
    prompts = [{"prompt": f"{word} dog:"} for word in tiny.WORDS[:6]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


def program(place: pathlib.Path, workdir: pathlib.Path, **changes: Any) -> ablate.Ablate:
    config = make_config(place, "dpo", train=Train(steps=3, batch_size=4), evaluate=Evaluate(every=2))
    made = ablate.Ablate(
        config=config, sweep=SWEEP, workdir=str(workdir), prompts=str(place / "prompts.jsonl"),
        scorer="tests.test_ablate:letters", max_new_tokens=8, samples=2, best_of=(1, 4),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def finished(place) -> pathlib.Path:
    """The workdir of a whole ablation."""
    ablate.main(program(place, place / "finished"))
    return place / "finished"


def timeless(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in table]


def test_a_line_a_member_says_what_its_own_folder_says(finished):
    table = lines(finished / "table.jsonl")
    assert len(table) == len({row["member"] for row in table}) == 8
    for row in table:
        folder = finished / row["workdir"]
        steps, config = lines(folder / "metrics.jsonl"), json.loads((folder / "config.json").read_text())
        assert row["losses"] == [[step["step"], step["loss"]] for step in steps] and row["steps"] == 3
        assert row["train"] == steps[-1] and row["eval"] == lines(folder / "eval.jsonl")[-1]
        assert row["first_eval"]["step"] == 0
        assert row["seed"] == config["seed"] == row["sweep"]["seed"]
        assert row["loss"]["name"] == config["loss"]["name"] == row["sweep"]["loss.name"]
        assert row["loss"]["beta"] == row["sweep"]["loss.beta"]
        answers = lines(folder / "answers.jsonl")
        assert [len(answer["answers"]) for answer in answers] == [2] * 6
        for name, column in (("score", "scores"), ("kl", "kl"), ("tokens", "tokens")):
            assert row[name]["mean"] == pytest.approx(np.mean([answer[column] for answer in answers]), rel=1e-6)
            assert row[name]["low"] <= row[name]["mean"] <= row[name]["high"]
    assert len({json.dumps(row["losses"]) for row in table}) == 8, "no two members may be the same run"


def test_the_table_and_the_figures_show_every_seed(finished):
    text = (finished / "table.md").read_text()
    for row in lines(finished / "table.jsonl"):
        assert f"{row['score']['mean']:.3g}"[:4] in text
    for name in ("frontier", "margins", "accuracies", "length"):
        image = matplotlib.image.imread(finished / f"{name}.png")
        assert min(image.shape[:2]) > 400 and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20


def test_best_of_n_stands_beside_it(finished):
    found = lines(finished / "best_of.jsonl")
    assert [(row["n"], row["seed"]) for row in found] == [(1, 0), (4, 0), (1, 1), (4, 1)]
    assert found[1]["score"]["mean"] > found[0]["score"]["mean"] and found[0]["kl"] == 0


def test_what_is_finished_is_not_done_again(finished, place, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("metrics.jsonl")}
    table = lines(finished / "table.jsonl")
    ablate.main(program(place, finished))
    assert "8 members, 8 of them here, 8 finished before" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("metrics.jsonl")}
    assert lines(finished / "table.jsonl") == table


def test_shards_fill_one_table(finished, place, capsys):
    workdir = place / "shards"
    ablate.main(program(place, workdir, shard="2/2"))
    assert "4 members are not finished" in capsys.readouterr().out
    assert len(lines(workdir / "table.jsonl")) == 4 and not (workdir / "best_of.jsonl").exists()
    ablate.main(program(place, workdir, shard="1/2"))
    assert timeless(lines(workdir / "table.jsonl")) == timeless(lines(finished / "table.jsonl"))


def test_a_kill_loses_nothing_that_is_finished(finished, place, tmp_path):
    """Killed in another process as soon as the first group is finished; the rest is done by the same command."""
    code = (
        "import pathlib, sys; from tests.test_ablate import ablate, program; "
        "ablate.main(program(*map(pathlib.Path, sys.argv[1:])))"
    )
    workdir = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(place), str(workdir)], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(1200):
            if list(workdir.glob("members/*/result.jsonl")) or process.poll() is not None:
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 1 <= len(list(workdir.glob("members/*/result.jsonl"))) < 8, "it must be killed in the middle"
    ablate.main(program(place, workdir))
    assert timeless(lines(workdir / "table.jsonl")) == timeless(lines(finished / "table.jsonl"))


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--sweep=", "--sweep is empty"),
        ("--sweep=loss.name=dpo,dpoo", "there is no loss 'dpoo'; the nearest is 'dpo'"),
        ("--sweep=loss.name=simpo;loss.divergence=js", "member .* loss 'simpo' would ignore divergence"),
        ("--shard=3/2", "--shard=3/2 is not allowed"),
        ("--together=0", "--together=0 is not allowed"),
        ("--scorer=gold", "--scorer judges nothing without --prompts"),
        ("--best_of=4", "--best_of is judged by a scorer"),
        ("--best_of=0", "--best_of=0 is not allowed"),
        ("--temperature=-1", "temperature"),
    ],
)
def test_misuse_is_one_sentence_before_anything_is_trained(place, tmp_path, capsys, flag, says):
    argv = [
        "ablate", "--config=configs/dpo.py", f"--config.model.path={place / 'model'}",
        f"--config.data.path={place / 'pairs.jsonl'}", f"--config.cache={tmp_path}", f"--workdir={tmp_path / 'out'}",
        "--sweep=seed=0,1", flag,
    ]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        flags.run(ablate.main, ablate.Ablate, argv)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    with pytest.raises(UserError, match=says):
        raise UserError(error)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    scores, by = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    for n in range(1, 7):
        subsets = list(itertools.combinations(range(6), n))
        ranked = [
            [row[max(subset, key=rank.__getitem__)] for subset in subsets] for row, rank in zip(scores, by, strict=True)
        ]
        np.testing.assert_allclose(best_of(scores, n, by), np.mean(ranked, axis=1), rtol=1e-12)
        np.testing.assert_allclose(best_of(scores, n), [np.mean([max(r[list(s)]) for s in subsets]) for r in scores])
    assert kl(1) == 0 and kl(4) == pytest.approx(np.log(4) - 0.75)
    with pytest.raises(ValueError, match="best of 7"):
        best_of(scores, 7)
