"""Judges pairs with models: python -m experiments.judge --judge=MODEL_OR_URL --rows=FILES [--out=FILE.jsonl].

Says first what each judge is worth: position, agreement with the rows' labels, length, its own answers. With --out the
pairs are written with soft labels, to train on. docs/judges.md has more.
"""

import dataclasses
import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath

from experiments.evaluate import tell
from experiments.rank import open_out
from rlhf_jax import flags, run
from rlhf_jax.data import sources
from rlhf_jax.data.rows import Text
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.judges import figures, together
from rlhf_jax.evaluate.scorers import plain
from rlhf_jax.feedback import judge_endpoint
from rlhf_jax.feedback.judge_endpoint import Endpoint, EndpointJudge
from rlhf_jax.feedback.judge_local import LocalJudge
from rlhf_jax.feedback.judges import Judge, Template, Verdict, average, read_template
from rlhf_jax.feedback.pairs import Compared, read, recorded
from rlhf_jax.report.judges import tables
from rlhf_jax.sampling.distribution import Sampling, check
from rlhf_jax.workdir import check_writable, open_policy

MEAN = "mean of all"
SHORT = 8  # tokens of a reply that is one letter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judges(Sampling):
    """Compares the two answers of each pair, says what the judges are worth, and writes soft labels."""

    judge: Annotated[
        tuple[str, ...],
        "run, model folder or Hub name; https://HOST/v1#MODEL; or FILE:COLUMN, where verdicts were written down",
    ]
    rows: Annotated[tuple[str, ...], "files of pairs, rankings, two answers by number, or completions without ranks"]
    names: Annotated[tuple[str, ...], "what the judges are called; empty: the last part of each"] = ()
    out: Annotated[str | None, "JSONL file to write: prompt, chosen, rejected, probability; none: none"] = None
    most: Annotated[int | None, "most pairs of each file; none: all"] = None
    template: Annotated[str | None, "text file of what is asked; none: the one that is shipped"] = None
    reasoning: Annotated[
        bool, "a rationale first, drawn as the sampling flags say; the chance is clamped to 0.4..0.6"
    ] = False
    probability: Annotated[str | None, "column of rows of chosen and rejected: their label, or votes; none: 1"] = None
    messages: Annotated[bool, "questions are written to --out as messages, for tokenizers with a chat template"] = False
    chat_template: Annotated[str | None, "Jinja file used in the place of the tokenizers' chat templates"] = None
    endpoint: Annotated[Endpoint, "judges behind an address"] = Endpoint()
    seed: Annotated[int, "of rationales, also behind an address, and of the resampling"] = 0


class Asked(NamedTuple):
    """A judge, and what it says of each pair."""

    judge: Judge
    verdicts: list[Verdict]


# What is asked for


def is_address(judge: str) -> bool:
    """Whether a judge is behind an address."""
    return judge.lower().startswith(("https://", "http://"))


def host_of(judge: str) -> str:
    """The machine of an address, which may hold a password as well.

    >>> host_of("https://me:s3cret@host:80/v1")
    'host'
    """
    try:
        return urllib.parse.urlsplit(judge).hostname or "an address"
    except ValueError:
        return "an address"


def column_of(judge: str) -> tuple[str, str] | None:
    """The file and the column of verdicts that were written down; None for another judge."""
    path, _, column = judge.rpartition(":")
    if not path or not column or is_address(judge) or "/" in column:
        return None
    return (path, column) if epath.Path(os.path.expanduser(path)).is_file() else None


def name_of(judge: str) -> str:
    """What a judge is called if nobody says otherwise.

    >>> name_of("https://host/v1#large"), name_of("runs/dpo/")
    ('large', 'dpo')
    """
    if is_address(judge):
        return judge.partition("#")[2] or judge
    return judge.rstrip("/").rpartition("/")[2]


def names_of(program: Judges) -> list[str]:
    """Of each judge. Errors: UserError for no judge, and names that don't tell them apart."""
    names = list(program.names or map(name_of, program.judge))
    if not program.judge:
        raise UserError("there is no judge; give --judge=MODEL, --judge=https://HOST/v1#MODEL or --judge=FILE:COLUMN.")
    if len(names) != len(program.judge) or len(set(names)) != len(names) or MEAN in names:
        raise UserError(
            f"--names={','.join(names)} must be {len(program.judge)} different names, one a judge, and none {MEAN!r}."
        )
    return names


def check_flags(program: Judges) -> None:
    """Errors: UserError for whatever can be seen before anything is read."""
    sampling = Sampling(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Sampling)})
    check(sampling, "--")
    judge_endpoint.check(program.endpoint)
    if not program.rows:
        raise UserError("there is nothing to judge; give --rows=FILE of pairs.")
    if program.most is not None and program.most < 1:
        raise UserError(f"--most={program.most} is not allowed; it must be at least 1.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    check_read(program)
    for judge in program.judge:
        if is_address(judge) and not judge.partition("#")[2]:
            raise UserError(f"the judge at {host_of(judge)} has no model; give --judge=https://HOST/v1#MODEL.")
    if program.messages and program.out is None:
        raise UserError("--messages is of what --out writes, and nothing is written; give --out or drop it.")


def check_read(program: Judges) -> None:
    """Errors: UserError for a flag that none of the judges reads."""
    asked = [judge for judge in program.judge if column_of(judge) is None]
    remote = [judge for judge in asked if is_address(judge)]
    given = [f.name for f in dataclasses.fields(program) if getattr(program, f.name) != f.default]
    of_rationales = [f.name for f in dataclasses.fields(Sampling)]
    for names, read_by, are in (
        (("template", "reasoning"), asked, "of judges that are asked"),
        (("chat_template",), len(remote) < len(asked), "of models that are opened here"),
        (("endpoint",), remote, "of judges behind an address"),
        (of_rationales, program.reasoning, "of rationales, which --reasoning asks for"),
    ):
        if not read_by and (unread := [name for name in names if name in given]):
            raise UserError(f"--{unread[0]} is {are}, and there are none; drop it.")
    others = [name for name in of_rationales if name in given and name not in ("temperature", "max_new_tokens")]
    if remote and others:
        raise UserError(
            f"--{others[0]} is not sent to judges behind an address; write what theirs is called into --endpoint.body."
        )


def open_judge(judge: str, name: str, template: Template, program: Judges) -> Judge:
    """A judge, ready to be asked. Errors: UserError for one that isn't there."""
    if is_address(judge):
        url, _, model = judge.partition("#")
        many = {"temperature": program.temperature, "most": program.max_new_tokens} if program.reasoning else {}
        many = {"most": SHORT, "seed": program.seed, **many}
        return EndpointJudge(name, url, model, template, program.endpoint, **many)
    if (found := column_of(judge)) is not None:
        return recorded(*found, name)
    policy = open_policy(judge, flag="--judge")
    sampling = Sampling(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Sampling)})
    return LocalJudge(
        name, policy.model, policy.params, policy.tokenizer, template, end_ids=policy.end_ids, sampling=sampling,
        seed=program.seed, chat_template=program.chat_template,
    )  # fmt: skip


def called(path: str) -> str:
    """A short name of a file: its last part without the suffix that says what it is.

    >>> called("a/gpt-3.5.judged.jsonl.gz")
    'gpt-3.5.judged'
    """
    name = path.rstrip("/").rpartition("/")[2]
    suffixes = sorted((suffix for suffix in sources.READERS if name.endswith(suffix)), key=len)
    return name.removesuffix(suffixes[-1] if suffixes else "") or path


def pairs_of(program: Judges) -> list[Compared]:
    """The pairs of all files, those that can't be used told.

    Errors: UserError as `pairs.read`, for --out with rows that nothing may be trained on, and an unread --probability.
    """
    found: list[Compared] = []
    chances = False
    for path in program.rows:
        source = called(path)
        source = path if any(one.source == source for one in found) else source
        got = read(path, source, program.probability)
        if got.evaluation and program.out is not None:
            raise UserError(f"{path} is for evaluation alone, and --out writes rows to train on; drop one of the two.")
        chances = chances or got.chances
        found += got.pairs[: program.most]
        if got.refused:
            where, why = next(iter(got.refused.items()))
            print(f"{path}: {len(got.refused)} rows can't be used, the first {where}: {why}")
    if program.probability is not None and not chances:
        raise UserError("--probability is of rows of chosen and rejected, and there are none in --rows; drop it.")
    return found


def ask(program: Judges, names: Sequence[str], template: Template, found: Sequence[Compared]) -> dict[str, Asked]:
    """Every judge with its verdicts, in the order of the names. Errors: UserError as the judges.

    Those behind addresses are opened and asked first: they may refuse, and what they said is kept in the cache.
    """
    order = sorted(zip(names, program.judge, strict=True), key=lambda one: not is_address(one[1]))
    judges = {name: open_judge(judge, name, template, program) for name, judge in order}
    pairs = [one.pair for one in found]
    asked = {name: Asked(judge, judge(pairs)) for name, judge in judges.items()}
    return {name: asked[name] for name in names}


# What is found


def soft(found: Sequence[Compared], verdicts: Sequence[Verdict], labeller: str, messages: bool) -> list[dict[str, Any]]:
    """Rows to train on: the likelier answer as chosen with its chance, at least a half; those with a verdict alone."""
    rows = []
    for one, verdict in zip(found, verdicts, strict=True):
        if verdict.probability is None:
            continue
        ahead = verdict.probability >= 0.5
        prompt, first, second = one.pair if messages else one.plain
        chosen, rejected = (first, second) if ahead else (second, first)
        texts: dict[str, Text] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        chance = max(verdict.probability, 1 - verdict.probability)
        offered = {"tools": json.loads(one.tools)} if one.tools else {}
        said = {"probability": chance, "labeller": labeller}
        rows.append({name: plain(text) for name, text in texts.items()} | said | offered)
    return rows


def spent_of(judges: Mapping[str, Judge]) -> list[str]:
    """What judges behind an address used."""
    return [
        f"{name}: {judge.spent.calls:,} calls, {judge.spent.tokens:,} tokens; {judge.spent.cached:,} from the cache"
        for name, judge in judges.items()
        if isinstance(judge, EndpointJudge)
    ]


def main(program: Judges) -> None:
    """Runs it."""
    check_flags(program)
    names = names_of(program)
    template = read_template(program.template, program.reasoning)
    out = None if program.out is None else open_out(program.out)
    if program.endpoint.cache and any(map(is_address, program.judge)):
        check_writable(epath.Path(os.path.expanduser(program.endpoint.cache)), "cache", "--endpoint.cache")
    found = pairs_of(program)
    run.use_compile_cache()
    asked = ask(program, names, template, found)
    verdicts = {name: one.verdicts for name, one in asked.items()}
    others = together(found, verdicts, seed=program.seed) if len(verdicts) > 1 else None
    said = average(list(verdicts.values()))
    shown = verdicts | ({MEAN: said} if len(verdicts) > 1 else {})
    for table in tables({name: figures(found, v, name, seed=program.seed) for name, v in shown.items()}, others):
        tell(table)
        if table.note:
            print(table.note)
    for line in spent_of({name: one.judge for name, one in asked.items()}):
        print(line)
    if out is not None:
        rows = soft(found, said, " + ".join(names), program.messages)
        if not rows:
            raise UserError(
                "no pair has a verdict of every judge, so there is nothing to write; see the reasons above."
            )
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"wrote {len(rows):,} pairs to {out}; train on them with --config.data.probability=probability")


if __name__ == "__main__":
    flags.run(main, Judges)
