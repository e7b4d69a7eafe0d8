"""The first steps of a run are TRL's: loss and gradient norm on the same checkpoint and rows.

Both sides start from the same files, take all rows in one batch and move by plain gradient descent, so that
the steps after the first compare the gradient itself and the losses away from the reference, where DPO's loss
is no longer log 2 whatever the model.

Shared conventions (TRL 1.16):
- An answer is trained with its end-of-turn token; the end token is appended to string completions that lack it,
  and never to a rendered conversation.
- SFT divides by the trained tokens of the whole batch; preference losses are means over rows.
- IPO's log-ratios are means over completion tokens (TRL's only form; ours is `length_normalised=True`).
- KTO multiplies each row's loss by its weight and divides by the rows, not by the weights.
- A reward model reads its score at the end token; centring is the same. Both start from one random head.
- The gradient norm is that of all parameters before clipping.
Where the conventions differ:
- TRL trains everything after the prompt, so also what a template writes behind the end-of-turn token; here that
  is not trained. The template of these rows writes nothing there; ChatML's newline is shown apart.
- TRL tokenises prompt + completion strings together and lets the completion begin at the first token that
  differs from the prompt's own; here they are tokenised apart. The same rows come of it where no token
  spans the boundary, as in these.
- TRL truncates at the end (`keep_start`, 1,024 tokens), so a completion may lose its end token; here the
  oldest prompt tokens go. These rows fit.
- TRL trains every token of a `messages` row unless `assistant_only_loss` is set, here the assistant's turns.
- TRL's CPO averages the likelihood of chosen answers over the tokens of the batch, here each answer's over its own; its
  ORPO also counts the prompt's. CPO and SimPO are compared without that term, ORPO is not.
- TRL's KTO takes the mismatched answer from the row before, within a device's batch in file order; here it is
  that of the next row with another prompt in the global order. On two rows both are the same exchange.
"""

# pyright: reportMissingImports=false

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from datasets import Dataset
from jax.experimental.compilation_cache import compilation_cache
from transformers import AutoModelForSequenceClassification, AutoTokenizer

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # it warns of what it may change, and warnings are errors here
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rlhf_jax import run
from rlhf_jax.algorithms import ALGORITHMS
from rlhf_jax.algorithms.reward import new_head
from rlhf_jax.config import Config, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data
from rlhf_jax.data.rows import Message
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.metrics import LogConfig
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.sharding import MeshShape
from tests.parity.checkpoints import LENGTH, load
from tests.parity.rows import demonstrations, labelled, pairs, write_checkpoint

# TRL 1.16 asks transformers 5.23 by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOLERANCE = 1e-4
STEPS = 4

Rows = list[dict[str, Any]]
Curve = list[tuple[float, float]]  # loss and gradient norm of each step


@dataclasses.dataclass(frozen=True)
class Same:
    """One objective as both sides call it."""

    rows: Callable[[bool], Rows]
    rate: float
    loss: str
    ours: dict[str, Any]
    trainer: Callable[..., Any]
    config: Callable[..., Any]
    theirs: dict[str, Any]
    first: float | None  # the loss at the reference, where it doesn't depend on the model


def _preference(rate: float, loss: str, first: float, theirs: str, **both: float) -> Same:
    return Same(pairs, rate, loss, both, DPOTrainer, DPOConfig, {"loss_type": [theirs], **both}, first)


def _cpo(rate: float, loss: str, theirs: dict[str, Any], **ours: float) -> Same:
    """TRL's CPOTrainer without its likelihood term, which it averages over the batch's tokens and we over a row's."""
    return Same(
        pairs, rate, loss, ours, CPOTrainer, CPOConfig, {"cpo_alpha": 0.0, "beta": ours["beta"], **theirs}, None
    )


def _kto(rate: float, first: float, **both: float) -> Same:
    return Same(labelled, rate, "kto", both, KTOTrainer, KTOConfig, both, first)


SAME = {
    "sft": Same(demonstrations, 0.1, "nll", {}, SFTTrainer, SFTConfig, {"loss_type": "nll"}, None),
    "dft": Same(demonstrations, 0.1, "dft", {}, SFTTrainer, SFTConfig, {"loss_type": "dft"}, None),
    "dpo": _preference(0.03, "dpo", float(np.log(2)), "sigmoid", beta=0.1),
    "dpo-beta": _preference(0.03, "dpo", float(np.log(2)), "sigmoid", beta=0.5),
    "hinge": _preference(0.03, "hinge", 1.0, "hinge", beta=0.1),
    "ipo": _preference(0.003, "ipo", 25.0, "ipo", beta=0.1),
    "cpo": _cpo(0.03, "cpo", {"loss_type": "sigmoid"}, beta=0.1, alpha=0.0),
    "cpo-smooth": _cpo(
        0.03, "cpo", {"loss_type": "sigmoid", "label_smoothing": 0.2}, beta=0.1, alpha=0.0, label_smoothing=0.2
    ),
    "simpo": _cpo(0.1, "simpo", {"loss_type": "simpo", "simpo_gamma": 1.0}, beta=2.0, margin=1.0),
    "reward": Same(
        pairs,
        0.03,
        "bradley_terry",
        {"centre": 0.05},
        RewardTrainer,
        RewardConfig,
        {"center_rewards_coefficient": 0.05},
        None,
    ),
    "kto": _kto(0.1, 0.5, beta=0.1),
    "kto-weights": _kto(0.1, (3 * 1.5 + 5 * 0.5) / 8 / 2, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
}


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs that differ in numbers or rows alone share their compiled programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The checkpoint that every run starts from."""
    folder = tmp_path_factory.mktemp("start")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def scoring(start: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same with a random score head in the place of the other one."""
    folder = tmp_path_factory.mktemp("scoring")
    model, params = hf.read(str(start))
    model = model.with_head("score")
    zeros = jax.jit(model.init)(jax.random.key(0))
    params = {name: params.get(name, zeros[name]) for name in zeros}
    hf.write(str(folder), model, new_head(params, jax.random.PRNGKey(1)))
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return folder


def _model(same: Same, start: pathlib.Path) -> Any:
    if same.trainer is not RewardTrainer:
        return load(start)
    return AutoModelForSequenceClassification.from_pretrained(start, dtype="float32").eval()


def _theirs(same: Same, start: pathlib.Path, rows: Rows, steps: int, out: pathlib.Path) -> Curve:
    args = same.config(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=len(rows), learning_rate=same.rate,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, activation_checkpointing=False, disable_tqdm=True,
        max_length=None, **same.theirs,
    )  # fmt: skip
    alone = ("nll", "dft", "cpo", "simpo", "bradley_terry")
    reference = {} if same.loss in alone else {"ref_model": load(start)}
    trainer = same.trainer(
        model=_model(same, start), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start), **reference,
    )  # fmt: skip
    trainer.train()
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    return [(float(line["loss"]), float(line["grad_norm"])) for line in lines]


def _ours(same: Same, start: pathlib.Path, rows: Rows, steps: int, out: pathlib.Path) -> list[dict[str, float]]:
    file = out / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    algorithm: Any = next(name for name, module in ALGORITHMS.items() if same.loss in module.LOSSES)
    config = Config(
        algorithm=algorithm,
        cache=str(out / "cache"),
        model=ModelConfig(path=str(start)),
        data=Data(path=(str(file),), eval_share=0.0, buckets=(LENGTH,)),
        loss=Loss(name=same.loss, **same.ours),
        optimizer=OptimizerConfig(name="sgd", learning_rate=same.rate, schedule="constant", clip_norm=None),
        train=Train(steps=steps, batch_size=len(rows)),
        mesh=MeshShape(data=1),
        log=LogConfig(tensorboard=False, progress=False),
    )
    run.train(config, str(out / "ours"))
    return [json.loads(line) for line in (out / "ours" / "metrics.jsonl").read_text().splitlines()]


def _agree(ours: list[dict[str, float]], theirs: Curve) -> None:
    got = np.array([(line["loss"], line["grad_norm"]) for line in ours])
    np.testing.assert_allclose(got, np.array(theirs), rtol=TOLERANCE, atol=0)


# Both forms of the rows for one loss of each trainer: what the rows become has nothing to do with the rest.
FORMS = [
    (name, chat) for name in SAME for chat in (True, False) if chat or name in ("sft", "dpo", "cpo", "reward", "kto")
]


@pytest.mark.parametrize(("name", "chat"), FORMS, ids=[f"{name}-{'messages' if c else 'strings'}" for name, c in FORMS])
def test_the_first_steps_are_trls(
    name: str, chat: bool, start: pathlib.Path, scoring: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Four steps; of KTO one, because the mismatched answers are others and show from the second on."""
    same, steps = SAME[name], 1 if name.startswith("kto") else STEPS
    start = scoring if same.trainer is RewardTrainer else start
    theirs = _theirs(same, start, same.rows(chat), steps, tmp_path)
    ours = _ours(same, start, same.rows(chat), steps, tmp_path)
    _agree(ours, theirs)
    if same.first is not None:
        assert ours[0]["loss"] == pytest.approx(same.first, rel=1e-5)
    if steps > 1:
        assert abs(ours[-1]["loss"] / ours[0]["loss"] - 1) > 100 * TOLERANCE, "the loss must be seen to change"


def test_ktos_baseline_is_trls_on_two_rows(start: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With two rows both sides exchange the answers, so k and all later steps agree too."""
    same, rows = SAME["kto"], labelled(True)[2:4]
    assert [row["label"] for row in rows] == [False, True]
    ours = _ours(same, start, rows, STEPS, tmp_path)
    _agree(ours, _theirs(same, start, rows, STEPS, tmp_path))
    assert max(line["kl"] for line in ours) > 0.01, "k must be seen to leave 0"


def test_conservative_dpo_is_ours_alone(start: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """TRL 1.16 accepts label_smoothing with the sigmoid loss and does not use it; ours changes the gradient."""
    smooth = {"label_smoothing": 0.2}
    plain = SAME["dpo"]
    asked = dataclasses.replace(plain, ours=plain.ours | smooth, theirs=plain.theirs | smooth)
    (tmp_path / "asked").mkdir()
    (tmp_path / "plain").mkdir()
    assert _theirs(asked, start, pairs(True), 1, tmp_path) == _theirs(plain, start, pairs(True), 1, tmp_path)
    norms = [
        _ours(same, start, pairs(True), 1, tmp_path / name)[0]["grad_norm"]
        for name, same in {"asked": asked, "plain": plain}.items()
    ]
    # At the reference the gradient is (1 - 2 e) times that of the plain loss.
    assert norms[0] == pytest.approx(0.6 * norms[1], rel=TOLERANCE)


def test_the_newline_of_chatml_is_trls_alone(start: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With ChatML's own template the rows are the same tokens, of which TRL trains one more a row."""
    tokenizer = AutoTokenizer.from_pretrained(start)
    behind = tmp_path / "chatml.jinja"
    behind.write_text(
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.chat_template = behind.read_text()
    same = SAME["sft"]
    args = same.config(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None,
        activation_checkpointing=False,
    )  # fmt: skip
    trainer = same.trainer(
        model=load(start), args=args, train_dataset=Dataset.from_list(same.rows(True)), processing_class=tokenizer
    )
    encoder = Encoder(tokenizer)
    for theirs, row in zip(trainer.train_dataset, demonstrations(True), strict=True):
        prompt, completion = (tuple(Message(**m) for m in row[side]) for side in ("prompt", "completion"))
        ours = encoder.encode(prompt, completion)
        assert ours.ids.tolist() == theirs["input_ids"]
        trained = np.array(theirs["labels"]) != -100
        assert np.flatnonzero(trained != ours.mask).tolist() == [len(ours) - 1] and trained[-1]
