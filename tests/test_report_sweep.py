"""A sweep as a table and pictures: every number is the one that a hand finds."""

import json
import math
from typing import Any

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.report import Frontier, Lines, sweep

NAN = math.nan


def line(name: str = "dpo", beta: Any = 0.1, seed: int = 0, **given: Any) -> dict[str, Any]:
    """A member without answers; `score`, `gain`, `kl` and `tokens` are given as plain means, `margin` etc. too."""
    means = {figure: given.pop(figure, None) for figure in ("score", "gain", "kl", "tokens")}
    estimates = {k: None if v is None else {"mean": v, "low": v - 1, "high": v + 1} for k, v in means.items()}
    last = {"step": 60, "eval/loss": given.pop("loss", 0.5), "eval/rewards/margins": given.pop("margin", 1.0),
            "eval/rewards/accuracies": given.pop("accuracy", 0.75)}  # fmt: skip
    first = {"step": 0, "eval/loss": 0.69, "eval/rewards/margins": 0.0, "eval/rewards/accuracies": 0.5}
    member = f"loss.name={name},loss.beta={beta},seed={seed}"
    values = {"loss.name": name, "loss.beta": beta, "seed": seed}
    return {
        "member": member, "sweep": values, "seed": seed, "loss": {"name": name, "beta": 0.1 if beta is None else beta},
        "steps": 60, "eval": last, "first_eval": first, "workdir": f"members/{member}", **estimates, **given,
    }  # fmt: skip


def cells(lines: list[dict[str, Any]]) -> list[list[str]]:
    """The table's rows, its head first, without the line below it."""
    rows = [row for row in sweep.markdown(lines).splitlines() if row.startswith("|")]
    return [[cell.strip() for cell in row[1:-1].split(" | ")] for row in rows if "---" not in row]


def grid(**given: Any) -> list[dict[str, Any]]:
    return [
        line(name, beta, seed, score=i + seed, gain=i + 0.5 * seed, kl=1 / beta + seed, tokens=10 + seed, **given)
        for i, name in enumerate(("ipo", "dpo"))
        for beta in (0.5, 0.1)
        for seed in (0, 1)
    ]


def block(lines: list[dict[str, Any]], folder: Any, monkeypatch: Any) -> dict[str, Any]:
    """The blocks that `figures` draws, by file name."""
    drawn = {}
    monkeypatch.setattr(sweep.pictures, "save", lambda block, path: drawn.__setitem__(path.name, block) or path)
    sweep.figures(lines, folder)
    return drawn


def test_the_table_has_the_means_the_deviations_and_every_seed():
    seeds = [line(seed=s, score=x, loss=0.5) for s, x in enumerate((1.0, 2.0, 4.0))]
    head, row = cells(seeds)
    assert head == ["loss.name", "loss.beta", "score", "held-out margin", "held-out accuracy", "held-out loss"]
    # mean 7/3; squares (4/3)^2, (1/3)^2, (5/3)^2 over n - 1 = 2 give 1.5275
    assert row[:3] == ["dpo", "0.1", "2.33 ± 1.5 (1.00, 2.00, 4.00)"]
    assert row[5] == "0.500 ± 0 (0.500, 0.500, 0.500)"


def test_one_seed_has_no_deviation_and_needs_no_bracket():
    assert cells([line(score=1.5)])[1][2] == "1.50"
    assert "One seed, 0" in sweep.markdown([line()])


def test_the_order_is_that_of_the_sweep_and_seeds_stand_in_one_order():
    rows = cells([line("kto", seed=1, score=2.0), line("dpo", seed=1, score=8.0), line("kto", seed=0, score=1.0)])
    assert [row[0] for row in rows[1:]] == ["kto", "dpo"]
    assert rows[1][2].endswith("(1.00, 2.00)") and rows[2][2] == "8.00 (none, 8.00)"


def test_a_number_that_is_not_finite_is_shown_and_counts_towards_nothing():
    seeds = [line(seed=0, score=1.0), line(seed=1, score=NAN), line(seed=2, score=3.0)]
    assert cells(seeds)[1][2] == "2.00 ± 1.4 (1.00, nan, 3.00)"
    assert "not finite counts towards neither" in sweep.markdown(seeds)
    assert cells([line(score=NAN)])[1][2] == "nan"


def test_members_that_ended_apart_say_so_and_those_alike_do_not():
    assert cells([line(seed=0), line(seed=1, steps=20)])[1][2] == "60, 20"
    assert "steps" not in cells([line(seed=0), line(seed=1)])[0]


def test_the_note_says_what_the_numbers_are():
    note = sweep.markdown(grid()).splitlines()[-1]
    for said in ("0, 1, in this order", "standard deviation (n - 1)", "KL, nats:", "different names", "beta"):
        assert said in note
    assert "KL" not in sweep.markdown([line()]) and "different names" not in sweep.markdown([line()])


def test_what_a_table_would_obey_is_text():
    assert "a\\|b &lt;i>" in sweep.markdown([line("a|b\n<i>")])


def test_no_member_is_said():
    with pytest.raises(UserError, match="no finished member"):
        sweep.markdown([])


def test_the_frontier_is_a_curve_a_method_in_the_order_of_beta(tmp_path, monkeypatch):
    best = [
        {"n": n, "seed": s, "score": {"mean": n + s}, "kl": n / 2, "name": "best of n"} for n in (4, 2) for s in (0, 1)
    ]
    (tmp_path / "best_of.jsonl").write_text("".join(json.dumps(row) + "\n" for row in best) + '{"n": 8')
    frontier = block(grid(), tmp_path, monkeypatch)["frontier.png"]
    assert isinstance(frontier, Frontier) and list(frontier.curves) == ["ipo", "dpo", "best of n", "start"]
    assert frontier.curves["ipo"] == [("beta 0.1", [(10, 0), (11, 1)]), ("beta 0.5", [(2, 0), (3, 1)])]
    assert frontier.curves["best of n"] == [("n 2", [(1, 2), (1, 3)]), ("n 4", [(2, 4), (2, 5)])]
    assert frontier.curves["start"] == [("", [(0, 0), (0, 0.5)])]  # a seed each: score - gain
    assert "a curve a method" in frontier.title and "seeds 0, 1" in frontier.note


def test_without_scores_or_kls_there_is_no_frontier(tmp_path, monkeypatch):
    assert set(block([line()], tmp_path, monkeypatch)) == {"margins.png", "accuracies.png"}
    assert "frontier.png" not in block([line(score=1.0, kl=NAN)], tmp_path, monkeypatch)


def test_a_value_left_at_none_stands_where_the_loss_puts_it(tmp_path, monkeypatch):
    lines = [line(beta=beta, score=1.0, kl=2.0) for beta in (0.5, None, 0.01)]
    frontier = block(lines, tmp_path, monkeypatch)["frontier.png"]
    assert [label for label, _ in frontier.curves["dpo"]] == ["beta 0.01", "beta 0.1", "beta 0.5"]


def test_evaluations_are_averaged_at_the_steps_that_all_seeds_have(tmp_path, monkeypatch):
    lines = [line(seed=seed) for seed in (0, 1)]
    for member, rows in zip(lines, (((0, 0.0), (10, 1.0), (20, 5.0)), ((0, 0.5), (10, 2.0))), strict=True):
        folder = tmp_path / member["workdir"]
        folder.mkdir(parents=True)
        written = [json.dumps({"step": step, "eval/rewards/margins": margin}) for step, margin in rows]
        (folder / "eval.jsonl").write_text("\n".join([*written, '{"step": 3']))
    margins = block(lines, tmp_path, monkeypatch)["margins.png"]
    assert isinstance(margins, Lines) and margins.series == {"dpo": ([0, 10], [0.25, 1.5])}
    assert "a line a setting" in margins.title


def test_a_member_without_files_is_drawn_by_its_first_and_last_evaluation(tmp_path, monkeypatch):
    accuracies = block(grid(accuracy=1.0), tmp_path, monkeypatch)["accuracies.png"]
    names = ["ipo, beta 0.5", "ipo, beta 0.1", "dpo, beta 0.5", "dpo, beta 0.1"]
    assert accuracies.series == dict.fromkeys(names, ([0, 60], [0.5, 1.0]))


def test_too_many_settings_are_drawn_together_and_the_title_says_so(tmp_path, monkeypatch):
    betas = [0.1 * i for i in range(1, 8)]
    lines = [line(name, beta, margin=beta, score=1.0, kl=beta) for name in ("dpo", "ipo") for beta in betas]
    drawn = block(lines, tmp_path, monkeypatch)
    assert drawn["margins.png"].series == {name: ([0, 60], [0.0, pytest.approx(0.4)]) for name in ("dpo", "ipo")}
    assert "mean over its values of loss.beta" in drawn["margins.png"].title
    for one, rate in zip(lines, range(14), strict=True):
        one["sweep"]["optimizer.learning_rate"] = str(rate)  # a method of its own each
    drawn = block(lines, tmp_path, monkeypatch)
    assert "a curve a loss" in drawn["frontier.png"].title and list(drawn["frontier.png"].curves) == [
        "dpo",
        "ipo",
    ]
    assert "a line a loss" in drawn["margins.png"].title


def test_length_is_against_what_varies_or_by_setting(tmp_path, monkeypatch):
    length = block(grid(), tmp_path, monkeypatch)["length.png"]
    assert length.x_label == "loss.beta" and not length.log_x
    assert length.curves["dpo"] == [("", [(0.1, 10), (0.1, 11)]), ("", [(0.5, 10), (0.5, 11)])]
    named = block([line(name, tokens=5.0) for name in ("dpo", "ipo")], tmp_path, monkeypatch)["length.png"]
    assert named.x_names == ["dpo", "ipo"] and named.curves == {"dpo": [("", [(0, 5)])], "ipo": [("", [(1, 5)])]}


def test_everything_is_written_and_named(tmp_path):
    files = sweep.write(grid(), tmp_path / "new")
    names = ["table.md", "frontier.png", "margins.png", "accuracies.png", "length.png"]
    assert [file.name for file in files] == names
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == sorted(names)
    assert files[0].read_text() == sweep.markdown(grid())
    bare = {"member": "m", "sweep": {}, "seed": 3, "eval": {}, "first_eval": {}, "score": None}
    assert [file.name for file in sweep.write([bare], tmp_path / "bare")] == ["table.md"]
