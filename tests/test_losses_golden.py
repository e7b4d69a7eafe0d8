"""Losses against values of the field's reference implementation, which were computed in float64."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.preference import (
    PREFERENCE,
    MeanPair,
    Pair,
    PolicyPair,
    SortedMargins,
    SortedRatios,
    aot,
    aot_unpaired,
    cpo,
    orpo,
    partners,
)  # fmt: skip
from rlhf_jax.losses.unpaired import Answer, BareAnswer, kto, kto_zero


def f32(*columns: Any) -> list[jax.Array]:
    return [jnp.asarray(column, jnp.float32) for column in columns]


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Any]:
    return json.loads((shared / "golden/reference_values.json").read_text())


def golden_pair(golden: dict[str, Any]) -> Pair:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_len", "rejected_len")
    return Pair(*f32(*(golden["inputs"]["dpo"][name] for name in names)))


def agrees(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


GOLDEN_PAIRS = {
    "sigmoid": ("dpo", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {}),
    "nca_pair": ("nca", {}),
    "bco_pair": ("bco_pair", {}),
    "sppo_hard": ("sppo", {}),
    "apo_zero": ("apo_zero", {}),
    "apo_down": ("apo_down", {}),
    "discopop": ("discopop", {}),
    "sigmoid_norm": ("dpo_norm", {}),
    "robust ls=0.1": ("robust", {"label_smoothing": 0.1}),
    "exo_pair ls=0.1": ("exo", {"label_smoothing": 0.1}),
    "sigmoid f=forward_kl": ("dpo", {"divergence": "forward_kl"}),
    "sigmoid f=js_divergence": ("dpo", {"divergence": "js"}),
    "sigmoid f=alpha_divergence": ("dpo", {"divergence": "alpha"}),
}
SORTED = {"aot", "aot_unpaired", "aot ls=0.1", "aot_unpaired ls=0.1"}


@pytest.mark.parametrize("entry", GOLDEN_PAIRS)
def test_pairs_have_the_reference_values(golden, entry):
    name, numbers = GOLDEN_PAIRS[entry]
    agrees(PREFERENCE[name](golden_pair(golden), beta=0.1, **numbers), golden["values"]["dpo"][entry]["per_seq"])


@pytest.mark.parametrize(("suffix", "smoothing"), [("", 0.0), (" ls=0.1", 0.1)])
def test_sorted_pairs_have_the_reference_values(golden, suffix, smoothing):
    """The reference lists its values by rank, ours are by row."""
    pair, values, numbers = golden_pair(golden), golden["values"]["dpo"], {"beta": 0.1, "label_smoothing": smoothing}
    margin, weight = pair.chosen - pair.rejected, jnp.ones(2)
    found = aot(SortedMargins(margin, partners(margin, pair.ref_chosen - pair.ref_rejected, weight)), **numbers)
    agrees(found[jnp.argsort(margin)], values[f"aot{suffix}"]["per_seq"])
    a, b = pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected
    b_of_rank = partners(a, b, weight)
    whole = SortedRatios(a, b, b_of_rank, partners(b, a, weight))
    agrees(jnp.mean(aot_unpaired(whole, **numbers)), values[f"aot_unpaired{suffix}"]["mean"])
    twice = aot_unpaired(SortedRatios(a, b_of_rank, b_of_rank, a), **numbers)  # its two halves alike
    agrees(twice[jnp.argsort(a)], values[f"aot_unpaired{suffix}"]["per_seq"])


def test_no_reference_value_of_pairs_is_left_out(golden):
    assert {*GOLDEN_PAIRS, *SORTED} == set(golden["values"]["dpo"])


@pytest.mark.parametrize("entry", ["kto kl=0.0", "kto kl=0.7", "apo_zero_unpaired"])
def test_single_answers_have_the_reference_values(golden, entry):
    pair = golden_pair(golden)
    logprob, ref = jnp.concatenate([pair.chosen, pair.rejected]), jnp.concatenate([pair.ref_chosen, pair.ref_rejected])
    numbers: dict[str, Any] = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.5}
    if entry == "apo_zero_unpaired":
        found = kto_zero(BareAnswer(logprob, ref, jnp.arange(4) < 2), **numbers)
    else:
        found = kto(Answer(logprob, ref, jnp.arange(4) < 2, jnp.full(4, float(entry.split("=")[1]))), **numbers)
    agrees(found, np.concatenate([np.ravel(part) for part in golden["values"]["kto"][entry]["losses"]]))


def test_losses_without_a_reference_have_the_reference_values(golden):
    pair, expected = golden_pair(golden), golden["values"]
    values = {name.split("(")[0].strip(): value["per_seq"] for name, value in expected["cpo"].items()}
    means = MeanPair(pair.chosen / pair.chosen_len, pair.rejected / pair.rejected_len)
    sums = PolicyPair(pair.chosen, pair.rejected, pair.chosen_len, pair.rejected_len)
    bare = pair._replace(ref_chosen=jnp.zeros(2), ref_rejected=jnp.zeros(2))
    agrees(PREFERENCE["simpo"](means, beta=0.1, margin=0.5), values["simpo"])
    agrees(PREFERENCE["alphapo"](means, beta=0.1, margin=0.5, alpha=0.25), values["alphapo alpha=0.25"])
    agrees(PREFERENCE["hinge"](bare, beta=0.1), values["hinge"])
    agrees(PREFERENCE["ipo"](bare, beta=0.1), values["ipo"])
    agrees(cpo(sums, beta=0.1, alpha=0.0), values["sigmoid"])
    agrees(cpo(sums, beta=0.1, alpha=0.0, label_smoothing=0.1), values["sigmoid ls=0.1"])
    agrees(cpo(sums, beta=0.1, alpha=0.5) - cpo(sums, beta=0.1, alpha=0.0), -0.5 * means.chosen)
    means = MeanPair(*f32(*np.asarray(expected["orpo"]["avg_logp"])))  # chosen, rejected
    agrees(orpo(means, beta=0.1), -means.chosen + np.asarray(expected["orpo"]["OR term -beta*logsigmoid(log_odds)"]))
