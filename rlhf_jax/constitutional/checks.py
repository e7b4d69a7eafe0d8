"""What is refused before the first stage."""

from typing import Any

from rlhf_jax import registry, run, worlds
from rlhf_jax.chain import checks as chain
from rlhf_jax.chain.stage import named
from rlhf_jax.constitutional import human
from rlhf_jax.constitutional.config import FILLED, STAGES, Constitutional, filled
from rlhf_jax.constitutional.writing import examples, local
from rlhf_jax.data import prompts
from rlhf_jax.data.prompts import Asked
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.scorers import SCORERS
from rlhf_jax.feedback import ai_preference, constitution
from rlhf_jax.models import start
from rlhf_jax.sampling.distribution import check as check_sampling
from rlhf_jax.workdir import open_policy, open_rewards

OF_THE_WORLD = ("gold", "harmless", "refused")  # scorers of its prompts alone
SIDES = ("harmless", "helpful")


def check(whole: Constitutional) -> None:
    """All that can be checked before anything is made. Errors: UserError for whatever the user can mend."""
    made = {*whole.made}
    _check_given(whole)
    for stage in whole.made:
        if STAGES[stage].algorithm is not None:
            _check_stage(whole, stage)
    if "revisions" in made:
        _check_revisions(whole)
    if "labels" in made:
        _check_labels(whole)
    if made & {"revisions", "labels", "ppo"}:
        chain.check_prompts(whole.prompts, "--config.prompts")
    if made & {"ppo", "helpful_ppo"} and whole.helpful_prompts is not None:
        chain.check_prompts(whole.helpful_prompts, "--config.helpful_prompts")
    _check_evaluation(whole)
    _check_inputs(whole)


def _check_given(whole: Constitutional) -> None:
    made = {*whole.made}
    if whole.model is None and made & {"helpful", "revised"}:
        raise UserError(
            "there is no model to start from; give --config.model=FOLDER_OR_HUB_NAME, or --config.inputs.helpful and "
            "--config.inputs.revised."
        )
    if not whole.demonstrations and "helpful" in made:
        raise UserError("there are no demonstrations; give --config.demonstrations=FILE, or --config.inputs.helpful.")
    if whole.model is not None and not whole.model.startswith(worlds.PREFIX):
        start.find(whole.model)
    for path in whole.demonstrations:
        chain.check_file(path, "train", "--config.demonstrations")
    if whole.human is not None:
        chain.check_file(whole.human, "train", "--config.human")
    elif whole.human_probability is not None:
        raise UserError("--config.human_probability is a column of --config.human, which names no file; drop it.")


def _check_stage(whole: Constitutional, stage: str) -> None:
    section, algorithm, _ = STAGES[stage]
    assert algorithm is not None
    config = getattr(whole, section)
    chain.check_section(section, config, FILLED[section], algorithm)
    with named(stage, section):
        chain.check_whole(filled(whole, stage, dict.fromkeys((*STAGES, "human"), "made")))
        chain.check_rows(config)


def _check_revisions(whole: Constitutional) -> None:
    section = whole.revisions
    _at_least("revisions", section, {"rounds": 1, "rows": 1})
    check_sampling(section.sampling, "--config.revisions.sampling.")
    check_sampling(section.writing, "--config.revisions.writing.")
    if not constitution.read(whole.constitution, "--config.constitution").of("revision"):
        raise UserError(
            f"no principle of {whole.constitution} has a critique and a revision; give one of them both, or another "
            "--config.constitution."
        )
    if section.examples is not None:
        examples(section.examples)


def _check_labels(whole: Constitutional) -> None:
    section = whole.labels
    _at_least("labels", section, {"rows": 1})
    check_sampling(section.sampling, "--config.labels.sampling.")
    if section.sampling.temperature == 0 or section.sampling.top_k == 1:
        raise UserError(
            "both answers to a prompt would be the same; give a --config.labels.sampling.temperature above 0, and no "
            "top_k of 1."
        )
    if not constitution.read(whole.constitution, "--config.constitution").of("preference"):
        raise UserError(
            f"no principle of {whole.constitution} has a preference; give one of them one, or another "
            "--config.constitution."
        )
    ai_preference.read(section.template, "--config.labels.template")


def _at_least(name: str, section: Any, least: dict[str, int]) -> None:
    for field, number in least.items():
        if (value := getattr(section, field)) is not None and value < number:
            raise UserError(f"--config.{name}.{field}={value} is not allowed; it must be at least {number}.")


def _check_evaluation(whole: Constitutional) -> None:
    _at_least("evaluate", whole.evaluate, {"samples": 1})
    check_sampling(whole.evaluate.sampling, "--config.evaluate.sampling.")
    for side in SIDES:
        section = getattr(whole.evaluate, side)
        _at_least(f"evaluate.{side}", section, {"rows": 1})
        chain.check_prompts(section.prompts, f"--config.evaluate.{side}.prompts")
        if section.scorer is None:
            raise UserError(
                f"nothing says how {side} an answer is; give --config.evaluate.{side}.scorer=my_pkg.module:function."
            )
        registry.resolve(SCORERS, section.scorer, "scorer")


def _check_inputs(whole: Constitutional) -> None:
    """Opens what is named, and reads the first row."""
    of = {name: getattr(whole.inputs, name) for name in ("helpful", "revised", "final", "helpful_only")}
    named_models = {f"inputs.{name}": path for name, path in of.items()}
    named_models |= {"revisions.critic": whole.revisions.critic} if "revisions" in whole.made else {}
    named_models |= {"labels.judge": whole.labels.judge} if "labels" in whole.made else {}
    for name, path in named_models.items():
        if path is not None and not path.startswith(worlds.PREFIX):
            open_policy(path, flag=f"--config.{name}")
    if whole.inputs.reward is not None:
        open_rewards(whole.inputs.reward, flag="--config.inputs.reward")
    for name in ("revisions", "labels"):
        if (path := getattr(whole.inputs, name)) is not None:
            chain.check_file(path, "train", f"--config.inputs.{name}")


# What only the rows show


def check_made(whole: Constitutional) -> None:
    """What only the rows themselves show; worlds that are named are made.

    Errors: UserError for a world's name that there isn't, pairs that can't be read, tools on offer, a prompt that a
      scorer can't judge, and one that is both trained and compared on.
    """
    for stage in whole.made:
        section, algorithm, _ = STAGES[stage]
        if algorithm is not None:
            with named(stage, section):
                worlds.provide(filled(whole, stage, dict.fromkeys((*STAGES, "human"), "made")), run.train)
    for path in (whole.inputs.helpful, whole.inputs.revised, whole.revisions.critic, whole.labels.judge):
        if path is not None and path.startswith(worlds.PREFIX):
            worlds.model(path, whole.cache, run.train)
    if whole.human is not None:
        human.read(local(whole, whole.human), whole.human_probability, chat=False)
    trained = _asked(whole, whole.prompts, "--config.prompts") if {*whole.made} & {"revisions", "labels", "ppo"} else []
    for one in trained:
        if one.tools:
            raise UserError(f"{one.where} of --config.prompts offers tools, which nobody criticises; leave it out.")
    for side in SIDES:
        rows = evaluated(whole, side)
        if getattr(whole.evaluate, side).scorer in OF_THE_WORLD:
            chain.check_world(rows, f"evaluate.{side}.scorer", "my_pkg.module:function")
        chain.check_apart(trained, rows, f"--config.evaluate.{side}.prompts")


def evaluated(whole: Constitutional, side: str) -> list[Asked]:
    """The prompts that the models are compared on."""
    section = getattr(whole.evaluate, side)
    return _asked(whole, section.prompts, f"--config.evaluate.{side}.prompts")[: section.rows]


def provoking(whole: Constitutional, rows: int | None) -> list[Asked]:
    """The first prompts that provoke harm."""
    return _asked(whole, whole.prompts, "--config.prompts")[:rows]


def _asked(whole: Constitutional, path: str, flag: str) -> list[Asked]:
    return prompts.read(local(whole, path), flag)
