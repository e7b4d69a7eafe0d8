"""Studies of the known failures of RLHF: python -m experiments.lab --name=sycophancy --seeds=5.

Runs one study where the true reward is known, on a start of its own for every seed, and writes its page: the question,
figures with every seed, claims with intervals, what mends the failure and at what price. The same command again goes on
where it was ended. docs/lab.md lists the studies and says how to write one.
"""

import dataclasses
import os
import pathlib
import platform
import subprocess
from typing import Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax
from etils import epath

from rlhf_jax import fields, flags, run
from rlhf_jax.errors import UserError
from rlhf_jax.lab import page, running
from rlhf_jax.lab.findings import found, mended
from rlhf_jax.lab.studies import STUDIES
from rlhf_jax.workdir import check_writable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lab:
    """Runs a study of a known failure and writes its page."""

    name: Annotated[str, f"of the study: {', '.join(STUDIES)}"]
    seeds: Annotated[int, "how many, from 0; intervals need 2 and say little below 5"] = 5
    knobs: Annotated[str, "FIELD=VALUE;FIELD=VALUE: settings of the study other than its own; its page lists them"] = ""
    out: Annotated[str, "folder of what is trained, a folder a study and a seed in it; the page too unless --pages"] = (
        "runs/lab"
    )
    pages: Annotated[str | None, "folder of the page, its pictures and its figures; none: that of the study"] = None
    cache: Annotated[str, "folder of starts that are made once"] = "~/.cache/rlhf_jax"


def check_flags(program: Lab) -> None:
    """Errors: UserError for whatever can be seen before anything is made."""
    if program.name not in STUDIES:
        near = fields.nearest(program.name, STUDIES)
        raise UserError(
            f"there is no study {program.name!r}; the nearest is {near}. There are {', '.join(STUDIES)}; give one as "
            "--name."
        )
    if program.seeds < 1:
        raise UserError(f"--seeds={program.seeds} is not allowed; it must be at least 1.")
    if not program.out:
        raise UserError("--out is empty; give the folder that is written to.")


def command(program: Lab) -> str:
    """What the page says it is made with: folders are the reader's own."""
    knobs = [f"--knobs='{program.knobs}'"] if program.knobs else []
    return " ".join(["python -m experiments.lab", f"--name={program.name}", f"--seeds={program.seeds}", *knobs])


def made() -> str:
    """On what it runs, from which commit."""
    versions = f"Python {platform.python_version()}, JAX {jax.__version__}"
    return f"{os.cpu_count()} cores ({_processor()}), {jax.default_backend()}; {versions}; {_commit()}"


def _processor() -> str:
    file = pathlib.Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    asked: Any = {"capture_output": True, "text": True, "cwd": pathlib.Path(__file__).parent}
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], check=True, **asked)
    except (OSError, subprocess.CalledProcessError):
        return "a commit that isn't known"
    commit, dirty, _ = said.stdout.strip().partition("-dirty")
    return f"commit {commit}" + (" and changes after it" if dirty else "")


def main(program: Lab) -> None:
    """Runs it."""
    check_flags(program)
    study = running.set_knobs(STUDIES[program.name], program.knobs)
    folder = epath.Path(os.path.expanduser(program.out)) / study.name
    pages = epath.Path(os.path.expanduser(program.pages)) if program.pages else folder
    for place, flag in ((folder, "--out"), (pages, "--pages")):
        check_writable(place, "the folder", flag)
    run.use_compile_cache()
    seeds = running.run_seeds(study, folder, range(program.seeds), program.cache)
    results = page.Results(command(program), made(), fields.to_dict(study.knobs), seeds)
    file = page.write(study, results, pages)
    for one in found(study, seeds):
        print(f"{one.verdict}: {one.claim.says} ({page.told(one.difference)})")
    for one in mended(study, seeds):
        print(f"{one.remedy.condition} {one.verdict}: {one.remedy.measure} {page.told(one.difference)}")
    print(f"wrote {file} and {file.with_suffix('.html')}")


if __name__ == "__main__":
    flags.run(main, Lab)
