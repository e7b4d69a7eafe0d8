"""What the models of a chain are worth, on prompts that nothing was trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rlhf_jax import registry, worlds
from rlhf_jax.chain import checks
from rlhf_jax.chain.config import Chain
from rlhf_jax.chain.stages import Products
from rlhf_jax.checkpoint import is_sealed
from rlhf_jax.data import dataset
from rlhf_jax.data import prompts as asked
from rlhf_jax.data.rows import Text
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate.answers import Subject, answer
from rlhf_jax.evaluate.calibration import calibration
from rlhf_jax.evaluate.compare import Result, compare, win_shares
from rlhf_jax.evaluate.intervals import Estimate, paired
from rlhf_jax.evaluate.judgements import comparisons, gold_of, judge
from rlhf_jax.evaluate.proxies import Point, curves
from rlhf_jax.evaluate.rewards import Rewards, combine
from rlhf_jax.evaluate.scorers import SCORERS, Scorer, score
from rlhf_jax.report.rewards import View
from rlhf_jax.sampling.sampler import Sampler
from rlhf_jax.workdir import load_config, open_rewards

PROXY, BASE = "reward model", "sft"


class Measured(NamedTuple):
    """What the models are worth on the held-out prompts."""

    prompts: list[Text]
    score: str  # what scores are called
    known: bool  # whether they are of a known reward; else they are the reward model's
    results: list[Result]  # sft, the trained ones, and the best of n
    proxy: dict[str, Estimate]  # the reward model's score, by model
    trails: dict[str, list[tuple[int, Result, Estimate]]]  # of a trained one its checkpoints: step, result, proxy
    best: Sequence[Point]  # of 1, 2, 4, ... answers, picked by the reward model
    view: View | None  # the reward model on held-out rankings


def measure(chain: Chain, place: epath.Path, products: Products) -> Measured:
    """Lets all models answer the prompts of the evaluation."""
    section, rows = chain.evaluate, checks.evaluated(chain)
    texts, columns, tools = [row.text for row in rows], asked.columns(rows), [row.tools for row in rows]
    reward = _reward(chain, products.reward)
    known = None if section.scorer is None else registry.resolve(SCORERS, section.scorer, "scorer")
    subjects, steps = _opened(chain, place, products)
    results = compare(
        subjects, texts, columns, known or reward, baseline=BASE, sampling=section.sampling, samples=section.samples,
        seed=chain.seed, tools=tools,
    )  # fmt: skip
    scored = {r.name: r.scores if known is None else _scores(reward, texts, r.texts, columns) for r in results}
    best, picked, points = _best_of(chain, subjects[0], results[0], rows, known, reward)
    proxy = paired({name: s.mean(axis=1) for name, s in (scored | {best.name: picked}).items()}, seed=chain.seed)
    trails = {
        name: [(step, r, proxy[r.name]) for step, of in at.items() for r in results if r.name == of]
        for name, at in steps.items()
    }
    final = [r for r in results if r.name == BASE or r.name in steps]
    view = None if "reward" not in chain.made else _judged(chain, place, reward, known)
    called = PROXY if known is None else f"{section.scorer} reward" if section.scorer == "gold" else str(section.scorer)
    return Measured(texts, called, known is not None, [*final, best], proxy, trails, points, view)


def _opened(chain: Chain, place: epath.Path, products: Products) -> tuple[list[Subject], dict[str, dict[int, str]]]:
    """The models, SFT's first; and of each trained one by step the names of its checkpoints, its own name last."""
    subjects, steps = [worlds.open_subject(BASE, products.sft)], {}
    for stage in ("ppo", "dpo"):
        made = stage in chain.made
        name = getattr(chain, stage).loss.name if made else stage
        path = getattr(products, stage)
        folder = place / stage / "checkpoints"
        there = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and is_sealed(p)) if made else [0]
        last = int(path.rpartition("@")[2]) if made and "@" in epath.Path(path).name else there[-1]
        steps[name] = {step: f"{name}@{step}" for step in there if step < last} | {last: name}
        earlier = [worlds.open_subject(of, f"{place / stage}@{s}") for s, of in steps[name].items() if s != last]
        subjects += [*earlier, worlds.open_subject(name, path)]
    return subjects, steps


def _scores(
    scorer: Scorer, prompts: Sequence[Text], texts: Sequence[Sequence[str]], columns: Mapping[str, Sequence[Any]]
) -> np.ndarray:
    """[prompts, samples]."""
    return np.asarray(score(scorer, prompts, texts, columns))


def _best_of(
    chain: Chain, sft: Subject, base: Result, rows: list[asked.Asked], known: Scorer | None, reward: Rewards
) -> tuple[Result, np.ndarray, Sequence[Point]]:
    """The best of n answers of the SFT model: as a model, the picked ones' proxy scores [P, 1], and for each n."""
    section, columns, count = chain.evaluate, asked.columns(rows), chain.evaluate.best_of
    texts = [row.text for row in rows]
    sampler, encoder = Sampler(sft.model, samples=count), Encoder(sft.tokenizer)
    drawn = answer(sft, encoder, sampler, texts, section.sampling, chain.seed, [row.tools for row in rows])
    proxy = _scores(reward, texts, drawn.texts, columns)
    gold = proxy if known is None else _scores(known, texts, drawn.texts, columns)
    points = curves({PROXY: proxy}, None if known is None else gold, seed=chain.seed)[PROXY]
    pick = proxy.argmax(axis=1)
    chosen = lambda values: np.take_along_axis(values, pick[:, None], axis=1)
    completions = [row[at] for row, at in zip(drawn.completions, pick, strict=True)]
    lengths = np.asarray([[len(one.tokens)] for one in completions])
    own = chosen(gold)
    told = paired(
        {
            "score": own[:, 0], "gain": own[:, 0] - base.scores.mean(axis=1), "wins": win_shares(own, base.scores),
            "tokens": lengths[:, 0],
        },
        seed=chain.seed,
    )  # fmt: skip
    kept = [[row[at]] for row, at in zip(drawn.texts, pick, strict=True)]
    ended, far = float(np.mean([one.stop == "end" for one in completions])), points[-1].kl
    made = Result(
        f"best of {count}", kept, own, **told, kl=Estimate(far, far, far), ended=ended, kls=None, lengths=lengths
    )  # fmt: skip
    return made, chosen(proxy), points


def _judged(chain: Chain, place: epath.Path, reward: Rewards, known: Scorer | None) -> View | None:
    """The reward model on the rankings that its run held out; None if there are none."""
    members = place / "reward" / "members"
    config = load_config(next(iter(sorted(members.iterdir()))) if members.exists() else place / "reward")
    length = min(config.data.length or reward.length, reward.length)
    found = dataset.read(config.data, reward.encoder, "ranking", length)
    split_seed = config.seed if config.data.split_seed is None else config.data.split_seed
    held = {example.index for example in dataset.split(found, config.data, split_seed).evaluation}
    kept = [(item, example) for item, example in found.kept if example.index in held]
    pairs = comparisons(kept, [*config.data.path, *config.data.eval_path])
    if not len(pairs):
        return None
    way, seed = chain.ppo.rewards, chain.seed
    one = combine(reward.scores(pairs.rows), way.how, way.lam)
    gold = None if known is None else gold_of(pairs, known)
    told = calibration(one[pairs.better] - one[pairs.worse], pairs.share, pairs.units, seed=seed)
    return View(PROXY, "held-out rankings", judge(pairs, one, gold, seed=seed), told)


def evaluation_names(*paths: Sequence[str]) -> list[str]:
    """What sources are called, in their order."""
    return [path for several in paths for path in several]


def _reward(chain: Chain, path: str) -> Rewards:
    """The reward model, an ensemble combined as PPO has it."""
    members = [Subject(PROXY, p.model, p.params, p.tokenizer, p.end_ids) for p in open_rewards(path)]
    return Rewards(PROXY, members, how=chain.ppo.rewards.how, lam=chain.ppo.rewards.lam)
