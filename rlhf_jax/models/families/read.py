"""What the readers of configs share. Whatever is stated and would not be computed is refused in one sentence."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.models.rope import KINDS, Rope
from rlhf_jax.models.shape import ACTIVATIONS, Kind, Shape

Config = Mapping[str, Any]
FULL, SLIDES = LAYER_TYPES = ("full_attention", "sliding_attention")


def require(config: Config, **fields: Any) -> None:
    """Errors: UserError naming the first field that is stated and has not this one supported value."""
    for name, value in fields.items():
        stated = config.get(name)
        if stated is not None and stated != value:
            raise UserError(f"{name} {stated!r} is not supported; the supported value is {value!r}.")


def activation(config: Config, field: str = "hidden_act", default: str = "silu") -> str:
    """The name of the activation. Errors: UserError listing those that we have."""
    name = config.get(field) or default
    if name not in ACTIVATIONS:
        raise UserError(f"{field} {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}.")
    return name


def _factors(stated: Config, name: str, pairs: int) -> tuple[float, ...]:
    factors = tuple(float(factor) for factor in stated[name])
    if len(factors) != pairs:
        raise UserError(f"{name} of the rope has {len(factors)} numbers, but its heads have {pairs} pairs to turn.")
    return factors


def stated_rope(config: Config) -> dict[str, Any]:
    """What the whole config says of its rope: rope_parameters, and over them rope_scaling, which transformers takes."""
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    return {**(config.get("rope_parameters") or {}), **scaling, **({"rope_type": kind} if kind else {})}


def rope(config: Config, stated: Config | None = None, *, theta: float = 10_000.0, share: float = 1.0) -> Rope:
    """Reads rope_parameters (transformers 5) or rope_theta and rope_scaling (before).

    Args:
      stated: the parameters, where they are not those of the whole config.
      theta, share: the family's defaults; share is the part of a head that turns.
    """
    said: Config = stated or stated_rope(config)
    kind = said.get("rope_type") or said.get("type") or "default"
    if kind not in KINDS:
        raise UserError(f"rope_type {kind!r} is not supported; the supported ones are {', '.join(KINDS)}.")
    require(said, mscale=None, mscale_all_dim=None, mrope_section=None)
    fields = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate")
    features: dict[str, Any] = {field: said[field] for field in fields if said.get(field) is not None}
    share = said.get("partial_rotary_factor") or config.get("partial_rotary_factor") or share
    context = config.get("max_position_embeddings", 2048)
    # Of two that disagree transformers takes the one outside, as Phi 3 has it.
    original = config.get("original_max_position_embeddings") or said.get("original_max_position_embeddings") or context
    factor = said.get("factor") or 1.0
    if kind == "longrope":
        factor = said.get("factor") or context / original
        pairs = int(head_dim(config) * share) // 2
        features |= {name: _factors(said, name, pairs) for name in ("short_factor", "long_factor")}
    return Rope(
        theta=said.get("rope_theta") or config.get("rope_theta") or theta,
        kind=kind, factor=factor, original_length=original, share=share, **features,
    )  # fmt: skip


def head_dim(config: Config) -> int:
    """Numbers a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def window(config: Config) -> int | None:
    """The sliding window, None where no row is longer than it."""
    size = config.get("sliding_window")
    if size is not None and size < 1:
        raise UserError(f"sliding_window {size} is not allowed; it counts the tokens that are seen.")
    return size if size is not None and size < config.get("max_position_embeddings", 2048) else None


def layer_types(config: Config, default: Sequence[str], windowed: bool) -> Sequence[str]:
    """The stated type of each layer, or the default.

    Errors: UserError naming a type that we do not have, or one that slides in a config without a window.
    """
    types = config.get("layer_types") or default
    layers = config["num_hidden_layers"]
    if len(types) != layers:
        raise UserError(f"layer_types names {len(types)} layers, but num_hidden_layers is {layers}.")
    for kind in types:
        if kind not in LAYER_TYPES:
            raise UserError(f"layer type {kind!r} is not supported; supported are {', '.join(LAYER_TYPES)}.")
    if SLIDES in types and not windowed:
        raise UserError(f"layer_types has {SLIDES}, but sliding_window (and use_sliding_window) give no window.")
    return types


def kinds(layers: Sequence[Kind]) -> dict[str, Any]:
    """The fields of a `Shape` that say of which kind each layer is."""
    distinct = tuple(dict.fromkeys(layers))
    pattern = tuple(distinct.index(kind) for kind in layers) if len(distinct) > 1 else ()
    return {"kinds": distinct, "pattern": pattern}


def shape(config: Config, layers: Sequence[Kind], **features: Any) -> Shape:
    """The fields that most families have under the same names; `features` are a family's own."""
    heads = config["num_attention_heads"]
    common = {
        "groups": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim(config),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "spread": config.get("initializer_range", 0.02),
    } | kinds(layers)
    if "activation" not in features:
        features["activation"] = activation(config)
    return Shape(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        mlp_width=config["intermediate_size"],
        length=config.get("max_position_embeddings", 2048),
        **(common | features),
    )
