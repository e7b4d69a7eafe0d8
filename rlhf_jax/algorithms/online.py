"""Online preferences: the best and the worst of the policy's own answers to a prompt are a pair to learn from.

Each call of `prepare` is one rollout: draw K completions of a prompt, measure and score them, and pair the best with
the worst; then any loss of pairs learns from it, as `algorithms.preference` does from pairs that were written
beforehand. `params` are the policy's. With `explore` it is XPO.

References: Guo et al. 2024, arXiv:2402.04792 (online DPO, IPO, SLiC); Xie et al. 2024, arXiv:2405.21046 (XPO).
"""

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.asked import Asked, measure
from rlhf_jax.algorithms.examples import Losses, term_means
from rlhf_jax.algorithms.parts import Part, nothing
from rlhf_jax.algorithms.picks import drawn_means, drawn_of, extremes, rows_of, scored
from rlhf_jax.algorithms.rollouts import (
    Around,
    EndConfig,
    Models,
    RolloutConfig,
    end_counts,
    held_out_rows,
    keys,
    learnt,
    mean,
    total,
)
from rlhf_jax.algorithms.step import Batch, Judge, Objective, Reads, Term, TrainState, balance_term, whole
from rlhf_jax.errors import UserError
from rlhf_jax.losses.preference import PREFERENCE, MeanPair, Pair, PolicyPair
from rlhf_jax.models.decoder import Model
from rlhf_jax.ops.layout import Layout

READS = {
    Pair: Reads("prompt", reference=True),
    PolicyPair: Reads("prompt", reference=True),  # its loss asks for none, but the KL is told
    MeanPair: Reads("prompt", reference=True),
}
LOSSES: Mapping[str, Callable[..., Array]] = {
    name: loss for name, loss in PREFERENCE.items() if typing.get_type_hints(loss)["pair"] in READS
}
BESIDE: tuple[type, ...] = ()
HEAD = "words"
POLICY: str | None = None  # the parameters are the policy's
ROW = "prompt"


@dataclasses.dataclass(frozen=True)
class OnlineConfig(EndConfig):
    """How scores become pairs, and what is learnt beside them."""

    explore: Annotated[
        float | None,
        "XPO: one answer of each pair is the reference's, and this times its log-probability is a price; none: no XPO",
    ] = None

    @property
    def numbers(self) -> dict[str, float]:
        """Those that programs read from hyper["online"]; what is None isn't there."""
        explore = {} if self.explore is None else {"explore": self.explore}
        return {"missing_end_score": self.missing_end_score, **explore}


def refers(config: OnlineConfig) -> bool:
    """Whether there is a fixed reference: always, since the KL from it is told where no loss asks for it."""
    return True


def check(config: OnlineConfig, rollout: RolloutConfig) -> None:
    """Errors: UserError for settings that mean nothing together."""
    if rollout.samples < 2:
        raise UserError(
            f"--config.rollout.samples={rollout.samples} leaves nothing to pair a completion with; give 2 or more."
        )
    if config.explore is not None and rollout.samples != 2:
        raise UserError(
            f"--config.online.explore pairs one completion of the policy with one of the reference, and "
            f"--config.rollout.samples={rollout.samples} asks for more; give 2."
        )


# ---- what is differentiated


def make_objective(models: Models, parts: Sequence[Part], config: OnlineConfig = OnlineConfig()) -> Objective:
    """The mean of a loss of `losses.preference` over the pairs that teach something, and if asked XPO's price.

    That is explore x the mean over the same pairs of log pi of the completion that the reference drew (Xie et al. 2024,
    Algorithm 1). All log-probabilities are at the sampler's temperature. A batch is a minibatch of `make_prepare`.
    """
    model, losses = models.policy, Losses(models.policy, parts, tempered=True)

    def objective(params, frozen, hyper, batch, key):
        pairs = {name: column for name, column in batch.items() if name != "drawn"}
        said, stats = losses.say(whole(params, frozen), hyper, pairs)
        terms, means, _ = losses.judged(said, stats, hyper, pairs)
        weight, drawn = batch["weight"], batch["drawn"]
        if config.explore is not None:
            logprob = jnp.sum(jnp.where(batch["explored"], said.whole, 0), axis=1)
            terms["explore"] = Term(hyper["online"]["explore"], total(logprob, weight), jnp.sum(weight))
            means |= term_means(terms)
        means |= drawn_means(drawn) | {"pairs/equal": mean(1 - weight, batch["asked"])}
        return balance_term(model, stats, pairs, hyper, terms, means)

    return objective


def make_judge(models: Models, parts: Sequence[Part], config: OnlineConfig = OnlineConfig()) -> Judge:
    """What held-out rollouts of `make_prepare` earned, see `held_out_rows`; it reads no parameters."""

    def judge(params, frozen, hyper, batch, key):
        return held_out_rows(batch["score"], batch)

    return judge


# ---- what is frozen in a batch


def make_prepare(
    models: Models,
    parts: Sequence[Part],
    config: OnlineConfig,
    reference: tuple[Model, Any] | None,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]],
    around: Around,
) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """One rollout, then its minibatches, epoch by epoch; a row is a pair. Held-out rollouts stay completions.

    With `explore` the reference answers each prompt as often as the policy does, and one of its answers takes the place
    of the policy's last one; it isn't asked where rollouts are held out.

    Args:
      reference: a fixed model and its parameters; None: the state's frozen base, which an adapter leaves as it was.
      compiled: makes a program of (params, frozen, fixed, carry, hyper, rows) -> columns.
    Errors: UserError that names the row of a score that isn't finite; ValueError for pairs that don't divide.
    """
    model, samples = models.policy, around.rollout.samples
    reference_model = model.without_adapter() if reference is None else reference[0]
    explores = config.explore is not None and not around.held_out

    def look(params: Any, frozen: Any, fixed: Any, carry: Any, hyper: Any, rows: Batch) -> Batch:
        policy, other = Asked(model, whole(params, frozen)), Asked(reference_model, fixed)
        temperature = hyper["rollout"]["temperature"]
        said = measure(policy, rows, temperature=temperature, reference=other, pieces=around.pieces)
        sums = {name: jnp.sum(column[:, 0], axis=1) for name, column in said.items()}
        made = {"score": end_counts(config, hyper["online"]["missing_end_score"], rows)}
        made |= {"sequence_kl": sums["old_logprobs"] - sums["ref_logprobs"]}
        return made if around.held_out else paired(rows | made | {"ref_logprob": sums["ref_logprobs"]}, samples)

    looked = compiled(look)

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        key, order = keys(state.key, state.step, around.held_out)
        first, policy = int(state.step), whole(state.params, state.frozen)
        fixed = state.frozen if reference is None else reference[1]
        batch = around.draw(policy, rows, key)
        if explores:
            draws = fixed if reference is not None else _unadapted(state)
            other = around.draw(draws, rows, jax.random.fold_in(key, 1))
            batch = _with_one_of(other, batch, samples=samples, layout=model.layout)
        batch = scored(around, batch)
        made = looked(state.params, state.frozen, fixed, state.carry, state.hyper, batch)
        # From here on the state isn't read: the step donates its buffers.
        yield from learnt(batch | made if around.held_out else made, around, order, first, model.layout)

    return prepare


def paired(batch: Batch, samples: int) -> Batch:
    """A pair a prompt, the best and the worst of its completions, [P, 2, T].

    Args:
      batch: N completions with judged, and score, sequence_kl, ref_logprob float32 [N]; explored, bool [N], if some
        are the reference's.
    Returns: what an objective of `losses.preference` takes: tokens, mask, segments, positions; labels bool and
      ref_logprob float32 [P, 2]; index [P]; weight float32 [P], 0 for padding and for what teaches nothing, a prompt
      with equal scores or equal texts. Also asked float32 [P], 0 for padding, and drawn, see `picks`: of what the
      policy drew; and explored, bool [P, 2].
    """
    places, differ = extremes(batch, samples)
    made = rows_of(batch, places, samples)
    asked = batch["weight"].reshape(-1, samples)[:, 0]
    one, other = made["tokens"][:, 0], made["tokens"][:, 1]
    same = jnp.all((one == other) & (made["segments"][:, 0] == made["segments"][:, 1]), axis=1)
    made |= {"weight": asked * (differ & ~same), "asked": asked, "ref_logprob": batch["ref_logprob"][places]}
    made["labels"] = jnp.broadcast_to(jnp.array([True, False]), places.shape)
    if "explored" in batch:
        made["explored"] = batch["explored"][places]
        batch = batch | {"weight": batch["weight"] * ~batch["explored"]}
    return made | {"drawn": drawn_of(batch, samples)}


def _unadapted(state: TrainState) -> Any:
    """The frozen base as the sampler of an adapted model takes it: under an adapter of zeros, which adds nothing."""
    return whole(jax.tree.map(jnp.zeros_like, state.params), state.frozen)


@functools.partial(jax.jit, static_argnames=("samples", "layout"))
def _with_one_of(other: Batch, batch: Batch, *, samples: int, layout: Layout) -> Batch:
    """The batch with another's last completion of each prompt in the place of its own; explored, bool [N], says so."""
    theirs = jnp.arange(batch["weight"].shape[0]) % samples == samples - 1

    def column(x: Array, y: Array) -> Array:
        chosen = jnp.where(theirs.reshape(-1, *(1,) * (x.ndim - 1)), x, y)
        return layout.constrain(chosen, "rows", *(None,) * (x.ndim - 1))

    return jax.tree.map(column, other, batch) | {"explored": theirs}


make_carry, make_advance, make_skip = nothing, nothing, nothing
