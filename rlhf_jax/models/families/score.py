"""A score in the place of the word head: what transformers calls sequence and token classification.

Of one label the score is the logit. Of two it is label 1's logit less label 0's, so that its sigmoid is the
probability of label 1. Sequence classification has no bias in transformers: ours stands in config.json, where
transformers does not look; differences of scores, which are all that a reward model is trained on, are the same.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.models.families.maps import Family, Map, Path, Weight

Kind = Literal["sequence", "token"]
SUFFIXES: dict[Kind, str] = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification"}
WEIGHT, BIAS = ("score",), ("score_bias",)
LABELS: dict[Kind, list[str]] = {"sequence": ["LABEL_0"], "token": ["wrong", "right"]}


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """What a config's class reads from the last hidden states: a score a row, one a token, or None: words."""
    names = config.get("architectures") or ()
    return next((kind for kind, suffix in SUFFIXES.items() if any(str(name).endswith(suffix) for name in names)), None)


def labels(config: Mapping[str, Any]) -> int:
    """How many logits a classifier has; 2 if it doesn't say, as transformers leaves these unsaid."""
    named = config.get("id2label")
    return len(named) if named is not None else config.get("num_labels", 2)


def check(config: Mapping[str, Any]) -> None:
    """Errors: UserError if no score can be read from this classifier."""
    if labels(config) not in (1, 2):
        raise UserError(
            f"a classifier of {labels(config)} labels is not supported; a score is read from 1 label, or from 2 as the "
            "logit of label 1 less that of label 0."
        )
    bias = config.get("score_bias", 0.0)
    if type(bias) not in (int, float):
        raise UserError(f"score_bias {bias!r} is not a number; it is what is added to each score, 0 if it is left out.")


def weights(config: Mapping[str, Any], family: Family) -> tuple[Weight, ...]:
    """The tensors that hold the score: none of a language model."""
    kind = kind_of(config)
    if kind is None:
        return ()
    name, rows = "score" if kind == "sequence" else family.classifier, _logits(labels(config))
    weight = Weight(f"{name}.weight", (WEIGHT,), rows)
    return (weight, Weight(f"{name}.bias", (BIAS,), rows)) if _has_bias(config) else (weight,)


def constants(config: Mapping[str, Any]) -> dict[Path, float]:
    """The leaves that no tensor holds, each with the number that fills it."""
    if kind_of(config) is None:
        return {WEIGHT: 0.0, BIAS: 0.0}
    return {} if _has_bias(config) else {BIAS: float(config.get("score_bias", 0.0))}


def _has_bias(config: Mapping[str, Any]) -> bool:
    return kind_of(config) == "token" and bool(config.get("token_classification_bias", True))


def as_classifier(config: Mapping[str, Any], family: Family, kind: Kind) -> dict[str, Any]:
    """The config of this kind of classifier, without `score_bias`. Errors: UserError if transformers has none."""
    if kind == "token" and not family.token:
        raise UserError(
            f"transformers has no token classification for {config['model_type']} models; write the model as sequence "
            "classification, or start from another family."
        )
    gone = ("num_labels", "problem_type", "token_classification_bias", "score_bias")
    names = LABELS[kind]
    return {name: value for name, value in config.items() if name not in gone} | {
        "architectures": [family.stem + SUFFIXES[kind]],
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }


def _logits(count: int) -> Map:
    """Rows of a classifier to the one that gives the score, and back: of two the first is 0."""
    wide = lambda x: x.astype(np.float32)
    load = lambda x, shape: (x[0] if count == 1 else wide(x[1]) - wide(x[0]),)
    save = lambda parts, shape: np.stack([*([np.zeros_like(parts[0])] if count == 2 else []), parts[0]])
    return Map(load, save)
