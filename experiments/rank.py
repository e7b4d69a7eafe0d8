"""Collects rankings of a model's answers: python -m experiments.rank --model=RUN --prompts=FILE --out=FILE.jsonl.

Simulated people rank them where the prompts are of the synthetic world; --labellers=0 leaves the ranks to real ones.
docs/rankings.md says what becomes of the rows.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath

from rlhf_jax import flags, run
from rlhf_jax.data import labellers, world
from rlhf_jax.data.labellers import Labeller
from rlhf_jax.data.prompts import Asked, read
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject, answer
from rlhf_jax.feedback import rankings
from rlhf_jax.sampling.distribution import Sampling, check
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.workdir import check_writable, open_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rank(Sampling):
    """Draws several answers to each prompt and writes people's rankings of them, a row a prompt and person."""

    model: Annotated[str, "workdir of a run (also WORKDIR@STEP, WORKDIR@best), model folder or Hub name"]
    prompts: Annotated[str, "file of prompts: rows with prompt or messages, or any other file's lines"]
    out: Annotated[str, "JSONL file to write; it must not exist"]
    rows: Annotated[int | None, "most prompts used; none: all"] = None
    answers: Annotated[int, "answers to each prompt"] = 4
    labels: Annotated[int, "people that rank the answers to a prompt"] = 3
    labellers: Annotated[int, "simulated people in the panel; 0: none, ranks are left for people to fill in"] = 5
    labeller: Annotated[Labeller, "each of the panel; its seed is the panel's"] = Labeller()
    chat_template: Annotated[str | None, "Jinja file used in the place of the tokenizer's chat template"] = None
    seed: Annotated[int, "of the answers, and of who is asked"] = 0


LEAST = {"answers": 2, "labels": 1, "labellers": 0, "rows": 1}


def check_flags(program: Rank) -> Sampling:
    """What says how answers are drawn. Errors: UserError for whatever can be seen before anything is opened."""
    sampling = Sampling(**{f.name: getattr(program, f.name) for f in dataclasses.fields(Sampling)})
    check(sampling, "--")
    for name, least in LEAST.items():
        if (value := getattr(program, name)) is not None and value < least:
            raise UserError(f"--{name}={value} is not allowed; it must be at least {least}.")
    if sampling.temperature == 0 or sampling.top_k == 1:
        raise UserError("all answers to a prompt would be the same; give a --temperature above 0, and no --top_k=1.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    of_people = (f for f in dataclasses.fields(program) if f.name in ("labels", "labeller"))
    if unread := [f.name for f in of_people if not program.labellers and getattr(program, f.name) != f.default]:
        raise UserError(f"--labellers=0 asks no simulated people and does not read --{unread[0]}; drop it.")
    if not program.out:
        raise UserError("there is no file to write; give --out=FILE.jsonl.")
    return sampling


def check_world(asked: Sequence[Asked]) -> None:
    """Errors: UserError naming the first prompt that simulated people can't judge an answer to."""
    for one in asked:
        try:
            world.parse(rankings.question_of(one.text))
        except UserError:
            raise UserError(
                f"{one.where} is no prompt of the synthetic world, and its people rank answers to no others; give "
                "--labellers=0 to leave the ranks to people, or prompts of python -m experiments.data --out=FOLDER."
            ) from None


def open_out(path: str) -> epath.Path:
    """The file to write. Errors: UserError if it is there, or its folder can't be written to."""
    out = epath.Path(os.path.expanduser(path))
    try:
        there = out.exists()
    except ImportError as error:  # gs:// needs a package of its own
        raise UserError(f"--out={path} can't be written ({error}); install it or give another file.") from error
    if there:
        raise UserError(f"--out={path} already exists; give a new file.")
    check_writable(out.parent, "out", "--out")
    return out


def ask(program: Rank, asked: Sequence[Asked], answers: Sequence[Sequence[str]]) -> list[rankings.Row]:
    """The rows, ranked or blank."""
    prompts = [one.text for one in asked]
    if program.labellers:
        knobs = {name: value for name, value in dataclasses.asdict(program.labeller).items() if name != "seed"}
        people = labellers.panel(program.labellers, program.labeller.seed, **knobs)
        return rankings.rank_answers(prompts, answers, people, program.labels, program.seed)
    return rankings.blank_rankings(prompts, answers, [one.tools for one in asked])


def tell(program: Rank, rows: Sequence[rankings.Row], answers: Sequence[Sequence[str]]) -> None:
    """Prints what was collected."""
    ranked = len(rows) // (program.labels if program.labellers else 1)
    print(f"{len(rows)} rows of {ranked} prompts; {len(answers) - ranked} left out, without two different answers")
    if not program.labellers:
        print(
            "fill in ranks (a number a completion, the smallest the best) and labeller, or let people rank on a page:"
        )
        print(f"python -m experiments.label --tasks={program.out} --labellers=NAME,NAME (docs/labelling.md)")
        return
    gold = [value for row in rows[:: program.labels] for value in row["gold"]]
    best = [row["gold"][row["ranks"].index(0.0)] for row in rows]
    print(f"gold: {sum(gold) / len(gold):.2f} on average, {sum(best) / len(best):.2f} of those ranked best")
    if min(program.labels, program.labellers) > 1:
        agreed, w = rankings.agreement(rows), rankings.concordance(rows)
        print(f"two people say the same of two answers: {agreed:.1%} (coins: 50%); Kendall's W: {w:.2f}", end="")
        print(f" (coins: {1 / program.labels:.2f})")


def main(program: Rank) -> None:
    """Runs it."""
    sampling = check_flags(program)
    asked = read(program.prompts)[: program.rows]
    if program.labellers:
        check_world(asked)
    out = open_out(program.out)
    run.use_compile_cache()
    policy = open_policy(program.model, flag="--model")
    subject = Subject(program.model, policy.model, policy.params, policy.tokenizer, policy.end_ids)
    encoder = Encoder(policy.tokenizer, program.chat_template)
    sampler = Sampler(policy.model, samples=program.answers)
    prompts, tools = [one.text for one in asked], [one.tools for one in asked]
    answers = answer(subject, encoder, sampler, prompts, sampling, program.seed, tools).texts
    rows = ask(program, asked, answers)
    if not rows:
        raise UserError("no prompt got two different answers, so there is nothing to rank; raise --temperature.")
    tell(program, rows, answers)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"wrote {out}")


if __name__ == "__main__":
    flags.run(main, Rank)
