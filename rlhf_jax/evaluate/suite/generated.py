"""Answers that a program checks: a final number, a mathematical expression, constraints on form."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhf_jax.data.rows import Refusal
from rlhf_jax.evaluate.resampling import ratio
from rlhf_jax.evaluate.suite import ifbench, sets
from rlhf_jax.evaluate.suite.items import Against, Examinee, Figure, Found, Item, Measure, figure
from rlhf_jax.feedback import ifeval, verifiable


def answered(items: Sequence[Item], examinee: Examinee) -> tuple[list[tuple[Item, str]], dict[str, str]]:
    """Each item with what the model wrote, and why others have nothing, by where they stand."""
    told = examinee.answers([item.asked() for item in items])
    pairs = list(zip(items, told, strict=True))
    left = {item.where: str(text) for item, text in pairs if isinstance(text, Refusal)}
    return [(item, text) for item, text in pairs if not isinstance(text, Refusal)], left


def line_of(item: Item, text: str, **values: Any) -> dict[str, Any]:
    """A sample: what was asked and written, and what it counts."""
    prompt = item.plain or item.prompt
    return {"where": item.where, "group": item.group, "prompt": prompt, "answer": text, "values": values}


def _right(
    check: Callable[..., list[float | None]],
    items: Sequence[Item],
    examinee: Examinee,
    seed: int = 0,
    against: Against | None = None,
) -> Found:
    pairs, left = answered(items, examinee)
    texts, wanted = [text for _, text in pairs], [item.columns["answer"] for item, _ in pairs]
    values = [float(value or 0) for value in check([""] * len(texts), texts, answer=wanted)]
    lines = [
        line_of(item, text, accuracy=value) | {"reference": item.columns["answer"]}
        for (item, text), value in zip(pairs, values, strict=True)
    ]
    return Found(figure("accuracy", [item for item, _ in pairs], values, 0.0, seed=seed), lines, left)


def _kept(
    share: sets.Share, items: Sequence[Item], examinee: Examinee, seed: int = 0, against: Against | None = None
) -> Found:
    pairs, left = answered(items, examinee)
    lines, whole, counts = [], [], []
    for item, text in pairs:
        kinds, arguments = item.columns["instruction_id_list"], item.columns["kwargs"]
        held = [share(text, [kind], [given]) for kind, given in zip(kinds, arguments, strict=True)]
        known = [bool(one) for one in held if one is not None]
        if unknown := sorted({kind for kind, one in zip(kinds, held, strict=True) if one is None}):
            left[item.where] = f"not checked: {', '.join(unknown)}"
        if known:
            counts.append((sum(known), len(known)))
            values: dict[str, float] = {"constraints": sum(known) / len(known)}
            if len(known) == len(kinds):  # of a prompt with an unchecked constraint nobody knows whether all hold
                values["prompts"] = float(all(known))
                whole.append((item, values["prompts"]))
            lines.append(line_of(item, text, **values) | {"held": list(zip(kinds, held, strict=True))})
    figures = figure("prompts", [item for item, _ in whole], [value for _, value in whole], seed=seed)
    if counts:
        top, bottom = np.asarray(counts, np.float64).T
        estimate = ratio(top, bottom, np.arange(len(counts)), seed=seed)
        figures.append(Figure("constraints", estimate, int(bottom.sum()), None))
    return Found(figures, lines, left)


# `accuracy`: the share of answers that come to the reference (`feedback.verifiable`); guessing has 0.
numbers: Measure = functools.partial(_right, verifiable.gsm8k)
mathematics: Measure = functools.partial(_right, verifiable.math)
# `prompts`: the share of prompts all of whose constraints hold, of those that can be checked whole; `constraints`: of
# all checked constraints those that hold, with a bootstrap over prompts. Read strictly: Zhou et al. 2023,
# arXiv:2311.07911; Pyatkin et al. 2025, arXiv:2507.02833.
constraints: Measure = functools.partial(_kept, ifeval.share)
other_constraints: Measure = functools.partial(_kept, ifbench.share)
