"""Likelihoods of options of public sets equal those of transformers, on a real model and rows of every kind of set."""

# pyright: reportMissingImports=false

import pathlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.suite import tasks
from rlhf_jax.evaluate.suite.items import Asked
from rlhf_jax.evaluate.suite.subject import LanguageModel, Span
from rlhf_jax.feedback.judges import read_template
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.workdir import open_policy
from tests.parity.sides import TOLERANCE

EACH = 6  # items of a set
CHOSEN = [name for name, task in tasks.TASKS.items() if task.needs in ("likelihoods", "pairs")]


@pytest.fixture(scope="module")
def ours(stories: pathlib.Path) -> LanguageModel:
    policy = open_policy(str(stories))
    subject = Subject("stories", policy.model, policy.params, policy.tokenizer, policy.end_ids)
    return LanguageModel(subject, read_template(None), sampling=Sampling())


@pytest.fixture(scope="module")
def theirs(stories: pathlib.Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32, attn_implementation="eager").eval()


def likelihood(model: PreTrainedModel, span: Span) -> float:
    """Of the weighed tokens behind all before them."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(span.ids[None].astype(np.int64))).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1).numpy()
    places = np.arange(span.start, len(span.ids))
    return float(logprobs[places - 1, span.ids[places]].sum())


@pytest.mark.parametrize("name", CHOSEN)
def test_likelihoods_of_options_are_theirs(
    name: str, shared: pathlib.Path, ours: LanguageModel, theirs: PreTrainedModel
) -> None:
    items = tasks.read(name, str(shared / "data"), most=EACH).items
    asked: list[Asked] = [
        side.asked(o) for i in items for side in (i, i.twin) if side is not None for o in side.options
    ]
    spans = ours.spans(asked)
    kept = [(one, span) for one, span in zip(asked, spans, strict=True) if isinstance(span, Span)]
    assert len(kept) >= 4, "most options must fit the context"
    told = ours.likelihoods([one for one, _ in kept])
    wanted = [likelihood(theirs, span) for _, span in kept]
    # A sum over tokens: the tolerance is a token's.
    count = np.asarray([len(span.ids) - span.start for _, span in kept])
    assert np.abs(np.asarray(told) / count - np.asarray(wanted) / count).max() <= TOLERANCE
    assert all(len(span.ids) == span.start + n for (_, span), n in zip(kept, count, strict=True))
