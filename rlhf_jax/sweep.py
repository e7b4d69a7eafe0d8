"""Many experiments from one config: the product of the values of some fields, trained together where they can be.

Members that differ in numbers alone share one compiled program, one reading of the rows and one reference pass, and
take each step at once; each leaves the folder that it would have left alone.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, get_origin

from etils import epath

from rlhf_jax import fields, objective, worlds
from rlhf_jax.build import Built, Memory, build
from rlhf_jax.checks import check
from rlhf_jax.config import Config
from rlhf_jax.errors import UserError
from rlhf_jax.members import Way
from rlhf_jax.run import Run, announce, begin, train
from rlhf_jax.workdir import open_workdir

LONGEST_NAME = 200  # of a folder


class Planned(NamedTuple):
    """One member of a sweep."""

    name: str  # "loss.name=dpo,loss.beta=0.1,seed=0"; also that of its folder
    values: dict[str, Any]  # of the fields that are swept
    config: Config


class Ready(NamedTuple):
    """A member that was checked and can be trained."""

    member: Planned
    built: Built
    step: int | None  # the checkpoint that it goes on from


def expand(text: str, config: Config) -> list[Planned]:
    """The members of `FIELD=VALUE,VALUE;FIELD=VALUE,...`: every combination, the last field's values changing first.

    The values of a field stand between commas, or between bars where they hold commas themselves.
    Errors: UserError for a field that there isn't, one given twice, and a value that it can't have.

    >>> [member.name for member in expand("loss.beta=0.1,0.3;seed=0", Config())]
    ['loss.beta=0.1,seed=0', 'loss.beta=0.3,seed=0']
    """
    leaves = {leaf.path: leaf for leaf in fields.leaves(config)}
    choices: dict[str, list[Any]] = {}
    for clause in filter(None, (part.strip() for part in text.split(";"))):
        path, equals, words = clause.partition("=")
        path = path.strip()
        if path not in leaves:
            near = fields.nearest(path, leaves)
            raise UserError(f"--sweep names the field {path!r}, which there isn't; the nearest is {near}.")
        if path in choices:
            raise UserError(f"--sweep names {path} twice; give all its values at once, with commas between.")
        choices[path] = [_value(leaves[path], word) for word in _words(leaves[path], words if equals else "")]
        if len({fields.text(value) for value in choices[path]}) < len(choices[path]):
            raise UserError(f"--sweep gives {path} a value twice: {words}; name each once.")
    if not choices:
        raise UserError("--sweep is empty; give fields and values, such as 'loss.beta=0.03,0.1,0.3;seed=0,1,2'.")
    made = []
    for values in itertools.product(*choices.values()):
        given = dict(zip(choices, values, strict=True))
        name = ",".join(f"{path}={fields.text(value)}" for path, value in given.items())
        made.append(Planned(name, given, fields.replace(config, given)))
    return made


def _words(leaf: fields.Field, words: str) -> list[str]:
    holds_commas = get_origin(fields.bare(leaf.type)) is tuple
    several = words.split("|") if "|" in words or holds_commas else words.split(",")
    return [word.strip() for word in several]


def _value(leaf: fields.Field, word: str) -> Any:
    try:
        return leaf.kind.attempt(leaf.kind.read, word)
    except ValueError as error:
        raise UserError(f"--sweep gives {leaf.path} the value {word!r}, but {error}.") from None


def folder(workdir: epath.Path, member: Planned) -> epath.Path:
    """Where a member's run lies."""
    name = re.sub(r"[^\w.,=+@-]", "_", member.name)
    if len(name) > LONGEST_NAME:
        raise UserError(f"the member {member.name[:80]}... has too long a name for a folder; sweep fewer fields.")
    return workdir / "members" / name


def ready(members: Sequence[Planned], workdir: epath.Path, memory: Memory) -> list[Ready]:
    """Checks every member before anything is compiled; what they read alike is read once.

    Errors: UserError naming the first member that can't be run, as `run.train` alone would refuse it.
    """
    for member in members:  # all of them before a world is made
        with _named(member):
            check(member.config)
    made = []
    for member in members:
        config, place = worlds.provide(member.config, train), folder(workdir, member)
        with _named(member):
            step = open_workdir(place, config, resume=True)
            made.append(Ready(member, build(config, place, memory), step))
    return made


@contextmanager
def _named(member: Planned) -> Iterator[None]:
    """Says whose mistake it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"member {member.name}: {error}") from error


def program(one: Ready) -> str:
    """What two members must have in common to share a program: all but numbers, and how far they are."""
    hyper, config = one.built.hyper, one.built.config
    numbers = {f"optimizer.{name}" for name in hyper["optimizer"]} | {"loss.weights", "train.balance"}
    numbers |= {f"loss.{name}" for arguments in hyper["loss"].values() for name in arguments}
    numbers |= {f"preference.{name}" for name in hyper.get("preference", {})}
    if config.model.init == "checkpoint":  # else the seed makes the weights that all members share
        numbers.add("seed")
    if config.evaluate.patience:  # a run that ends when it likes goes alone
        numbers = set()
    if one.built.online is not None:  # rollouts are drawn and scored on the host, one experiment at a time
        return one.member.name
    same = {leaf.path: fields.text(leaf.value) for leaf in fields.leaves(config) if leaf.path not in numbers}
    return repr((same, one.built.steps, one.step, sorted(hyper)))


def groups(members: Sequence[Ready], together: int) -> list[list[Ready]]:
    """Members that share a program, in the order of the sweep, at most `together` a group and groups of like size."""
    by_program: dict[str, list[Ready]] = {}
    for one in members:
        by_program.setdefault(program(one), []).append(one)
    made = []
    for same in by_program.values():
        count = math.ceil(len(same) / together)
        made += [same[i * len(same) // count : (i + 1) * len(same) // count] for i in range(count)]
    return made


def train_group(group: Sequence[Ready], way: Way = "map") -> None:
    """Trains the members of one group to their last step, or leaves them as they are if they are there.

    Args: way: how they take a step together, see `members.Axis`.
    """
    first = group[0]
    if first.step is not None and first.step >= first.built.steps:
        return
    for one in group:
        begin(one.built, one.step)
    announce(first.built)
    names = ", ".join(one.member.name for one in group)
    print(f"together: {len(group)} members in one program: {names}", flush=True)
    Run([one.built for one in group], first.step, way).train()


def ensemble(config: Config) -> list[Planned]:
    """The members of the ensemble that a config asks for: alike but for their seeds, held to the same rows."""
    split_seed = config.seed if config.data.split_seed is None else config.data.split_seed
    alone = fields.replace(config, {"reward.members": 1, "data.split_seed": split_seed})
    seeds = [{"seed": (config.seed + number) % 2**32} for number in range(config.reward.members)]
    return [Planned(f"seed={one['seed']}", one, fields.replace(alone, one)) for one in seeds]


def train_ensemble(config: Config, workdir: str, resume: bool = False) -> None:
    """Trains `config.reward.members` models in one program; each leaves `members/seed=N`, a run that stands alone.

    Args: as of `run.train`.
    Errors: UserError as `run.train` would refuse a member, and for a folder that holds a run or an ensemble already.
    """
    if not workdir:
        raise UserError("--workdir is empty; give the folder that the run writes to.")
    place, members = epath.Path(os.path.expanduser(workdir)), ensemble(config)
    if (place / "config.json").exists():
        raise UserError(f"workdir {workdir!r} holds a single model, not an ensemble; give another --workdir.")
    if not resume and (place / "members").exists():
        raise UserError(f"workdir {workdir!r} already holds an ensemble; continue it with --resume or give another.")
    for group in groups(ready(members, place, Memory()), len(members)):  # several if a kill parted their checkpoints
        train_group(group)


def shard(members: Sequence[Planned], part: str) -> list[Planned]:
    """The part i of n, written i/n with 1 <= i <= n; neighbours, so that they may share programs.

    Errors: UserError for anything else.

    >>> [member.name for member in shard(expand("seed=0,1,2,3,4", Config()), "2/2")]
    ['seed=2', 'seed=3', 'seed=4']
    """
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", part)
    number, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise UserError(f"--shard={part} is not allowed; it is i/n, the part i of n machines, from 1/n to n/n.")
    return list(members[(number - 1) * len(members) // of : number * len(members) // of])


def effective(config: Config) -> Iterator[tuple[str, Any]]:
    """The loss's name and the hyper-parameters that it has, whether given or by default."""
    chosen = objective.choose(config)
    yield "name", config.loss.name
    several = len(chosen.parts) > 1
    for part in chosen.parts:
        for name, value in {**chosen.hyper["loss"][part.name], **part.options}.items():
            yield (f"{part.name}.{name}" if several else name), value
        if several:
            yield f"{part.name}.weight", chosen.hyper["weights"][part.name]
    yield from chosen.hyper.get("preference", {}).items()
