"""What a config asks to minimise: a sum, its weights and numbers, and one clear sentence for each misuse."""

import dataclasses
import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rlhf_jax import build, checks, objective
from rlhf_jax.algorithms import preference
from rlhf_jax.algorithms.parts import Part
from rlhf_jax.config import Config, Loss
from rlhf_jax.errors import UserError
from rlhf_jax.losses import LOSSES
from rlhf_jax.losses.distillation import DISTILLATION
from rlhf_jax.losses.policy import POLICY
from rlhf_jax.losses.preference import Pair, PerRow, dpo
from rlhf_jax.losses.reward import REWARD
from rlhf_jax.losses.supervised import SUPERVISED, Tokens, nll
from rlhf_jax.losses.unpaired import Answer, ShiftedAnswer
from rlhf_jax.ops.logprobs import TokenStats
from rlhf_jax.sharding import MeshShape
from tests import tiny
from tests.problem import part

HERE = "tests.test_objective"
OWN = {"sft": SUPERVISED, "reward": REWARD}  # the losses of other algorithms than preference


def without_beta(pair: Pair, *, scale: float = 1.0) -> jax.Array:
    return scale * pair.margin


def from_outside(
    pair: Pair, *, beta: float = 0.3, label_smoothing: PerRow = 0.0, divergence_alpha: float = 2.0, squared: bool = True
) -> jax.Array:
    return beta * pair.margin - label_smoothing


def config_of(name: str = "dpo", **changes: Any) -> Config:
    """A config whose files don't exist; `changes` go by section__field, or by field for the loss's own."""
    config = dataclasses.replace(
        Config(loss=Loss(name=name)),
        model=dataclasses.replace(Config().model, path="/nowhere/model"),
        data=dataclasses.replace(Config().data, path=("/nowhere/rows.jsonl",)),
        algorithm=next((own for own, losses in OWN.items() if name.partition("+")[0] in losses), "preference"),
    )
    for place, value in changes.items():
        section, _, field = place.rpartition("__")
        if place == "algorithm":
            config = dataclasses.replace(config, algorithm=value)
        else:
            inner = dataclasses.replace(getattr(config, section or "loss"), **{field: value})
            config = dataclasses.replace(config, **{section or "loss": inner})
    return config


def choose(name: str, **changes: Any) -> objective.Chosen:
    return objective.choose(config_of(name, **changes))


# ---- what is wrong

ALPHA, WPO = {"preference__length_alpha": 0.5}, {"preference__weighting": "wpo"}
VOTES, GAP = {"data__probability": "votes"}, {"data__margin": "gap"}
PREFERENCE = {"algorithm": "preference"}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    # hyper-parameters that nobody reads
    ("simpo", {"label_smoothing": 0.1}, "'simpo' would ignore label_smoothing; it takes beta, margin. Drop --config"),
    ("simpo", {"divergence": "js"}, "'simpo' would ignore divergence; .* Drop --config.loss.divergence "),
    ("orpo", {"divergence": "js"}, "'orpo' would ignore divergence; it takes beta. Drop --config.loss.divergence "),
    ("nca", {"divergence": "js"}, "'nca' would ignore divergence; it takes beta. Drop --config.loss.divergence "),
    ("dpo+nll", {"alpha": 0.1}, r"'dpo\+nll' would ignore alpha; it takes beta, .*, z_loss. Drop --config.loss.alpha"),
    ("rpo", {"tau": 0.1}, "'rpo' would ignore tau; it takes beta, .*, z_loss. Drop --config.loss.tau"),
    ("dpo", {"divergence_alpha": 0.3}, "'reverse_kl' would ignore divergence_alpha; drop .*=alpha"),
    ("ipo", {"divergence_alpha": 0.3, "divergence": "js"}, "'js' would ignore divergence_alpha; drop .*=alpha"),
    ("dpo+nca", {"divergence_alpha": 0.3, "divergence": "js"}, "'js' would ignore divergence_alpha; drop .*=alpha"),
    # values
    ("dpo", {"label_smoothing": 0.5}, "label_smoothing=0.5 is not allowed; it must be at least 0 and below 0.5"),
    ("dpo", {"label_smoothing": -0.1}, "label_smoothing=-0.1 is not allowed; it must be at least 0 and below 0.5"),
    ("exo", {"label_smoothing": 0.0}, "smoothing=0.0 is not allowed for .* 'exo'; it must be above 0 and below 1"),
    ("exo", {"label_smoothing": 1e-60}, "label_smoothing=1e-60 is not allowed for .* 'exo'; it must be above 0"),
    ("dpo+exo", {"label_smoothing": 0.0}, "label_smoothing=0.0 is not allowed for .* 'exo'; it must be above 0"),
    ("discopop", {"tau": 1.0}, "loss.tau=1.0 is not allowed; it must be above 0 and below 1"),
    ("discopop", {"tau": 0.0}, "loss.tau=0.0 is not allowed; it must be above 0 and below 1"),
    ("dpo", {"preference__length_alpha": 1.5}, "length_alpha=1.5 is not allowed; it must be from 0 to 1"),
    ("dpo", {"preference__sync_every": 0}, "sync_every=0 is not allowed; it must be at least 1"),
    ("dpo", {"preference__sync_every": 4, "preference__sync_mix": 0.0}, "sync_mix=0.0 is not .* above 0 and at most 1"),
    ("dpo", {"preference__sync_every": 4, "preference__sync_mix": 1.1}, "sync_mix=1.1 is not .* above 0 and at most 1"),
    ("dpo+nll", {"weights": (1.0, -0.5)}, "loss.weights=1.0,-0.5 is not allowed; it must be at least 0"),
    # sums
    ("dpo+nll", {"weights": (1.0,)}, "has 1 numbers for 2 losses, dpo, nll; give one each"),
    ("mpo", {"weights": (1.0, 2.0)}, "has 2 numbers for 3 losses, dpo, bco_pair, nll; give one each"),
    ("dpo", {"weights": (2.0,)}, "weights is for sums of losses, such as dpo.nll, and 'dpo' is one; drop the flag"),
    ("nll", {"weights": (2.0,)}, "weights is for sums of losses, such as dpo.nll, and 'nll' is one; drop the flag"),
    ("dpo+dpo", {}, "names a loss twice; name each once, and weigh it by weights"),
    ("dpo+kto", {}, "dpo takes pairs and kto takes single answers with a label; add up losses of the same rows"),
    ("kto+dpo_pl", {}, "kto takes single answers with a label and dpo_pl takes rankings; add up losses of"),
    ("dpo_pl+nll", {}, "single tokens is that of chosen answers, and a ranking has none; drop it or use pairs"),
    ("dpo+nlll", {}, "there is no loss 'nlll'; the nearest is 'nll'. Choose one of "),
    ("dpo+", {}, "there is no loss ''; .* Choose one of "),
    ("dpo+rpo", {}, "there is no loss 'rpo'; .* Choose one of "),
    ("nll", PREFERENCE, "'preference' can't run the loss 'nll'; choose .* or use --config.algorithm=sft"),
    ("nll+dft", PREFERENCE, r"nll\+dft has only losses of single tokens; use --config.algorithm=sft, or add one"),
    ("dpo", {"algorithm": "sft"}, "'sft' can't run the loss 'dpo'; .* or use --config.algorithm=preference"),
    ("nll+dpo", {"algorithm": "sft"}, "'sft' can't run the loss 'dpo'; .* or use --config.algorithm=preference"),
    (f"{HERE}:without_beta", PREFERENCE, "loss 'tests.test_objective:without_beta' must take beta: the rewards"),
    # changes
    ("nll", ALPHA, "'sft' would ignore --config.preference.length_alpha; drop it"),
    ("nll", WPO, "'sft' would ignore --config.preference.weighting; drop it"),
    ("nll", {"preference__sync_every": 5}, "'sft' would ignore --config.preference.sync_every; drop it"),
    ("nll", {"preference__sync_mix": 0.5}, "'sft' would ignore --config.preference.sync_mix; drop it"),
    ("kto", ALPHA, "'kto' can't use --config.preference.length_alpha: it shortens pairs .* drop it or choose another"),
    ("simpo", ALPHA, "'simpo' can't use --config.preference.length_alpha: it shortens pairs .* drop it or choose"),
    ("dpo_pl", ALPHA, "'dpo_pl' can't use --config.preference.length_alpha: it shortens pairs .* drop it or choose"),
    ("aot", WPO, "'aot' can't use --config.preference.weighting: it weighs whole pairs, .* drop it or choose another"),
    ("dpo+aot_unpaired", WPO, "can't use .*weighting: it weighs whole pairs, and aot_unpaired has none .* drop it or"),
    ("kto", WPO, "'kto' can't use --config.preference.weighting: it weighs whole pairs, .* drop it or choose another"),
    ("orpo", {"preference__sync_every": 5}, "'orpo' can't use .*sync_every: it moves the reference, .* has none; drop"),
    ("cpo+nll", {"preference__sync_every": 5}, "can't use .*sync_every: it moves the reference, .* has none; drop it"),
    ("dpo", {"preference__sync_mix": 0.5}, "sync_mix is read with --config.preference.sync_every alone; give both"),
    # columns
    ("ipo", VOTES, "'ipo' would ignore --config.data.probability: .* drop the flag or choose .* from dpo, exo, cpo"),
    ("kto", VOTES, "'kto' would ignore --config.data.probability: .* drop the flag or choose .* from dpo, exo, cpo"),
    ("smooth_nll", VOTES, "'smooth_nll' would ignore --config.data.probability: .* drop the flag or choose"),
    ("dpo", VOTES | {"label_smoothing": 0.1}, "probability and --config.loss.label_smoothing say the same; give one"),
    ("ipo", GAP, "'ipo' would ignore --config.data.margin: .* choose .* from dpo, hinge, simpo, alphapo"),
    ("dpo_pl", GAP, "'dpo_pl' would ignore --config.data.margin: .* drop the flag or choose"),
    ("hinge", GAP | {"margin": 2.0}, "data.margin and --config.loss.margin say the same; give one of them"),
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    """The programs that were compiled since it was cleared."""
    names: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(str(kwargs.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(note)
    return names


@pytest.mark.parametrize(("name", "changes", "says"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, dict) else x)
def test_a_misuse_is_one_sentence_that_says_what_to_do(name, changes, says, compiled):
    """Neither the model nor the rows of the config exist: it is said before a file is looked for."""
    compiled.clear()
    with pytest.raises(UserError, match=says) as caught:
        checks.check(config_of(name, **changes))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert compiled == []


def test_the_same_without_the_misuse_passes():
    for name, changes in (
        ("dpo", {"divergence": "alpha", "divergence_alpha": 0.3}), ("exo", {"label_smoothing": 0.4}),
        ("dpo+nll", {"weights": (1.0, 0.0)}), ("dpo", ALPHA | WPO | VOTES | GAP), ("aot", ALPHA), ("hinge+nll", GAP),
        ("dpo", {"preference__sync_every": 1, "preference__sync_mix": 1.0}), ("exo", VOTES),
        ("nll+dft", {}), ("dpo+sppo+nll", WPO), ("orpo", WPO), ("discopop", {"tau": 0.99}),
    ):  # fmt: skip
        checks.check(config_of(name, **changes))


# ---- what is right


def test_a_sum_gives_its_parts_with_their_weights_and_numbers():
    chosen = choose("ipo+nll", beta=0.3, divergence="js", weights=(2.0, 0.5))
    ipo = {"length_normalised": True, "divergence": "js"}
    assert chosen.parts == (Part("ipo", LOSSES["ipo"], Pair, ipo), Part("nll", nll, Tokens, {}))
    assert chosen.hyper == {
        "loss": {"ipo": {"beta": 0.3, "divergence_alpha": 0.5}, "nll": {"z_loss": 0.0}},
        "weights": {"ipo": 2.0, "nll": 0.5},
    }
    assert (chosen.reads.form, chosen.reads.reference, chosen.reads.mismatched) == ("pair", True, False)


def test_a_named_sum_is_that_sum():
    assert choose("rpo") == choose("dpo+nll") and choose("rpo").hyper["weights"] == {"dpo": 1.0, "nll": 1.0}
    mpo = choose("mpo")
    assert mpo.hyper["weights"] == {"dpo": 0.8, "bco_pair": 0.2, "nll": 1.0}
    assert mpo == choose("dpo+bco_pair+nll", weights=(0.8, 0.2, 1.0))
    assert choose("mpo", weights=(1.0, 2.0, 3.0)).hyper["weights"] == {"dpo": 1.0, "bco_pair": 2.0, "nll": 3.0}
    assert choose("dpo").hyper["weights"] == {"dpo": 1.0}


def test_a_hyper_parameter_of_a_sum_goes_to_each_loss_that_reads_it():
    given = choose("dpo+robust+orpo+smooth_nll", label_smoothing=0.2, beta=0.4).hyper["loss"]
    assert {name: values.get("label_smoothing") for name, values in given.items()} == {
        "dpo": 0.2, "robust": 0.2, "orpo": None, "smooth_nll": 0.2,
    }  # fmt: skip
    assert {name: values.get("beta") for name, values in given.items()} == {
        "dpo": 0.4, "robust": 0.4, "orpo": 0.4, "smooth_nll": None,
    }  # fmt: skip
    own = choose("dpo+robust+dpo_norm+smooth_nll").hyper["loss"]
    assert [own[name]["label_smoothing"] for name in ("dpo", "robust", "smooth_nll")] == [0.0, 0.1, 0.1]
    assert [own[name]["beta"] for name in ("dpo", "dpo_norm")] == [0.1, 5.0]


def test_what_a_sum_reads_is_what_one_of_its_losses_reads():
    reads = lambda name: tuple(choose(name).reads)
    assert reads("orpo") == reads("orpo+nll") == ("pair", False, False)
    assert reads("orpo+dpo") == ("pair", True, False)
    assert reads("bco+kto_zero") == ("labelled", True, False) and reads("bco+kto") == ("labelled", True, True)
    assert reads("dpo_pl") == ("ranking", True, False) and reads("nll+dft") == ("demonstration", False, False)


@pytest.mark.parametrize(
    ("column", "argument", "takers"),
    [
        ("probability", "label_smoothing", ["dpo", "exo", "cpo", "bradley_terry"]),
        ("margin", "margin", ["dpo", "hinge", "simpo", "alphapo", "bradley_terry"]),
    ],
)
def test_only_losses_that_say_so_take_a_column(column, argument, takers):
    found = []
    rollouts = {*POLICY, *DISTILLATION}  # they have no such columns
    for name in (name for name in LOSSES if name not in rollouts):
        try:
            chosen = choose(name, **{f"data__{column}": "votes"})
        except UserError as error:
            assert f"would ignore --config.data.{column}" in str(error)
            continue
        assert chosen.parts[0].by_row == (argument,) and argument not in chosen.hyper["loss"][name]
        found.append(name)
    assert found == takers


def test_a_column_goes_to_the_parts_of_a_sum_that_take_it_and_leaves_the_others_their_numbers():
    chosen = choose("dpo+hinge+robust+nll", **VOTES, **GAP)
    assert {part.name: part.by_row for part in chosen.parts} == {
        "dpo": ("label_smoothing", "margin"), "hinge": ("margin",), "robust": (), "nll": (),
    }  # fmt: skip
    assert chosen.hyper["loss"]["robust"]["label_smoothing"] == 0.1
    assert set(chosen.hyper["loss"]["dpo"]) == {"beta", "divergence_alpha"}


def test_a_loss_from_outside_is_as_good_as_one_of_ours():
    name = f"{HERE}:from_outside"
    chosen = choose(f"dpo+{name}", data__probability="votes")
    ours, outside = chosen.parts
    assert (ours.loss, outside.loss.__name__) == (dpo, "from_outside")
    assert outside.takes is Pair and outside.options == {"squared": True} and outside.by_row == ("label_smoothing",)
    assert chosen.hyper["loss"][name] == {"beta": 0.3, "divergence_alpha": 2.0}
    # It has an alpha of its own, which no divergence switches off.
    assert choose(name, divergence_alpha=1.5).hyper["loss"][name]["divergence_alpha"] == 1.5


def test_changes_become_numbers_only_where_they_are_set():
    assert "preference" not in choose("dpo").hyper and "preference" not in choose("dpo", **WPO).hyper
    assert choose("dpo", **ALPHA).hyper["preference"] == {"length_alpha": 0.5}
    assert choose("kto", preference__sync_every=3).hyper["preference"] == {"sync_mix": 0.6}
    moving = choose("dpo+nll", **ALPHA, preference__sync_every=3, preference__sync_mix=0.25)
    assert moving.hyper["preference"] == {"length_alpha": 0.5, "sync_mix": 0.25}


# ---- a label without doubt


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl", 12)
    return folder


@pytest.mark.parametrize("chance", [0.0, 1.0, 1 - 1e-9, 1e-9, 0.75])
def test_exo_refuses_a_chance_that_is_certain_in_the_batch(chance, place):
    """1 - 1e-9 is 1 in float32, and 1 - float32(1e-9) is 1 too."""
    rows = [json.loads(line) | {"chance": 0.5} for line in (place / "pairs.jsonl").read_text().splitlines()]
    rows[6]["chance"] = chance
    file = place / "chances.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(
        "exo", data__probability="chance", data__path=(str(file),), data__eval_share=0.0,
        model__path=str(place / "model"), train__batch_size=4,
    )  # fmt: skip
    config = dataclasses.replace(config, mesh=MeshShape(1, 1, 1))
    if chance == 0.75:
        column = build.build(config, epath.Path(place / "run")).loader.batch(0)["probability"]
        assert ((0 < 1 - column) & (1 - column < 1)).all() and column.dtype == np.float32
        return
    says = (
        rf"^{file}:7: the loss 'exo' has no value for a label without doubt, .*; choose another .* or mend the rows\.$"
    )
    with pytest.raises(UserError, match=says):
        build.build(config, epath.Path(place / "run"))
    build.build(dataclasses.replace(config, loss=Loss(name="dpo")), epath.Path(place / "run"))  # which has one


# ---- the first loss's threshold


@pytest.mark.parametrize("first", ["kto", "bco", "kto_zero"])
@pytest.mark.parametrize("second", ["kto", "bco", "kto_zero"])
def test_accuracy_goes_by_the_threshold_of_the_first_loss(first, second):
    """Whatever columns the other loss of a sum brings: beta k for kto, the shift for bco, 0 for kto_zero."""
    beta, baseline, shift = 0.5, 0.8, 0.25
    ratios = jnp.array([-0.2, 0.3, 0.6, 1.5])  # rewards -0.1, 0.15, 0.3 and 0.75: one between all two thresholds
    good = np.array([True, False, True, False])
    model: Any = types.SimpleNamespace(
        shape=types.SimpleNamespace(experts=None), token_stats=lambda params, rows, want: TokenStats(params)
    )
    shape = (4, 1, 2)
    batch = {
        "tokens": np.zeros(shape, np.int32), "mask": np.broadcast_to([False, True], shape),
        "segments": np.ones(shape, np.int32), "positions": np.broadcast_to(np.arange(2), shape),
        "weight": np.ones(4, np.float32), "labels": good[:, None], "ref_logprob": np.full((4, 1), -3, np.float32),
    }  # fmt: skip
    names = list(dict.fromkeys((first, second)))
    parts = [part(name) for name in names]
    takes = {one.takes for one in parts}
    batch |= {"baseline": np.full(4, baseline, np.float32)} if Answer in takes else {}
    batch |= {"shift": np.full(4, shift, np.float32)} if ShiftedAnswer in takes else {}
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    numbers = {name: {"beta": beta} | ({} if name == "bco" else weights) for name in names}
    judge = preference.make_judge(model, parts)
    hyper = {"loss": numbers, "weights": dict.fromkeys(names, 1.0)}
    _, means, rows = judge(jnp.stack([jnp.zeros(4), ratios - 3], axis=1), None, hyper, batch, jax.random.PRNGKey(0))
    threshold = {"kto": beta * baseline, "bco": shift, "kto_zero": 0.0}[first]
    expected = (beta * np.asarray(ratios) - threshold) * np.where(good, 1, -1)
    np.testing.assert_allclose(rows["margin"], expected, atol=1e-6)
    np.testing.assert_array_equal(rows["correct"], expected > 0)
    assert means["rewards/accuracies"].total == np.sum(expected > 0)
