"""Records from JSON Lines files, JSON lists, parquet and text files, folders of them and Hub data sets.

Every record knows where it comes from, so that a row that can't be used is named by file and line. Paths go
through `etils.epath`: `gs://` works wherever a folder does.
"""

import contextlib
import dataclasses
import gzip
import itertools
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, cast

from etils import epath

from rlhf_jax.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"
END_OF_TEXT = b"<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Record:
    """One row as it stands in its source.

    Attributes:
      where: `file.jsonl:7` (line, from 1) or `name[7]` (row of a table or list, from 0).
      columns: column name -> JSON value; a null counts as absent and is left out.
    """

    where: str
    columns: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Refused:
    """A place where a row should stand and can't be read, with the reason."""

    where: str
    reason: str


def read(path: str, split: str = "train", flag: str = "--config.data.path") -> Iterator[Record | Refused]:
    """All records of a file, a folder (its data files by name) or a Hub data set, in order.

    Args:
      path: a local or `gs://` path, or the name of a Hub data set.
      split: the split of a Hub data set; files have none.
      flag: what gave the path, for messages.
    Raises: UserError for what isn't there, is empty, is a Git LFS pointer or has an unknown suffix.
    """
    if not path:  # it would be the folder that the program runs in
        raise UserError(f"one of the paths of {flag} is empty; drop the comma before or behind it")
    place = epath.Path(path).expanduser()
    try:
        is_folder, is_there = place.is_dir(), place.exists()
    except ImportError as error:  # gs:// needs a package of its own
        raise UserError(f"{path} can't be read here ({error}); run `pip install gcsfs` or change {flag}") from error
    if is_folder:
        return itertools.chain.from_iterable(map(_file, files(place)))
    if is_there:
        return _file(place)
    if _looks_local(path):
        raise UserError(f"there is no data file or folder {path}; check {flag}")
    return _hub(path, split, flag)


def _looks_local(path: str) -> bool:
    return path.startswith(".") or _suffix(path) is not None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path)


def _suffix(name: str) -> str | None:
    """The longest known suffix of a file name."""
    return max((s for s in READERS if name.lower().endswith(s)), key=len, default=None)


def files(folder: epath.Path) -> list[epath.Path]:
    """The data files of a folder by name. Raises: UserError if it has none."""
    found = sorted(f for f in folder.iterdir() if _suffix(f.name) and f.is_file())
    # Beside tables a text is a licence or a note, not data.
    chosen = [f for f in found if _suffix(f.name) in TABLES] or found
    if not chosen:
        raise UserError(f"the folder {folder} holds no data file; it may hold {', '.join(READERS)}")
    return chosen


def _file(file: epath.Path) -> Iterator[Record | Refused]:
    suffix = _suffix(file.name)
    if suffix is None:
        raise UserError(f"the suffix of {file} is unknown; a data file ends in {', '.join(READERS)}")
    with file.open("rb") as f:
        head = f.read(len(LFS_POINTER))
    if head == LFS_POINTER:
        raise UserError(f"{file} is a Git LFS pointer, not the data; run `git lfs pull` in its repository")
    some = False
    for record in READERS[suffix](file):
        some = True
        yield record
    if not some:
        raise UserError(f"the data file {file} is empty; give a file with at least one row")


@contextlib.contextmanager
def _open(file: epath.Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked if they are gzip whatever the file is called."""
    with file.open("rb") as raw:
        packed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        if not packed:
            yield cast(IO[bytes], raw)
            return
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield cast(IO[bytes], unpacked)


def _lines(file: epath.Path) -> Iterator[Record | Refused]:
    try:
        with _open(file) as f:
            # Bytes split at \n alone: str.splitlines would also split at U+2028 inside a row.
            for number, line in enumerate(f, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield _parse(line.rstrip(), f"{file}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file} is a broken gzip file ({error}); get it again") from error


def _parse(line: bytes, where: str) -> Record | Refused:
    try:
        return _record(json.loads(line), where)
    except UnicodeDecodeError as error:
        return Refused(where, f"not UTF-8 text at byte {error.start}")
    except json.JSONDecodeError as error:
        return Refused(where, f"invalid JSON, {error.msg} at column {error.colno}")
    except RecursionError:
        return Refused(where, "JSON nested too deeply")


def _record(value: Any, where: str) -> Record | Refused:
    if not isinstance(value, dict):
        return Refused(where, "not a JSON object")
    return Record(where, {name: column for name, column in value.items() if column is not None})


def _json(file: epath.Path) -> Iterator[Record | Refused]:
    """A JSON list of rows, or JSON lines under the name .json, which is common."""
    with _open(file) as f:
        content = f.read()
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _lines(file)
        return
    try:
        values = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); mend it or give JSON Lines") from error
    for number, value in enumerate(values):
        yield _record(value, f"{file}[{number}]")


def _text(file: epath.Path) -> Iterator[Record | Refused]:
    """The documents of a text file: what stands between lines of END_OF_TEXT; without any, between blank lines;
    without these too, each line.

    A document is named by its first line. The newline at its end, and blank lines around it, are not a part of it.
    """
    with _open(file) as f:
        try:
            lines = f.read().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").split(b"\n")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file} is a broken gzip file ({error}); get it again") from error
    while lines and not lines[-1].strip():  # the newline that ends the last line, and blank lines behind it
        lines.pop()
    between = next((mark for mark in (END_OF_TEXT, b"") if any(line.strip() == mark for line in lines)), None)
    # Lines that stand together: all between two marks, or each alone where there is no mark.
    place = itertools.accumulate((between is None or line.strip() == between for line in lines), initial=0)
    numbered = zip(place, enumerate(lines, start=1), strict=False)
    for _, some in itertools.groupby(numbered, key=lambda pair: pair[0]):
        block = _unpadded([line for _, line in some if line[1].strip() != between])
        if block:
            where = f"{file}:{block[0][0]}"
            try:
                yield Record(where, {"text": b"\n".join(line for _, line in block).decode()})
            except UnicodeDecodeError as error:
                yield Refused(where, f"not UTF-8 text at byte {error.start}")


def _unpadded(lines: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """Without the blank lines before the first and after the last that is not blank."""
    full = [place for place, (_, line) in enumerate(lines) if line.strip()]
    return lines[full[0] : full[-1] + 1] if full else []


def _parquet(file: epath.Path) -> Iterator[Record | Refused]:
    with file.open("rb") as f:
        whole = f.read(4) == PARQUET_MAGIC
    if not whole:  # `datasets` would write a line of its own beside ours
        raise UserError(f"{file} can't be read as parquet (it does not begin with PAR1); check the file")
    import datasets

    try:
        # Streaming: no second copy of the file in the cache of `datasets`.
        with quiet():
            table = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        yield from _table(table, str(file))
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds for a file that can't be read
        raise UserError(f"{file} can't be read as parquet ({_first_line(error)}); check the file") from error


def _hub(name: str, split: str, flag: str) -> Iterator[Record | Refused]:
    import datasets

    try:
        with quiet():
            table = datasets.load_dataset(name, split=split)
    except Exception as error:  # no network, no such set, no such split: each its own class
        raise UserError(
            f"{name!r} is no file or folder here, and its split {split!r} can't be had from the Hub "
            f"({_first_line(error)}); check {flag}, --config.data.split and the network"
        ) from error
    return _table(cast(Iterable[Any], table), name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what libraries log of a failure, retries too, from standing before our one sentence."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _table(table: Iterable[Any], name: str) -> Iterator[Record | Refused]:
    for number, value in enumerate(table):
        yield _record(_filled(value), f"{name}[{number}]")


def _filled(value: Any) -> Any:
    """Without the nulls that a table writes into an object for the keys that only others of its column have."""
    if isinstance(value, dict):
        return {name: _filled(item) for name, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


TABLES: dict[str, Callable[[epath.Path], Iterator[Record | Refused]]] = {
    ".jsonl": _lines,
    ".jsonl.gz": _lines,
    ".json": _json,
    ".json.gz": _json,
    ".parquet": _parquet,
}
READERS = TABLES | {".txt": _text, ".txt.gz": _text}
