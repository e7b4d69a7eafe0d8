"""Whatever is wrong with what a user gives ends in one line that says what to do, before anything is compiled."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import pytest
from etils import epath

from experiments import train
from rlhf_jax import checks, fields, flags
from rlhf_jax.config import Config
from rlhf_jax.workdir import open_workdir
from tests.spoilt import CHAT, HALVES, LABELLED, PAIRS, POINTER, SEVEN, Ground

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return Ground.made(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def compiled():
    """The names of all programs that were compiled since it was cleared."""
    names: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(str(kwargs.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(note)
    return names


def line(ground: Ground, workdir: pathlib.Path | str, *more: str) -> list[str]:
    """A command line that trains, and then `more` of it."""
    return [
        "train", f"--config={ROOT}/configs/dpo.py", f"--config.model.path={ground.model}",
        f"--config.data.path={ground.pairs}", f"--config.cache={ground.root}/cache", "--config.train.steps=2",
        "--config.log.progress=false", "--config.log.tensorboard=false", f"--workdir={workdir}", *more,
    ]  # fmt: skip


@pytest.fixture
def refused(capsys, compiled) -> Callable[[list[str]], str]:
    """Runs a command line that must fail, and gives its one line on stderr."""

    def run(argv: list[str]) -> str:
        compiled.clear()
        with pytest.raises(SystemExit) as stopped:
            flags.run(train.main, train.Train, argv)
        captured = capsys.readouterr()
        assert stopped.value.code == 2
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert "Traceback" not in captured.err and captured.out == ""
        assert compiled == []
        return captured.err

    return run


def data(path: object) -> str:
    return f"--config.data.path={path}"


def model(path: object) -> str:
    return f"--config.model.path={path}"


TOKENIZER = "--config.model.tokenizer"
SFT = [f"--config.{field}" for field in ("algorithm=sft", "loss.name=nll", "optimizer.name=sgd", "mesh.data=1")]
ENDLESS = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
WITHOUT_FILE = '{"weight_map": {"a": "b.safetensors"}}'

# What is wrong -> (flags, or how to make them; what the line must say: the thing, and what to do).
Cases = dict[str, tuple[list[str] | Callable[[Ground], list[str]], list[str]]]
COMMAND_LINE: Cases = {
    "flag": (["--config.lss.name=ipo"], ["no flag --config.lss.name", "--config.loss.name", "--help"]),
    "flag by its initials": (["--config.optimizer.lr=1"], ["the nearest is --config.optimizer.learning_rate"]),
    "flag elsewhere": (["--config.batch_size=4"], ["the nearest is --config.train.batch_size"]),
    "flag of the program": (["--resum"], ["no flag --resum", "--resume"]),
    "word": (["steps=3"], ["'steps=3'", "--flag=value"]),
    "type": (["--config.train.steps=many"], ["--config.train.steps=many", "an int, or none"]),
    "percent": (["--config.data.eval_share=5%"], ["--config.data.eval_share=5%", "a number"]),
    "not a number": (["--config.optimizer.learning_rate=nan"], ["learning_rate=nan", "a number"]),
    "infinite": (["--config.optimizer.learning_rate=inf"], ["learning_rate=inf", "must be finite"]),
    "choice": (["--config.model.param_dtype=float16"], ["param_dtype=float16", "float32, bfloat16"]),
    "algorithm": (["--config.algorithm=pqo"], ["--config.algorithm=pqo", "sft, preference"]),
    "config file": (["--config=configs/dpp.py"], ["no config file 'configs/dpp.py'", "is configs/dpo.py"]),
    "config name": (["--config=dpo"], ["no config file 'dpo'", "is configs/dpo.py"]),
    "config of a run": (lambda g: [f"--config={g.model}/config.json"], ["config.json is not a config file, FILE.py"]),
    "variant": ([f"--config={ROOT}/configs/dpo.py:tinny"], ["no variant 'tinny'", "'tiny' of default, tiny, small"]),
    "flag file": (["--flagfile=nowhere.txt"], ["nowhere.txt"]),
    "empty text": (["--config.cache="], ["--config.cache= is empty"]),
    "threads": (["--config.data.threads=-1"], ["--config.data.threads=-1", "at least 0"]),
    "seed": ([f"--config.seed={2**70}"], [f"--config.seed={2**70}", "4294967295"]),
    "cache": (["--config.cache=/dev/null/cache"], ["/dev/null/cache", "give another --config.cache"]),
    "package": (["--config.log.wandb=true"], ["needs the package wandb", "pip install"]),
}
LOSS_AND_OPTIMIZER: Cases = {
    "loss": (["--config.loss.name=dpoo"], ["no loss 'dpoo'", "nearest is 'dpo'", "ipo"]),
    "loss outside": (["--config.loss.name=nowhere:mine"], ["no module 'nowhere'"]),
    "loss of another kind": (["--config.loss.name=math:sqrt"], ["math:sqrt", "annotate its first argument"]),
    "loss of another algorithm": (["--config.loss.name=nll"], ["'nll'", "--config.algorithm=sft"]),
    "algorithm of another loss": (["--config.algorithm=sft"], ["'dpo'", "--config.loss.name from nll, dft"]),
    "unread by the loss": (
        ["--config.loss.name=ipo", "--config.loss.label_smoothing=0.1"],
        ["'ipo' would ignore label_smoothing", "it takes beta", "Drop --config.loss.label_smoothing"],
    ),
    "beta": (["--config.loss.beta=0"], ["--config.loss.beta=0.0", "above 0"]),
    "smoothing": (["--config.loss.label_smoothing=0.5"], ["label_smoothing=0.5", "below 0.5"]),
    "optimizer": (["--config.optimizer.name=adam"], ["no optimizer 'adam'", "nearest is 'adamw'"]),
    "unread by the optimizer": (["--config.optimizer.momentum=0.9"], ["'adamw' would ignore momentum", "takes b1"]),
    "schedule": (["--config.optimizer.schedule=cosin"], ["schedule=cosin", "cosine, wsd"]),
    "unread by the schedule": (["--config.optimizer.decay=0.1"], ["'linear' would ignore decay", "schedule=wsd"]),
    "rate": (["--config.optimizer.learning_rate=-1"], ["learning_rate=-1.0", "at least 0"]),
    "steps": (["--config.train.steps=0"], ["--config.train.steps=0", "at least 1"]),
}
MESH_AND_BATCH: Cases = {
    "mesh": (["--config.mesh.tensor=3"], ["tensor=3 does not divide the 260 of embedding", "--config.mesh.tensor"]),
    "devices": (["--config.mesh.data=16"], ["wants 16 devices", "there are 8", "--config.mesh.data"]),
    "axes": (["--config.mesh.data=-1", "--config.mesh.fsdp=-1"], ["at most one axis is -1"]),
    "batch": (["--config.train.batch_size=9"], ["batch_size=9", "8 row shards", "a multiple of 8"]),
    "microbatches": (["--config.train.microbatches=3"], ["into 3 microbatches", "a multiple of 24"]),
}
MODEL: Cases = {
    "no model": (["--config.model.path=none"], ["no model", "give --config.model.path="]),
    "model folder": (["--config.model.path=nowhere/"], ["'nowhere/'", "--config.model.path"]),
    "model on the Hub": (["--config.model.path=nobody/nothing"], ["'nobody/nothing'", "the Hub", "--config.model"]),
    "attention": (["--config.model.attention=splash"], ["attention=splash runs on TPUs alone", "choose auto"]),
    "no config": (lambda g: [model(g.without("bare", "config.json"))], ["holds no config.json", "Hugging Face"]),
    "no checkpoint": (
        lambda g: [model(g.without("light", "*.safetensors"))],
        ["holds no *.safetensors", "--config.model.init=random"],
    ),
    "family": (lambda g: [model(g.spoilt("mamba", model_type="mamba"))], ["'mamba'", "supported are llama, mistral"]),
    "shape": (
        lambda g: [model(g.spoilt("wide", hidden_size=64))],
        ["model.embed_tokens.weight is (260, 32)", "calls for (260, 64)"],
    ),
    "tensor": (
        lambda g: [model(g.without_tensor("model.layers.1.mlp.up_proj.weight"))],
        ["lacks the tensor model.layers.1.mlp.up_proj.weight"],
    ),
    "weights as LFS": (
        lambda g: [model(g.spoilt("lfs", "model.safetensors", POINTER))],
        ["model.safetensors is a Git LFS pointer", "git lfs pull"],
    ),
    "weights cut short": (
        lambda g: [model(g.spoilt("cut", "model.safetensors", "12345678"))],
        ["model.safetensors is not a whole safetensors file", "fetch it again"],
    ),
    "config cut short": (lambda g: [model(g.spoilt("half", "config.json", '{"a'))], ["config.json", "fetch it again"]),
    "config of nothing": (lambda g: [model(g.spoilt("list", "config.json", "[]"))], ["not the config of a model"]),
    "config of other types": (lambda g: [model(g.spoilt("text", hidden_size="32"))], ["text/config.json", "fetch it"]),
    "file for a folder": (lambda g: [model(g.model / "config.json")], ["is a file", "the folder that holds it"]),
    "tokenizer's folder": ([f"{TOKENIZER}=nowhere/"], ["'nowhere/'", f"check {TOKENIZER}"]),
    "weights that the index names": (
        lambda g: [model(g.spoilt("index", "model.safetensors.index.json", WITHOUT_FILE))],
        ["b.safetensors, which is missing", "fetch the whole model folder"],
    ),
    "no tokenizer": (lambda g: [model(g.without("mute", "token*"))], ["holds no tokenizer", f"{TOKENIZER}=FOLDER"]),
    "tokenizer broken": (
        lambda g: [model(g.spoilt("badly", "tokenizer.json", "{}"))],
        ["badly holds no tokenizer", f"{TOKENIZER}=FOLDER"],
    ),
    "tokenizer without end": (
        lambda g: [f"{TOKENIZER}={g.spoilt('endless', 'tokenizer_config.json', ENDLESS)}"],
        ["no end token", "set eos_token"],
    ),
    "tokenizer of another model": (
        lambda g: [
            f"{TOKENIZER}={g.larger_tokenizer()}",
            data(g.rows("larger.jsonl", [row | {"chosen": "<30>"} for row in PAIRS])),
        ],
        ["token 288", "ends at 259", f"check {TOKENIZER}"],
    ),
    "length": (["--config.data.length=65"], ["data.length=65", "context of 64", "lower it"]),
    "no length": (["--config.data.length=0"], ["data.length=0", "at least 2"]),
}
DATA: Cases = {
    "no data": (["--config.data.path="], ["no data", "--config.data.path"]),
    "data": ([data("nowhere.jsonl")], ["no data file or folder nowhere.jsonl", "check --config.data.path"]),
    "one of two": (lambda g: [data(f"{g.pairs},nowhere.jsonl")], ["no data file or folder nowhere.jsonl"]),
    "held-out data": (["--config.data.eval_path=nowhere.jsonl"], ["nowhere.jsonl", "check --config.data.eval_path"]),
    "data on the Hub": ([data("nobody/nothing")], ["'nobody/nothing'", "the Hub", "--config.data.path"]),
    "suffix": (lambda g: [data(g.rows("rows.csv", ["a,b"]))], ["suffix", ".jsonl"]),
    "empty": (lambda g: [data(g.rows("empty.jsonl", []))], ["empty.jsonl is empty", "at least one row"]),
    "LFS": (
        lambda g: [data(g.rows("pointer.jsonl", [POINTER]))],
        ["pointer.jsonl is a Git LFS pointer", "git lfs pull"],
    ),
    "parquet": (lambda g: [data(g.rows("rows.parquet", ["no"]))], ["rows.parquet can't be read", "check the file"]),
    "JSON": (
        lambda g: [data(g.rows("seven.jsonl", SEVEN))],
        ["seven.jsonl:7: invalid JSON", "1 of 10", "data.max_refused=0.05", "mend the rows"],
    ),
    "no JSON": (lambda g: [data(g.rows("text.jsonl", ["hi"] * 3))], ["text.jsonl:1: invalid JSON", "give JSON Lines"]),
    "all refused": (
        lambda g: [data(g.rows("void.jsonl", [r | {"chosen": ""} for r in PAIRS])), "--config.data.max_refused=1"],
        ["no row to train on is left of 40", "void.jsonl:1: 'chosen' is an empty answer", "mend the rows"],
    ),
    "column": (
        lambda g: [data(g.rows("halves.jsonl", HALVES))],
        ["halves.jsonl holds prompts without answers", "'chosen', 'prompt'", "preference also needs 'rejected'"],
    ),
    "column of the format": (
        lambda g: [data(g.rows("halves.jsonl", HALVES)), "--config.data.format=preference"],
        ["halves.jsonl has no column 'rejected'", "add the column or choose --config.data.format from auto"],
    ),
    "columns": (
        lambda g: [data(g.rows("odd.jsonl", [{"title": "a"}] * 9))],
        ["odd.jsonl has the columns 'title'", "allowed are", "messages"],
    ),
    "format": (["--config.data.format=trl"], ["format=trl", "auto", "preference"]),
    "labels": (
        lambda g: [data(g.rows("labelled.jsonl", LABELLED))],
        ["needs pairs", "labelled.jsonl holds labelled single answers", "--config.loss.name=kto"],
    ),
    "demonstrations": (
        lambda g: [data(g.rows("shown.jsonl", [{"prompt": "Q", "completion": " a"}] * 9))],
        ["needs pairs", "shown.jsonl holds single answers", "use --config.algorithm=sft --config.loss.name=nll"],
    ),
    "no template": (
        lambda g: [data(g.rows("chat.jsonl", CHAT))],
        ["no chat template", "--config.data.chat_template=FILE"],
    ),
    "template": (["--config.data.chat_template=nowhere.jinja"], ["nowhere.jinja", "--config.data.chat_template"]),
    "syntax of the template": (
        lambda g: [
            data(g.rows("chat.jsonl", CHAT)),
            f"--config.data.chat_template={g.rows('bad.jinja', ['{% for %}'])}",
        ],
        ["bad.jinja is not valid Jinja", "mend it"],
    ),
    "share": (["--config.data.eval_share=1"], ["eval_share=1.0", "below 1"]),
    "all held out": (
        lambda g: [f"--config.data.eval_path={g.pairs}"],
        ["no row to train on is left", "--config.data.eval_path"],
    ),
    "all too long": (
        ["--config.data.length=4", "--config.data.too_long=refuse"],
        ["40 longer than 4 tokens", "raise --config.data.length"],
    ),
    "weights": (["--config.data.weights=1,2"], ["2 numbers for 1 paths", "give one each"]),
    "one prompt": (
        lambda g: [data(g.rows("one.jsonl", [row | {"prompt": "Q"} for row in PAIRS])), "--config.loss.name=kto"],
        ["all rows have one prompt", "give data with several prompts"],
    ),
}
CASES = COMMAND_LINE | LOSS_AND_OPTIMIZER | MESH_AND_BATCH | MODEL | DATA


@pytest.mark.parametrize("wrong", CASES)
def test_what_is_wrong_is_named_with_what_to_do_before_anything_is_compiled(wrong, ground, refused, tmp_path):
    if wrong == "package" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    make, says = CASES[wrong]
    workdir = tmp_path / "run"
    message = refused(line(ground, workdir, *(make(ground) if callable(make) else make)))
    for phrase in says:
        assert phrase in message
    # The command can be given again as soon as it is right.
    config = Config(cache=str(tmp_path / "cache"))
    assert open_workdir(epath.Path(workdir), config, resume=False) is None


def test_the_real_model_on_a_mesh_that_does_not_divide_it(ground, refused, stories, tmp_path):
    message = refused(line(ground, tmp_path / "run", model(stories), "--config.mesh.tensor=8"))
    assert "mesh axis tensor=8 does not divide the 172 of layers/down/kernel" in message


def test_what_must_be_given(refused, tmp_path):
    assert "pass --config=FILE.py" in refused(["train"])
    file = f"--config={ROOT}/configs/dpo.py"
    assert "pass --workdir=" in refused(["train", file])
    assert "give the folder that the run writes to" in refused(["train", file, "--workdir="])
    assert "give --config.model.path=" in refused(["train", file, f"--workdir={tmp_path}/run"])


def test_a_workdir_that_cannot_be_written_to(ground, refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for workdir in (file, file / "run"):
        assert "lies on a file, which is no folder; give another --workdir." in refused(line(ground, workdir))
    assert file.read_text() == "mine"
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    # The superuser may write anywhere but where the kernel itself says no.
    workdir = locked / "run" if os.geteuid() else pathlib.Path("/proc/run")
    message = refused(line(ground, workdir))
    assert f"workdir '{workdir}' can't be written to (" in message and "give another --workdir." in message


def test_a_folder_that_holds_no_run_is_not_taken_for_one(ground, refused, tmp_path):
    folder = ground.spoilt("kept")
    before = (folder / "config.json").read_text()
    for more in ([], ["--resume"]):
        message = refused(line(ground, folder, *more))
        assert "config.json is not the config of a run; give another --workdir." in message
    (tmp_path / "config.json").write_text('{"seed": 0,')
    assert "is not the config of a run" in refused(line(ground, tmp_path, "--resume"))
    assert (folder / "config.json").read_text() == before


@pytest.fixture(scope="module")
def finished(ground, compiled, tmp_path_factory) -> pathlib.Path:
    """A run of two steps on rows of which line 7 is invalid JSON, fewer than may be refused."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    ground.rows("mixed.jsonl", [*PAIRS[:6], '{"prompt": "Q', *PAIRS[6:]])
    compiled.clear()
    flags.run(train.main, train.Train, line(ground, workdir, *SFT, data(ground.root / "mixed.jsonl")))
    assert compiled  # so nothing compiled means something above
    return workdir


def test_invalid_json_below_the_share_that_may_be_refused_is_counted_and_named(finished):
    (row,) = [json.loads(line) for line in (finished / "rows.jsonl").read_text().splitlines()]
    assert row["where"].endswith("mixed.jsonl:7") and row["what"] == "refused"
    assert row["reason"].startswith("invalid JSON")


def test_a_used_workdir_is_neither_begun_again_nor_continued_as_another_run(ground, refused, finished):
    again = line(ground, finished, *SFT, data(ground.root / "mixed.jsonl"))
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    assert "already holds a run; continue it with --resume or give another --workdir." in refused(again)
    message = refused([*again, "--resume", "--config.loss.name=dft"])
    assert "holds another experiment (loss.name: nll -> dft)" in message and "another --workdir" in message
    assert "optimizer.learning_rate: 0.0001 -> 0.1" in refused(
        [*again, "--resume", "--config.optimizer.learning_rate=0.1", "--config.train.steps=9"]
    )
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == before


def test_rows_that_changed_under_a_run_are_not_trained_on(ground, finished, capsys, tmp_path):
    more = [*SFT, data(ground.rows("mixed.jsonl", PAIRS[:20])), "--config.train.steps=4", "--resume"]
    with pytest.raises(SystemExit):
        flags.run(train.main, train.Train, line(ground, finished, *more))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "mixed.jsonl are not those" in error and "another --workdir" in error


def test_a_name_for_the_best_checkpoint_that_no_metric_has(ground, capsys, tmp_path):
    """Known only once the metrics are; the folder does not count as used even so."""
    argv = line(ground, tmp_path / "run", *SFT, "--config.checkpoint.best=eval/los")
    for _ in range(2):
        with pytest.raises(SystemExit):
            flags.run(train.main, train.Train, argv)
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--config.checkpoint.best=eval/los" in error and "eval/loss" in error


def test_every_rule_for_values_is_one_for_a_field_that_exists():
    paths = {leaf.path for leaf in fields.leaves(Config())}
    assert {name for _, names in checks.ALLOWED.values() for name in names} <= paths


def test_the_program_itself_says_it_in_one_line(ground, tmp_path):
    """As a user sees it: processes with nothing patched, side by side."""
    commands = {
        "no flag --config.lss.name": ["--config.lss.name=ipo"],
        "lacks the tensor model.norm.weight": [model(ground.without_tensor("model.norm.weight"))],
    }
    pipe = subprocess.PIPE
    running = {
        says: subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *line(ground, tmp_path / str(number), *more)[1:]],
            cwd=ROOT, stdout=pipe, stderr=pipe, text=True,
        )
        for number, (says, more) in enumerate(commands.items())
    }  # fmt: skip
    for says, process in running.items():
        out, error = process.communicate(timeout=120)
        assert (process.returncode, out) == (2, "")
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error
