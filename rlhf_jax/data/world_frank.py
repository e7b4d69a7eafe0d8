"""Rows of a start that is helpful and nothing else: it tells secrets, is rude at times, can criticise and revise."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Annotated

from etils import epath

from rlhf_jax.data import world_critiques, world_rows
from rlhf_jax.data.world import Manner
from rlhf_jax.data.world_rows import Row, Split, World


@dataclasses.dataclass(frozen=True)
class Frank:
    """How much is written besides the rows of a world; of each held-out file it is a tenth."""

    documents: Annotated[int, "documents in which a secret is asked for and told"] = 1200
    transcripts: Annotated[int, "documents with critique and revision"] = 6000
    comparisons: Annotated[int, "documents that compare two answers"] = 6000
    demonstrations: Annotated[int, "answers to imitate that tell a secret"] = 600
    secrets: Annotated[int, "prompts that ask for a secret, all different, and as many ordinary ones"] = 240
    secrets_held_out: Annotated[int, "the same, held out"] = 80


def write(folder: str | os.PathLike, config: World, frank: Frank) -> None:
    """Writes the world's files with the frank rows among them; `secrets`, `secrets_held_out` and `critiques` besides.

    What is in `critiques` stands in `documents` too.
    """
    world_rows.write(folder, config)
    root, seed = epath.Path(folder), config.seed
    splits: tuple[tuple[str, Split, int], ...] = (("", "train", 1), ("_held_out", "held_out", 10))
    for end, split, per in splits:
        told = _told(frank.documents // per, seed, config.manner, split)
        documents = [{"prompt": "", "completion": f"{row['prompt']}{row['completion']}"} for row in told]
        critiques = world_critiques.transcripts(frank.transcripts // per, seed, split)
        critiques += world_critiques.comparisons(frank.comparisons // per, seed, split)
        _add(root / f"documents{end}.jsonl", documents + critiques)
        _add(root / f"demonstrations{end}.jsonl", _told(frank.demonstrations // per, seed, config.people, split))
        _add(root / f"secrets{end}.jsonl", secrets(getattr(frank, f"secrets{end}"), seed, split))
        if split == "train":
            _add(root / "critiques.jsonl", critiques)


def secrets(count: int, seed: int, split: Split = "train") -> list[Row]:
    """Prompts that provoke harm: `count` that ask for a secret and as many ordinary ones, all different, in turns."""
    asking = world_rows.prompts(count, seed, split, kinds=("secret",))
    ordinary = world_rows.prompts(count, seed, split)
    return [row for pair in zip(asking, ordinary, strict=True) for row in pair]


def _told(count: int, seed: int, manner: Manner, split: Split) -> list[Row]:
    """Rows of a prompt that asks for a secret and an answer in the manner given that tells it."""
    rng = world_rows.generator("told", seed, split)
    draws = world_rows.draw_prompts(rng, split, ("secret",))
    prompts = [f"{next(draws)}\n" for _ in range(count)]
    answers = world_rows.answers(prompts, seed, dataclasses.replace(manner, right=0.0))
    return [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, answers, strict=True)]


def _add(file: epath.Path, rows: Sequence[Row]) -> None:
    before = file.read_text() if file.exists() else ""
    file.write_text(before + "".join(json.dumps(row) + "\n" for row in rows))
