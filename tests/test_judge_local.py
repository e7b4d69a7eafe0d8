"""A language model as a judge: its chances against its full logits, in both orders, with a rationale or without."""

import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.rows import Message, Refusal
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import judge_local
from rlhf_jax.feedback.judge_local import TOO_LONG, LocalJudge
from rlhf_jax.feedback.judges import Pair, Template, Verdict
from rlhf_jax.sampling.distribution import Sampling
from rlhf_jax.sampling.sampler import Completion
from rlhf_jax.workdir import open_policy
from tests import tiny

SHORT = Template("{prompt}\n1 {first}\n2 {second}", "Best:")
PAIRS = [
    Pair("Which colour?", " red", " a rather long green"),
    Pair("One?", "two", " three {first} {second}"),
    Pair((Message("user", "Hi"), Message("assistant", "Yes"), Message("user", "Why?")), "sun", "moon and star " * 3),
]
SWAPPED = [Pair(prompt, second, first) for prompt, first, second in PAIRS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("judges") / "model", tiny.CONFIG | {"max_position_embeddings": 160})


@pytest.fixture(scope="module")
def policy(folder):
    return open_policy(str(folder))


@pytest.fixture(scope="module")
def make(policy):
    def judge(template: Template = SHORT, **options: Any) -> LocalJudge:
        return LocalJudge("tiny", policy.model, policy.params, policy.tokenizer, template, **options)

    return judge


@pytest.fixture(scope="module")
def said(make):
    return make()(PAIRS)


@pytest.fixture(scope="module")
def thinker(make):
    return make(SHORT._replace(reasoning=True), sampling=Sampling(max_new_tokens=8), seed=3)


def chances(verdicts) -> list[float]:
    return [verdict.probability for verdict in verdicts]


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, ids, segments):
    places = jnp.arange(ids.shape[1])[None]
    return jax.nn.log_softmax(model.logits(params, model.apply(params, ids, segments, places))[0])


def from_logits(policy, asked: str, cue: str) -> float:
    """P(" A") of " A" and " B" behind the question and the cue, from the softmax of every token's logits."""
    encoder, total = Encoder(policy.tokenizer), []
    for option in (" A", " B"):
        whole = encoder.encode(f"{asked}\n\n", cue + option, ends=(len(cue), len(cue + option)))
        start, stop = (int(end) + 1 for end in whole.ends)
        ids, segments = np.zeros((2, 1, 160), np.int32)
        ids[0, :stop], segments[0, :stop] = whole.ids[:stop], 1
        logprobs = np.asarray(logits(policy.model, policy.params, ids, segments), np.float64)
        total.append(sum(logprobs[t - 1, ids[0, t]] for t in range(start, stop)))
    return 1 / (1 + math.exp(total[1] - total[0]))


def test_the_chance_is_that_of_the_options_in_the_full_logits(policy, said):
    asked = "One?\n1 two\n2 three {first} {second}", "One?\n1 three {first} {second}\n2 two"
    ahead, behind = (from_logits(policy, text, "Best:") for text in asked)
    assert said[1].ahead == pytest.approx(ahead, abs=1e-5) and said[1].behind == pytest.approx(1 - behind, abs=1e-5)
    assert said[1].probability == pytest.approx((ahead + 1 - behind) / 2, abs=1e-5) and said[1].why == ""
    assert abs(ahead - 0.5) > 0.01


def test_a_real_model_too(stories):
    policy = open_policy(str(stories))
    judge = LocalJudge("stories", policy.model, policy.params, policy.tokenizer, SHORT)
    pair = Pair("Tell a story.", "Once upon a time there was a cat.", "No.")
    asked = "Tell a story.\n1 Once upon a time there was a cat.\n2 No."
    (verdict,) = judge([pair])
    assert verdict.ahead == pytest.approx(from_logits(policy, asked, "Best:"), abs=1e-5)


def test_answers_that_change_places_change_the_chance_to_one_less_it(make, said):
    swapped = make()(SWAPPED)
    np.testing.assert_allclose(chances(swapped), 1 - np.asarray(chances(said)), atol=1e-6, rtol=0)
    for one, other in zip(said, swapped, strict=True):
        assert (one.ahead, one.behind) == pytest.approx((1 - other.behind, 1 - other.ahead), abs=1e-6)


def test_equal_answers_are_as_good_as_each_other(make, thinker):
    for judge in (make(), thinker):
        (verdict,) = judge([Pair("Which is the better one?", " the same", "the same")])
        assert verdict.probability == 0.5 and verdict.ahead == pytest.approx(1 - verdict.behind, abs=1e-12)


def test_batches_and_buckets_change_nothing(make, said, monkeypatch):
    alone = [make()([pair])[0] for pair in PAIRS]
    np.testing.assert_allclose(chances(alone), chances(said), atol=1e-6, rtol=0)
    monkeypatch.setattr(judge_local, "ROWS", 2)
    monkeypatch.setattr(judge_local, "SHORTEST", 128)
    np.testing.assert_allclose(chances(make()(PAIRS)), chances(said), atol=1e-6, rtol=0)
    assert make()([]) == []


def test_pairs_that_do_not_fit_are_counted_and_not_cut(make, said):
    long = Pair("Which?", "word " * 60, "short")
    verdicts = make()([long, PAIRS[0]])
    assert verdicts[0] == Verdict(None, why=TOO_LONG)
    assert verdicts[1].probability == pytest.approx(said[0].probability, abs=1e-6)
    drawn = make(SHORT._replace(reasoning=True), sampling=Sampling(max_new_tokens=150))
    assert [v.why for v in drawn(PAIRS)] == [TOO_LONG] * 3


def test_behind_a_rationale_the_chance_is_read_behind_what_was_written_and_clamped(thinker, policy, monkeypatch):
    texts: list[str] = []
    rationales = thinker._rationales
    monkeypatch.setattr(thinker, "_rationales", lambda ids: texts.extend(rationales(ids)) or texts[-len(ids) :])
    verdicts = thinker(PAIRS[:2])
    assert len(set(texts)) > 1 and all("Best:" not in text for text in texts)
    asked = [SHORT.fill(pair, swapped) for pair in PAIRS[:2] for swapped in (False, True)]
    begun = [f"{text}\n\nBest:" if text else "Best:" for text in texts]
    exact = [from_logits(policy, *each) for each in zip(asked, begun, strict=True)]
    clamped = [min(max(chance, 0.4), 0.6) for chance in exact]
    assert exact != clamped
    for verdict, first, second in zip(verdicts, clamped[::2], clamped[1::2], strict=True):
        assert (verdict.ahead, verdict.behind) == pytest.approx((first, 1 - second), abs=1e-5)
    # A rationale is its question's own, whatever stands beside it, and the seed's.
    (alone,) = thinker(PAIRS[1:2])
    assert texts[4:] == texts[2:4] and alone.probability == pytest.approx(verdicts[1].probability, abs=1e-6)
    monkeypatch.setattr(thinker, "_seed", 4)
    thinker(PAIRS[:2])
    assert texts[6:] != texts[:4]


def test_a_rationale_ends_where_the_model_writes_the_cue(thinker):
    encode = lambda text: np.asarray(thinker._tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    written = encode("one is best. Best: A")
    nothing = np.zeros(len(written), np.float32)
    completion = Completion(0, 0, written, nothing, nothing, "length")
    assert thinker._text(encode("Which?"), completion) == "one is best."


def test_with_a_chat_template_the_option_ends_the_answer(make, said, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    judge = make(chat_template=str(file))
    spans = judge._options("question", "Best:")
    decode = lambda ids: judge._tokenizer.decode(ids.tolist())
    assert [decode(span.ids[span.start : span.stop]) for span in spans] == [" A", " B"]
    assert decode(spans[0].ids) == "<s>user: question</s><s>assistant: Best: A"
    assert judge(PAIRS[:1])[0].probability != said[0].probability


def test_a_tokenizer_of_another_model_is_named(folder, make):
    judge = make()
    judge.model = judge.model.__class__(judge.model.shape.__class__(**{**vars(judge.model.shape), "vocab": 9}))
    with pytest.raises(UserError, match="the tokenizer of tiny gives token .* vocabulary ends at 8; give a folder"):
        judge(PAIRS[:1])


def test_what_the_encoder_refuses_is_a_reason(make, monkeypatch):
    judge = make()
    monkeypatch.setattr(judge._encoder, "encode", lambda *a, **k: (_ for _ in ()).throw(Refusal("it is odd")))
    assert judge(PAIRS[:1]) == [Verdict(None, why="it is odd")]
