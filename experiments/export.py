"""Writes a run's model as a Hugging Face folder: python -m experiments.export --workdir=RUN --out=FOLDER."""

import dataclasses
import os
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user

from etils import epath

from rlhf_jax import flags, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.workdir import load_policy


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes the model of a run as a Hugging Face folder, which transformers and --config.model.path load."""

    workdir: Annotated[str, "folder of the run"]
    out: Annotated[str, "folder to write; it must not exist, or be empty"]
    step: Annotated[int | None, "checkpoint to take; none: the newest"] = None


def main(program: Export) -> None:
    """Runs it."""
    out = epath.Path(os.path.expanduser(program.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={program.out} already holds something; give a new folder.")
    workdir = epath.Path(os.path.expanduser(program.workdir))
    policy = load_policy(workdir, program.step)
    hf.write(out, policy.model, policy.params, fetch=sharding.fetch)
    policy.tokenizer.save_pretrained(os.fspath(out))
    print(f"wrote step {policy.step} of {workdir} to {out}")


if __name__ == "__main__":
    flags.run(main, Export)
