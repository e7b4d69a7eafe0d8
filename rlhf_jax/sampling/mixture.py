"""The geometric mixture of a policy and its reference, token by token, as something that completions are drawn from.

pi'(t | before) is proportional to pi(t | before)^(1 - m) ref(t | before)^m: at m = 0 the policy, at m = 1 the
reference. The product of these over a completion is not the mixture of the two models over whole completions, whose
normaliser nobody can sum.

References: Munos et al. 2023, arXiv:2312.00886, Eq. 3 and appendix F.1 (Nash-MD).
"""

import dataclasses
from typing import Any, NamedTuple

from jax import Array

from rlhf_jax.models.decoder import Cache, Model, Numerics
from rlhf_jax.models.shape import Shape
from rlhf_jax.ops.layout import Layout


class Both(NamedTuple):
    """The parameters of a mixture."""

    policy: Any
    reference: Any
    share: Array  # m, the reference's, float32 []


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Two models as one to the sampler: its functions are those of `Model`, and give or take a pair of what those do.

    Each model keeps a cache of its own. Hashable: a jitted function may close over it.
    Errors: ValueError for models of unlike shapes or places, or without a mesh.
    """

    policy: Model
    reference: Model

    def __post_init__(self) -> None:
        if self.policy.shape != self.reference.shape or self.policy.layout != self.reference.layout:
            raise ValueError("a mixture is of two models of one shape on one mesh")
        if self.policy.layout.mesh is None:
            raise ValueError("a mixture's models must lie on a mesh")

    @property
    def shape(self) -> Shape:
        """Of both models."""
        return self.policy.shape

    @property
    def layout(self) -> Layout:
        """Of both models."""
        return self.policy.layout

    @property
    def numerics(self) -> Numerics:
        """Those of the policy, which say in what dtype the parameters of both are published for decoding."""
        return self.policy.numerics

    def _pair(self, params: Both) -> tuple[tuple[Model, Any], tuple[Model, Any]]:
        return (self.policy, params.policy), (self.reference, params.reference)

    def blank(self, rows: int, columns: int) -> tuple[Any, Any]:
        """As `Model.blank`."""
        return _apart([model.blank(rows, columns) for model in (self.policy, self.reference)])

    def prefill(self, params: Both, tokens: Array, segments: Array, positions: Array) -> tuple[Any, Any]:
        """As `Model.prefill`."""
        return _apart([model.prefill(own, tokens, segments, positions) for model, own in self._pair(params)])

    def decode(
        self, params: Both, tokens: Array, positions: Array, cache: tuple[Cache, Cache], distance: Array
    ) -> tuple[Any, Any]:
        """As `Model.decode`."""
        both = zip(self._pair(params), cache, strict=True)
        return _apart([model.decode(own, tokens, positions, mine, distance) for (model, own), mine in both])

    def logits(self, params: Both, hidden: tuple[Array, Array]) -> Array:
        """(1 - m) z + m z', float32 [B, T, V], of the models' own logits z and z'.

        Up to a constant a row, which no softmax sees, they are (1 - m) log pi + m log ref; mixed like this they are
        at m = 0 and m = 1 the bits of one model's. A temperature that divides them is that of both models.
        """
        both = zip(self._pair(params), hidden, strict=True)
        policy, reference = (model.logits(own, mine) for (model, own), mine in both)
        return (1 - params.share) * policy + params.share * reference


def _apart(said: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """[(hidden, cache), (hidden, cache)] -> the pair of hidden states, and that of caches."""
    hidden, cache = zip(*said, strict=True)
    return hidden, cache


Drawable = Model | Mixture  # what the sampler draws from
