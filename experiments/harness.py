"""Tasks of lm-evaluation-harness: python -m experiments.harness --model=RUN --tasks=NAME --include_path=FOLDER.

Prints the harness's own table and writes results.json and samples.jsonl. Needs the extra `harness`. docs/suite.md has
more.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")  # metrics that the harness doesn't have are other people's code

from datasets import config as of_datasets
from etils import epath
from huggingface_hub import constants as of_hub

from rlhf_jax import flags, run
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import harness
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.fields import nearest
from rlhf_jax.workdir import check_writable, open_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harness:
    """Runs tasks of lm-evaluation-harness on a model and writes results.json and samples.jsonl."""

    model: Annotated[str, "run (RUN, RUN@STEP, RUN@best), model folder or Hub name"]
    tasks: Annotated[tuple[str, ...], "tasks, groups or tags of the harness; * stands for any text"]
    include_path: Annotated[str | None, "folder of your own tasks, a YAML file each; none: none"] = None
    hub: Annotated[bool, "the harness's own tasks too, and rows may be fetched; without it nothing is"] = False
    num_fewshot: Annotated[int | None, "worked examples before each question; none: as the task says"] = None
    limit: Annotated[int | None, "most rows of each task, the first ones; none: all"] = None
    apply_chat_template: Annotated[bool, "ask through the tokenizer's chat template"] = False
    gen_kwargs: Annotated[tuple[str, ...], "NAME=VALUE, of written answers, in the place of the tasks' own"] = ()
    seed: Annotated[int, "of the worked examples and of answers that are drawn"] = 1234
    out: Annotated[str, "folder to write"] = "runs/harness"


def check_flags(program: Harness) -> None:
    """Errors: UserError for whatever can be seen before anything is read."""
    for name, least in (("limit", 1), ("num_fewshot", 0)):
        if (value := getattr(program, name)) is not None and value < least:
            raise UserError(f"--{name}={value} is not allowed; it must be at least {least}.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    if bad := [one for one in program.gen_kwargs if not all(one.partition("="))]:
        raise UserError(f"--gen_kwargs={bad[0]} is not understood; write NAME=VALUE, with commas between several.")
    if not program.tasks:
        raise UserError("no task to run; give --tasks=NAME,ANOTHER.")
    if program.include_path is None and not program.hub:
        raise UserError("no tasks to choose from; give --include_path=FOLDER, or --hub for the harness's own.")
    if program.include_path is not None and not os.path.isdir(os.path.expanduser(program.include_path)):
        raise UserError(f"there is no folder {program.include_path}; check --include_path.")


@contextlib.contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Nothing is fetched meanwhile, nor counted on a server: what HF_HUB_OFFLINE=1 does before anything is imported."""
    places: tuple[Any, ...] = of_hub, of_datasets
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places if wanted else ():
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def tasks_of(program: Harness) -> tuple[Any, list[str]]:
    """The harness's index of tasks, and the names of those that are asked for.

    Errors: UserError for a name that there isn't.
    """
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    folder = None if program.include_path is None else os.path.expanduser(program.include_path)
    manager = TaskManager(include_path=folder, include_defaults=program.hub)
    known = list(manager.all_tasks)
    if not known:
        raise UserError(f"{program.include_path} holds no task, a YAML file with `task:`; check --include_path.")
    names: list[str] = []
    for asked in program.tasks:
        found = manager.match_tasks([asked])
        if not found:
            more = "" if program.hub else "; the harness's own need --hub"
            raise UserError(f"there is no task {asked!r}; the nearest is {nearest(asked, known)!r}{more}.")
        names += found
    return manager, list(dict.fromkeys(names))


def check_tasks(program: Harness, manager: Any, names: list[str]) -> None:
    """Reads the tasks with their rows. Errors: UserError for one that can't be read, and an unknown metric."""
    from lm_eval.api.registry import metric_registry  # pyright: ignore[reportMissingImports]

    for name in names:
        try:
            loaded = manager.load([name])["tasks"]
        except Exception as error:  # whatever a task's YAML, functions and rows may raise
            reason = str(error).strip().split("\n")[0]
            more = "" if program.hub or not isinstance(error, ConnectionError) else "; rows of the Hub need --hub"
            raise UserError(f"the task {name} can't be read ({type(error).__name__}: {reason}){more}.") from error
        for task, one in loaded.items():
            # The harness would leave it out, and say so among its notes alone.
            own = () if callable(one.config.process_results) else one.config.metric_list or ()
            asked = [metric["metric"] for metric in own]
            if unknown := [metric for metric in asked if isinstance(metric, str) and metric not in metric_registry]:
                raise UserError(
                    f"the task {task} asks for the metric {unknown[0]!r}, which the harness doesn't have; the nearest "
                    f"is {nearest(unknown[0], list(metric_registry.keys()))!r}."
                )


def evaluated(program: Harness, model: harness.HarnessModel, manager: Any, names: list[str]) -> dict[str, Any]:
    """What the harness finds, as it gives it."""
    return harness.require().simple_evaluate(
        model=model, tasks=names, task_manager=manager, num_fewshot=program.num_fewshot, limit=program.limit,
        apply_chat_template=program.apply_chat_template, gen_kwargs=",".join(program.gen_kwargs) or None,
        fewshot_random_seed=program.seed,
    )  # fmt: skip


def tell(results: dict[str, Any], cut: int, length: int) -> None:
    """Prints the harness's tables, and what must be known to read them."""
    from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if cut:
        print(f"{cut} texts were longer than the context of {length} tokens and lost their oldest tokens")


def write(out: epath.Path, results: dict[str, Any]) -> None:
    """The results, and a line for every row of every task."""
    from lm_eval.utils import handle_non_serializable  # pyright: ignore[reportMissingImports]

    text = lambda value, **how: json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **how)
    samples = results.pop("samples", {})
    (out / "results.json").write_text(text(results, indent=2) + "\n")
    lines = [text({"task": task, **row}) + "\n" for task, rows in samples.items() for row in rows]
    (out / "samples.jsonl").write_text("".join(lines))
    print(f"wrote {out / 'results.json'} and samples.jsonl")


def main(program: Harness) -> None:
    """Runs it."""
    check_flags(program)
    harness.require()
    out = epath.Path(os.path.expanduser(program.out))
    check_writable(out, "out", "--out")
    with offline(not program.hub):
        manager, names = tasks_of(program)
        check_tasks(program, manager, names)
    run.use_compile_cache()
    policy = open_policy(program.model)
    subject = Subject(program.model, policy.model, policy.params, policy.tokenizer, policy.end_ids)
    model = harness.adapt(subject, seed=program.seed)
    with offline(not program.hub):
        results = evaluated(program, model, manager, names)
    tell(results, model.cut, model.max_length)
    write(out, results)


if __name__ == "__main__":
    flags.run(main, Harness)
