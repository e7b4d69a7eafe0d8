"""What a chain's report shows: which of PPO, DPO and best-of-n is ahead, at what KL, and how they came to it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from rlhf_jax import fields, report
from rlhf_jax.chain.config import PEOPLE, WORLD, Chain
from rlhf_jax.chain.measure import BASE, PROXY, Measured
from rlhf_jax.evaluate.compare import Result
from rlhf_jax.evaluate.intervals import Estimate, paired
from rlhf_jax.report import rewards
from rlhf_jax.report.wording import number
from rlhf_jax.workdir import evaluations

SHOWN, TIMES = 8, 4  # prompts of PPO's rollouts, and evaluations of each
BANDS = "Bands are 95% bootstrap intervals that resample prompts."


# In words


def story(chain: Chain) -> report.Text:
    """What was done, stage by stage, and what the scores are."""
    labels, people = chain.labels, chain.labels.labeller
    err = f"who turn {people.noise:.0%} of their rankings round and to whom a word more is worth {people.length_bias}"
    noisy = f"{labels.by} with noise of the scale {labels.scale}"
    who = {WORLD: f"simulated people, {err}", PEOPLE: "people"}.get(labels.by, noisy)
    does = {
        "sft": "SFT on demonstrations",
        "labels": f"rankings of {labels.answers} answers of the SFT model to each prompt, by {who}",
        "reward": f"a reward model from rankings ({chain.reward.loss.name})",
        "ppo": f"PPO against the reward model, at {chain.ppo.ppo.kl} a nat of KL",
        "dpo": f"{chain.dpo.loss.name} on the rankings",
    }
    done = [does[stage] for stage in chain.made]
    named = [f"{name}: {path}" for name, path in vars(chain.inputs).items() if path is not None]
    said = [f"Done here: {'; '.join(done) or 'nothing but the comparison'}."]
    said += [f"Taken as it was: {'; '.join(named)}."] if named else []
    if chain.evaluate.scorer == "gold":
        said.append(
            "The gold reward is the known one of the world, from \N{MINUS SIGN}3 to 3: 2 for a right answer, 1 for "
            "politeness (\N{MINUS SIGN}1 for rudeness), less 0.1 for each word too many. Nothing was trained on it."
        )
    return report.Text("What was done", said)


def verdict(found: Measured) -> list[str]:
    """Which is ahead, by how much, and at what distance."""
    base, *others = found.results
    order = sorted(others, key=lambda r: -r.score.mean)
    first = order[0]
    ahead = f"By the {found.score} {first.name} is ahead: {_plain(first.score)}, where {BASE} has {_plain(base.score)}"
    if first.gain.low <= 0:
        ahead = f"By the {found.score} nothing is clearly above {BASE}, {_plain(base.score)}: the best, {first.name}, "
        ahead += f"has {_plain(first.score)}"
    versus = [_against(first, other) for other in order[1:]]
    far = ", ".join(f"{r.name} {number(r.kl.mean)}" for r in order if r.kl is not None)
    said = [f"{ahead}. {' '.join(versus)}".strip()]
    said.append(
        f"How far they went for it, in nats of KL from {BASE}: {far}. That of best-of-n is log n - (n - 1) / n, an "
        "upper bound where answers tie."
    )
    said += [line for name in found.trails if (line := _past_the_best(name, found))]
    if not found.known:
        said.append(
            "No reward is known here. The score is that of the model which PPO was trained on and which picks the best "
            "of n: it does not say which of them people would like better."
        )
    return said


def _against(first: Result, other: Result) -> str:
    told = _difference(first, other)
    if told.low > 0:
        return f"It is above {other.name} by {_plain(told)}."
    return f"Between it and {other.name} there is no clear difference: {_plain(told)}."


def _difference(one: Result, other: Result) -> Estimate:
    """Of the same prompts."""
    return paired({"": one.scores.mean(axis=1) - other.scores.mean(axis=1)})[""]


def _past_the_best(name: str, found: Measured) -> str:
    """Over-optimisation in a sentence: an earlier checkpoint that was better while the proxy went on; "" if none."""
    trail = found.trails[name]
    step, best, proxy = max(trail, key=lambda at: at[1].score.mean)
    last_step, last, last_proxy = trail[-1]
    lost = _difference(best, last)
    if not found.known or step == last_step or lost.low <= 0:
        return ""
    went = "rose" if last_proxy.mean > proxy.mean else "fell"
    return (
        f"{name} was best at step {step}; by step {last_step} its {found.score} had fallen by {_plain(lost)}, while "
        f"the {PROXY}'s score {went} from {number(proxy.mean)} to {number(last_proxy.mean)}."
    )


def _plain(estimate: Estimate) -> str:
    """An estimate in a sentence."""
    mean, low, high = (f"{x:.2f}".replace("-", "\N{MINUS SIGN}") for x in estimate)
    return f"{mean} ({low} to {high})"


# Tables and pictures


def finish(table: report.Table, found: Measured) -> report.Table:
    """The table of `evaluate` with what is particular to a chain: the best of n, and the reward model's score."""
    rows = [list(row) for row in table.rows]
    far = found.results[-1].kl
    rows[-1][4] = "" if far is None else f"{far.mean:.2f}"  # a formula, which has no interval
    note = f"{table.note} The best of n is the answer that the {PROXY} likes most, its KL log n - (n - 1) / n."
    if not found.known:
        return dataclasses.replace(table, rows=rows, note=note)
    rows = [[*row, rewards.said(found.proxy[str(row[0])])] for row in rows]
    note = f"{note} {PROXY.capitalize()}: its score of the same answers."
    return dataclasses.replace(table, columns=[*table.columns, PROXY], rows=rows, note=note)


Curve = list[tuple[float, Estimate, str]]  # KL, reward, which point


def frontier(found: Measured, proxy: bool) -> dict[str, Curve]:
    """Reward against the KL from SFT: trained models at their checkpoints, and the best of 1, 2, 4, ... answers."""
    base = found.results[0]
    start = (0.0, found.proxy[BASE] if proxy else base.score, BASE)
    curves: dict[str, Curve] = {}
    for name, trail in found.trails.items():
        # A model that was named is of no step.
        points = [
            (r.kl.mean, p if proxy else r.score, f"step {step}" if step else name)
            for step, r, p in trail
            if r.kl is not None
        ]
        curves[name] = [start, *points]
    picked = [(p.kl, p.proxy if proxy or p.gold is None else p.gold, f"n {p.n}") for p in found.best]
    return curves | {"best of n": picked}


def frontiers(found: Measured) -> list[report.Block]:
    """A picture of the known reward, if there is one, and one of the reward model's score."""
    label = f"KL from {BASE}, nats an answer"
    made: list[report.Block] = []
    for title, proxy in ((found.score, False), (f"{PROXY}'s score", True)):
        if proxy and not found.known:  # it is the same
            break
        curves = frontier(found, proxy)
        series = {name: ([x for x, *_ in c], [e.mean for _, e, _ in c]) for name, c in curves.items()}
        bands = {name: ([e.low for _, e, _ in c], [e.high for _, e, _ in c]) for name, c in curves.items()}
        note = f"Trained models at the checkpoints that were kept, in their order. {BANDS}"
        made.append(report.Lines(f"{title.capitalize()} against KL", label, title, series, note, bands=bands))
    return made


def points(found: Measured) -> dict[str, Any]:
    """The same as JSON has it."""
    scores, proxies = frontier(found, False), frontier(found, True)
    return {
        name: [
            {"at": at, "kl": kl, "score": s._asdict(), "proxy": p._asdict()}
            for (kl, s, at), (_, p, _) in zip(curve, proxies[name], strict=True)
        ]
        for name, curve in scores.items()
    }


def learning(place: epath.Path, chain: Chain) -> list[report.Block]:
    """What the stages that were done here evaluated on their held-out rows while they trained."""
    right = "eval/rewards/accuracies"
    wanted = (
        ("Held-out demonstrations", "nats a token", "eval/loss", ("sft",)),
        ("Held-out rankings: pairs in people's order", "share of pairs", right, ("reward", "dpo")),
        ("PPO's held-out rollouts: score", f"{PROXY}'s score", "eval/score", ("ppo",)),
        (f"PPO's held-out rollouts: KL from {BASE}", "nats an answer", "eval/kl", ("ppo",)),
    )
    made: list[report.Block] = []
    for title, label, metric, names in wanted:
        series = {stage: _curve(place / stage, metric) for stage in names if stage in chain.made}
        if there := {stage: curve for stage, curve in series.items() if curve[0]}:
            made.append(report.Lines(title, "step", label, there))
    return made


def _curve(folder: epath.Path, metric: str) -> tuple[list[float], list[float]]:
    """Of an ensemble that of its first member."""
    members = sorted((folder / "members").iterdir()) if (folder / "members").exists() else [folder]
    # After a kill a step may have been evaluated once more.
    rows = {row["step"]: row[metric] for row in evaluations(members[0]) if metric in row}
    return [float(step) for step in sorted(rows)], [rows[step] for step in sorted(rows)]


def reward_model(found: Measured) -> list[report.Block]:
    """The reward model on held-out rankings."""
    if found.view is None:
        return []
    pictures = rewards.pictures([found.view], [])
    return [rewards.accuracy([found.view]), rewards.calibration([found.view]), *pictures]


def rollouts(place: epath.Path) -> list[report.Block]:
    """What PPO said to some held-out prompts while it trained, with what the completions earned."""
    file = place / "ppo" / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    said: dict[str, dict[int, tuple[str, float]]] = {}
    for row in rows:
        said.setdefault(str(row["prompt"]), {})[row["step"]] = row["completion"], row["score"]
    steps = sorted({row["step"] for row in rows})
    steps = [steps[i * (len(steps) - 1) // (TIMES - 1)] for i in range(TIMES)] if len(steps) > TIMES else steps
    whole = [(prompt, [at[step] for step in steps]) for prompt, at in said.items() if {*steps} <= {*at}][:SHOWN]
    if not whole:
        return []
    note = "Of held-out prompts, while PPO trained. The number is what the completion earned, without the price of KL."
    return [report.Samples("PPO's rollouts", [f"step {step}" for step in steps], whole, note)]


def made_by(command: str, chain: Chain) -> report.Code:
    """The command, and every field that isn't as `Chain` has it."""
    changed = [line.partition(": ") for line in fields.diff(Chain(), chain)]
    lines = [f"{name}: {values.rpartition(' -> ')[2]}" for name, _, values in changed]
    return report.Code("How it was made", "\n".join([command, "", *lines]))


def by_seed(results: Mapping[int, Mapping[str, Any]]) -> Sequence[report.Block]:
    """The tables of several seeds, and one picture of reward against KL with every seed in it."""
    made: list[report.Block] = []
    for seed, found in results.items():
        made.append(report.Text(f"Seed {seed}", found["verdict"]))
        table = found["table"]
        made.append(report.Table(f"seed {seed}: {table['title']}", table["columns"], table["rows"], table["note"]))
    curves = {}
    for name, spots in next(iter(results.values()))["frontier"].items():
        of = lambda at, name=name: [
            (p["kl"], p["score"]["mean"]) for r in results.values() for p in r["frontier"][name] if p["at"] == at
        ]
        curves[name] = [(spot["at"], of(spot["at"])) for spot in spots]
    note = "A curve goes through the means over seeds; every seed is a point."
    label = f"KL from {BASE}, nats an answer"
    return [*made, report.Frontier("Reward against KL, every seed", label, "reward", curves, note)]
