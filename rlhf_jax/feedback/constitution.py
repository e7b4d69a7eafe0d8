"""A constitution: a file of principles that an answer is criticised, revised and compared by.

    [[principle]]
    name = "harmless"
    critique = "Say in what way the answer could do harm."
    revision = "Write the answer anew so that it does no harm."
    preference = "Which response does less harm?"

`critique` and `revision` belong together, and either they or `preference` may be missing: such a principle isn't drawn
for that use.
"""

import os
import tomllib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rlhf_jax import fields
from rlhf_jax.errors import UserError

FOLDER = epath.Path(__file__).parent / "constitutions"
SHIPPED = ("general", "world")
TABLE = "principle"  # of the file, one for each
DRAWN = {"revision": 1, "preference": 2}  # what a principle may be drawn for, with a number for its randomness


class Principle(NamedTuple):
    """What one principle asks for; a request that it doesn't make is empty."""

    name: str
    critique: str = ""
    revision: str = ""
    preference: str = ""


class Constitution(NamedTuple):
    """Principles with names of their own, in the order of their file."""

    source: str
    principles: tuple[Principle, ...]

    def of(self, use: str) -> tuple[Principle, ...]:
        """Those that may be drawn for a revision, or for a preference."""
        return tuple(one for one in self.principles if getattr(one, use))

    def draw(self, use: str, seed: int, places: Sequence[int], number: int = 0) -> list[Principle]:
        """A principle for each prompt, each as likely.

        The seed, the use, the prompt's place and the number decide, and nothing that stands beside it.

        Args:
          places: of the prompts in their file, at least 0.
          number: of the round.
        Errors: UserError if there is none of that use.
        """
        there = self.of(use)
        if not there:
            raise UserError(f"no principle of {self.source} has a {use}; give one of them one.")
        key = lambda place: np.random.default_rng([seed, DRAWN[use], number, place])
        return [there[int(key(place).integers(len(there)))] for place in places]


def read(path: str, flag: str = "--constitution") -> Constitution:
    """The constitution of a file, or of a name in SHIPPED.

    Args:
      flag: what gave the path, for messages.
    Errors: UserError naming the file, and the principle where there is one, that can't be used.
    """
    file = FOLDER / f"{path}.toml" if path in SHIPPED else epath.Path(os.path.expanduser(path))
    if not path or not file.is_file():
        raise UserError(f"there is no constitution {path!r}; give {flag} {', '.join(SHIPPED)} or a .toml file.")
    try:
        content = tomllib.loads(file.read_text())
    except UnicodeDecodeError:
        raise UserError(f"the constitution {path} is not UTF-8 text; give {flag} another file.") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"the constitution {path} can't be read ({str(error)[:200]}); mend it.") from None
    return Constitution(path, parse(content, path))


def parse(content: dict[str, Any], path: str) -> tuple[Principle, ...]:
    """The principles of what a file holds. Errors: UserError as `read`."""
    if others := [name for name in content if name != TABLE]:
        raise UserError(
            f"the constitution {path} has {others[0]!r} outside its principles; write [[{TABLE}]] above each of them."
        )
    tables = content.get(TABLE)
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"the constitution {path} has no principle; write [[{TABLE}]] above each of them.")
    found: dict[str, Principle] = {}
    for number, table in enumerate(tables, start=1):
        one = _principle(table, number, path)
        if one.name in found:
            raise UserError(f"the constitution {path} has two principles {one.name!r}; give each its own name.")
        found[one.name] = one
    return tuple(found.values())


def _principle(table: dict[str, Any], number: int, path: str) -> Principle:
    named = table["name"].strip() if isinstance(table.get("name"), str) else ""
    called = f"principle {number}{f' ({named})' if named else ''} of the constitution {path}"
    for key, value in table.items():
        if key not in Principle._fields:
            raise UserError(
                f"{called} has {key!r}, which is not read; the nearest is {fields.nearest(key, Principle._fields)}."
            )
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{called} has a {key} that is no text; write one between quotes, or leave it out.")
    if not named:
        raise UserError(f"{called} has no name; give it one.")
    one = Principle(**{key: value.strip() for key, value in table.items()})
    if bool(one.critique) != bool(one.revision):
        lacks, has = ("revision", "critique") if one.critique else ("critique", "revision")
        raise UserError(f"{called} has a {has} and no {lacks}; give it both, or neither.")
    if not one.revision and not one.preference:
        raise UserError(f"{called} asks for nothing; give it a preference, or a critique and a revision.")
    return one
