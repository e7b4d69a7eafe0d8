"""The floors of the house: a module imports only from what stands above it, and sizes and names stay small.

The imports are read from the source, those inside functions too; nothing is imported.
"""

import ast
import graphlib
import pathlib
import sys
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "rlhf_jax"
# A total order: each imports only from what stands before it.
FLOORS = (
    "errors", "fields", "registry", "flags",
    "ops", "losses", "models", "sharding", "sampling", "algorithms", "data", "feedback", "evaluate",
    "checkpoint", "metrics", "report", "config", "objective", "workdir", "teacher", "scoring", "surround", "checks",
    "build", "world_recipes", "worlds", "initial", "held_out", "members", "run", "sweep", "chain", "constitutional",
    "lab", "plan",
)  # fmt: skip
SHARED_BY_ALGORITHMS = (
    "step", "parts", "comparisons", "completions", "examples", "optimizers", "rollouts", "asked", "rounds", "picks",
)  # fmt: skip
# Other people's packages that a floor may import; the floors that aren't named may import any.
ARRAYS = ("jax", "numpy", "chex")
PARTIES = {
    "errors": (), "fields": ("absl",), "registry": (), "flags": ("absl", "etils"), "ops": ARRAYS, "losses": ARRAYS,
}  # fmt: skip
NOWHERE = {"torch", "pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code", "allow_pickle"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
LONGEST_FUNCTION, LONGEST_MODULE = 70, 400

Module = tuple[str, ast.Module]  # its dotted name and what it says


def name_of(file: pathlib.Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[pathlib.Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def modules(*folders: str) -> list[Module]:
    return [(name_of(file), ast.parse(file.read_text())) for file in sources(*folders)]


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that may be meant: `from a import b` gives a and a.b; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def floor(name: str) -> str:
    """The floor of a dotted name: `rlhf_jax.models.rope` stands on models."""
    return (name.split(".") + ["", ""])[1]


# Each gives a sentence for everything that is wrong with a module.


def wrong_way(module: Module) -> Iterator[str]:
    name, tree = module
    for imported in imports(tree):
        top = imported.split(".")[0]
        if top == PACKAGE and imported != PACKAGE and name.split(".")[0] == PACKAGE and floor(imported) in FLOORS:
            if FLOORS.index(floor(imported)) > FLOORS.index(floor(name)):
                yield f"{name} imports {imported}, which stands below it"
        elif top in ("experiments", "configs", "tests", ""):
            yield f"{name} imports {imported}: nothing imports programs or configs, and imports are absolute"


def between_algorithms(module: Module) -> Iterator[str]:
    name, tree = module
    own = name.removeprefix(f"{PACKAGE}.algorithms.")
    if own == name or own in SHARED_BY_ALGORITHMS:
        return
    for imported in imports(tree):
        other = imported.removeprefix(f"{PACKAGE}.algorithms.").split(".")[0]
        if imported.startswith(f"{PACKAGE}.algorithms.") and other not in SHARED_BY_ALGORITHMS:
            yield f"{name} imports {imported}, another algorithm"


def strangers(module: Module) -> Iterator[str]:
    name, tree = module
    allowed = PARTIES.get(floor(name))
    for imported in imports(tree):
        top = imported.split(".")[0]
        if top in NOWHERE:
            yield f"{name} imports {imported}"
        if top == "flax" and not name.startswith(f"{PACKAGE}.models"):
            yield f"{name} imports {imported}, which models/ alone may"
        if allowed is not None and top not in (PACKAGE, *allowed) and top not in sys.stdlib_module_names:
            yield f"{name} imports {imported}; its floor may import {', '.join(allowed) or 'nobody'}"


def forbidden_words(module: Module) -> Iterator[str]:
    name, tree = module
    if set(name.split(".")) & FORBIDDEN_NAMES:
        yield f"{name} is named after nothing that it does"
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_ARGUMENTS:
            yield f"{name}:{node.value.lineno} passes {node.arg}"
        if isinstance(node, ast.ClassDef) and node.name.endswith("Manager"):
            yield f"{name}:{node.lineno} declares {node.name}"


def too_long(module: Module) -> Iterator[str]:
    name, tree = module
    last = max((node.end_lineno or 0 for node in ast.walk(tree) if isinstance(node, ast.stmt)), default=0)
    if last > LONGEST_MODULE:
        yield f"{name} has {last} lines, more than {LONGEST_MODULE}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                yield f"{name}.{node.name} has {lines} lines, more than {LONGEST_FUNCTION}"


# What each check reads, and a source that it must complain about, as the module of that name.
PROGRAM, ALL = (PACKAGE, "experiments", "configs"), (PACKAGE, "experiments", "configs", "tests")
CHECKS: dict[Callable[[Module], Iterator[str]], tuple[tuple[str, ...], dict[str, str]]] = {
    wrong_way: (
        (PACKAGE, "configs"),
        {
            "rlhf_jax.ops.x": "from rlhf_jax import losses",
            "rlhf_jax.losses.x": "def f():\n    import rlhf_jax.models.decoder",
            "rlhf_jax.algorithms.x": "from rlhf_jax.data.loader import Loader",
            "rlhf_jax.fields": "from rlhf_jax.flags import load",
            "rlhf_jax.config": "from .run import train",
            "rlhf_jax.run": "from experiments import train",
            "configs.x": "import configs.dpo",
        },
    ),
    between_algorithms: ((PACKAGE,), {"rlhf_jax.algorithms.sft": "from rlhf_jax.algorithms import preference"}),
    strangers: (
        PROGRAM,
        {
            "rlhf_jax.run": "import torch.nn",
            "rlhf_jax.data.x": "def f():\n    import pickle",
            "rlhf_jax.algorithms.x": "from flax import linen",
            "rlhf_jax.ops.x": "import optax",
            "rlhf_jax.fields": "import jax",
        },
    ),
    forbidden_words: (
        ALL,
        {
            "rlhf_jax.x": "f(trust_remote_code=True)",
            "rlhf_jax.y": "class RunManager: ...",
            "rlhf_jax.data.utils": "",
            "rlhf_jax.helpers.rows": "",
        },
    ),
    too_long: (
        ALL,
        {"rlhf_jax.x": "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION, "rlhf_jax.y": "x = 1\n" * (LONGEST_MODULE + 1)},
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_is_wrong(check):
    wrong = [sentence for module in modules(*CHECKS[check][0]) for sentence in check(module)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_is_wrong_is_seen(check):
    for name, text in CHECKS[check][1].items():
        assert list(check((name, ast.parse(text)))), f"{check.__name__} lets {name} pass: {text[:80]}"


def test_every_module_stands_on_a_floor():
    names = {floor(name) for name, _ in modules(PACKAGE)} - {""}
    assert not names - set(FLOORS), f"give a place in FLOORS, and in the house, to {', '.join(names - set(FLOORS))}"


def test_no_package_goes_round_in_a_circle():
    graph: dict[str, set[str]] = {}
    known = {name for name, _ in modules(PACKAGE)}
    for name, tree in modules(PACKAGE):
        same = {other for other in imports(tree) if other in known and floor(other) == floor(name)}
        graph[name] = same - {name, f"{PACKAGE}.{floor(name)}", name.rpartition(".")[0]}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(error.args[1]))


def test_losses_do_not_import_each_other():
    for name, tree in modules(f"{PACKAGE}/losses"):
        others = [other for other in imports(tree) if other.startswith(f"{PACKAGE}.losses.")]
        assert name == f"{PACKAGE}.losses" or not others, f"{name} imports {others[0]}"
