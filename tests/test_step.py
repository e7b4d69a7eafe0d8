"""One trajectory: the shape of the mesh and the number of microbatches change nothing but rounding.

With a term of another denominator mixed in, on rows of very uneven length with padding rows among them: loss and
gradient norm of each of five steps to 1e-5 relative under AdamW, parameters to 1e-5 of their norm under plain
descent, at rates at which the loss visibly changes. A mesh sees what a loss takes and not which it is: a few losses
run on every mesh in every number of pieces, one of each kind on two of them, and all of them on two devices.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import sharding
from rlhf_jax.algorithms.step import Objective, Term, flat_rows
from rlhf_jax.losses import LOSSES as EVERY
from rlhf_jax.losses.distillation import DISTILLATION
from rlhf_jax.losses.policy import POLICY
from rlhf_jax.losses.reward import REWARD
from rlhf_jax.models.decoder import Model
from rlhf_jax.sharding import MeshShape
from tests import problem

# tests/test_reward.py has those of scores, tests/test_ppo.py and test_group_runs.py those of policies, and
# tests/test_distill.py those of two heads.
LOSSES = {name: loss for name, loss in EVERY.items() if name not in {**REWARD, **POLICY, **DISTILLATION}}
MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)]  # data, fsdp, tensor
FAMILIES: dict[type, list[str]] = {}  # the losses by what they take
for loss in LOSSES:
    FAMILIES.setdefault(problem.part(loss).takes, []).append(loss)
ALL = tuple(LOSSES)
FIRST = tuple(names[0] for names in FAMILIES.values())
FEW = ("nll", "dpo")
STEPS = 5
# Rates at which the loss of each moves by a per cent and more, under AdamW and under plain descent.
ADAM, PLAIN = 1e-3, dict.fromkeys(LOSSES, 0.3) | {"dft": 3.0, "ipo": 2e-2, "hinge": 0.2, "kto": 1.0, "simpo": 3.0}
PLAIN |= {"cpo": 0.1, "sppo": 1e-3}


class Once:
    """A model that looks at the rows of one trace once, however many objectives ask."""

    def __init__(self, model: Model):
        self.model, self.shape, self.seen = model, model.shape, None

    def token_stats(self, params: Any, rows: Any, **_: Any) -> Any:
        if self.seen is None:
            self.seen = self.model.token_stats(params, rows, want=("logprobs", "logsumexp", "mean_logprobs"))
        return self.seen


def every_loss(model: Model, names: Sequence[str]) -> Objective:
    """The project's objectives under some losses; hyper["loss"]["which"] says which one counts.

    One program then serves them all. A term with another denominator, tokens instead of rows, is mixed in.
    """

    def objective(params, frozen, hyper, batch, key):
        numbers, once = hyper["loss"], Once(model)
        terms = []
        for name in names:
            beta = {"beta": numbers["beta"]} if "beta" in takes_of(name) else {}
            made = problem.objective_of(name, cast(Any, once))
            term, _ = made(params, frozen, problem.numbers_of(name, **beta), batch, key)
            terms.append(term[name])
        which = jnp.asarray(numbers["which"], jnp.int32)
        total, count = (jax.lax.select_n(which, *(term[i] for term in terms)) for i in (1, 2))
        rows = flat_rows(batch)
        norms = jnp.sum(jnp.square(params["embedding"]), axis=-1)[rows["tokens"]]
        other = Term(numbers["mix"], jnp.sum(norms * rows["mask"]), jnp.sum(rows["mask"]))
        return {"loss": Term(1.0, total, count), "other": other}, {}

    return objective


def takes_of(name: str) -> set[str]:
    return set(inspect.signature(LOSSES[name]).parameters)


def trajectories(shape: tuple[int, int, int], parts: int, names: Sequence[str]) -> dict[tuple[str, float], Any]:
    """Losses and gradient norms of each step, and the last parameters, of each loss under both optimisers."""
    mesh = sharding.make_mesh(MeshShape(*shape))
    objective = every_loss(problem.make_model(mesh), names)
    batches = [sharding.place_rows(problem.make_rows(seed), mesh) for seed in range(STEPS)]
    step, out = None, {}
    for which, name in enumerate(names):
        for plain in (0.0, 1.0):
            numbers = {"which": which, "mix": 0.5, "beta": 0.5 if name == "ipo" else 0.1}
            state = problem.start(mesh, problem.hyper(numbers, PLAIN[name] if plain else ADAM, plain))
            step = step or problem.compiled_step(mesh, objective, state, parts)
            seen = []
            for batch in batches:
                state, metrics = step(state, batch)
                seen.append((metrics["loss"], metrics["grad_norm"]))
            out[name, plain] = np.asarray(seen, np.float64), state.params
    assert step is not None and step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]  # one compile for all losses, rates and steps
    return jax.tree.map(np.asarray, out)


@pytest.fixture(scope="module")
def plainest() -> dict[tuple[str, float], Any]:
    return trajectories((1, 1, 1), 1, ALL)


def test_the_losses_visibly_change(plainest):
    for (name, plain), (seen, _) in plainest.items():
        assert np.ptp(seen[:, 0]) > 0.01 * abs(seen[0, 0]), (name, plain, seen)


ONCE = {(2, 2, 2): 4, (1, 2, 4): 1}  # in how many pieces a mesh sees each kind
CASES = [(shape, parts, FIRST if ONCE.get(shape) == parts else FEW) for shape in MESHES for parts in (1, 2, 4)][
    1:
]  # the first is the yardstick itself
CASES.append(((1, 2, 1), 2, ALL))
IDS = {ALL: "all", FIRST: "kinds", FEW: "few"}


@pytest.mark.parametrize(("shape", "parts", "names"), CASES, ids=lambda case: IDS.get(case, str(case)))
def test_every_mesh_and_microbatching_takes_the_same_steps(plainest, shape, parts, names):
    for key, (seen, params) in trajectories(shape, parts, names).items():
        expected, expected_params = plainest[key]
        if key[1] == 0:
            np.testing.assert_allclose(seen, expected, rtol=1e-5, err_msg=str(key))
        else:
            off, norm = norm_of(jax.tree.map(np.subtract, params, expected_params)), norm_of(expected_params)
            assert off < 1e-5 * norm, (key, off / norm)


def norm_of(tree: Any) -> float:
    return sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(tree)) ** 0.5
