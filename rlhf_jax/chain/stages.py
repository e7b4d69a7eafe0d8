"""The stages of a chain, one after the other, and what may change between two calls."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
from etils import epath

from rlhf_jax import run, worlds
from rlhf_jax.chain import checks, labels, stage
from rlhf_jax.chain.config import PEOPLE, STAGES, Chain, filled
from rlhf_jax.config import MAY_CHANGE_ON_RESUME
from rlhf_jax.errors import UserError
from rlhf_jax.workdir import open_policy

# Which stages are made from what a stage makes.
USED_BY = {"sft": STAGES[1:], "labels": ("reward", "ppo", "dpo"), "reward": ("ppo",), "ppo": (), "dpo": ()}
# What decides nothing of what a stage makes: it may change also where others were made from that.
DECIDES = ("train.", "evaluate.", "checkpoint.")
FREE = tuple(name for name in MAY_CHANGE_ON_RESUME if not name.startswith(DECIDES))
RECORD = "chain.json"


class Products(NamedTuple):
    """What the stages left: a model folder, a file of rankings, a reward model, and two models that write."""

    sft: str
    labels: str | None  # None where nothing needed any
    reward: str
    ppo: str
    dpo: str


# Resuming


def open_chain(place: epath.Path, chain: Chain) -> None:
    """Takes the folder for this chain. Errors: UserError where it holds another, of which something is made."""
    stage.hold(place, chain, RECORD, lambda leaf: _made_with(leaf, place, chain))


def _made_with(leaf: str, place: epath.Path, chain: Chain) -> str | None:
    """A stage that is begun and that the value of this field decides."""
    section, _, name = leaf.partition(".")
    decides = {"seed": STAGES, "prompts": ("labels", *USED_BY["labels"]), "inputs": USED_BY.get(name, ())}
    if section in chain.made and not name.startswith(FREE):
        # A run itself says what of its own config may change while nothing is made from it.
        own = () if section != "labels" and name.startswith(MAY_CHANGE_ON_RESUME) else (section,)
        decides[section] = (*own, *USED_BY[section])
    return next((made for made in decides.get(section, ()) if begun(place, made)), None)


def begun(place: epath.Path, name: str) -> bool:
    """Whether a stage has left something to go on from."""
    marks = ("rankings.jsonl", "blank.jsonl") if name == "labels" else ("config.json", "members")
    return any((place / name / mark).exists() for mark in marks)


# Running


def train(chain: Chain, workdir: str) -> Products | None:
    """Runs the stages that aren't finished; what all of them left, or None where people have to rank first.

    Errors: UserError for whatever the user can mend, before the first stage as far as it can be seen there.
    """
    if not workdir:
        raise UserError("--workdir is empty; give the folder that the chain writes to.")
    if jax.process_count() > 1:
        raise UserError(
            f"a chain runs on one process, and here are {jax.process_count()}; run its stages there one by one, with "
            "python -m experiments.train, and name what they leave in --config.inputs.*."
        )
    place = epath.Path(os.path.expanduser(workdir))
    checks.check(chain)
    checks.check_made(chain)
    open_chain(place, chain)
    products = {"sft": _start(chain, place)}
    if chain.inputs.labels is not None:
        products["labels"] = checks.local(chain, chain.inputs.labels)
    elif "labels" in chain.made:
        file = _label(chain, place, products["sft"])
        if chain.labels.by == PEOPLE:
            print(
                "people rank now: fill in ranks (a number a completion, the smallest the best) and labeller in a copy "
                f"of {file}, or let them do it on a page (docs/labelling.md):\n"
                f"  python -m experiments.label --tasks={file} --labellers=NAME,NAME\n"
                f"  python -m experiments.label --tasks={file} --export=COPY\n"
                "the second when enough is ranked; then give the same command with --config.inputs.labels=COPY"
            )
            return None
        products["labels"] = os.fspath(file)
    for name in ("reward", "ppo", "dpo"):
        products[name] = getattr(chain.inputs, name) or _trained(chain, name, place, products)
    return Products(**{"labels": None, **products})  # pyright: ignore[reportArgumentType]


def _trained(chain: Chain, name: str, place: epath.Path, products: Mapping[str, str]) -> str:
    """Trains a stage to its end; the run, at its best checkpoint where its patience may have decided the end."""
    return stage.train(filled(chain, name, products), place / name, name)


def _start(chain: Chain, place: epath.Path) -> str:
    """The folder of the SFT model, which the others start from: a run is written out as one."""
    given = chain.inputs.sft
    if given is not None and given.startswith(worlds.PREFIX):
        return os.fspath(worlds.model(given, chain.cache, run.train, "--config.inputs.sft"))
    if given is not None and not stage.is_run(given):
        return given
    policy = open_policy(given or _trained(chain, "sft", place, {}), flag="--config.inputs.sft")
    return stage.model_folder(policy, place / "sft")


def _label(chain: Chain, place: epath.Path, model: str) -> epath.Path:
    """The file of rankings, or that which people fill in a copy of; drawn and ranked if it isn't there."""
    section, folder = chain.labels, place / "labels"
    file = folder / ("blank.jsonl" if section.by == PEOPLE else "rankings.jsonl")
    if not file.exists():
        print(f"\nlabels: {section.answers} answers to each prompt, ranked by {section.by}, in {folder}", flush=True)
        asked = checks.asked(chain, chain.prompts, section.rows, "--config.prompts")
        rows = labels.collect(section, worlds.open_subject("sft", model), asked, chain.seed)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{file.name}.part"
        worlds.write(part, rows)
        part.replace(file)
        print(f"labels: {labels.told(rows, len(asked))}", flush=True)
    return file
