"""Every loss of pairs and of labelled answers is TRL's own: values and gradients on random inputs.

TRL 1.16's code runs, on a model that stands in: it returns token log-probabilities that we drew. What its
`_compute_loss` averages is caught on the way, so that each of 1,000 rows is compared; gradients are those of the token
log-probabilities. Both sides are in float64, but where TRL is in float32 whatever it is given: the alpha-divergence,
ORPO (their inputs are multiples of 2^-10, which float32 sums without rounding) and the logarithms of EXO's e.

Shared conventions:
- A loss is the mean over rows, the likelihood term of `rpo` and `mpo` that over the chosen tokens of the batch.
- IPO and sigmoid_norm divide by completion tokens what the map of the divergence gives, which is 0 at a ratio of 1.
- KTO's k is a mean over mismatched answers, at least 0, without a gradient. WPO's weights have none either.
Where the conventions differ, with a test each but for the likelihood of CPO:
- TRL's sigmoid ignores label_smoothing; its SimPO and AlphaPO take it. Ours alone: margins, and IPO's sum form.
- TRL's exp of forward_kl has no bound, that of alpha is cut at 80 with a gradient of 0 from there; ours is linear from
  36 on. TRL's DiscoPOP is infinity times 0 where beta D is far below 0; ours is DPO there.
- TRL's AOT sorts a device's rows, ours the global batch's; of one batch only the rows of aot_unpaired differ.
- TRL's WPO of hinge cannot be differentiated. Its CPO and ORPO add the batch's likelihood outside of these functions.
"""

# pyright: reportMissingImports=false

import collections
import inspect
import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it warns of what it may change, and warnings are errors here
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from rlhf_jax.algorithms import group, parts, preference, reward
from rlhf_jax.algorithms.completions import REFERENCE, completion_sums, say
from rlhf_jax.losses import LOSSES, SUMS
from rlhf_jax.losses import preference as P
from rlhf_jax.losses import unpaired as U
from rlhf_jax.losses.supervised import Tokens, nll
from rlhf_jax.ops.logprobs import TokenStats

ROWS, LENGTH = 1000, 24
TOLERANCE, SINGLE, GRID = 1e-10, 1e-5, 2.0**-10  # in float64, and where TRL is in float32, on multiples of GRID
DIVERGENCES = {"forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}
WIDE, NARROW = 10.0, 1.5  # spread of log-ratios, nats; narrow where their exponential is taken


class Draw(NamedTuple):
    """Completions of 2 ROWS rows, the chosen ones first, by token [2 ROWS, LENGTH]; nats, 0 outside of the mask."""

    logprobs: np.ndarray
    ref: np.ndarray
    sum_sq: np.ndarray  # log of the sum over the vocabulary of p^2
    mask: np.ndarray


class Found(NamedTuple):
    """The loss of the batch, those of its rows, and the gradient of the sum of the rows."""

    loss: np.ndarray
    rows: np.ndarray
    gradient: np.ndarray


def draw(spread: float, seed: int = 0, lift: float = 0.0, grid: float = 0.0) -> Draw:
    """Completions of random length and place; log-ratios are `lift` nats and noise of `spread` / 100 to `spread`."""
    rng = np.random.default_rng(seed)
    shape = (2 * ROWS, LENGTH)
    length = rng.integers(1, LENGTH + 1, shape[0])[:, None]
    first = rng.integers(0, LENGTH + 1 - length)
    mask = (np.arange(LENGTH) >= first) & (np.arange(LENGTH) < first + length)
    logprobs = -rng.exponential(1.2, shape)
    scale = spread * 10 ** rng.uniform(-2, 0, (shape[0], 1))
    drift = lift / length + scale * rng.standard_normal(shape) / np.sqrt(length)
    exact = lambda x: np.where(mask, np.round(x / grid) * grid if grid else x, 0)
    return Draw(exact(logprobs), exact(logprobs - drift), exact(-rng.exponential(1.0, shape)), mask)


class Means(TorchFunctionMode):
    """Notes what is averaged first among the tensors that have a gradient."""

    rows: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.rows is None and func in (torch.Tensor.mean, torch.Tensor.nanmean) and args[0].requires_grad:
            self.rows = args[0].detach().numpy().copy()
        return func(*args, **(kwargs or {}))


class Standin(torch.nn.Module):
    """A model that looks each row up: input_ids begin with its number."""

    def __init__(self, logprobs: torch.Tensor, sum_sq: np.ndarray) -> None:
        super().__init__()
        self.logprobs, self.sum_sq = logprobs, torch.tensor(sum_sq, dtype=logprobs.dtype)
        self.training = self.is_gradient_checkpointing = False

    def forward(self, *, input_ids: torch.Tensor, labels: torch.Tensor, **rest: Any) -> SimpleNamespace:
        rows = input_ids[:, 0]
        logprobs = torch.where(labels[:, 1:] != -100, self.logprobs[rows], 0)
        plotted = dict.fromkeys(("entropy", "mean_logits", "is_top1"), torch.zeros(logprobs.shape, dtype=torch.bool))
        return SimpleNamespace(log_probs=logprobs, log_sum_sq_probs=self.sum_sq[rows], **plotted)


def trainer(data: Draw, dtype: torch.dtype, **options: Any) -> tuple[SimpleNamespace, torch.Tensor]:
    """What TRL reads of a trainer, from options by our names, and the log-probabilities whose gradient is asked."""
    leaf = torch.tensor(data.logprobs, dtype=dtype, requires_grad=True)
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    args = SimpleNamespace(discopop_tau=options.get("tau", 0.05), gradient_checkpointing_kwargs=None)
    standard = {"label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False}
    self = SimpleNamespace(
        model=Standin(leaf, data.sum_sq), ref_model=Standin(torch.tensor(data.ref, dtype=dtype), data.sum_sq),
        accelerator=accelerator, args=args, precompute_ref_logps=False, aux_loss_enabled=False, _total_train_tokens=0,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        f_divergence_type=DIVERGENCES.get(options.get("divergence", ""), "reverse_kl"),
        f_alpha_divergence_coef=options.get("divergence_alpha", 0.5), **(standard | options),
    )  # fmt: skip
    return self, leaf


def columns(mask: np.ndarray, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """A batch of these rows: one token of prompt before what the mask speaks of."""
    mask = torch.tensor(np.pad(mask[rows], ((0, 0), (1, 0))).astype(np.int64))
    ids = torch.tensor(np.repeat(rows[:, None], mask.shape[1], axis=1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def their_pairs(data: Draw, weights: dict[str, float], dtype=torch.float64, **options: Any) -> Found:
    """TRL's DPO, a weighted sum of its losses; the rows are those of the first."""
    self, leaf = trainer(data, dtype, loss_types=list(weights), loss_weights=list(weights.values()), **options)
    with Means() as means:
        loss = DPOTrainer._compute_loss(self, self.model, columns(data.mask, np.arange(len(leaf))), False)
    loss.backward()
    return Found(loss.detach().numpy(), means.rows, len(leaf) / 2 * leaf.grad.numpy())


def their_answers(data: Draw, label: np.ndarray, mismatched: np.ndarray, **options: Any) -> Found:
    """TRL's KTO; the rows come in the order of the data."""
    self, leaf = trainer(data, torch.float64, calculate_KL=options["loss_type"] == "kto", **options)
    batch = columns(data.mask, np.arange(2 * ROWS)) | {"label": torch.tensor(label)}
    batch |= {f"KL_{name}": x for name, x in columns(data.mask, mismatched).items()}
    self._compute_kl_logps = lambda model, rows: KTOTrainer._compute_kl_logps(self, model, rows)
    with Means() as means:
        loss = KTOTrainer._compute_loss(self, self.model, batch, False)
    loss.backward()
    rows = means.rows[np.argsort(np.argsort(~label, kind="stable"))]  # TRL puts the desirable ones first
    return Found(loss.detach().numpy(), rows, len(leaf) * leaf.grad.numpy())


def their_sums(method: Callable[..., Any], values: np.ndarray, margin: float = 0.0, **options: Any) -> Found:
    """TRL's CPO or ORPO of completions [2, ROWS], which are summed or averaged before."""
    leaf = torch.tensor(values, requires_grad=True)
    standard = {"accelerator": SimpleNamespace(device="cpu"), "alpha": 0.0, "label_smoothing": 0.0}
    rows = method(SimpleNamespace(simpo_gamma=margin, **(standard | options)), *leaf)[0]
    rows.sum().backward()
    return Found(rows.mean().detach().numpy(), rows.detach().numpy(), leaf.grad.numpy())


def pair(logprobs: jax.Array, data: Draw) -> P.Pair:
    halves = lambda x: jnp.split(jnp.sum(x, axis=1), 2)
    return P.Pair(*halves(logprobs * data.mask), *halves(jnp.asarray(data.ref)), *halves(jnp.asarray(data.mask, float)))


def found(rows: Callable[[jax.Array], jax.Array], values: np.ndarray) -> Found:
    """The rows of a loss, their mean and the gradient of their sum, in float64."""
    with jax.enable_x64(True):
        losses, back = jax.vjp(jax.jit(rows), jnp.asarray(values))
        losses, gradient = np.asarray(losses), np.asarray(back(jnp.ones_like(losses))[0])
    assert losses.dtype == gradient.dtype == np.float64
    return Found(np.asarray(losses.mean()), losses, gradient)


def ours(data: Draw, name: str, beta: float, change: Any = preference.PreferenceConfig(), **more: Any) -> Found:
    """What our objective says of pairs, on a model that stands in."""
    part = parts.Part(name, LOSSES[name], get_type_hints(LOSSES[name])["pair"], more)
    hyper = {"loss": {name: {"beta": beta}}, "weights": {name: 1.0}, "preference": vars(change)}
    by_row = lambda x: jnp.asarray(x).reshape(2, -1, LENGTH).swapaxes(0, 1)  # [B, K, T]
    flat = lambda x: by_row(x).reshape(-1, LENGTH)

    def rows(logprobs: jax.Array) -> jax.Array:
        mask = by_row(data.mask)
        batch = dict.fromkeys(("tokens", "segments", "positions"), jnp.ones(mask.shape, int))
        batch |= {"mask": mask, "weight": jnp.ones(len(mask)), "labels": jnp.tile(jnp.eye(1, 2), (len(mask), 1))}
        batch |= {column: completion_sums(flat(data.ref), batch, column == "ref_shared") for column in REFERENCE}
        stats = TokenStats(flat(logprobs * data.mask), log_sum_sq=flat(data.sum_sq))
        batch |= preference._partners(say(stats, batch))
        model: Any = SimpleNamespace(shape=SimpleNamespace(experts=None), token_stats=lambda *_, want: stats)
        return preference.make_judge(model, [part], change)(0, None, hyper, batch, jnp.zeros(2))[2]["loss"]

    return found(rows, data.logprobs)


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the larger of 1 and the value."""
    assert got.shape == expected.shape and np.isfinite(expected).all()
    return float(np.max(np.abs(got - expected) / np.maximum(1, np.abs(expected))))


def agree(got: Found, expected: Found, parts: tuple[str, ...] = Found._fields, tolerance: float = TOLERANCE) -> None:
    distances = {part: distance(getattr(got, part), getattr(expected, part)) for part in parts}
    assert max(distances.values()) < tolerance, distances
    assert np.ptp(expected.rows) > 1e-3 and np.abs(expected.gradient).max() > 1e-3, "the rows must be seen to differ"


SMOOTH = {"label_smoothing": 0.2}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {  # TRL's name and the options of both
    "dpo": ("sigmoid", {}), "hinge": ("hinge", {}), "ipo": ("ipo", {}), "exo": ("exo_pair", SMOOTH),
    "nca": ("nca_pair", {}), "robust": ("robust", SMOOTH), "bco_pair": ("bco_pair", {}), "sppo": ("sppo_hard", {}),
    "apo_zero": ("apo_zero", {}), "apo_down": ("apo_down", {}), "discopop": ("discopop", {"tau": 0.2}),
    "dpo_norm": ("sigmoid_norm", {}), "aot": ("aot", SMOOTH), "aot_unpaired": ("aot_unpaired", SMOOTH),
}  # fmt: skip
MAPPED = [name for name, loss in P.PREFERENCE.items() if "divergence" in inspect.signature(loss).parameters]


def both_sides(name: str, data: Draw, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Found, Found]:
    """A loss of pairs with these options, and TRL's."""
    theirs, options = PAIRS[name][0], PAIRS[name][1] | options
    return ours(data, name, **options), their_pairs(data, {theirs: 1.0}, dtype, **options)


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_are_trls(name: str) -> None:
    data = draw(WIDE)
    got, expected = both_sides(name, data, beta=0.3)
    if name == "aot":  # theirs come sorted
        got = got._replace(rows=got.rows[np.argsort(np.subtract(*np.split(data.logprobs.sum(axis=1), 2)))])
    parts = ("loss", "gradient") if name == "aot_unpaired" else Found._fields
    agree(got, expected, parts, SINGLE if name == "exo" else TOLERANCE)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha 0.5", "alpha 0.2"])
@pytest.mark.parametrize("name", MAPPED)
def test_divergences_are_trls(name: str, divergence: str) -> None:
    """TRL takes the exponential of alpha in float32, and has no float64 for it."""
    divergence, _, alpha = divergence.partition(" ")
    data, dtype = (draw(NARROW, grid=GRID), torch.float32) if alpha else (draw(NARROW), torch.float64)
    options = {"beta": 0.3, "divergence": divergence, "divergence_alpha": float(alpha or 0.5)}
    got, expected = both_sides(name, data, dtype, **options)
    agree(got, expected, tolerance=SINGLE if alpha or name == "exo" else TOLERANCE)


@pytest.mark.parametrize("name", SUMS)
def test_sums_are_trls(name: str) -> None:
    """Each row of pairs is its own mean, the likelihood the mean over the chosen tokens of the batch."""
    data, weights = draw(WIDE, seed=2), dict(SUMS[name])
    theirs = {"sft" if part == "nll" else PAIRS[part][0]: weight for part, weight in weights.items()}
    counts = data.mask[:ROWS] * weights.pop("nll") * ROWS / data.mask[:ROWS].sum()

    def rows(logprobs: jax.Array) -> jax.Array:
        tokens = nll(Tokens(logprobs[:ROWS], jnp.zeros((ROWS, LENGTH))))
        of_pairs = [weight * LOSSES[part](pair(logprobs, data), beta=0.1) for part, weight in weights.items()]
        return jnp.sum(tokens * counts, axis=1) + sum(of_pairs)

    agree(found(rows, data.logprobs), their_pairs(data, theirs, beta=0.1), ("loss", "gradient"))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_dpo_is_trls(alpha: float) -> None:
    """DPO on sums in which a token past the common length counts alpha."""
    data = draw(WIDE, seed=3)
    got = ours(data, "dpo", 0.2, preference.PreferenceConfig(length_alpha=alpha))
    agree(got, their_pairs(data, {"sigmoid": 1.0}, beta=0.2, ld_alpha=alpha))


def test_wpo_is_trls() -> None:
    """A pair weighs exp of the token means of logprob - log sum p^2 of both its completions, held fixed."""
    data = draw(WIDE, seed=4)
    for name in ("dpo", "ipo", "dpo_norm"):
        got = ours(data, name, 0.1, preference.PreferenceConfig(weighting="wpo"))
        agree(got, their_pairs(data, {PAIRS[name][0]: 1.0}, beta=0.1, use_weighting=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        their_pairs(data, {"hinge": 1.0}, beta=0.1, use_weighting=True)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.4)])
@pytest.mark.parametrize("lift", [2.0, -2.0], ids=["above", "below"])
def test_kto_is_trls(lift: float, weights: tuple[float, float]) -> None:
    """Its k is the mean over mismatched answers, or 0 where that is below 0."""
    data = draw(WIDE, seed=5, lift=lift)
    label: Any = np.random.default_rng(6).random(2 * ROWS) < 0.3
    mismatched = np.random.default_rng(7).permutation(ROWS)
    asked = {"beta": 0.2, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    logprob, ref = data.logprobs.sum(axis=1), data.ref.sum(axis=1)
    k = max(0.0, float((logprob - ref)[mismatched].mean()))
    assert (k > 1) == (lift > 0)
    sums = lambda x: jnp.sum(x * data.mask, axis=1)
    got = found(lambda x: U.kto(U.Answer(sums(x), ref, label, jnp.full(2 * ROWS, k)), **asked), data.logprobs)
    agree(got, their_answers(data, label, mismatched, loss_type="kto", **asked))
    got = found(lambda x: U.kto_zero(U.BareAnswer(sums(x), ref, label), **asked), data.logprobs)
    agree(got, their_answers(data, label, mismatched, loss_type="apo_zero_unpaired", **asked))


def completions(mean: bool) -> np.ndarray:
    """Log-probabilities of completions [2, ROWS], nats, or their means over tokens; multiples of 2^-10."""
    data = draw(WIDE, seed=8)
    values = data.logprobs.sum(axis=1) / (data.mask.sum(axis=1) if mean else 1)
    return np.minimum(np.round(values / GRID), -1).reshape(2, ROWS) * GRID


ONE: Any = np.ones(ROWS)
ZERO: Any = np.zeros(ROWS)
_bare = lambda x: P.Pair(x[0], x[1], ZERO, ZERO, ONE, ONE)
_cpo = lambda x, **options: P.cpo(P.PolicyPair(x[0], x[1], ONE, ONE), alpha=0.0, **options)
_means = lambda loss: lambda x, **options: loss(P.MeanPair(x[0], x[1]), **options)
BARE: dict[str, tuple[str, Callable[..., jax.Array], bool, dict[str, float]]] = {  # TRL's, ours, if of means, options
    "cpo": ("sigmoid", _cpo, False, {}),
    "cpo-smooth": ("sigmoid", _cpo, False, SMOOTH),
    "cpo-hinge": ("hinge", lambda x, beta: P.hinge(_bare(x), beta=beta), False, {}),
    "cpo-ipo": ("ipo", lambda x, beta: P.ipo(_bare(x), beta=beta), True, {}),
    "simpo": ("simpo", _means(P.simpo), True, {"margin": 0.5}),
    "alphapo": ("simpo", _means(P.alphapo), True, {"margin": 0.5, "alpha": 0.25}),
    "alphapo-below": ("simpo", _means(P.alphapo), True, {"margin": 0.5, "alpha": -0.5}),
}


@pytest.mark.parametrize("name", BARE)
def test_losses_without_a_reference_are_trls(name: str) -> None:
    theirs, loss, mean, options = BARE[name]
    expected = their_sums(CPOTrainer.cpo_loss, completions(mean), loss_type=theirs, beta=0.3, **options)
    agree(found(lambda x: loss(x, beta=0.3, **options), completions(mean)), expected)


def test_orpo_is_trls() -> None:
    """TRL returns what it takes from the likelihood of the chosen answers, which ours has in it."""
    got = found(lambda x: _means(P.orpo)(x, beta=0.3) + x[0], completions(mean=True))
    expected = their_sums(ORPOTrainer.odds_ratio_loss, completions(mean=True), beta=0.3)
    agree(got, Found(*(-x for x in expected)), tolerance=SINGLE)


OURS_ALONE = [
    ("dpo", "label_smoothing", 0.2), ("dpo", "margin", 1), ("hinge", "margin", 2), ("ipo", "length_normalised", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "value"), OURS_ALONE)
def test_options_of_ours_alone(name: str, option: str, value: float) -> None:
    """TRL given the same gives the loss without them."""
    data = draw(WIDE)
    got, expected = both_sides(name, data, beta=0.1, **{option: value})
    agree(both_sides(name, data, beta=0.1)[0], expected)
    assert distance(got.rows, expected.rows) > 0.1


def test_smoothing_of_simpo_is_theirs_alone() -> None:
    asked = (CPOTrainer.cpo_loss, completions(mean=True))
    theirs = lambda e: their_sums(*asked, margin=1.0, loss_type="simpo", beta=2.0, label_smoothing=e)
    assert distance(theirs(0.2).rows, theirs(0.0).rows) > 0.1
    assert not any("label_smoothing" in inspect.signature(loss).parameters for loss in (P.simpo, P.alphapo))


def test_exponentials_have_a_bound() -> None:
    """At log-ratios near -50 and -200 TRL's is larger, or has no gradient any more; with beta D below -1,000 NaN."""
    got, expected = both_sides("ipo", draw(NARROW, lift=-50), beta=0.1, divergence="forward_kl")
    assert np.median(expected.rows / got.rows) > 100 and np.isfinite(got.gradient).all()
    far, options = draw(NARROW, lift=-200, grid=GRID), {"divergence": "alpha", "divergence_alpha": 0.5}
    got, expected = both_sides("hinge", far, torch.float32, beta=0.1, **options)
    assert not expected.gradient.any() and np.abs(got.gradient).max() > 1
    data = draw(NARROW)
    below = data._replace(ref=data.ref + 400 * data.mask * (np.arange(2 * ROWS) < ROWS)[:, None])
    got, expected = both_sides("discopop", below, beta=3.0)
    assert np.isnan(expected.rows).all()
    agree(got, both_sides("dpo", below, beta=3.0)[1])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_sorts_the_global_batch(name: str) -> None:
    """Two devices of TRL have another loss than one that has the rows of both."""
    data = draw(WIDE)
    device = np.arange(2 * ROWS) // (ROWS // 2) % 2
    theirs = [their_pairs(Draw(*(x[device == i] for x in data)), {name: 1.0}, beta=0.1).loss for i in range(2)]
    whole, expected = both_sides(name, data, beta=0.1, label_smoothing=0.0)
    assert distance(whole.loss, expected.loss) < TOLERANCE and abs(np.mean(theirs) - expected.loss) > 1e-5


NOT_COMPARED = {
    "nll": "in test_trl.py, and in the sums here", "dft": "in test_trl.py", "bco": "TRL 1.16 has none",
    "smooth_nll": "TRL's SFT has no smoothing of its own", "dpo_pl": "TRL has no ranked groups", "jsd": "in ops tests",
}  # fmt: skip


def test_no_loss_is_left_out() -> None:
    """A new loss, here or there, must be compared or named; other files have those of reward models and of policies."""
    compared = [*PAIRS, *(name for name in BARE if name in LOSSES), "orpo", "kto", "kto_zero"]
    assert sorted([*compared, *NOT_COMPARED, *reward.LOSSES, *group.LOSSES]) == sorted(LOSSES)
    with pytest.raises(ValueError, match="one of") as of_pairs:
        their_pairs(draw(WIDE), {"none": 1.0}, beta=0.1)
    with pytest.raises(ValueError, match="one of") as bare:
        their_sums(CPOTrainer.cpo_loss, completions(mean=True), loss_type="none", beta=0.1)
    names = lambda error: set(re.findall(r"'(\w+)'", str(error.value)))
    assert names(of_pairs) == {theirs for theirs, _ in PAIRS.values()} | {"sft"}
    assert names(bare) == {theirs for theirs, *_ in BARE.values()}
