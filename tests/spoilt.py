"""Model folders and rows that are spoilt in one way each, beside whole ones that train."""

import dataclasses
import json
import pathlib
import shutil

from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from tests import tiny

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
SEVEN = [*PAIRS[:6], '{"prompt": "Q', *PAIRS[6:9]]  # line 7 is not JSON
HALVES = [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in PAIRS]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@dataclasses.dataclass(frozen=True)
class Ground:
    """A folder with a model and rows that train, where spoilt copies of them are made."""

    root: pathlib.Path

    @classmethod
    def made(cls, root: pathlib.Path) -> "Ground":
        ground = cls(root)
        tiny.write_model(ground.model)
        ground.rows("pairs.jsonl", PAIRS)
        return ground

    @property
    def model(self) -> pathlib.Path:
        return self.root / "model"

    @property
    def pairs(self) -> pathlib.Path:
        return self.root / "pairs.jsonl"

    def rows(self, name: str, rows: list) -> pathlib.Path:
        """A file of rows; a string is a line as it is."""
        file = self.root / name
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return file

    def spoilt(self, name: str, file: str = "", text: str = "", **config: object) -> pathlib.Path:
        """A copy of the model with a file of another text, or with other fields in its config."""
        folder = self.root / name
        shutil.copytree(self.model, folder, dirs_exist_ok=True)
        if config:
            (folder / "config.json").write_text(json.dumps(tiny.CONFIG | config))
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
        folder = self.spoilt(f"without-{name}")
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")
        return folder

    def larger_tokenizer(self) -> pathlib.Path:
        """With tokens that the model has no embedding for: <0> is 258, and the vocabulary ends at 259."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.add_tokens([f"<{i}>" for i in range(50)])
        tokenizer.save_pretrained(self.root / "larger")
        return self.root / "larger"
