"""Compares models on the same prompts: python -m experiments.evaluate --models=runs/sft,runs/dpo --prompts=FILE.

Any checkpoints, any scorer: a Python function `my_pkg.scores:polite(prompts, completions, **columns)` that gives
a number for each answer; or a reward model, --reward=runs/rm. The first model is the baseline, unless another is named.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, cast

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath
from rich.console import Console
from rich.table import Table

from rlhf_jax import flags, registry, report, run
from rlhf_jax.data import prompts as asked
from rlhf_jax.data.rows import Text
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.compare import Result, compare
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.rewards import COMBINED, LAM, How, Rewards
from rlhf_jax.evaluate.scorers import SCORERS, Scorer, plain
from rlhf_jax.sampling.distribution import Sampling, check
from rlhf_jax.workdir import check_writable, open_policy, open_rewards

COLUMNS = ("model", "score", "above {}", "wins against {}", "KL to {}, nats", "tokens", "ended")
LEGEND = (
    "Means over the prompts, with 95% bootstrap intervals that resample the prompts, for all models alike. A tie is "
    "half a win. KL: log-probability of a model's own answers less the baseline's, summed over their tokens. Ended: "
    "share of answers that ended by themselves and not at the length."
)


@dataclasses.dataclass(frozen=True)
class Compare(Sampling):
    """Scores the answers of models to the same prompts and writes report.html, results.json and answers.jsonl."""

    models: Annotated[tuple[str, ...], "folders of runs (RUN, RUN@STEP, RUN@best), model folders or Hub names"] = ()
    names: Annotated[tuple[str, ...], "what the models are called; empty: the last part of their path"] = ()
    baseline: Annotated[str | None, "name of the model that the others are held against; none: the first"] = None
    prompts: Annotated[str, "file of prompts: rows with prompt or messages, or any other file's lines"] = ""
    rows: Annotated[int | None, "most prompts used; none: all"] = None
    scorer: Annotated[str | None, f"{', '.join(SCORERS)} (the default), or my_pkg.module:function"] = None
    reward: Annotated[
        tuple[str, ...],
        "a reward model that scores in the place of a scorer: its run or folder; of an ensemble also how members are "
        "combined (mean, minimum, mean_less_variance) and the variance's weight: PATH,HOW,LAM",
    ] = ()
    samples: Annotated[int, "answers of each model to each prompt"] = 4
    chat_template: Annotated[str | None, "Jinja file used in the place of the tokenizers' chat templates"] = None
    seed: Annotated[int, "of the answers and of the resampling"] = 0
    out: Annotated[str, "folder to write"] = "runs/evaluation"


def shown(estimate: Estimate | None, share: bool = False) -> str:
    """An estimate as text, its interval in brackets."""
    if estimate is None:
        return "none"
    number = "{:z.0%}" if share else "{:z.2f}"
    mean, low, high = (number.format(x) for x in estimate)
    return f"{mean} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"  # a narrow column breaks before the bracket


def table(results: Sequence[Result], baseline: str, title: str, note: str = LEGEND) -> report.Table:
    """What the models are worth, a row each."""
    rows = []
    for r in results:
        own = r.name == baseline
        versus = ["", ""] if own else [shown(r.gain), shown(r.wins, share=True)]
        kl = "" if own else shown(r.kl)
        rows.append((r.name, shown(r.score), *versus, kl, shown(r.tokens), f"{r.ended:.0%}"))
    return report.Table(title, [column.format(baseline) for column in COLUMNS], rows, note)


def pictures(results: Sequence[Result], baseline: str, score: str) -> list[report.Block]:
    """Scores with their intervals, and what they cost in KL."""
    blocks: list[report.Block] = [report.Bars(f"{score}, by model", score, {r.name: r.score for r in results})]
    costs = {r.name: (r.kl.mean, r.score.mean, r.score.low, r.score.high) for r in results if r.kl is not None}
    if len(costs) > 1:
        label = f"KL to {baseline}, nats an answer"
        blocks.append(report.Points(f"{score} against the distance from {baseline}", label, score, costs))
    return blocks


def side_by_side(results: Sequence[Result], prompts: Sequence[Text], count: int = 12) -> report.Samples:
    """The first answer of every model to prompts from all over the list."""
    places = [i * len(prompts) // min(count, len(prompts)) for i in range(min(count, len(prompts)))]
    rows = [(text(prompts[i]), [(r.texts[i][0], float(r.scores[i][0])) for r in results]) for i in places]
    return report.Samples("Answers side by side", [r.name for r in results], rows, "The number is the score.")


def text(prompt: Text) -> str:
    """A prompt as people read it."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def tell(block: report.Table) -> None:
    """Prints a table of the report."""
    drawn = Table(title=block.title)
    for column in block.columns:
        drawn.add_column(column, overflow="fold")  # names are told apart by their ends as well
    for row in block.rows:
        drawn.add_row(*map(str, row))
    Console().print(drawn)


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The figures of the table, every one with its interval."""
    kept = ("score", "gain", "wins", "kl", "tokens")
    estimates = lambda r: {name: e and e._asdict() for name in kept for e in (getattr(r, name),)}
    return [{"model": r.name, **estimates(r), "ended": r.ended} for r in results]


def write_answers(file: epath.Path, results: Sequence[Result], prompts: Sequence[Text]) -> None:
    """Every answer with its score, a line each."""
    lines = [
        json.dumps({"prompt": plain(prompt), "model": r.name, "completion": answer, "score": float(score)})
        for i, prompt in enumerate(prompts)
        for r in results
        for answer, score in zip(r.texts[i], r.scores[i], strict=True)
    ]
    file.write_text("\n".join(lines) + "\n")


def subjects(program: Compare) -> list[Subject]:
    """The models by name. Errors: UserError for none, a name too many, two alike, and what can't be opened."""
    names = program.names or tuple(path.rstrip("/").rpartition("/")[2] for path in program.models)
    if not program.models:
        raise UserError("no model to evaluate; give --models=RUN_OR_FOLDER,ANOTHER.")
    if len(names) != len(program.models) or len(set(names)) != len(names):
        raise UserError(f"--names={','.join(names)} must be {len(program.models)} different names, one a model.")
    if program.baseline is not None and program.baseline not in names:
        raise UserError(f"--baseline={program.baseline} is none of the models; choose one of {', '.join(names)}.")
    opened = [open_policy(path, flag="--models") for path in program.models]
    return [Subject(name, p.model, p.params, p.tokenizer, p.end_ids) for name, p in zip(names, opened, strict=True)]


def way(reward: Sequence[str]) -> tuple[str, How, float]:
    """Path, way and weight of --reward. Errors: UserError for another way, a weight that is none, or more words."""
    path, how, lam, *more = (*reward, *("", "mean", str(LAM))[len(reward) :])
    if more or not path or how not in COMBINED:
        raise UserError(
            f"--reward={','.join(reward)} is not understood; it is PATH or PATH,HOW, where HOW is one of "
            f"{', '.join(COMBINED)}, and for mean_less_variance PATH,HOW,LAM."
        )
    try:
        weight = float(lam)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"--reward={','.join(reward)}: the variance's weight {lam} must be a number of at least 0.")
    return path, cast(How, how), weight


def opened(
    name: str, path: str, how: How = "mean", lam: float = LAM, template: str | None = None, flag: str = "--reward"
) -> Rewards:
    """A reward model or an ensemble, from whatever `workdir.open_rewards` opens."""
    policies = open_rewards(path, flag=flag)
    members = [Subject(name, p.model, p.params, p.tokenizer, p.end_ids) for p in policies]
    return Rewards(name, members, how=how, lam=lam, chat_template=template)


def scorer_of(program: Compare) -> tuple[str, Callable[[], Scorer]]:
    """What scores are called, and what opens their scorer. Errors: UserError where two are given, or one is unknown."""
    if not program.reward:
        name = program.scorer or "gold"
        found = registry.resolve(SCORERS, name, "scorer")
        return name, lambda: found
    if program.scorer is not None:
        raise UserError(f"--scorer={program.scorer} and --reward={program.reward[0]} both score; leave one away.")
    path, how, lam = way(program.reward)
    return ", ".join(program.reward), lambda: opened(path, path, how, lam, program.chat_template)


def main(program: Compare) -> None:
    """Runs it."""
    run.use_compile_cache()
    sampling = Sampling(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Sampling)})
    check(sampling, "--")
    for name in ("samples", "rows"):
        if (value := getattr(program, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} is not allowed; it must be at least 1.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    scored_by, open_scorer = scorer_of(program)
    rows = asked.read(program.prompts)[: program.rows]
    prompts, columns = [row.text for row in rows], asked.columns(rows)
    out = epath.Path(os.path.expanduser(program.out))
    check_writable(out, "out", "--out")
    scorer, models = open_scorer(), subjects(program)
    baseline = program.baseline or models[0].name
    results = compare(
        models, prompts, columns, scorer, baseline=baseline, sampling=sampling, samples=program.samples,
        seed=program.seed, chat_template=program.chat_template, tools=[row.tools for row in rows],
    )  # fmt: skip
    told = table(results, baseline, f"{len(prompts)} prompts, {program.samples} answers each")
    tell(told)
    (out / "results.json").write_text(json.dumps(as_json(results), indent=2) + "\n")
    write_answers(out / "answers.jsonl", results, prompts)
    settings: Mapping[str, Any] = dataclasses.asdict(program)
    how = report.Code("How it was made", "\n".join(f"--{name}={value}" for name, value in settings.items()))
    blocks = [told, *pictures(results, baseline, f"score ({scored_by})"), side_by_side(results, prompts), how]
    print(f"wrote {report.write(out / 'report.html', 'Evaluation', blocks)}")


if __name__ == "__main__":
    flags.run(main, Compare)
