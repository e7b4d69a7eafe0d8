"""Mixtures of experts: Mixtral and Qwen 3 MoE."""

import dataclasses

from rlhf_jax.errors import UserError
from rlhf_jax.models.experts import Experts
from rlhf_jax.models.families.llama import LAYER, mistral, weights
from rlhf_jax.models.families.maps import TURN, Weight
from rlhf_jax.models.families.read import Config, rope, shape, window
from rlhf_jax.models.shape import Kind, Shape

MLP = ("gate", "up", "down")


def _experts(config: Config, count: str, width: str, default: int, normalise: bool) -> Experts:
    """Errors: UserError where there are fewer experts than a token is to choose."""
    number = config.get(count) or config.get("num_local_experts")  # transformers 5 writes either name
    if number is None:
        raise KeyError(count)
    chosen = config.get("num_experts_per_tok", default)
    if not 1 <= chosen <= number:
        raise UserError(f"num_experts_per_tok {chosen} is not allowed; a token chooses from 1 to all {number} experts.")
    balance = config.get("router_aux_loss_coef", 0.001)
    return Experts(number, chosen, config[width], normalise, float(balance or 0))


def mixtral(config: Config) -> Shape:
    """Jiang et al. 2024, arXiv:2401.04088."""
    if config.get("router_jitter_noise"):
        raise UserError("router_jitter_noise, a noise in training alone, is not supported; set it to 0 in config.json.")
    experts = _experts(config, "num_local_experts", "intermediate_size", 2, normalise=True)
    config = {"rms_norm_eps": 1e-5, "sliding_window": None, "rope_theta": 1_000_000.0, **config}
    return dataclasses.replace(mistral(config), experts=experts)


def qwen3_moe(config: Config) -> Shape:
    """Yang et al. 2025, arXiv:2505.09388."""
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UserError(
            "a mixture in some layers and an MLP in others is not supported; mlp_only_layers must be empty and "
            "decoder_sparse_step 1."
        )
    normalise, bias = bool(config.get("norm_topk_prob", False)), bool(config.get("attention_bias", False))
    # A window, where it is used, is in every layer, unlike in Qwen 3.
    reach = window({"sliding_window": 4096, **config}) if config.get("use_sliding_window") else None
    return shape(
        config, [Kind(reach, rope(config))] * config["num_hidden_layers"],
        qkv_bias=bias, out_bias=bias, qk_norm="head",
        experts=_experts(config, "num_experts", "moe_intermediate_size", 8, normalise),
    )  # fmt: skip


def _weights(model: Shape, block: str, names: tuple[str, str, str]) -> tuple[Weight, ...]:
    """As Llama's but for the MLP: a router, and each expert's three matrices in tensors of their own."""
    mlp = [("layers", name, "kernel") for name in MLP]
    dense = [weight for weight in weights(model) if weight.ours[0] not in mlp]
    router = Weight(f"{LAYER}{block}.gate.weight", (("layers", "experts", "router", "kernel"),), TURN)
    each = f"{LAYER}{block}.experts.{{e}}."
    paths = (("layers", "experts", ours, "kernel") for ours in MLP)
    return (
        *dense,
        router,
        *(Weight(f"{each}{name}.weight", (path,), TURN) for name, path in zip(names, paths, strict=True)),
    )


def mixtral_weights(model: Shape) -> tuple[Weight, ...]:
    """The names that are published, which transformers writes too."""
    return _weights(model, "block_sparse_moe", ("w1", "w3", "w2"))


def qwen3_moe_weights(model: Shape) -> tuple[Weight, ...]:
    """The names that are published, which transformers writes too."""
    return _weights(model, "mlp", ("gate_proj", "up_proj", "down_proj"))
