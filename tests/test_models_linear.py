"""A linear map is flax's, number by number; what an adapter adds to it is the product of its factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.linear import Linear, Lora
from rlhf_jax.models.quantise import quantise_kernel, wide_kernel

CASES = {"split": ((4, 8), 1, (5, 3, 32)), "joined": ((32,), 2, (5, 3, 4, 8)), "plain": ((48,), 1, (5, 3, 32))}
spread = nn.initializers.normal(0.3)


def make(case: str, bias: bool = True, dtype: str = "float32", **adapter) -> tuple[Linear, jax.Array]:
    features, inputs, shape = CASES[case]
    linear = Linear(features, inputs, bias, spread, jnp.dtype(dtype), jnp.dtype("float32"), **adapter)
    return linear, jax.random.normal(jax.random.key(1), shape)


@pytest.mark.parametrize(("bias", "dtype"), [(True, "float32"), (False, "bfloat16")])
@pytest.mark.parametrize("case", CASES)
def test_it_is_flax_dense(case: str, bias: bool, dtype: str) -> None:
    """The same random weights and, of them, the same result, to the last bit."""
    linear, x = make(case, bias, dtype)
    theirs = nn.DenseGeneral(
        linear.features, axis=tuple(range(-linear.inputs, 0)), use_bias=bias, kernel_init=spread, dtype=dtype
    )
    params, expected = (jax.jit(one.init)(jax.random.key(0), x) for one in (linear, theirs))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # biases that show
    np.testing.assert_array_equal(jax.jit(linear.apply)(params, x), jax.jit(theirs.apply)(params, x))


@pytest.mark.parametrize(("case", "base"), [("split", "nf4"), ("joined", "int8"), ("joined", "nf4"), ("plain", "full")])
def test_an_adapter_adds_its_product(case: str, base) -> None:
    linear, x = make(case, rank=3, scale=0.7)
    params = dict(jax.jit(linear.init)(jax.random.key(0), x)["params"])
    sizes, size = x.shape[2:], x.shape[2:] + linear.features
    assert {name: leaf.shape for name, leaf in params.items()} == {
        "kernel": size, "bias": linear.features, "lora_a": (*sizes, 3), "lora_b": (3, *linear.features)
    }  # fmt: skip
    bound = np.prod(sizes) ** -0.5
    assert 0.9 * bound < np.abs(params["lora_a"]).max() <= bound and not params["lora_b"].any()
    if base != "full":
        held = quantise_kernel(params["kernel"][None], tuple(range(1, 1 + linear.inputs)), base)
        params["kernel"] = jax.tree.map(lambda leaf: leaf[0], held)
    plain, _ = make(case)
    bare = {"kernel": wide_kernel(params["kernel"], "float32"), "bias": params["bias"]}
    apply = jax.jit(linear.apply)
    before = apply({"params": params}, x)
    np.testing.assert_array_equal(before, jax.jit(plain.apply)({"params": bare}, x))
    params["lora_b"] = jax.random.normal(jax.random.key(2), params["lora_b"].shape)
    added = np.tensordot(params["lora_a"], params["lora_b"], 1)
    expected = before + 0.7 * np.tensordot(x, added, linear.inputs)
    np.testing.assert_allclose(apply({"params": params}, x), expected, atol=2e-5)


def test_what_scales_the_product() -> None:
    assert Lora(rank=16).scale == Lora(rank=64).scale == 2
    assert Lora(rank=16, alpha=8).scale == 0.5
    assert Lora(rank=16, rslora=True).scale == 2 and Lora(rank=64, alpha=8, rslora=True).scale == 1
