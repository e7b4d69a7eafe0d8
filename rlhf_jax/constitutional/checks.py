"""What is refused before the first stage."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax import fields, registry, run, worlds
from rlhf_jax.chain import checks as chain
from rlhf_jax.chain.stage import named
from rlhf_jax.config import Config
from rlhf_jax.constitutional import human
from rlhf_jax.constitutional.config import FILLED, PROBABILITY, STAGES, Constitutional, filled
from rlhf_jax.constitutional.writing import examples, local
from rlhf_jax.data import dataset, formats, prompts, sources
from rlhf_jax.data.prompts import Asked
from rlhf_jax.data.rows import Demonstration, Left, Message, Refusal, Text
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.scorers import SCORERS
from rlhf_jax.feedback import ai_preference, constitution
from rlhf_jax.models import start
from rlhf_jax.sampling.distribution import check as check_sampling
from rlhf_jax.workdir import open_policy, open_rewards

OF_THE_WORLD = ("gold", "harmless", "refused")  # scorers of its prompts alone
SIDES = ("harmless", "helpful")
NAMES: Mapping[str, str] = {name: name for name in (*STAGES, "human")}  # of what the stages will leave


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
    for flag, path in _prompts(whole).items():
        chain.check_prompts(path, flag)
    _check_evaluation(whole)
    _check_inputs(whole)


def _prompts(whole: Constitutional) -> dict[str, str]:
    """The files of prompts that a stage reads, by their flags."""
    made, others = {*whole.made}, whole.helpful_prompts
    reads = {"revisions", "labels", "ppo", *(["helpful_ppo"] if others is None else [])}
    found = {"--config.prompts": whole.prompts} if made & reads else {}
    if others is not None and made & {"ppo", "helpful_ppo"}:
        found["--config.helpful_prompts"] = others
    return found


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
        whole_config = filled(whole, stage, NAMES)
        _check_weights(whole_config)
        chain.check_whole(whole_config)
        chain.check_rows(config)


def _check_weights(config: Config) -> None:
    """What training says of them too, when the stages before it are done."""
    weights, paths = config.data.weights, config.data.path
    if weights and len(weights) != len(paths):
        raise UserError(
            f"--config.data.weights has {len(weights)} numbers, and the stage reads {len(paths)} files "
            f"({', '.join(paths)}); give one each, in that order."
        )
    if any(not 0 < weight < float("inf") for weight in weights):
        raise UserError(f"--config.data.weights={fields.text(weights)} is not allowed; each must be above 0.")


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
    for name, readers in {"revisions": {"revised"}, "labels": {"dpo", "reward"}, "reward": {"ppo"}}.items():
        if getattr(whole.inputs, name) is not None and not readers & {*whole.made}:
            raise UserError(
                f"--config.inputs.{name} is not read, since no {' or '.join(sorted(readers))} is made here; drop it."
            )
    for flag, path in _models(whole).items():
        if not path.startswith(worlds.PREFIX):
            open_policy(path, flag=flag)
    if whole.inputs.reward is not None:
        open_rewards(whole.inputs.reward, flag="--config.inputs.reward")
    for name in ("revisions", "labels"):
        if (path := getattr(whole.inputs, name)) is not None:
            chain.check_file(path, "train", f"--config.inputs.{name}")
    if whole.inputs.labels is not None and not whole.inputs.labels.startswith(worlds.PREFIX):
        _check_chances(whole.inputs.labels)


def _models(whole: Constitutional) -> dict[str, str]:
    """The models that are named and used, by their flags."""
    of = {f"inputs.{name}": getattr(whole.inputs, name) for name in ("helpful", "revised", "final", "helpful_only")}
    of |= {"revisions.critic": whole.revisions.critic} if "revisions" in whole.made else {}
    of |= {"labels.judge": whole.labels.judge} if "labels" in whole.made else {}
    return {f"--config.{name}": path for name, path in of.items() if path is not None}


def _check_chances(path: str) -> None:
    """Looks at the first row of labels that are given."""
    rows = sources.read(path, flag="--config.inputs.labels")
    first = next((row for row in rows if isinstance(row, sources.Record)), None)
    if first is not None and PROBABILITY not in first.columns:
        raise UserError(
            f"{first.where} of --config.inputs.labels has no column {PROBABILITY}; give it the chance that chosen is "
            "better, 1 where it is sure."
        )


# What only the rows show


def check_made(whole: Constitutional) -> None:
    """What only the rows themselves show; worlds that are named are made.

    Errors: UserError for a world's name that there isn't, pairs that can't be read, labels without chances, tools on
      offer, a prompt that a scorer can't judge, and one that is both trained and compared on.
    """
    for stage in whole.made:
        section, algorithm, _ = STAGES[stage]
        if algorithm is not None:
            with named(stage, section):
                worlds.provide(filled(whole, stage, NAMES), run.train)
    for flag, path in _models(whole).items():
        if path.startswith(worlds.PREFIX):
            worlds.model(path, whole.cache, run.train, flag)
    if whole.inputs.labels is not None and whole.inputs.labels.startswith(worlds.PREFIX):
        _check_chances(local(whole, whole.inputs.labels))
    found = {flag: _asked(whole, path, flag) for flag, path in _prompts(whole).items()}
    asked = found.get("--config.prompts", [])
    _check_tools(asked, "--config.prompts")
    if "labels" in whole.made and whole.evaluate.harmless.scorer in OF_THE_WORLD:
        chain.check_world(asked[: whole.labels.rows], "evaluate.harmless.scorer", "my_pkg.module:function")
    trained = {_key(one.text): one.where for rows in found.values() for one in rows}
    trained |= {_key(prompt): where for where, prompt in _imitated(whole)}
    if whole.human is not None:
        pairs = human.opened(local(whole, whole.human), whole.human_probability)
        human.rows(pairs, whole.human, chat=False)
        trained |= {_key(one.pair.prompt): one.where for one in pairs.pairs}
        trained |= {_key(one.plain.prompt): one.where for one in pairs.pairs}
    for side in SIDES:
        rows, flag = evaluated(whole, side), f"--config.evaluate.{side}.prompts"
        _check_tools(rows, flag)
        if getattr(whole.evaluate, side).scorer in OF_THE_WORLD:
            chain.check_world(rows, f"evaluate.{side}.scorer", "my_pkg.module:function")
        for one in rows:
            if where := trained.get(_key(one.text)):
                raise UserError(
                    f"{one.where} of {flag} is also a prompt of training, {where}; drop it from one of the files."
                )


def _check_tools(rows: Sequence[Asked], flag: str) -> None:
    for one in rows:
        if one.tools:
            raise UserError(f"{one.where} of {flag} offers tools, which no model is shown here; leave it out.")


def _key(prompt: Text) -> tuple[tuple[str, str], ...]:
    """A prompt as it is compared: a text is what a user says, and the space around it counts for nothing."""
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return tuple((turn.role, turn.content.strip()) for turn in turns)


def _imitated(whole: Constitutional) -> Iterator[tuple[str, Text]]:
    """What demonstrations answer, and where; rows that can't be read are left to the stage that refuses them."""
    reading = [getattr(whole, name) for name in ("helpful", "revised") if name in whole.made]
    for section, path in itertools.product(reading[:1], whole.demonstrations):
        records = [*sources.read(local(whole, path), section.data.split, "--config.demonstrations")]
        name = dataset.format_of(path, records, section.data.format, (Demonstration,))
        for record in records:
            made = ()
            with contextlib.suppress(Refusal, Left):
                made = formats.adapt(name, record.columns, True) if isinstance(record, sources.Record) else ()
            for row in made:
                if row.prompt != ():
                    yield record.where, row.prompt
                elif isinstance(row, Demonstration) and not isinstance(row.completion, str):
                    turns = row.completion  # of a whole conversation every answer is trained
                    yield from ((record.where, turns[:at]) for at, one in enumerate(turns) if one.role == "assistant")


def evaluated(whole: Constitutional, side: str) -> list[Asked]:
    """The prompts that the models are compared on."""
    section = getattr(whole.evaluate, side)
    return _asked(whole, section.prompts, f"--config.evaluate.{side}.prompts")[: section.rows]


def provoking(whole: Constitutional, rows: int | None) -> list[Asked]:
    """The first prompts that provoke harm."""
    return _asked(whole, whole.prompts, "--config.prompts")[:rows]


def _asked(whole: Constitutional, path: str, flag: str) -> list[Asked]:
    return prompts.read(local(whole, path), flag)
