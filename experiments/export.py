"""Writes a run's model as a Hugging Face folder: python -m experiments.export --workdir=RUN --out=FOLDER."""

import dataclasses
import os
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user

from etils import epath

from rlhf_jax import flags, sharding
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models import peft
from rlhf_jax.models.tokenizers import load_tokenizer, tokenizer_folder
from rlhf_jax.objective import choose
from rlhf_jax.workdir import load_config, load_policy, load_trained


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes the model of a run as a Hugging Face folder, which transformers and --config.model.path load."""

    workdir: Annotated[str, "folder of the run"]
    out: Annotated[str, "folder to write; it must not exist, or be empty"]
    step: Annotated[int | None, "checkpoint to take; none: the newest"] = None
    adapter: Annotated[bool, "write the run's adapter alone, for PEFT; without it an adapter is merged"] = False


def main(program: Export) -> None:
    """Runs it."""
    out = epath.Path(os.path.expanduser(program.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={program.out} already holds something; give a new folder.")
    workdir = epath.Path(os.path.expanduser(program.workdir))
    if program.adapter:
        _adapter(program, workdir, out)
        return
    policy = load_policy(workdir, program.step)
    kind = None
    if policy.model.shape.head == "score":
        kind = "token" if choose(load_config(workdir)).reads.form == "stepwise" else "sequence"
    hf.write(out, policy.model, policy.params, fetch=sharding.fetch, kind=kind)
    policy.tokenizer.save_pretrained(os.fspath(out))
    print(f"wrote step {policy.step} of {workdir} to {out}")


def _adapter(program: Export, workdir: epath.Path, out: epath.Path) -> None:
    held = load_trained(workdir, program.step)
    if held.model.adapter is None:
        raise UserError(f"{program.workdir} trained all weights and no adapter; drop --adapter to write the model.")
    if held.found.adapter is not None:
        raise UserError(
            f"{program.workdir} started from {held.found.base} with an adapter already merged into it, so its own is "
            "one of no published model; drop --adapter to write the merged model."
        )
    peft.write_peft(out, held.model, held.params, base=str(held.config.model.path), fetch=sharding.fetch)
    load_tokenizer(tokenizer_folder(held.found, held.config.model.tokenizer)).save_pretrained(os.fspath(out))
    print(f"wrote the adapter of step {held.step} of {workdir} to {out}")


if __name__ == "__main__":
    flags.run(main, Export)
