"""What a step costs a member of a sweep, and a run alone: python -m benchmarks.members.

On configs/dpo.py:tiny, four betas by three seeds. The sides take turns, so that a drift of the machine meets them all.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from rlhf_jax import flags, run, sweep
from rlhf_jax.build import Memory
from rlhf_jax.members import Way

SWEEP, STEPS, ROUNDS = "loss.beta=0.05,0.1,0.2,0.5;seed=0,1,2", 12, 5


def side(members: int, way: Way, folder: str) -> Callable[[], float]:
    """Takes a few steps of so many members; gives milliseconds a step and member."""
    planned = sweep.expand(SWEEP, flags.load("configs/dpo.py:tiny"))[:members]
    ready = sweep.ready(planned, epath.Path(folder), Memory())
    made = run.Run([one.built for one in ready], None, way)
    batch = next(made.prepare(made.whole_state, next(made._feed())[1]))

    def steps() -> float:
        began, state = time.perf_counter(), made.state
        for _ in range(STEPS):
            state, _ = made.step(state, made.frozen, batch)
        made.state = jax.block_until_ready(state)
        return 1000 * (time.perf_counter() - began) / STEPS / members

    return steps


def main() -> None:
    """Prints the figures."""
    run.use_compile_cache()
    with tempfile.TemporaryDirectory() as folder:
        sides: dict[str, Any] = {
            "alone": side(1, "map", f"{folder}/a"),
            "12 by map": side(12, "map", f"{folder}/b"),
            "12 by vmap": side(12, "vmap", f"{folder}/c"),
        }
        found: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(ROUNDS + 1):
            for name, steps in sides.items():
                taken = steps()
                if number:  # the first compiles
                    found[name].append(taken)
    alone = statistics.median(found["alone"])
    for name, taken in found.items():
        middle = statistics.median(taken)
        spread = f"{min(taken):.1f} to {max(taken):.1f}"
        print(f"{name}: {middle:.1f} ms a step and member ({spread}), {alone / middle:.2f} times as fast as alone")


if __name__ == "__main__":
    main()
