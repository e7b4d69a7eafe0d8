"""Weighing labels: simulated labellers are found again, posteriors mean what they say, and what files give."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

from experiments import aggregate as program
from rlhf_jax import flags
from rlhf_jax.data import formats, labellers, world_rows
from rlhf_jax.data.config import Data
from rlhf_jax.data.conversions import columns_of_pairs
from rlhf_jax.data.formats.choices import Choice
from rlhf_jax.data.rows import Message, Preference
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import labelling
from rlhf_jax.feedback import aggregate, bradley_terry, choices
from rlhf_jax.feedback.aggregate import Labels

NAMES = ("first", "tie", "second")
# Of what is true (rows) what five people say: sharp, fair, leaning to the first, blind, and turned round.
PEOPLE = np.array([
    [[0.9, 0.05, 0.05], [0.05, 0.9, 0.05], [0.05, 0.05, 0.9]],
    [[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.1, 0.2, 0.7]],
    [[0.9, 0.05, 0.05], [0.4, 0.5, 0.1], [0.3, 0.1, 0.6]],
    [[0.4, 0.3, 0.3], [0.4, 0.3, 0.3], [0.4, 0.3, 0.3]],
    [[0.1, 0.2, 0.7], [0.2, 0.6, 0.2], [0.7, 0.2, 0.1]],
])  # fmt: skip


def labelled(seed: int, items: int = 500, each: int = 4) -> tuple[Labels, np.ndarray]:
    """Labels of `each` of the five people for every item, and what is true; half was seen in reverse order."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, items, p=[0.45, 0.15, 0.4])
    who = rng.permuted(np.tile(np.arange(5), (items, 1)), axis=1)[:, :each].ravel()
    item = np.repeat(np.arange(items), each)
    turned = rng.random(len(item)) < 0.5
    seen = np.where(turned, 2 - truth[item], truth[item])
    said = (rng.random(len(item))[:, None] > PEOPLE[who, seen].cumsum(axis=1)).sum(axis=1)
    said = np.where(turned, 2 - said, said)
    return Labels(item, who, said, items, 5, NAMES, turned.astype(float)), truth


def two_classes() -> tuple[Labels, np.ndarray]:
    """Sixty items labelled by two people who know and three who hardly do, and what is true."""
    rng = np.random.default_rng(0)
    truth, right = rng.integers(2, size=60), np.array([0.95, 0.95, 0.6, 0.5, 0.5])
    item, who = np.repeat(np.arange(60), 5), np.tile(np.arange(5), 60)
    said = truth[item] ^ (rng.random(300) > right[who])
    return Labels(item, who, said, 60, 5, ("first", "second"), np.zeros(300)), truth


# Worths are N(0, 1); five people of these skills, who lean so to what they see first.
SKILL, BIAS = np.array([2.5, 1.5, 1.0, 0.5, 0.0]), np.array([0.0, 0.6, -0.8, 0.3, 1.0])


def compared(seed: int, prompts: int = 150, answers: int = 3, each: int = 3) -> tuple[choices.Choices, np.ndarray]:
    """Choices of `each` of the people for every pair, and by how much each pair's first answer is worth more."""
    rng = np.random.default_rng(seed)
    worth = rng.normal(size=(prompts, answers))
    said = []
    for prompt, (a, b) in itertools.product(range(prompts), itertools.combinations(range(answers), 2)):
        for who in rng.choice(5, each, replace=False):
            i, j = (a, b) if rng.random() < 0.5 else (b, a)
            chance = 1 / (1 + np.exp(-(SKILL[who] * (worth[prompt, i] - worth[prompt, j]) + BIAS[who])))
            said.append(Choice(str(prompt), str(i), str(j), float(rng.random() < chance), str(who)))
    made = choices.gather(said)
    of = lambda place: worth[int(made.texts[place][0]), int(made.texts[place][2])]
    return made, np.array([of(a) - of(b) for a, b in made.pairs])


def calibrated(chance: np.ndarray, right: np.ndarray) -> None:
    """In each band of chances as many are right as it says, within four standard errors."""
    sure = np.maximum(chance, 1 - chance)
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        here = (sure >= low) & (sure < low + 0.1 + 0.01 * (low == 0.9))
        if here.sum() > 30:
            error = np.sqrt((sure[here] * (1 - sure[here])).mean() / here.sum())
            assert abs(right[here].mean() - sure[here].mean()) < 4 * error + 0.01, (low, right[here].mean())


# Dawid and Skene


def test_dawid_and_skene_finds_how_each_labeller_errs():
    held, chances, right = [], [], []
    for seed in range(6):
        labels, truth = labelled(seed)
        fit = aggregate.dawid_skene(labels)
        low, high = labelling.confusion_intervals(labels, fit, np.arange(labels.items), seed=seed, refits=60)
        held.append((low <= PEOPLE) & (high >= PEOPLE))
        assert np.abs(fit.confusion - PEOPLE).max() < 0.3 and np.abs(fit.confusion - PEOPLE).mean() < 0.05
        assert (fit.posterior.argmax(axis=1) == truth).mean() > (
            aggregate.majority(labels).argmax(axis=1) == truth
        ).mean()
        chances.append(fit.posterior.max(axis=1))
        right.append(fit.posterior.argmax(axis=1) == truth)
    assert np.mean(held) > 0.87  # of 95%, with the few refits that there is time for
    calibrated(np.concatenate(chances), np.concatenate(right))


def test_dawid_and_skene_is_that_of_crowd_kit_without_smoothing():
    pytest.importorskip("crowdkit", reason="needs pip install 'rlhf_jax[aggregate]'")
    labels, _ = two_classes()
    _, theirs = aggregate._crowdkit(labels, "DawidSkene", n_iter=100, tol=1e-9)
    assert np.abs(aggregate.dawid_skene(labels, smoothing=0.0).posterior - theirs).max() < 1e-3


def test_the_order_of_labels_people_items_and_classes_is_no_matter():
    labels, _ = labelled(1, items=120)
    rng = np.random.default_rng(0)
    order, items, people = rng.permutation(len(labels.item)), rng.permutation(120), rng.permutation(5)
    fit = aggregate.dawid_skene(labels)
    part = lambda values: values[order]
    moved = Labels(
        items[part(labels.item)], people[part(labels.who)], 2 - part(labels.label), 120, 5, NAMES, part(labels.turned)
    )
    other = aggregate.dawid_skene(moved)
    assert np.allclose(other.posterior[items], fit.posterior[:, ::-1], atol=1e-9)
    assert np.allclose(other.confusion[people], fit.confusion[:, ::-1, ::-1], atol=1e-9)
    # Whoever saw the classes in reverse said the reverse.
    behind = dataclasses.replace(labels, turned=1 - labels.turned)
    assert np.allclose(aggregate.dawid_skene(behind).confusion, fit.confusion[:, ::-1, ::-1], atol=1e-9)
    # An item drawn twice is the item twice.
    twice = np.where(np.arange(120) < 30, 2.0, 1.0)
    again = labels.item < 30
    longer = Labels(
        np.concatenate([labels.item, labels.item[again] + 120]), np.concatenate([labels.who, labels.who[again]]),
        np.concatenate([labels.label, labels.label[again]]), 150, 5, NAMES,
        np.concatenate([labels.turned, labels.turned[again]]),
    )  # fmt: skip
    weighed = aggregate.dawid_skene(labels, weight=twice)
    assert np.allclose(aggregate.dawid_skene(longer).confusion, weighed.confusion, atol=1e-5)


def test_labels_that_cannot_tell_are_refused_and_those_that_agree_are_sure():
    alone = Labels(np.arange(4), np.zeros(4, int), np.array([0, 1, 0, 1]), 4, 1, ("first", "second"), np.zeros(4))
    for method in (aggregate.dawid_skene, aggregate.glad, aggregate.mace):
        with pytest.raises(UserError, match="no two of 1 labellers labelled the same item, so .* can't tell who errs"):
            method(alone)
    assert aggregate.majority(alone).tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    item, who = np.repeat(np.arange(20), 3), np.tile(np.arange(3), 20)
    agreed = Labels(item, who, np.zeros(60, int), 20, 3, ("first", "second"), np.zeros(60))
    fit = aggregate.dawid_skene(agreed)
    assert fit.posterior[:, 0].min() > 0.99 and np.isfinite(fit.confusion).all()
    with pytest.raises(UserError, match="label of the labels must be places from 0 to 1"):
        dataclasses.replace(agreed, label=np.full(60, 2))
    with pytest.raises(UserError, match="smoothing=-1.0 is not allowed; it must be at least 0"):
        aggregate.dawid_skene(agreed, -1.0)


def test_glad_and_mace_weigh_by_skill():
    pytest.importorskip("crowdkit", reason="needs pip install 'rlhf_jax[aggregate]'")
    labels, truth = two_classes()
    counted = (aggregate.majority(labels).argmax(axis=1) == truth).mean()
    for found in (aggregate.glad(labels, steps=8), aggregate.mace(labels, restarts=2)):
        assert found.posterior.shape == (60, 2) and np.allclose(found.posterior.sum(axis=1), 1)
        assert (found.posterior.argmax(axis=1) == truth).mean() > counted
        assert found.people[:2].min() > found.people[2:].max()


def test_what_glad_needs_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "crowdkit", None)
    with pytest.raises(
        UserError, match=r"glad needs crowd-kit .*pip install 'rlhf_jax\[aggregate\]', or take dawid_skene"
    ):
        aggregate.glad(two_classes()[0])


# Bradley and Terry


def test_bradley_and_terry_find_skill_place_and_how_sure_they_are():
    errors, chances, right = [], [], []
    for seed in range(6):
        made, more = compared(seed)
        fit = bradley_terry.fit(made)
        who = np.array([int(name) for name in made.people])
        errors.append((fit.skill - SKILL[who]) / fit.skill_error)
        errors.append((fit.bias - BIAS[who]) / fit.bias_error)
        chances.append(fit.probability)
        right.append((fit.probability > 0.5) == (more > 0))
    errors = np.abs(np.concatenate(errors))
    assert (errors < labelling.NORMAL).mean() > 0.85 and errors.max() < 4.5  # 60 of them, 95% in the limit
    calibrated(np.concatenate(chances), np.concatenate(right))


def test_the_integral_is_exact_for_one_choice_a_prompt():
    """d ~ N(0, 2) and sigmoid(skill d + bias): its mean after the choice, by fine sums."""
    made = choices.gather([Choice("Q", "A", "B", 1.0, "ann")])
    fit = bradley_terry.fit(made)
    d = np.linspace(-12, 12, 200_001)
    after = np.exp(-(d**2) / 4) / (1 + np.exp(-(fit.skill[0] * d + fit.bias[0])))
    mean = (d * after).sum() / after.sum()
    assert fit.mean[0] == pytest.approx(mean, abs=1e-4)
    assert fit.spread[0] == pytest.approx(np.sqrt((d**2 * after).sum() / after.sum() - mean**2), abs=1e-4)


def test_one_persons_single_choices_tell_nothing_of_skill():
    said = [Choice(str(n), "A", "B", float(n % 2), "ann", shown=False) for n in range(40)]
    fit = bradley_terry.fit(choices.gather(said))
    assert fit.skill[0] == pytest.approx(bradley_terry.SKILL, abs=0.05)
    assert fit.skill_error[0] == pytest.approx(bradley_terry.SKILL_SPREAD, rel=0.05)
    assert fit.bias_error[0] == pytest.approx(bradley_terry.BIAS_SPREAD) and fit.bias[0] == 0


def test_the_names_and_the_order_of_choices_are_no_matter():
    said = [Choice(str(n), a, b, g, w) for n, a, b, g, w in [
        (0, "A", "B", 1.0, "x"), (0, "B", "A", 0.0, "y"), (0, "A", "C", 0.5, "x"), (1, "A", "B", 0.0, "x"),
        (1, "A", "B", 0.0, "y"), (2, "D", "E", 1.0, "y"), (2, "E", "D", 1.0, "x"), (2, "D", "E", 0.75, "z"),
    ]]  # fmt: skip
    chance = lambda made: {
        frozenset([(made.texts[a], p), (made.texts[b], 1 - p)])
        for (a, b), p in zip(made.pairs, np.round(bradley_terry.fit(made).probability, 6), strict=True)
    }
    rounded = lambda found: sorted((str(text), round(p, 4)) for pair in found for text, p in pair)
    one, other = choices.gather(said), choices.gather(said[::-1])
    assert rounded(chance(one)) == rounded(chance(other))
    skill = lambda made: dict(zip(made.people, np.round(bradley_terry.fit(made).skill, 4), strict=True))
    assert skill(one) == pytest.approx(skill(other))


def test_one_prompt_of_many_answers_makes_no_other_larger(monkeypatch):
    said = [Choice(f"Q{n}", "A", "B", float(n % 2), "x") for n in range(30)]
    many = [Choice("many", str(n), str(n + 1), 1.0, "x") for n in range(9)]
    made = choices.gather([*said[:10], *many, *said[10:]])
    assert bradley_terry._start(made).blocks.cells == 30 * 2**2 + 10**2
    fit = bradley_terry.fit(made)
    assert (np.diff(fit.worth[made.prompt == 10]) < 0).all()
    assert ((fit.probability[made.unit != 10] > 0.5) == (made.sign[made.unit[made.pair] != 10] == 1)).all()
    monkeypatch.setattr(bradley_terry, "LARGEST", 200)
    with pytest.raises(UserError, match="'many' has the most, 10 answers; leave some away, or take dawid_skene"):
        bradley_terry.fit(made)


# Habits


def test_who_likes_long_answers_and_who_flatters_is_seen():
    """Of the simulated world: one person likes long answers, one those that repeat the user's opinion."""
    prompts = [row["prompt"] for row in world_rows.prompts(250, 0, kinds=("opinion",))]
    people = [labellers.Labeller(seed=n, noise=0.1, length_bias=0.0) for n in range(3)]
    people.append(dataclasses.replace(people[0], seed=3, length_bias=0.4))
    people.append(dataclasses.replace(people[0], seed=4, agreeableness=4.0))
    said = []
    for prompt in prompts:
        # The opinion stands before the question: its own sentence repeats it. The others are of either length.
        texts = f"{prompt.split('.')[0]}.", "Sure! It is nice of you to ask me that.", "No idea."
        for first, second in itertools.combinations(texts, 2):
            for number, person in enumerate(people):
                said.append(Choice(prompt, first, second, float(person.prefers(prompt, first, second)), str(number)))
    found = {one.name: one for one in labelling.habits(choices.gather(said))}
    longer = {name: one.beyond["longer"] for name, one in found.items()}
    assert longer["3"] is not None and longer["3"].low > 0.1
    flatters = {name: one.beyond["repeats the user's opinion"] for name, one in found.items()}
    assert flatters["4"] is not None and flatters["4"].low > 0.1
    assert all(one is None or one.mean < flatters["4"].low for name, one in flatters.items() if name != "4")


# Files


def test_rows_of_every_kind_become_choices_and_come_back(tmp_path):
    file = tmp_path / "rows.jsonl"
    ranking = {"prompt": "Q", "completions": ["A", "B", "C"], "ranks": [1, 2, 2], "labeller": 7}
    file.write_text(json.dumps(ranking) + "\n" + json.dumps(ranking | {"ranks": None}) + "\n")
    found = choices.read([str(file)])
    made = found.choices
    assert (found.read, len(found.refused)) == (2, 1) and "no column 'ranks'" in found.refused[0][1]
    assert made.people == ("7",) and made.grade.tolist() == [1, 1, 0.5] and made.ranked.all() and made.shown.all()
    (pairs := tmp_path / "ann.jsonl").write_text(
        json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"}) + "\n"
        + json.dumps({"prompt": "R", "chosen": "A", "rejected": "B", "labeller": "bob"}) + "\n"
        + json.dumps({"prompt": "S", "chosen": "A", "rejected": "B", "votes": [True, False], "labellers": [0, 1]})
    )  # fmt: skip
    made = choices.read([str(pairs)]).choices
    assert made.people == ("ann", "bob", "0", "1") and not made.shown.any()
    assert sum(abs(made.grade[2:] - made.grade[2:].mean())) == 1
    rows = choices.soft_rows(made, np.array([0.9, 0.2, 0.5]))
    assert [len(row["labellers"]) for row in rows] == [1, 1, 2]
    assert [row["labels"] for row in rows] == [1, 1, 2] and [row["probability"] for row in rows] == [0.9, 0.8, 0.5]
    for row in rows:
        (read,) = formats.adapt("preference", row, False)
        assert isinstance(read, Preference) and {read.chosen, read.rejected} == {"A", "B"}
        assert columns_of_pairs(row, Data(probability="probability"), [read]) == {"probability": row["probability"]}


def test_files_of_one_name_are_two_labellers_and_soft_labels_are_soft_votes(tmp_path):
    files = [tmp_path / who / "labels.jsonl" for who in ("ann", "bob")] + [tmp_path / "cy.jsonl"]
    for file, chance in zip(files, ({}, {"probability": 0.3}, {"probability": 0.5}), strict=True):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B"} | chance) + "\n")
    made = choices.read(list(map(str, files))).choices
    assert made.people == (str(files[0]), str(files[1]), "cy")
    ahead = made.texts[made.pairs[0, 0]][2] == "A"
    assert made.grade.tolist() == ([1, 0.3, 0.5] if ahead else [0, 0.7, 0.5])
    files[2].write_text(json.dumps({"prompt": "Q", "chosen": "A", "rejected": "B", "probability": 2}) + "\n")
    assert choices.read(list(map(str, files))).refused == [(f"{files[2]}:1", "'probability' is 2.0, not from 0 to 1")]


def test_conversations_and_tools_come_back_as_they_were():
    prompt, tools = (Message("user", "Q"),), '[{"type": "function", "function": {"name": "f"}}]'
    answers = (Message("assistant", "A"),), (Message("assistant", "B"),)
    (row,) = choices.soft_rows(choices.gather([Choice(prompt, *answers, 1.0, "x", True, tools)]), np.array([0.7]))
    (read,) = formats.adapt("preference", row, True)
    assert isinstance(read, Preference)
    assert (read.prompt, read.chosen, read.rejected) == (prompt, *answers) and '"f"' in read.tools


def test_the_chosen_answer_of_a_pair_does_not_stand_first_for_the_methods():
    said = [Choice(f"Q{n}", f"good {n}", f"bad {n}", 1.0, who, shown=False) for n in range(200) for who in "xy"]
    made = choices.gather(said)
    assert 0.4 < made.grade.mean() < 0.6 and not made.shown.any()
    assert np.array_equal(made.grade[::2], made.grade[1::2])
    weighed = labelling.METHODS["bradley_terry"](made, 0)
    assert weighed.people["x"]["bias for the first"] is None and weighed.note == ""
    assert (weighed.probability > 0.5).tolist() == [made.texts[a][2].startswith("good") for a, _ in made.pairs]
    ranked = labelling.METHODS["bradley_terry"](choices.gather([one._replace(ranked=True) for one in said]), 0)
    assert "follow from each other" in ranked.note


def call(*words: str) -> None:
    flags.run(program.main, program.Aggregate, ["aggregate", *words])


@pytest.mark.parametrize("method", ["majority", "dawid_skene", "bradley_terry"])
def test_the_program_writes_soft_labels_and_says_who_agrees(tmp_path, capsys, monkeypatch, method):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(program, "MOST", 6)  # as many pairs of labellers as there are
    panel = [labellers.Labeller(seed=n, noise=0.1 * n) for n in range(4)]
    prompts = [row["prompt"] for row in world_rows.prompts(30, 0, kinds=("fact",))]
    texts = ["Sure! It is here.", "Whatever. No."]
    # Were the better answer always shown first, nobody could tell the one from the other.
    rows = [
        {"prompt": prompt, "completions": (said := texts[:: (-1) ** at]), "ranks": list(person.ranks(prompt, said))}
        | {"labeller": f"p{n}"}
        for at, prompt in enumerate(prompts)
        for n, person in enumerate(panel)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    call(f"--rows={tmp_path / 'in.jsonl'}", f"--out={out}", f"--method={method}")
    told = capsys.readouterr().out
    assert "120 choices of 30 pairs of answers by 4 labellers; 120 rows, 0 of which can't be used" in told
    assert "Agreement" in told and "p0, p1" in told and "longer, beyond others" in told
    assert ("by bradley_terry" in told, "by dawid_skene" in told) == (
        method == "bradley_terry",
        method == "dawid_skene",
    )
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(made) == 30 and all(0.5 <= row["probability"] <= 1 and row["labels"] == 4 for row in made)
    assert sum(row["chosen"].startswith("Sure!") for row in made) > 27
    figures = json.loads((tmp_path / "out.labellers.json").read_text())
    assert figures["method"] == method and len(figures["labellers"]) == 4 and len(figures["agreement"]) == 7
    assert "Of the pairs of labellers" not in told
    out.unlink()
    with pytest.raises(SystemExit):
        call(f"--rows={tmp_path / 'in.jsonl'}", f"--out={out}", f"--method={method}")
    assert "would overwrite" in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("rows", "words", "says"),
    [
        ([{"prompt": "Q", "completion": "A"}], (), "compares no answers; give --rows pairs or rankings"),
        ([{"prompt": "Q", "completions": ["A", "A"], "ranks": [1, 2]}], (), "holds no choice of two different answers"),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], (), "no two of 1 labellers labelled the same item"),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], ("--seed=-1",), "--seed=-1 is not allowed"),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], ("--method=mean",), "mean"),
    ],
)
def test_what_can_not_be_weighed_is_said(tmp_path, capsys, rows, words, says):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        call(f"--rows={tmp_path / 'in.jsonl'}", f"--out={tmp_path / 'out.jsonl'}", *words)
    assert says in (caught := capsys.readouterr()).err + caught.out
    assert not (tmp_path / "out.jsonl").exists()


def test_sheets_of_judges_are_a_labeller_each(shared):
    folder = shared / "data" / "alpaca-eval-judges"
    files = sorted(str(file) for file in folder.glob("gpt-3.5-turbo-0301.*.jsonl"))
    made = choices.read(files).choices
    assert (len(made), len(made.pairs), len(made.people)) == (690, 230, 3) and (made.shown == 1).all()
    split = np.bincount(made.pair, made.sign)
    assert ((split > 0) & (split < 3)).sum() == 29  # so many, says the folder's own account
