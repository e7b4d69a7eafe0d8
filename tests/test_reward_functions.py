"""Reward functions: what they give is arranged and checked, those that wait run side by side and within a deadline."""

import asyncio
import concurrent.futures
import time
import traceback
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.rows import Message
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import rewards
from rlhf_jax.feedback.rewards import RewardFunctions
from rlhf_jax.ops.advantages import Group

PROMPTS, COMPLETIONS = ["Hi?", "Hi?", "Bye?"], ["Hello", "Hm", "Goodbye"]


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [len(text) for text in completions]


def polite(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [
        float("Hello" in text) if prompt == "Hi?" else None for prompt, text in zip(prompts, completions, strict=True)
    ]


async def slow(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    await asyncio.sleep(0.001)
    return [-float(len(text)) for text in completions]


def one(function: Any, **options: Any) -> RewardFunctions:
    return RewardFunctions({"it": function}, [1.0], **options)


def test_every_function_has_a_column_and_none_is_no_reward():
    functions = RewardFunctions({"length": length, "slow": slow, "polite": polite}, [1, 0.5, 2])
    found = functions(PROMPTS, COMPLETIONS, {})
    assert found.rewards.tolist() == [[5, -5, 1], [2, -2, 0], [7, -7, 0]]
    assert found.applies.tolist() == [[True, True, True], [True, True, True], [True, True, False]]
    assert found.rewards.dtype == np.float32 and found.applies.dtype == bool
    assert found.names == ("length", "slow", "polite") and found.weights.tolist() == [1, 0.5, 2]


def test_an_answer_to_which_no_function_applies_is_absent_from_its_group():
    found = one(polite)(PROMPTS, COMPLETIONS, {})
    group = Group(*map(jnp.asarray, (found.rewards[None], found.applies[None], found.weights)))
    assert group.present.tolist() == [[True, True, False]]
    assert group.total.tolist() == [[1, 0, 0]]


def test_no_answers_have_no_rewards():
    found = RewardFunctions({"length": length, "slow": slow}, [1, 1])([], [], {"answer": []})
    assert found.rewards.shape == found.applies.shape == (0, 2)


def test_numbers_of_any_kind_are_rewards():
    kinds: list[Any] = [True, np.float64(0.5), np.array(2, np.int32)]
    assert one(lambda prompts, completions: kinds)(PROMPTS, COMPLETIONS, {}).rewards[:, 0].tolist() == [1, 0.5, 2]
    generator = lambda prompts, completions: (len(text) for text in completions)
    assert one(generator)(PROMPTS, COMPLETIONS, {}).rewards[:, 0].tolist() == [5, 2, 7]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_functions_get_conversations_and_the_columns_of_each_answer(asynchronous):
    seen = []

    def look(prompts, completions, *, answer):
        seen.extend(zip(prompts, completions, answer, strict=True))
        return [0.0] * len(prompts)

    async def wait(prompts, completions, *, answer):
        return look(prompts, completions, answer=answer)

    asked = [(Message("user", "2 + 2"),), (Message("user", "3 + 3"),)]
    one(wait if asynchronous else look)(asked, ["4", "5"], {"answer": [4, 6]})
    assert sorted(answer for *_, answer in seen) == [4, 6]
    assert ([{"role": "user", "content": "3 + 3"}], [{"role": "assistant", "content": "5"}], 6) in seen


# Names and weights


def test_functions_come_by_name_and_from_outside():
    names = ["gold", "gsm8k", "test_reward_functions:length"]
    functions = RewardFunctions.named(names, deadline=3)
    assert list(functions.functions) == names and functions.weights == (1, 1, 1) and functions.deadline == 3
    assert functions.functions[names[2]]([""], ["four"]) == [4]
    assert RewardFunctions.named(names, [1, 2, 3]).weights == (1, 2, 3)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RewardFunctions.named(["gsm9k"]), "no reward function 'gsm9k'; the nearest is 'gsm8k'"),
        (lambda: RewardFunctions.named(["gold", "gold"]), "'gold' is named twice"),
        (lambda: RewardFunctions.named(["gold"], [1, 2]), "2 weights for 1 reward functions"),
        (lambda: RewardFunctions.named([]), "at least one function"),
        (lambda: RewardFunctions.named(["gold"], [float("nan")]), "weight of reward function 'gold' is nan"),
        (lambda: RewardFunctions.named(["gold"], deadline=0, flag="--wait"), "--wait is 0 s"),
        (lambda: RewardFunctions.named(["gold"], at_once=0), "1 call or more"),
    ],
)
def test_what_can_not_be_built_is_one_sentence(make, says):
    with pytest.raises(UserError, match=says):
        make()


# What is wrong


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([float("nan")], "gave nan for the answer 'Hm' to the prompt 'Hi\\?'; .* finite"),
        ([float("-inf")], "gave -inf for the answer"),
        ([1e39], "gave 1e\\+39 for the answer"),
        ([10**400], "gave 1000.* for the answer"),
        (["1"], "gave '1' for the answer"),
        ([object()], "gave <object"),
        ([1.0, 2.0], "gave 2 rewards for 1 answers, the first of them the answer 'Hm' to"),
        (0.5, "gave 0.5 for 1 answers"),
        (np.float32(0.5), "gave np.float32\\(0.5\\) for 1 answers"),
        (None, "gave None for 1 answers"),
        ("1", "gave '1' for 1 answers"),
        ({"a": 1}, "gave {'a': 1} for 1 answers"),
    ],
)
def test_what_is_no_reward_is_one_sentence(values, says, asynchronous):
    async def wait(prompts, completions):
        return values

    function = wait if asynchronous else lambda prompts, completions: values
    with pytest.raises(UserError, match="^reward function 'it' " + says):
        one(function)(["Hi?"], ["Hm"], {})


def test_long_texts_are_shortened_and_stay_on_a_line():
    function = lambda prompts, completions: [float("nan")]
    with pytest.raises(UserError) as error:
        one(function)([(Message("user", "why\n" * 999),)], ["so\n" * 999], {})
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert "'so\\nso" in str(error.value) and "'why\\nwhy" in str(error.value)


def test_a_column_that_is_not_there_is_named_before_anything_runs():
    ran = []
    eager = lambda prompts, completions, **columns: ran.append(1)
    functions = RewardFunctions({"eager": eager, "gsm8k": rewards.REWARD_FUNCTIONS["gsm8k"]}, [1, 1])
    with pytest.raises(UserError, match="'gsm8k' can't be called .*columns \\(gold\\): missing .* 'answer'"):
        functions(["Hi?"], ["Hm"], {"gold": [1]})
    with pytest.raises(UserError, match="unexpected keyword argument 'gold'; .* as \\*\\*columns"):
        one(lambda prompts, completions: [0])(["Hi?"], ["Hm"], {"gold": [1]})
    assert not ran


def test_a_function_that_raises_keeps_its_traceback_and_says_where():
    def fall(prompts, completions, **columns):
        raise KeyError("score")

    with pytest.raises(KeyError) as error:
        one(fall)(PROMPTS, COMPLETIONS, {})
    assert "in fall" in "".join(traceback.format_exception(error.value))
    said = "reward function 'it' raised this on 3 answers, the first of them the answer 'Hello' to the prompt 'Hi?'"
    assert error.value.__notes__ == [said]


def test_an_asynchronous_function_that_raises_names_the_answer():
    async def fall(prompts, completions):
        await asyncio.sleep(0.001)
        if completions == ["Hm"]:
            raise KeyError("score")
        await asyncio.sleep(0 if completions == ["Hello"] else 60)
        return [1.0]

    with pytest.raises(KeyError) as error:
        one(fall)(PROMPTS, COMPLETIONS, {})
    assert "in fall" in "".join(traceback.format_exception(error.value))
    assert error.value.__notes__ == ["reward function 'it' raised this on the answer 'Hm' to the prompt 'Hi?'"]


# Side by side


def meet(parties: int):
    """An asynchronous function that returns when so many calls of it wait at once, and never if they don't."""
    gates: list[asyncio.Barrier] = []

    async def wait(prompts, completions, **columns):
        if not gates:
            gates.append(asyncio.Barrier(parties))
        await gates[0].wait()
        return [1.0] * len(completions)

    return wait


def test_all_asynchronous_functions_run_at_once():
    together = meet(6)
    functions = RewardFunctions({"a": together, "b": together}, [1, 1], deadline=20)
    assert functions(PROMPTS, COMPLETIONS, {}).rewards.tolist() == [[1, 1]] * 3


def test_an_event_loop_that_runs_already_is_no_matter():
    async def program():
        return one(meet(3), deadline=20)(PROMPTS, COMPLETIONS, {}).rewards.tolist()

    assert asyncio.run(program()) == [[1]] * 3


def test_threads_have_their_rewards_apart():
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        texts = [[str(10**i)] * 3 for i in range(8)]
        found = threads.map(lambda told: one(slow)(PROMPTS, told, {}).rewards[0, 0], texts)
        assert list(found) == [-float(i + 1) for i in range(8)]


def test_no_more_calls_wait_at_once_than_allowed():
    waiting, most = 0, 0

    async def count(prompts, completions):
        nonlocal waiting, most
        waiting, most = waiting + 1, max(most, waiting + 1)
        await asyncio.sleep(0.001)
        waiting -= 1
        return [0.0]

    one(count, at_once=2)(["Hi?"] * 9, [str(i) for i in range(9)], {})
    assert most == 2


def test_an_object_with_an_asynchronous_call_is_asynchronous():
    class Judge:
        async def __call__(self, prompts, completions, **columns):
            return await slow(prompts, completions)

    assert one(Judge())(PROMPTS, COMPLETIONS, {}).rewards[:, 0].tolist() == [-5, -2, -7]


def test_a_deadline_that_passes_says_how_far_it_got():
    async def hang(prompts, completions):
        await asyncio.sleep(60 if completions == ["Hm"] else 0)
        return [1.0]

    functions = RewardFunctions({"slow": slow, "hang": hang}, [1, 1], deadline=0.2, flag="--config.ppo.deadline")
    says = (
        "reward function 'hang' had done 2 of 3 answers when the deadline of 0.2 s passed, and not the answer 'Hm' to "
        "the prompt 'Hi\\?'; raise --config.ppo.deadline or make it faster"
    )
    with pytest.raises(UserError, match=says):
        functions(PROMPTS, COMPLETIONS, {})


def test_a_function_that_blocks_the_loop_is_left_behind(monkeypatch):
    monkeypatch.setattr(rewards, "GRACE", 0.1)

    async def block(prompts, completions):
        time.sleep(1)
        return [1.0]

    begun = time.monotonic()
    with pytest.raises(UserError, match="had done 0 of 1 answers"):
        one(block, deadline=0.1)(["Hi?"], ["Hm"], {})
    assert time.monotonic() - begun < 0.9
