"""The folder of a run: whether one may be started or resumed in it, and what it holds."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
from etils import epath

from rlhf_jax import fields, sharding
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.checkpoint import digest, is_sealed, latest, read_host, restore_params
from rlhf_jax.config import MAY_CHANGE_ON_RESUME, Config
from rlhf_jax.errors import UserError
from rlhf_jax.models import lora, start
from rlhf_jax.models.decoder import Model
from rlhf_jax.models.tokenizers import load_tokenizer, tokenizer_folder
from rlhf_jax.objective import choose
from rlhf_jax.ops.layout import Layout


def open_workdir(workdir: epath.Path, config: Config, resume: bool) -> int | None:
    """Checks that the folder may be written to, and gives the step to resume from, or None for a new run.

    Errors: UserError for a folder that can't be written, one that holds a run when `resume` is False, and a
    resumption under a config that makes it another experiment.
    """
    check_writable(workdir, "workdir", "--workdir")
    if config.algorithm == "preference":  # most of its losses keep reference columns there
        check_writable(epath.Path(os.path.expanduser(config.cache)), "cache", "--config.cache")
    if not (workdir / "config.json").exists():
        return None
    before = load_config(workdir)  # of a run, not of a model whose folder was given
    step = latest(workdir / "checkpoints")
    if not resume and (step is not None or last_line(workdir / "metrics.jsonl")):
        raise UserError(
            f"workdir {str(workdir)!r} already holds a run; continue it with --resume or give another --workdir."
        )
    if step is None:
        return None
    changed = [line for line in fields.diff(before, config) if not line.startswith(MAY_CHANGE_ON_RESUME)]
    if changed:
        raise UserError(
            f"workdir {str(workdir)!r} holds another experiment ({'; '.join(changed)}); "
            "resume with its own config or give another --workdir."
        )
    return step


def check_writable(folder: epath.Path, what: str, flag: str) -> None:
    """Makes the folder if need be. Errors: UserError where it can't be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink(missing_ok=True)  # another process may have been faster
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{what} {str(folder)!r} lies on a file, which is no folder; give another {flag}.") from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{what} {str(folder)!r} can't be written to ({reason}); give another {flag}.") from error
    except ImportError as error:  # gs:// needs a package of its own
        raise UserError(f"{what} {str(folder)!r} needs a package ({error}); install it or change {flag}.") from error


def load_config(workdir: epath.Path) -> Config:
    """The config that a run was started with. Errors: UserError if the folder holds no run."""
    file = workdir / "config.json"
    if not file.exists():
        raise UserError(f"{str(workdir)!r} holds no run (there is no config.json); give the --workdir of one.")
    try:
        values = json.loads(file.read_text())
    except ValueError:
        values = None
    if not isinstance(values, dict) or "algorithm" not in values:
        raise UserError(f"{file} is not the config of a run; give another --workdir.")
    return fields.from_dict(Config, values, f"{file}: ")


def last_line(file: epath.Path) -> dict[str, Any]:
    """The last row of a JSON lines file; {} if there is none."""
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1]) if lines else {}


def evaluations(workdir: epath.Path) -> list[dict[str, Any]]:
    """What eval.jsonl says, a row an evaluation, without a line that a kill cut short."""
    file, rows = workdir / "eval.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def best_step(workdir: epath.Path) -> int:
    """The step of the whole checkpoint whose evaluation had the lowest eval/loss.

    Errors: UserError if the folder holds no checkpoint that was evaluated.
    """
    folder = workdir / "checkpoints"
    losses = {row["step"]: row["eval/loss"] for row in evaluations(workdir) if "eval/loss" in row}
    there = [step for step in losses if is_sealed(folder / str(step))]
    if not there:
        raise UserError(f"{str(workdir)!r} holds no checkpoint that was evaluated; give the newest, without @best.")
    return min(there, key=lambda step: (math.isnan(losses[step]), losses[step]))


class Policy(NamedTuple):
    """A model, one that writes or one that scores, with what it takes to use it."""

    model: Model
    params: Any
    tokenizer: Any
    step: int  # of the run; 0 for a model that no run made
    end_ids: tuple[int, ...] = ()  # tokens that its generation_config.json ends at
    identify: Callable[[], str] = str  # a hash of every byte that the parameters come from, hex


class Held(NamedTuple):
    """What a run's checkpoint holds: all weights, or those of an adapter."""

    config: Config
    found: start.Start  # what the run started from
    model: Model
    params: Any
    step: int
    shift: float  # what a reward model's scores are moved by, so that demonstrations score 0 on average


def load_trained(workdir: epath.Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> Held:
    """What a run has trained, from its newest checkpoint or that of `step`; optimiser state is not read.

    Args:
      mesh: where to put it; None: the first device.
    Errors: UserError if the folder holds no run, or not that checkpoint.
    """
    config = load_config(workdir)
    folder = workdir / "checkpoints"
    at = latest(folder) if step is None else step
    if at is None or not (folder / str(at)).exists():
        there = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []
        wanted = "a whole checkpoint" if step is None else f"a checkpoint of step {step}"
        raise UserError(f"{str(workdir)!r} does not hold {wanted}; it holds those of steps {there or 'none'}.")
    mesh = sharding.make_mesh(sharding.MeshShape(1, 1, 1)) if mesh is None else mesh
    found = start.find(str(config.model.path))
    head = ALGORITHMS[config.algorithm].HEAD
    model = lora.attach(config.lora, start.describe(found, config.model.numerics(), Layout(mesh), head))
    sharding.check_divides(model, mesh)
    shapes = model.shapes() if model.adapter is None else lora.split(model.shapes())[0]
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    like = jax.tree.map(place, shapes, sharding.param_shardings(shapes, mesh))
    part = getattr(ALGORITHMS[config.algorithm], "POLICY", None)  # beside a value
    shift = read_host(folder, at).get("shift", 0.0)  # older checkpoints have none
    params = restore_params(folder, at, like if part is None else {part: like})
    return Held(config, found, model, params if part is None else params[part], at, shift)


def load_policy(workdir: epath.Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None) -> Policy:
    """The model that a run holds, as `load_trained`; an adapter is merged into the weights that it was trained on.

    The scores of a reward model are shifted as the checkpoint says.
    """
    config, found, model, params, step, shift = load_trained(workdir, step, mesh)
    adapted = model.adapter is not None
    if model.adapter is not None:
        check_base(workdir, found)
        place = lambda path, _: sharding.param_sharding(cast(Any, model.layout.mesh), path)
        base = start.load(found, model.without_adapter(), place, config.lora.base)
        model, params = model.without_adapter(), jax.jit(lambda a, b: lora.merge(model, a, b)[1])(params, base)
    if model.shape.head == "score":
        params = {**params, "score_bias": params["score_bias"] + shift}
    tokenizer = load_tokenizer(tokenizer_folder(found, config.model.tokenizer))
    if config.data.chat_template is not None:
        tokenizer.chat_template = epath.Path(os.path.expanduser(config.data.chat_template)).read_text()
    own = workdir / "checkpoints" / str(step) / "state"
    identify = lambda: digest(own) + (f"-{start.identity(found)}" if adapted else "")
    return Policy(model, params, tokenizer, step, end_ids(found), identify)


NOTES = ("base", "teacher", "rewards")  # files that name the models which a run's checkpoints don't hold


def check_note(note: epath.Path, own: str, says: str, write: bool) -> None:
    """Holds a run to what its folder notes of a model that its checkpoints don't hold.

    Args:
      own: the model's identity.
      write: note it if there is no note yet.
    Errors: UserError, that says so, if another is noted.
    """
    if note.exists() and note.read_text() != own:
        raise UserError(says)
    if write and not note.exists():
        note.write_text(own)


def check_base(workdir: epath.Path, found: start.Start, write: bool = False) -> None:
    """Holds a run of an adapter, or of rollouts, to the weights it was started on, which its checkpoints don't hold.

    Args:
      write: note them if the folder has no note yet.
    Errors: UserError if they are not those that are noted.
    """
    says = (
        f"the weights in {found.folder} are not those that {str(workdir)!r} was started on, and what it learnt "
        "means nothing without them; put them back or give another --workdir."
    )
    check_note(workdir / "base", start.identity(found), says, write)


def open_policy(
    path: str, step: int | None = None, mesh: jax.sharding.Mesh | None = None, flag: str = "--model"
) -> Policy:
    """A model that writes, from whatever `open_model` opens. Errors: UserError also for one that scores."""
    policy = open_model(path, step, mesh, flag)
    if policy.model.shape.head != "words":
        raise UserError(f"{path!r} holds a reward model, which scores answers and writes none; give {flag} another.")
    return policy


def open_rewards(
    path: str, step: int | None = None, mesh: jax.sharding.Mesh | None = None, flag: str = "--reward"
) -> list[Policy]:
    """A reward model, or the members of an ensemble: a folder whose `members` are runs.

    Errors: UserError as `open_model`, and for a model that writes.
    """
    ensemble = epath.Path(os.path.expanduser(path)) / "members"
    several = sorted(ensemble.iterdir(), key=_natural) if not _has_config(path) and ensemble.is_dir() else []
    opened = [open_model(os.fspath(one), step, mesh, flag) for one in several] or [open_model(path, step, mesh, flag)]
    if any(policy.model.shape.head != "score" for policy in opened):
        raise UserError(
            f"{path!r} holds a model that writes answers and scores none; give {flag} the folder of a reward model, "
            "which --config=configs/reward.py trains."
        )
    return opened


def of_steps(path: str, flag: str = "--reward") -> bool:
    """Whether a reward model is one of steps: its run's loss says it, or its folder's class.

    Errors: UserError for a path that holds no model, or the run of one that writes.
    """
    name, at, wanted = path.rpartition("@")
    name = name if at and (wanted == "best" or wanted.isdecimal()) and not _has_config(path) else path
    folder = epath.Path(os.path.expanduser(name))
    if not (folder / "config.json").exists() and (folder / "members").is_dir():
        folder = next(iter(sorted((folder / "members").iterdir())), folder)
    file = folder / "config.json"
    if not file.exists():
        file = start.find(os.fspath(folder) if folder.exists() else name, flag).base / "config.json"
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{path!r} holds neither a run nor a model; give {flag} the folder of a reward model."
        ) from None
    if "algorithm" not in values:
        return any(str(one).endswith("ForTokenClassification") for one in values.get("architectures") or ())
    config = load_config(folder)
    if config.algorithm != "reward":
        raise UserError(
            f"{path!r} holds a run of {config.algorithm}, whose model writes answers and scores none; give {flag} a "
            "reward model, which --config.algorithm=reward trains."
        )
    return choose(config).reads.form == "stepwise"


def _natural(path: epath.Path) -> list[Any]:
    """Orders names as people do: seed=2 before seed=10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path.name)]


def open_model(
    path: str, step: int | None = None, mesh: jax.sharding.Mesh | None = None, flag: str = "--model"
) -> Policy:
    """The model of a run's workdir, of a Hugging Face folder or of a Hub name.

    Args:
      path: of a run also WORKDIR@STEP, and WORKDIR@best for the checkpoint with the best evaluation.
      step: as WORKDIR@STEP; none: the newest.
      mesh: where to put it; None: the first device.
      flag: what gave the path, for messages.
    Errors: UserError where there is neither, or not that checkpoint.
    """
    name, at, wanted = path.rpartition("@")
    if not at or not (wanted == "best" or wanted.isdecimal()) or _has_config(path):
        name, wanted = path, ""
    if wanted and step is not None:
        raise UserError(f"{flag}={path} names a checkpoint and step={step} another; give one of them.")
    workdir = epath.Path(os.path.expanduser(name))
    if _has_config(name) and _is_run(workdir / "config.json"):
        step = int(wanted) if wanted.isdecimal() else best_step(workdir) if wanted else step
        return load_policy(workdir, step, mesh)
    if wanted or step is not None:
        raise UserError(
            f"{name!r} holds no run, so it has no checkpoint {wanted or step}; give {flag} the workdir of one, or "
            "leave the checkpoint away."
        )
    found = start.find(name, flag)
    if not (found.base / "config.json").exists():
        raise UserError(f"{name!r} holds neither a run nor a model (no config.json); give {flag} a folder of either.")
    mesh = sharding.make_mesh(sharding.MeshShape(1, 1, 1)) if mesh is None else mesh
    model = start.describe(found, layout=Layout(mesh))
    sharding.check_divides(model, mesh)
    if not any(found.base.glob("*.safetensors")):
        raise UserError(f"model folder {name!r} holds no *.safetensors weights; give {flag} a folder with them.")
    try:
        tokenizer = load_tokenizer(tokenizer_folder(found))
    except UserError as error:
        reason = str(error.__cause__).split("\n")[0]
        raise UserError(
            f"model folder {name!r} holds no tokenizer that transformers can read ({reason}); give {flag} a folder "
            "with one."
        ) from error
    params = start.load(found, model, lambda ours, _: sharding.param_sharding(mesh, ours))
    return Policy(model, params, tokenizer, 0, end_ids(found), lambda: start.identity(found))


def _has_config(path: str) -> bool:
    try:
        return (epath.Path(os.path.expanduser(path)) / "config.json").exists()
    except ImportError:  # gs:// needs a package of its own, which hf.folder names
        return False


def _is_run(file: epath.Path) -> bool:
    """Whether a config.json is a run's rather than a model's."""
    try:
        values = json.loads(file.read_text())
    except ValueError:
        return False
    return isinstance(values, dict) and "algorithm" in values


def end_ids(found: start.Start) -> tuple[int, ...]:
    """The tokens that a model's generation_config.json ends at; () if it doesn't say."""
    file = found.with_file("generation_config.json") / "generation_config.json"
    try:
        values = json.loads(file.read_text()) if file.exists() else {}
    except ValueError:
        return ()
    ids = values.get("eos_token_id") if isinstance(values, dict) else None
    return tuple(i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int)
