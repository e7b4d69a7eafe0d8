"""Public evaluation sets: python -m experiments.suite --models=runs/sft,runs/dpo --data=FOLDER --tasks=mmlu,xstest.

Multiple choice by likelihood, checked answers, preferences, refusals, win rates; every figure with its interval and
what guessing has, every sample kept. --gate=FILE fails a run, with status 1, whose figures fall below those that are
set. docs/suite.md has more.
"""

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath

from experiments.evaluate import shown, tell
from rlhf_jax import flags, report, run
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.evaluate.suite import gate as gates
from rlhf_jax.evaluate.suite import tasks
from rlhf_jax.evaluate.suite.items import Against, Asked, Examinee, Figure, Found
from rlhf_jax.evaluate.suite.subject import LanguageModel, RewardModel
from rlhf_jax.evaluate.suite.tasks import TASKS
from rlhf_jax.feedback.judges import Judge, read_template
from rlhf_jax.sampling.distribution import Sampling, check
from rlhf_jax.workdir import check_writable, open_model

LEGEND = (
    "In brackets: 95% intervals, of a share of items after Wilson, of other means and of items that belong together by "
    "a bootstrap over them. Guessing: what a model has that knows nothing; none: it isn't known."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite(Sampling):
    """Examines models on public sets and writes report.html, results.json and samples.jsonl."""

    models: Annotated[tuple[str, ...], "runs (RUN, RUN@STEP, RUN@best), model folders or Hub names; also reward models"]
    data: Annotated[tuple[str, ...], "folder of the sets, and TASK=FILE for a task whose rows are elsewhere"]
    tasks: Annotated[tuple[str, ...], f"of {', '.join(TASKS)}; empty: all, wins if there is a judge"] = ()
    names: Annotated[tuple[str, ...], "what the models are called; empty: the last part of their path"] = ()
    rows: Annotated[int | None, "most items of each task, taken from all over it; none: all"] = None
    shots: Annotated[int, "worked examples before each question, of the tasks that have some"] = 0
    judge: Annotated[str | None, "of wins: a language model or a reward model, as --models; none: none"] = None
    template: Annotated[str | None, "text file of what a judge is asked; none: the one that is shipped"] = None
    baseline: Annotated[str | None, "of wins: the model that the others are held against; none: the first"] = None
    gate: Annotated[str | None, "TOML file of figures that the models must keep to; none: none"] = None
    temperature: Annotated[float, "divides the logits; 0: always the likeliest token"] = 0.0
    max_new_tokens: Annotated[int, "most tokens of an answer; a prompt that leaves less room is left out"] = 256
    chat_template: Annotated[str | None, "Jinja file used in the place of the tokenizers' chat templates"] = None
    seed: Annotated[int, "of the answers and of the resampling"] = 0
    out: Annotated[str, "folder to write"] = "runs/suite"


class Answered(NamedTuple):
    """A model on a task, with the seconds it took."""

    model: str
    task: str
    found: Found
    seconds: float


# What is asked for


def check_flags(program: Suite) -> tuple[list[str], list[str]]:
    """The tasks and the models' names. Errors: UserError for whatever can be seen before anything is read."""
    check(sampling_of(program), "--")
    for name, least in (("rows", 1), ("shots", 0)):
        if (value := getattr(program, name)) is not None and value < least:
            raise UserError(f"--{name}={value} is not allowed; it must be at least {least}.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    names = list(program.names or (path.rstrip("/").rpartition("/")[2] for path in program.models))
    if not program.models:
        raise UserError("no model to examine; give --models=RUN_OR_FOLDER,ANOTHER.")
    if len(names) != len(program.models) or len(set(names)) != len(names):
        raise UserError(f"--names={','.join(names)} must be {len(program.models)} different names, one a model.")
    asked = tasks.chosen(program.tasks or [n for n in TASKS if n != "wins" or program.judge is not None])
    tasks.check(asked, program.shots)
    if "wins" in asked and program.judge is None:
        raise UserError("the task wins needs a judge; give --judge=MODEL_OR_REWARD_MODEL.")
    if "wins" in asked and len(names) < 2:
        raise UserError("the task wins holds models against each other, and --models has one; give another.")
    for name in ("judge", "baseline"):
        if getattr(program, name) is not None and "wins" not in asked:
            raise UserError(f"--{name} is of the task wins, and --tasks has none; drop it or add wins.")
    if program.baseline is not None and program.baseline not in names:
        raise UserError(f"--baseline={program.baseline} is none of the models; choose one of {', '.join(names)}.")
    check_read(program, asked)
    check_texts(program)
    return asked, names


def check_read(program: Suite, asked: Sequence[str]) -> None:
    """Errors: UserError for a flag that none of the tasks reads."""
    needs = {TASKS[name].needs for name in asked}
    given = [f.name for f in dataclasses.fields(program) if getattr(program, f.name) != f.default]
    sampling = [f.name for f in dataclasses.fields(Sampling)]
    for flags_, read_by, what in (
        (sampling, {"answers", "judge"}, "of written answers"),
        (["template"], {"pairs", "judge"}, "of pairs that a model judges"),
    ):
        if not needs & read_by and (unread := [name for name in flags_ if name in given]):
            raise UserError(f"--{unread[0]} is {what}, and none of --tasks has any; drop it.")
    if program.temperature == 0 and (unread := [name for name in ("top_k", "top_p", "min_p") if name in given]):
        raise UserError(
            f"--{unread[0]} changes nothing at --temperature=0, which always takes the likeliest token; drop it, or "
            "give a temperature above 0."
        )


def check_texts(program: Suite) -> None:
    """Errors: UserError for a judge's template that can't be read, or a chat template that isn't there."""
    read_template(program.template)
    chat = program.chat_template
    if chat is not None and not epath.Path(os.path.expanduser(chat)).is_file():
        raise UserError(f"there is no chat template {chat}; check --chat_template.")


def places_of(program: Suite) -> tuple[str, dict[str, str]]:
    """The folder of all sets, and the files of single tasks.

    Errors: UserError for two folders, an unknown task, a task without a file, or with two.
    """
    own: dict[str, str] = {}
    for name, _, path in (one.partition("=") for one in program.data if "=" in one):
        tasks.chosen([name])
        if not path or name in own:
            raise UserError(
                f"--data={','.join(program.data)} gives {name} {'two places' if path else 'no file'}; "
                f"write {name}=FILE, once."
            )
        own[name] = path
    folders = [one for one in program.data if "=" not in one]
    if len(folders) > 1:
        raise UserError(f"--data={','.join(program.data)} has two folders; give one, and TASK=FILE for other places.")
    if not folders and not own:
        raise UserError("there is no data; give --data=FOLDER.")
    return (folders or ["."])[0], own


def sampling_of(program: Suite) -> Sampling:
    return Sampling(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Sampling)})


def opened(path: str, name: str, program: Suite, flag: str = "--models") -> LanguageModel | RewardModel:
    """A model, ready to be examined. Errors: UserError for one that isn't there."""
    policy = open_model(path, flag=flag)
    subject = Subject(name, policy.model, policy.params, policy.tokenizer, policy.end_ids)
    if policy.model.shape.head == "score":
        return RewardModel(Rewards(name, [subject], chat_template=program.chat_template))
    return LanguageModel(
        subject, read_template(program.template), sampling=sampling_of(program), seed=program.seed,
        chat_template=program.chat_template,
    )  # fmt: skip


def able(examinee: Examinee, names: Sequence[str]) -> list[str]:
    """The tasks that a model can do: a reward model those of pairs. Errors: UserError for none."""
    can = [name for name in names if examinee.writes or TASKS[name].needs == "pairs"]
    if not can:
        pairs = [name for name, task in TASKS.items() if task.needs == "pairs"]
        raise UserError(f"{examinee.name} is a reward model and can only do {', '.join(pairs)}; add one to --tasks.")
    return can


def against_of(program: Suite, examinees: Mapping[str, Examinee], judge: Examinee) -> Against:
    """What win rates need; the baseline answers each prompt once. Errors: UserError for a baseline that writes none."""
    baseline = examinees[program.baseline or next(iter(examinees))]
    if not baseline.writes:
        raise UserError(f"--baseline={baseline.name} is a reward model and writes nothing; choose a language model.")
    kept: dict[tuple[Asked, ...], Any] = {}

    def answers(asked: Sequence[Asked]) -> Any:
        key = tuple(asked)
        if key not in kept:
            kept[key] = baseline.answers(asked)
        return kept[key]

    verdicts: Judge = judge.verdicts
    return Against(baseline.name, answers, verdicts)


# What is found


def examine(examinee: Examinee, sets: Mapping[str, tasks.Read], against: Against | None, seed: int) -> list[Answered]:
    """A model on all that it can do, each task told when it is done."""
    done = []
    for name in able(examinee, list(sets)):
        if name == "wins" and against is not None and examinee.name == against.name:
            continue
        start = time.perf_counter()
        found = TASKS[name].measure(sets[name].items, examinee, seed, against)
        wanted = tasks.figures_of(name, sets[name].items)
        found = found._replace(figures=[figure for figure in found.figures if figure.name in wanted])
        done.append(Answered(examinee.name, name, found, time.perf_counter() - start))
        print(f"{examinee.name}: {name}, {done[-1].seconds:.0f} s", flush=True)
    return done


def by_figure(done: Sequence[Answered]) -> dict[str, dict[str, dict[str, Figure]]]:
    """The figures by model, task and name."""
    made: dict[str, dict[str, dict[str, Figure]]] = {}
    for one in done:
        made.setdefault(one.model, {})[one.task] = {figure.name: figure for figure in one.found.figures}
    return made


def table(results: gates.Results, sets: Mapping[str, tasks.Read]) -> report.Table:
    """A row a figure, a column a model."""
    rows = []
    for task, read in sets.items():
        for name, about in tasks.figures_of(task, read.items).items():
            own = {model: of.get(task, {}).get(name) for model, of in results.items()}
            if not any(own.values()):
                continue
            counts = sorted({str(figure.count) for figure in own.values() if figure is not None}, key=int)
            # Models that leave out different items have different ones.
            chances = {figure.chance for figure in own.values() if figure is not None and figure.chance is not None}
            guessing = " or ".join(dict.fromkeys(f"{chance:.1%}" for chance in sorted(chances))) or "none"
            cells = ["" if figure is None else percent(figure) for figure in own.values()]
            rows.append((f"{task}: {name}", about, " or ".join(counts), guessing, *cells))
    if not rows:
        raise UserError("nothing could be measured: every item was left out; see the reasons above.")
    return report.Table("Public sets", ["figure", "about", "items", "guessing", *results], rows, LEGEND)


def percent(figure: Figure) -> str:
    """An estimate as percent, its interval in brackets."""
    mean, low, high = (f"{100 * x:.1f}" for x in figure.estimate)
    return f"{mean} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"


def notes_of(done: Sequence[Answered], sets: Mapping[str, tasks.Read]) -> list[str]:
    """What isn't in the figures: rows that can't be used, and items left out."""
    said = [
        f"{task}: {len(read.refused)} rows can't be used, the first {where}: {why}"
        for task, read in sets.items()
        for where, why in list(read.refused.items())[:1]
    ]
    for one in done:
        if one.found.note:
            said.append(f"{one.model}, {one.task}: {one.found.note}")
        if one.found.left:
            where, why = next(iter(one.found.left.items()))
            count, total = len(one.found.left), len(sets[one.task].items)
            said.append(f"{one.model}, {one.task}: {count} of {total} left out or in part, the first {where}: {why}")
    return said


def as_json(done: Sequence[Answered], sets: Mapping[str, tasks.Read]) -> list[dict[str, Any]]:
    """Every figure, with its groups; and what was left out, by where it stands."""
    told = []
    for one in done:
        about = tasks.figures_of(one.task, sets[one.task].items)
        figures = [
            {
                "name": f.name, "about": about[f.name], **f.estimate._asdict(), "count": f.count, "chance": f.chance,
                "groups": {group: {**e._asdict(), "count": count} for group, (e, count) in f.groups.items()},
            }
            for f in one.found.figures
        ]  # fmt: skip
        line = {"model": one.model, "task": one.task, "figures": figures, "note": one.found.note}
        line["left_out"] = one.found.left
        told.append(line | {"refused_rows": sets[one.task].refused, "seconds": round(one.seconds, 1)})
    return told


def write(out: epath.Path, told: report.Table, done: Sequence[Answered], notes: Sequence[str], program: Suite) -> None:
    """The page and every sample, those that were left out too."""
    lines = []
    for one in done:
        head = {"model": one.model, "task": one.task}
        lines += [{**head, **sample} for sample in one.found.samples]
        lines += [{**head, "where": where, "left_out": why} for where, why in one.found.left.items()]
    (out / "samples.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    settings = "\n".join(f"--{name}={value}" for name, value in dataclasses.asdict(program).items())
    blocks: list[report.Block] = [told]
    if notes:
        blocks.append(report.Text("To be known", list(notes)))
    groups = [
        (f"{one.task}: {f.name}", one.model, group, count, shown(estimate, share=True))
        for one in done
        for f in one.found.figures[:1]
        for group, (estimate, count) in f.groups.items()
    ]
    if groups:
        blocks.append(report.Table("By group", ["figure", "model", "group", "items", "estimate"], groups))
    blocks.append(report.Code("How it was made", settings))
    print(f"wrote {report.write(out / 'report.html', 'Public sets', blocks)}")


def held(gate: gates.Gate, results: gates.Results, scorers: Sequence[str], seed: int) -> bool:
    """Whether all models keep to the gate; says which don't, and why."""
    failed = gates.failures(gate, results, scorers=scorers, seed=seed)
    if not failed:
        print("gate: none of the models was asked any of its tasks")
    for model, sentences in failed.items():
        print(f"gate: {model} {'fails' if sentences else 'passes'}")
        for sentence in sentences:
            print(f"gate: {sentence}")
    return bool(failed) and not any(failed.values())


def main(program: Suite) -> None:
    """Runs it; ends with status 1 where the gate isn't kept to."""
    asked, names = check_flags(program)
    folder, own = places_of(program)
    if unread := [name for name in own if name not in asked]:
        raise UserError(f"--data={unread[0]}={own[unread[0]]} is of a task that isn't run; add it to --tasks.")
    gate = None if program.gate is None else gates.read(program.gate)
    sets = {name: tasks.read(name, folder, own.get(name), program.shots, program.rows) for name in asked}
    if gate is not None:
        figures = {name: list(tasks.figures_of(name, read.items)) for name, read in sets.items()}
        baseline = (program.baseline or names[0]) if "wins" in asked else None
        gates.check(gate, str(program.gate), figures, names, baseline)
    out = epath.Path(os.path.expanduser(program.out))
    check_writable(out, "out", "--out")
    run.use_compile_cache()
    examinees = {name: opened(path, name, program) for name, path in zip(names, program.models, strict=True)}
    can = {name: able(examinee, asked) for name, examinee in examinees.items()}
    scorers = [name for name, examinee in examinees.items() if not examinee.writes]
    if gate is not None:
        gates.check_kinds(gate, str(program.gate), can, scorers)
    against = None
    if program.judge is not None:
        against = against_of(program, examinees, opened(program.judge, "the judge", program, "--judge"))
    done = [one for examinee in examinees.values() for one in examine(examinee, sets, against, program.seed)]
    results, notes = by_figure(done), notes_of(done, sets)
    (out / "results.json").write_text(json.dumps(as_json(done, sets), indent=2) + "\n")
    for note in notes:
        print(note)
    told = table(results, sets)
    tell(told)
    write(out, told, done, notes, program)
    if gate is not None and not held(gate, results, scorers, program.seed):
        raise SystemExit(1)


if __name__ == "__main__":
    flags.run(main, Suite)
