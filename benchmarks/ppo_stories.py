"""PPO of a real language model against a reward model that was learnt from pairs, where the true reward is known.

stories260K writes 64 tokens to the beginnings of stories, as in benchmarks/reward_stories.py. Two studies:

- frontier: the true reward is happy words less sad ones. A reward model learns from 4,000 labelled pairs; PPO at three
  prices of the KL, DPO on the same pairs at three betas, and the best of n by the reward model, in one figure of true
  reward against KL. Figures are of 512 samples that no training saw; 4 seeds at the middle price, else 2.
- overoptimisation: the true reward turns against a happy word that is said again and again. PPO at a rate that doesn't
  fall, without a price of the KL, with one, with an early stop, and against the minimum or the mean less the variance
  of five reward models: what the proxy and the true reward do, iteration by iteration, on 3 seeds, and on 2 of each
  remedy.

    python -m benchmarks.ppo_stories --model=FOLDER --text=FILE --out=FOLDER
    python -m benchmarks.ppo_stories --model=FOLDER --text=FILE --out=FOLDER --studies=frontier

What an earlier call has finished is not done again. Writes STUDY.results.json and STUDY.png for each, and prints the
results.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import re
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.reward_stories import HAPPY, NEW, PROMPT, SLOPE, TRAINED, beginnings, config_of, gold
from rlhf_jax import fields, run, sweep
from rlhf_jax.algorithms.ppo import PpoConfig
from rlhf_jax.algorithms.rollouts import RolloutConfig
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data.config import Data
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.answers import Subject, answer, logprobs
from rlhf_jax.evaluate.proxies import Point, curves
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.feedback.rewards import RewardsConfig
from rlhf_jax.metrics import LogConfig
from rlhf_jax.report.blocks import Frontier, Lines
from rlhf_jax.report.figures import save
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.workdir import open_policy, open_rewards
from rlhf_jax.worlds import open_subject

SEEDS, BATCH, ITERATIONS, RATE = (0, 1, 2, 3), 64, 15, 3e-4
PRICES, BETAS = {0.02: SEEDS[:2], 0.05: SEEDS, 0.2: SEEDS[:2]}, (0.1, 0.3, 1.0)  # with the seeds of each price
FRESH, DRAWN = 512, 64  # samples that a model is measured on; of each prompt for the best of n
MEMBERS, LONGER, FLOOR = 5, 20, -6.0  # reward models; iterations; lowest true reward of the figure
# The reward models, and what a run has otherwise than one without a price.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "no price": (1, {}),
    "price 0.05": (1, {"ppo.kl": 0.05}),
    "early stop": (1, {"ppo.stop_kl": 0.0005}),
    "minimum of 5": (MEMBERS, {"rewards.how": "minimum"}),
    "mean less variance of 5": (MEMBERS, {"rewards.how": "mean_less_variance", "rewards.lam": 1.0}),
}
Row = dict[str, Any]


def turning(text: str) -> float:
    """Happy words less sad ones, less 1.5 times the square of each happy word's uses beyond its first."""
    words = collections.Counter(re.findall(r"[a-z]+", text.lower()))
    return gold(text) - 1.5 * sum(max(0, words[word] - 1) ** 2 for word in HAPPY)


def happy_reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """`gold` as a reward function: it is only looked at."""
    return [float(gold(text)) for text in completions]


def turning_reward(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """`turning` as a reward function: it is only looked at."""
    return [float(turning(text)) for text in completions]


TRUTHS = {"frontier": (gold, "happy_reward"), "overoptimisation": (turning, "turning_reward")}


class Study:
    """One true reward: samples of the base model, pairs, a reward model, and policies."""

    def __init__(self, name: str, model: str, text: pathlib.Path, out: pathlib.Path):
        self.truth, function = TRUTHS[name]
        self.function = f"benchmarks.ppo_stories:{function}"
        self.model, self.folder = model, out / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.subject = open_subject("base", model)
        self.encoder = Encoder(self.subject.tokenizer)
        self.prompts = beginnings(text, self.encoder)[::2]
        self.sampling = Sampling(max_new_tokens=NEW)

    def prepare(self, members: int, passes: int) -> None:
        """Pairs, prompts and the reward model after so many passes over the pairs, or the members of an ensemble."""
        samples = -(-2 * TRAINED * 21 // (20 * len(self.prompts)))
        sampler = Sampler(self.subject.model, samples=samples + samples % 2)
        texts = answer(self.subject, self.encoder, sampler, self.prompts, self.sampling, 0).texts
        values = np.asarray([[self.truth(one) for one in row] for row in texts], float)
        self.base, self.spread = float(values.mean()), float(values.std(ddof=1))
        if not (self.folder / "train.jsonl").exists():
            self._write("train", self._pairs(texts, values))
            self._write("prompts", [{"prompt": prompt} for prompt in self.prompts])
        config = config_of(self.model, self.folder)
        data = Data(path=(str(self.folder / "train.jsonl"),), eval_share=0.0, length=config.data.length)
        changes = {"reward.members": members, "train.steps": passes * TRAINED // config.train.batch_size}
        config = fields.replace(config, changes)
        data = dataclasses.replace(data, bootstrap=members > 1)
        sweep.train_ensemble(dataclasses.replace(config, data=data), str(self.folder / "reward"), resume=True)

    def _pairs(self, texts: list[list[str]], values: np.ndarray) -> list[Row]:
        rng, rows = np.random.default_rng(0), []
        order = [(p, *pair) for p, row in enumerate(texts) for pair in rng.permutation(len(row)).reshape(-1, 2)]
        for p, a, b in (order[i] for i in rng.permutation(len(order))):
            both = (texts[p][a], texts[p][b])
            chance = 1 / (1 + np.exp(-SLOPE * (values[p][a] - values[p][b])))
            chosen, rejected = both if rng.random() < chance else both[::-1]
            if chosen.strip() and rejected.strip() and chosen != rejected:
                rows.append({"prompt": self.prompts[p], "chosen": chosen, "rejected": rejected})
        return rows[:TRAINED]

    def _write(self, name: str, rows: list[Row]) -> None:
        (self.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    # Policies

    def ppo(self, name: str, seed: int, iterations: int, members: int, **changes: Any) -> Row:
        """A run and what it took; metrics.jsonl has the true reward of each minibatch."""
        place = self.folder / name
        config = Config(
            algorithm="ppo", seed=seed, loss=Loss(name="ppo"),
            model=ModelConfig(path=self.model),
            data=Data(path=(str(self.folder / "prompts.jsonl"),), eval_share=0.0),
            rollout=RolloutConfig(max_new_tokens=NEW, epochs=2, minibatches=2, slots=BATCH),
            ppo=PpoConfig(kl=0.0, missing_end="subtract", missing_end_score=0.0),
            rewards=RewardsConfig(model=str(self._reward(members)), functions=(self.function,), weights=(0.0,)),
            optimizer=OptimizerConfig(learning_rate=RATE, schedule="linear"),
            train=Train(steps=iterations * 4, batch_size=BATCH // 2),
            evaluate=Evaluate(every=0), checkpoint=CheckpointConfig(every=0, keep_last=1),
            log=LogConfig(tensorboard=False, progress=False),
        )  # fmt: skip
        before = _seconds()
        run.train(fields.replace(config, changes), str(place), resume=True)
        return {"cpu_seconds": _seconds() - before}

    def _reward(self, members: int) -> pathlib.Path:
        whole = self.folder / "reward"
        return whole if members > 1 else whole / "members/seed=0" if (whole / "members").exists() else whole

    def dpo(self, name: str, seed: int, beta: float) -> None:
        """One pass over the pairs."""
        length = PROMPT + NEW + 13
        config = Config(
            algorithm="preference", seed=seed, loss=Loss(name="dpo", beta=beta),
            model=ModelConfig(path=self.model),
            data=Data(path=(str(self.folder / "train.jsonl"),), eval_share=0.0, length=length, buckets=(length,)),
            optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear"),
            train=Train(steps=TRAINED // 32, batch_size=32),
            evaluate=Evaluate(every=0), checkpoint=CheckpointConfig(every=0, keep_last=1),
            log=LogConfig(tensorboard=False, progress=False),
        )  # fmt: skip
        run.train(config, str(self.folder / name), resume=True)

    # Figures

    def measured(self, name: str, seed: int) -> Row:
        """The true reward of fresh samples above the base's, in its standard deviations, and their KL from the base."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            policy = open_policy(str(self.folder / name))
            subject = Subject(name, policy.model, policy.params, policy.tokenizer, policy.end_ids)
            asked = [self.prompts[i % len(self.prompts)] for i in range(FRESH)]
            drawn = answer(subject, self.encoder, Sampler(policy.model), asked, self.sampling, 1000 + seed)
            own, base = (np.asarray(logprobs(one, drawn, 1.0)) for one in (subject, self.subject))
            values = [self.truth(row[0]) for row in drawn.texts]
            said = {"gain": (float(np.mean(values)) - self.base) / self.spread, "kl": float(np.mean(own - base))}
            file.write_text(json.dumps(said | {"error": float(np.std(values) / len(values) ** 0.5 / self.spread)}))
        return json.loads(file.read_text())

    def best_of(self) -> list[Point]:
        """The best of 1, 2, 4, ... by the reward model."""
        sampler = Sampler(self.subject.model, samples=DRAWN)
        drawn = answer(self.subject, self.encoder, sampler, self.prompts, self.sampling, 7)
        members = open_rewards(str(self._reward(1)))
        judge = Rewards("reward", [Subject("reward", m.model, m.params, m.tokenizer) for m in members])
        ids = [np.concatenate([drawn.prompts[c.row], c.tokens]) for row in drawn.completions for c in row]
        shape = len(self.prompts), DRAWN
        truth = np.asarray([[self.truth(text) for text in row] for row in drawn.texts], float)
        scaled = (truth - self.base) / self.spread
        return curves({"reward model": judge.scores(ids)[0].reshape(shape)}, scaled)["reward model"]


def _seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def frontier(study: Study, out: pathlib.Path) -> Row:
    """The first study."""
    study.prepare(1, 3)
    found: Row = {"base": study.base, "spread": study.spread, "ppo": {}, "dpo": {}, "seconds": {}}
    for price, seeds in PRICES.items():
        for seed in seeds:
            name = f"ppo{price}-{seed}"
            took = study.ppo(name, seed, ITERATIONS, 1, **{"ppo.kl": price})
            found["ppo"].setdefault(price, []).append(study.measured(name, seed))
            found["seconds"].setdefault(price, []).append(took["cpu_seconds"])
            print(name, found["ppo"][price][-1], took, flush=True)
    for beta in BETAS:
        for seed in SEEDS[:2]:
            name = f"dpo{beta}-{seed}"
            study.dpo(name, seed, beta)
            found["dpo"].setdefault(beta, []).append(study.measured(name, seed))
            print(name, found["dpo"][beta][-1], flush=True)
    picked = study.best_of()
    found["best_of"] = [{"n": p.n, "kl": p.kl, "gain": None if p.gold is None else list(p.gold)} for p in picked]
    spots = {
        kind: [(str(x), [(one["kl"], one["gain"]) for one in each]) for x, each in found[kind.lower()].items()]
        for kind in ("PPO", "DPO")
    }
    spots["best of n"] = [(str(p.n), [(p.kl, p.gold.mean)]) for p in picked if p.gold is not None]
    picture = Frontier(
        "True reward against KL", "KL to the base model, nats a completion",
        "true reward above the base model's, its standard deviations", spots,
    )  # fmt: skip
    save(picture, out / "frontier.png")
    return found


def overoptimisation(study: Study, out: pathlib.Path) -> Row:
    """The second study."""
    study.prepare(MEMBERS, 2)
    found: Row = {"base": study.base, "spread": study.spread, "runs": {}}
    for kind, (members, changes) in KINDS.items():
        for seed in SEEDS[: 2 if changes else 3]:
            name = f"{kind.replace(' ', '_')}-{seed}"
            study.ppo(name, seed, LONGER, members, **{"optimizer.schedule": "constant"} | changes)
            found["runs"].setdefault(kind, []).append(told(study, name))
            true, kl = (found["runs"][kind][-1][what] for what in ("gold", "kl"))
            print(name, f"peak {max(true):.2f}, last {true[-1]:.2f}, KL {kl[-1]:.1f}", flush=True)
    turns(found, out / "overoptimisation.png")
    return found


def turns(found: Row, file: pathlib.Path) -> None:
    """The figure of the second study: what falls below FLOOR is drawn there, so that the turn is seen."""
    series = {
        f"{kind}, seed {seed}": (range(1, LONGER + 1), [max(x, FLOOR) for x in one["gold"]])
        for kind, several in found["runs"].items()
        for seed, one in enumerate(several)
    }
    what = f"gain of true reward, standard deviations, cut at {FLOOR:.0f}"
    save(Lines("True reward while the proxy rises", "iteration", what, series), file)


def told(study: Study, name: str) -> Row:
    """Of each iteration: true reward and proxy of its samples, and their KL, from the lines of its updates."""
    rows = [json.loads(line) for line in (study.folder / name / "metrics.jsonl").read_text().splitlines()]
    mean = lambda metric, i: float(np.mean([row[metric] for row in rows[4 * i : 4 * i + 2]]))  # one epoch: each once
    count = len(rows) // 4
    true = [(mean(f"rewards/{study.function}", i) - study.base) / study.spread for i in range(count)]
    proxy, kl = ([mean(metric, i) for i in range(count)] for metric in ("rewards/model", "objective/kl"))
    return {"gold": true, "proxy": proxy, "kl": kl}


STUDIES = {"frontier": frontier, "overoptimisation": overoptimisation}


def main() -> None:
    """Measures and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", required=True, help="folder of stories260K")
    flags.add_argument("--text", required=True, help="file of stories")
    flags.add_argument("--out", required=True, help="folder to write")
    flags.add_argument("--studies", default=",".join(STUDIES), help="some of them, with commas between")
    args = flags.parse_args()
    out = pathlib.Path(args.out)
    run.use_compile_cache()
    for name in args.studies.split(","):
        found = STUDIES[name](Study(name, args.model, pathlib.Path(args.text), out), out)
        (out / f"{name}.results.json").write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(found))


if __name__ == "__main__":
    main()
