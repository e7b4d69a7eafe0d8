"""The chain, small: all of it, stopped anywhere and continued, with any stage left out, and what it refuses."""

import json
import pathlib
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from experiments import chain as program
from experiments.chain import run_chain
from rlhf_jax import fields, flags, run, worlds
from rlhf_jax.chain import blocks, checks, labels, stages
from rlhf_jax.chain.config import Chain
from rlhf_jax.chain.measure import Measured
from rlhf_jax.data import world_rows
from rlhf_jax.data.prompts import Asked
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.compare import Result
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.evaluate.proxies import Point
from rlhf_jax.members import Member
from tests import tiny
from tests.test_run import arrays, lines

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "chain.py"
STEPS = {"sft": 2, "reward": 2, "ppo": 4, "dpo": 2}


def rising(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(program.run, "use_compile_cache", lambda: None)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Chain:
    """On prompts of the world, from a tiny model of random weights."""
    place = tmp_path_factory.mktemp("chain")
    tiny.write_model(place / "model", tiny.CONFIG | {"max_position_embeddings": 96, "num_hidden_layers": 1})
    facts = lambda count, split: world_rows.prompts(count, 0, split, kinds=("fact",))
    worlds.write(epath.Path(place / "prompts.jsonl"), facts(12, "train"))
    worlds.write(epath.Path(place / "held_out.jsonl"), facts(6, "held_out"))
    worlds.write(epath.Path(place / "told.jsonl"), world_rows.demonstrations(12, 0))
    given: dict[str, Any] = {
        "cache": str(place / "cache"), "prompts": str(place / "prompts.jsonl"), "labels.answers": 2,
        "labels.rankings": 2, "labels.sampling.max_new_tokens": 6, "evaluate.sampling.max_new_tokens": 6,
        "evaluate.prompts": str(place / "held_out.jsonl"), "evaluate.samples": 2, "evaluate.best_of": 2,
        "evaluate.scorer": "gold", "sft.model.path": str(place / "model"),
        "sft.data.path": (str(place / "told.jsonl"),),
        "ppo.rollout.max_new_tokens": 6, "ppo.rollout.minibatches": 2, "ppo.rollout.samples": 2,
        "ppo.checkpoint.every": 1, "ppo.checkpoint.keep_last": 4, "ppo.data.eval_share": 0.25,
        "reward.data.eval_share": 0.3, "sft.data.eval_share": 0.0, "dpo.data.eval_share": 0.0,
    }  # fmt: skip
    for stage, steps in STEPS.items():
        given |= {f"{stage}.train.steps": steps, f"{stage}.train.batch_size": 4, f"{stage}.mesh.data": 1}
        given |= {f"{stage}.optimizer.learning_rate": 1e-2, f"{stage}.evaluate.every": 0}
        given |= {f"{stage}.log.tensorboard": False, f"{stage}.log.progress": False, f"{stage}.data.buckets": (96,)}
    return fields.replace(Chain(), given)


@pytest.fixture(scope="session")
def whole(chain, tmp_path_factory) -> pathlib.Path:
    """What a chain leaves that nothing stops."""
    place = tmp_path_factory.mktemp("whole")
    assert run_chain(chain, str(place), "the command") is not None
    return place


def never(*arguments: object, **named: object) -> None:
    raise AssertionError("nothing was to be done")


# ---- the whole


def test_the_whole_chain_ends_in_a_report(whole):
    told = json.loads((whole / "results.json").read_text())
    assert [row[0] for row in told["table"]["rows"]] == ["sft", "ppo", "dpo", "best of 2"]
    assert told["table"]["columns"][-1] == "reward model"
    assert [point["at"] for point in told["frontier"]["ppo"]] == ["sft", *(f"step {n}" for n in range(1, 5))]
    assert [point["at"] for point in told["frontier"]["best of n"]] == ["n 1", "n 2"]
    page = (whole / "report.html").read_text()
    for words in (
        "the command",
        "Gold reward against KL",
        "Calibration",
        "Answers side by side",
        "rollouts",
        "ppo.train",
    ):
        assert words in page
    assert len(lines(whole / "answers.jsonl")) == 6 * (3 * 2 + 1)
    rows = lines(whole / "labels" / "rankings.jsonl")
    assert {len(row["completions"]) for row in rows} == {2} and len(rows) == 24
    rests, of = told["labels"], Counter(str(row["labeller"]) for row in rows)
    assert {one["name"]: one["judgements"] for one in rests["people"]} == of and len(of) > 1
    assert {one["kind"] for one in rests["people"]} == {"simulated person"}
    assert rests["stages"]["dpo"] == {"trained": 24, "held_out": 0, "left_out": 0}
    reward = rests["stages"]["reward"]
    assert reward["trained"] + reward["held_out"] == 24 and reward["held_out"] > 0 == reward["left_out"]
    assert "24 rankings of the answers to 12 prompts, by" in told["verdict"][-1] and told["verdict"][-1] in page


def test_a_second_call_does_nothing_anew(chain, whole, monkeypatch, capsys):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    for module, name in ((stages, "train"), (program, "measure"), (run, "train")):
        monkeypatch.setattr(module, name, never)
    assert run_chain(chain, str(whole), "another command") == json.loads((whole / "results.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before
    assert "finished" in capsys.readouterr().out


class Killed(Exception):
    """Stands for the machine being taken away."""


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
def test_stopped_anywhere_it_goes_on_to_the_same_bits(chain, whole, tmp_path, monkeypatch):
    step, write, place = Member.write, worlds.write, tmp_path / "stopped"

    def stopped(stage: str, at: int):
        def written(self: Member, number: int, values: dict[str, Any]) -> None:
            if self.built.workdir.name == stage and number == at:
                raise Killed
            step(self, number, values)

        return written

    def half(file: epath.Path, rows: Any) -> None:
        write(file, rows[:3])
        raise Killed

    # In a stage, while rankings are written, between two stages, between minibatches of a rollout, before the report.
    for owner, name, value in (
        (Member, "write", stopped("sft", 1)), (worlds, "write", half), (Member, "write", stopped("reward", 1)),
        (Member, "write", stopped("ppo", 0)), (Member, "write", stopped("ppo", 2)), (program, "measure", killed),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, value)
            run_chain(chain, str(place), "the command")
    run_chain(chain, str(place), "the command")
    assert (place / "labels/rankings.jsonl").read_bytes() == (whole / "labels/rankings.jsonl").read_bytes()
    ours, theirs = (arrays(folder / "ppo", 4) for folder in (place, whole))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (place, whole))
    assert ours == theirs


def killed(*arguments: object) -> None:
    raise Killed


# ---- what is left out


def done(whole: pathlib.Path, stage: str) -> str:
    """What a stage of the whole chain left."""
    ends = {"sft": "sft/model-2", "labels": "labels/rankings.jsonl"}
    return str(whole / ends.get(stage, stage))


@pytest.mark.parametrize("left", ["sft", "labels", "reward", "ppo", "dpo", "reward,dpo"])
def test_a_stage_whose_product_is_named_is_left_out(chain, whole, tmp_path, monkeypatch, left):
    seen = []
    monkeypatch.setattr(stages, "_trained", lambda chain, stage, *more: seen.append(stage) or done(whole, stage))
    monkeypatch.setattr(stages, "_label", lambda *more: seen.append("labels") or done(whole, "labels"))
    named = {f"inputs.{stage}": done(whole, stage) for stage in left.split(",")}
    found = stages.train(fields.replace(chain, named), str(tmp_path))
    assert found is not None
    # Rankings that nothing is trained on aren't made.
    without = {*left.split(",")} | ({"labels"} if left == "reward,dpo" else set())
    assert seen == [stage for stage in ("sft", "labels", "reward", "ppo", "dpo") if stage not in without]
    for stage in left.split(","):
        assert getattr(found, stage) == named[f"inputs.{stage}"]


def test_models_that_are_all_there_are_compared(chain, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train", never)
    named = {f"inputs.{stage}": done(whole, stage) for stage in ("sft", "reward", "ppo", "dpo")}
    told = run_chain(fields.replace(chain, named), str(tmp_path), "the command")
    before = json.loads((whole / "results.json").read_text())
    assert told is not None
    assert told["verdict"][-1].startswith("Nothing was trained on judgements here. Nothing here says whose judgements")
    assert told["models"] == before["models"] and told["proxy"].items() <= before["proxy"].items()


def test_an_sft_run_is_written_out_for_those_that_start_from_it(chain, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "_trained", lambda chain, stage, place, products: products["sft"])
    given = {"inputs.sft": f"{whole / 'sft'}@2", "inputs.labels": done(whole, "labels")}
    found = stages.train(fields.replace(chain, given), str(tmp_path))
    assert found is not None and found.ppo == found.sft == str(tmp_path / "sft" / "model-2")
    ours, theirs = (worlds.open_subject("sft", path).params for path in (found.sft, done(whole, "sft")))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# ---- rankings


def test_people_rank_in_a_file_and_the_chain_goes_on(chain, whole, tmp_path, monkeypatch, capsys):
    given = {"inputs.sft": done(whole, "sft"), "labels.by": "people", "labels.rankings": Chain().labels.rankings}
    blank = fields.replace(chain, given)
    monkeypatch.setattr(stages, "_trained", lambda chain, stage, *more: done(whole, stage))
    for _ in range(2):  # the second time there is nothing to draw
        assert run_chain(blank, str(tmp_path), "the command") is None
        told = capsys.readouterr().out
        assert "fill in ranks" in told and f"{tmp_path / 'labels' / 'blank.jsonl'}" in told
        assert "--config.inputs.labels=COPY" in told
        monkeypatch.setattr(labels, "collect", never)
    rows = lines(tmp_path / "labels" / "blank.jsonl")
    assert len(rows) == 12 and all(row["ranks"] is row["labeller"] is None for row in rows)
    copy = tmp_path / "mine.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    filled = fields.replace(blank, {"inputs.labels": str(copy)})
    with pytest.raises(UserError, match=r"mine.jsonl:1 has no ranks; fill them in"):
        stages.train(filled, str(tmp_path))
    copy.write_text("".join(json.dumps(row | {"ranks": [0, 1], "labeller": "ann"}) + "\n" for row in rows))
    found = stages.train(filled, str(tmp_path))
    assert found is not None and found.labels == str(copy)


def test_a_scorer_ranks_with_the_noise_of_bradley_and_terry():
    asked, answers = [Asked(f"f:{n}", f"Q{n}") for n in range(400)], [[" a", " bb", " a"]] * 400
    rows = labels.by_scorer(asked, answers, rising, count=5, scale=0.5, seed=0)
    assert len(rows) == 2000 and rows[0]["scores"] == [2.0, 3.0, 2.0]
    assert all(row["ranks"][0] == row["ranks"][2] for row in rows)
    followed = np.mean([row["ranks"][1] == 0 for row in rows])
    assert followed == pytest.approx(1 / (1 + np.exp(-1 / 0.5)), abs=3 * 0.0074)
    assert labels.by_scorer(asked, answers, rising, count=5, scale=0.5, seed=0) == rows
    assert labels.by_scorer(asked, answers, rising, count=5, scale=0.5, seed=1) != rows
    still = labels.by_scorer(asked[:1], [[" a", " bb", " c", ""]], rising, count=1, scale=0.0, seed=0)
    assert still[0]["completions"] == [" a", " bb", " c"] and still[0]["ranks"] == [1.0, 0.0, 1.0]


# ---- what is refused

REFUSED = [
    ({"sft.model.path": None}, "no model to start from; give --config.sft.model.path=FOLDER_OR_HUB_NAME, or"),
    ({"sft.model.path": "nowhere/at/all"}, "sft: .*nowhere/at/all"),
    ({"sft.data.path": ()}, "there are no demonstrations; give --config.sft.data.path"),
    ({"sft.data.path": ("no.jsonl",)}, "sft: there is no data file or folder no.jsonl; check --config.sft.data.path"),
    ({"sft.seed": 1}, "--config.sft.seed=1 is filled in by the chain; drop it, or give --config.seed in its place"),
    ({"ppo.cache": "x"}, "--config.ppo.cache=x is filled in by the chain; drop it, or give --config.cache"),
    ({"dpo.model.path": "m"}, "--config.dpo.model.path=m is filled in by the chain; .* --config.inputs.sft"),
    ({"reward.data.path": ("a", "b")}, "--config.reward.data.path=a,b is filled in .* --config.inputs.labels"),
    ({"ppo.data.path": ("p",)}, "--config.ppo.data.path=p is filled in by the chain; .* --config.prompts"),
    ({"ppo.rewards.model": "rm"}, "--config.ppo.rewards.model=rm is filled in .* --config.inputs.reward"),
    ({"ppo.model.init": "random"}, "--config.ppo.model.init=random is filled in by the chain"),
    ({"dpo.algorithm": "sft"}, "--config.dpo.algorithm=sft is not allowed; it must be preference"),
    ({"ppo.ppo.kl": -1.0}, "ppo: --config.ppo.ppo.kl=-1.0 is not allowed; it must be at least 0"),
    ({"reward.loss.name": "dpo"}, "reward: algorithm 'reward' can't run the loss 'dpo'; choose --config.reward.loss"),
    ({"ppo.data.eval_path": ("no.jsonl",)}, "ppo: there is no data file or folder no.jsonl"),
    ({"reward.reward.members": 0}, "reward: --config.reward.reward.members=0 is not allowed"),
    ({"labels.answers": 1}, "--config.labels.answers=1 is not allowed; it must be at least 2"),
    ({"labels.scale": -1.0, "labels.by": "gold"}, "--config.labels.scale=-1.0 is not allowed; it must be at least 0"),
    ({"labels.scale": 2.0}, "--config.labels.by=world does not read --config.labels.scale; drop it"),
    ({"labels.by": "people"}, "--config.labels.by=people does not read --config.labels.rankings; drop it"),
    ({"labels.by": "gold", "labels.labellers": 4}, "--config.labels.by=gold does not read --config.labels.labellers"),
    ({"labels.by": "golden"}, "there is no way to rank 'golden'; the nearest is 'gold'"),
    ({"labels.sampling.temperature": 0.0}, "would be the same; give a --config.labels.sampling.temperature above 0"),
    ({"labels.sampling.top_p": 0.0}, "--config.labels.sampling.top_p=0.0 is not allowed"),
    ({"evaluate.best_of": 1}, "--config.evaluate.best_of=1 is not allowed; it must be at least 2"),
    ({"evaluate.sampling.top_k": 5}, "rewards are shown against the KL"),
    ({"evaluate.scorer": "tests.test_chain:none"}, "has no function 'none'"),
    ({"evaluate.prompts": ""}, "there are no prompts; give --config.evaluate.prompts=FILE"),
    ({"prompts": "no.jsonl"}, "there is no file no.jsonl; check --config.prompts"),
    ({"prompts": __file__}, "--config.prompts=.*test_chain.py must hold rows with a column prompt or messages"),
    ({"inputs.labels": "no.jsonl"}, "there is no data file or folder no.jsonl; check --config.inputs.labels"),
    ({"inputs.sft": "nowhere/at/all"}, "nowhere/at/all"),
    ({"inputs.reward": "nowhere/at/all"}, "nowhere/at/all"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "says"), REFUSED, ids=lambda value: "".join(value) if isinstance(value, dict) else ""
)
def test_what_can_be_mended_is_said_before_the_first_stage(chain, tmp_path, monkeypatch, given, says):
    monkeypatch.setattr(run, "train", never)
    with pytest.raises(UserError, match=says) as error:
        stages.train(fields.replace(chain, given), str(tmp_path / "new"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_prompts_are_looked_at_before_the_first_stage(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train", never)
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "Tell me a story."}\n')
    with pytest.raises(UserError, match=r"mine.jsonl:1 is no prompt of the synthetic world.*--config.labels.by=people"):
        stages.train(fields.replace(chain, {"prompts": str(mine)}), str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"prompts.jsonl:1 of --config.evaluate.prompts is also a prompt of training"):
        stages.train(fields.replace(chain, {"evaluate.prompts": chain.prompts}), str(tmp_path / "new"))
    with pytest.raises(UserError, match="there is no world:huge"):
        stages.train(fields.replace(chain, {"dpo.data.eval_path": ("world:huge/rankings",)}), str(tmp_path / "new"))
    with pytest.raises(UserError, match="--workdir is empty"):
        stages.train(chain, "")
    monkeypatch.setattr(stages.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="a chain runs on one process, and here are 2"):
        stages.train(chain, str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("given", "begun", "stale"),
    [
        ({"sft.optimizer.learning_rate": 1.0}, "sft", "sft"),
        ({"sft.train.steps": 9}, "sft", None),  # the run itself goes on
        ({"sft.train.steps": 9}, "labels", "labels"),
        ({"sft.data.eval_share": 0.5}, "ppo", "ppo"),
        ({"sft.log.wandb_project": "x", "cache": "x", "reward.mesh.fsdp": 1}, "dpo", None),
        ({"labels.answers": 4}, "labels", "labels"),
        ({"labels.answers": 4}, "sft", None),
        ({"reward.train.steps": 9}, "dpo", None),
        ({"reward.train.steps": 9}, "ppo", "ppo"),
        ({"ppo.ppo.kl": 0.5}, "dpo", None),
        ({"ppo.ppo.kl": 0.5}, "ppo", "ppo"),
        ({"dpo.train.steps": 9, "evaluate.samples": 9}, "dpo", None),
        ({"seed": 1}, "sft", "sft"),
        ({"prompts": "other.jsonl"}, "sft", None),
        ({"prompts": "other.jsonl"}, "labels", "labels"),
        ({"inputs.sft": "mine"}, "sft", None),
        ({"inputs.sft": "mine"}, "reward", "reward"),
        ({"inputs.ppo": "mine"}, "ppo", None),
    ],
)
def test_what_a_stage_was_made_with_does_not_change_behind_it(chain, tmp_path, given, begun, stale):
    place = epath.Path(tmp_path)
    stages.open_chain(place, chain)
    (place / begun).mkdir()
    (place / begun / ("rankings.jsonl" if begun == "labels" else "config.json")).write_text("")
    other = fields.replace(chain, given)
    if stale is None:
        stages.open_chain(place, other)
        assert fields.from_dict(Chain, json.loads((place / stages.RECORD).read_text())) == other
        return
    with pytest.raises(UserError, match=rf"holds another chain \(.*, and its {stale} is made with it; go on with"):
        stages.open_chain(place, other)
    assert fields.from_dict(Chain, json.loads((place / stages.RECORD).read_text())) == chain


# ---- in words


def result(name: str, score: float, spread: float = 0.01, kl: float = 1.0) -> Result:
    one, values = Estimate(score, score - 0.1, score + 0.1), score + spread * np.arange(4.0)[:, None]
    gain = Estimate(score - 1, score - 1.1, score - 0.9)
    far = Estimate(kl, kl, kl)
    return Result(name, [[""]] * 4, values, one, gain, one, far, one, 1.0, None, values)


def measured(known: bool = True, **scores: float) -> Measured:
    results = [result("sft", 1.0), *(result(name, value) for name, value in scores.items())]
    proxy = {r.name: r.score for r in results} | {"ppo@2": Estimate(0.5, 0.4, 0.6)}
    trail = [(2, result("ppo@2", 1.9), proxy["ppo@2"]), (4, results[1], proxy["ppo"])]
    zero = Estimate(0.0, 0.0, 0.0)
    point = Point(1, 0.0, zero if known else None, zero)
    return Measured(["Q"], "gold reward", known, results, proxy, {"ppo": trail}, [point], None)


def test_the_report_says_who_is_ahead():
    said = " ".join(blocks.verdict(measured(ppo=1.5, dpo=2.0, best=1.9)))
    assert "By the gold reward dpo is ahead: 2.00 (1.90 to 2.10), where sft has 1.00" in said
    assert "It is above best by 0.10 (0.10 to 0.10)" in said and "It is above ppo by 0.50" in said
    assert "ppo was best at step 2; by step 4 its gold reward had fallen by 0.40" in said
    assert "score rose from 0.500 to 1.50" in said
    said = " ".join(blocks.verdict(measured(ppo=2.0, dpo=2.0, best=1.0)))
    assert "By the gold reward ppo is ahead" in said and "Between it and dpo there is no clear difference" in said
    assert "was best at" not in said
    said = " ".join(blocks.verdict(measured(ppo=1.05, dpo=0.5, best=1.0)))
    assert "nothing is clearly above sft, 1.00 (0.90 to 1.10): the best, ppo, has 1.05" in said
    said = " ".join(blocks.verdict(measured(known=False, ppo=2.0, dpo=1.0, best=1.0)))
    assert "No reward is known here" in said


# ---- its config


@pytest.mark.parametrize("variant", ["default", "tiny", "small"])
def test_the_configs_are_sound(variant):
    assert len(CONFIG.read_text().splitlines()) <= 60
    argv = ["chain", f"--config={CONFIG}:{variant}", "--workdir=x", "--config.ppo.ppo.kl=0.25"]
    read = flags.parse(argv, program.Program).config
    assert read.ppo.ppo.kl == 0.25
    if variant != "default":
        checks.check(read)
