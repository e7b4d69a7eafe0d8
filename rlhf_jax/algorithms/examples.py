"""Losses of whole examples, pairs among them: what they are of a batch, and what is plotted of it.

Shared by what learns from answers that were written and compared beforehand, and by what compares its own.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhf_jax.algorithms.comparisons import comparison_means, row_comparisons
from rlhf_jax.algorithms.completions import ASKED, Said, completion_sums, say
from rlhf_jax.algorithms.parts import TOKENS, Part, token_term
from rlhf_jax.algorithms.step import Batch, Mean, Term, flat_rows, token_weight, wanted
from rlhf_jax.losses.unpaired import Answer, ShiftedAnswer
from rlhf_jax.models.decoder import Model

SHIFTED = (ShiftedAnswer,)


class Losses:
    """The parts of an objective on a batch: what the objective and the judge of single rows share."""

    def __init__(
        self, model: Model, parts: Sequence[Part], *, shortened: bool = False, wpo: bool = False, tempered: bool = False
    ):
        """Which of them are asked is fixed; their numbers are those of `hyper`.

        Args:
          parts: of `losses.preference`, `losses.ranked` or `losses.unpaired`, the first's rewards being those of the
            metrics; and of `losses.supervised`, for the tokens of the desirable completions.
          shortened: tokens past the shared length weigh hyper["preference"]["length_alpha"] (LD-DPO).
          wpo: pairs weigh what the policy's own likelihood of them says.
          tempered: the policy's logits are divided by hyper["rollout"]["temperature"], as its sampler's were.
        """
        self.model, self.shortened, self.wpo, self.tempered = model, shortened, wpo, tempered
        self.by_row = [part for part in parts if part.takes not in TOKENS]
        self.by_token = [part for part in parts if part.takes in TOKENS]
        names: list[Any] = ["logprobs", *(name for part in self.by_token for name in part.takes._fields)]
        names += ["log_sum_sq"] if wpo else []
        self.want = wanted(model, *dict.fromkeys(names))

    def say(self, params: Any, hyper: Any, batch: Batch) -> tuple[Said, Any]:
        """What a batch says under a policy, and the statistics of its tokens."""
        tempered = {"temperature": hyper["rollout"]["temperature"]} if self.tempered else {}
        stats = self.model.token_stats(params, flat_rows(batch), want=self.want, **tempered)
        alpha = hyper["preference"]["length_alpha"] if self.shortened else None
        return say(stats, batch, alpha), stats

    def judged(
        self, said: Said, stats: Any, hyper: Any, batch: Batch
    ) -> tuple[dict[str, Term], dict[str, Mean], dict[str, Array]]:
        """Terms and means, and of each example, float32 [N], what `row_comparisons` and the losses of examples say."""
        rows, rewards, threshold = self._rows(said, stats, hyper, batch)
        count = jnp.sum(said.weight)
        sums = {name: jnp.sum(jnp.where(said.weight > 0, loss * said.weight, 0)) for name, loss in rows.items()}
        terms = {name: Term(hyper["weights"][name], total, count) for name, total in sums.items()}
        terms |= self._tokens(stats, hyper, batch)
        means = _metrics(said._replace(whole=jax.lax.stop_gradient(said.whole)), rewards, threshold)
        loss = jnp.asarray(sum(hyper["weights"][name] * loss for name, loss in rows.items()))
        return terms, means, {"loss": loss, **row_comparisons(said, rewards, threshold)}

    def _rows(self, said: Said, stats: Any, hyper: Any, batch: Batch) -> tuple[dict[str, Array], Array, Array]:
        """The loss of each example by each part that is one of examples, [N]; the first one's rewards and threshold."""
        found = {
            part.name: ASKED[part.takes](
                lambda columns, part=part: part.loss(columns, **part.numbers(hyper, batch)), said
            )
            for part in self.by_row
        }
        factor = _wpo(said, stats, batch) if self.wpo else 1.0
        first = self.by_row[0]
        beta = hyper["loss"][first.name]["beta"]
        rewards = beta * jax.lax.stop_gradient(found[first.name][1])
        return {name: loss * factor for name, (loss, _) in found.items()}, rewards, _threshold(first.takes, said, beta)

    def _tokens(self, stats: Any, hyper: Any, batch: Batch) -> dict[str, Term]:
        """The parts that are of tokens: those of the desirable completions."""
        if not self.by_token:
            return {}
        good = batch["labels"].reshape(*batch["weight"].shape, -1)
        trained = batch["mask"] & (batch["positions"] > 0)  # a first token is predicted from nothing
        used = (trained * token_weight(batch, good)).reshape(stats.logprobs.shape)
        return {part.name: token_term(part, stats, used, hyper, batch) for part in self.by_token}


def term_means(terms: dict[str, Term]) -> dict[str, Mean]:
    """Each term before its weight, as a metric."""
    return {f"loss/{name}": Mean(jax.lax.stop_gradient(term.total), term.count) for name, term in terms.items()}


def _threshold(takes: type, said: Said, beta: Array) -> Array:
    """The reward above which a loss of `takes` counts a single answer as good, [N]."""
    if takes is Answer:
        return beta * said.columns["baseline"]
    return said.columns["shift"] if takes in SHIFTED else jnp.zeros_like(said.weight)


def _metrics(said: Said, rewards: Array, threshold: Array) -> dict[str, Mean]:
    """What is plotted of a preference run."""
    weight = said.weight[:, None] * said.present
    mean = lambda x, w: Mean(jnp.sum(x * w), jnp.sum(w))
    means = {
        **comparison_means(said, rewards, threshold),
        "logps/chosen": mean(said.whole, weight * said.labels),
        "logps/rejected": mean(said.whole, weight * (1 - said.labels)),
    }
    for column, name in (("baseline", "kl"), ("shift", "shift")):
        if column in said.columns:
            means[name] = mean(said.columns[column], said.weight)
    return means | ({"rewards/mean": mean(rewards, weight)} if "shift" in said.columns else {})


def _wpo(said: Said, stats: Any, batch: Batch) -> Array:
    """How likely the policy would be to write the pair, to a power of one over its length, [N]; no gradient.

    The product over both completions of exp(mean over tokens of log p - log sum p^2).
    References: Zhou et al. 2024, arXiv:2406.11827, Eq. 2 with its sampled alignment.
    """
    aligned = completion_sums(stats.logprobs - stats.log_sum_sq, batch) / said.length
    return jax.lax.stop_gradient(jnp.exp(jnp.sum(aligned, axis=1)))
