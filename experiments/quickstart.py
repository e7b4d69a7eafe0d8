"""The whole way in a few minutes: make quickstart.

Pre-trains a tiny model on a small world (docs/world.md) and runs the chain there (docs/chain.md): SFT on
demonstrations, rankings of its answers by simulated people, a reward model, PPO against it and DPO on the same
rankings. It ends in a report of what each is worth, and the best of n answers beside them, on prompts that were never
trained on. The people err in 15% of their rankings and like long answers; the reward that the report shows is the
known one of the world, which no training saw.

    python -m experiments.quickstart --seeds=0,1,2     # the same three times over, every seed shown
"""

import dataclasses
import os
import pathlib
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath
from rich.console import Console

from experiments.chain import run_chain
from rlhf_jax import fields, flags, report, run, worlds
from rlhf_jax.chain import blocks
from rlhf_jax.chain.config import Chain
from rlhf_jax.errors import UserError

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "chain.py"
NAME = "small"


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Pre-training, SFT, a reward model, PPO and DPO of a tiny model on the synthetic world, ending in report.html."""

    workdir: Annotated[str, "folder that everything is written to"] = "runs/quickstart"
    seeds: Annotated[tuple[int, ...], "each is a whole run of its own, from the rows to the answers"] = (0,)


def seeded(chain: Chain, seed: int, cache: str) -> Chain:
    """The same chain with another seed, in a world that is made from that seed too and lies in `cache`."""
    ours = lambda value: value.replace(f"{worlds.PREFIX}{NAME}/", f"{worlds.PREFIX}{NAME}@{seed}/")
    given = {}
    for leaf in fields.leaves(chain):
        if isinstance(leaf.value, str):
            given[leaf.path] = ours(leaf.value)
        elif isinstance(leaf.value, tuple) and any(isinstance(one, str) for one in leaf.value):
            given[leaf.path] = tuple(map(ours, leaf.value))
    return fields.replace(chain, given | {"seed": seed, "labels.labeller.seed": seed, "cache": cache})


def main(program: Quickstart) -> None:
    """Runs it."""
    if not program.seeds or len(set(program.seeds)) < len(program.seeds) or min(program.seeds) < 0:
        raise UserError(f"--seeds={program.seeds} is not allowed; give different numbers of at least 0, as in 0,1,2.")
    run.use_compile_cache()
    root, console, results = epath.Path(os.path.expanduser(program.workdir)), Console(), {}
    chain = flags.load(f"{CONFIG}:{NAME}")
    command = f"python -m experiments.quickstart --seeds={','.join(map(str, program.seeds))}"
    for seed in program.seeds:
        console.rule(f"seed {seed}")
        own = seeded(chain, seed, os.fspath(root / "cache"))
        results[seed] = run_chain(own, os.fspath(root / f"seed{seed}"), command)
    whole = root / "report.html"
    if len(results) == 1:
        (root / f"seed{program.seeds[0]}" / "report.html").copy(whole, overwrite=True)
    else:
        places = [f"Seed {seed}: {root / f'seed{seed}' / 'report.html'}" for seed in results]
        made = [*blocks.by_seed(results), report.Text("The whole report of each", places)]
        report.write(whole, "From demonstrations to PPO", [*made, report.Code("How it was made", command)])
    print(f"wrote {whole}")


if __name__ == "__main__":
    flags.run(main, Quickstart)
