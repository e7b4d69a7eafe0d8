"""What is refused before a chain's first stage."""

import os
from collections.abc import Mapping, Sequence

from rlhf_jax import checks, fields, registry, run, worlds
from rlhf_jax.chain.config import FILLED, PEOPLE, STAGES, WORLD, Chain, Evaluation, Inputs, Labels, filled
from rlhf_jax.chain.stage import named
from rlhf_jax.config import Config
from rlhf_jax.data import prompts, sources, world
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.compare import has_kl
from rlhf_jax.evaluate.scorers import SCORERS
from rlhf_jax.feedback import rankings
from rlhf_jax.models import start
from rlhf_jax.sampling.distribution import check as check_sampling
from rlhf_jax.workdir import open_policy, open_rewards

TRAINED = {"sft": "sft", "reward": "reward", "ppo": "ppo", "dpo": "preference"}  # each stage's algorithm


GOLD = "gold"  # the scorer that is of the world


def check(chain: Chain) -> None:
    """All that can be checked before anything is made. Errors: UserError for whatever the user can mend."""
    if {"labels", "ppo"} & {*chain.made}:
        check_prompts(chain.prompts, "--config.prompts")
    for stage in chain.made:
        if stage != "labels":
            _check_stage(chain, stage)
    if "labels" in chain.made:
        _check_labels(chain.labels)
    _check_evaluation(chain.evaluate)
    check_prompts(chain.evaluate.prompts, "--config.evaluate.prompts")
    _check_inputs(chain.inputs)


def _check_stage(chain: Chain, stage: str) -> None:
    config = getattr(chain, stage)
    check_section(stage, config, FILLED[stage], TRAINED[stage])
    if stage == "sft" and config.model.path is None:
        raise UserError(
            "there is no model to start from; give --config.sft.model.path=FOLDER_OR_HUB_NAME, or --config.inputs.sft "
            "if it is fine-tuned already."
        )
    if stage == "sft" and not config.data.path:
        raise UserError("there are no demonstrations; give --config.sft.data.path=FILE, or --config.inputs.sft.")
    with named(stage):
        check_whole(filled(chain, stage, dict.fromkeys(STAGES, "made")))
        if stage == "sft" and not str(config.model.path).startswith(worlds.PREFIX):
            start.find(str(config.model.path))
        check_rows(config)


def check_section(section: str, config: Config, fills: Mapping[str, str], algorithm: str) -> None:
    """What of a stage's config isn't the user's to give: `fills`, each with the flag that is; and what trains.

    Errors: UserError.
    """
    default = {leaf.path: leaf.value for leaf in fields.leaves(Config())}
    values = {leaf.path: leaf.value for leaf in fields.leaves(config)}
    for name, source in fills.items():
        if values[name] != default[name]:
            raise UserError(
                f"--config.{section}.{name}={fields.text(values[name])} is filled in by the chain; drop it, or give "
                f"--config.{source} in its place."
            )
    if config.algorithm != algorithm:
        raise UserError(f"--config.{section}.algorithm={config.algorithm} is not allowed; it must be {algorithm}.")


def check_whole(config: Config) -> None:
    """A stage's config with all that is filled in. Errors: UserError as a run's."""
    # Of an ensemble each is checked as a run alone is.
    checks.check(fields.replace(config, {"reward.members": min(1, config.reward.members)}))


def check_rows(config: Config) -> None:
    """Looks for a first row of every file that a config names. Errors: UserError as `sources.read`."""
    values = {leaf.path: leaf.value for leaf in fields.leaves(config)}
    for name in worlds.ROWS_IN:
        for path in values[name]:
            check_file(path, config.data.split, f"--config.{name}")


def check_file(path: str, split: str, flag: str) -> None:
    """Looks for a first row. Worlds are made later. Errors: UserError as `sources.read`."""
    if not path.startswith(worlds.PREFIX):
        next(iter(sources.read(path, split, flag)))


def _check_labels(labels: Labels) -> None:
    for name, least in {"answers": 2, "rankings": 1, "labellers": 1, "rows": 1, "scale": 0}.items():
        if (value := getattr(labels, name)) is not None and not value >= least:
            raise UserError(f"--config.labels.{name}={value} is not allowed; it must be at least {least}.")
    check_sampling(labels.sampling, "--config.labels.sampling.")
    if labels.sampling.temperature == 0 or labels.sampling.top_k == 1:
        raise UserError(
            "all answers to a prompt would be the same; give a --config.labels.sampling.temperature above 0, and no "
            "top_k of 1."
        )
    reads = {WORLD: ("labellers", "labeller", "rankings"), PEOPLE: ()}.get(labels.by, ("rankings", "scale"))
    for name in ("labellers", "labeller", "rankings", "scale"):
        if name not in reads and getattr(labels, name) != getattr(Labels(), name):
            raise UserError(f"--config.labels.by={labels.by} does not read --config.labels.{name}; drop it.")
    if labels.by not in (WORLD, PEOPLE):
        registry.resolve({WORLD: None, PEOPLE: None, **SCORERS}, labels.by, "way to rank")


def _check_evaluation(section: Evaluation) -> None:
    for name, least in {"samples": 1, "best_of": 2, "rows": 1}.items():
        if (value := getattr(section, name)) is not None and value < least:
            raise UserError(f"--config.evaluate.{name}={value} is not allowed; it must be at least {least}.")
    check_sampling(section.sampling, "--config.evaluate.sampling.")
    if not has_kl(section.sampling):
        raise UserError(
            "rewards are shown against the KL, which answers have that are drawn from the whole softmax; give "
            "--config.evaluate.sampling.temperature above 0 and leave filters and penalty as they are."
        )
    if section.scorer is not None:
        registry.resolve(SCORERS, section.scorer, "scorer")


def check_prompts(path: str, flag: str) -> None:
    """Reads them. Worlds are made later. Errors: UserError as `prompts.read`, and for lines that nothing trains on."""
    if path.startswith(worlds.PREFIX):
        return
    prompts.read(path, flag)
    if not path.lower().endswith(tuple(sources.TABLES)):  # lines are prompts to answer, but no rows to train on
        raise UserError(f"{flag}={path} must hold rows with a column prompt or messages; give a .jsonl file.")


def _check_inputs(inputs: Inputs) -> None:
    """Opens what is named."""
    for name in ("sft", "ppo", "dpo"):
        path = getattr(inputs, name)
        if path is not None and not (name == "sft" and path.startswith(worlds.PREFIX)):
            open_policy(path, flag=f"--config.inputs.{name}")
    if inputs.reward is not None:
        open_rewards(inputs.reward, flag="--config.inputs.reward")
    if inputs.labels is not None and not inputs.labels.startswith(worlds.PREFIX):
        first = next(iter(sources.read(inputs.labels, flag="--config.inputs.labels")))
        if isinstance(first, sources.Record) and "completions" in first.columns and "labels" not in first.columns:
            rankings.read_rankings(inputs.labels)  # names the first row that nobody has filled in


def check_made(chain: Chain) -> None:
    """What only the prompts themselves show; worlds that are named are made.

    Errors: UserError for a world's name that there isn't, a prompt that can't be ranked, and one that is both trained
      on and compared on.
    """
    for stage in chain.made:
        if stage != "labels":
            with named(stage):
                worlds.provide(filled(chain, stage, dict.fromkeys(STAGES, "made")), run.train)
    if chain.inputs.labels is not None:
        local(chain, chain.inputs.labels)
    trained = asked(chain, chain.prompts, None, "--config.prompts") if {"labels", "ppo"} & {*chain.made} else []
    if "labels" in chain.made and chain.labels.by in (WORLD, GOLD):
        check_world(trained[: chain.labels.rows], "labels.by", PEOPLE)
    if chain.evaluate.scorer == GOLD:
        check_world(evaluated(chain), "evaluate.scorer", "none")
    check_apart(trained, evaluated(chain), "--config.evaluate.prompts")


def check_apart(trained: Sequence[prompts.Asked], evaluated: Sequence[prompts.Asked], flag: str) -> None:
    """Errors: UserError for a prompt of both."""
    held_out = {one.text: one.where for one in evaluated}
    for one in trained:
        if one.text in held_out:
            raise UserError(
                f"{held_out[one.text]} of {flag} is also a prompt of training, {one.where}; drop it from one of the "
                "files."
            )


def check_world(asked: Sequence[prompts.Asked], field: str, instead: str) -> None:
    """Errors: UserError for a prompt that nobody of the synthetic world can judge an answer to."""
    for one in asked:
        try:
            world.parse(rankings.question_of(one.text))
        except UserError:
            raise UserError(
                f"{one.where} is no prompt of the synthetic world, whose people and gold judge answers to no others; "
                f"give --config.{field}={instead}, or a scorer, my_pkg.module:function."
            ) from None


def evaluated(chain: Chain) -> list[prompts.Asked]:
    """The prompts that the models are compared on."""
    return asked(chain, chain.evaluate.prompts, chain.evaluate.rows, "--config.evaluate.prompts")


def asked(chain: Chain, path: str, rows: int | None, flag: str) -> list[prompts.Asked]:
    """Prompts of a file, or of a world."""
    return prompts.read(local(chain, path), flag)[:rows]


def local(chain: Chain, path: str) -> str:
    """The path, or the file behind a world's name, made if it isn't there."""
    return os.fspath(worlds.file(path, chain.cache, run.train)) if path.startswith(worlds.PREFIX) else path
