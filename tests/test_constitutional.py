"""Constitutional AI, small: all of it, stopped anywhere and continued, its stages composed, and what it refuses."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from etils import epath

from experiments import constitutional as program
from experiments.constitutional import run_all
from rlhf_jax import fields, run, worlds
from rlhf_jax.chain import stage as chain_stage
from rlhf_jax.constitutional import measure, stages
from rlhf_jax.constitutional.config import STAGES, Constitutional, after, filled
from rlhf_jax.data import world_rows
from rlhf_jax.errors import UserError
from rlhf_jax.feedback.revision import Revised
from rlhf_jax.members import Member
from rlhf_jax.workdir import open_policy
from tests import tiny
from tests.test_run import arrays, lines

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "constitutional.py"


@pytest.fixture(autouse=True)
def no_cache_of_the_user(monkeypatch):
    monkeypatch.setattr(program.run, "use_compile_cache", lambda: None)


def whole_in(place: pathlib.Path) -> Constitutional:
    """On prompts of the world, from a tiny model of random weights; its files lie in the folder."""
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
def whole(tmp_path_factory) -> Constitutional:
    return whole_in(tmp_path_factory.mktemp("constitutional"))


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
