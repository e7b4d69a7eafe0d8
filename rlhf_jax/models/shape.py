"""What a decoder is, apart from its numbers: the features that the families of models choose from."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
from jax import Array

from rlhf_jax.models.experts import Experts
from rlhf_jax.models.rope import Rope

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """In what a layer may differ from its neighbours."""

    window: int | None = None  # tokens that are seen, the seeing one among them; None: all before it
    rope: Rope | None = Rope()  # None: positions turn nothing


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a decoder is, apart from its numbers."""

    vocab: int
    width: int
    layers: int
    heads: int
    groups: int  # key-value heads
    head_dim: int
    mlp_width: int
    length: int  # the context, tokens
    kinds: tuple[Kind, ...] = (Kind(),)
    pattern: tuple[int, ...] = ()  # the kind of each layer; empty: all are of the first
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # what is added to a norm's weight: 1 in Gemma, whose weights are near 0
    norms: Literal["pre", "post", "sandwich"] = "pre"  # before attention and MLP, behind them, or both
    parallel: bool = False  # attention and MLP read the same x
    qk_norm: Literal["", "head", "whole"] = ""  # of queries and keys: none, head by head, or over all heads
    tied: bool = False
    head: Literal["words", "score"] = "words"  # a score is one number a token, for reward models
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True  # down(act(gate x) * up x), or down(act(up x))
    activation: str = "silu"
    query_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    attention_soft_cap: float | None = None  # of the scores
    soft_cap: float | None = None  # of the final logits
    embed_scale: float = 1.0
    learned_positions: bool = False  # a table of `length` vectors that are added to the embeddings
    experts: Experts | None = None  # in the place of the MLP
    spread: float = 0.02  # standard deviation of random weights

    @property
    def own_head(self) -> bool:
        """Whether there is a word head with weights of its own."""
        return self.head == "words" and not self.tied

    @property
    def turning_point(self) -> int | None:
        """Texts that grow beyond this many tokens turn by other angles from their start (longrope); None: none do."""
        points = [kind.rope.original_length for kind in self.kinds if kind.rope and kind.rope.kind == "longrope"]
        return min(points, default=None)
