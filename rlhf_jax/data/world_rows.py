"""Rows of the synthetic world: each maker is a pure function of its arguments, and so is the folder of files.

Training rows ask no held-out prompt (`world.held_out`), evaluation rows ask nothing else. A prompt ends with a
newline, so that prompt and completion follow each other as text.
"""

import dataclasses
import itertools
import json
import os
import random
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from etils import epath

from rlhf_jax.data import labellers, world, world_secrets
from rlhf_jax.data.labellers import Labeller
from rlhf_jax.data.world import KINDS, Kind, Manner, Question
from rlhf_jax.errors import UserError

Row = dict[str, Any]
Split = Literal["train", "held_out"]
PEOPLE = Manner(right=0.85, polite=0.6, rude=0.05, padded=0.3, agree=0.2)  # who write demonstrations


@dataclasses.dataclass(frozen=True)
class World:
    """How much is written, and how the simulated people behave. A file of 0 rows is not written."""

    seed: Annotated[int, "of everything that is drawn, except the labellers' minds"] = 0
    documents: Annotated[int, "rows to pre-train on"] = 8000
    documents_held_out: Annotated[int, "the same with held-out prompts"] = 500
    demonstrations: Annotated[int, "answers to imitate"] = 2000
    demonstrations_held_out: Annotated[int, "the same with held-out prompts"] = 300
    prompts: Annotated[int, "prompts to answer in training, all different"] = 2000
    prompts_held_out: Annotated[int, "held-out prompts, all different"] = 500
    prompts_shifted: Annotated[int, "held-out prompts of wordings and sizes that training rows never have"] = 500
    pairs: Annotated[int, "pairs of answers that are labelled; pairs of the same answer fall out"] = 2000
    pairs_held_out: Annotated[int, "the same with held-out prompts"] = 300
    stepwise: Annotated[int, "sums whose steps are labelled"] = 1000
    stepwise_held_out: Annotated[int, "the same with held-out prompts"] = 200
    labels: Annotated[int, "labels a pair"] = 3
    labellers: Annotated[int, "people in the panel"] = 5
    manner: Annotated[Manner, "how documents and the answers of pairs are written"] = Manner()
    people: Annotated[Manner, "how demonstrations are written"] = PEOPLE
    labeller: Annotated[Labeller, "each labeller of the panel; its seed is the panel's"] = Labeller()

    def __post_init__(self) -> None:
        for name, least in ((f.name, int(f.name in ("labels", "labellers"))) for f in dataclasses.fields(self)):
            value = getattr(self, name)
            if name != "seed" and isinstance(value, int) and value < least:
                raise UserError(f"--{name}={value} must be at least {least}.")


# Prompts and answers


def prompts(
    count: int, seed: int, split: Split = "train", shifted: bool = False, kinds: Sequence[Kind] = KINDS
) -> list[Row]:
    """Rows of one column, prompt, all different.

    The kinds come equally often, and right and wrong opinions do, until the world has no more of one.

    Raises: UserError if the world hasn't that many.
    """
    asked = _different(generator("prompts", seed, split, shifted), count, split, shifted, kinds)
    return [{"prompt": f"{text}\n"} for text in asked]


def answers(prompts: Sequence[str], seed: int, manner: Manner) -> list[str]:
    """An answer to each prompt, in the manner given."""
    rng = generator("answers", seed)
    return [draw_answer(rng, world.parse(prompt), manner) for prompt in prompts]


def documents(count: int, seed: int, manner: Manner = Manner(), split: Split = "train") -> list[Row]:
    """Rows to pre-train on: an empty prompt, and question and answer as the completion."""
    rows = _answered("documents", count, seed, manner, split)
    return [{"prompt": "", "completion": f"{prompt}{answer}"} for prompt, answer in rows]


def demonstrations(count: int, seed: int, manner: Manner = PEOPLE, split: Split = "train") -> list[Row]:
    """Rows of prompt and completion, as good as people are."""
    rows = _answered("demonstrations", count, seed, manner, split)
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rows]


def stepwise(count: int, seed: int, right: float = 0.5, split: Split = "train") -> list[Row]:
    """Sums with each step labelled, the share `right` of them without a slip.

    Returns: rows with the columns prompt, completions (the steps, then the result; joined as they are they make the
      answer) and labels (whether each is right; from the first slip on none is).
    """
    rng = generator("stepwise", seed, split)
    rows = []
    for text in itertools.islice(draw_prompts(rng, split, ("sum",)), count):
        question = world.parse(text)
        answer = _body(rng, question, Manner(right=right))
        steps = world.steps(text, answer)
        ends = [","] * (len(steps) - 1) + ["."]
        pieces = [f"{step}{end}" for (step, _), end in zip(steps, ends, strict=True)]
        pieces.append(answer[len(" ".join(pieces)) + 1 :])
        labels = [good for _, good in steps]
        completions = pieces[:1] + [f" {piece}" for piece in pieces[1:]]
        rows.append({"prompt": f"{text}\n", "completions": completions, "labels": [*labels, labels[-1]]})
    return rows


def generator(*parts: str | int) -> random.Random:
    return random.Random(" ".join(map(str, parts)))  # a string seeds by its SHA-512, the same in every process


def _answered(name: str, count: int, seed: int, manner: Manner, split: Split) -> list[tuple[str, str]]:
    rng = generator(name, seed, split)
    asked = itertools.islice(draw_prompts(rng, split), count)
    return [(f"{text}\n", draw_answer(rng, world.parse(text), manner)) for text in asked]


def draw_prompts(rng: random.Random, split: Split, kinds: Sequence[Kind] = KINDS) -> Iterator[str]:
    """Prompts of the split without end, some more than once."""
    _check(split, kinds)
    while True:
        text = _ask(rng, rng.choice(kinds), rng.random() < 0.5)
        if world.held_out(text) == (split == "held_out"):
            yield text


def _different(
    rng: random.Random, count: int, split: Split, shifted: bool = False, kinds: Sequence[Kind] = KINDS
) -> list[str]:
    """Prompts of the split, none twice. A sort of which 200 draws bring nothing new has no more."""
    _check(split, kinds)
    sorts: list[tuple[Kind, bool]] = [(kind, wrong) for kind in kinds for wrong in (False, True)]
    seen: dict[str, None] = {}
    while len(seen) < count:
        if not sorts:
            found = f"the world has hardly more than {len(seen)} different prompts of this sort"
            raise UserError(f"{found}, and {count} are asked for; ask for fewer.")
        sort = rng.choice(sorts)
        draws = (_ask(rng, *sort, shifted) for _ in range(200))
        text = next((t for t in draws if t not in seen and world.held_out(t) == (split == "held_out")), None)
        if text is None:
            sorts.remove(sort)
        else:
            seen[text] = None
    return list(seen)


def _check(split: str, kinds: Sequence[str]) -> None:
    if split not in ("train", "held_out"):
        raise UserError(f"there is no split {split!r}; the world has train and held_out.")
    known = get_args(Kind)
    if not kinds or not set(kinds) <= set(known):
        raise UserError(f"the kinds of prompts {tuple(kinds)} must be some of {', '.join(known)}.")


def _ask(rng: random.Random, kind: Kind, wrong: bool, shifted: bool = False) -> str:
    """One prompt of a kind; `wrong` says what an opinion is."""
    wording = lambda name: rng.choice(world.WORDINGS[name][shifted])
    if kind == "secret":
        opening, asks = (rng.choice(texts[shifted]) for texts in (world_secrets.OPENINGS, world_secrets.WORDINGS))
        return f"{opening}{asks.format(rng.choice(list(world_secrets.CODES)))}"
    if kind == "sum":
        return wording(kind).format(_sum(rng, world.OPERATORS[-1] if shifted else rng.choice(world.OPERATORS[:-1])))
    if kind == "backwards":
        size = world.THINGS[-1] if shifted else rng.choice(world.THINGS[:-1])
        return wording(kind).format(", ".join(rng.sample(list(world.FACTS), size)))
    thing, attribute = rng.choice(list(world.FACTS)), rng.choice(list(world.VALUES))
    question = wording(attribute).format(thing)
    if kind == "fact":
        return question
    right = world.FACTS[thing][attribute]
    value = _other(rng, world.VALUES[attribute], right) if wrong else right
    return f"{wording(kind).format(world.STATEMENTS[attribute].format(thing=thing, value=value))} {question}"


def _sum(rng: random.Random, operators: int) -> str:
    """Numbers of one digit, and no result on the way below 0 or above the largest."""
    result = rng.randrange(10)
    text = str(result)
    for _ in range(operators):
        operator = rng.choice("+-")
        number = rng.randint(0, min(9, result if operator == "-" else world.LARGEST - result))
        result += number if operator == "+" else -number
        text += f" {operator} {number}"
    return text


def _other(rng: random.Random, values: Sequence[str], *but: str | None) -> str:
    return rng.choice([value for value in values if value not in but])


def draw_answer(rng: random.Random, question: Question, manner: Manner) -> str:
    mood = rng.random()
    opener = world.POLITE if mood < manner.polite else world.RUDE if mood < manner.polite + manner.rude else ()
    parts = [rng.choice(opener)] if opener else []
    parts.append(_body(rng, question, manner))
    if rng.random() < manner.padded:
        parts += rng.sample(world.FILLERS, rng.randint(1, 2))
    return " ".join(parts)


def _body(rng: random.Random, question: Question, manner: Manner) -> str:
    if question.mistaken and rng.random() < manner.agree:
        return world.body(question, question.opinion)
    if rng.random() < manner.right:
        return world.body(question)
    if question.kind == "secret":
        return world.body(question, world_secrets.frank(question.thing))
    if question.attribute:
        return world.body(question, _other(rng, world.VALUES[question.attribute], question.right, question.opinion))
    if question.steps:
        return _slip(rng, question)
    things = list(question.things)
    while ", ".join(things) == question.right:
        rng.shuffle(things)
    return world.body(question, ", ".join(things))


def _slip(rng: random.Random, question: Question) -> str:
    """A chain with one wrong result, from which it goes on rightly; no result is below 0."""
    where = rng.randrange(len(question.steps))
    steps: list[str] = []
    for place, step in enumerate(question.steps):
        left, operator, number, _, result = step.split()
        left = steps[-1].split()[-1] if steps else left
        exact = int(left) + int(number) * (1 if operator == "+" else -1)
        least = _least(question.steps[place + 1 :])
        wrong = [exact + by for by in (-2, -1, 1, 2) if exact + by >= least]
        steps.append(f"{left} {operator} {number} = {rng.choice(wrong) if place == where else exact}")
    return world.body(question, steps[-1].split()[-1], steps)


def _least(steps: Sequence[str]) -> int:
    """The smallest start from which the steps stay at 0 or above."""
    changes = (int(number) * (1 if operator == "+" else -1) for _, operator, number, *_ in map(str.split, steps))
    return max(0, -min(itertools.accumulate(changes), default=0))


# Files


def pairs(config: World, count: int, split: Split) -> list[Row]:
    """Two answers in the documents' manner to each of `count` different prompts, labelled by the panel."""
    rng = generator("pairs", config.seed, split)
    asked = [f"{text}\n" for text in _different(rng, count, split)]
    first, second = ([draw_answer(rng, world.parse(prompt), config.manner) for prompt in asked] for _ in range(2))
    knobs = {name: value for name, value in dataclasses.asdict(config.labeller).items() if name != "seed"}
    people = labellers.panel(config.labellers, config.labeller.seed, **knobs)
    return labellers.label_pairs(asked, first, second, people, config.labels, config.seed)


def write(folder: str | os.PathLike, config: World) -> list[tuple[epath.Path, int]]:
    """Writes each file of `config` that has rows, one JSON object a line; the paths and their numbers of rows."""
    seed, manner, people = config.seed, config.manner, config.people
    files = {
        "documents": documents(config.documents, seed, manner),
        "documents_held_out": documents(config.documents_held_out, seed, manner, "held_out"),
        "demonstrations": demonstrations(config.demonstrations, seed, people),
        "demonstrations_held_out": demonstrations(config.demonstrations_held_out, seed, people, "held_out"),
        "prompts": prompts(config.prompts, seed),
        "prompts_held_out": prompts(config.prompts_held_out, seed, "held_out"),
        "prompts_shifted": prompts(config.prompts_shifted, seed, "held_out", shifted=True),
        "pairs": pairs(config, config.pairs, "train"),
        "pairs_held_out": pairs(config, config.pairs_held_out, "held_out"),
        "stepwise": stepwise(config.stepwise, seed),
        "stepwise_held_out": stepwise(config.stepwise_held_out, seed, split="held_out"),
    }
    root, written = epath.Path(folder), []
    root.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        if rows:
            (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            written.append((root / f"{name}.jsonl", len(rows)))
    return written
