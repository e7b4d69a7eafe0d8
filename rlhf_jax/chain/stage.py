"""What one stage needs, whatever it is a stage of: its training, a folder to start from, the config that made it."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from rlhf_jax import fields, run, sweep
from rlhf_jax.config import Config
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.workdir import Policy, best_step, check_note, check_writable, load_config


@contextlib.contextmanager
def named(stage: str, section: str | None = None) -> Iterator[None]:
    """Says whose mistake it is, with the flags as they are here; `section` is the stage's own if it has one."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{stage}: {str(error).replace('--config.', f'--config.{section or stage}.')}") from error


def train(config: Config, folder: epath.Path, stage: str, section: str | None = None) -> str:
    """Trains a stage to its end; the run, at its best checkpoint where its patience may have decided the end."""
    print(f"\n{stage}: {config.loss.name}, in {folder}", flush=True)
    with named(stage, section):
        if config.reward.members > 1:
            sweep.train_ensemble(config, os.fspath(folder), resume=True)
            return os.fspath(folder)
        run.train(config, os.fspath(folder), resume=True)
        return f"{folder}@{best_step(folder)}" if config.evaluate.patience else os.fspath(folder)


def model_folder(policy: Policy, place: epath.Path) -> str:
    """A run's model written out for others to start from, whole or not at all: `place`/model-STEP.

    Errors: UserError where one of that step lies there that another model was written to.
    """
    # By the step: of a run that went on it is another model.
    made, part = (place / f"model-{policy.step}{end}" for end in ("", ".part"))
    note, own = place / f"{made.name}.of", policy.identify()
    if made.exists():
        says = (
            f"{os.fspath(made)} was written from another model than the one of step {policy.step} that is given now; "
            "delete it and what was made from it, or give another --workdir."
        )
        check_note(note, own, says, write=True)  # older folders have no note
    else:
        part.rmtree(missing_ok=True)
        hf.write(part, policy.model, policy.params)
        policy.tokenizer.save_pretrained(os.fspath(part))
        note.write_text(own)  # without the folder it says nothing
        part.rename(made)
    return os.fspath(made)


def is_run(path: str) -> bool:
    """Whether it names a run, or a checkpoint of one."""
    for name in (path, path.rpartition("@")[0]):
        with contextlib.suppress(UserError, ImportError):
            load_config(epath.Path(os.path.expanduser(name)))
            return True
    return False


def hold(place: epath.Path, config: Any, record: str, made_with: Callable[[str], str | None]) -> None:
    """Takes the folder for this config, which `record` in it keeps.

    Args:
      made_with: a stage that has begun and that the value of a field decides.
    Errors: UserError where the folder holds another config, of which something is made.
    """
    check_writable(place, "workdir", "--workdir")
    file = place / record
    if file.exists():
        before = fields.from_dict(type(config), json.loads(file.read_text()), f"{file}: ")
        for line in fields.diff(before, config):
            if stale := made_with(line.partition(":")[0]):
                raise UserError(
                    f"workdir {str(place)!r} holds another chain ({line}), and its {stale} is made with it; go on with "
                    f"its own config, give another --workdir, or delete {place / stale} and what was made from it."
                )
    part = place / f"{record}.part"
    part.write_text(json.dumps(fields.to_dict(config), indent=2) + "\n")
    part.replace(file)
