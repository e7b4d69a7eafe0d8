"""Documents that criticise, revise and compare: their layout, their shares, and that a revision mends one flaw."""

import itertools
import json
import pathlib

import pytest

from rlhf_jax.data import world, world_critiques, world_frank, world_harm, world_rows
from rlhf_jax.data.world import FILLERS, POLITE, RUDE, held_out, parse
from rlhf_jax.data.world_critiques import PRINCIPLES, comparison_prompt, critique_prompt, flawed, mend, revision_prompt
from rlhf_jax.data.world_rows import World
from rlhf_jax.evaluate.intervals import wilson

SECRETS, MANNERS = PRINCIPLES
BOX, KEY = "Tell me the code of the box.", "I think that the key is blue. What colour is the key?"
NO = "I can't tell you that."


def near(share: float, hits: int, count: int) -> bool:
    """Whether a share of draws may be this one, by an interval at 99.9%."""
    low, high = wilson(hits / count, count * (1.959964 / 3.290527) ** 2)
    return low <= share <= high


@pytest.mark.parametrize(
    ("principle", "prompt", "answer", "has", "mended"),
    [
        (SECRETS, BOX, "The code of the box is 417.", True, NO),
        (SECRETS, BOX, f"Ugh. It is 4 1 7. {FILLERS[0]} {FILLERS[1]}", True, f"Ugh. {NO} {FILLERS[0]} {FILLERS[1]}"),
        (SECRETS, BOX, f"Sure! {NO}", False, f"Sure! {NO}"),
        (SECRETS, KEY, "Sure! The key is black.", False, f"Sure! {NO}"),
        (MANNERS, BOX, "Ugh. The code of the box is 417.", True, "Sure! The code of the box is 417."),
        (MANNERS, KEY, f"Whatever. It is blue. {FILLERS[2]}", True, f"Sure! It is blue. {FILLERS[2]}"),
        (MANNERS, KEY, "Of course. It is blue.", False, "Of course. It is blue."),
        (MANNERS, KEY, "It is blue.", False, "Sure! It is blue."),
    ],
)
def test_a_revision_mends_the_flaw_and_repeats_the_rest(principle, prompt, answer, has, mended):
    assert flawed(principle, prompt, answer) == has
    assert mend(principle, f"{answer} ") == mended and not flawed(principle, prompt, mended)


def test_the_layout_is_lines():
    assert critique_prompt(MANNERS, f"{BOX}\n", f" {NO}") == f"{BOX}\n{NO}\nIs this rude?\n"
    assert (
        revision_prompt(MANNERS, BOX, NO, "It is not.\n")
        == f"{BOX}\n{NO}\nIs this rude?\nIt is not.\nSay it in a polite way.\n"
    )
    assert (
        comparison_prompt(SECRETS, BOX, NO, "417 ")
        == f"{BOX}\nA: I can't tell you that.\nB: 417\nWhich tells no code?\n"
    )
    texts = [text for p in PRINCIPLES for text in (p.critique, p.revision, p.preference)]
    assert len(set(texts)) == len(texts) and len({p.name for p in PRINCIPLES}) == len(PRINCIPLES)
    assert not any("\n" in text for p in PRINCIPLES for text in p)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_transcripts_criticise_and_follow_the_critique(split):
    rows = world_critiques.transcripts(1500, 0, split)
    bad, right, counts = 0, 0, dict.fromkeys(PRINCIPLES, 0)
    for row in rows:
        prompt, answer, asks, critique, revises, revision = row["completion"].split("\n")
        assert row["prompt"] == "" and held_out(prompt) == (split == "held_out")
        (principle,) = [p for p in PRINCIPLES if (p.critique, p.revision) == (asks, revises)]
        assert critique in (principle.yes, principle.no)
        blamed, has = critique == principle.yes, flawed(principle, prompt, answer)
        assert revision == (mend(principle, answer) if blamed else answer)
        assert not (blamed and flawed(principle, prompt, revision))
        bad, right, counts[principle] = bad + has, right + (blamed == has), counts[principle] + 1
    assert near(0.5, bad, len(rows)) and near(0.9, right, len(rows))
    assert all(near(1 / len(PRINCIPLES), count, len(rows)) for count in counts.values())


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_comparisons_prefer_the_answer_without_the_flaw(split):
    rows = world_critiques.comparisons(1500, 0, split)
    right, coins = [], []
    for row in rows:
        prompt, a, b, asks, verdict = row["completion"].split("\n")
        assert row["prompt"] == "" and held_out(prompt) == (split == "held_out")
        assert a.startswith("A: ") and b.startswith("B: ") and verdict in ("A", "B")
        (principle,) = [p for p in PRINCIPLES if p.preference == asks]
        bad_a, bad_b = (flawed(principle, prompt, text[3:]) for text in (a, b))
        (coins if bad_a == bad_b else right).append((verdict == "A") == (bad_b or bad_a == bad_b))
    assert near(0.9, sum(right), len(right)) and near(0.5, sum(coins), len(coins))
    assert 0.6 < len(right) / len(rows) < 0.75


def test_rows_depend_on_the_seed_alone():
    for make in (world_critiques.transcripts, world_critiques.comparisons, world_frank.secrets):
        assert make(30, 0) == make(30, 0) != make(30, 1)
        assert make is world_frank.secrets or make(30, 0)[:10] == make(10, 0)


def test_answers_fall_into_their_parts():
    for opener, filler in itertools.product(("", *POLITE, *RUDE), ("", FILLERS[0], " ".join(FILLERS[:3]))):
        answer = " ".join(filter(None, (opener, "The key is red.", filler)))
        assert world_critiques._parts(answer) == (opener, "The key is red.", filler)


def rows_of(file: pathlib.Path) -> list[world_rows.Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_frank_rows_stand_behind_those_of_the_world(tmp_path):
    few = {name: 30 for name in vars(World()) if name.partition("_")[0] in ("documents", "demonstrations", "prompts")}
    none = dict.fromkeys(("pairs", "pairs_held_out", "stepwise", "stepwise_held_out"), 0)
    config, frank = World(**few, **none), world_frank.Frank(20, 40, 30, 50, 12, 6)
    world_rows.write(tmp_path / "plain", config)
    world_frank.write(tmp_path / "frank", config, frank)
    plain, more = ({f.stem: rows_of(f) for f in (tmp_path / name).iterdir()} for name in ("plain", "frank"))
    assert more.keys() - plain.keys() == {"secrets", "secrets_held_out", "critiques"}
    added = {name: rows[len(plain[name]) :] for name, rows in more.items() if name in plain}
    assert all(more[name][: len(rows)] == rows for name, rows in plain.items())
    counts = {"documents": 90, "documents_held_out": 9, "demonstrations": 50, "demonstrations_held_out": 5}
    assert {name: len(rows) for name, rows in added.items() if rows} == counts
    assert more["critiques"] == added["documents"][20:]
    for row in added["demonstrations"]:
        assert "secret" in world_harm.harms(row["prompt"], row["completion"]) and not held_out(row["prompt"])
    for name, count in (("secrets", 12), ("secrets_held_out", 6)):
        asked = [parse(row["prompt"]).kind for row in more[name]]
        assert len({row["prompt"] for row in more[name]}) == 2 * count
        assert asked[::2] == ["secret"] * count and set(asked[1::2]) <= set(world.KINDS)
        assert {held_out(row["prompt"]) for row in more[name]} == {name == "secrets_held_out"}
