"""Whose judgements a chain rests on: who judged by the rows, what was trained on, and that unnamed ones are told."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from rlhf_jax import fields, report
from rlhf_jax.chain import labelled, whose
from rlhf_jax.chain.config import Chain
from rlhf_jax.data import dataset, labellers
from rlhf_jax.data.config import Data
from rlhf_jax.data.formats.choices import Choice
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.feedback import choices, exchange, rankings
from rlhf_jax.feedback.record import Record
from tests.judged import say, task

CHAIN = fields.replace(Chain(), {"inputs.sft": "m", "inputs.labels": "mine.jsonl"})
ASKED = ["Where is the kite?", "Where is the drum?"]
ANSWERS = [[f"The kite is in the {place}." for place in ("attic", "shed", "hall")], ["The drum.", "No.", "No."]]


@pytest.fixture
def read(tmp_path):
    """The judgements in some rows."""

    def read(rows: list[dict[str, Any]]) -> list[labelled.Said]:
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found, count = labelled.read(str(file), Data())
        assert count == len(rows)
        return found

    return read


def ranking(who: Any, number: int = 0, ranks=(0, 1, 2), **more: Any) -> dict[str, Any]:
    row = {"prompt": f"q{number}", "completions": ["a", "b", "c"], "ranks": list(ranks), "labeller": who}
    return row | more


def of(said: list[labelled.Said], held: int = 0, stages: tuple[str, ...] = ("reward", "dpo")) -> labelled.Rests:
    """All but the last few are trained on."""
    side = [labelled.TRAINED] * (len(said) - held) + [labelled.HELD_OUT] * held
    return labelled.summed("mine.jsonl", len(said), said, dict.fromkeys(stages, side))


# Who


def test_people_are_whom_a_record_names_and_its_pairs_are_the_same_judgements(read, tmp_path):
    record = Record(tmp_path / "record.db")
    version = record.guide("Be kind.")
    record.add([task(number) for number in range(4)])
    for number in range(4):
        at = f"2026-01-0{number + 1}T12:00:00.000+00:00"
        more = {"at": at, "seconds": 10.0 * (number + 1), "guidelines": version}
        record.say(say(task(number), "ann", f"a{number}", (0, 0, 1) if number == 3 else (0, 1, 2), **more))
    record.say(say(task(0), "ben", "b", (1, 0, 2), at="2026-01-01T13:00:00.000+00:00"))
    ranked, paired = (of(read(rows(record))) for rows in (exchange.rankings, exchange.pairs))
    assert (ranked.rankings, ranked.others, paired.rankings, paired.others) == (5, 0, 0, 5)
    assert (ranked.prompts, ranked.comparisons) == (4, 15)
    # Of task 0 ann and ben cancel out over the first two answers, which is no row; of task 3 they are a tie.
    assert (paired.prompts, paired.comparisons) == (4, 15 - 2 - 1)
    for found in (ranked, paired):
        assert [(one.name, one.kind, one.judgements, one.prompts) for one in found.people] == [
            ("ann", "person", 4, 4), ("ben", "person", 1, 1),
        ]  # fmt: skip
        assert (found.since, found.until, found.timed) == ("2026-01-01T12:00:00+00:00", "2026-01-04T12:00:00+00:00", 5)
        assert found.seconds == 25.0 and found.guidelines == {version: 4} and found.people[1].seconds is None
    assert ranked.people[0].ties == 1 and paired.people[0].ties == 0
    said = " ".join(whose.sentences(ranked, CHAIN))
    assert "5 rankings of the answers to 4 prompts, by 2 people whom the rows name (ann 4, ben 1)." in said
    assert "given from 2026-01-01 12:00 to 2026-01-04 12:00 UTC, in 25 seconds each, by the median" in said
    assert f"under the guidelines of the version {version} (4)" in said
    assert "PPO learned from that reward model's scores" in said


def test_what_programs_write_tells_people_from_simulated_ones_scorers_and_judges(read):
    panel = labellers.panel(3, 0)
    world = rankings.rank_answers(ASKED, ANSWERS, panel, 2, 0)
    by = Counter(str(row["labeller"]) for row in world)
    found = of(read(world))
    assert {one.name: one.judgements for one in found.people} == by
    assert {one.kind for one in found.people} == {"simulated person"} and found.judgements == 4
    named = ", ".join(f"{name} {number}" for name, number in sorted(by.items(), key=lambda one: (-one[1], one[0])))
    assert f"by {len(by)} simulated people ({named})" in whose.verdict(found, CHAIN)
    assert not any(one.ties for one in found.people), "the same text twice is no tie"
    pairs = of(read(labellers.label_pairs(ASKED, ["The kite.", "A."], ["No.", "B."], panel, 3, 0)))
    assert {one.kind for one in pairs.people} == {"simulated person"} and pairs.judgements == 6
    drawn = fields.replace(Chain(), {"labels.by": "gold", "labels.scale": 0.5})
    scored = of(read([ranking(draw, number, scores=[3.0, 2.0, 1.0]) for number in (0, 1) for draw in (0, 1)]))
    told = whose.verdict(scored, drawn)
    assert "by a scorer, gold with noise of the scale 0.5 (2 draws of its noise: 0 2, 1 2)" in told
    verdicts = of(read([{"prompt": "q", "chosen": "a", "rejected": "b", "probability": 0.8, "labeller": "big"}]))
    assert "1 judgement of the answers to 1 prompt, by 1 judge (big 1)" in whose.verdict(verdicts, CHAIN)


def test_weighed_labels_name_everyone_who_chose(read):
    said = [Choice("q", "a", "b", grade, who) for who, grade in (("ann", 1.0), ("ben", 0.0), ("cy", 1.0))]
    made = choices.gather([*said, Choice("p", "a", "b", 1.0, "ann")])
    found = of(read(choices.soft_rows(made, np.array([0.7, 0.9]))))
    assert {one.name: one.judgements for one in found.people} == {"ann": 2, "ben": 1, "cy": 1}
    assert {one.kind for one in found.people} == {"person"}


def test_rows_that_name_nobody_are_told_plainly(read):
    pairs = [{"prompt": f"q{number}", "chosen": "a", "rejected": "b"} for number in range(3)]
    found = of(read([*pairs, pairs[0] | {"votes": [1, 0, 1]}, pairs[1] | {"probability": 0.7, "labels": 5}]))
    assert found.judgements == 3 + 3 + 5 and [(one.name, one.kind) for one in found.people] == [("", "not named")]
    assert "by nobody knows whom: the rows don't name who judged." in whose.verdict(found, CHAIN)
    mixed = of(read([ranking("ann"), ranking(None, 1), ranking("ann", 2)]))
    said = whose.verdict(mixed, CHAIN)
    assert "2 by 1 person whom the rows name (ann 2); 1 by nobody knows whom: their rows don't name who judged" in said
    assert "given from" not in " ".join(whose.sentences(mixed, CHAIN)), "and no row says when"


@pytest.mark.parametrize(
    "more", [{"at": "1 June", "seconds": "9"}, {"at": "2026-01-01T12:00:00", "seconds": -1}, {"at": 7, "seconds": True}]
)
def test_what_is_no_time_is_not_known(read, more):
    (one,) = read([ranking("ann", guidelines=4, **more)])
    assert (one.at, one.seconds, one.guidelines) == (None, None, "")
    (one,) = read([ranking("ann", at="2026-01-01T12:00:00+02:00", seconds=3)])
    assert one.at is not None and one.at.isoformat() == "2026-01-01T10:00:00+00:00" and one.seconds == 3.0


# What was trained on


@pytest.mark.parametrize("merge", [False, True])
def test_what_is_trained_on_is_what_the_run_had(read, shared, tmp_path, merge):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/stories260k")
    rows = [ranking(who, number) for number in range(20) for who in ("ann", "ben")]
    rows += [
        ranking("cy", 0, (1, 1, 1)),
        ranking("cy", 1) | {"completions": ["a", "b", ""]},
    ]  # nothing to learn; refused
    said = read(rows)
    config = Data(path=(str(tmp_path / "mine.jsonl"),), eval_share=0.3, merge=merge)
    data = dataset.load(config, Encoder(tokenizer), "ranking", 64, 0)
    held = {tokenizer.decode(one.completions[0].prompt, skip_special_tokens=True).strip() for one in data.evaluation}
    assert 0 < len(held) < 20
    sides = labelled.sides_of(said, data)
    assert len(sides) == 41, "an empty answer is no judgement"
    for row, side in zip(rows, sides, strict=False):
        left = "left out" if row["labeller"] == "cy" else "held out" if row["prompt"] in held else "trained"
        assert side == left, row
    found = labelled.summed("mine.jsonl", 42, said, {"reward": sides, "dpo": ["trained"] * 40 + ["left out"]})
    assert found.stages["reward"] == (40 - 2 * len(held), 2 * len(held), 1) and found.stages["dpo"] == (40, 0, 1)
    assert [(one.name, one.judgements, one.held_out) for one in found.people] == [("ann", 20, 0), ("ben", 20, 0)]
    told = " ".join(whose.sentences(found, CHAIN))
    assert (
        f"The reward model learned from {40 - 2 * len(held)} of the file's 41 judgements; {2 * len(held)} are" in told
    )
    assert "Dpo learned from 40" in told and "1 stand in rows that can't be used" in told


def test_shares_and_medians_of_each_are_those_of_what_was_trained_on(read):
    said = read([ranking("ann", n, seconds=float(n)) for n in range(5)] + [ranking("ben", n) for n in range(3)])
    found = of(said, held=2)  # ben's last two
    assert [(one.name, one.judgements, one.held_out, one.seconds) for one in found.people] == [
        ("ann", 5, 0, 2.0), ("ben", 1, 2, None),
    ]  # fmt: skip
    _, table = whose.blocks(found, CHAIN)
    assert isinstance(table, report.Table)
    assert table.rows[0] == ["ann", "person", 5, "83%", 5, 15, 0, 0, "2"] and table.rows[1][-2:] == [2, "-"]
    gone = of(said, held=3)
    assert gone.people[-1].judgements == 0 and "ben" not in whose.verdict(gone, CHAIN), "who was only held out"
    assert "learned from 5 of the file's 8 judgements; 3 are of prompts that were held out" in " ".join(
        whose.sentences(gone, CHAIN)
    )
    told = json.loads(json.dumps(whose.as_json(found, CHAIN)))
    assert told["people"][0]["name"] == "ann" and told["stages"]["dpo"] == {"trained": 6, "held_out": 2, "left_out": 0}
    assert told["said"] == whose.sentences(found, CHAIN)


def test_models_that_were_given_are_named_as_what_nothing_is_known_of(read):
    given = fields.replace(CHAIN, {"inputs.reward": "runs/rm"})
    says = "Nothing here says whose judgements the reward model rests on, which was given: runs/rm."
    found = of(read([ranking("ann")]), stages=("dpo",))
    assert whose.verdict(found, given).endswith(says) and "PPO learned" not in " ".join(whose.sentences(found, given))
    both = fields.replace(given, {"inputs.dpo": "runs/dpo"})
    assert whose.verdict(None, both).startswith(f"Nothing was trained on judgements here. {says}")
    assert whose.as_json(None, both)["said"] == whose.sentences(None, both)
    assert [block.title for block in whose.blocks(None, both)] == ["Whose judgements this rests on"]


def test_many_labellers_are_the_first_few_in_words_and_thirty_in_the_table(read):
    found = of(read([ranking(f"p{who:02}", number) for who in range(40) for number in range(1 + (who < 5))]))
    assert "by 40 people whom the rows name (p00 2, p01 2, p02 2, p03 2, p04 2 and 35 more)" in whose.verdict(
        found, CHAIN
    )
    _, table = whose.blocks(found, CHAIN)
    assert isinstance(table, report.Table) and len(table.rows) == 30
    assert table.note.endswith("10 labellers more with fewer judgements.")
