"""Whatever is wrong with what a user gives ends in one line that says what to do, before anything is compiled."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import jax
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from experiments import train
from rlhf_jax import build, fields, flags
from rlhf_jax.config import Config
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.workdir import open_workdir

ROOT = pathlib.Path(__file__).resolve().parents[1]
LLAMA = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
PAIRS = [{"prompt": f"Q{i}:", "chosen": f" yes {i}", "rejected": " no"} for i in range(40)]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"hi {i}"}],
        "chosen": [{"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "assistant", "content": "go"}],
    }
    for i in range(9)
]
LABELLED = [{"prompt": f"Q{i}:", "completion": " a", "label": i % 2 == 0} for i in range(9)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@dataclasses.dataclass(frozen=True)
class Ground:
    """A model folder and rows that train, and ways to spoil copies of them."""

    root: pathlib.Path

    @property
    def model(self) -> pathlib.Path:
        return self.root / "model"

    @property
    def pairs(self) -> pathlib.Path:
        return self.root / "pairs.jsonl"

    def tokenizer(self, name: str, added: int = 0, **special: str) -> pathlib.Path:
        """One token a byte, 0 to 255, then the end token, 256, and `added` more: <0>, <1>, ..."""
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<eos>"])
        tokenizer.add_tokens([f"<{i}>" for i in range(added)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(self.root / name)
        return self.root / name

    def spoilt(self, name: str, file: str = "", text: str = "", **config: object) -> pathlib.Path:
        """A copy of the model with a file of another text, or with other fields in its config."""
        folder = self.root / name
        shutil.copytree(self.model, folder, dirs_exist_ok=True)
        if config:
            (folder / "config.json").write_text(json.dumps(LLAMA | config))
        if file:
            (folder / file).write_text(text)
        return folder

    def without(self, name: str, pattern: str) -> pathlib.Path:
        """A copy of the model without the files of a pattern."""
        folder = self.spoilt(name)
        for file in folder.glob(pattern):
            file.unlink()
        return folder

    def without_tensor(self, name: str) -> pathlib.Path:
        folder = self.spoilt("tensor")
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")
        return folder

    def rows(self, name: str, rows: list) -> pathlib.Path:
        """A file of rows; a string is a line as it is."""
        file = self.root / name
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return file


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    ground = Ground(tmp_path_factory.mktemp("ground"))
    ground.tokenizer("model", eos_token="<eos>")
    (ground.model / "config.json").write_text(json.dumps(LLAMA))
    model = hf.describe(ground.model)
    hf.write(ground.model, model, model.init(jax.random.key(0)))
    ground.rows("pairs.jsonl", PAIRS)
    return ground


@pytest.fixture(scope="module")
def compiled():
    """The names of all programs that were compiled since it was cleared."""
    names: list[str] = []

    def note(event: str, seconds: float, **more: object) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(str(more.get("fun_name", "?")))

    jax.random.key(0)  # reading a model's shapes makes one, which is two tiny programs of JAX's own
    jax.monitoring.register_event_duration_secs_listener(note)
    return names


@pytest.fixture(autouse=True)
def no_cache_of_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))


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


def cases(g: Ground) -> dict[str, tuple[list[str], list[str]]]:
    """What is wrong -> (flags, what the line must say: the thing, and what to do)."""
    path, model, tokenizer = "--config.data.path={}".format, "--config.model.path={}".format, "--config.model.tokenizer"
    seven = [*PAIRS[:6], '{"prompt": "Q', *PAIRS[6:9]]
    halves = [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in PAIRS]
    return {
        # The command line
        "flag": (["--config.lss.name=ipo"], ["no flag --config.lss.name", "--config.loss.name", "--help"]),
        "flag by its initials": (["--config.optimizer.lr=1"], ["--config.optimizer.learning_rate"]),
        "flag elsewhere": (["--config.batch_size=4"], ["the nearest is --config.train.batch_size"]),
        "program's flag": (["--resum"], ["no flag --resum", "--resume"]),
        "word": (["steps=3"], ["'steps=3'", "--flag=value"]),
        "type": (["--config.train.steps=many"], ["--config.train.steps=many", "an int, or none"]),
        "percent": (["--config.data.eval_share=5%"], ["--config.data.eval_share=5%", "a number"]),
        "not a number": (["--config.optimizer.learning_rate=nan"], ["learning_rate=nan", "a number"]),
        "infinite": (["--config.optimizer.learning_rate=inf"], ["learning_rate=inf", "must be finite"]),
        "choice": (["--config.model.param_dtype=float16"], ["param_dtype=float16", "float32, bfloat16"]),
        "algorithm": (["--config.algorithm=ppo"], ["--config.algorithm=ppo", "sft, preference"]),
        "config file": (["--config=configs/dpp.py"], ["no config file 'configs/dpp.py'", "is configs/dpo.py"]),
        "config name": (["--config=dpo"], ["no config file 'dpo'", "is configs/dpo.py"]),
        "config of a run": ([f"--config={g.model}/config.json"], ["config.json is not a config file, FILE.py"]),
        "variant": ([f"--config={ROOT}/configs/dpo.py:tiny"], ["no variant 'tiny'", "dpo.py alone"]),
        "flag file": (["--flagfile=nowhere.txt"], ["nowhere.txt"]),
        "empty text": (["--config.cache="], ["--config.cache= is empty"]),
        # The loss and the optimiser
        "loss": (["--config.loss.name=dpoo"], ["no loss 'dpoo'", "nearest is 'dpo'", "ipo"]),
        "loss outside": (["--config.loss.name=nowhere:mine"], ["no module 'nowhere'"]),
        "loss of another kind": (["--config.loss.name=math:sqrt"], ["math:sqrt", "annotate its first argument"]),
        "loss of another algorithm": (["--config.loss.name=nll"], ["'nll'", "--config.algorithm=sft"]),
        "algorithm of another loss": (["--config.algorithm=sft"], ["'dpo'", "--config.loss.name from nll, dft"]),
        "unread": (
            ["--config.loss.name=ipo", "--config.loss.label_smoothing=0.1"],
            ["'ipo' would ignore label_smoothing", "it takes beta", "Drop --config.loss.label_smoothing"],
        ),
        "beta": (["--config.loss.beta=0"], ["--config.loss.beta=0.0", "above 0"]),
        "smoothing": (["--config.loss.label_smoothing=0.5"], ["label_smoothing=0.5", "below 0.5"]),
        "optimizer": (["--config.optimizer.name=adam"], ["no optimizer 'adam'", "nearest is 'adamw'"]),
        "unread by it": (["--config.optimizer.momentum=0.9"], ["'adamw' would ignore momentum", "it takes b1"]),
        "schedule": (["--config.optimizer.schedule=cosin"], ["schedule=cosin", "cosine, wsd"]),
        "unread by the schedule": (["--config.optimizer.decay=0.1"], ["'linear' would ignore decay", "schedule=wsd"]),
        "rate": (["--config.optimizer.learning_rate=-1"], ["learning_rate=-1.0", "at least 0"]),
        "steps": (["--config.train.steps=0"], ["--config.train.steps=0", "at least 1"]),
        "threads": (["--config.data.threads=-1"], ["--config.data.threads=-1", "at least 0"]),
        "seed": ([f"--config.seed={2**70}"], [f"--config.seed={2**70}", "4294967295"]),
        "cache": (["--config.cache=/dev/null/cache"], ["/dev/null/cache", "give another --config.cache"]),
        # Meshes and batches
        "mesh": (["--config.mesh.tensor=3"], ["tensor=3 does not divide the 260 of embedding", "--config.mesh.tensor"]),
        "devices": (["--config.mesh.data=16"], ["wants 16 devices", "there are 8", "--config.mesh.data"]),
        "axes": (["--config.mesh.data=-1", "--config.mesh.fsdp=-1"], ["at most one axis is -1"]),
        "batch": (["--config.train.batch_size=9"], ["batch_size=9", "8 row shards", "a multiple of 8"]),
        "microbatches": (["--config.train.microbatches=3"], ["into 3 microbatches", "a multiple of 24"]),
        # Models and tokenizers
        "no model": (["--config.model.path=none"], ["no model", "give --config.model.path="]),
        "model folder": ([model("nowhere/")], ["'nowhere/'", "--config.model.path"]),
        "model on the Hub": ([model("nobody/nothing")], ["'nobody/nothing'", "the Hub", "--config.model.path"]),
        "no config": ([model(g.without("bare", "config.json"))], ["holds no config.json", "Hugging Face"]),
        "no checkpoint": ([model(g.without("light", "*.safetensors"))], ["no *.safetensors", "--config.model.init=random"]),
        "family": ([model(g.spoilt("mamba", model_type="mamba"))], ["'mamba'", "supported are llama, qwen2"]),
        "shape": ([model(g.spoilt("wide", hidden_size=32))], ["embed_tokens.weight is (260, 16)", "calls for (260, 32)"]),
        "tensor": (
            [model(g.without_tensor("model.layers.1.mlp.up_proj.weight"))],
            ["lacks the tensor model.layers.1.mlp.up_proj.weight"],
        ),
        "weights as LFS": ([model(g.spoilt("lfs", "model.safetensors", POINTER))], ["model.safetensors", "fetch it again"]),
        "weights named": (
            [model(g.spoilt("index", "model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}'))],
            ["b.safetensors, which is missing", "fetch the whole model folder"],
        ),
        "no tokenizer": ([model(g.without("mute", "token*"))], ["holds no tokenizer", f"{tokenizer}=FOLDER"]),
        "tokenizer broken": ([model(g.spoilt("badly", "tokenizer.json", "{}"))], ["badly holds no tokenizer", tokenizer]),
        "tokenizer without end": ([f"{tokenizer}={g.tokenizer('endless')}"], ["no end token", "set eos_token"]),
        "tokenizer of another model": (
            [
                f"{tokenizer}={g.tokenizer('larger', added=50, eos_token='<eos>')}",
                path(g.rows("larger.jsonl", [row | {"chosen": "<30>"} for row in PAIRS])),
            ],
            ["token 287", "ends at 259", f"check {tokenizer}"],
        ),
        "length": (["--config.data.length=65"], ["data.length=65", "context of 64", "lower it"]),
        "no length": (["--config.data.length=0"], ["data.length=0", "at least 2"]),
        # Data
        "no data": ([path("")], ["no data", "--config.data.path"]),
        "data": ([path("nowhere.jsonl")], ["no data file or folder nowhere.jsonl", "check --config.data.path"]),
        "one of two": ([path(f"{g.pairs},nowhere.jsonl")], ["no data file or folder nowhere.jsonl"]),
        "held-out data": (["--config.data.eval_path=nowhere.jsonl"], ["nowhere.jsonl", "check --config.data.eval_path"]),
        "data on the Hub": ([path("nobody/nothing")], ["'nobody/nothing'", "the Hub", "--config.data.path"]),
        "suffix": ([path(g.rows("rows.csv", ["a,b"]))], ["suffix", ".jsonl"]),
        "empty": ([path(g.rows("empty.jsonl", []))], ["empty.jsonl is empty", "at least one row"]),
        "LFS": ([path(g.rows("pointer.jsonl", [POINTER]))], ["pointer.jsonl is a Git LFS pointer", "git lfs pull"]),
        "parquet": ([path(g.rows("rows.parquet", ["no"]))], ["rows.parquet can't be read as parquet", "check the file"]),
        "JSON": (
            [path(g.rows("seven.jsonl", seven))],
            ["seven.jsonl:7: invalid JSON", "1 of 10", "data.max_refused=0.05", "mend the rows"],
        ),
        "no JSON": ([path(g.rows("text.jsonl", ["hello"] * 3))], ["text.jsonl:1: invalid JSON", "give JSON Lines"]),
        "all refused": (
            [path(g.rows("void.jsonl", [row | {"chosen": ""} for row in PAIRS])), "--config.data.max_refused=1"],
            ["no row to train on is left of 40", "void.jsonl:1: 'chosen' is an empty answer", "mend the rows"],
        ),
        "column": ([path(g.rows("halves.jsonl", halves))], ["'chosen', 'prompt'", "preference also needs 'rejected'"]),
        "column of the format": (
            [path(g.root / "halves.jsonl"), "--config.data.format=preference"],
            ["halves.jsonl has no column 'rejected'", "preference (prompt, chosen, rejected)"],
        ),
        "columns": ([path(g.rows("odd.jsonl", [{"text": "a"}] * 9))], ["the columns 'text'", "allowed are", "messages"]),
        "format": (["--config.data.format=trl"], ["format=trl", "auto", "preference"]),
        "labels": (
            [path(g.rows("labelled.jsonl", LABELLED))],
            ["needs pairs", "labelled.jsonl holds labelled single answers", "use --config.loss.name=kto"],
        ),
        "demonstrations": (
            [path(g.rows("shown.jsonl", [{"prompt": "Q", "completion": " a"}] * 9))],
            ["needs pairs", "single answers", "use --config.algorithm=sft --config.loss.name=nll"],
        ),
        "no template": ([path(g.rows("chat.jsonl", CHAT))], ["no chat template", "--config.data.chat_template=FILE"]),
        "template": (["--config.data.chat_template=nowhere.jinja"], ["nowhere.jinja", "--config.data.chat_template"]),
        "template's syntax": (
            [path(g.root / "chat.jsonl"), f"--config.data.chat_template={g.rows('bad.jinja', ['{% for %}'])}"],
            ["bad.jinja is not valid Jinja", "mend it"],
        ),
        "share": (["--config.data.eval_share=1"], ["eval_share=1.0", "below 1"]),
        "all held out": ([f"--config.data.eval_path={g.pairs}"], ["no row to train on", "--config.data.eval_path"]),
        "all too long": (
            ["--config.data.length=4", "--config.data.too_long=refuse"],
            ["40 longer than 4 tokens", "raise --config.data.length"],
        ),
        "weights": (["--config.data.weights=1,2"], ["2 numbers for 1 paths", "give one each"]),
        "one prompt": (
            [path(g.rows("one.jsonl", [row | {"prompt": "Q"} for row in PAIRS])), "--config.loss.name=kto"],
            ["all rows have one prompt", "give data with several prompts"],
        ),
    }  # fmt: skip


NAMES = list(cases.__code__.co_consts[0:0]) or None  # filled below: pytest wants the names before any fixture
