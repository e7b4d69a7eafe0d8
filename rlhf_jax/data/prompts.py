"""Prompts to answer, from any rows that have some, with the other columns of their rows."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from rlhf_jax.data import formats, sources
from rlhf_jax.data.rows import Prompt, Refusal, Text
from rlhf_jax.errors import UserError

HOLDERS = ("prompt", "messages")  # columns that hold a prompt


class Asked(NamedTuple):
    """A prompt, where it came from, what else its row says, and the tools that it offers (see `rows`)."""

    where: str
    text: Text
    columns: dict[str, Any] = {}
    tools: str = ""


def read(path: str, flag: str = "--prompts") -> list[Asked]:
    """The prompts of a file, in its order.

    Args:
      path: rows with a column prompt or messages (`sources.read`; of a conversation what stands before its last
        answer), or any other file, whose lines are prompts.
      flag: what gave the path, for messages.
    Errors: UserError for a file that isn't there, and naming the first line that can't be used.
    """
    if not path:
        raise UserError(f"there are no prompts; give {flag}=FILE.")
    file = epath.Path(path).expanduser()
    try:
        if not file.is_file():
            raise UserError(f"there is no file {path}; check {flag}.")
    except ImportError as error:  # gs:// needs a package of its own
        raise UserError(f"{path} can't be read here ({error}); install it or change {flag}.") from error
    if file.name.lower().endswith(tuple(sources.TABLES)):
        asked = [_row(record) for record in sources.read(path, flag=flag)]
    else:
        asked = list(_lines(file, flag))
    if not asked:
        raise UserError(f"{path} holds no prompt; give {flag} a file with at least one line.")
    return asked


def columns(asked: list[Asked]) -> dict[str, list[Any]]:
    """The other columns of the rows, each with a value a prompt, None where a row has none."""
    names = dict.fromkeys(name for one in asked for name in one.columns)
    return {name: [one.columns.get(name) for one in asked] for name in names}


def _row(record: sources.Record | sources.Refused) -> Asked:
    if isinstance(record, sources.Refused):
        raise UserError(f"{record.where} can't be used ({record.reason}); mend it.")
    name = next((name for name in HOLDERS if name in record.columns), None)
    if name is None:
        raise UserError(f"{record.where} has neither a column prompt nor messages; give it one of them.")
    try:
        offered = {key: record.columns[key] for key in ("tools",) if key in record.columns}
        (row,) = formats.adapt("prompt", {"prompt": record.columns[name], **offered}, True)
    except Refusal as refusal:
        raise UserError(f"{record.where} can't be used ({refusal}); mend its {name}.") from None
    assert isinstance(row, Prompt)
    text = row.prompt
    if name == "messages" and isinstance(text, tuple) and len(text) > 1 and text[-1].role == "assistant":
        text = text[:-1]  # the answer of a demonstration
    others = {key: value for key, value in record.columns.items() if key not in HOLDERS}
    return Asked(record.where, text, others, row.tools)


def _lines(file: epath.Path, flag: str) -> Iterator[Asked]:
    # Bytes split at \n alone: str.splitlines would also split at U+2028 inside a prompt.
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError:
            raise UserError(f"{file}:{number} is not UTF-8 text; give {flag} a text or JSONL file.") from None
        if text.strip():
            yield Asked(f"{file}:{number}", text)
