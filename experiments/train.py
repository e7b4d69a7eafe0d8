"""Trains one experiment: python -m experiments.train --config=configs/dpo.py --workdir=runs/dpo."""

import dataclasses
import os
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user

from rlhf_jax import flags, run, sweep
from rlhf_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains one experiment."""

    config: Config
    workdir: Annotated[str, "folder that the run writes to"]
    resume: Annotated[bool, "continue the run that the folder holds; start it if there is none"] = False


def main(program: Train) -> None:
    """Runs it."""
    run.use_compile_cache()
    if program.config.reward.members > 1:
        sweep.train_ensemble(program.config, program.workdir, program.resume)
    else:
        run.train(program.config, program.workdir, program.resume)


if __name__ == "__main__":
    flags.run(main, Train)
