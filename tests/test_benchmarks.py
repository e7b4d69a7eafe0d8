"""What the studies of reward models count: words, steps, results, ceilings."""

import numpy as np
import pytest

from benchmarks import ppo_stories, process_world, reward_stories, reward_world
from rlhf_jax.data import labellers

SUM = "What is 3 + 4 - 2?\n"


@pytest.mark.parametrize(
    ("text", "steps", "labels", "result"),
    [
        ("Sure! 3 + 4 = 7, 7 - 2 = 5. It is 5.", ["Sure! 3 + 4 = 7,", " 7 - 2 = 5.", " It is 5."], [1, 1, 1], "5"),
        ("3 + 4 = 8, 8 - 2 = 6. It is 6.", ["3 + 4 = 8,", " 8 - 2 = 6.", " It is 6."], [0, 0, 0], "6"),
        ("3 + 4 = 7, 7 - 2 = 6. It is 5.", ["3 + 4 = 7,", " 7 - 2 = 6.", " It is 5."], [1, 0, 0], "5"),
        ("3 + 4 = 7, 7 - 2 = 5. It is 5 or 6.", ["3 + 4 = 7,", " 7 - 2 = 5.", " It is 5 or 6."], [1, 1, 0], None),
        ("It is 5.", ["It is 5."], [0], "5"),
        ("I do not know.", ["I do not know."], [0], None),
        ("", [], [], None),
    ],
)
def test_a_solution_is_its_steps_and_a_result(text, steps, labels, result):
    assert process_world.solved(SUM, text) == (steps, labels, result)
    assert "".join(steps) == text


def test_rows_of_steps_and_of_outcomes_are_of_the_same_solutions():
    rows = process_world.rows_of([SUM], [["It is 5.", "It is 5.", "", "3 + 4 = 7, 7 - 2 = 5. It is 5."]])
    assert [row["labels"] for row in rows] == [[False], [True, True, True]]
    assert [row["label"] for row in process_world.outcomes(rows)] == [True, True]
    assert process_world.outcomes(rows)[1]["completion"] == "3 + 4 = 7, 7 - 2 = 5. It is 5."


def test_gold_counts_whole_words():
    assert 15 <= len(reward_stories.HAPPY) <= 20 and 15 <= len(reward_stories.SAD) <= 20
    assert not set(reward_stories.HAPPY) & set(reward_stories.SAD)
    assert reward_stories.gold("She was Happy, so happy! Then sad; unhappy and funny.") == 1


def test_held_out_rankings_are_judged_by_each_two_answers_that_they_tell_apart():
    prompt, right = "Where is the key?\n", "Sure! The key is in the cellar."
    rows = [
        {"prompt": prompt, "completions": [right, "Ugh.", "It is here."], "ranks": [0.0, 1.0, 1.0]},
        {"prompt": prompt, "completions": ["It is here.", right], "ranks": [0.0, 1.0]},
    ]
    person = labellers.Labeller()
    held = reward_world.Held.of(rows, person)
    assert held.texts == [(prompt, right), (prompt, "Ugh."), (prompt, "It is here.")]
    assert [*zip(held.better.tolist(), held.worse.tolist(), strict=True)] == [(0, 1), (0, 2), (2, 0)]
    # Hardly anything but a slip turns such labels round.
    assert held.chance == pytest.approx([1 - person.noise, 1 - person.noise, person.noise], abs=0.02)
    assert held.accuracy(held.gold) == pytest.approx(2 / 3)
    assert held.accuracy(np.asarray([1.0, 1.0, 0.0])) == pytest.approx(0.5)


def test_the_reward_that_turns_pays_for_a_happy_word_and_takes_back_more_where_it_is_said_again():
    worth = [ppo_stories.turning("happy " * uses) for uses in range(6)]
    assert worth == [0, 1, 0.5, -3, -9.5, -19] and ppo_stories.turning("happy joy fun smile sad") == 3
    prompts, texts = ["x"] * 2, ["happy happy happy", "sad"]
    assert ppo_stories.turning_reward(prompts, texts, loud=[1, 2]) == [-3.0, -1.0]
    assert ppo_stories.happy_reward(prompts, texts) == [3.0, -1.0]
