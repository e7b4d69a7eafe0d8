"""What completions earn by a reward model of steps: read at the ends of steps, summed as the solution's score."""

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rlhf_jax.algorithms.rollouts import Scores, place, step_columns
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.rows import Message
from rlhf_jax.data.steps import TokenEnds, cut, ends_of
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.evaluate import step_labels
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.rewards import Rewards
from rlhf_jax.feedback.rewards import RewardsConfig
from rlhf_jax.models.tokenizers import load_tokenizer
from rlhf_jax.sampling.sampler import Completion
from rlhf_jax.scoring import Score
from rlhf_jax.workdir import open_model
from tests import tiny
from tests.test_rewards import headed

PROMPTS = ["one cat:", "two dogs and a bird:", "moon:"]
# (of which prompt, what was written, whether it ended by itself); the last one says nothing.
SAID = [(0, " red. blue, sun", True), (1, " a.b.", False), (2, " star", True), (0, "  ", True), (1, "", True)]
ENDS = [[5, 11, 15], [3, 5], [5], [2], [1]]  # tokens (bytes) up to the end of each step; of nothing the end itself
LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("scoring")
    tiny.write_model(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return folder


def completions() -> list[Completion]:
    """As the sampler gives them; a token of a byte is the byte's place in the alphabet, so text is encoded plainly."""
    made = []
    for row, text, ended in SAID:
        ids = [*BYTES(text), *([1] if ended else [])]
        nothing = np.zeros(len(ids), np.float32)
        made.append(Completion(row, 0, np.asarray(ids, np.int32), nothing, nothing, "end" if ended else "length"))
    return made


BYTES: Any = None


@pytest.fixture(scope="module")
def world(folder) -> dict[str, Any]:
    """A rollout of seven rows, two of them padding, and two members of an ensemble of steps."""
    global BYTES
    tokenizer = load_tokenizer(epath.Path(folder / "model"))
    BYTES = lambda text: tokenizer.encode(text, add_special_tokens=False)
    encoder = Encoder(tokenizer)
    examples = dataset.load(
        Data(path=(str(folder / "prompts.jsonl"),), eval_share=0.0), encoder, "prompt", LENGTH, 0
    ).train
    asked = [np.asarray(encoder.prompts([prompt])[0], np.int32) for prompt in PROMPTS]
    index = [next(e.index for e in examples if e.text == prompt) for prompt in PROMPTS]
    batch = jax.tree.map(jnp.asarray, place(asked, completions(), LENGTH, rows=7, index=index))
    policy = open_model(str(folder / "model"))
    members = [Subject(str(seed), *headed(policy, seed), tokenizer) for seed in (1, 2)]
    return {"tokenizer": tokenizer, "encoder": encoder, "examples": examples, "batch": batch, "members": members}


def scored(world: dict[str, Any], template: str | None = None, count: int = 1, **config: Any) -> Scores:
    rewards = Rewards("steps", world["members"][:count], chat_template=template)
    given = RewardsConfig(model="steps", step_end=config.pop("step_end", "[.,]"), **config)
    return Score(world["encoder"], world["tokenizer"], world["examples"], given, rewards, length=LENGTH)(world["batch"])


def by_hand(world: dict[str, Any], how: str, count: int = 1) -> np.ndarray:
    """[B, T] what each token adds, in float64 from the scores at the ends that were counted by hand."""
    batch, each = world["batch"], np.zeros((7, LENGTH))
    rows = {name: batch[name][:, 0] for name in ("tokens", "segments", "positions")}
    scores = [np.asarray(m.model.score(m.params, rows), np.float64) for m in world["members"][:count]]
    for row, ends in enumerate(ENDS):
        start = int(batch["mask"][row, 0].argmax())
        places = [start + end - 1 for end in ends]
        logs = [-np.log1p(np.exp(-np.mean([one[row, at] for one in scores]))) for at in places]
        for k, at in enumerate(places):
            before = logs[:k]
            gain = {
                "product": logs[k],
                "minimum": min(logs[: k + 1]) - (min(before) if before else 0),
                "last": logs[k] - (logs[k - 1] if k else 0),
            }[how]
            each[row, at] = gain
    return each


@pytest.mark.parametrize("how", ["product", "minimum", "last"])
def test_each_step_earns_its_part_at_its_last_token(world, how):
    found, expected = scored(world, step_score=how, model_weight=2.0), by_hand(world, how)
    assert found.steps is not None
    np.testing.assert_allclose(found.steps, 2 * expected, atol=1e-5)
    np.testing.assert_allclose(found.total, 2 * expected.sum(axis=1), atol=1e-5)
    assert found.names == ("model",) and not found.applies[5:].any() and not found.steps[5:].any()
    np.testing.assert_array_equal(step_columns(found)["step_rewards"][:, 0], found.steps)


def test_members_agree_on_each_step_before_the_solution_is_scored(world):
    found = scored(world, count=2).steps
    assert found is not None
    np.testing.assert_allclose(found, by_hand(world, "product", 2), atol=1e-5)


def test_a_model_with_another_tokenizer_reads_the_texts_of_the_steps(world, tmp_path):
    """Of equal tokens behind another chat template, which strings don't have: the scores are the same."""
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    ours, theirs = scored(world).steps, scored(world, str(template)).steps
    assert ours is not None and theirs is not None
    np.testing.assert_allclose(theirs[:3], ours[:3], atol=1e-5)  # an answer of no words is " " to it
    assert (theirs[3:5] < 0).any(axis=1).all()


def test_a_verifier_takes_one_off_where_the_first_step_is_wrong(world, monkeypatch):
    """And reads the texts of the steps, as they were cut, with the columns of their prompts' rows."""
    asked = []

    def verifier(prompt, steps, **columns):
        asked.append((prompt, steps))
        return ["blue" not in step and "b." not in step for step in steps]

    monkeypatch.setitem(step_labels.VERIFIERS, "mine", verifier)
    given = RewardsConfig(verifier="mine", step_end="[.,]", model_weight=2.0)
    found = Score(world["encoder"], world["tokenizer"], world["examples"], given, None, length=LENGTH)(world["batch"])
    assert [steps for _, steps in asked] == [[" red.", " blue,", " sun"], [" a.", "b."], [" star"], ["  "], [""]]
    assert [prompt for prompt, _ in asked] == [PROMPTS[row] for row, _, _ in SAID]
    np.testing.assert_array_equal(found.total, [-2, -2, 0, 0, 0, 0, 0])
    starts = np.asarray(world["batch"]["mask"])[:, 0].argmax(axis=1)
    assert found.steps is not None and found.names == ("steps",)
    wrong = [(int(row), int(at - starts[row] + 1)) for row, at in zip(*np.nonzero(found.steps), strict=True)]
    assert wrong == [(0, ENDS[0][1]), (1, ENDS[1][1])]


def test_whole_completions_have_no_steps(world):
    rewards = Rewards("whole", world["members"][:1])
    found = Score(
        world["encoder"], world["tokenizer"], world["examples"], RewardsConfig(model="whole"), rewards, length=LENGTH
    )(world["batch"])
    assert found.steps is None and step_columns(found) == {} and found.applies[:5].all()


def test_a_character_of_several_tokens_ends_a_step_with_its_last(world):
    """Bytes one by one read as nothing, and white space between two ends belongs to the step before it."""
    ids, ends = BYTES("one。 two。"), TokenEnds(world["tokenizer"], re.compile("。"))
    assert ends(ids) == [len(BYTES("one。")), len(ids)]
    cuts = lambda text, pattern: cut(text, ends_of(text, re.compile(pattern)))
    assert cuts("A.\n\nB.", r"\n") == ["A.\n\n", "B."] and cuts(" \nA\n", r"\n") == [" \nA\n"]


def test_steps_of_a_whole_answer_end_at_the_token_that_holds_their_last_character(world, tmp_path):
    """Behind a template that writes before an answer and trims it."""
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rewards = Rewards("steps", world["members"][:1], chat_template=str(template))
    rows, places = rewards.encode_cut([(Message("user", "Q"),)] * 2, [" one. two", ""], [[5, 9], [0]])
    read = lambda row, at: world["tokenizer"].decode(row.ids[: at + 1], skip_special_tokens=True)
    assert [read(rows[0], at) for at in places[0]] == ["[user]Q[assistant]one.", "[user]Q[assistant]one. two"]
    assert rows[1].start <= places[1][0] < len(rows[1])


@pytest.mark.parametrize("name", ["stories", "smollm2", "minimind"])
def test_ends_of_tokens_are_those_of_the_text(shared, name):
    """Each step's tokens, read behind those before, first hold all of its text."""
    path = shared / "models/stories260k" if name == "stories" else shared / "data/tokenizers" / name
    tokenizer = load_tokenizer(epath.Path(path))
    text = "First, 12 + 3 = 15.\n\nSo  the rest is 4... Then: 15 - 4 = 11!\nIt is 11"
    ids = tokenizer.encode(text, add_special_tokens=False)
    read = lambda count: tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False).strip()
    found = TokenEnds(tokenizer, re.compile(r"[.!]+|\n+"))(ids)
    wholes = ["First, 12 + 3 = 15.", "So  the rest is 4...", "Then: 15 - 4 = 11!", "It is 11"]
    assert len(found) == len(wholes) and found[-1] == len(ids)
    at = 0
    for count, step in zip(found, wholes, strict=True):
        at = text.index(step, at) + len(step)
        wanted = text[:at].strip()
        assert read(count).startswith(wanted) and not read(count)[len(wanted) :].strip(". \n")
        assert not read(count - 1).startswith(wanted) or text[at : at + 1] in ("\n", " ")
    assert TokenEnds(tokenizer, re.compile("x"))([]) == [0]
