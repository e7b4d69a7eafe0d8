"""The lab: intervals and fits, seeds that resume, claims held to intervals, pages that follow from their figures."""

import dataclasses
import json
import math
import pathlib
from typing import Annotated

import numpy as np
import pytest
from etils import epath

from experiments import lab
from rlhf_jax import flags
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.lab import estimates, findings, page, running
from rlhf_jax.lab.studies import STUDIES
from rlhf_jax.lab.study import Claim, Measured, Remedy, Seen, Study
from rlhf_jax.report.blocks import Lines

PAGES = pathlib.Path(__file__).resolve().parents[1] / "docs" / "results" / "lab"


@dataclasses.dataclass(frozen=True)
class Knobs:
    size: Annotated[float, "of the effect"] = 1.0
    levels: Annotated[tuple[int, ...], "that are tried"] = (1, 2)


def measured(ground, knobs: Knobs) -> Measured:
    bad = knobs.size + 0.1 * ground.seed
    figures = {"plain": {"gold": 1.0}, "hacked": {"gold": 1.0 - bad, "words": 9.0}, "mended": {"gold": 1.0}}
    return Measured(figures, {"gold": {"x": [0.0, 1.0], "y": [1.0, 1.0 - bad]}})


def study(**changes) -> Study:
    made = Study(
        name="made_up", title="Made up", question="Does it fail?", setup=["A failure that is made up."],
        knobs=Knobs(), measure=measured, measures={"gold": "what it is worth", "words": "how long it is"},
        conditions={"plain": "before", "hacked": "after", "mended": "mended"},
        phenomena=[Claim("It fails", "gold", "hacked", "plain", -1), Claim("It is long", "words", "hacked", None, 0)],
        remedies=[
            Remedy("mended", "hacked", "gold", 1, "it is taken back"),
            Remedy("plain", "mended", "gold", 1, "nothing is done", ("gold",)),
        ],
        pictures=lambda seeds: {
            "gold": Lines(
                "Gold", "d", "gold", {f"seed {s.seed}": (s.curves["gold"]["x"], s.curves["gold"]["y"]) for s in seeds}
            )
        },
        notes=["It is made up."], references=["Nobody 2026"],
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


class Nowhere:
    """In the place of a ground, whose start would have to be made."""

    def __init__(self, folder, seed, **more):
        folder.mkdir(parents=True, exist_ok=True)
        self.seed = seed


@pytest.fixture
def bare(monkeypatch):
    monkeypatch.setattr(running, "Ground", Nowhere)


# ---- estimates


@pytest.mark.parametrize(("law", "peak"), [("best_of", 2.0), ("policy", math.exp(2.0 / 0.5 - 1))])
def test_a_fit_finds_the_curve_that_made_the_points(law, peak):
    d = np.linspace(0, 5, 40)
    y = d * (2.0 - 0.5 * (d if law == "best_of" else np.log(np.maximum(d, 1e-12))))
    noise = np.random.default_rng(0).normal(size=40) * 0.1
    found = estimates.fit(law, d, y + noise)
    assert found.alpha == pytest.approx(2.0, abs=0.1) and found.beta == pytest.approx(0.5, abs=0.05)
    assert estimates.fit(law, d, y).peak == pytest.approx(peak, rel=1e-6)
    left = ((y + noise - found.gold(d)) ** 2).sum() / ((y + noise - (y + noise).mean()) ** 2).sum()
    assert found.r2 == pytest.approx(1 - left, abs=1e-9)


def test_a_curve_that_does_not_turn_has_its_peak_nowhere():
    d = np.linspace(0.1, 3, 10)
    assert estimates.fit("best_of", d, d + 0.1 * d**2).peak == math.inf
    assert estimates.fit("policy", d, -d).peak == 0.0
    with pytest.raises(ValueError, match="2 points"):
        estimates.fit("best_of", [1, 2], [1, 2])


def test_seeds_without_a_figure_are_left_out():
    found = estimates.over_seeds([1.0, None, 3.0, math.nan])
    assert found is not None and found.mean == 2.0
    half = 12.706204736432095 * math.sqrt(2) / math.sqrt(2)  # t(0.975, 1) s / sqrt(n), s = sqrt(2)
    assert found.high - found.mean == pytest.approx(half)
    assert estimates.over_seeds([None]) is None


# ---- findings


def seen(**by_seed: tuple[float, float]) -> list[Seen]:
    return [
        Seen(i, 1.0, {"a": {"m": a}, "b": {"m": b}} if not math.isnan(b) else {"a": {"m": a}}, {})
        for i, (a, b) in enumerate(by_seed.values())
    ]


def test_a_claim_is_held_to_the_paired_difference():
    """Seeds differ by far more than the conditions do, always in the same direction."""
    seeds = seen(x=(10.0, 9.0), y=(1.0, 0.1), z=(5.0, 3.9), lost=(5.0, math.nan))
    told = findings.differences(seeds, "m", "a", "b")
    assert told == pytest.approx([1.0, 0.9, 1.1])
    claim = lambda sign: study(phenomena=[Claim("", "m", "a", "b", sign)])
    verdicts = [findings.found(claim(sign), seeds)[0].verdict for sign in (1, -1, 0)]
    assert verdicts == ["shown", "the opposite", "more"]
    assert findings.value(seeds, "a", "m") != findings.value(seeds[:3], "a", "m")  # the fourth seed counts there


def test_one_seed_shows_nothing():
    assert findings.found(study(phenomena=[Claim("", "m", "a", "b")]), seen(x=(9.0, 1.0)))[0].verdict == "not shown"


def test_an_interval_that_touches_zero_shows_nothing():
    assert findings.verdict(Estimate(0.1, 0.0, 0.2), 1) == "not shown"
    assert findings.verdict(Estimate(0.0, 0.0, 0.0), 0) == "not told apart"


# ---- seeds


def test_a_finished_seed_is_not_run_again(bare, tmp_path):
    calls = []
    made = study(measure=lambda ground, knobs: calls.append(ground.seed) or measured(ground, knobs))
    first = running.run_seeds(made, epath.Path(tmp_path), range(2), "cache")
    again = running.run_seeds(made, epath.Path(tmp_path), range(3), "cache")
    assert calls == [0, 1, 2] and [*again[:2]] == first


def test_other_settings_need_another_folder(bare, tmp_path):
    running.run_seeds(study(), epath.Path(tmp_path), range(1), "cache")
    other = running.set_knobs(study(), "size=2; levels=1,2,3")
    assert other.knobs == Knobs(2.0, (1, 2, 3))
    with pytest.raises(UserError, match=r"other settings \(size was 1.0\)"):
        running.run_seeds(other, epath.Path(tmp_path), range(1), "cache")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sise=2", r"names 'sise', which made_up hasn't; it has size, levels \(size\?\)"),
        ("size=2;size=3", "names size twice"),
        ("size=much", "gives size the value 'much', but it takes a number"),
        ("size", "gives size the value '', but it takes a number"),
    ],
)
def test_settings_that_there_are_not_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        running.set_knobs(study(), text)


def test_a_figure_that_is_not_declared_is_refused(bare, tmp_path):
    for figures in ({"plain": {"silver": 1.0}}, {"plane": {"gold": 1.0}}):
        with pytest.raises(ValueError, match="doesn't declare"):
            running.run_seeds(
                study(measure=lambda *_, f=figures: Measured(f)), epath.Path(tmp_path / str(figures)), [0], "cache"
            )


def test_what_is_not_finite_is_missing(bare, tmp_path):
    made = study(measure=lambda *_: Measured({"plain": {"gold": math.nan, "words": 1 / 3}}))
    (one,) = running.run_seeds(made, epath.Path(tmp_path), [0], "cache")
    assert one.figures == {"plain": {"words": 0.333333}}


# ---- pages


def test_a_page_says_what_held_and_what_did_not(bare, tmp_path):
    seeds = running.run_seeds(study(), epath.Path(tmp_path / "runs"), range(3), "cache")
    results = page.Results("the command", "a machine", {"size": 1.0, "levels": [1, 2]}, seeds)
    text = page.write(study(), results, epath.Path(tmp_path)).read_text()
    assert "| It fails | gold, hacked less plain | −1.10 (−1.35 to −0.852) | shown |" in text
    assert "| It is long | words, hacked | 9.00 (9.00 to 9.00) | more |" in text
    assert "| `mended`: it is taken back | gold, against `hacked` | 1.10 (0.852 to 1.35) | helps |  |" in text
    assert "What did not help here: `plain` for gold (no help was shown)." in text
    assert "| hacked | gold | 0, −0.100, −0.200 |" in text and "![Gold](made_up-gold.png)" in text
    assert "| levels | 1,2 | that are tried |" in text
    assert (tmp_path / "made_up-gold.png").read_bytes()[:4] == b"\x89PNG"
    assert "Made up" in (tmp_path / "made_up.html").read_text()
    assert page.Results.from_json((tmp_path / "made_up.json").read_text()) == results


@pytest.mark.parametrize("name", STUDIES)
def test_a_committed_page_is_what_its_figures_say(name, tmp_path):
    file = PAGES / f"{name}.json"
    results = page.Results.from_json(file.read_text())
    page.write(STUDIES[name], results, epath.Path(tmp_path))
    assert (tmp_path / f"{name}.md").read_text() == (PAGES / f"{name}.md").read_text()
    there = {file.name for file in PAGES.glob(f"{name}-*.png")}
    assert there == {file.name for file in tmp_path.glob(f"{name}-*.png")}
    assert len(results.seeds) >= 5, "a committed page has five seeds"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_declares_what_it_claims(name):
    one = STUDIES[name]
    said = [
        *((c.measure, c.condition, c.than) for c in one.phenomena),
        *((r.measure, r.condition, r.than) for r in one.remedies),
    ]
    for measure, *conditions in said:
        assert measure in one.measures and all(c in one.conditions for c in conditions if c is not None)
    assert all(price in one.measures for remedy in one.remedies for price in remedy.prices)
    assert one.name == name and one.phenomena and one.references is not None
    running.set_knobs(one, "")


# ---- the program


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--name=nois"], "there is no study 'nois'; the nearest is noise"),
        (["--name=noise", "--seeds=0"], "--seeds=0 is not allowed"),
        (["--name=noise", "--out="], "--out is empty"),
        (["--name=noise", "--knobs=nose=1"], "names 'nose'"),
    ],
)
def test_the_program_refuses_before_anything_is_made(words, said, capsys):
    with pytest.raises(SystemExit):
        flags.run(lab.main, lab.Lab, ["lab", *words])
    assert said in capsys.readouterr().err


def test_the_program_runs_a_study_and_tells(bare, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(STUDIES, "made_up", study())
    monkeypatch.setattr(lab.run, "use_compile_cache", lambda: None)
    words = ["--name=made_up", "--seeds=3", f"--out={tmp_path}/runs", f"--pages={tmp_path}/pages", "--knobs=size=2"]
    flags.run(lab.main, lab.Lab, ["lab", *words])
    said = capsys.readouterr().out
    assert "shown: It fails (−2.10" in said and "mended helps: gold 2.10" in said
    told = json.loads((tmp_path / "pages/made_up.json").read_text())
    assert told["command"] == "python -m experiments.lab --name=made_up --seeds=3 --knobs='size=2'"
    assert told["knobs"] == {"size": 2.0, "levels": [1, 2]} and "JAX" in told["made"]
    assert (tmp_path / "runs/made_up/seed=2/found.json").exists()
