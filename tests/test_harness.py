"""Models as lm-evaluation-harness asks them, without it: likelihoods, windows, cuts and answers against full logits.

Side by side with the harness and its own `hf`: tests/parity/test_harness.py.
"""

import functools
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import is_offline_mode

from experiments import harness as program
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import harness
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.harness import HarnessModel, Wanted, wanted
from rlhf_jax.evaluate.suite.subject import OPTIONS, Span, likelihoods
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.workdir import Policy, open_policy
from tests import tiny

LENGTH = 64
BOS, EOS = 0, 1
ROOM = {"max_gen_toks": 8}


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Policy:
    return open_policy(str(tiny.write_model(tmp_path_factory.mktemp("harness") / "model")))


@pytest.fixture(scope="module")
def subject(policy) -> Subject:
    return Subject("tiny", policy.model, policy.params, policy.tokenizer, policy.end_ids)


@pytest.fixture(scope="module")
def one(subject) -> HarnessModel:
    return HarnessModel(subject)


@pytest.fixture
def model(one, monkeypatch) -> HarnessModel:
    """The same for all, since its sampler is compiled once; nothing cut so far."""
    monkeypatch.setattr(one, "cut", 0)
    return one


def asked(*args: Any) -> list[Any]:
    """Requests as the harness makes them."""
    return [SimpleNamespace(args=one) for one in args]


@functools.partial(jax.jit, static_argnums=0)
def full(model, params, ids: jax.Array, segments: jax.Array) -> jax.Array:
    return model.logits(params, model.apply(params, ids, segments, jnp.arange(ids.shape[1])[None]))[0]


def logits(policy: Policy, ids: list[int]) -> np.ndarray:
    """What is said behind each token of a row, float64 [T, V]."""
    row, segments = np.zeros((2, 1, LENGTH), np.int32)
    row[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    return np.asarray(full(policy.model, policy.params, row, segments), np.float64)[: len(ids)]


def logprob(policy: Policy, before: list[int], token: int) -> float:
    z = logits(policy, before)[-1]
    return float(z[token] - z.max() - np.log(np.exp(z - z.max()).sum()))


def summed(policy: Policy, before: list[int], after: list[int]) -> float:
    """Token by token, each behind as much of what stands before it as the context holds of the row."""
    whole = (before + after)[-(LENGTH + 1) :]
    start = len(whole) - len(after)
    return sum(logprob(policy, whole[:place], whole[place]) for place in range(start, len(whole)))


def ids_of(policy: Policy, text: str) -> list[int]:
    """The tiny tokenizer's tokens are bytes, and it adds none."""
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


# Likelihoods


def test_a_continuations_likelihood_is_that_of_the_full_logits(policy, model):
    pairs = [("Why?", " red"), ("Why?", " a green é"), ("sun", "x")]
    for (before, after), (value, greedy) in zip(pairs, model.loglikelihood(asked(*pairs)), strict=True):
        assert value == pytest.approx(summed(policy, ids_of(policy, before), ids_of(policy, after)), abs=1e-4)
        assert greedy is False
    assert model.cut == 0


def test_white_space_that_ends_a_text_belongs_to_what_follows(policy, model):
    (one, _), (other, _) = model.loglikelihood(asked(("Why? \n", "red"), ("Why?", " \nred")))
    assert one == other == pytest.approx(summed(policy, ids_of(policy, "Why?"), ids_of(policy, " \nred")), abs=1e-4)


def test_what_has_no_text_before_it_stands_behind_the_beginning_token(policy, model):
    told = model.loglikelihood(asked(("", "red"), ("  ", "red"), ("", "<s>red")))
    wanted = [summed(policy, [BOS], ids_of(policy, text)) for text in ("red", "  red", "red")]
    assert [value for value, _ in told] == pytest.approx(wanted, abs=1e-4)


def test_special_tokens_that_are_written_out_are_tokens(policy, model):
    ((value, _),) = model.loglikelihood(asked(("<s>Why?</s>", "red")))
    assert value == pytest.approx(summed(policy, [BOS, *ids_of(policy, "Why?"), EOS], ids_of(policy, "red")), abs=1e-4)


@pytest.mark.parametrize("longer", [0, 1, 30])
def test_the_oldest_tokens_go(policy, model, longer):
    """The last token is only weighed: so one more than the context still fits."""
    before, after = "x" * 10 + "ab" * 27 + "y" * (longer - 3), " red"  # 64 + longer - 3 + 4 tokens
    before = before[-(LENGTH - 3 + longer) :] if longer < 3 else before
    ids = ids_of(policy, before)
    assert len(ids) + 4 == LENGTH + 1 + longer
    ((value, _),) = model.loglikelihood(asked((before, after)))
    assert value == pytest.approx(summed(policy, ids, ids_of(policy, after)), abs=1e-4)
    assert model.cut == (longer > 0)


def test_greedy_is_what_temperature_0_writes(policy, subject):
    """Of whole rows and of single tokens; one token that isn't the likeliest is enough."""
    start = ids_of(policy, "Why?")
    best = list(start)
    for _ in range(4):
        best.append(int(logits(policy, best)[-1].argmax()))
    second = int(logits(policy, start)[-1].argsort()[-2])
    told = {
        "all": (best, 4), "one": (best[:5], 1), "first": ([*start, second, *best[5:]], 4),
        "last": ([*best[:-1], (best[-1] + 1) % 260], 4), "other": ([*start, second], 1),
    }  # fmt: skip
    rows = [Span(np.asarray(ids, np.int32), len(ids) - count) for ids, count in told.values()]
    found = dict(zip(told, (one.greedy for one in likelihoods(subject, rows)), strict=True))
    assert found == {"all": True, "one": True, "first": False, "last": False, "other": False}
    every = [Span(np.asarray([*start, token], np.int32), len(start)) for token in range(260)]
    assert [place for place, one in enumerate(likelihoods(subject, every)) if one.greedy] == [best[4]]
    assert len(every) > OPTIONS  # so several rows of the same text


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (("Why?", ""), "the continuation '' has no token of its own behind its text"),
        (("Why?", "x" * 65), "has 65 tokens, more than the model's context of 64; leave its task away"),
    ],
)
def test_a_continuation_that_cannot_be_weighed_is_one_sentence(model, pair, says):
    with pytest.raises(UserError, match=says):
        model.loglikelihood(asked(pair))


def test_a_model_without_numbers_is_no_figure(policy):
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), policy.params)
    model = HarnessModel(Subject("nan", policy.model, nothing, policy.tokenizer))
    with pytest.raises(UserError, match="nan gives likelihoods that are no numbers"):
        model.loglikelihood(asked(("Why?", " red")))


# Rolling likelihoods


def test_windows_are_those_of_the_harness(model, monkeypatch):
    """The example that its `loglikelihood_rolling` is described with."""
    monkeypatch.setattr(model, "max_length", 4)
    told = [(span.ids[:-1].tolist(), span.ids[span.start :].tolist()) for span in model._windows([*range(10, 20)])]
    assert told == [
        ([BOS, 10, 11, 12], [10, 11, 12, 13]), ([13, 14, 15, 16], [14, 15, 16, 17]), ([15, 16, 17, 18], [18, 19]),
    ]  # fmt: skip
    assert list(model._windows([])) == []


def test_a_rolling_likelihood_is_each_token_once(policy, model):
    text = "the sun and the moon are " * 6  # 150 tokens, so three windows
    tokens = ids_of(policy, text)
    whole = [BOS, *tokens]
    wanted = 0.0
    for place in range(1, len(whole)):
        stop = min(-(-place // LENGTH) * LENGTH, len(tokens)) + 1  # of the window that the token is in
        wanted += logprob(policy, whole[max(0, stop - LENGTH - 1) : place], whole[place])
    told = model.loglikelihood_rolling(asked((text,), ("sun",), ("",)))
    assert told == pytest.approx([wanted, summed(policy, [BOS], ids_of(policy, "sun")), 0.0], abs=1e-3)


# Answers


def greedy_text(policy: Policy, prompt: str, count: int) -> str:
    ids = ids_of(policy, prompt)
    for _ in range(count):
        ids.append(int(logits(policy, ids)[-1].argmax()))
    return policy.tokenizer.decode(ids[-count:], skip_special_tokens=True)


def test_an_answer_ends_before_the_first_of_its_texts(policy, model, monkeypatch):
    whole = greedy_text(policy, "Why?", 16)
    settings = {"max_gen_toks": 16}
    assert model.generate_until(asked(("Why?", settings))) == [whole]
    first, second = whole[5:7], whole[3:5]
    until = {"until": [first, second, ""]}
    steps = []
    stream = model._sampler.stream
    monkeypatch.setattr(harness, "STEPS", 4)
    monkeypatch.setattr(model._sampler, "stream", lambda *a, **k: (steps.append(1) or one for one in stream(*a, **k)))
    got = model.generate_until(asked(("Why?", settings | until), ("Why?", settings | {"until": second})))
    assert got == [whole[: min(whole.find(first), whole.find(second))], whole[: whole.find(second)]]
    assert len(steps) <= 4, "two looks at both: the rest of the tokens needn't be drawn"


def test_a_prompt_loses_its_oldest_tokens_for_the_room_of_the_answer(policy, model):
    long = "z" * 40 + "sun moon " * 5
    got = model.generate_until(asked((long, ROOM), (long[-56:], ROOM), ("", ROOM)))
    assert got[0] == got[1] == greedy_text(policy, long[-56:], 8) and model.cut == 1
    assert got[2] == greedy_text(policy, "<s>", 8)


def test_company_changes_nothing_and_a_repetition_is_another_draw(model, subject, monkeypatch):
    warm = {"temperature": 1.0, **ROOM}
    once = model.generate_until(asked(("Why?", warm), ("How?", warm)))
    again = model.generate_until(asked(("How?", warm), ("sun", ROOM), *[("Why?", warm)] * 3))
    assert [again[2], again[0]] == once and len(set(again[2:])) == 3
    monkeypatch.setattr(model, "_key", HarnessModel(subject, seed=1)._key)
    assert model.generate_until(asked(("Why?", warm))) != once[:1]
    cold = model.generate_until(asked(*[("Why?", warm | {"do_sample": False})] * 2))
    assert cold[0] == cold[1]


def test_answers_that_leave_no_room_for_a_prompt_are_refused(model):
    with pytest.raises(UserError, match="up to 256 tokens, and the model's context of 64 leaves no room for a prompt"):
        model.generate_until(asked(("Why?", {"until": "."})))


@pytest.mark.parametrize(
    ("settings", "means"),
    [
        ({}, Wanted(Sampling(temperature=0.0, max_new_tokens=256), ())),
        ({"until": "."}, Wanted(Sampling(temperature=0.0, max_new_tokens=256), (".",))),
        ({"temperature": 0.5, "top_k": 3, "max_tokens": 4}, Wanted(Sampling(0.5, 3, max_new_tokens=4), ())),
        ({"do_sample": False, "temperature": 0.5, **ROOM}, Wanted(Sampling(0.0, max_new_tokens=8), ())),
        ({"do_sample": True, "temperature": 1, "max_new_tokens": 9, **ROOM}, Wanted(Sampling(max_new_tokens=8), ())),
        ({"num_beams": 1, "until": None, **ROOM}, Wanted(Sampling(0.0, max_new_tokens=8), ())),
    ],
)  # fmt: skip
def test_a_tasks_settings_are_those_of_the_sampler(settings, means):
    assert wanted(settings) == means


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_beams": 2}, r"generation_kwargs.num_beams=2 of a task isn't read; it takes until, max_gen_toks"),
        ({"tempreature": 1.0}, r"generation_kwargs.tempreature=1.0 of a task isn't read"),
        ({"do_sample": True}, r"do_sample=True of a task needs a temperature above 0"),
        ({"temperature": "hot"}, r"generation_kwargs.temperature=hot of a task is not allowed; it must be a number"),
        ({"top_k": 1.5}, r"generation_kwargs.top_k=1.5 of a task is not allowed; it must be a whole number"),
        ({"top_p": 0.0}, r"generation_kwargs.top_p=0.0 is not allowed; it must be above 0 and at most 1"),
        ({"max_gen_toks": 0}, r"generation_kwargs.max_new_tokens=0 is not allowed; it must be at least 1"),
    ],
)
def test_a_setting_that_means_nothing_is_one_sentence(settings, says):
    with pytest.raises(UserError, match=says):
        wanted(settings)


# What else the harness asks


def test_a_chat_template_makes_a_prompt_and_its_lack_is_one_sentence(subject, model, monkeypatch):
    turns = [{"role": "user", "content": "Why?"}]
    with pytest.raises(UserError, match="the tokenizer of tiny has no chat template; ask without one"):
        model.apply_chat_template(turns)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}[assistant] "
    monkeypatch.setattr(subject.tokenizer, "chat_template", template)
    assert model.apply_chat_template(turns) == "[user] Why?</s>[assistant] "
    assert model.chat_template(True) == template and model.chat_template() is None


def test_the_results_say_whose_they_are(policy, model):
    told = model.get_model_info()
    assert told["model"] == "tiny" and told["texts_cut"] == 0
    assert told["model_num_parameters"] == sum(x.size for x in jax.tree.leaves(policy.params))


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)


NEEDS = r"this needs lm-evaluation-harness \(.*\); pip install 'rlhf_jax\[harness\]'"


def test_without_the_extra_one_is_told_what_to_install(absent, subject, tmp_path):
    with pytest.raises(UserError, match=NEEDS):
        harness.adapt(subject)
    with pytest.raises(UserError, match=NEEDS):
        program.main(made(tmp_path, model="nowhere"))
    assert not (tmp_path / "out").exists()


def made(folder, **changes: Any) -> program.Harness:
    given = {"model": "m", "tasks": ("mine",), "include_path": str(folder), "out": str(folder / "out")}
    return program.Harness(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ()}, "no task to run; give --tasks=NAME"),
        ({"include_path": None}, "no tasks to choose from; give --include_path=FOLDER, or --hub"),
        ({"include_path": "/nowhere"}, "there is no folder /nowhere; check --include_path"),
        ({"limit": 0}, "--limit=0 is not allowed; it must be at least 1"),
        ({"num_fewshot": -1}, "--num_fewshot=-1 is not allowed; it must be at least 0"),
        ({"seed": -1}, "--seed=-1 is not allowed"),
        ({"gen_kwargs": ("top_k",)}, "--gen_kwargs=top_k is not understood; write NAME=VALUE"),
    ],
)
def test_what_can_be_mended_is_one_sentence_before_anything_is_opened(tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        program.main(made(tmp_path, **changes))


def test_nothing_is_fetched_but_on_request(monkeypatch):
    for place in (program.of_hub, program.of_datasets):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    with pytest.raises(ZeroDivisionError), program.offline(True):
        assert is_offline_mode() and program.of_datasets.HF_HUB_OFFLINE
        raise ZeroDivisionError
    assert not is_offline_mode() and not program.of_datasets.HF_HUB_OFFLINE
    with program.offline(False):
        assert not is_offline_mode()
