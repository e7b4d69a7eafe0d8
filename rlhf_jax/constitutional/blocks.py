"""What the report shows: whether harm fell from round to round, and what became of helpfulness."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from rlhf_jax import fields, report
from rlhf_jax.constitutional.config import STAGES, Constitutional
from rlhf_jax.constitutional.measure import HELPFUL, ONLY, Measured, View
from rlhf_jax.constitutional.stages import LABELS
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.feedback.judges import written
from rlhf_jax.workdir import evaluations

BANDS = "Intervals are 95% bootstrap ones that resample prompts."
SHOWN = 10  # prompts, and pairs, that are shown


# In words


def verdict(found: Measured) -> list[str]:
    """Whether answers became more harmless, and whether they stayed as helpful."""
    good, use = found.harmless, found.helpful
    said = []
    if found.rounds:
        way = ", ".join(f"{_short(good.score[name])} after {name}" for name in found.rounds)
        said.append(
            f"Harmlessness ({good.scorer}) of the helpful model's answers to {len(good.prompts)} held-out prompts: "
            f"{plain(good.score[HELPFUL])} at first, {way}. {_rounds(found)}"
        )
    given = {*found.given}
    own = not given & {"revised", "final"}
    said.append(_against(found, HELPFUL, f"the helpful model{' that it came from' if own else ''}"))
    if ONLY in good.score:
        what = f"the model that is made in the same way from the same {found.human:,} pairs of people, without a "
        what += "constitution"
        if given & {"revised", "reward", "final"}:
            what = f"the model that is made from the helpful one and {found.human:,} pairs of people alone"
        if "helpful_only" in given:
            what = "the model of --config.inputs.helpful_only"
        said.append(_against(found, ONLY, what))
    compared = f"{use.scorer} and {good.scorer} are what the models are compared by"
    if found.labels and "labels" in given:
        said.append(f"{found.labels:,} labels were given, and who made them is not known here. {compared}.")
    elif found.labels:
        agrees = (
            "" if found.agrees is None else f"; of those it tells apart, {good.scorer} shares {_share(found.agrees)}"
        )
        said.append(
            f"No person labelled harm: a model labelled {found.labels:,} pairs{agrees}. {compared}"
            f"{'' if given else ', and nothing was trained on them'}."
        )
    return said


def _rounds(found: Measured) -> str:
    """Round by round: which ones added to harmlessness."""
    above = found.harmless.above
    names = [HELPFUL, *found.rounds]
    steps = {later: above[later, earlier] for earlier, later in zip(names[:-1], names[1:], strict=True)}
    rose = [name for name, told in steps.items() if told.low > 0]
    if len(rose) == len(steps):
        return "It rises clearly with each round."
    still = ", ".join(f"{name} by {plain(told)}" for name, told in steps.items() if name not in rose)
    return f"It does not rise clearly with each round: {still}."


def _against(found: Measured, other: str, what: str) -> str:
    """The last model against another, on both sides."""
    harmless, helpful = (view.above[found.final, other] for view in (found.harmless, found.helpful))
    return (
        f"Against {what}, the last one ({found.final}) is {_words(harmless, 'more harmless', 'less harmless')} "
        f"({plain(harmless)}) and {_words(helpful, 'more helpful', 'less helpful')} ({plain(helpful)})."
    )


def _words(told: Estimate, more: str, less: str) -> str:
    return more if told.low > 0 else less if told.high < 0 else f"not clearly {more} or less so"


def plain(estimate: Estimate) -> str:
    """An estimate in a sentence."""
    mean, low, high = (f"{x:.2f}".replace("-", "\N{MINUS SIGN}") for x in estimate)
    return f"{mean}, {low} to {high}"


def _short(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f}".replace("-", "\N{MINUS SIGN}")


def _share(estimate: Estimate) -> str:
    return f"{estimate.mean:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def story(whole: Constitutional) -> report.Text:
    """What was done, stage by stage."""
    rows, inputs = whole.revisions, whole.inputs
    people = " and from people's of what is helpful" if whole.human is not None else ""
    labels = f"{'these labels' if inputs.labels is None else 'the labels given'}{people}"
    imitated = "the last revisions" if inputs.revisions is None else "the answers given"
    imitated += " and on demonstrations" if whole.demonstrations else ""
    does = {
        "helpful": "a helpful model by SFT on demonstrations",
        "revisions": f"its answers to prompts that provoke harm, criticised and revised in {rows.rounds} rounds by "
        f"principles of the constitution {whole.constitution} that are drawn",
        "revised": f"the pre-trained model fine-tuned on {imitated}",
        "labels": "two answers of the revised model to each prompt that provokes harm, compared under a principle that "
        "is drawn",
        "dpo": f"{whole.dpo.loss.name} from {labels}",
        "reward": f"a reward model from {labels}",
        "ppo": "PPO against it",
        "helpful_dpo": f"{whole.dpo.loss.name} of the helpful model from people's labels alone",
        "helpful_reward": "a reward model from people's labels alone",
        "helpful_ppo": "PPO of the helpful model against that one",
    }
    done = "; ".join(does[stage] for stage in whole.made)
    named = [f"{name}: {path}" for name, path in vars(whole.inputs).items() if path is not None]
    said = [f"Done here: {done or 'nothing but the comparison'}."]
    return report.Text("What was done", [*said, *([f"Taken as it was: {'; '.join(named)}."] if named else [])])


# Tables and pictures


def table(found: Measured) -> report.Table:
    """Every model on both sides."""
    columns = ["answers of", "harmlessness", f"above {HELPFUL}", "helpfulness", f"above {HELPFUL}"]
    rows = []
    for name in found.harmless.score:
        row = [name]
        for view in (found.harmless, found.helpful):
            row += [_cell(view.score[name]), "" if name == HELPFUL else _cell(view.above[name, HELPFUL])]
        rows.append(row)
    count = f"{len(found.harmless.prompts)} and {len(found.helpful.prompts)} held-out prompts"
    note = (
        f"Scores of {found.harmless.scorer} and {found.helpful.scorer}, on {count}. A round is the helpful model's own "
        f"answers after so many revisions. {BANDS}"
    )
    return report.Table("Harmlessness and helpfulness", columns, rows, note)


def _cell(told: Estimate) -> str:
    mean, low, high = (f"{x:.2f}" for x in told)
    return f"{mean} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"


def pictures(found: Measured) -> list[report.Block]:
    """Both sides against each other, and harmlessness from round to round."""
    good, use = found.harmless, found.helpful
    spots = {n: (use.score[n].mean, e.mean, e.low, e.high) for n, e in good.score.items()}
    made: list[report.Block] = [
        report.Points(
            "Harmlessness against helpfulness", f"helpfulness ({use.scorer})", f"harmlessness ({good.scorer})",
            spots, BANDS,
        )
    ]  # fmt: skip
    if found.rounds:
        names = [HELPFUL, *found.rounds]
        at = [float(number) for number in range(len(names))]
        told = [good.score[name] for name in names]
        bands = {"answers": ([e.low for e in told], [e.high for e in told])}
        series = {"answers": (at, [e.mean for e in told])}
        made.append(report.Lines("Harmlessness after each round", "round", good.scorer, series, BANDS, bands=bands))
    return made


def revisions(found: Measured) -> list[report.Block]:
    """Answers with what was said of them and what became of them, those first that became more harmless."""
    if not found.revised:
        return []
    good = found.harmless
    columns = ["first answer"]
    for name in found.rounds:
        columns += [f"critique, {name}", f"answer after {name}"]
    rows = []
    for place, one in enumerate(found.revised):
        scores = [float(good.scores[name][place][0]) for name in (HELPFUL, *found.rounds)]
        texts: list[tuple[str, float | None]] = [(one.answers[0], scores[0])]
        for number, name in enumerate(one.principles, start=1):
            texts += [(f"{name}: {one.critiques[number - 1]}", None), (one.answers[number], scores[number])]
        rows.append((scores[-1] - scores[0], written(good.prompts[place]), texts))
    rows.sort(key=lambda row: -row[0])
    kept = [*rows[: SHOWN - 3], *rows[-3:]] if len(rows) > SHOWN else rows
    note = f"The number is the score of {good.scorer}. First those that gained most, last three that gained least."
    shown = [(prompt, texts) for _, prompt, texts in kept]
    return [report.Samples("Critique and revision", columns, shown, note)]


def preferences(place: epath.Path, whole: Constitutional) -> list[report.Block]:
    """First labels of the model that compares."""
    if "labels" not in whole.made:
        return []
    rows = [json.loads(line) for line in (place / "labels" / LABELS).read_text().splitlines()]
    step = max(1, len(rows) // SHOWN)
    shown = [
        (_text(row["prompt"]), [(_text(row["chosen"]), row["probability"]), (_text(row["rejected"]), None),
                                (row["principle"], None)])
        for row in rows[::step][:SHOWN]
    ]  # fmt: skip
    note = "The number is the chance that the judge gives the chosen answer, the mean of both orders."
    return [report.Samples("A model's labels", ["chosen", "rejected", "principle"], shown, note)]


def _text(text: Any) -> str:
    return text if isinstance(text, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


def learning(place: epath.Path, whole: Constitutional) -> list[report.Block]:
    """What the stages that were done here evaluated on their held-out rows while they trained."""
    right = "eval/rewards/accuracies"
    wanted = (
        ("Held-out demonstrations", "nats a token", "eval/loss", "sft"),
        ("Held-out labels: pairs in their order", "share of pairs", right, "preference"),
        ("Held-out labels: pairs in the reward model's order", "share of pairs", right, "reward"),
        ("Held-out rollouts: score", "reward model's score", "eval/score", "ppo"),
    )
    made: list[report.Block] = []
    for title, label, metric, algorithm in wanted:
        series = {}
        for stage in (stage for stage in whole.made if STAGES[stage].algorithm == algorithm):
            rows = {row["step"]: row[metric] for row in evaluations(place / stage) if metric in row}
            if rows:
                series[stage] = [float(step) for step in sorted(rows)], [rows[step] for step in sorted(rows)]
        if series:
            made.append(report.Lines(title, "step", label, series))
    return made


def made_by(command: str, whole: Constitutional) -> report.Code:
    """The command, and every field that isn't as `Constitutional` has it."""
    changed = [line.partition(": ") for line in fields.diff(Constitutional(), whole)]
    lines = [f"{name}: {values.rpartition(' -> ')[2]}" for name, _, values in changed]
    return report.Code("How it was made", "\n".join([command, "", *lines]))


# Figures


def as_json(found: Measured) -> Mapping[str, Any]:
    """Every figure with its interval."""
    sides = {"harmless": found.harmless, "helpful": found.helpful}
    return {
        **{side: _side(view) for side, view in sides.items()},
        "final": found.final, "human": found.human, "labels": found.labels,
        "agrees": found.agrees and found.agrees._asdict(),
    }  # fmt: skip


def _side(view: View) -> dict[str, Any]:
    return {
        "scorer": view.scorer,
        "prompts": len(view.prompts),
        "score": {name: told._asdict() for name, told in view.score.items()},
        "above": [{"model": a, "other": b, **told._asdict()} for (a, b), told in view.above.items()],
    }
