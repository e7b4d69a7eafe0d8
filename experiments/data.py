"""Writes the synthetic world as files of rows: python -m experiments.data --out=world."""

import dataclasses
import os
from typing import Annotated

from etils import epath

from rlhf_jax import flags
from rlhf_jax.data import world_rows
from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(world_rows.World):
    """Writes the synthetic world as files of rows, a pure function of these flags; docs/world.md has more."""

    out: Annotated[str, "folder to write; it must not exist, or be empty"]


def main(program: Data) -> None:
    """Runs it."""
    out = epath.Path(os.path.expanduser(program.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={program.out} already holds something; give a new folder.")
    try:
        written = world_rows.write(out, program)
    except OSError as error:
        raise UserError(f"--out={program.out} can't be written ({error}); give another folder.") from None
    for path, rows in written:
        print(f"{rows:6} rows  {path}")


if __name__ == "__main__":
    flags.run(main, Data)
