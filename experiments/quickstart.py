"""The whole way in a minute: make quickstart.

Makes a tiny model, fine-tunes it on demonstrations of mixed manners, then trains it with DPO on which manners
people prefer, and prints what each stage changed on prompts that were never trained on. The rows are written
here: eight kinds of requests, each with a good answer and a poor one.
"""

import dataclasses
import itertools
import json
import os
import random
from collections.abc import Iterator
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from rlhf_jax import flags, run, sharding
from rlhf_jax.algorithms.preference import completion_logprobs
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.loader import once
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.metrics import LogConfig, wilson
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.workdir import Policy, load_policy

NAMES = "Ada Ben Cleo Dan Eva Finn Gia Hugo Iris Jon Kim Leo Mia Ned Ola Pia".split()
THINGS = "book cup drum fork gate hat key lamp map nail oven pen rope shoe tent vase".split()
# Request, good answer, poor answer. The poor ones are curt, padded or beside the point.
KINDS = (
    ("Greet {name}.", "Hello {name}, how nice to see you.", "What do you want, {name}?"),
    ("Thank {name} for the {thing}.", "Thank you for the {thing}, {name}.", "A {thing}. Fine."),
    ("Ask {name} for a {thing}.", "{name}, may I please have a {thing}?", "Give me a {thing}, {name}."),
    ("Tell {name} the {thing} is lost.", "I am sorry, {name}, the {thing} is lost.", "Lost. Not my problem, {name}."),
    ("Where does {name} keep the {thing}?", "I do not know, but {name} can tell you.", "In the {thing}, obviously."),
    ("Spell the word {thing}.", "Gladly: {letters}.", "No. Look it up."),
    ("Say {thing} twice.", "Of course: {thing}, {thing}.", "{thing} {thing} {thing} {thing} {thing}"),
    ("Wish {name} a good day.", "Have a lovely day, {name}.", "Days are days, {name}."),
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """SFT, then DPO, of a tiny model on rows written for it, ending in a table."""

    workdir: Annotated[str, "folder that everything is written to"] = "runs/quickstart"


def requests(seed: int) -> Iterator[tuple[str, str, str]]:
    """Every request once, in a seeded order, with its good and its poor answer."""
    cases = list(itertools.product(KINDS, NAMES, THINGS))
    random.Random(seed).shuffle(cases)
    seen = set()
    for texts, name, thing in cases:
        ask, good, poor = (text.format(name=name, thing=thing, letters=" ".join(thing)) for text in texts)
        if ask not in seen:
            seen.add(ask)
            yield ask, good, poor


def write_rows(folder: epath.Path) -> None:
    """600 demonstrations, good and poor alike; 400 pairs; 100 held-out pairs; no request in two files."""
    rows = list(itertools.islice(requests(seed=0), 1100))
    coin = random.Random(1)
    user = lambda text: {"role": "user", "content": text}
    answer = lambda text: {"role": "assistant", "content": text}
    demonstrations = [{"messages": [user(ask), answer(coin.choice(two))]} for ask, *two in rows[:600]]
    pairs = [
        {"prompt": [user(ask)], "chosen": [answer(good)], "rejected": [answer(poor)]} for ask, good, poor in rows[600:]
    ]
    for name, part in (("demonstrations", demonstrations), ("pairs", pairs[:400]), ("held_out", pairs[400:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def write_model(folder: epath.Path) -> None:
    """A config without weights, and a tokenizer made from the requests' own words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"], special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((" ".join(row) for row in requests(seed=0)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(os.fspath(folder))
    (folder / "config.json").write_text(json.dumps(SHAPE, indent=2))


def stage(algorithm: str, loss: str, model: epath.Path, init: str, rows: epath.Path, steps: int, rate: float) -> Config:
    """The config of one stage; what is not said here has its default."""
    return Config(
        algorithm=algorithm,  # pyright: ignore[reportArgumentType]
        model=ModelConfig(path=os.fspath(model), init=init),  # pyright: ignore[reportArgumentType]
        data=Data(path=(os.fspath(rows),), buckets=(32,)),
        loss=Loss(name=loss),
        optimizer=OptimizerConfig(learning_rate=rate, schedule="cosine", warmup=10),
        train=Train(steps=steps, batch_size=16),
        evaluate=Evaluate(every=0),
        log=LogConfig(tensorboard=False),
    )


def preferences(policy: Policy, pairs: epath.Path) -> tuple[float, int, float]:
    """Share and number of held-out pairs whose good answer the model finds likelier, and its nats a token."""
    data = Data(path=(os.fspath(pairs),), eval_share=0.0)
    length = policy.model.shape.length
    examples = dataset.load(data, Encoder(policy.tokenizer), "pair", length, seed=0).train
    measure = jax.jit(lambda params, rows: completion_logprobs(policy.model, params, rows))
    logprob, tokens = [], []
    for rows in once(examples, batch_size=20, length=length, buckets=(32,)):
        placed = sharding.place_rows(rows, policy.model.layout.mesh)  # pyright: ignore[reportArgumentType]
        for kept, values in zip((logprob, tokens), measure(policy.params, placed), strict=True):
            kept.append(np.asarray(values, np.float64)[rows["weight"] > 0])
    logprobs, lengths = np.concatenate(logprob), np.concatenate(tokens)
    nats = -logprobs[:, 0].sum() / lengths[:, 0].sum()
    return float(np.mean(logprobs[:, 0] > logprobs[:, 1])), len(logprobs), float(nats)


def main(program: Quickstart) -> None:
    """Runs it."""
    run.use_compile_cache()
    root = epath.Path(os.path.expanduser(program.workdir))
    base = root / "base"
    base.mkdir(parents=True, exist_ok=True)
    write_rows(root)
    write_model(base)
    console = Console()
    console.rule("1. supervised fine-tuning on mixed demonstrations")
    sft = stage("sft", "nll", base, "random", root / "demonstrations.jsonl", steps=300, rate=3e-3)
    run.train(sft, os.fspath(root / "sft"), resume=True)
    start = load_policy(root / "sft")
    exported = root / "sft_model"
    hf.write(exported, start.model, start.params)
    start.tokenizer.save_pretrained(os.fspath(exported))
    console.rule("2. DPO on which answer people prefer")
    dpo = stage("preference", "dpo", exported, "checkpoint", root / "pairs.jsonl", steps=60, rate=3e-4)
    run.train(dpo, os.fspath(root / "dpo"), resume=True)
    table = Table(title="100 held-out requests")
    for column in ("model", "finds the good answer likelier", "95% interval", "nats a token of the good answer"):
        table.add_column(column)
    for name in ("sft", "dpo"):
        share, count, nats = preferences(load_policy(root / name), root / "held_out.jsonl")
        low, high = wilson(share, count)
        table.add_row(name, f"{share:.0%}", f"{low:.0%} to {high:.0%}", f"{nats:.2f}")
    console.print(table)
    console.print(f"Everything is in {root}: metrics.jsonl and checkpoints of both runs, and the rows to look at.")


if __name__ == "__main__":
    flags.run(main, Quickstart)
