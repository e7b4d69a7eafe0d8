"""Reward models judged: scores against the objective's, hand-made labels, ensembles, and the program end to end."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from experiments import evaluate, rewards
from rlhf_jax import fields, sweep
from rlhf_jax.algorithms import reward
from rlhf_jax.config import Config
from rlhf_jax.data import dataset
from rlhf_jax.data.config import Data
from rlhf_jax.data.cutting import fit
from rlhf_jax.data.rows import Message
from rlhf_jax.data.tokens import Encoder, Tokens
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate import proxies
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.judgements import agreement, comparisons, gold_of, judge, quantiles
from rlhf_jax.evaluate.rewards import Rewards, _batch, _text, combine, lowest
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.workdir import open_model, open_rewards
from tests import tiny
from tests.test_run import make_config

SOLUTIONS = [
    {"prompt": f"{n}+1+1?", "completions": [f"{n}+1={n + 1}.", f" So {n + 2}."], "labels": [True, n % 2 == 0]}
    for n in range(8)
]


def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [-float(len(completion)) for completion in completions]


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> pathlib.Path:
    """A policy, rows, a trained ensemble of two and a model of steps."""
    folder = tmp_path_factory.mktemp("rewards")
    tiny.write_model(folder / "model")
    tiny.write_pairs(folder / "pairs.jsonl")
    rows = [{**row, "labeller": "ann" if n % 2 else "bob"} for n, row in enumerate(lines(folder / "pairs.jsonl"))]
    ranked = {"prompt": "a word:", "completions": [" cat", " red dog", " sun sun sun", " moon"], "ranks": [0, 1, 1, 2]}
    write(folder / "told.jsonl", rows[:24])
    write(folder / "ranked.jsonl", [ranked, {**ranked, "prompt": "two words:"}, {**ranked, "prompt": "none:"}])
    write(folder / "solutions.jsonl", SOLUTIONS)
    (folder / "asked.txt").write_text("one cat:\ntwo dogs:\nred:\n")
    config = make_config(folder, "bradley_terry", algorithm="reward")
    sweep.train_ensemble(
        fields.replace(config, {"reward.members": 2, "train.steps": 4, "evaluate.every": 0}), str(folder / "ensemble")
    )
    tiny.write_model(folder / "steps")  # for its tokenizer; the weights are written over
    hf.write(epath.Path(folder / "steps"), *headed(open_model(str(folder / "model")), 7), kind="token")
    return folder


def lines(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def headed(policy: Any, seed: int) -> tuple[Any, Any]:
    """A model with a random score in the place of its words."""
    model = policy.model.with_head("score")
    params = {name: leaf for name, leaf in policy.params.items() if name in model.shapes()}
    params |= {"score": np.zeros(model.shape.width, np.float32), "score_bias": np.float32(0.1 * seed)}
    return model, reward.new_head(params, jax.random.PRNGKey(seed))


@pytest.fixture(scope="module")
def pair(place: pathlib.Path) -> Rewards:
    """Two members that differ in their heads."""
    policy = open_model(str(place / "model"))
    made = [headed(policy, seed) for seed in (1, 2)]
    return Rewards("pair", [Subject(str(i), *one, policy.tokenizer) for i, one in enumerate(made)])


# Scores


def test_scores_are_those_of_the_objective_in_any_company(pair):
    rows = pair.encode(["one:", "two cats:", "three:"], [" red", " a bird, a dog", ""])
    batch = _batch([row.ids for row in rows], 3, 64)
    grouped = {name: column[:, None] for name, column in batch.items()} | {"weight": np.ones(3, np.float32)}
    for number, member in enumerate(pair.members):
        per_token = member.model.score(member.params, batch)
        expected = reward.answer_scores(per_token, grouped)[:, 0]
        np.testing.assert_allclose(pair.scores([row.ids for row in rows])[number], expected, rtol=1e-5)
    alone = np.concatenate([pair.scores([row.ids]) for row in rows], axis=1)
    np.testing.assert_allclose(alone, pair.scores([row.ids for row in rows]), rtol=1e-5)
    many = [row.ids for row in rows] * 30  # more than one batch
    np.testing.assert_allclose(pair.scores(many), np.tile(alone, 30), rtol=1e-5)


def test_members_of_one_shape_compile_once(pair):
    from rlhf_jax.evaluate.rewards import _score

    program: Any = _score
    pair.scores([np.arange(2, 20)])
    before = program._cache_size()
    pair.scores([np.arange(2, 9)] * 70)
    assert program._cache_size() == before


def test_steps_are_read_at_their_last_tokens(pair):
    (row,) = pair.encode_steps(["1+1?"], [["1+1=2.", " So 2."]])
    (found,) = pair.step_scores([row])
    assert found.shape == (2, 2)
    upto = [row.ids[: end + 1] for end in row.ends]  # a score sees only what stands before it
    np.testing.assert_allclose(found, pair.scores(upto), rtol=1e-4)


def test_what_is_too_long_loses_its_oldest_prompt_tokens_or_is_named(pair):
    prompt, answer = "word " * 40, " red cat"
    (row,) = pair.encode([prompt], [answer])
    whole = pair.encoder.encode(prompt, answer)
    expected = fit((whole,), 64)
    assert expected is not None and row.ids.tolist() == expected[0].ids.tolist() and len(whole) > 64 == len(row)
    with pytest.raises(UserError, match=r"answer number 2 has 102 tokens without its prompt .* context of pair, 64"):
        pair.encode(["a", "b"], ["c", "d" * 101])


def test_what_can_not_be_encoded_is_named(pair):
    with pytest.raises(
        UserError, match="solution number 2 can't be scored by pair: step 1 of 2 has no token of its own"
    ):
        pair.encode_steps(["a", "b"], [["c"], ["", "d"]])
    with pytest.raises(UserError, match="gives token 999, but the model's vocabulary ends at 259"):
        pair.scores([np.asarray([1, 999])])


def test_as_a_scorer_it_gives_one_number_an_answer(pair, place):
    each = pair.scores([row.ids for row in pair.encode(["a", "b"], ["c", "d"])])
    np.testing.assert_allclose(pair(["a", "b"], ["c", "d"], answer=[1, 2]), each.mean(axis=0))
    other = Rewards("least", pair.members, how="minimum")
    np.testing.assert_allclose(other(["a", "b"], ["c", "d"]), each.min(axis=0))
    said = [{"role": "assistant", "content": "hi", "name": "x"}]
    assert _text(said) == (Message("assistant", "hi", '{"name": "x"}'),) and _text("s") == "s"


def test_ways_of_combining():
    scores = np.random.default_rng(0).normal(size=(4, 9))
    assert np.all(combine(scores, "minimum") <= combine(scores, "mean"))
    np.testing.assert_allclose(combine(scores, "mean_less_variance", 0), combine(scores, "mean"))
    np.testing.assert_allclose(
        combine(scores, "mean_less_variance", 0.3), scores.mean(axis=0) - 0.3 * scores.var(axis=0, ddof=0)
    )
    for how in ("mean", "minimum", "mean_less_variance"):
        np.testing.assert_allclose(combine(np.tile(scores[:1], (3, 1)), how), scores[0])  # members that agree
        np.testing.assert_allclose(combine(scores + 2, how), combine(scores, how) + 2)


def test_a_member_whose_zero_is_far_below_is_all_that_the_minimum_says():
    scores = np.random.default_rng(0).normal(size=(3, 200))
    assert lowest(scores) is None and lowest(scores[:1]) is None
    apart = scores - [[0], [9], [0]]
    assert lowest(apart) == 1
    np.testing.assert_array_equal(combine(apart, "minimum"), apart[1])


def test_members_with_different_tokenizers_are_refused(pair):
    class Renamed:
        def __getattr__(self, name: str) -> Any:
            return "{{ messages }}" if name == "chat_template" else getattr(pair.members[0].tokenizer, name)

        def __call__(self, *given: Any, **named: Any) -> Any:
            return pair.members[0].tokenizer(*given, **named)

    other = pair.members[1]._replace(tokenizer=Renamed())
    with pytest.raises(UserError, match="the members of odd have different tokenizers"):
        Rewards("odd", [pair.members[0], other])


# Judgements


def example(texts: list[str], prompt: int = 0, **said: Any) -> Any:
    """An item and its example, a token a word."""
    tokens = [
        Tokens(np.asarray([100 + prompt, *map(hash_of, text.split())]), np.arange(len(text.split()) + 1) > 0)
        for text in texts
    ]
    given: dict[str, Any] = {"completions": tuple(tokens), "labels": (), "prompt": prompt, "index": 0, "source": 0}
    item: Any = type("Item", (), {"prompt": f"p{prompt}", "completions": tuple(texts)})
    made = dataset.Example(**{**given, "where": "f:1", **said})
    shares = dataset.items.preferred(made.ranks)
    return item, made if made.preferred else dataclasses.replace(made, preferred=shares)


def hash_of(word: str) -> int:
    return sum(map(ord, word)) % 97


def test_comparisons_by_hand():
    rows = [
        example(["a a a", "b", "c c"], 0, ranks=(0.0, 1.0, 1.0), labeller="ann"),
        example(["b", "a a a"], 0, ranks=(0.0, 1.0), labeller="bob"),  # the other way round
        example(["x", "y y"], 1, ranks=(0.0, 1.0), probability=0.25, source=1),  # votes for the second
        example(["x", "y y"], 2, ranks=(0.0, 1.0), probability=0.5),  # a tie
    ]
    found = comparisons(rows, ["f", "g"])
    assert len(found.rows) == 7 and len(found) == 4  # answers of one prompt are scored once, whoever labelled them
    assert found.better.tolist() == [0, 0, 1, 4] and found.worse.tolist() == [1, 2, 0, 3]
    assert found.share.tolist() == [1, 1, 1, 0.75]
    assert found.labeller == ("ann", "ann", "bob", "") and found.source == ("f", "f", "f", "g")

    scores = np.array([2.0, 1.0, 2.0, 0.0, 5.0, 0.0, 0.0])
    gold = np.array([0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    told = judge(found, scores, gold)
    assert told.overall.accuracy.mean == (1 + 0.5 + 0 + 1) / 4 and told.overall.prompts == 2
    assert told.ceiling is not None and told.ceiling.mean == (0 + 0.5 + 1 + 1) / 4
    assert {name: one.accuracy.mean for name, one in told.by["labeller"].items()} == {"ann": 0.75, "bob": 0}
    assert {name: one.accuracy.mean for name, one in told.by["source"].items()} == {"f": 0.5, "g": 1}
    longer = {name: (one.count, one.accuracy.mean) for name, one in told.by["longer"].items()}
    assert longer == {"better": (3, 2.5 / 3), "worse": (1, 0)}
    assert sum(one.count for one in told.by["margin"].values()) == 4
    part = found.some(np.asarray(found.source) == "f")
    assert judge(part, scores).overall.accuracy.mean == 0.5 and judge(part, scores).ceiling is None
    np.testing.assert_array_equal(gold_of(found, brevity), [-5, -1, -3, -1, -3, -1, -3])


def test_accuracy_does_not_see_a_monotone_map_of_the_scores():
    rng = np.random.default_rng(0)
    rows = [example([f"a{n}", f"b{n} c"], n, ranks=(0.0, 1.0)) for n in range(40)]
    found = comparisons(rows, ["f"])
    scores = rng.normal(size=len(found.rows))
    one, other = judge(found, scores), judge(found, np.exp(scores))
    assert one.overall == other.overall
    turned = judge(found, -scores)
    assert turned.overall.accuracy.mean == pytest.approx(1 - one.overall.accuracy.mean)
    assert one.length["spearman"] is not None and other.length["spearman"] == one.length["spearman"]
    by_length = judge(found, found.length.astype(float))
    assert by_length.length["pearson within prompts"] is not None
    assert by_length.length["pearson within prompts"].mean == pytest.approx(1)


def test_groups_by_a_margin_take_everything_once():
    values = np.random.default_rng(1).choice([0.0, 0.1, 0.5, 2.0], 101)
    groups = quantiles(values)
    np.testing.assert_array_equal(np.sum([*groups.values()], axis=0), np.ones(101))
    assert list(quantiles(np.zeros(3))) == ["0"]


def test_members_that_agree_and_members_that_do_not():
    found = comparisons([example([f"a{n}", f"b{n} c"], n, ranks=(0.0, 1.0)) for n in range(30)], ["f"])
    scores = np.random.default_rng(2).normal(size=(1, len(found.rows)))
    same = agreement(found, np.concatenate([scores] * 3))
    assert same.all == same.pairs == (1, 1, 1) and same.spread.mean == pytest.approx(0)
    odd = agreement(found, np.concatenate([scores, scores, -scores]))
    assert odd.all.mean == 0 and odd.pairs.mean == pytest.approx(1 / 3)
    size = np.abs(scores[0, found.better] - scores[0, found.worse]).mean()
    np.testing.assert_allclose(odd.spread.mean, size * math.sqrt(8) / 3, rtol=1e-9)


def test_best_of_n_by_a_proxy_that_is_the_gold_is_the_gold_curve():
    rng = np.random.default_rng(3)
    gold = rng.normal(size=(50, 8))
    found = proxies.curves({"same": gold, "noise": rng.normal(size=(50, 8))}, gold)
    assert [point.n for point in found["same"]] == [1, 2, 4, 8]
    assert found["same"] == found[proxies.GOLD]
    last = [found[name][-1].gold for name in ("same", "noise")]
    assert last[0] is not None and last[1] is not None and last[0].low > 1 > last[1].high
    assert found["noise"][0].gold == pytest.approx(found["same"][0].gold)  # one answer is no choice
    without = proxies.curves({"noise": gold[:, :6]})["noise"]
    assert [point.n for point in without] == [1, 2, 4, 6] and without[0].gold is None


# The program


def asked(place: pathlib.Path, **changes: Any) -> rewards.Judge:
    given: dict[str, Any] = {
        "models": (str(place / "ensemble"),), "rows": (str(place / "told.jsonl"),), "out": str(place / "out"),
    }  # fmt: skip
    return rewards.Judge(**given | changes)


def test_the_program_end_to_end(place, capsys):
    rows = tuple(str(place / name) for name in ("told.jsonl", "ranked.jsonl", "solutions.jsonl"))
    models = str(place / "ensemble"), str(place / "ensemble/members/seed=1"), str(place / "steps")
    program = asked(
        place, models=models, names=("both", "one", "<steps>"), rows=rows, gold="test_rewards:brevity", samples=4,
        policy=str(place / "model"), prompts=str(place / "asked.txt"), max_new_tokens=6,
    )  # fmt: skip
    rewards.main(program)
    found = json.loads((place / "out/results.json").read_text())
    ways = ["both: mean", "both: minimum", "both: mean less variance"]
    assert [(one["score"], one["rows"]) for one in found["views"]] == [
        (name, rows) for names in (ways, ["one"]) for rows in ("all rows", "told", "ranked") for name in names
    ]  # fmt: skip
    whole = found["views"][0]["judged"]
    assert whole["overall"]["count"] == 24 + 3 * 5 and set(whole["by"]["labeller"]) == {"ann", "bob"}
    assert 0 <= whole["ceiling"]["low"] <= whole["ceiling"]["mean"] <= whole["ceiling"]["high"] <= 1
    assert [one["rows"] for one in found["together"]] == ["all rows", "told", "ranked"]
    assert [one["score"] for one in found["picked"]] == [*ways, "both: member 1", "both: member 2", "one", "gold"]
    assert [point["n"] for point in found["picked"][0]["points"]] == [1, 2, 4]
    assert found["picked"][4]["points"] == found["picked"][5]["points"]  # seed=1 is the second member
    assert found["steps"][0]["judged"]["solutions"] == 8 and found["steps"][0]["judged"]["majority"]["mean"] == 0.75

    judged = lines(place / "out/judgements.jsonl")
    assert len(judged) == 2 * 39 + 8
    np.testing.assert_allclose(judged[0]["scores"]["both: mean"], np.mean(judged[0]["members"]))
    wins = [line["scores"]["one"] > 0 for line in judged if line["model"] == "one"]
    assert np.mean(wins) == pytest.approx(found["views"][9]["judged"]["overall"]["accuracy"]["mean"])
    page = (place / "out/report.html").read_text()
    titles = ("Reliability on all rows", "Accuracy by margin", "Score against length", "Best of n: known reward")
    assert all(title in page for title in titles) and "<steps>" not in page and "&lt;steps&gt;" in page
    assert "fill-opacity: 0.15" in page  # bands
    printed = capsys.readouterr().out
    assert "Members of ensembles" in printed and "wrote" in printed


def test_the_scores_are_those_that_the_runs_evaluation_saw(place):
    run = place / "ensemble/members/seed=0"
    held = {line["row"]: line for line in lines(run / "held_out.jsonl")}
    (policy,) = open_rewards(str(run))
    judge_of = evaluate.opened("one", str(run))
    read = dataset.read(Data(path=(str(place / "pairs.jsonl"),)), Encoder(policy.tokenizer), "ranking", 64)
    found = comparisons(read.kept, ["pairs"])
    scores = judge_of.scores(found.rows)[0]
    margins = dict(zip(found.where, scores[found.better] - scores[found.worse], strict=True))
    assert held and {row: margins[row] for row in held} == pytest.approx(
        {row: line["margin"] for row, line in held.items()}, abs=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": ()}, "no reward model to judge; give --models"),
        ({"rows": ()}, "there is nothing to judge on; give --rows=FILE"),
        ({"names": ("gold",)}, "must be 1 different names, one a model, and none 'gold'"),
        ({"gold": "gould"}, "there is no scorer 'gould'; the nearest is 'gold'"),
        ({"policy": "{}/model"}, "--policy and --prompts go together"),
        ({"policy": "{}/model", "prompts": "nowhere.txt"}, "there is no file nowhere.txt; check --prompts"),
        ({"rows": ("{}/nowhere.jsonl",)}, "there is no data file or folder .*; check --rows"),
        ({"rows": ("{}/told.jsonl",) * 2}, "names a file twice"),
        ({"rows": ("{}/asked.jsonl",)}, "asked.jsonl holds prompts without answers; give --rows files of pairs"),
        ({"rows": ("{}/solutions.jsonl",)}, "ensemble is judged on rows of pairs or rankings, and --rows holds none"),
        ({"models": ("{}/steps",)}, "steps is judged on rows of labelled steps, and --rows holds none"),
        ({"rows": ("{}/told.jsonl", "{}/solutions.jsonl")}, "none of --models is trained on such rows"),
        ({"lam": -1.0}, "--lam=-1.0 is not allowed"),
        ({"samples": 0}, "--samples=0 is not allowed"),
        ({"seed": -1}, "--seed=-1 is not allowed"),
        ({"models": ("{}/sft",)}, "holds a run of sft, whose model writes answers"),
    ],
)
def test_what_can_be_mended_is_one_sentence_before_anything_is_opened(place, monkeypatch, changes, says):
    write(place / "asked.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    (place / "sft").mkdir(exist_ok=True)
    (place / "sft/config.json").write_text(json.dumps(fields.to_dict(Config(algorithm="sft"))))
    monkeypatch.setattr(rewards, "opened", lambda *_, **__: pytest.fail("a model was opened"))
    put = lambda value: value.format(place) if isinstance(value, str) else value
    given = {k: tuple(map(put, v)) if isinstance(v, tuple) else put(v) for k, v in changes.items()}
    with pytest.raises(UserError, match=says):
        rewards.main(asked(place, **given))


def test_evaluate_takes_a_reward_model_as_its_scorer(place):
    program = evaluate.Compare(
        models=(str(place / "model"),), prompts=str(place / "asked.txt"), samples=2, max_new_tokens=4,
        reward=(str(place / "ensemble"), "minimum"), out=str(place / "evaluation"),
    )  # fmt: skip
    evaluate.main(program)
    rows = lines(place / "evaluation/answers.jsonl")
    by = evaluate.opened("least", str(place / "ensemble"), "minimum")
    expected = by([row["prompt"] for row in rows], [row["completion"] for row in rows])
    np.testing.assert_allclose([row["score"] for row in rows], expected, atol=1e-5)
    assert "ensemble, minimum" in (place / "evaluation/report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scorer": "gold", "reward": ("runs/rm",)}, "--scorer=gold and --reward=runs/rm both score; leave one away"),
        ({"reward": ("runs/rm", "median")}, "--reward=runs/rm,median is not understood; .* one of mean, minimum"),
        ({"reward": ("runs/rm", "mean", "x")}, "the variance's weight x must be a number"),
        ({"reward": ("runs/rm", "mean", "1", "2")}, "is not understood"),
    ],
)
def test_a_scorer_that_is_not_understood_is_one_sentence(changes, says):
    with pytest.raises(UserError, match=says):
        evaluate.scorer_of(evaluate.Compare(**changes))
