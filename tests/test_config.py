"""The experiments that come with the project: each loads, is checked whole, and says how to run it."""

import ast
import dataclasses
import importlib
import pathlib
import re
import shlex

import pytest
from etils import epath

from experiments import train
from rlhf_jax import fields, flags, registry
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.distill import DistillConfig
from rlhf_jax.build import build
from rlhf_jax.config import MAY_CHANGE_ON_RESUME, Config
from rlhf_jax.feedback.rewards import RewardsConfig
from rlhf_jax.sharding import MeshShape
from tests.spoilt import Ground

ROOT = pathlib.Path(__file__).resolve().parents[1]
SEVERAL = ("chain", "constitutional")  # of several runs: tests of their own have them
FILES = sorted(file for file in (ROOT / "configs").glob("*.py") if file.stem not in SEVERAL)
PROGRAMS = sorted(file.stem for file in (ROOT / "experiments").glob("[a-z]*.py"))


def specs(file: pathlib.Path) -> list[str]:
    """FILE, and FILE:VARIANT for each of its variants."""
    found = re.search(r"^VARIANTS\b.*?= \{(.*?)\}", file.read_text(), re.MULTILINE | re.DOTALL)
    return [str(file), *(f"{file}:{name}" for name in re.findall(r'"(\w+)":', found[1] if found else ""))]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return Ground.made(tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("spec", [spec for file in FILES for spec in specs(file)], ids=lambda s: pathlib.Path(s).name)
def test_every_experiment_passes_every_check(spec, ground, tmp_path):
    config = flags.load(spec)
    assert isinstance(config, Config)
    assert fields.from_dict(Config, fields.to_dict(config)) == config
    rows = ground.pairs
    if config.loss.name == "process":
        rows = tmp_path / "steps.jsonl"
        rows.write_text('{"prompt": "1 + 1?", "completions": ["2.", " So 2."], "labels": [true, true]}\n' * 20)
    data = dataclasses.replace(config.data, path=(str(rows),), eval_path=(), eval_share=0.0)
    if data.length is not None and data.length > 64:  # the context of the model here
        data = dataclasses.replace(data, length=None)
    model = dataclasses.replace(config.model, path=str(ground.model))
    alone = dataclasses.replace(config.reward, members=1, demonstrations=())
    distills = config.algorithm == "distill"
    taught = DistillConfig(str(ground.model)) if distills else config.distill
    whole = dataclasses.replace(config, model=model, data=data, reward=alone, distill=taught)
    if distills or config.rollout != Config().rollout:  # what learns from rollouts is scored without a model
        whole = dataclasses.replace(
            whole, rollout=dataclasses.replace(config.rollout, max_new_tokens=16), mesh=MeshShape(1, 1, 1),
            rewards=RewardsConfig(functions=("tests.rewards:letters",)),
            ppo=dataclasses.replace(config.ppo, pretrain=(), pretrain_weight=1.0),
            group=dataclasses.replace(config.group, overlong=config.group.overlong and 8),
        )  # fmt: skip
    assert build(whole, epath.Path(tmp_path)).steps > 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_experiment_is_short_and_its_docstring_is_its_command(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 40
    told = ast.get_docstring(ast.parse(text)) or ""
    commands = re.findall(r"^python -m experiments\.train ((?:.*\\\n)*.*)$", told, re.MULTILINE)
    assert commands, "the docstring gives no command that begins with python -m experiments.train"
    for command in commands:
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        program = flags.parse(["train", *words], train.Train)
        assert f"--config=configs/{file.name}" in command and program.workdir
        assert program.config.model.path and program.config.data.path


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_field_of_every_program_has_a_meaning(name):
    module = importlib.import_module(f"experiments.{name}")
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    programs = [value for value in own if dataclasses.is_dataclass(value)]
    assert len(programs) == 1, "a program is one dataclass"
    for field in fields.declared(programs[0]):
        assert field.is_section or field.meaning, f"{name}: --{field.name} has no meaning"


def test_every_leaf_of_the_config_has_a_meaning_and_every_section_a_docstring():
    for leaf in fields.leaves(Config()):
        assert leaf.meaning, f"{leaf.path} has no meaning: give it Annotated[type, 'meaning']"
        assert leaf.meaning[0] not in " ." and not leaf.meaning.endswith("."), f"{leaf.path}: a phrase, no sentence"
    for section in fields.declared(Config()):
        assert not section.is_section or fields.doc(type(section.value)), f"{section.path} has no docstring"


def test_dpo_sets_the_name_of_the_loss_alone_so_that_another_name_always_works():
    config = flags.load(str(ROOT / "configs/dpo.py"))
    assert config.loss == type(config.loss)(name="dpo")
    for name, loss in ALGORITHMS[config.algorithm].LOSSES.items():
        beta = registry.arguments("loss", loss, dataclasses.replace(config.loss, name=name))["beta"]
        assert beta == {"simpo": 2.0, "alphapo": 2.0, "dpo_norm": 5.0}.get(name, 0.1)  # theirs are of token means
    weights = registry.arguments("loss", ALGORITHMS["preference"].LOSSES["kto"], type(config.loss)(name="kto"))
    assert weights["desirable_weight"] == weights["undesirable_weight"] == 1


def test_help_lists_every_field_of_a_config_with_its_value_and_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        flags.run(train.main, train.Train, ["train", f"--config={ROOT}/configs/dpo.py", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for leaf in fields.leaves(flags.load(str(ROOT / "configs/dpo.py")), "config"):
        assert f"--{leaf.path}={fields.text(leaf.value)} [{leaf.kind.allowed}] {leaf.meaning}" in shown
    for flag in ("--workdir", "--resume", "--config"):
        assert f" {flag}" in shown


def test_what_may_change_on_resume_are_fields_that_exist():
    paths = [leaf.path for leaf in fields.leaves(Config())]
    for name in MAY_CHANGE_ON_RESUME:
        assert any(path.startswith(name) for path in paths), name


def test_the_names_that_others_rely_on_are_there():
    paths = {leaf.path for leaf in fields.leaves(Config())}
    assert paths >= {
        "seed", "model.path", "data.path", "data.format", "loss.name", "loss.beta", "train.steps", "train.microbatches",
        "train.batch_size", "optimizer.name", "optimizer.learning_rate", "checkpoint.every", "mesh.data", "mesh.fsdp",
        "mesh.tensor", "mesh.expert",
    }  # fmt: skip
    assert {field.name for field in fields.declared(train.Train)} == {"config", "workdir", "resume"}
