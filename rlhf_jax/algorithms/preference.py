"""Direct preference optimisation and its kin: learn from pairs or labels, most against a reference."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.completions import READS, REFERENCE, Said, reference_columns
from rlhf_jax.algorithms.examples import SHIFTED, Losses, term_means
from rlhf_jax.algorithms.parts import TOKENS, Part, nothing
from rlhf_jax.algorithms.step import Batch, Judge, Objective, TrainState, balance_term, ratio, whole
from rlhf_jax.losses.preference import PREFERENCE, SortedMargins, SortedRatios, partners
from rlhf_jax.losses.ranked import RANKED
from rlhf_jax.losses.unpaired import UNPAIRED
from rlhf_jax.models.decoder import Model

LOSSES: Mapping[str, Callable[..., Array]] = {**PREFERENCE, **RANKED, **UNPAIRED}
BESIDE = TOKENS  # what it may add up with its own: the likelihood of chosen answers
HEAD = "words"
SORTED = SortedMargins, SortedRatios
SYNC_MIX = 0.6  # the paper's, where none is set


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """Changes to a preference loss; a loss that can't use one refuses it, and one that isn't set changes nothing."""

    length_alpha: Annotated[
        float | None, "LD-DPO: weight of tokens past the length that both completions have, 0 to 1; none: 1"
    ] = None
    weighting: Annotated[
        Literal["wpo"] | None, "wpo: weigh each pair by how likely the policy would be to write it; none: all alike"
    ] = None
    sync_every: Annotated[
        int | None, "TR-DPO: steps after which the reference moves towards the policy; none: it stays"
    ] = None
    sync_mix: Annotated[float | None, "share of the policy in the reference after it moved, above 0; none: 0.6"] = None


def _losses(model: Model, parts: Sequence[Part], config: PreferenceConfig) -> Losses:
    return Losses(model, parts, shortened=config.length_alpha is not None, wpo=config.weighting == "wpo")


def make_objective(model: Model, parts: Sequence[Part], config: PreferenceConfig = PreferenceConfig()) -> Objective:
    """The mean over examples of a preference loss or of several, and the experts' balance if the model has some.

    Args:
      parts: of `losses.preference`, `losses.ranked` or `losses.unpaired`, the first's rewards being those of the
        metrics; and of `losses.supervised`, for the tokens of the desirable completions.
    A batch has tokens, mask, segments, positions [B, K, T], labels [B, K], or ranks for groups, and weight [B]; with
    a reference ref_logprob [B, K], and the columns of `make_prepare`. K is 2 for pairs. In a packed batch these are
    [B, M, K] and [B, M].
    """
    judge = make_judge(model, parts, config)
    return lambda params, frozen, hyper, batch, key: judge(params, frozen, hyper, batch, key)[:2]


def make_judge(model: Model, parts: Sequence[Part], config: PreferenceConfig = PreferenceConfig()) -> Judge:
    """As `make_objective`; also what is said of each example, float32 [N].

    loss: the weighted sum of the parts that are losses of examples; margin: the mean over its comparisons of what
    should be above 0, in reward units; correct: the share of them that are.
    """
    losses = _losses(model, parts, config)

    def judge(params, frozen, hyper, batch, key):
        said, stats = losses.say(whole(params, frozen), hyper, batch)
        terms, means, rows = losses.judged(said, stats, hyper, batch)
        means |= term_means(terms) if len(parts) > 1 else {}
        return *balance_term(model, stats, batch, hyper, terms, means), rows

    return judge


# ---- what is frozen in a batch


def make_prepare(
    model: Model,
    parts: Sequence[Part],
    config: PreferenceConfig,
    reference: tuple[Model, Any] | None,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = jax.jit,
) -> Callable[[TrainState, Batch], Iterator[Batch]]:
    """Rows come with their columns; what depends on the current parameters, or on a moving reference, is made live.

    - baseline, for losses of `Answer`: k = max(0, mean over the global batch of log pi - log ref of mismatched
      completions), one number for all rows (Ethayarajh et al. 2024, arXiv:2402.01306, sec. 4.1);
    - shift, for losses of `ShiftedAnswer`: the running mean of rewards that the carry holds;
    - partners, for losses that sort the global batch;
    - the reference's own columns where it moves.

    Args:
      reference: a fixed reference and its parameters; None: those of the state's frozen base, which an adapter leaves
        as they were. Used for mismatched completions alone, and not at all where the reference moves.
      compiled: makes a program of (params, frozen, fixed, carry, hyper, rows) -> columns.
    """
    kinds = {part.takes for part in parts}
    mismatched = any(READS[kind].mismatched for kind in kinds - set(TOKENS))
    moves, shared = config.sync_every is not None, config.length_alpha is not None
    fixed_model = model.without_adapter() if reference is None else reference[0]
    losses = _losses(model, parts, config)

    def live(params: Any, frozen: Any, fixed: Any, carry: Any, hyper: Any, rows: Batch) -> Batch:
        like = rows["weight"].shape
        policy, made = whole(params, frozen), {}
        before = whole(carry["reference"], frozen) if moves else fixed
        asked = model if moves else fixed_model
        if moves:
            made = reference_columns(asked, before, rows, shared)
        if mismatched:
            other = rows["mismatched"] | {"weight": rows["weight"]}
            now, then = (reference_columns(*of, other)["ref_logprob"] for of in ((model, policy), (asked, before)))
            made["baseline"] = jnp.broadcast_to(_baseline(now - then, rows["weight"].reshape(-1, 1)), like)
        if kinds & set(SHIFTED):
            made["shift"] = jnp.broadcast_to(carry["shift"]["mean"], like)
        if kinds & set(SORTED):
            made |= _partners(losses.say(policy, hyper, rows | made)[0])
        sizes = {name: (*like, -1) if name in REFERENCE else like for name in made}
        return {name: column.reshape(sizes[name]) for name, column in made.items()}

    program = compiled(live) if moves or mismatched or kinds & {*SHIFTED, *SORTED} else None

    def prepare(state: TrainState, rows: Batch) -> Iterator[Batch]:
        kept = {name: column for name, column in rows.items() if name != "mismatched"}
        if program is None:
            yield kept
            return
        fixed = state.frozen if reference is None else reference[1]
        yield kept | program(state.params, state.frozen, fixed, state.carry, state.hyper, rows)

    return prepare


def _baseline(moved: Array, weight: Array) -> Array:
    """max(0, mean), from [N, K] and [N, 1]."""
    return jnp.maximum(ratio(jnp.sum(jnp.where(weight > 0, moved, 0) * weight), jnp.sum(weight) * moved.shape[1]), 0)


def _partners(said: Said) -> Batch:
    """What stands at the same rank of the global batch on the other side, [N] each."""
    margin, of_reference = (x[:, 0] - x[:, 1] for x in (said.logprob, said.ref_logprob))
    chosen, rejected = said.ratio.T
    return {
        "margin_partner": partners(margin, of_reference, said.weight),
        "chosen_partner": partners(chosen, rejected, said.weight),
        "rejected_partner": partners(rejected, chosen, said.weight),
    }


# ---- the carry


def make_carry(
    parts: Sequence[Part], config: PreferenceConfig, params: Any, hyper: Any = None
) -> dict[str, Any] | None:
    """The algorithm's own state at the start: a moving reference, the running mean of rewards; None if it has none."""
    carry = {}
    if any(part.takes in SHIFTED for part in parts):
        carry["shift"] = {"mean": jnp.zeros(()), "count": jnp.zeros(())}
    if config.sync_every is not None:
        carry["reference"] = jax.tree.map(jnp.copy, params)
    return carry or None


def make_advance(
    parts: Sequence[Part], config: PreferenceConfig
) -> Callable[[TrainState, Batch, dict[str, Array]], Any]:
    """The carry after an update.

    The reference becomes mix * policy + (1 - mix) * reference every `sync_every` updates (TR-DPO, Gorbatovski et al.
    2024, arXiv:2404.09656, Eq. 5); the mean of rewards is that of all answers so far (Jung et al. 2024,
    arXiv:2404.04656).
    """

    def advance(state: TrainState, batch: Batch, metrics: dict[str, Array]) -> Any:
        carry = dict(state.carry or {})
        if "shift" in carry:
            mean, before = carry["shift"]["mean"], carry["shift"]["count"]
            answers = jnp.sum(batch["weight"]) * batch["tokens"].shape[1]
            count = before + answers
            mean += jnp.where(answers > 0, (metrics["rewards/mean"] - mean) * answers / jnp.maximum(count, 1), 0)
            carry["shift"] = {"mean": mean, "count": count}
        if config.sync_every is not None:
            now, mix = state.step % config.sync_every == 0, state.hyper["preference"]["sync_mix"]
            move = lambda old, new: jnp.where(now, mix * new + (1 - mix) * old, old).astype(old.dtype)
            carry["reference"] = jax.tree.map(move, carry["reference"], state.params)
        return carry or None

    return advance


make_skip = nothing
