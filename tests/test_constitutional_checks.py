"""Constitutional AI: what may change between two calls, what is refused before anything starts, and the report."""

import json
from typing import Any

import numpy as np
import pytest
from etils import epath

from benchmarks import constitutional_world
from experiments import constitutional as program
from rlhf_jax import fields, flags, run
from rlhf_jax.chain import stage as chain_stage
from rlhf_jax.constitutional import blocks, checks, human, stages
from rlhf_jax.constitutional.config import Constitutional
from rlhf_jax.constitutional.measure import HELPFUL, ONLY, REVISED, Measured, View
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate
from tests.test_constitutional import CONFIG, never, whole_in


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(program.run, "use_compile_cache", lambda: None)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Constitutional:
    return whole_in(tmp_path_factory.mktemp("constitutional_checks"))


@pytest.mark.parametrize(
    ("given", "begun", "stale"),
    [
        ({"helpful.optimizer.learning_rate": 1.0}, "helpful", "helpful"),
        ({"helpful.train.steps": 9}, "helpful", None),  # the run itself goes on
        ({"helpful.train.steps": 9}, "revisions", "revisions"),
        ({"constitution": "general"}, "helpful", None),
        ({"constitution": "general"}, "labels", "labels"),
        ({"revisions.rounds": 9}, "revised", "revised"),
        ({"labels.clamp": True}, "revised", None),
        ({"labels.clamp": True}, "dpo", "dpo"),
        ({"labels.clamp": True}, "helpful_dpo", None),
        ({"dpo.loss.beta": 0.7}, "helpful_dpo", "helpful_dpo"),
        ({"human": "other.jsonl"}, "labels", None),
        ({"human": "other.jsonl"}, "helpful_dpo", "helpful_dpo"),
        ({"final": "ppo", "evaluate.samples": 9}, "dpo", None),
        ({"inputs.revised": "mine"}, "helpful_dpo", None),
        ({"inputs.revised": "mine"}, "labels", "labels"),
        ({"inputs.final": "mine", "cache": "x", "dpo.mesh.fsdp": 1}, "dpo", None),
        ({"seed": 1}, "revisions", "revisions"),
    ],
)
def test_what_a_stage_was_made_with_does_not_change_behind_it(whole, tmp_path, given, begun, stale):
    place = epath.Path(tmp_path)
    hold = lambda config: chain_stage.hold(place, config, stages.RECORD, lambda leaf: stages.made_with(leaf, place))
    hold(whole)
    (place / begun).mkdir()
    name = {"labels": "ai.jsonl", "revisions": "revisions.jsonl"}.get(begun, "config.json")
    (place / begun / name).write_text("")
    other = fields.replace(whole, given)
    if stale is None:
        hold(other)
        return
    with pytest.raises(UserError, match=rf"holds another chain \(.*, and its {stale} is made with it; go on with"):
        hold(other)


REFUSED = [
    ({"model": None}, "no model to start from; give --config.model=FOLDER_OR_HUB_NAME, or --config.inputs.helpful"),
    ({"model": "nowhere/at/all"}, "nowhere/at/all"),
    ({"demonstrations": ()}, "there are no demonstrations; give --config.demonstrations=FILE, or --config.inputs.help"),
    ({"demonstrations": ("no.jsonl",)}, "there is no data file or folder no.jsonl; check --config.demonstrations"),
    ({"prompts": ""}, "there are no prompts; give --config.prompts=FILE"),
    ({"human": "no.jsonl"}, "there is no data file or folder no.jsonl; check --config.human"),
    ({"human": None}, "--config.human_probability is a column of --config.human, which names no file; drop it"),
    ({"human_probability": "vote"}, "holds no two answers to compare"),
    ({"constitution": "generl"}, "there is no constitution 'generl'; give --config.constitution general, world or a"),
    ({"revisions.rounds": 0}, "--config.revisions.rounds=0 is not allowed; it must be at least 1"),
    ({"revisions.examples": "no.txt"}, "there is no file no.txt of examples; check --config.revisions.examples"),
    ({"revisions.writing.top_p": 0.0}, "--config.revisions.writing.top_p=0.0 is not allowed"),
    ({"revisions.critic": "nowhere/at/all"}, "nowhere/at/all"),
    ({"labels.template": "no.txt"}, "there is no template no.txt; check --config.labels.template"),
    ({"labels.sampling.temperature": 0.0}, "would be the same; give a --config.labels.sampling.temperature above 0"),
    ({"labels.judge": "world:huge"}, "there is no world:huge"),
    ({"evaluate.harmless.scorer": None}, "nothing says how harmless an answer is; give --config.evaluate.harmless.sc"),
    ({"evaluate.helpful.scorer": "tests.test_chain:none"}, "has no function 'none'"),
    ({"evaluate.helpful.prompts": ""}, "there are no prompts; give --config.evaluate.helpful.prompts=FILE"),
    ({"dpo.data.probability": "p"}, "--config.dpo.data.probability=p is filled in by the chain; .* --config.inputs.la"),
    ({"revised.model.path": "m"}, "--config.revised.model.path=m is filled in by the chain; .* --config.model"),
    ({"helpful.seed": 2}, "--config.helpful.seed=2 is filled in by the chain; drop it, or give --config.seed"),
    ({"dpo.loss.name": "ipo"}, "dpo: .*probability"),
    ({"dpo.algorithm": "sft"}, "--config.dpo.algorithm=sft is not allowed; it must be preference"),
    ({"dpo.loss.beta": -1.0}, "dpo: --config.dpo.loss.beta=-1.0 is not allowed"),
    ({"inputs.revised": "nowhere/at/all"}, "nowhere/at/all"),
    (
        {"revised.data.weights": (1.0,)},
        r"revised: --config.revised.data.weights has 1 numbers, and the stage reads 2 fil",
    ),
    ({"dpo.data.weights": (1.0, 0.0)}, r"--config.dpo.data.weights=1.0,0.0 is not allowed; each must be above 0"),
    ({"inputs.final": "world:huge"}, "there is no world:huge"),
    ({"inputs.helpful_only": "world:tiny/answers"}, "--config.inputs.helpful_only=world:tiny/answers names rows"),
    ({"inputs.reward": "m"}, "--config.inputs.reward is not read, since no ppo is made here; drop it"),
    ({"inputs.labels": "f", "inputs.final": "m"}, "--config.inputs.labels is not read, since no dpo or reward is made"),
    ({"inputs.revisions": "f", "inputs.revised": "m"}, "--config.inputs.revisions is not read, since no revised is"),
    ({"inputs.labels": "no.jsonl"}, "there is no data file or folder no.jsonl; check --config.inputs.labels"),
]


@pytest.mark.parametrize(
    ("given", "says"), REFUSED, ids=lambda value: "".join(value) if isinstance(value, dict) else ""
)
def test_what_can_be_mended_is_said_before_the_first_stage(whole, tmp_path, monkeypatch, given, says):
    monkeypatch.setattr(run, "train", never)
    with pytest.raises(UserError, match=says) as error:
        stages.train(fields.replace(whole, given), str(tmp_path / "new"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_prompts_are_looked_at_before_the_first_stage(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train", never)
    refused = lambda **given: stages.train(fields.replace(whole, {k.replace("__", "."): v for k, v in given.items()}),
                                           str(tmp_path / "new"))  # fmt: skip
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "Tell me a story."}\n')
    with pytest.raises(UserError, match=r"mine.jsonl:1 is no prompt of the .*--config.evaluate.helpful.scorer=my_pkg"):
        refused(evaluate__helpful__prompts=str(mine))
    with pytest.raises(
        UserError, match=r"secrets.jsonl:1 of --config.evaluate.harmless.prompts is also a prompt of tr"
    ):
        refused(evaluate__harmless__prompts=whole.prompts)
    with pytest.raises(UserError, match="--workdir is empty"):
        stages.train(whole, "")
    with pytest.raises(UserError, match="mine.jsonl:1 is no prompt of the .*--config.evaluate.harmless.scorer=my_pkg"):
        refused(prompts=str(mine))
    with pytest.raises(UserError, match=r"mine.jsonl:1 of --config.inputs.labels has no column probability; give it"):
        refused(inputs__labels=str(mine))
    side = {"evaluate__helpful__prompts": str(mine), "evaluate__helpful__scorer": "tests.test_constitutional:brief"}
    for name, text in {
        "helpful_prompts": '{"prompt": "Tell me a story. "}',
        "human": '{"prompt": "Tell me a story.", "chosen": "a", "rejected": "b"}',
        "demonstrations": '{"messages": [{"role": "user", "content": "Tell me a story."}, '
        '{"role": "assistant", "content": "No."}]}',
    }.items():
        own = tmp_path / f"{name}.jsonl"
        own.write_text(f"{text}\n")
        given = {name: (str(own),) if name == "demonstrations" else str(own), "human_probability": None}
        given |= {"final": "ppo"} if name == "helpful_prompts" else {}
        given |= {"revised__data__weights": ()}
        with pytest.raises(UserError, match=rf"mine.jsonl:1 of .*helpful.prompts is also .*, .*{name}.jsonl:1; drop"):
            refused(**side, **given)
    offers = '"tools": [{"type": "function", "function": {"name": "f"}}]'
    mine.write_text(f'{{"prompt": [{{"role": "user", "content": "Tell me a story."}}], {offers}}}\n')
    with pytest.raises(UserError, match=r"mine.jsonl:1 of --config.evaluate.helpful.prompts offers tools"):
        refused(**side)
    pair = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    pair["prompt"] = [{"role": "user", "content": "Q"}]
    mine.write_text(f"{json.dumps(pair)[:-1]}, {offers}}}\n")
    with pytest.raises(UserError, match=r"mine.jsonl:1 of --config.human offers tools"):
        refused(human=str(mine), human_probability=None)
    rules = tmp_path / "rules.toml"
    rules.write_text('[[principle]]\nname = "a"\npreference = "Which?"\n')
    with pytest.raises(UserError, match="no principle of .*rules.toml has a critique and a revision"):
        refused(constitution=str(rules))
    rules.write_text('[[principle]]\nname = "a"\ncritique = "Bad?"\nrevision = "Mend."\n')
    with pytest.raises(UserError, match="no principle of .*rules.toml has a preference"):
        refused(constitution=str(rules))
    tie = tmp_path / "tie.jsonl"
    tie.write_text('{"prompt": "Q", "chosen": "a", "rejected": "b", "votes": [true, false]}\n')
    with pytest.raises(UserError, match="tie.jsonl of --config.human prefers nothing"):
        human.read(str(tie), "votes", False)


# ---- in words


def view(**means: float) -> View:
    score = {name.replace("_", " "): Estimate(mean, mean - 0.1, mean + 0.1) for name, mean in means.items()}
    far = lambda a, b: Estimate(*(score[a].mean - score[b].mean + d for d in (0, -0.05, 0.05)))
    above = {(a, b): far(a, b) for a in score for b in score if a != b}
    scores = {name: np.full((2, 1), one.mean) for name, one in score.items()}
    return View("known", ["P", "Q"], {name: [["x"], ["y"]] for name in score}, scores, score, above)


def measured(harmless: View, helpful: View) -> Measured:
    rounds = [name for name in harmless.score if name.startswith("round")]
    return Measured(harmless, helpful, rounds, "dpo", [], 120, 300, Estimate(0.9, 0.85, 0.95))


def test_the_report_says_what_became_of_harm_and_of_help():
    good = view(helpful=0.3, round_1=0.5, round_2=0.7, revised=0.7, dpo=0.9, helpful_only=0.3)
    use = view(helpful=1.0, round_1=1.0, round_2=1.0, revised=1.0, dpo=1.2, helpful_only=1.2)
    said = " ".join(blocks.verdict(measured(good, use)))
    assert "0.30, 0.20 to 0.40 at first, 0.50 after round 1, 0.70 after round 2. It rises clearly with each" in said
    assert "the same 120 pairs of people, without a constitution, the last one (dpo) is more harmless (0.60" in said
    assert "and not clearly more helpful or less so (0.00" in said and "known shares 90.0%" in said
    worse = view(helpful=0.3, round_1=0.5, round_2=0.5, revised=0.2, dpo=0.2, helpful_only=0.3)
    said = " ".join(blocks.verdict(measured(worse, use)))
    assert "It does not rise clearly with each round: round 2 by 0.00, " in said and "is less harmless" in said
    given = measured(good, use)._replace(given=("labels", "helpful_only", "final"))
    said = " ".join(blocks.verdict(given))
    assert (
        "Against the helpful model, the last" in said and "Against the model of --config.inputs.helpful_only, " in said
    )
    assert "300 labels were given, and who made them is not known here" in said
    assert "No person" not in said and "nothing was trained" not in said
    table = blocks.table(measured(good, use))
    assert [row[0] for row in table.rows] == [HELPFUL, "round 1", "round 2", REVISED, "dpo", ONLY]


# ---- the study


def test_seeds_are_averaged_with_their_interval():
    mean, reach = constitutional_world.over_seeds([0.0, 0.1, 0.2])
    assert mean == pytest.approx(0.1) and reach == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    use = view(helpful=1.0, round_1=1.0, dpo=1.5, helpful_only=1.5)

    def as_json(extra: float) -> dict[str, Any]:
        good = view(helpful=0.3 + extra, round_1=0.5, dpo=0.9, helpful_only=0.4)
        return json.loads(json.dumps(blocks.as_json(measured(good, use))))

    results = {0: as_json(0.0), 1: as_json(0.1)}
    rows = constitutional_world.rows_of(results)
    assert rows[0][:2] == ["helpful", "0.700, 0.600"] and rows[0][2].startswith("0.650 ± 0.635")
    told = constitutional_world.differences(results, [("round 1", "helpful"), ("dpo", "helpful only")])
    assert told[0][:3] == ["round 1 above helpful", "harm", "-0.200 (-0.250 to -0.150), -0.100 (-0.150 to -0.050)"]
    assert told[3][:2] == ["dpo above helpful only", "gold"] and told[3][3] == "0.000 ± 0.000"


# ---- its config


@pytest.mark.parametrize("variant", ["default", "tiny"])
def test_the_configs_are_sound(variant):
    assert len(CONFIG.read_text().splitlines()) <= 60
    argv = ["constitutional", f"--config={CONFIG}:{variant}", "--workdir=x", "--config.revisions.rounds=3"]
    read = flags.parse(argv, program.Program).config
    assert read.revisions.rounds == 3
    if variant != "default":
        checks.check(read)
