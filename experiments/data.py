"""Shows what data files are taken for, or writes the synthetic world.

python -m experiments.data --path=FILE [--tokenizer=FOLDER]
python -m experiments.data --out=world
"""

import dataclasses
import os
import pathlib
import re
import sys
from typing import Annotated, Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath
from rich.console import Console

from rlhf_jax import flags
from rlhf_jax.data import inspection, sources, world_rows
from rlhf_jax.data.config import FormatName
from rlhf_jax.data.templates import TrainOn
from rlhf_jax.data.tokens import Encoder, Special
from rlhf_jax.errors import UserError
from rlhf_jax.report import rows as drawn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(world_rows.World):
    """Shows what data files are taken for (--path), or writes the synthetic world as files of rows (--out).

    The world is a pure function of its flags; docs/world.md has more of it, docs/data.md of files.
    """

    out: Annotated[str | None, "folder to write the world to; it must not exist, or be empty"] = None
    path: Annotated[tuple[str, ...], "files, folders or Hub names to show; several give a table, a row a file"] = ()
    format: Annotated[FormatName, "the columns of the rows of --path; auto finds out"] = "auto"
    tokenizer: Annotated[str | None, "folder or Hub name of a tokenizer for --path; none: words are counted"] = None
    chat_template: Annotated[str | None, "Jinja file used in the place of the tokenizer's chat template"] = None
    train_on: Annotated[TrainOn, "assistant turns of a conversation that are trained: all of them, or the last"] = "all"
    special: Annotated[Special, "what special tokens written out in rows of strings are"] = "text"
    length: Annotated[int | None, "most tokens a row may have; none: the model's context, where it is known"] = None
    rows: Annotated[int, "how many rows of a single file are shown"] = 3
    split: Annotated[str, "split of a Hub data set that is read"] = "train"


NEEDS_TOKENIZER = {"chat_template": None, "train_on": "all", "special": "text", "length": None}  # and what is not given
OF_FILES = ("path", "format", "tokenizer", "rows", "split", *NEEDS_TOKENIZER)


def main(program: Data) -> None:
    """Runs it."""
    if bool(program.path) == (program.out is not None):
        raise UserError("give either --path=FILE, to see what it is taken for, or --out=FOLDER, to write the world.")
    unread = [f for f in dataclasses.fields(program) if (f.name in OF_FILES) != bool(program.path) and f.name != "out"]
    if given := [field.name for field in unread if getattr(program, field.name) != field.default]:
        mode = "--path shows files" if program.path else "--out writes the world"
        raise UserError(f"{mode} and does not read --{given[0]}; drop it.")
    if not program.path:
        write(program, str(program.out))
        return
    try:
        show(program)
    except UserError as error:  # what reads data speaks of the flags of training
        raise UserError(str(error).replace("--config.data.", "--")) from error


def write(program: Data, folder: str) -> None:
    """Writes the world."""
    out = epath.Path(os.path.expanduser(folder))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={folder} already holds something; give a new folder.")
    try:
        written = world_rows.write(out, program)
    except OSError as error:
        raise UserError(f"--out={folder} can't be written ({error}); give another folder.") from None
    for path, rows in written:
        print(f"{rows:6} rows  {path}")


def show(program: Data) -> None:
    """Prints what the files are taken for."""
    if program.rows < 0:
        raise UserError(f"--rows={program.rows} must be at least 0.")
    if program.length is not None and program.length < 2:
        raise UserError(f"--length={program.length} must be at least 2: one token of a prompt and one of an answer.")
    given = [name for name, default in NEEDS_TOKENIZER.items() if getattr(program, name) != default]
    if given and program.tokenizer is None:
        raise UserError(f"--{given[0]} says what becomes of tokens, and there are none; give --tokenizer=FOLDER.")
    reader = _reader(program) if program.tokenizer is not None else None
    length = reader and reader.length
    files = [file for path in program.path for file in _files(path)]
    console = Console(highlight=False, markup=False, emoji=False)
    if len(files) == 1:
        found = inspection.inspect(files[0], program.format, reader, program.rows, program.split)
        console.print(drawn.page(found, length))
        return
    told = [("/".join(pathlib.PurePath(file).parts[-2:]), _tried(file, program, reader)) for file in files]
    console.print(drawn.several(told, length, console))
    if any(isinstance(found, str) for _, found in told):
        sys.exit(1)  # the table says which, and why


def _tried(file: str, program: Data, reader: inspection.Reader | None) -> inspection.Found | str:
    try:
        return inspection.inspect(file, program.format, reader, 0, program.split)
    except UserError as error:
        return str(error)


def _files(path: str) -> list[str]:
    """The data files of a folder, or the path itself."""
    place = epath.Path(path).expanduser()
    try:
        is_folder = bool(path) and place.is_dir()
    except ImportError:  # gs:// needs a package of its own, and reading says so
        is_folder = False
    return [os.fspath(file) for file in sources.files(place)] if is_folder else [path]


def _reader(program: Data) -> inspection.Reader:
    """The tokenizer, with the length asked for, or else its model's."""
    from transformers import AutoTokenizer

    name = str(program.tokenizer)
    place = epath.Path(name).expanduser()
    if not place.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(f"there is no folder {name}; check --tokenizer.")
    try:
        with sources.quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(os.fspath(place) if place.is_dir() else name)
    except Exception as error:  # a broken tokenizer.json raises whatever its reader stumbled over
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"--tokenizer={name} gives no tokenizer that transformers can read ({reason}); give a folder with one."
        ) from error
    encoder = Encoder(tokenizer, program.chat_template, train_on=program.train_on, special=program.special)
    length = program.length or _context(place)
    if length is None and tokenizer.model_max_length < 1e9:  # a huge number stands for none
        length = int(tokenizer.model_max_length)
    return inspection.Reader(encoder, tokenizer, length)


def _context(folder: epath.Path) -> int | None:
    """The context of the model in a folder; None if there is none, or none that we can be."""
    from rlhf_jax.models import checkpoint  # it loads jax, which nothing else here needs

    try:
        return checkpoint.describe(folder).shape.length
    except (UserError, OSError):
        return None


if __name__ == "__main__":
    flags.run(main, Data)
