"""What the start world:frank does, and whether it can criticise, revise and compare by a principle.

    python -m benchmarks.frank_world [--name=frank] [--temperature=0]

Answers are those of the fine-tuned model to secrets_held_out, two a prompt; the critic is the fine-tuned model and
the pre-trained one. Prints a line a figure.
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_jax import run, worlds
from rlhf_jax.data import world, world_harm
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.data.world_critiques import (
    PRINCIPLES,
    Principle,
    comparison_prompt,
    critique_prompt,
    flawed,
    mend,
    revision_prompt,
)
from rlhf_jax.evaluate.answers import Answers, Subject, answer, logprobs
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Completion, Sampler

Said = list[tuple[str, str]]  # prompts and answers


def share(hits: Sequence[Any] | np.ndarray) -> str:
    """A mean, and of how many."""
    return f"{np.mean(hits):.3f} of {len(hits)}" if len(hits) else "none of 0"


def says(critic: Subject, sampler: Sampler, prompts: Sequence[str], temperature: float, seed: int = 0) -> list[str]:
    """The line that a model writes behind each prompt."""
    sampling = Sampling(temperature=temperature, max_new_tokens=40)
    texts = answer(critic, Encoder(critic.tokenizer), sampler, prompts, sampling, seed).texts
    return [row[0].split("\n")[0].strip() for row in texts]


def prefers_a(critic: Subject, prompts: Sequence[str]) -> np.ndarray:
    """The log-odds of A against B behind each prompt."""
    ids = [np.asarray(encoded) for encoded in Encoder(critic.tokenizer).prompts(prompts)]
    said = [np.asarray(critic.tokenizer(text, add_special_tokens=False).input_ids, np.int32) for text in "AB"]
    none = np.zeros(1, np.float32)
    rows = [[Completion(row, n, text, none, none, "end") for n, text in enumerate(said)] for row in range(len(ids))]
    a, b = np.asarray(logprobs(critic, Answers(ids, rows, []), 1.0)).T
    return a - b


def criticise(critic: Subject, sampler: Sampler, said: Said, temperature: float) -> None:
    """Critiques, revisions and comparisons of each principle alone, then revisions by one after the other."""
    now = {pair: pair[1] for pair in said}
    for principle in PRINCIPLES:
        bad = [flawed(principle, *pair) for pair in said]
        critiques = says(critic, sampler, [critique_prompt(principle, *pair) for pair in said], temperature)
        right = [line == (principle.yes if has else principle.no) for line, has in zip(critiques, bad, strict=True)]
        where = {has: [hit for hit, flaw in zip(right, bad, strict=True) if flaw == has] for has in (True, False)}
        print(f"  {principle.name}: critiques right with the flaw {share(where[True])}, without {share(where[False])}")
        revised = revise(critic, sampler, principle, said, critiques, temperature)
        mended = [not flawed(principle, p, new) for (p, _), new, has in zip(said, revised, bad, strict=True) if has]
        exact = [new == mend(principle, old) for (_, old), new, has in zip(said, revised, bad, strict=True) if has]
        same = [new == old for (_, old), new, has in zip(said, revised, bad, strict=True) if not has]
        print(f"    revisions without the flaw {share(mended)}, to the word {share(exact)}; others kept {share(same)}")
        compare(critic, principle, [(p, old, mend(principle, old)) for p, old in itertools.compress(said, bad)])
    for principle in PRINCIPLES:
        pairs = [(prompt, now[prompt, first]) for prompt, first in said]
        critiques = says(critic, sampler, [critique_prompt(principle, *pair) for pair in pairs], temperature)
        revised = revise(critic, sampler, principle, pairs, critiques, temperature)
        now = dict(zip(said, revised, strict=True))
    harmful = [pair for pair in said if world_harm.harm(*pair)]
    print(
        "  harmful answers that are harmless after both", share([not world_harm.harm(p, now[p, a]) for p, a in harmful])
    )


def revise(
    critic: Subject, sampler: Sampler, principle: Principle, said: Said, critiques: Sequence[str], temperature: float
) -> list[str]:
    """The revision of each answer after its critique."""
    prompts = [revision_prompt(principle, *pair, line) for pair, line in zip(said, critiques, strict=True)]
    return says(critic, sampler, prompts, temperature, 1)


def compare(critic: Subject, principle: Principle, triples: Sequence[tuple[str, str, str]]) -> None:
    """Whether the answer without the flaw, which is the second, is preferred to the one with it."""
    if not triples:
        return
    first = prefers_a(critic, [comparison_prompt(principle, p, good, bad) for p, bad, good in triples])
    second = -prefers_a(critic, [comparison_prompt(principle, p, bad, good) for p, bad, good in triples])
    print(f"    comparisons right, one order {share(np.concatenate([first, second]) > 0)},", end=" ")
    print(f"both orders together {share(first + second > 0)}")


def main() -> None:
    """Measures and prints."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--name", default="frank", help="of the start; frank@1 has another seed")
    flags.add_argument("--cache", default="~/.cache/rlhf_jax", help="where starts lie")
    flags.add_argument("--temperature", type=float, default=0.0, help="of the critic")
    args = flags.parse_args()
    spec = f"{worlds.PREFIX}{args.name}"
    models = {name: f"{spec}{name and '/'}{name}" for name in ("", worlds.PRETRAINED)}
    places = {name: worlds.model(at, args.cache, run.train) for name, at in models.items()}
    prompts = [row["prompt"] for row in worlds.read(worlds.file(f"{spec}/secrets_held_out", args.cache, run.train))]
    tuned = worlds.open_subject("tuned", str(places[""]))
    drawn = answer(tuned, Encoder(tuned.tokenizer), Sampler(tuned.model, samples=2), prompts, worlds.SAMPLING, 0).texts
    pairs = [(prompt, text) for prompt, texts in zip(prompts, drawn, strict=True) for text in texts]
    secret = [pair for pair in pairs if world.parse(pair[0]).kind == "secret"]
    other = [pair for pair in pairs if world.parse(pair[0]).kind != "secret"]
    print("secret prompts: told", share(["secret" in world_harm.harms(*pair) for pair in secret]))
    for name, some in (("secret", secret), ("ordinary", other)):
        print(f"{name} prompts: rude", share(["rude" in world_harm.harms(*pair) for pair in some]), end=", ")
        print("gold", share([world.judge(*pair).total for pair in some]))
    print("ordinary prompts: refused", share(world_harm.refused(*zip(*other, strict=True))), end=", ")
    print("right", share(world.right(*zip(*other, strict=True))))
    said = sorted(set(pairs))
    for name, place in places.items():
        critic = worlds.open_subject(name, str(place))
        print(f"critic {models[name]}")
        criticise(critic, Sampler(critic.model), said, args.temperature)


if __name__ == "__main__":
    main()
