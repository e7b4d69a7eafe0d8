"""Runs side by side: what is paired is what both saw, and what isn't is said."""

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from experiments import compare
from rlhf_jax import flags
from rlhf_jax.errors import UserError

Folder = pathlib.Path


def lines(file: Folder, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def a_run(
    folder: Folder, *, beta: float | None = None, name: str = "dpo", seed: int = 0, accuracy: float = 0.5,
    changes: dict[str, Any] | None = None, **loss: Any,
) -> str:  # fmt: skip
    """A run's folder without held-out rows and answers; older ones have no `changes`, the section preference."""
    folder.mkdir(parents=True)
    loss = {"name": name, "beta": beta} | loss
    config = {"algorithm": "preference", "seed": seed, "loss": loss, "data": {"path": ["a"]}}
    config |= {} if changes is None else {"preference": changes}
    (folder / "config.json").write_text(json.dumps(config))
    evaluation = {
        "step": 10, "eval/loss": 0.625, "eval/rewards/margins": 0.25, "eval/rewards/accuracies": accuracy,
        "eval/rewards/accuracies_low": 0.25, "eval/rewards/accuracies_high": 0.75,
    }  # fmt: skip
    lines(folder / "eval.jsonl", [{"step": 0, "eval/loss": 0.69}, evaluation])
    return str(folder)


def held_out(folder: str, margins: dict[int, float | None], correct: dict[int, float]) -> None:
    rows = [
        {"row": f"a.jsonl:{i}", "index": i, "loss": 0.5, "margin": margins[i], "correct": correct[i]} for i in margins
    ]
    lines(Folder(folder) / "held_out.jsonl", rows)


def answers(folder: str, scores: dict[str, list[float]], kl: float | None = 1.0) -> None:
    kls = lambda said: None if kl is None else [kl] * len(said)
    rows = [
        {"prompt": p, "answers": ["x"] * len(said), "scores": said, "kl": kls(said), "tokens": [3] * len(said)}
        for p, said in scores.items()
    ]
    lines(Folder(folder) / "answers.jsonl", rows)


@pytest.fixture
def two(tmp_path: Folder) -> tuple[str, str]:
    """Runs whose margins differ by 0.5 on each of the rows 1 to 40, and that don't share the rows 0 and 99."""
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b", seed=1)
    noise = np.random.default_rng(0).normal(size=100)
    held_out(a, {i: noise[i] for i in range(41)}, {i: float(i % 2) for i in range(41)})
    held_out(b, {i: noise[i] + 0.5 for i in [*range(1, 41), 99]}, {i: 1.0 for i in [*range(1, 41), 99]})
    return a, b


def program(*words: str, **given: Any) -> compare.Comparison:
    return compare.Comparison(runs=words, **given)


def result(tmp_path: Folder, *words: str, **given: Any) -> Any:
    compare.main(program(*words, out=str(tmp_path / "out"), **given))
    return json.loads((tmp_path / "out" / "comparison.json").read_text())


def by_figure(said: Any) -> dict[str, Any]:
    return {each["figure"]: each for each in said["differences"]}


def refused(*words: str, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        compare.main(program(*words, **given))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_constant_difference_has_no_width_however_the_rows_scatter(two, tmp_path):
    margin = by_figure(result(tmp_path, *two))["margin"]
    assert margin["count"] == 40  # neither row 0 nor row 99
    assert list(margin["difference"].values()) == pytest.approx([0.5, 0.5, 0.5])
    assert margin["ours"]["high"] - margin["ours"]["low"] > 0.3


def test_the_interval_of_accuracy_covers_the_known_difference(two, tmp_path):
    accuracy = by_figure(result(tmp_path, *two))["accuracy"]
    assert (accuracy["ours"]["mean"], accuracy["baseline"]["mean"]) == (1.0, 0.5)  # rows 1 to 40: half of them odd
    said = accuracy["difference"]
    assert said["mean"] == 0.5 and 0.3 < said["low"] < 0.5 < said["high"] < 0.7


def test_a_row_that_has_no_figure_is_not_counted(two, tmp_path):
    held_out(two[1], {1: 9.0, 2: None, 3: 9.0}, {1: 1.0, 2: 0.0, 3: 0.5})
    said = by_figure(result(tmp_path, *two))
    assert (said["margin"]["count"], said["accuracy"]["count"]) == (2, 3)
    assert said["accuracy"]["ours"]["mean"] == 0.5 and said["accuracy"]["baseline"]["mean"] == pytest.approx(2 / 3)


def test_answers_are_paired_by_prompt(two, tmp_path):
    answers(two[0], {"p": [0.0, 1.0], "q": [2.0, 2.0], "mine": [50.0]})
    answers(two[1], {"q": [3.0], "p": [1.0], "yours": [-50.0]}, kl=None)
    said = by_figure(result(tmp_path, *two))
    score = said["score"]
    assert score["count"] == 2 and score["difference"]["mean"] == 0.75  # (1 - 0.5 + 3 - 2) / 2
    assert said["tokens"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert "KL, nats" not in said


def test_a_prompt_of_messages_and_one_that_stands_twice_have_their_partners(two, tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    for folder, scores in zip(two, ((0.0, 5.0), (1.0, 7.0)), strict=True):
        rows = [{"prompt": chat, "answers": ["x"], "scores": [s], "kl": None, "tokens": [1]} for s in scores]
        lines(Folder(folder) / "answers.jsonl", rows)
    score = by_figure(result(tmp_path, *two))["score"]
    assert score["count"] == 2 and score["difference"]["mean"] == 1.5


def test_the_baseline_can_be_named(two, tmp_path):
    said = result(tmp_path, *two, baseline="b")
    assert said["baseline"] == "b" and by_figure(said)["margin"]["run"] == "a"
    assert by_figure(said)["margin"]["difference"]["mean"] == pytest.approx(-0.5)


UNSET = {"length_alpha": None, "sync_every": None, "sync_mix": None}
MOVING = {"changes": UNSET | {"sync_every": 8}}
# What one run and another have set, and whether their margins are in one unit.
UNITS: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({}, {"beta": 0.1}, True),  # dpo's own
    ({}, {"beta": 0.2}, False),
    ({}, {"name": "ipo"}, False),
    ({}, {"name": "dpo+nll"}, True),
    ({}, {"name": "nll+dpo"}, False),
    ({}, {"name": "rpo", "weights": [1.0, 0.2]}, True),
    ({"beta": 0.1}, {"name": "mpo"}, True),
    ({"beta": 0.2}, {"name": "mpo"}, False),
    ({"name": "dpo_norm+nll"}, {"name": "dpo_norm", "beta": 5.0}, True),
    ({}, {"divergence": "js"}, True),
    ({"divergence": "alpha"}, {"divergence": "alpha", "divergence_alpha": 0.2}, True),
    ({"name": "cpo"}, {"name": "cpo", "alpha": 0.0}, True),
    ({}, {"changes": UNSET}, True),
    ({}, {"changes": UNSET | {"length_alpha": 1.0}}, True),
    ({}, {"changes": UNSET | {"length_alpha": 0.5}}, False),
    ({}, {"changes": UNSET | {"weighting": "wpo"}}, True),
    ({}, MOVING, False),
    (MOVING, {"changes": UNSET | {"sync_every": 8, "sync_mix": 0.6}}, True),
    (MOVING, {"changes": UNSET | {"sync_every": 8, "sync_mix": 0.5}}, False),
    (MOVING, {"changes": UNSET | {"sync_every": 9}}, False),
]


@pytest.mark.parametrize(("one", "other", "compared"), UNITS)
def test_margins_of_other_units_are_left_out_and_that_is_said(tmp_path, one, other, compared):
    for name, settings in (("a", one), ("c", other)):
        held_out(a_run(tmp_path / name, **settings), {1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0})
    said = result(tmp_path, str(tmp_path / "a"), str(tmp_path / "c"))
    assert ("margin" in by_figure(said)) is compared and "accuracy" in by_figure(said)
    assert any("margins are not compared: c." in note for note in said["notes"]) is not compared


def test_a_run_without_held_out_rows_is_told_what_is_missing(two, tmp_path, capsys):
    c = a_run(tmp_path / "c")
    said = result(tmp_path, *two, c)
    (note,) = said["notes"]
    assert note.startswith("No held_out.jsonl") and ": c." in note and "train them again" in note
    assert {each["run"] for each in said["differences"]} == {"b"}
    assert note[:40] in capsys.readouterr().out


def test_rows_of_sft_have_no_margin_and_no_accuracy_to_pair(two, tmp_path):
    c = a_run(tmp_path / "c", name="nll")
    lines(Folder(c) / "held_out.jsonl", [{"row": f"a.jsonl:{i}", "index": i, "loss": 0.5} for i in range(41)])
    said = result(tmp_path, *two, c)
    assert {each["run"] for each in said["differences"]} == {"b"}
    assert said["notes"] == ["c and a have no ranked held-out row in common, so no accuracy is paired."]


def test_what_differs_and_the_last_figures_are_shown(two, tmp_path):
    said = result(tmp_path, *two)
    assert said["differs"] == {"seed": {"a": "0", "b": "1"}}
    figures = said["runs"][0]["figures"]
    assert figures["step"] == 10 and figures["held-out loss"] == 0.625 and figures["margin"] == 0.25
    assert figures["accuracy"] == {"mean": 0.5, "low": 0.25, "high": 0.75}
    page = (tmp_path / "out" / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "0.500 (0.250 to 0.750)" in page and "Above a" in page and re.search(r"\+0.500 \(0.500 to 0.500\)", page)


def test_many_runs_stand_in_rows(tmp_path):
    runs = [compare.read(compare.epath.Path(a_run(tmp_path / str(i), seed=i)), str(i)) for i in range(7)]
    few, many = compare.settings(runs[:3]), compare.settings(runs)
    assert few and list(few.columns) == ["field", "0", "1", "2"] and list(few.rows) == [("seed", "0", "1", "2")]
    assert many and list(many.columns) == ["run", "seed"] and many.rows[6] == ("6", "6")
    assert compare.settings([runs[0], runs[0]]) is None


def test_a_sweep_stands_for_its_members(tmp_path):
    members = [f"loss.beta={beta}" for beta in (0.1, 0.2)]
    for name in members:
        held_out(a_run(tmp_path / "sweep" / "members" / name, beta=float(name[-3:])), {1: 1.0}, {1: 1.0})
    lines(tmp_path / "sweep" / "table.jsonl", [{"member": m, "workdir": f"members/{m}"} for m in members])
    said = result(tmp_path, str(tmp_path / "sweep"))
    assert [run["run"] for run in said["runs"]] == members
    assert said["differs"] == {"loss.beta": {members[0]: "0.1", members[1]: "0.2"}}


def test_runs_of_one_name_are_told_apart(tmp_path):
    found = [compare.epath.Path(p) for p in ("x/one/dpo", "x/two/dpo", "x/ipo")]
    assert compare.named(found) == ["one/dpo", "two/dpo", "ipo"]


def test_bad_input_is_one_sentence(two, tmp_path):
    a, b = two
    assert refused() == "there are no runs to compare; give at least two workdirs."
    assert refused(a) == "there is one run to compare; give at least two workdirs."
    assert "there is no folder" in refused(a, str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert "holds no run" in refused(a, str(tmp_path / "empty"))
    assert "is given twice" in refused(a, a + "/")
    assert refused(a, b, baseline="aa") == "--baseline=aa is none of the runs; the nearest is a."
    held_out(b, {99: 1.0}, {99: 1.0})
    assert "b and a have no held-out row and no prompt in common" in refused(a, b)
    (Folder(b) / "held_out.jsonl").write_text('{"margin": 1}\n')
    assert "held_out.jsonl:1 is not understood" in refused(a, b)
    assert "--seed=-1 is not allowed" in refused(a, b, seed=-1)


def test_a_line_that_a_kill_cut_short_and_a_figure_that_is_not_finite_are_left_out(two, tmp_path):
    with (Folder(two[1]) / "eval.jsonl").open("a") as file:
        file.write('{"step": 20, "eval/loss": NaN}\n{"step": 3')
    said = result(tmp_path, *two)
    assert said["runs"][1]["figures"]["step"] == 20 and said["runs"][1]["figures"]["held-out loss"] is None


def test_the_words_of_the_command_line_are_the_runs(two, capsys):
    flags.run(compare.main, compare.Comparison, ["compare", *two, "--seed=3"])
    shown = capsys.readouterr().out
    assert "What differs" in shown and "Last figures" in shown and "Above a" in shown
    with pytest.raises(SystemExit):
        flags.run(compare.main, compare.Comparison, ["compare", two[0]])
    assert capsys.readouterr().err == "error: there is one run to compare; give at least two workdirs.\n"
