"""Models as examinees: likelihoods against their full logits in float64, answers, what doesn't fit, reward models."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.rows import Message, Refusal
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.evaluate.suite import choice, tasks
from rlhf_jax.evaluate.suite.items import Asked
from rlhf_jax.evaluate.suite.subject import AGAIN, OPTIONS, LanguageModel, RewardModel, Span, logprobs
from rlhf_jax.feedback.judges import Pair, Template
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.workdir import open_policy
from tests import tiny

LENGTH = 160
JUDGE = Template("{prompt}\n1 {first}\n2 {second}", "Best:")
CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
ASKED = [
    Asked("Which colour?", "Question: Which colour?\nAnswer:", "red"),
    Asked("Which colour?", "Question: Which colour?\nAnswer:", "a rather long green"),
    Asked("Why?", "Q: Why?\nA:", "é"),
    Asked("sun " * 20, "sun " * 20, "moon"),
]
LONG = Asked("sun " * 60, "sun " * 60, "moon")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite") / "model"
    return open_policy(str(tiny.write_model(folder, tiny.CONFIG | {"max_position_embeddings": LENGTH})))


@pytest.fixture(scope="module")
def make(policy):
    def examinee(chat: str | None = None, **sampling) -> LanguageModel:
        subject = Subject("tiny", policy.model, policy.params, policy.tokenizer, policy.end_ids)
        given = Sampling(**({"temperature": 0.0, "max_new_tokens": 8} | sampling))
        return LanguageModel(subject, JUDGE, sampling=given, chat_template=chat)

    return examinee


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("chat") / "chat.jinja"
    file.write_text(CHAT)
    return str(file)


@functools.partial(jax.jit, static_argnums=0)
def full(model, params, ids: jax.Array, segments: jax.Array) -> jax.Array:
    return model.logits(params, model.apply(params, ids, segments, jnp.arange(ids.shape[1])[None]))[0]


def logits(policy, ids: list[int], length: int = LENGTH) -> np.ndarray:
    """Of a whole row, float64 [T, V]."""
    row, segments = np.zeros((2, 1, length), np.int32)
    row[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    return np.asarray(full(policy.model, policy.params, row, segments), np.float64)[: len(ids)]


def summed(policy, ids: list[int], count: int, length: int = LENGTH) -> float:
    """The log-probability of the last tokens behind those before them: the logits, then float64 alone."""
    z = logits(policy, ids, length)
    z -= z.max(axis=-1, keepdims=True)
    logprobs = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return sum(logprobs[place - 1, ids[place]] for place in range(len(ids) - count, len(ids)))


def ids_of(policy, text: str) -> list[int]:
    """The tiny tokenizer's tokens are bytes."""
    return policy.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_options_likelihood_is_that_of_the_full_logits(policy, make):
    told = make().likelihoods(ASKED)
    for one, value in zip(ASKED, told, strict=True):
        option = ids_of(policy, f" {one.option}")
        wanted = summed(policy, ids_of(policy, one.plain) + option, len(option))
        assert value == pytest.approx(wanted, abs=1e-4)
    assert np.std(told) > 1  # so they differ


def test_with_a_chat_template_it_is_the_answer_without_the_end_of_its_turn(policy, make, chat):
    told = make(chat).likelihoods(ASKED[:3])
    for one, value in zip(ASKED[:3], told, strict=True):
        text, option = f"[user] {one.prompt}</s>[assistant] ", ids_of(policy, one.option)
        assert value == pytest.approx(summed(policy, ids_of(policy, text) + option, len(option)), abs=1e-4)


def test_company_and_order_change_nothing(make):
    model = make()
    together, alone = model.likelihoods(ASKED[::-1]), [model.likelihoods([one])[0] for one in ASKED]
    np.testing.assert_allclose(np.asarray(together[::-1]), np.asarray(alone), atol=1e-5)


def test_single_tokens_are_read_from_one_pass_over_their_text(policy):
    # More of them than one row holds, and behind two texts.
    subject = Subject("tiny", policy.model, policy.params, policy.tokenizer)
    rows = [Span(np.asarray([*ids_of(policy, text), token], np.int32), len(text))
            for text in ("Why", "sun and moon") for token in range(10, 10 + OPTIONS + 3)]  # fmt: skip
    for row, value in zip(rows, logprobs(subject, rows), strict=True):
        assert value == pytest.approx(summed(policy, row.ids.tolist(), 1), abs=1e-4)


def test_what_is_over_the_context_is_refused_and_the_rest_is_not(make):
    found = make().likelihoods([ASKED[0], LONG, ASKED[1]])
    assert isinstance(found[1], Refusal) and str(found[1]) == f"245 tokens, over the context of {LENGTH}"
    assert all(isinstance(one, float) for one in (found[0], found[2]))
    fits = Asked("", "x" * (LENGTH - 3), "ab")
    assert isinstance(make().likelihoods([fits])[0], float)
    assert isinstance(make().likelihoods([fits._replace(option="abc")])[0], Refusal)


def test_answers_are_those_of_the_likeliest_tokens_and_depend_on_the_prompt_alone(policy, make):
    asked = [one._replace(option="") for one in ASKED]
    model = make()
    told = model.answers(asked[:3])
    ids = ids_of(policy, asked[0].plain)
    for _ in range(8):  # by hand
        ids.append(int(logits(policy, ids)[-1].argmax()))
        if ids[-1] == policy.tokenizer.eos_token_id:
            break
    text = policy.tokenizer.decode(ids, skip_special_tokens=True)[len(asked[0].plain) :]
    assert told[0] == AGAIN.split(text, maxsplit=1)[0].strip()
    assert model.answers(asked[2:3]) == told[2:]


@pytest.mark.parametrize("goes_on", ["\n\nQ: And now?\nA: 5", "\nQuestion: And now?\nAnswer: 5", ""])
def test_a_question_that_it_asks_itself_is_cut_off(make, monkeypatch, goes_on):
    # Sets are asked in both forms; what stands behind the next question is no answer to this one.
    model = make()
    monkeypatch.setattr(model._sampler, "generate", lambda *given, **more: [(None,)])
    monkeypatch.setattr(model, "_text", lambda ids, drawn: f" 3, Q: is a letter{goes_on}")
    (told,) = model.answers([Asked("How many?", "Q: How many?\nA:")])
    assert told == "3, Q: is a letter"
    task = tasks.TASKS["bbh_numbers"]
    item = task.reader({"task": "object_counting", "input": "How many?", "target": "3"}, "f:1", "")
    assert item is not None and item.plain == "Q: How many?\nA:"
    assert task.measure([item], model, 0, None).figures[0].estimate.mean == 1.0


def test_with_a_chat_template_nothing_is_cut(make, chat, monkeypatch):
    model = make(chat)
    monkeypatch.setattr(model._sampler, "generate", lambda *given, **more: [(None,)])
    monkeypatch.setattr(model, "_text", lambda ids, drawn: "a\nQ: b")
    assert model.answers(ASKED[:1]) == ["a\nQ: b"]


def test_what_is_no_number_is_refused(policy):
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), policy.params)
    model = LanguageModel(Subject("nan", policy.model, nothing, policy.tokenizer), JUDGE, sampling=Sampling())
    told = [model.likelihoods(ASKED[:2]), model.likelihoods([ASKED[0]._replace(option="")])]
    assert [str(one) for row in told for one in row] == ["its likelihood is not a number"] * 3
    scored = policy.model.with_head("score")
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), jax.jit(scored.init)(jax.random.key(3)))
    rewards = RewardModel(Rewards("rm", [Subject("rm", scored, params, policy.tokenizer)]))
    assert [str(one) for one in rewards.scores(ASKED[:2])] == ["its score is not a number"] * 2
    assert rewards.verdicts([Pair("Why?", "red", "blue")])[0].why == "its score is not a number"


def test_a_prompt_that_leaves_no_room_is_refused(make):
    fits, over = (Asked("", "x" * (LENGTH - room)) for room in (8, 7))
    told = make().answers([fits, over])
    assert isinstance(told[0], str) and str(told[1]) == f"153 tokens and 8 new ones, over the context of {LENGTH}"


def test_it_judges_pairs_in_both_orders(make):
    one, other = make().verdicts([Pair("Why?", "red", "blue"), Pair("Why?", "blue", "red")])
    assert one.probability == pytest.approx(1 - other.probability) and one.ahead != one.behind


@pytest.fixture(scope="module")
def rewards(policy) -> RewardModel:
    model = policy.model.with_head("score")
    params = jax.jit(model.init)(jax.random.key(3))
    params = {**params, "score": jax.random.normal(jax.random.key(4), params["score"].shape)}
    return RewardModel(Rewards("rm", [Subject("rm", model, params, policy.tokenizer)]))


def test_a_reward_model_scores_options_and_refuses_long_ones(policy, rewards):
    told = rewards.scores([*ASKED[:2], LONG])
    assert isinstance(told[2], Refusal) and "over the context" in str(told[2])
    # As a scorer of the same texts, which is how it is trained and evaluated elsewhere.
    wanted = rewards._rewards([one.plain for one in ASKED[:2]], [f" {one.option}" for one in ASKED[:2]])
    assert told[:2] == pytest.approx(wanted)
    better, worse = rewards.verdicts([Pair("Why?", "red", "blue"), Pair("Why?", "blue", "red")])
    assert {better.probability, worse.probability} == {0.0, 1.0} and better.ahead is None
    assert rewards.verdicts([Pair("Why?", "red", "red")])[0].probability == 0.5
    assert "over the context" in rewards.verdicts([Pair("Why?", "red", "blue " * 60)])[0].why


def test_each_kind_refuses_what_it_cannot_do(make, rewards):
    with pytest.raises(TypeError, match="tiny is a language model and has no scores"):
        make().scores(ASKED)
    for call in (rewards.likelihoods, rewards.answers):
        with pytest.raises(TypeError, match="rm is a reward model"):
            call(ASKED)


def test_a_real_model_is_asked_real_rows(shared: pathlib.Path, stories: pathlib.Path):
    """stories260k: options of MMLU against the logits of the whole row, with a tokenizer that isn't of bytes."""
    policy = open_policy(str(stories))
    model = LanguageModel(
        Subject("stories", policy.model, policy.params, policy.tokenizer, policy.end_ids), JUDGE, sampling=Sampling()
    )
    items = [one for one in tasks.read("mmlu", str(shared / "data")).items if len(one.prompt) < 300][:4]
    weighed, left = choice.weigh(items, model)
    assert not left
    encoder = Encoder(policy.tokenizer)
    for one in weighed:
        for option, value in zip(one.item.options, one.logprobs, strict=True):
            whole = encoder.encode(one.item.prompt, f" {option}").ids.tolist()[:-1]  # without the end
            (before,) = encoder.encode_prompts([one.item.prompt])
            assert isinstance(before, Tokens)
            assert value == pytest.approx(summed(policy, whole, len(whole) - len(before), 256), abs=1e-4)


def test_the_messages_are_those_of_a_user(make, chat):
    spans = make(chat).spans(ASKED[:1])
    asked = make(chat)._encoder.prompts([(Message("user", ASKED[0].prompt),)])
    assert spans[0].ids[: spans[0].start].tolist() == asked[0].tolist()
