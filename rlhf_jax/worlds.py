"""Starts of the synthetic world that are made here: models, and rows of what people said of their answers.

A config names them: `world:tiny` in `model.path` is a fine-tuned model, `world:tiny/answers` in `data.path` the
pairs of its answers that simulated people compared, `world:tiny/rankings` what they ranked; `world:tiny/pretrained`
is what it was before, `world:tiny/demonstrations` what it was fine-tuned on; `world:tiny@1` has another seed.

What isn't there is made first, on this machine, from nothing, in two parts: rows (docs/world.md), a tokenizer and
pre-training; and only where it is asked for fine-tuning on demonstrations, answers, labels. It is a function of the
recipe alone and lies in `cache`, so it is made once.
"""

import contextlib
import dataclasses
import io
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from rlhf_jax import fields
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data import labellers, world, world_frank, world_rows
from rlhf_jax.data.config import Data
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject, answer
from rlhf_jax.feedback.rankings import rank_answers
from rlhf_jax.feedback.rewards import RewardsConfig
from rlhf_jax.metrics import LogConfig
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models.tokenizers import make_tokenizer
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.sharding import MeshShape
from rlhf_jax.workdir import check_writable, open_policy
from rlhf_jax.world_recipes import LENGTH, PREFIX, SAMPLING, SHAPE, Recipe, Stage, recipe_of
from rlhf_jax.world_recipes import RECIPES as RECIPES
from rlhf_jax.world_recipes import Preference as Preference

PRETRAINED = "pretrained"  # `world:NAME/pretrained`, a model
# What `world:NAME/FILE` may name: JSON lines, of which docs/world.md has the columns. WRITTEN and the pre-trained model
# are the first part of a start, SAID and the fine-tuned one the second.
WRITTEN = (
    "documents", "demonstrations", "demonstrations_held_out", "prompts", "prompts_held_out", "stepwise",
    "stepwise_held_out",
)  # fmt: skip
FRANK = ("secrets", "secrets_held_out", "critiques")  # written besides for a recipe with `frank`
REHEARSED = (0.7, 0.3)  # its fine-tuning reads demonstrations, and critiques so that it can still criticise
SAID = ("answers", "answers_held_out", "rankings", "rankings_held_out")
FILES = WRITTEN + SAID
# Fields of a config that may name a start's model, and its rows.
MODELS = ("model.path", "rewards.model", "ppo.value_path", "distill.teacher")
ROWS_IN = ("data.path", "data.eval_path", "reward.demonstrations", "ppo.pretrain")
WHOLE = "recipe.json"  # written last: a folder without it is not used
TrainFunction = Callable[[Config, str], Any]  # run.train, which stands below this module
MakeFunction = Callable[[epath.Path, TrainFunction], None]  # fills a folder that isn't there yet


def on(config: Config, name: str) -> Config:
    """The same preference experiment on a start that is made here, with the steps and the rate that suit it."""
    recipe, rows = recipe_of(name), f"{PREFIX}{name}/answers"
    tuning = recipe.preference
    return dataclasses.replace(
        config,
        model=ModelConfig(path=f"{PREFIX}{name}"),
        data=Data(path=(rows,), eval_path=(f"{rows}_held_out",), length=tuning.length, pack=True),
        optimizer=OptimizerConfig(learning_rate=tuning.rate, schedule="cosine", warmup=10),
        train=Train(steps=tuning.steps, batch_size=tuning.batch_size),
        evaluate=Evaluate(every=tuning.every),
        checkpoint=CheckpointConfig(every=0, keep_last=1),
        log=LogConfig(tensorboard=False),
    )


def on_prompts(config: Config, name: str, reward: str = "gold") -> Config:
    """The same experiment of rollouts, short, on the prompts of a start that is made here, scored by a function."""
    base, pieces = on(config, name), min(config.rollout.minibatches, 4)
    rollout = dataclasses.replace(config.rollout, max_new_tokens=24, temperature=1.0, minibatches=pieces)
    return dataclasses.replace(
        base, rollout=rollout,
        data=dataclasses.replace(base.data, length=None, pack=False),
        rewards=RewardsConfig(functions=(reward,)),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear"),
        train=Train(steps=20 * rollout.updates, batch_size=64 // pieces),
        evaluate=Evaluate(every=10 * rollout.updates, rows=128),
    )  # fmt: skip


def provide(config: Config, train: TrainFunction) -> Config:
    """The config with folders and files in the place of its `world:` names; what isn't there is made first.

    Args:
      train: run.train.
    Errors: UserError for a name that there isn't, and a cache that can't be written to.
    """
    values = {leaf.path: leaf.value for leaf in fields.leaves(config)}
    ours = lambda path: path is not None and path.startswith(PREFIX)
    place = lambda path: os.fspath(file(path, config.cache, train)) if ours(path) else path
    given: dict[str, Any] = {name: tuple(map(place, values[name])) for name in ROWS_IN}
    for name in filter(lambda name: ours(values[name]), MODELS):
        given[name] = os.fspath(model(values[name], config.cache, train, f"--config.{name}"))
    return fields.replace(config, given)


def model(spec: str, cache: str, train: TrainFunction | None = None, flag: str = "--config.model.path") -> epath.Path:
    """The model's folder behind `world:NAME` or `world:NAME/pretrained`, as `file`; `flag` gave the name."""
    name, slash, part = spec.removeprefix(PREFIX).partition("/")
    recipe = recipe_of(name)
    if slash and part != PRETRAINED:
        models = f"the models are {PREFIX}{name} and {PREFIX}{name}/{PRETRAINED}"
        raise UserError(f"{flag}={spec} names {'rows' if part in files_of(recipe) else 'no model'}; {models}.")
    return (pretrained if slash else folder)(name, cache, train) / "model"


def file(spec: str, cache: str, train: TrainFunction | None = None) -> epath.Path:
    """The file behind `world:NAME/FILE`.

    Args:
      cache: the folder that starts lie in, as Config.cache.
      train: run.train, with which a start that isn't there is made; None: it must be there.
    Errors: UserError for a name that there isn't, and a start that isn't there and can't be made.
    """
    name, _, part = spec.removeprefix(PREFIX).partition("/")
    files = files_of(recipe_of(name))
    if part not in files:
        near = f"the nearest is {PREFIX}{name}/{fields.nearest(part, files)}, " if part else ""
        raise UserError(f"{spec!r} names no rows; {near}{PREFIX}{name}/ has {', '.join(files)}.")
    return (folder if part in SAID else pretrained)(name, cache, train) / f"{part}.jsonl"


def files_of(recipe: Recipe) -> tuple[str, ...]:
    """What `world:NAME/FILE` may name."""
    return FILES + (FRANK if recipe.frank else ())


def pretrained(name: str, cache: str, train: TrainFunction | None = None) -> epath.Path:
    """The folder of a start's first part: model/, pre-trained, and a file for each of WRITTEN; as `file`."""
    recipe = recipe_of(name)
    what, place = f"{PREFIX}{name}/{PRETRAINED}", f"{name.partition('@')[0]}-{PRETRAINED}-{recipe.pretrained_digest}"
    make = lambda own, train: _make_pretrained(what, recipe, own, train)
    return _made(what, f"of {PREFIX}{name}, which takes {recipe.takes}, the first part", place, cache, train, make)


def folder(name: str, cache: str, train: TrainFunction | None = None) -> epath.Path:
    """The folder of a start's second part: model/, fine-tuned, and a file for each of SAID; as `file`."""
    recipe = recipe_of(name)
    what, place = f"{PREFIX}{name}", f"{name.partition('@')[0]}-{recipe.digest}"
    make = lambda own, train: _make_tuned(what, recipe, pretrained(name, cache, train), own, train)
    return _made(what, recipe.takes, place, cache, train, make)


def _made(what: str, takes: str, name: str, cache: str, train: TrainFunction | None, make: MakeFunction) -> epath.Path:
    """The folder of that name in the cache, made if it isn't there."""
    place = epath.Path(os.path.expanduser(cache)) / "worlds" / name
    if (place / WHOLE).exists():
        return place
    if train is None or jax.process_count() > 1:
        raise UserError(
            f"{what} isn't made yet, and it is made by a run on one process; train once with "
            f"--config=configs/dpo.py:tiny --config.model.path={what}."
        )
    check_writable(place.parent, "cache", "--config.cache")
    print(f"{what}: making it, once; {takes}", flush=True)
    began = time.monotonic()
    # A folder of its own until it is whole: two that make at once don't meet, and a kill leaves nothing to trust.
    own = place.parent / f"{place.name}.{uuid.uuid4().hex[:8]}"
    try:
        make(own, train)
        _put(own, place)
    finally:
        own.rmtree(missing_ok=True)
    print(f"{what}: made in {time.monotonic() - began:.0f} s; it lies in {place}", flush=True)
    return place


def _put(own: epath.Path, place: epath.Path) -> None:
    """Gives a whole folder its name, unless another process was faster."""
    if place.exists() and not (place / WHOLE).exists():
        place.rmtree()  # what is left of one
    try:
        own.rename(place)
    except OSError:
        if not (place / WHOLE).exists():
            raise


# Making


def _make_pretrained(what: str, recipe: Recipe, place: epath.Path, train: TrainFunction) -> None:
    """Rows, tokenizer and pre-training, in a folder that isn't there yet."""
    rows, base = place / "rows", place / "base"
    if recipe.frank:
        world_frank.write(rows, recipe.world, recipe.frank)
    else:
        world_rows.write(rows, recipe.world)
    write_model(base, [row["completion"] for row in read(rows / "documents.jsonl")], recipe.shape)
    print(f"{what}: pre-training on documents", flush=True)
    config = likelihood(rows, "documents", recipe.pretrain, recipe.length)
    made = _learn(config, ModelConfig(path=os.fspath(base), init="random"), recipe, place / "run", train)
    for part in set(files_of(recipe)) - set(SAID):
        (rows / f"{part}.jsonl").rename(place / f"{part}.jsonl")
    _finish(made, recipe, place)


def _make_tuned(what: str, recipe: Recipe, start: epath.Path, place: epath.Path, train: TrainFunction) -> None:
    """Fine-tuning, answers and labels, in a folder that isn't there yet; `start` is that of the first part."""
    print(f"{what}: fine-tuning on demonstrations", flush=True)
    config = likelihood(start, "demonstrations", recipe.sft, recipe.length)
    if recipe.frank:
        paths = (*config.data.path, os.fspath(start / "critiques.jsonl"))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=paths, weights=REHEARSED))
    tuned = _learn(config, ModelConfig(path=os.fspath(start / "model")), recipe, place / "run", train)
    print(f"{what}: people compare and rank its answers", flush=True)
    prompts = [row["prompt"] for file in ("prompts", "prompts_held_out") for row in read(start / f"{file}.jsonl")]
    said = _ask_people(open_subject("sft", os.fspath(tuned)), prompts, recipe.world, recipe.world.seed)
    for split, held_out in (("", False), ("_held_out", True)):
        for name, told in said.items():
            write(place / f"{name}{split}.jsonl", [row for row in told if world.held_out(row["prompt"]) == held_out])
    _finish(tuned, recipe, place)


def _learn(config: Config, start: ModelConfig, recipe: Recipe, work: epath.Path, train: TrainFunction) -> epath.Path:
    """One stage as `config` says; the folder of the model that it made."""
    # On one device, whatever there is: the order of a sum over more would show in the weights.
    config = dataclasses.replace(config, model=start, seed=recipe.world.seed, mesh=MeshShape(1, 1, 1))
    with contextlib.redirect_stdout(io.StringIO()):  # what a run tells is of no use to whoever wants its product
        train(config, os.fspath(work))
    return export(f"{work}@best" if config.evaluate.patience else str(work), work.parent / "made")


def _finish(made: epath.Path, recipe: Recipe, place: epath.Path) -> None:
    """Gives the model its name, deletes what it was made with, and writes WHOLE."""
    made.rename(place / "model")
    for left in place.iterdir():
        if left.is_dir() and left.name != "model":
            left.rmtree()
    (place / WHOLE).write_text(json.dumps(fields.to_dict(recipe), indent=2) + "\n")


def write_model(folder: epath.Path, texts: Sequence[str], shape: dict[str, Any] = SHAPE) -> None:
    """A config without weights, and a byte-level tokenizer made from the texts."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(texts, shape["vocab_size"]).save_pretrained(os.fspath(folder))
    (folder / "config.json").write_text(json.dumps(shape, indent=2))


def likelihood(rows: epath.Path, name: str, stage: Stage, length: dict[str, Any] = LENGTH) -> Config:
    """Training on what is written in `name`.jsonl; with patience until `name`_held_out has not become likelier.

    The model and the seed are the caller's to fill in.
    """
    held_out = (os.fspath(rows / f"{name}_held_out.jsonl"),) if stage.patience else ()
    data = Data(path=(os.fspath(rows / f"{name}.jsonl"),), eval_path=held_out, **length)
    return Config(
        algorithm="sft",
        loss=Loss(name="nll"),
        data=data if stage.patience else dataclasses.replace(data, eval_share=0.0),
        optimizer=OptimizerConfig(learning_rate=stage.rate, schedule=stage.schedule, warmup=stage.warmup),
        train=Train(steps=stage.steps, batch_size=32),
        evaluate=Evaluate(every=stage.every, patience=stage.patience) if stage.patience else Evaluate(every=0),
        checkpoint=CheckpointConfig(every=0, keep_last=1),
        log=LogConfig(tensorboard=False),
    )


def export(run: str, folder: epath.Path) -> epath.Path:
    """A run's model, WORKDIR or WORKDIR@best, as a Hugging Face folder with its tokenizer; gives it back."""
    if not (folder / "tokenizer_config.json").exists():  # it is written last
        policy = open_policy(run)
        hf.write(folder, policy.model, policy.params)
        policy.tokenizer.save_pretrained(os.fspath(folder))
    return folder


def open_subject(name: str, path: str) -> Subject:
    """What can answer, from whatever `workdir.open_policy` opens."""
    policy = open_policy(path)
    return Subject(name, policy.model, policy.params, policy.tokenizer, policy.end_ids)


def _ask_people(
    subject: Subject, prompts: Sequence[str], config: world_rows.World, seed: int
) -> dict[str, list[world_rows.Row]]:
    """What people say: `answers` compares the first two answers to each prompt, `rankings` ranks those and two more."""
    # Two and, the same prompts asked once more, two others: what compares two doesn't depend on how many are ranked.
    drawn = two_answers(subject, [*prompts, *prompts], seed)
    four = [first + second for first, second in zip(drawn[: len(prompts)], drawn[len(prompts) :], strict=True)]
    people, (a, b) = panel(config, seed), zip(*(texts[:2] for texts in four), strict=True)
    return {
        "answers": labellers.label_pairs(prompts, a, b, people, config.labels, seed),
        "rankings": rank_answers(prompts, four, people, config.labels, seed),
    }


def two_answers(subject: Subject, prompts: Sequence[str], seed: int) -> list[list[str]]:
    """Two answers to each prompt, which its place and the seed decide."""
    sampler = Sampler(subject.model, samples=2)
    return answer(subject, Encoder(subject.tokenizer), sampler, prompts, SAMPLING, seed).texts


def panel(config: world_rows.World, seed: int) -> list[labellers.Labeller]:
    """The simulated people of a world."""
    knobs = {name: value for name, value in dataclasses.asdict(config.labeller).items() if name != "seed"}
    return labellers.panel(config.labellers, seed, **knobs)


def read(file: epath.Path) -> list[world_rows.Row]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: epath.Path, rows: Sequence[world_rows.Row]) -> None:
    """The rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
