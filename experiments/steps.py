"""Labels the steps of a model's solutions: python -m experiments.steps --model=RUN --prompts=FILE --out=FILE.jsonl.

A program verifies each step, or the model goes on from it and what comes of that counts, or people mark it on a page.
docs/methods/process_reward.md says what becomes of the rows.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from experiments.rank import open_out
from rlhf_jax import flags, registry, run
from rlhf_jax.data import prompts, world
from rlhf_jax.data.items import ARGUMENTS
from rlhf_jax.data.prompts import Asked
from rlhf_jax.data.steps import cut, ends_of, step_pattern
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject, answer
from rlhf_jax.evaluate.scorers import plain
from rlhf_jax.evaluate.step_labels import VERIFIERS, check_verifier, rolled_out, verified
from rlhf_jax.feedback.rankings import question_of
from rlhf_jax.feedback.rewards import REWARD_FUNCTIONS, RewardFunctions, is_async
from rlhf_jax.sampling.distribution import Sampling, check
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.workdir import open_policy

ROLLOUTS, PEOPLE = "rollouts", "people"  # who may label, beside verifiers
OF_WORLD = ("right",)  # checkers that judge prompts of the world alone
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Label(Sampling):
    """Draws solutions to each prompt, cuts them into steps and labels each step right or wrong."""

    model: Annotated[str, "workdir of a run (also WORKDIR@STEP, WORKDIR@best), model folder or Hub name"]
    prompts: Annotated[str, "file of prompts: rows with prompt or messages, or any other file's lines"]
    out: Annotated[str, "JSONL file to write; it must not exist"]
    by: Annotated[
        str,
        f"who labels: {ROLLOUTS} (the model goes on from each step), {PEOPLE} (tasks for experiments.label), or what "
        f"verifies steps: {', '.join(VERIFIERS)}, my_pkg.module:function",
    ] = ROLLOUTS
    step_end: Annotated[str, "regular expression of the text that ends a step"] = r"\n+"
    rows: Annotated[int | None, "most prompts used; none: all"] = None
    solutions: Annotated[int, "drawn for each prompt; one that comes up twice stands there once"] = 4
    checker: Annotated[
        str | None, f"whether an answer is right, 0 to 1: {', '.join(REWARD_FUNCTIONS)}, or my_pkg.module:function"
    ] = None
    rollouts: Annotated[int, "times that the model goes on from each step"] = 8
    at_least: Annotated[
        float | None, "share of them that must end right for a step to count as right; none: any of them"
    ] = None
    deadline: Annotated[float, "seconds that an asynchronous checker may take for all answers"] = 600.0
    chat_template: Annotated[str | None, "Jinja file used in the place of the tokenizer's chat template"] = None
    seed: Annotated[int, "of the solutions and the rollouts"] = 0


def check_flags(program: Label) -> Sampling:
    """How solutions are drawn. Errors: UserError for whatever can be seen before anything is opened."""
    sampling = Sampling(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Sampling)})
    check(sampling, "--")
    for name in ("rows", "solutions", "rollouts"):
        if (value := getattr(program, name)) is not None and value < 1:
            raise UserError(f"--{name}={value} is not allowed; it must be at least 1.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    if program.at_least is not None and not 0 < program.at_least <= 1:
        raise UserError(f"--at_least={program.at_least} is not allowed; it must be above 0 and at most 1.")
    if program.by == ROLLOUTS and program.checker is None:
        raise UserError(
            f"--by={ROLLOUTS} asks what comes of a step; give --checker=NAME, which says whether an answer is right."
        )
    default = {field.name: field.default for field in dataclasses.fields(Label)}
    for name in ("checker", "rollouts", "at_least", "deadline"):
        if program.by != ROLLOUTS and getattr(program, name) != default[name]:
            raise UserError(f"--by={program.by} does not read --{name}; drop it.")
    if program.by == ROLLOUTS and (sampling.temperature == 0 or sampling.top_k == 1):
        raise UserError("all rollouts from a step would be the same; give a --temperature above 0, and no --top_k=1.")
    if program.by not in (ROLLOUTS, PEOPLE):
        registry.resolve({ROLLOUTS: None, PEOPLE: None, **VERIFIERS}, program.by, "way to label steps")
    if program.checker is not None:
        registry.resolve(REWARD_FUNCTIONS, program.checker, "checker")
    step_pattern(program.step_end, "--step_end")
    return sampling


def check_prompts(program: Label, asked: Sequence[Asked]) -> None:
    """Errors: UserError for prompts that can't be labelled in this way, before anything is opened."""
    columns = columns_of(asked)
    if program.by not in (ROLLOUTS, PEOPLE):
        check_verifier(registry.resolve(VERIFIERS, program.by, "way to label steps"), columns)
    for one in asked:
        what = f"--by={program.by}" if program.by in VERIFIERS else f"--checker={program.checker}"
        if (program.by in VERIFIERS or program.checker in OF_WORLD) and not _is_sum(one):
            raise UserError(
                f"{one.where} is no sum of the synthetic world, and {what} judges no others here; give other prompts, "
                f"or --by={ROLLOUTS} with a --checker for these, or a verifier, my_pkg.module:function."
            )
    if program.checker is None:
        return
    checker = checker_of(program)
    checker([], [], {name: [] for name in columns})
    if not any(map(is_async, checker.functions.values())):  # what waits for other machines is not asked in vain
        told = checker([one.text for one in asked], ["0"] * len(asked), columns)
        for one, applies in zip(asked, told.applies[:, 0], strict=True):
            if not applies:
                raise UserError(f"{one.where} has nothing that --checker={program.checker} can go by; leave it out.")


def checker_of(program: Label) -> RewardFunctions:
    """Whether an answer is right. Errors: UserError as the class does."""
    return RewardFunctions.named((str(program.checker),), deadline=program.deadline, flag="--deadline")


def columns_of(asked: Sequence[Asked]) -> dict[str, list[Any]]:
    """What functions get beside prompt and answer."""
    return {name: column for name, column in prompts.columns(list(asked)).items() if name not in ARGUMENTS}


def _is_sum(one: Asked) -> bool:
    with contextlib.suppress(UserError):
        return world.parse(question_of(one.text)).kind == "sum"
    return False


def labelled(
    program: Label, subject: Subject, encoder: Encoder, sampling: Sampling, asked: Sequence[Asked],
    solutions: Sequence[Sequence[str]],
) -> list[Row | None]:  # fmt: skip
    """What is said of the steps of each solution, in columns beside prompt and steps; None where nothing can be."""
    texts, columns = [one.text for one in asked], columns_of(asked)
    if program.by == PEOPLE:
        return [{} for _ in solutions]
    if program.by != ROLLOUTS:
        verifier = registry.resolve(VERIFIERS, program.by, "way to label steps")
        return [{"labels": labels} for labels in verified(verifier, texts, solutions, columns)]
    found = rolled_out(
        subject, encoder, texts, solutions, columns, checker_of(program), samples=program.rollouts,
        sampling=sampling, seed=program.seed + 1, tools=[one.tools for one in asked],
    )  # fmt: skip
    right = lambda share: bool(share > 0 if program.at_least is None else share >= program.at_least)
    return [
        one and {"labels": [*map(right, one.shares)], "shares": one.shares.tolist(), "right": one.right}
        for one in found
    ]


def rows_of(
    program: Label, asked: Sequence[Asked], solutions: Sequence[Sequence[str]], told: Sequence[Row | None]
) -> list[Row]:
    """As the data format `stepwise` reads them, or tasks for people."""
    name, rows = "steps" if program.by == PEOPLE else "completions", []
    for one, steps, labels in zip(asked, solutions, told, strict=True):
        if labels is None:
            continue
        tools = {"tools": json.loads(one.tools)} if one.tools else {}
        rows.append({"prompt": plain(one.text), name: list(steps)} | labels | tools)
    return rows


def tell(program: Label, rows: Sequence[Row], drawn: int, names: Mapping[str, int]) -> None:
    """Prints what was labelled."""
    steps = sum(len(row["steps" if program.by == PEOPLE else "completions"]) for row in rows)
    left = ", ".join(f"{count} {why}" for why, count in names.items())
    print(f"{len(rows)} different solutions of {drawn}, {steps} steps; left out: {left}")
    if program.by == PEOPLE:
        print("let people mark them on a page:")
        print(f"python -m experiments.label --tasks={program.out} --labellers=NAME,NAME (docs/labelling.md)")
        return
    labels = [label for row in rows for label in row["labels"]]
    whole = sum(all(row["labels"]) for row in rows) / len(rows)
    print(f"right: {sum(labels) / len(labels):.1%} of the steps; {whole:.1%} of the solutions have no wrong one")


def main(program: Label) -> None:
    """Runs it."""
    sampling = check_flags(program)
    asked = prompts.read(program.prompts)[: program.rows]
    check_prompts(program, asked)
    out = open_out(program.out)
    run.use_compile_cache()
    policy = open_policy(program.model, flag="--model")
    subject = Subject(program.model, policy.model, policy.params, policy.tokenizer, policy.end_ids)
    encoder, sampler = (
        Encoder(policy.tokenizer, program.chat_template),
        Sampler(policy.model, samples=program.solutions),
    )
    texts, tools = [one.text for one in asked], [one.tools for one in asked]
    answers = answer(subject, encoder, sampler, texts, sampling, program.seed, tools).texts
    pattern, empty = step_pattern(program.step_end, "--step_end"), 0
    of, solutions = [], []
    for one, several in zip(asked, answers, strict=True):
        for text in dict.fromkeys(several):
            empty += not text.strip()
            if text.strip():
                of.append(one)
                solutions.append(cut(text, ends_of(text, pattern)))
    if not solutions:
        raise UserError("the model wrote nothing, so there is no step to label; raise --max_new_tokens.")
    told = labelled(program, subject, encoder, sampling, of, solutions)
    rows, lost = rows_of(program, of, solutions, told), told.count(None)
    if not rows:
        raise UserError("in every solution a step ends inside a token; give another --step_end.")
    left = {"without text": empty} | ({"with a step that ends inside a token": lost} if lost else {})
    tell(program, rows, sum(map(len, answers)), left)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {out}")


if __name__ == "__main__":
    flags.run(main, Label)
