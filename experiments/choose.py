"""Chooses which pairs of answers people compare next: python -m experiments.choose --rows=FILE --out=FILE.jsonl ...

Reads prompts with several answers, of which some may be ranked, and writes as many pairs as a budget pays, in the form
that `python -m experiments.label --tasks=FILE` lets people rank. docs/choosing.md says what each strategy looks for.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Hashable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import numpy as np

from experiments.rank import open_out
from rlhf_jax import flags, run
from rlhf_jax.data import formats, sources
from rlhf_jax.data.rows import Left, Ranking, Refusal, Text
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.evaluate.states import Read, states
from rlhf_jax.feedback import choosing
from rlhf_jax.feedback.choosing import READS, STRATEGIES, Budget, Pool
from rlhf_jax.workdir import open_model, open_rewards

Strategy = Literal["prediction", "information", "disagreement", "diversity", "random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choose:
    """Chooses pairs of answers for people to compare, as many as a budget pays, and writes them as tasks."""

    rows: Annotated[tuple[str, ...], "files of prompts with completions; rows that have ranks count as labelled"]
    out: Annotated[str, "JSONL file to write; it must not exist"]
    strategy: Annotated[Strategy, "what the pairs are chosen by"] = "prediction"
    model: Annotated[str | None, "run, model folder or Hub name whose hidden states describe the answers"] = None
    read: Annotated[Read, "hidden states: their mean over the answer, or the last one, as a reward model does"] = "mean"
    rewards: Annotated[str | None, "ensemble of reward models, for disagreement"] = None
    clear: Annotated[float, "choose from this share of the pairs, the clearest by what is labelled; 1: from all"] = 1.0
    money: Annotated[float | None, "what may be spent, in any currency; none: as much as it takes"] = None
    hours: Annotated[float | None, "hours of people's time that may be spent; none: as many as it takes"] = None
    price: Annotated[float, "what a label costs"] = 0.0
    seconds: Annotated[float, "how long a person takes for a label"] = 0.0
    labels: Annotated[int, "people that compare each pair"] = 1
    pairs: Annotated[int | None, "most pairs chosen; none: what the budget pays"] = None
    max_per_prompt: Annotated[int | None, "most pairs chosen of a prompt; none: any number"] = None
    pool: Annotated[int, "most pairs looked at; of more, as many by chance"] = 20000
    chat_template: Annotated[str | None, "Jinja file used in the place of the tokenizer's chat template"] = None
    seed: Annotated[int, "of random, of the pairs looked at, and of which answer stands first"] = 0


LEAST = {"labels": 1, "pairs": 1, "max_per_prompt": 1, "pool": 1}


def check_flags(program: Choose) -> int:
    """How many pairs may be chosen. Errors: UserError for whatever can be seen before anything is opened."""
    if not program.rows or not program.out:
        raise UserError("--rows and --out name what is read and written; give --rows=FILE,FILE and --out=FILE.jsonl.")
    for name, least in LEAST.items():
        if (value := getattr(program, name)) is not None and value < least:
            raise UserError(f"--{name}={value} is not allowed; it must be at least {least}.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    if not 0 < program.clear <= 1:
        raise UserError(f"--clear={program.clear} is not allowed; it must be above 0 and at most 1.")
    _check_models(program)
    for have, each in (("money", "price"), ("hours", "seconds")):
        if (getattr(program, have) is not None) and not getattr(program, each):
            raise UserError(f"--{have} has no end while a label takes none of it; give --{each} of a label too.")
    paid = Budget(program.money, program.hours).labels_for(program.price, program.seconds)
    if paid is None and program.pairs is None:
        raise UserError(
            "nothing says how much may be spent; give --money and --price, --hours and --seconds, or --pairs."
        )
    most = min(n for n in (None if paid is None else paid // program.labels, program.pairs) if n is not None)
    if not most:
        raise UserError(
            f"the budget pays {paid} labels, and a pair takes {program.labels}; raise it or lower --labels."
        )
    return most


def _check_models(program: Choose) -> None:
    """Errors: UserError where the strategy lacks what it reads, or doesn't read what is given."""
    reads = READS[program.strategy]
    if program.model is None and (reads == "features" or program.clear < 1):
        what = f"--strategy={program.strategy}" if reads == "features" else f"--clear={program.clear}"
        raise UserError(f"{what} reads what a model knows of the answers; give --model=RUN, or --strategy=random.")
    if program.rewards is None and reads == "scores":
        raise UserError(
            f"--strategy={program.strategy} reads scores of several reward models; give --rewards=ENSEMBLE."
        )
    if program.model is not None and reads != "features" and program.clear == 1:
        raise UserError(f"--strategy={program.strategy} does not read --model; drop it or give --clear below 1.")
    if program.rewards is not None and reads != "scores":
        raise UserError(f"--strategy={program.strategy} does not read --rewards; drop it or take disagreement.")
    if program.model is None and program.read != "mean":
        raise UserError("--read says how --model is read, and there is none; drop it.")


class Found(NamedTuple):
    """What files hold: answers to prompts, every two of a prompt, and what people said of some."""

    prompts: list[Text]  # of each answer
    tools: list[str]
    texts: list[Text]
    group: list[int]  # the answer's prompt
    labelled: list[tuple[int, int]]
    label: list[float]

    @property
    def pairs(self) -> np.ndarray:
        """[P, 2] places among the answers: every two of a prompt."""
        places: dict[int, list[int]] = {}
        for place, prompt in enumerate(self.group):
            places.setdefault(prompt, []).append(place)
        found = [pair for mine in places.values() for pair in itertools.combinations(mine, 2)]
        return np.asarray(found, np.int64).reshape(-1, 2)


def read(paths: Sequence[str]) -> Found:
    """The answers, each once a prompt. Errors: UserError naming the first row that can't be used."""
    found = Found([], [], [], [], [], [])
    known: dict[Hashable, int] = {}
    prompts: dict[Hashable, int] = {}
    for record in (record for path in paths for record in sources.read(path, flag="--rows")):
        if isinstance(record, sources.Refused):
            raise UserError(f"{record.where} can't be used ({record.reason}); mend it.")
        columns, answers = record.columns, record.columns.get("completions")
        ranks = columns.get("ranks", list(range(len(answers))) if isinstance(answers, list) else [])
        try:
            (row,) = formats.adapt("ranking", {**columns, "ranks": ranks}, True, ties=True)
        except Left:
            continue  # one answer alone
        except Refusal as reason:
            raise UserError(f"{record.where} can't be used ({reason}); mend it.") from None
        assert isinstance(row, Ranking)
        prompt = prompts.setdefault((row.prompt, row.tools), len(prompts))
        places = []
        for text in row.completions:
            key = prompt, text.strip() if isinstance(text, str) else text
            if key not in known:
                known[key] = len(found.texts)
                found.prompts.append(row.prompt)
                found.tools.append(row.tools)
                found.texts.append(text)
                found.group.append(prompt)
            places.append(known[key])
        if "ranks" in columns:
            for (i, a), (j, b) in itertools.combinations(zip(places, row.ranks, strict=True), 2):
                if i != j:
                    found.labelled.append((i, j))
                    found.label.append(0.5 if a == b else float(a < b))
    if not len(found.pairs):
        raise UserError(f"--rows={','.join(paths)} holds no two different answers to a prompt, so there is no choice.")
    return found


def pool_of(program: Choose, found: Found) -> Pool:
    """What the strategy chooses from, without what models know. Errors: UserError if nothing is left to choose."""
    pairs, rng = found.pairs, np.random.default_rng(program.seed)
    known = {tuple(sorted(pair)) for pair in found.labelled}
    pairs = pairs[[tuple(pair) not in known for pair in pairs.tolist()]]
    if not len(pairs):
        raise UserError(f"all pairs of --rows={','.join(program.rows)} are labelled; give answers that are not.")
    if program.clear < 1 and not known:
        raise UserError("--clear goes by what is labelled, and nothing is; give rows with ranks too, or drop it.")
    if len(pairs) > program.pool:
        pairs = pairs[np.sort(rng.choice(len(pairs), program.pool, replace=False))]
    # Which of two answers stands first is a coin's: their order in the file may tell which model wrote them.
    turned = rng.random(len(pairs)) < 0.5
    pairs[turned] = pairs[turned, ::-1]
    labelled = np.asarray(found.labelled, np.int64).reshape(-1, 2)
    group = np.asarray(found.group)[pairs[:, 0]]
    return Pool(pairs, labelled=labelled, label=np.asarray(found.label), group=group, most=program.max_per_prompt)


def knowing(program: Choose, found: Found, pool: Pool) -> Pool:
    """The pool with what the models know of its answers. Errors: UserError as `open_model`, and for no ensemble."""
    used = np.unique(np.concatenate([pool.pairs.ravel(), pool.labelled.ravel()]))
    prompts, texts, tools = ([column[place] for place in used] for column in (found.prompts, found.texts, found.tools))
    spread = lambda values: np.zeros((len(found.texts), values.shape[1]))
    if program.rewards is not None:
        opened = open_rewards(program.rewards, flag="--rewards")
        if len(opened) < 2:
            raise UserError(
                f"--rewards={program.rewards} is one reward model, which agrees with itself; give an ensemble, which "
                "--config.reward.members trains, or another --strategy."
            )
        members = [Subject(program.rewards, p.model, p.params, p.tokenizer) for p in opened]
        rewards = Rewards(program.rewards, members, chat_template=program.chat_template)
        told = rewards.scores([row.ids for row in rewards.encode(prompts, texts, tools)]).T
        (scores := spread(told))[used] = told
        pool = dataclasses.replace(pool, scores=scores.T)
    if program.model is not None:
        one = open_model(program.model)
        subject = Subject(program.model, one.model, one.params, one.tokenizer)
        told = states(subject, prompts, texts, tools, read=program.read, chat_template=program.chat_template)
        (features := spread(told))[used] = told
        pool = dataclasses.replace(pool, features=choosing.standardised(features, pool.pairs))
        pool = choosing.clearest(pool, program.clear)
    return pool


def task(found: Found, pair: Sequence[int]) -> dict[str, Any]:
    """A pair as a blank ranking."""
    i, j = pair
    column = lambda text: text if isinstance(text, str) else [turn.fields for turn in text]
    row = {"prompt": column(found.prompts[i]), "completions": [column(found.texts[place]) for place in (i, j)]}
    tools = {"tools": json.loads(found.tools[i])} if found.tools[i] else {}
    return row | {"ranks": None, "labeller": None} | tools


def tell(program: Choose, found: Found, pool: Pool, chosen: Sequence[int]) -> None:
    """Prints what was chosen, what it costs, and what is left."""
    prompts, count = len({found.group[pool.pairs[place, 0]] for place in chosen}), len(chosen) * program.labels
    print(f"{len(pool.pairs)} pairs to choose from, {len(set(map(frozenset, found.labelled)))} labelled", end="")
    print(f"; chosen {len(chosen)} of {prompts} prompts by {program.strategy}, {len(pool.pairs) - len(chosen)} left")
    spent = {"money": (count * program.price, program.money), "hours": (count * program.seconds / 3600, program.hours)}
    for what, (cost, have) in spent.items():
        if cost:
            print(
                f"{what}: {cost:.2f} for {count} labels",
                end="\n" if have is None else f", {max(have - cost, 0):.2f} left\n",
            )


def main(program: Choose) -> None:
    """Runs it."""
    most = check_flags(program)
    out = open_out(program.out)
    found = read(program.rows)
    pool = pool_of(program, found)
    run.use_compile_cache()
    pool = knowing(program, found, pool)
    chosen = STRATEGIES[program.strategy](pool, min(most, len(pool.pairs)), program.seed).tolist()
    tell(program, found, pool, chosen)
    out.write_text("".join(json.dumps(task(found, pool.pairs[place].tolist())) + "\n" for place in chosen))
    print(f"wrote {out}; let people rank them on a page:")
    print(f"python -m experiments.label --tasks={program.out} --labels={program.labels} --labellers=NAME,NAME")


if __name__ == "__main__":
    flags.run(main, Choose)
