"""Flags: what is written is what is read, and every mistake ends in one sentence."""

import dataclasses
import math
import pathlib
import subprocess
import sys
from typing import Annotated, Any

import pytest

from rlhf_jax import fields, flags
from rlhf_jax.errors import UserError
from tests.toy import Alone, Config, Data, Defaulted, Loss, Program, Train

FILE = """
from tests.toy import Config, Data, Train
VARIANTS = {"default": 100, "tiny": 20}
def get_config(variant: str = "default"):
    return Config(seed=5, train=Train(steps=VARIANTS[variant], rate=1), data=Data(path=["a.jsonl"]))
"""


@pytest.fixture
def file(tmp_path: pathlib.Path) -> str:
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


@dataclasses.dataclass(frozen=True)
class Worded:
    runs: Annotated[tuple[str, ...], flags.WORDS, "folders"] = ()
    seed: int = 0


def test_a_field_may_take_the_words_of_the_command_line(capsys):
    assert parse("a", "b,c", "--seed=1", "d", program=Worded) == Worded(("a", "b,c", "d"), 1)
    assert parse("--seed=1", "--", "-a", program=Worded) == Worded(("-a",), 1)
    assert parse("--runs=a,b", program=Worded) == Worded(("a", "b"))
    assert parse(program=Worded) == Worded()
    assert refused("c", "--runs=a,b", program=Worded) == (
        "the word 'c' and --runs say the same thing; leave one of them away."
    )
    with pytest.raises(SystemExit):
        parse("--help", program=Worded)
    shown = capsys.readouterr().out
    assert "--runs=  [values with commas between" in shown and "folders; also the words of the command line" in shown


def test_a_word_that_nothing_takes_is_refused_whatever_the_program(file):
    assert refused("--out=o", "word", program=Alone) == (
        "nothing reads the word 'word'; write --flag=value, --help lists the flags."
    )
    assert "nothing reads the word 'word'" in refused(f"--config={file}", "word")
