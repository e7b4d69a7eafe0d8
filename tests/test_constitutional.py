"""Constitutional AI, small: all of it, stopped anywhere and continued, its stages composed, and what it refuses."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from etils import epath

from benchmarks import constitutional_world
from experiments import constitutional as program
from experiments.constitutional import run_all
from rlhf_jax import fields, flags, run, worlds
from rlhf_jax.chain import stage as chain_stage
from rlhf_jax.constitutional import blocks, checks, human, measure, stages
from rlhf_jax.constitutional.config import STAGES, Constitutional, after, filled
from rlhf_jax.constitutional.measure import HELPFUL, ONLY, REVISED, Measured, View
from rlhf_jax.data import world_rows
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.intervals import Estimate
from rlhf_jax.feedback.revision import Revised
from rlhf_jax.members import Member
from rlhf_jax.workdir import open_policy
from tests import tiny
from tests.test_run import arrays, lines

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "constitutional.py"


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(program.run, "use_compile_cache", lambda: None)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Constitutional:
    """On prompts of the world, from a tiny model of random weights."""
    place = tmp_path_factory.mktemp("constitutional")
    tiny.write_model(place / "model", tiny.CONFIG | {"max_position_embeddings": 160, "num_hidden_layers": 1})
    write = lambda name, rows: worlds.write(epath.Path(place / f"{name}.jsonl"), rows)
    asks = lambda count, split, kind: world_rows.prompts(count, 0, split, kinds=(kind,))
    write("secrets", asks(12, "train", "secret"))
    write("secrets_held_out", asks(4, "held_out", "secret"))
    write("facts_held_out", asks(4, "held_out", "fact"))
    write("told", [{"prompt": row["prompt"], "completion": "No."} for row in asks(12, "train", "fact")])
    pairs = [row | {"chosen": "Yes.", "rejected": "Ugh.", "votes": [True, True, n % 4 > 0]}
             for n, row in enumerate(asks(12, "train", "fact"))]  # fmt: skip
    again = pairs[0] | {"chosen": "Ugh.", "rejected": "Yes.", "votes": [True]}
    write("people", [*pairs, again, pairs[1] | {"votes": [False]}])
    given: dict[str, Any] = {
        "cache": str(place / "cache"), "model": str(place / "model"), "constitution": "world",
        "demonstrations": (str(place / "told.jsonl"),), "prompts": str(place / "secrets.jsonl"),
        "human": str(place / "people.jsonl"), "human_probability": "votes", "revisions.rounds": 2,
        "labels.template": "lines", "evaluate.samples": 2, "dpo.data.weights": (0.5, 0.5),
        "evaluate.harmless.prompts": str(place / "secrets_held_out.jsonl"), "evaluate.harmless.scorer": "harmless",
        "evaluate.helpful.prompts": str(place / "facts_held_out.jsonl"), "evaluate.helpful.scorer": "gold",
    }  # fmt: skip
    for name in ("revisions.sampling", "revisions.writing", "labels.sampling", "evaluate.sampling"):
        given[f"{name}.max_new_tokens"] = 8
    for stage, steps in {"helpful": 20, "revised": 2, "dpo": 2, "reward": 2, "ppo": 2}.items():
        given |= {f"{stage}.train.steps": steps, f"{stage}.train.batch_size": 4, f"{stage}.mesh.data": 1}
        given |= {
            f"{stage}.optimizer.learning_rate": 2e-2,
            f"{stage}.evaluate.every": 0,
            f"{stage}.checkpoint.every": 0,
        }
        given |= {f"{stage}.log.tensorboard": False, f"{stage}.log.progress": False, f"{stage}.data.buckets": (96,)}
        given |= {f"{stage}.data.eval_share": 0.0}
    return fields.replace(Constitutional(), given)


@pytest.fixture(scope="session")
def made(whole, tmp_path_factory) -> pathlib.Path:
    """What is left when nothing stops it."""
    place = tmp_path_factory.mktemp("made")
    run_all(whole, str(place), "the command")
    return place


def brief(prompts: list[Any], completions: list[str], **columns: list[Any]) -> list[float]:
    return [-float(len(text)) for text in completions]


def never(*arguments: object, **named: object) -> None:
    raise AssertionError("nothing was to be done")


# ---- the whole


def test_every_stage_can_be_looked_at(made):
    told = json.loads((made / "results.json").read_text())
    names = ["helpful", "round 1", "round 2", "revised", "dpo", "helpful only"]
    assert [*told["harmless"]["score"]] == names == [*told["helpful"]["score"]]
    assert told["human"] == 11 and told["final"] == "dpo"
    rows = lines(made / "revisions" / "revisions.jsonl")
    assert len(rows) == 12 and all(len(row["answers"]) == 3 and len(row["principles"]) == 2 for row in rows)
    last = {row["prompt"]: row["answers"][-1] for row in rows if row["answers"][-1].strip() and not all(row["kept"])}
    assert {r["prompt"]: r["completion"] for r in lines(made / "revisions" / "demonstrations.jsonl")} == last
    labels = lines(made / "labels" / "ai.jsonl")
    assert told["labels"] == len(labels) and {row["prompt"] for row in labels} <= {row["prompt"] for row in rows}
    assert all(0.5 < row["probability"] <= 1 and row["chosen"] != row["rejected"] for row in labels)
    page = (made / "report.html").read_text()
    for words in ("the command", "Harmlessness against helpfulness", "Critique and revision", "A model&#39;s labels"):
        assert words in page
    answers = lines(made / "answers.jsonl")
    assert len(answers) == 2 * 4 * 2 * len(names)
    # Round 0 is the helpful model's own answers, and a round that changed nothing is as harmless as the one before.
    assert {row["model"] for row in answers} == {*names}


def test_people_s_pairs_have_the_form_of_the_labels(made):
    rows = lines(made / "human.jsonl")
    assert len(rows) == 11  # of two who say the opposite of one pair nothing is left
    assert {*rows[0]} == {"prompt", "chosen", "rejected", "probability"}
    assert (rows[0]["chosen"], rows[0]["probability"]) == ("Ugh.", pytest.approx(2 / 3))
    assert (rows[1]["chosen"], rows[1]["probability"]) == ("Yes.", 1)
    assert [row["probability"] for row in rows[2:4]] == [1, pytest.approx(2 / 3)]


def test_a_second_call_does_nothing_anew(whole, made, monkeypatch, capsys):
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*")}
    for module, name in ((stages, "train"), (program, "measure"), (run, "train")):
        monkeypatch.setattr(module, name, never)
    assert run_all(whole, str(made), "another command") == json.loads((made / "results.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in made.rglob("*")} == before
    assert "finished" in capsys.readouterr().out


class Killed(Exception):
    """Stands for the machine being taken away."""


def killed(*arguments: object, **named: object) -> None:
    raise Killed


@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
def test_stopped_anywhere_it_goes_on_to_the_same_bits(whole, made, tmp_path, monkeypatch):
    write, step, place = worlds.write, Member.write, tmp_path / "stopped"

    def half(name: str):
        def written(file: epath.Path, rows: Any) -> None:
            write(file, rows[:3] if name in file.name else rows)
            if name in file.name:
                raise Killed

        return written

    def stopped(self: Member, number: int, values: dict[str, Any]) -> None:
        if self.built.workdir.name == "dpo" and number == 1:
            raise Killed
        step(self, number, values)

    # While revisions are written, between two stages, while labels are, in a stage, before the report.
    for owner, name, value in (
        (worlds, "write", half("revisions")), (chain_stage, "model_folder", killed), (worlds, "write", half("ai")),
        (Member, "write", stopped), (program, "measure", killed),
    ):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, value)
            run_all(whole, str(place), "the command")
    run_all(whole, str(place), "the command")
    for file in ("revisions/revisions.jsonl", "revisions/demonstrations.jsonl", "labels/ai.jsonl", "human.jsonl"):
        assert (place / file).read_bytes() == (made / file).read_bytes()
    for stage in ("dpo", "helpful_dpo"):
        ours, theirs = (arrays(folder / stage, 2) for folder in (place, made))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (place, made))
    assert ours == theirs


def test_a_stage_that_is_gone_is_made_again(whole, made, tmp_path):
    place = tmp_path / "some"
    place.mkdir()
    for name in ("results.json", "report.html"):
        (place / name).write_bytes((made / name).read_bytes())
    for stage in whole.made:
        (place / stage).mkdir()
        for mark in ("config.json", "revisions.jsonl", "ai.jsonl"):
            (place / stage / mark).write_text("")
    assert program.finished(whole, epath.Path(place)) is not None
    (place / "helpful_dpo" / "config.json").unlink()
    assert program.finished(whole, epath.Path(place)) is None


def test_a_critic_that_revises_nothing_is_an_error(whole, made, tmp_path, monkeypatch):
    def kept(w: Any, critic: Any, prompts: Any, answers: Any, samplers: Any) -> list[Revised]:
        pairs = zip(prompts, answers, strict=True)
        return [Revised(prompt, (text, text), ("",), ("manners",), ("it didn't end",)) for prompt, text in pairs]

    monkeypatch.setattr(stages.writing, "revise", kept)
    given = fields.replace(whole, {"inputs.helpful": str(made / "helpful" / "model-20")})
    with pytest.raises(
        UserError, match=r"revisions: no answer was revised \(round 1 changed 0 of 12 .*; raise --config"
    ):
        stages.train(given, str(tmp_path / "new"))
    assert not (tmp_path / "new" / "revisions").exists()


def test_a_model_that_was_written_out_is_not_taken_for_another(made, tmp_path):
    one, other = (open_policy(str(made / name)) for name in ("helpful", "revised"))
    place = epath.Path(tmp_path)
    folder = chain_stage.model_folder(one, place)
    assert folder == str(tmp_path / "model-20") == chain_stage.model_folder(one, place)
    with pytest.raises(UserError, match=r"model-20 was written from another model than the one of step 20 that is"):
        chain_stage.model_folder(other._replace(step=20), place)
    (tmp_path / "model-20.of").unlink()  # as older folders are
    assert chain_stage.model_folder(one, place) == folder
    assert (tmp_path / "model-20.of").read_text() == one.identify()


def test_people_s_pairs_do_not_change_behind_a_stage(whole, made, tmp_path):
    people = tmp_path / "people.jsonl"
    people.write_bytes(pathlib.Path(whole.human).read_bytes())
    given = fields.replace(whole, {"human": str(people), "inputs.helpful": str(made / "helpful" / "model-20")})
    place = epath.Path(tmp_path / "run")
    run_of = stages._Stages(given, place)
    run_of.left["helpful"] = str(given.inputs.helpful)
    file = pathlib.Path(run_of._people(str(people)))
    assert file.read_bytes() == (made / "human.jsonl").read_bytes()
    people.write_text("".join(people.read_text().splitlines(keepends=True)[1:]))
    run_of._people(str(people))  # nothing is made with them yet
    before = file.read_bytes()
    (tmp_path / "run" / "helpful_dpo").mkdir()
    (tmp_path / "run" / "helpful_dpo" / "config.json").write_text("")
    run_of._people(str(people))
    people.write_text("".join(people.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"are not those in .*human.jsonl, and helpful_dpo is made with these; put"):
        run_of._people(str(people))
    assert file.read_bytes() == before


def test_labels_that_are_given_are_counted_whatever_their_form(whole, tmp_path):
    file = tmp_path / "labels.json"
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", "probability": 1.0}] * 3
    file.write_text(json.dumps(rows, indent=1))
    assert measure._count(whole, str(file)) == 3


def test_how_far_a_scorer_agrees_is_left_open_where_it_can_not_be_told(whole, made, monkeypatch, capsys):
    pairs = lines(made / "labels" / "ai.jsonl")
    prompt = lines(pathlib.Path(whole.prompts))[0]["prompt"]
    told = lambda given: measure._agrees(whole, given)
    polite, rude = {"prompt": prompt, "chosen": "good", "rejected": "bad"}, {"prompt": prompt, "chosen": "bad",
                                                                           "rejected": "good"}  # fmt: skip
    by_word = lambda prompts, completions, **columns: [float(text == "good") for text in completions]
    monkeypatch.setattr(measure, "_scorer", lambda *a: by_word)
    found = told([polite, polite, rude, polite | {"prompt": "no longer there"}])
    assert found is not None and found.mean == pytest.approx(2 / 3)
    assert told([polite | {"prompt": "no longer there"}]) is None and told([]) is None

    def reads(prompts, completions, answers, **columns):
        return [1.0 for _ in prompts]

    monkeypatch.setattr(measure, "_scorer", lambda *a: reads)
    assert told(pairs or [polite]) is None and "harmless can't score them (TypeError: " in capsys.readouterr().out


# ---- how stages are composed


@pytest.mark.parametrize(
    ("given", "stages_made"),
    [
        ({}, "helpful revisions revised labels dpo helpful_dpo"),
        ({"final": "ppo"}, "helpful revisions revised labels reward ppo helpful_reward helpful_ppo"),
        ({"human": None, "human_probability": None}, "helpful revisions revised labels dpo"),
        ({"inputs.helpful": "m"}, "revisions revised labels dpo helpful_dpo"),
        ({"inputs.revised": "m"}, "helpful labels dpo helpful_dpo"),
        ({"inputs.revisions": "f"}, "helpful revised labels dpo helpful_dpo"),
        ({"inputs.labels": "f", "inputs.helpful_only": "m"}, "helpful revisions revised dpo"),
        ({"final": "ppo", "inputs.reward": "m"}, "helpful revisions revised ppo helpful_reward helpful_ppo"),
        ({"final": "ppo", "inputs.final": "m", "inputs.helpful_only": "m"}, "helpful revisions revised"),
    ],
)
def test_what_an_input_replaces_is_not_made(whole, given, stages_made):
    assert " ".join(fields.replace(whole, given).made) == stages_made


def test_what_a_stage_starts_from_and_reads(whole):
    products = {name: f"<{name}>" for name in (*STAGES, "human")}
    both = fields.replace(whole, {"helpful_prompts": "more.jsonl", "ppo.data.weights": (0.5, 0.5)})
    of = lambda stage: filled(both, stage, products)
    reads = {name: (of(name).model.path, of(name).data.path, of(name).rewards.model) for name, s in STAGES.items()
             if s.algorithm}  # fmt: skip
    assert reads == {
        "helpful": (whole.model, whole.demonstrations, None),
        "revised": (whole.model, ("<revisions>", *whole.demonstrations), None),
        "dpo": ("<revised>", ("<labels>", "<human>"), None),
        "reward": ("<revised>", ("<labels>", "<human>"), None),
        "ppo": ("<revised>", (whole.prompts, "more.jsonl"), "<reward>"),
        "helpful_dpo": ("<helpful>", ("<human>",), None),
        "helpful_reward": ("<helpful>", ("<human>",), None),
        "helpful_ppo": ("<helpful>", ("more.jsonl",), "<helpful_reward>"),
    }
    assert of("dpo").data.weights == (0.5, 0.5) and of("helpful_dpo").data.weights == ()
    assert of("dpo").data.probability == of("helpful_reward").data.probability == "probability"
    assert after("revised") == ("labels", "dpo", "reward", "ppo") and after("ppo") == ()


def test_ppo_runs_its_stages_with_what_the_others_left(whole, made, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(chain_stage, "train", lambda config, folder, stage, section: seen.append(stage) or str(folder))
    named = {"helpful": "helpful/model-20", "revised": "revised/model-2", "labels": "labels/ai.jsonl"}
    given = {f"inputs.{name}": str(made / path) for name, path in named.items()}
    found = stages.train(fields.replace(whole, {**given, "final": "ppo"}), str(tmp_path))
    assert seen == ["reward", "ppo", "helpful_reward", "helpful_ppo"]
    assert (found.final, found.helpful_only) == (str(tmp_path / "ppo"), str(tmp_path / "helpful_ppo"))
    assert found.revisions is None and found.helpful == given["inputs.helpful"]


# ---- what may change, and what is refused


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
