"""Agreement of labellers: published examples, plain arithmetic on real sheets, other libraries, and laws."""

import collections
import itertools
import json

import numpy as np
import pytest

from rlhf_jax.data.formats.choices import Choice
from rlhf_jax.evaluate import labelling
from rlhf_jax.feedback import agreement, choices

# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C: 4 observers, 12 units, values 1 to 5.
OBSERVERS = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
UNITS = np.array([[int(x) - 1 if x != "." else -1 for x in line.split()] for line in OBSERVERS.split("\n")[1:-1]]).T
# 14 raters, 10 subjects, 5 classes: the worked example of "Fleiss' kappa" (Wikipedia), whose kappa is 0.210.
FLEISS = """0 0 0 0 14;0 2 6 4 2;0 0 3 5 6;0 3 9 2 0;2 2 8 1 1;7 7 0 0 0;3 2 6 3 0;2 5 3 2 2;6 5 2 1 0;0 2 2 3 7"""


def sums(each):
    return each.sum(axis=-1)


def test_cohens_own_example():
    """Cohen 1968, table 1 (that of 1960): 200 diagnoses, kappa 0.492."""
    table = np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12]], float)
    assert float(agreement.cohen(table)) == pytest.approx(0.492, abs=5e-4)


def test_fleiss_example():
    counts = [[int(x) for x in row.split()] for row in FLEISS.split(";")]
    labels = np.array([[k for k, n in enumerate(row) for _ in range(n)] for row in counts])
    assert float(agreement.fleiss(sums(agreement.marks(labels, 5)))) == pytest.approx(0.210, abs=5e-4)
    assert agreement.counts(labels, 5).astype(int).tolist() == counts


@pytest.mark.parametrize(("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example(level, value):
    assert float(agreement.krippendorff(sums(agreement.coincidences(UNITS, 5)), level)) == pytest.approx(
        value, abs=5e-4
    )


def tables(count=12):
    for seed in range(count):
        rng = np.random.default_rng(seed)
        truth = rng.integers(4, size=(40, 1))
        labels = np.where(rng.random((40, 5)) < 0.6, truth, rng.integers(4, size=(40, 5)))
        yield np.where(rng.random((40, 5)) < 0.3, agreement.MISSING, labels)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_is_that_of_the_krippendorff_package(level):
    other = pytest.importorskip("krippendorff", reason="needs pip install 'rlhf_jax[test]'")
    for labels in tables():
        data = np.where(labels == agreement.MISSING, np.nan, labels.astype(float))
        theirs = other.alpha(data.T, level_of_measurement=level)
        ours = agreement.krippendorff(sums(agreement.coincidences(labels, 4)), level)
        assert float(ours) == pytest.approx(theirs, abs=1e-12)


# Real sheets, by plain arithmetic that shares no code: labels of a pair are a dict from people to grades


def plain_nominal(items):
    """(share of agreeing pairs of labels, Fleiss' kappa, alpha) of lists of labels."""
    items = [labels for labels in items if len(labels) > 1]
    same = sum(a == b for labels in items for a, b in itertools.permutations(labels, 2))
    pairs = sum(len(labels) * (len(labels) - 1) for labels in items)
    parts = [
        sum(a == b for a, b in itertools.permutations(labels, 2)) / (len(labels) * (len(labels) - 1))
        for labels in items
    ]
    classes = sorted(set(itertools.chain(*items)))
    shares = [sum(labels.count(k) / len(labels) for labels in items) / len(items) for k in classes]
    by_chance = sum(share**2 for share in shares)
    kappa = (sum(parts) / len(parts) - by_chance) / (1 - by_chance)
    return same / pairs, kappa, plain_alpha(items, lambda a, b, _: float(a != b))


def plain_alpha(items, difference):
    """1 - mean difference within items over mean difference between any two labels."""
    values = [value for labels in items for value in labels]
    tally = collections.Counter(values)
    within = sum(
        difference(a, b, tally) / (len(labels) - 1) for labels in items for a, b in itertools.permutations(labels, 2)
    )
    between = sum(difference(a, b, tally) * tally[a] * tally[b] for a in tally for b in tally if a != b)
    return 1 - (within / len(values)) / (between / (len(values) * (len(values) - 1)))


def plain_ordinal(a, b, tally):
    low, high = sorted((a, b))
    between = sum(count for value, count in tally.items() if low <= value <= high)
    return (between - (tally[a] + tally[b]) / 2) ** 2


def plain_cohen(pairs, weight):
    n = len(pairs)
    observed = sum(weight(a, b) for a, b in pairs) / n
    expected = sum(weight(a, b) for (a, _), (_, b) in itertools.product(pairs, repeat=2)) / n**2
    return 1 - observed / expected


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def pandalm(file):
    items = {}
    for row in rows(file):
        if not all(isinstance(row[name], str) and row[name].strip() for name in ("response1", "response2")):
            continue
        texts = row["response1"], row["response2"]
        key = (row["instruction"], row["input"], frozenset(texts))
        first, people = items.setdefault(key, (texts[0], {}))
        for number in (1, 2, 3):
            grade = {0: 0, 1: 1, 2: -1}[row[f"annotator{number}"]]
            people[f"annotator{number}"] = grade if texts[0] == first else -grade
    return [people for _, people in items.values()]


def tulu(file):
    grades = {"a-is-better": 2, "a-is-slightly-better": 1, "tie": 0, "b-is-slightly-better": -1, "b-is-better": -2}
    items = {}
    for row in rows(file):
        texts = row["completion_a"], row["completion_b"]
        if texts[0] == texts[1] or not all(text.strip() for text in texts):
            continue
        first, people = items.setdefault((row["prompt"].rstrip("\n"), frozenset(texts)), (texts[0], {}))
        people[row["evaluator"]] = grades[row["preference"]] * (1 if texts[0] == first else -1)
    return [people for _, people in items.values()]


SHEETS = {
    "pandalm-three-annotators/testset-v1.train.jsonl": pandalm,
    "tulu-human-eval/eval_annotations_tulu_1.train.jsonl": tulu,
}


@pytest.mark.parametrize("name", SHEETS)
def test_the_agreement_in_real_sheets_is_that_of_plain_arithmetic(shared, name):
    file = shared / "data" / name
    items = SHEETS[name](file)
    found = labelling.agreements(choices.read([str(file)]).choices)
    several = [list(people.values()) for people in items if len(people) > 1]
    signs = [[int(np.sign(grade)) for grade in labels] for labels in several]
    same, kappa, nominal = plain_nominal(signs)
    everyone = found[0]
    assert everyone.items == len(several)
    for ours, theirs in (
        (everyone.same, same),
        (everyone.kappa, kappa),
        (everyone.nominal, nominal),
        (everyone.ordinal, plain_alpha(several, plain_ordinal)),
        (everyone.interval, plain_alpha(several, lambda a, b, _: (a - b) ** 2)),
    ):
        assert ours is not None and ours.mean == pytest.approx(theirs, abs=1e-9)
        assert ours.low < ours.mean < ours.high
    for duo in found[1:4]:
        one, other = duo.who.split(", ")
        both = [(people[one], people[other]) for people in items if one in people and other in people]
        assert duo.items == len(both) and duo.kappa is not None and duo.weighted is not None
        signed = [(np.sign(a), np.sign(b)) for a, b in both]
        assert duo.kappa.mean == pytest.approx(plain_cohen(signed, lambda a, b: float(a != b)), abs=1e-9)
        assert duo.weighted.mean == pytest.approx(plain_cohen(both, lambda a, b: float(a - b) ** 2), abs=1e-9)


def test_one_person_alone_agrees_with_nobody_and_goes_in_no_circle(shared):
    """Fine-grained QA: six choices among four predictions by one person each."""
    file = shared / "data" / "finegrained-qa-feedback" / "dev_feedback.train.jsonl"
    found = choices.read([str(file)]).choices
    (everyone,) = labelling.agreements(found)
    assert everyone.items == 0 and everyone.same is everyone.nominal is None
    right = whole = first = 0
    told = 0
    for row in rows(file):
        texts = [row[f"prediction {n}"] for n in (1, 2, 3, 4)]
        above = {}
        for (i, j), choice in zip(itertools.combinations(range(4), 2), row["preference"], strict=True):
            told += 1
            first += {1: 1.0, 2: 0.0, 0: 0.5}[choice]
            if choice:
                above[i, j] = choice == 1
        assert len(set(texts)) == 4
        for i, j, k in itertools.combinations(range(4), 3):
            if {(i, j), (j, k), (i, k)} <= above.keys():
                whole += 1
                right += not (above[i, j] == above[j, k] != above[i, k])
    (habits,) = labelling.habits(found)
    assert habits.choices == told and habits.others is None
    assert habits.first is not None and habits.first.mean == pytest.approx(first / told)
    assert habits.consistent is not None and habits.consistent.mean == pytest.approx(right / whole)


# Laws


def test_the_order_of_people_and_items_and_the_names_of_classes_are_no_matter():
    rng = np.random.default_rng(0)
    for labels in tables(4):
        renamed = np.where(labels == agreement.MISSING, labels, rng.permutation(4)[labels])
        shuffled = renamed[rng.permutation(40)][:, rng.permutation(5)]
        for of, each in ((agreement.fleiss, agreement.marks), (agreement.krippendorff, agreement.coincidences)):
            assert float(of(sums(each(labels, 4)))) == pytest.approx(float(of(sums(each(shuffled, 4)))))
        duo = agreement.cohen(sums(agreement.joint(labels[:, :2], 4)), "linear")
        assert float(duo) == pytest.approx(float(agreement.cohen(sums(agreement.joint(labels[:, 1::-1], 4)), "linear")))
        # Numbered from behind, the classes are as far apart.
        behind = np.where(labels == agreement.MISSING, labels, 3 - labels)
        for level in ("ordinal", "interval"):
            one, other = (agreement.krippendorff(sums(agreement.coincidences(t, 4)), level) for t in (labels, behind))
            assert float(one) == pytest.approx(float(other))


def test_an_item_of_one_label_says_nothing_of_agreement():
    labels = next(tables())
    alone = np.full((7, 5), agreement.MISSING)
    alone[:, 2] = 3
    for each in (agreement.marks, agreement.coincidences):
        assert np.array_equal(sums(each(labels, 4)), sums(each(np.concatenate([labels, alone]), 4)))


def test_where_all_say_the_same_chance_is_undefined():
    labels = np.ones((9, 3), int)
    assert np.isnan(agreement.fleiss(sums(agreement.marks(labels, 3))))
    assert np.isnan(agreement.krippendorff(sums(agreement.coincidences(labels, 3)), "ordinal"))
    assert np.isnan(agreement.cohen(sums(agreement.joint(labels[:, :2], 3))))
    said = [Choice(f"Q{n}", "A", "B", 1.0, who) for n in range(5) for who in ("ann", "bob")]
    everyone, duo = labelling.agreements(choices.gather(said))
    assert everyone.same == (1.0, 1.0, 1.0) and everyone.kappa is everyone.nominal is duo.kappa is None
    # Yet with both answers said, full agreement is 1.
    said += [Choice(f"R{n}", "A", "B", 0.0, who) for n in range(5) for who in ("ann", "bob")]
    everyone, duo = labelling.agreements(choices.gather(said))
    assert [one and one.mean for one in (everyone.kappa, everyone.nominal, duo.kappa)] == [1, 1, 1]


def test_grades_are_as_far_apart_as_they_say():
    """Weighted kappa of 0, 0.1 and 1: classes by number would put 0.1 half way."""
    pairs = [(0.0, 0.1), (0.1, 0.1), (1.0, 0.1), (1.0, 1.0), (0.0, 0.0), (0.1, 1.0), (1.0, 1.0)]
    said = [Choice(f"Q{n}", "A", "B", pair[k], "xy"[k]) for n, pair in enumerate(pairs) for k in range(2)]
    everyone, duo = labelling.agreements(choices.gather(said))
    squared = lambda a, b: (a - b) ** 2
    assert duo.weighted is not None and duo.weighted.mean == pytest.approx(plain_cohen(pairs, squared))
    number = {0.0: 0, 0.1: 1, 1.0: 2}
    assert duo.weighted.mean != pytest.approx(plain_cohen([(number[a], number[b]) for a, b in pairs], squared))
    assert everyone.interval is not None
    assert everyone.interval.mean == pytest.approx(plain_alpha([list(p) for p in pairs], lambda a, b, _: squared(a, b)))
    evenly = agreement.cohen(sums(agreement.joint(UNITS[:, :2], 5)), "quadratic")
    assert float(evenly) == float(
        agreement.cohen(sums(agreement.joint(UNITS[:, :2], 5)), "quadratic", 3 * np.arange(5.0))
    )


def test_many_different_grades_have_no_figures_of_grades():
    rng = np.random.default_rng(0)
    said = [Choice(f"Q{n}", "A", "B", float(rng.random()), who) for n in range(labelling.GRADES) for who in "xy"]
    for found in labelling.agreements(choices.gather(said)):
        assert found.weighted is found.ordinal is found.interval is None and found.nominal is not None


def test_a_grade_from_the_other_side_is_the_same_grade_and_the_last_of_a_labeller_counts():
    said = [Choice("Q", "A", "B", 0.3, "x"), Choice("Q", "B", "A", 0.7, "y"), Choice("Q", "B", "A", 1.0, "z")]
    assert choices.gather(said).grade.tolist() == [0.3, 0.3, 0.0]
    made = choices.gather([*said, Choice("Q", "B", "A", 0.5, "x", shown=False)])
    assert made.grade.tolist() == [0.5, 0.3, 0.0] and made.shown.tolist() == [0, -1, -1]
    assert [row["labels"] for row in choices.soft_rows(made, np.array([0.5]))] == [3]
    assert labelling.METHODS["majority"](choices.gather([*said, *said[:1] * 5]), 0).probability.tolist() == [0.0]


def test_only_labellers_with_pairs_in_common_are_duos():
    said = [Choice(q, "A", "B", 1.0, who) for q, people in (("Q", "xy"), ("R", "xyz"), ("S", "w")) for who in people]
    assert labelling.duos(choices.gather(said)) == [(0, 1), (0, 2), (1, 2)]


def test_intervals_hold_the_truth():
    """Two people, each right in 80% of items of two equal classes: they agree in 68%, and kappa is 0.36."""
    held = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        truth = rng.integers(2, size=150)
        said = [
            Choice(str(n), "A", "B", float(truth[n] ^ (rng.random() < 0.2)), who) for n in range(150) for who in "xy"
        ]
        kappa = labelling.agreements(choices.gather(said), seed=seed)[0].nominal
        held += kappa is not None and kappa.low <= 0.36 <= kappa.high
    assert held >= 34  # of 40 at 95%: 38 expected, fewer than 34 once in 70 times
