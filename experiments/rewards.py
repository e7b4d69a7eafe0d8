"""Judges reward models: python -m experiments.rewards --models=runs/rm,runs/ensemble --rows=FILE,FILE --gold=gold.

On comparisons: accuracy, calibration, length, and how far an ensemble's members agree. With --policy and --prompts also
what picking the best of n of the policy's answers gains. Models of steps are judged on rows of labelled steps.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import numpy as np
from etils import epath

from experiments.evaluate import opened, tell
from rlhf_jax import flags, registry, report, run, worlds
from rlhf_jax.config import Config
from rlhf_jax.data import dataset, formats, sources
from rlhf_jax.data import prompts as asked
from rlhf_jax.data.config import Data
from rlhf_jax.data.conversions import CONVERSIONS, HOLDS, Form
from rlhf_jax.data.rows import Message
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Answers, Subject, answer
from rlhf_jax.evaluate.calibration import calibration
from rlhf_jax.evaluate.judgements import Comparisons, agreement, comparisons, gold_of, judge, records
from rlhf_jax.evaluate.process import judge_steps
from rlhf_jax.evaluate.proxies import GOLD, curves
from rlhf_jax.evaluate.rewards import COMBINED, LAM, Rewards, combine, lowest
from rlhf_jax.evaluate.scorers import SCORERS, Scorer, score
from rlhf_jax.report.rewards import Picked, Steps, Together, View, pictures, tables
from rlhf_jax.sampling.distribution import Sampling, check
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.workdir import check_writable, of_steps, open_policy

ALL = "all rows"


@dataclasses.dataclass(frozen=True)
class Judge(Sampling):
    """Judges reward models and writes report.html, results.json and judgements.jsonl."""

    models: Annotated[tuple[str, ...], "runs, folders of ensembles, model folders or Hub names of reward models"] = ()
    names: Annotated[tuple[str, ...], "what the models are called; empty: the last part of their path"] = ()
    rows: Annotated[tuple[str, ...], "files of pairs or rankings, and for models of steps of labelled steps"] = ()
    gold: Annotated[str | None, f"a known reward: {', '.join(SCORERS)}, or my_pkg.module:function; none: none"] = None
    policy: Annotated[str | None, "run or folder of a model whose answers are ranked; none: none are drawn"] = None
    prompts: Annotated[str, "file of prompts that the policy answers"] = ""
    most: Annotated[int | None, "most prompts answered; none: all"] = None
    samples: Annotated[int, "answers of the policy to each prompt"] = 16
    lam: Annotated[float, "of an ensemble's mean less variance: the weight of the variance"] = LAM
    probability: Annotated[str | None, "column of pairs: the share of labels for chosen, or votes; none: 1"] = None
    chat_template: Annotated[str | None, "Jinja file used in the place of the tokenizers' chat templates"] = None
    seed: Annotated[int, "of the answers and of the resampling"] = 0
    out: Annotated[str, "folder to write"] = "runs/rewards"


class Results(NamedTuple):
    """All that was found."""

    views: list[View]
    together: list[Together]
    picked: list[Picked]
    steps: list[Steps]
    lines: list[dict[str, Any]]
    notes: list[str]


# What is asked for


def check_numbers(program: Judge) -> None:
    """Errors: UserError for a number that is out of its range, or a flag that needs another."""
    check(Sampling(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Sampling)}), "--")
    for name in ("samples", "most"):
        if (value := getattr(program, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} is not allowed; it must be at least 1.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    if not 0 <= program.lam < math.inf:
        raise UserError(f"--lam={program.lam} is not allowed; it must be a number of at least 0.")
    if (program.policy is None) != (not program.prompts):
        raise UserError("--policy and --prompts go together, a model and a file of what it answers; give both or none.")
    if not program.rows and program.policy is None:
        raise UserError("there is nothing to judge on; give --rows=FILE of comparisons, or --policy and --prompts.")


def names_of(program: Judge) -> list[str]:
    """What the models are called. Errors: UserError for no model, or names that don't tell them apart."""
    names = list(program.names or (path.rstrip("/").rpartition("/")[2] for path in program.models))
    if not program.models:
        raise UserError("no reward model to judge; give --models=RUN_OR_FOLDER,ANOTHER.")
    if len(names) != len(program.models) or len(set(names)) != len(names) or GOLD in names:
        raise UserError(
            f"--names={','.join(names)} must be {len(program.models)} different names, one a model, and none {GOLD!r}."
        )
    return names


def form_of(path: str) -> Form:
    """What a file of rows can be judged as. Errors: UserError for a file that can't be read, or of other rows."""
    records = list(sources.read(path, flag="--rows"))
    forms: dict[Form, list[Any]] = {form: [row for row, to in CONVERSIONS if to == form] for form in FORMS}
    kind = formats.FORMATS[dataset.format_of(path, records, "auto", sum(forms.values(), []))].row
    for form, kinds in forms.items():
        if kind in kinds:
            return form
    raise UserError(f"{path} holds {HOLDS[kind]}; give --rows files of pairs, rankings or labelled steps.")


FORMS: tuple[Form, ...] = ("ranking", "stepwise")


def matched(program: Judge, names: Sequence[str], rows: Sequence[str]) -> tuple[list[Form], list[Form]]:
    """The form of each model and of each file. Errors: UserError where one of them has no partner."""
    wanted: list[Form] = ["stepwise" if of_steps(path, "--models") else "ranking" for path in program.models]
    there: list[Form] = [form_of(path) for path in rows]
    what = {"ranking": "pairs or rankings", "stepwise": "labelled steps"}
    for name, form in zip(names, wanted, strict=True):
        if form not in there and (form == "stepwise" or program.policy is None):
            raise UserError(f"{name} is judged on rows of {what[form]}, and --rows holds none; add such a file.")
    for path, form in zip(rows, there, strict=True):
        if form not in wanted:
            raise UserError(f"{path} holds {what[form]}, and none of --models is trained on such rows; leave it away.")
    if program.policy is not None and "ranking" not in wanted:
        raise UserError("--policy needs a reward model of whole answers, and --models has none; leave it away.")
    return wanted, there


def called(paths: Sequence[str]) -> list[str]:
    """Short names of files: the last part without a suffix, or the path where that is not its alone.

    >>> called(["a/pairs.jsonl", "b/pairs.jsonl", "world:tiny/answers"])
    ['a/pairs.jsonl', 'b/pairs.jsonl', 'answers']
    """
    short = [path.rstrip("/").rpartition("/")[2].partition(".")[0] or path for path in paths]
    return [path if short.count(name) > 1 or name == ALL else name for name, path in zip(short, paths, strict=True)]


def local(path: str) -> str:
    """The file behind a world's name, or the path as it is."""
    return os.fspath(worlds.file(path, Config().cache)) if path.startswith(worlds.PREFIX) else path


# What is found


def read(rewards: Rewards, files: Sequence[str], form: Form, program: Judge, notes: list[str]) -> dataset.Read:
    """The rows as the model reads them. Errors: UserError as `dataset.read`."""
    config = Data(path=tuple(files), max_refused=1.0, probability=program.probability if form == "ranking" else None)
    found = dataset.read(config, rewards.encoder, form, rewards.length)
    gone = {**found.notes.refused, **dict.fromkeys(found.notes.too_long, "too long")}
    if gone:
        where, why = next(iter(gone.items()))
        notes.append(f"{rewards.name}: {len(gone)} of {found.notes.read} rows can't be used, the first {where}: {why}.")
    return found


def scores_of(name: str, members: np.ndarray, lam: float) -> dict[str, np.ndarray]:
    """By name what is held against labels: a model's score, or those that members make together."""
    if len(members) == 1:
        return {name: members[0]}
    return {f"{name}: {how.replace('_', ' ')}": combine(members, how, lam) for how in COMBINED}


def parts_of(found: Comparisons, files: Mapping[str, str]) -> dict[str, Comparisons]:
    """All comparisons, and where there are several files those of each. Errors: UserError for a file without any."""
    source = np.asarray(found.source, object)
    parts = {name: found.some(source == name) for name in files}
    for name, part in parts.items():
        if not len(part):
            raise UserError(f"{files[name]} holds no two answers that its labels tell apart; leave it out of --rows.")
    return {ALL: found, **parts} if len(parts) > 1 else parts


def judged(rewards: Rewards, files: Mapping[str, str], gold: Scorer | None, program: Judge, into: Results) -> None:
    """A model of answers on files of comparisons, by what they are called."""
    kept = read(rewards, list(files.values()), "ranking", program, into.notes).kept
    found = comparisons(kept, list(files))
    parts = parts_of(found, files)
    members, known = rewards.scores(found.rows), None if gold is None else gold_of(found, gold)
    views = scores_of(rewards.name, members, program.lam)
    if (one := lowest(members)) is not None:
        into.notes.append(
            f"{rewards.name}: the minimum is member {one + 1}'s score for nearly every answer, because the members' "
            "zeros differ; train them with --config.reward.demonstrations=ROWS, which makes these score 0 by each."
        )
    for part, some in parts.items():
        for name, scores in views.items():
            difference = scores[some.better] - scores[some.worse]
            told = calibration(difference, some.share, some.units, seed=program.seed)
            into.views.append(View(name, part, judge(some, scores, known, seed=program.seed), told))
        if len(members) > 1:
            into.together.append(Together(rewards.name, part, agreement(some, members, seed=program.seed)))
    into.lines.extend({"model": rewards.name, **line} for line in records(found, views, members, known))


def judged_steps(rewards: Rewards, files: Mapping[str, str], program: Judge, into: Results) -> None:
    """A model of steps on each file; of an ensemble the mean of its members."""
    for name, path in files.items():
        kept = read(rewards, [path], "stepwise", program, into.notes).kept
        if not kept:
            raise UserError(f"{path} holds no solution that {rewards.name} can read; leave it out of --rows.")
        scores = [combine(one, "mean") for one in rewards.step_scores([e.completions[0] for _, e in kept])]
        labels = [example.step_labels for _, example in kept]
        into.steps.append(Steps(rewards.name, name, judge_steps(scores, labels, seed=program.seed)))
        for (_, e), said in zip(kept, scores, strict=True):
            line = {"model": rewards.name, "source": name, "where": e.where, "labeller": e.labeller}
            into.lines.append({**line, "labels": e.step_labels, "scores": said.tolist()})


def drawn(program: Judge, rows: Sequence[asked.Asked]) -> Answers:
    """The policy's answers."""
    policy = open_policy(str(program.policy), flag="--policy")
    subject = Subject("policy", policy.model, policy.params, policy.tokenizer, policy.end_ids)
    sampling = Sampling(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Sampling)})
    sampler = Sampler(policy.model, samples=program.samples)
    encoder = Encoder(policy.tokenizer, program.chat_template)
    texts, tools = [row.text for row in rows], [row.tools for row in rows]
    return answer(subject, encoder, sampler, texts, sampling, program.seed, tools)


def picked(
    models: Sequence[Rewards], rows: Sequence[asked.Asked], answers: Answers, gold: Scorer | None, program: Judge
) -> list[Picked]:
    """The best of n by every score: of ensembles also by each member."""
    flat = [(row, text) for row, texts in zip(rows, answers.texts, strict=True) for text in texts]
    said = [text if isinstance(row.text, str) else (Message("assistant", text),) for row, text in flat]
    shape, proxies = (len(rows), program.samples), {}
    for rewards in models:
        tokens = rewards.encode([row.text for row, _ in flat], said, [row.tools for row, _ in flat])
        members = rewards.scores([one.ids for one in tokens])
        found = scores_of(rewards.name, members, program.lam)
        if len(members) > 1:
            found |= {f"{rewards.name}: member {number}": own for number, own in enumerate(members, start=1)}
        proxies |= {name: scores.reshape(shape) for name, scores in found.items()}
    texts = [row.text for row in rows]
    known = None if gold is None else np.asarray(score(gold, texts, answers.texts, asked.columns(list(rows))))
    return [Picked(name, points) for name, points in curves(proxies, known, seed=program.seed).items()]


def as_json(value: Any) -> Any:
    """Figures as JSON has them, every estimate with its interval."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: as_json(one) for name, one in value.items()}
    return [as_json(one) for one in value] if isinstance(value, list | tuple) else value


def write(out: epath.Path, found: Results, program: Judge) -> epath.Path:
    """Prints the tables and writes the three files."""
    told = tables(found.views, found.together, found.picked, found.steps)
    for block in told:
        tell(block)
    for note in found.notes:
        print(note)
    kept = {name: as_json(value) for name, value in found._asdict().items() if name != "lines"}
    (out / "results.json").write_text(json.dumps(kept, indent=2) + "\n")
    (out / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found.lines))
    settings = "\n".join(f"--{name}={value}" for name, value in dataclasses.asdict(program).items())
    notes = [report.Text("Notes", found.notes)] if found.notes else []
    blocks = [*told, *pictures(found.views, found.picked), *notes, report.Code("How it was made", settings)]
    return report.write(out / "report.html", "Reward models", blocks)


def main(program: Judge) -> None:
    """Runs it."""
    run.use_compile_cache()
    check_numbers(program)
    names = names_of(program)
    gold = None if program.gold is None else registry.resolve(SCORERS, program.gold, "scorer")
    if len(set(program.rows)) < len(program.rows):
        raise UserError(f"--rows={','.join(program.rows)} names a file twice; leave one away.")
    files = dict(zip(called(program.rows), map(local, program.rows), strict=True))
    wanted, there = matched(program, names, list(files.values()))
    rows = asked.read(local(program.prompts))[: program.most] if program.policy is not None else []
    out = epath.Path(os.path.expanduser(program.out))
    check_writable(out, "out", "--out")
    models = [
        opened(name, path, template=program.chat_template, flag="--models")
        for name, path in zip(names, program.models, strict=True)
    ]
    found = Results([], [], [], [], [], [])
    for rewards, form in zip(models, wanted, strict=True):
        own = {name: path for (name, path), one in zip(files.items(), there, strict=True) if one == form}
        if form == "stepwise":
            judged_steps(rewards, own, program, found)
        elif own:
            judged(rewards, own, gold, program, found)
    if rows:
        answerers = [rewards for rewards, form in zip(models, wanted, strict=True) if form == "ranking"]
        found.picked.extend(picked(answerers, rows, drawn(program, rows), gold, program))
    print(f"wrote {write(out, found, program)}")


if __name__ == "__main__":
    flags.run(main, Judge)
