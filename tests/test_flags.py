"""Flags and configs: what is written is what is read, and every mistake ends in one sentence."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import fields, flags, registry
from rlhf_jax.errors import UserError


def dpo(pair: Any, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Any: ...


def ipo(
    pair: Any,
    *,
    beta: Annotated[float, "1/nats"] = 0.1,
    length_normalised: bool = True,
    form: Literal["a", "b"] = "a",
) -> Any: ...


def bare(pair: Any, *, scale: int) -> Any: ...


LOSSES = {"dpo": dpo, "ipo": ipo, "bare": bare}


@registry.generated(LOSSES)
class Loss:
    """Which loss, and what it reads. More text."""

    name: str = "dpo"


@dataclasses.dataclass(frozen=True)
class Inner:
    """The innermost."""

    depth: Annotated[int, "how deep"] = 3


@dataclasses.dataclass(frozen=True)
class Data:
    path: Annotated[tuple[str, ...], "files"] = ()
    shares: tuple[float, ...] = (1.0,)
    too_long: Annotated[Literal["cut_prompt", "refuse", "stop"], "what becomes of long rows"] = "cut_prompt"
    length: Annotated[int | None, "tokens"] = 256
    shuffle: bool = True
    pack: bool | None = None
    inner: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Train:
    steps: Annotated[int, "optimiser updates"] = 100
    rate: Annotated[float, "learning rate"] = 1e-3
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise UserError(f"train.warmup is {self.warmup}, more than train.steps, {self.steps}.")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: Annotated[int, "of everything random"] = 0
    data: Data = Data()
    loss: Loss = Loss()
    train: Annotated[Train, "the loop"] = Train()


@dataclasses.dataclass(frozen=True)
class Program:
    """Trains a policy."""

    config: Config
    workdir: Annotated[str | None, "where the run writes"] = None
    resume: Annotated[bool, "continue"] = False


@dataclasses.dataclass(frozen=True)
class Alone:
    out: Annotated[str, "the folder to write"]
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Defaulted:
    config: Config = Config(seed=7)


FILE = """
from test_flags import Config, Data, Train
VARIANTS = {"default": 100, "tiny": 20}
def get_config(variant: str = "default"):
    return Config(seed=5, train=Train(steps=VARIANTS[variant], rate=1), data=Data(path=["a.jsonl"]))
"""


@pytest.fixture
def file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "test_flags", sys.modules[__name__])
    (tmp_path / "dpo.py").write_text(FILE)
    (tmp_path / "sft.py").write_text(FILE)
    return str(tmp_path / "dpo.py")


def parse(*argv: str, program: Any = Program) -> Any:
    return flags.parse(["train", *argv], program)


def refused(*argv: str, program: Any = Program) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv, program=program)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_file_is_where_a_run_starts_from_and_its_types_are_made_exact(file):
    program = parse(f"--config={file}")
    assert program == Program(config=Config(seed=5, train=Train(rate=1.0), data=Data(path=("a.jsonl",))))
    assert type(program.config.train.rate) is float
    assert parse(f"--config={file}:tiny").config.train.steps == 20


@pytest.mark.parametrize(
    ("flag", "section", "value"),
    [
        ("seed=-3", "", -3),
        ("train.steps=7", "train", 7),
        ("train.rate=3e-4", "train", 3e-4),
        ("train.rate=2", "train", 2.0),
        ("train.rate=inf", "train", math.inf),
        ("data.path=x", "data", ("x",)),
        ("data.path=x, y", "data", ("x", "y")),
        ("data.path=", "data", ()),
        ("data.shares=1,0.5", "data", (1.0, 0.5)),
        ("data.too_long=stop", "data", "stop"),
        ("data.length=none", "data", None),
        ("data.length=12", "data", 12),
        ("data.shuffle=false", "data", False),
        ("data.shuffle", "data", True),
        ("data.pack", "data", True),
        ("data.pack=none", "data", None),
        ("data.inner.depth=9", "data.inner", 9),
        ("loss.name=ipo", "loss", "ipo"),
        ("loss.beta=0.3", "loss", 0.3),
        ("loss.length_normalised=false", "loss", False),
        ("loss.form=b", "loss", "b"),
        ("loss.scale=4", "loss", 4),
    ],
)
def test_every_type_of_leaf_is_read(file, flag, section, value):
    config = parse(f"--config={file}", f"--config.{flag}").config
    node = config
    for part in section.split(".") if section else []:
        node = getattr(node, part)
    read = getattr(node, flag.partition("=")[0].rpartition(".")[2])
    assert read == value and type(read) is type(value)
    name = flag.partition("=")[0]
    changed = [line.partition(":")[0] for line in fields.diff(config, parse(f"--config={file}").config)]
    assert changed in ([name], [])


def test_the_negated_boolean_and_the_spaced_value_of_absl_work(file):
    program = parse("--config", file, "--noconfig.data.shuffle", "--config.seed", "8", "--workdir", "w", "--resume")
    assert (program.config.data.shuffle, program.config.seed) == (False, 8)
    assert (program.workdir, program.resume) == ("w", True)


def test_a_later_flag_wins_and_one_parse_leaves_nothing_for_the_next(file):
    assert parse(f"--config={file}", "--config.seed=1", "--config.seed=2").config.seed == 2
    assert parse(f"--config={file}").config.seed == 5
    assert parse(program=Defaulted).config.seed == 7


def test_the_changes_of_a_section_are_made_at_once(file):
    train = parse(f"--config={file}", "--config.train.warmup=300", "--config.train.steps=500").config.train
    assert (train.warmup, train.steps) == (300, 500)
    assert refused(f"--config={file}", "--config.train.warmup=300").startswith("train.warmup is 300")


def test_a_config_file_that_is_edited_within_the_second_is_read_again(file):
    assert parse(f"--config={file}").config.seed == 5
    pathlib.Path(file).write_text(FILE.replace("seed=5", "seed=6"))
    assert parse(f"--config={file}").config.seed == 6


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("config.train.step", "config.train.steps"),
        ("config.steps", "config.train.steps"),
        ("config.loss.bta", "config.loss.beta"),
        ("config.loss", "config.loss.name"),
        ("confg", "config"),
        ("work_dir", "workdir"),
    ],
)
def test_an_unknown_flag_names_the_nearest(file, flag, near):
    message = refused(f"--config={file}", f"--{flag}=1")
    assert message == f"there is no flag --{flag}; the nearest is --{near}, and --help lists them all."


@pytest.mark.parametrize(
    ("flag", "allowed"),
    [
        ("train.steps=many", "an int"),
        ("train.steps=1.5", "an int"),
        ("train.rate=fast", "a number"),
        ("train.rate=nan", "a number"),
        ("data.shuffle=perhaps", "true or false"),
        ("data.shares=1,x", "values with commas between, each a number"),
        ("data.too_long=stp", "one of cut_prompt, refuse, stop"),
        ("data.length=long", "an int, or none"),
        ("loss.form=c", "one of a, b, or none"),
    ],
)
def test_a_wrong_type_names_the_field_the_value_and_what_is_allowed(file, flag, allowed):
    assert refused(f"--config={file}", f"--config.{flag}") == f"flag --config.{flag}: it takes {allowed}."


def test_a_value_of_the_wrong_type_in_the_file_is_refused(file):
    pathlib.Path(file).write_text(FILE.replace("seed=5", "seed='5'"))
    assert refused(f"--config={file}") == f"{file}: config.seed is '5', but it takes an int."
    pathlib.Path(file).write_text(FILE.replace("data=Data(path=['a.jsonl'])".replace("'", '"'), "data=3"))
    assert refused(f"--config={file}") == f"{file}: config.data is 3, but it is a section with fields."
    pathlib.Path(file).write_text("def get_config(): return {}")
    assert refused(f"--config={file}") == f"{file}: get_config returned a dict; it must return a Config."


def test_missing_files_and_variants_name_the_nearest(file, tmp_path):
    assert refused(f"--config={tmp_path}/dpp.py") == (
        f"there is no config file '{tmp_path}/dpp.py'; the nearest is {tmp_path}/dpo.py."
    )
    assert f"the nearest is {file}" in refused(f"--config={tmp_path}/dpo")
    assert refused("--config=nowhere/dpo.py") == "there is no config file 'nowhere/dpo.py'; nowhere holds none."
    assert refused(f"--config={file}:tny") == (f"{file} has no variant 'tny'; the nearest is 'tiny' of default, tiny.")
    pathlib.Path(file).write_text("def get_config(): ...")
    assert refused(f"--config={file}:tiny") == f"{file} has no variant 'tiny'; it has none, so pass {file} alone."
    pathlib.Path(file).write_text("")
    assert refused(f"--config={file}").startswith(f"{file} has no function get_config")


def test_a_fault_of_the_file_itself_is_not_hidden(file):
    pathlib.Path(file).write_text("def get_config(): raise KeyError('mine')")
    with pytest.raises(KeyError, match="mine"):
        parse(f"--config={file}")


def test_what_must_be_given_is_asked_for(file):
    asked = "pass --config=FILE.py or --config=FILE.py:VARIANT to start from."
    assert refused() == refused("--config.loss.beta=0.3", "--config.seed", "3") == asked
    assert "there is no flag --confg; the nearest is --config," in refused(f"--confg={file}")
    assert refused(program=Alone) == "pass --out=...: the folder to write."
    assert parse("--out=o", "--count=2", program=Alone) == Alone("o", 2)


def test_stray_words_and_valueless_flags_are_refused(file):
    assert "'false'" in refused(f"--config={file}", "--resume", "false")
    assert "Missing value for flag --config.seed" in refused(f"--config={file}", "--config.seed")


def test_a_flagfile_holds_any_flags_the_config_too(file, tmp_path):
    listed = tmp_path / "flags.txt"
    listed.write_text(f"# a comment\n--config={file}:tiny\n--config.loss.beta=0.3\n--resume\n")
    program = parse("--workdir=w", f"--flagfile={listed}", "--config.loss.name=ipo")
    assert program.config.train.steps == 20 and program.resume and program.workdir == "w"
    assert program.config.loss == Loss(name="ipo", beta=0.3)
    assert "absent.txt" in refused("--flagfile=absent.txt")


def test_help_lists_every_field_with_its_default_type_and_meaning(file, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(f"--config={file}:tiny", "--help")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for leaf in fields.leaves(parse(f"--config={file}:tiny").config, "config"):
        assert f"--{leaf.path}={fields.text(leaf.value)}  [{leaf.kind.allowed}]" in shown
        assert leaf.meaning in shown
    for line in (
        "Trains a policy.",
        f"  --config={file}:tiny  [a string]",
        "  --workdir=none  [a string, or none]\n      where the run writes",
        "  --config.train.steps=20  [an int]\n      optimiser updates",
        "read by dpo (0.1), ipo (0.1)",
        "read by bare (required)",
        "\n\nconfig.train: the loop\n",
        "\n\nconfig.loss: Which loss, and what it reads\n",
    ):
        assert line in shown
    with pytest.raises(SystemExit):
        parse("-h")
    shown = capsys.readouterr().out
    assert "--workdir" in shown and "  --config  (required)" in shown
    with pytest.raises(SystemExit):
        parse("--help", program=Defaulted)
    assert "--config=none" in (shown := capsys.readouterr().out) and "--config.seed=7" in shown


def test_every_value_that_help_shows_can_be_typed(file):
    config = parse(f"--config={file}").config
    typed = [f"--{leaf.path}={fields.text(leaf.value)}" for leaf in fields.leaves(config, "config")]
    assert parse("--config.seed=99", *typed, program=Defaulted).config == config


def test_a_loss_is_found_by_name_or_from_outside():
    assert registry.resolve(LOSSES, "ipo", "loss") is ipo
    assert registry.resolve(LOSSES, "math:sqrt", "loss") is math.sqrt
    for name, message in {
        "ipp": "there is no loss 'ipp'; the nearest is 'ipo'. Choose one of dpo, ipo, bare, or "
        "my_pkg.module:function from outside.",
        "no_such_pkg.losses:mine": "loss 'no_such_pkg.losses:mine': there is no module 'no_such_pkg' on",
        "math:sqr": "loss 'math:sqr': the module 'math' has no function 'sqr'; the nearest is 'sqrt'.",
        "math:pi": "loss 'math:pi': the module 'math' has no function 'pi'; the nearest is",
        "math:": "there is no loss 'math:'; the nearest is",
    }.items():
        with pytest.raises(UserError) as caught:
            registry.resolve(LOSSES, name, "loss")
        assert str(caught.value).startswith(message)


def test_a_fault_inside_an_outside_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "outside_losses.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        registry.resolve(LOSSES, "outside_losses:mine", "loss")


def test_arguments_are_the_defaults_and_then_the_fields_set():
    assert registry.arguments("loss", dpo, Loss()) == {"beta": 0.1, "label_smoothing": 0.0}
    assert registry.arguments("loss", ipo, Loss(name="ipo", beta=0.3, length_normalised=False)) == {
        "beta": 0.3,
        "length_normalised": False,
        "form": "a",
    }
    assert registry.arguments("loss", bare, Loss(name="bare", scale=0)) == {"scale": 0}


def test_a_hyper_parameter_that_the_loss_does_not_read_is_refused():
    with pytest.raises(UserError) as caught:
        registry.arguments("loss", ipo, Loss(name="ipo", label_smoothing=0.1))
    assert str(caught.value) == (
        "loss 'ipo' would ignore label_smoothing; it takes beta, length_normalised, form. "
        "Drop --config.loss.label_smoothing or choose another --config.loss.name."
    )
    with pytest.raises(UserError, match=r"^loss 'bare' needs scale; pass --config.loss.scale.$"):
        registry.arguments("loss", bare, Loss(name="bare"))


def test_a_registry_that_no_config_can_describe_is_an_error_at_import():
    def other(pair: Any, *, beta: int = 1) -> Any: ...
    def untyped(pair: Any, *, beta=1) -> Any: ...
    def unflagged(pair: Any, *, beta: Any = 1) -> Any: ...

    with pytest.raises(TypeError, match="beta is .*int.* in other, but .*float.* in dpo"):
        registry.generated({"dpo": dpo, "other": other})
    for function in (untyped, unflagged):
        with pytest.raises(TypeError, match="beta of mine"):
            registry.generated({"mine": function})
    with pytest.raises(TypeError, match="must default to one of dpo"):
        registry.generated({"dpo": dpo})(type("Loss", (), {"name": "ipo"}))


def test_a_generated_section_may_have_fields_of_its_own():
    def adamw(rate: float, *, b1: float = 0.9) -> Any: ...

    @registry.generated({"adamw": adamw})
    class Optimizer:
        name: str = "adamw"
        rate: Annotated[float, "per update"] = 1e-3

    assert registry.arguments("optimizer", adamw, Optimizer(rate=1.0)) == {"b1": 0.9}
    assert [leaf.path for leaf in fields.leaves(Optimizer())] == ["name", "rate", "b1"]


finite = st.floats(allow_nan=False)
words = st.text()
configs = st.builds(
    Config,
    seed=st.integers(),
    data=st.builds(
        Data,
        path=st.lists(words).map(tuple),
        shares=st.lists(finite).map(tuple),
        too_long=st.sampled_from(["cut_prompt", "refuse", "stop"]),
        length=st.none() | st.integers(),
        shuffle=st.booleans(),
        pack=st.none() | st.booleans(),
        inner=st.builds(Inner, depth=st.integers()),
    ),
    loss=st.builds(
        Loss,
        name=words,
        beta=st.none() | finite,
        label_smoothing=st.none() | finite,
        form=st.none() | st.sampled_from(["a", "b"]),
    ),
    train=st.builds(Train, rate=finite),
)


@settings(deadline=None)
@given(configs)
def test_a_config_survives_json(config):
    saved = json.loads(json.dumps(fields.to_dict(config)))
    again = fields.from_dict(Config, saved)
    assert again == config and fields.diff(config, again) == []
    assert fields.to_dict(again) == saved


@settings(deadline=None)
@given(configs, configs)
def test_diff_is_empty_only_for_equals(a, b):
    assert (fields.diff(a, b) == []) == (a == b)
    assert len(fields.diff(a, b)) == len(fields.diff(b, a))


def test_diff_names_the_field_and_both_values():
    changed = Config(seed=1, data=Data(path=("a", "b"), length=None))
    lines = ["seed: 0 -> 1", "data.path:  -> a,b", "data.length: 256 -> none"]
    assert fields.diff(Config(), changed) == lines


def test_from_dict_refuses_what_it_does_not_know_and_keeps_the_defaults_of_what_is_absent():
    assert fields.from_dict(Config, {"train": {"steps": 3}}) == Config(train=Train(steps=3))
    for values, message in (
        ({"train": {"step": 3}}, "there is no field train.step; the nearest is train.steps."),
        ({"train": 3}, "train is 3, but it is a section with fields."),
        ({"train": {"steps": True}}, "train.steps is True, but it takes an int."),
        ({"train": {"steps": "3"}}, "train.steps is '3', but it takes an int."),
        (
            {"data": {"path": "a,b"}},
            "data.path is 'a,b', but it takes values with commas between, each a string.",
        ),
        ({"data": {"too_long": "x"}}, "data.too_long is 'x', but it takes one of cut_prompt, refuse, stop."),
    ):
        with pytest.raises(UserError) as caught:
            fields.from_dict(Config, values, "config.json: ")
        assert str(caught.value) == f"config.json: {message}"
    with pytest.raises(UserError, match="the field out is missing"):
        fields.from_dict(Alone, {})


def test_a_leaf_of_a_type_without_a_flag_is_a_fault_of_the_program():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        table: dict[str, int]

    with pytest.raises(TypeError, match="table is of type"):
        parse(program=Odd)


def test_run_turns_a_user_error_into_one_line_and_leaves_faults_alone(capsys):
    seen = []
    flags.run(seen.append, Alone, ["export", "--out=o"])
    assert seen == [Alone("o")]

    def unwritable(program: Alone) -> None:
        raise UserError(f"{program.out} can't be written;\nchoose another --out.")

    def broken(program: Alone) -> None:
        raise ZeroDivisionError

    for argv, line in (
        (["export", "--out=o"], "error: o can't be written; choose another --out.\n"),
        (["export"], "error: pass --out=...: the folder to write.\n"),
    ):
        with pytest.raises(SystemExit) as stopped:
            flags.run(unwritable, Alone, argv)
        captured = capsys.readouterr()
        assert (stopped.value.code, captured.err, captured.out) == (2, line, "")
    with pytest.raises(ZeroDivisionError):
        flags.run(broken, Alone, ["export", "--out=o"])


def test_a_program_reads_its_own_command_line_without_noise():
    code = (
        "import dataclasses\nfrom rlhf_jax import flags\n"
        "@dataclasses.dataclass(frozen=True)\nclass P:\n    n: int = 1\n"
        "flags.run(lambda p: print(p.n), P)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--n=4"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")
    done = subprocess.run([sys.executable, "-c", code, "--n=x"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: flag --n=x: it takes an int.\n")
