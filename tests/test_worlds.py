"""Starts that are made here: what their names mean, that making is whole or not at all, and the same every time."""

import dataclasses
import hashlib
import json
import pathlib

import pytest
from etils import epath

from rlhf_jax import run, worlds
from rlhf_jax.config import Config, ModelConfig
from rlhf_jax.data import world, world_rows
from rlhf_jax.data.config import Data
from rlhf_jax.errors import UserError

ROWS = world_rows.World(
    documents=200, documents_held_out=32, demonstrations=64, demonstrations_held_out=32, prompts=16, prompts_held_out=8,
    prompts_shifted=0, pairs=0, pairs_held_out=0, stepwise=20, stepwise_held_out=5,
)  # fmt: skip
STAGE = worlds.Stage(rate=1e-3, steps=2, patience=0, warmup=1)
RECIPE = worlds.Recipe(ROWS, takes="a moment", width=16, pretrain=STAGE, sft=STAGE)


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worlds.RECIPES, "tiny", RECIPE)


def no_training(config: Config, workdir: str) -> None:
    raise AssertionError("nothing was to be made")


def made(cache: pathlib.Path) -> epath.Path:
    """A whole start without the trouble."""
    place = epath.Path(cache) / "worlds" / f"tiny-{RECIPE.digest}"
    place.mkdir(parents=True)
    (place / worlds.WHOLE).write_text("{}")
    return place


def content(folder: epath.Path) -> dict[str, str]:
    files = sorted(pathlib.Path(folder).rglob("*"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[epath.Path]:
    """The same start made twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(worlds.RECIPES, "tiny", RECIPE)
        caches = [str(tmp_path_factory.mktemp("cache")) for _ in range(2)]
        return [worlds.folder("tiny", cache, run.train) for cache in caches]


def test_making_is_deterministic(two):
    assert content(two[0]) == content(two[1])


def test_a_start_holds_its_files_and_nothing_else(two):
    names = {path.name for path in two[0].iterdir()}
    assert names == {"model", worlds.WHOLE, *(f"{part}.jsonl" for part in worlds.FILES)}
    assert [path.name for path in two[0].parent.iterdir()] == [two[0].name]
    asked = {row["prompt"] for row in worlds.read(two[0] / "prompts_held_out.jsonl")}
    for part, held_out in (("answers", False), ("answers_held_out", True)):
        rows = worlds.read(two[0] / f"{part}.jsonl")
        assert rows
        assert {world.held_out(row["prompt"]) for row in rows} == {held_out}
        assert not held_out or {row["prompt"] for row in rows} <= asked


def test_its_model_is_read_as_any_other(two):
    subject = worlds.open_subject("sft", str(two[0] / "model"))
    assert json.loads(subject.model.source)["hidden_size"] == RECIPE.width


def test_names_become_paths_and_other_paths_stay(tmp_path):
    place = made(tmp_path)
    data = Data(path=("world:tiny/answers", "mine.jsonl"), eval_path=("world:tiny/answers_held_out",))
    config = Config(cache=str(tmp_path), model=ModelConfig(path="world:tiny"), data=data)
    given = worlds.provide(config, no_training)
    assert given.model.path == str(place / "model")
    assert given.data.path == (str(place / "answers.jsonl"), "mine.jsonl")
    assert given.data.eval_path == (str(place / "answers_held_out.jsonl"),)
    other = Config(cache=str(tmp_path), model=ModelConfig(path="mine"), data=Data(path=("a.jsonl",)))
    assert worlds.provide(other, no_training) == other
    assert worlds.provide(Config(), no_training) == Config()


@pytest.mark.parametrize("part", worlds.FILES)
def test_one_file_is_found_without_a_config(tmp_path, part):
    place = made(tmp_path)
    assert worlds.file(f"world:tiny/{part}", str(tmp_path)) == place / f"{part}.jsonl"


@pytest.mark.parametrize(
    ("model", "rows", "says"),
    [
        (
            "world:tinny",
            "world:tiny/answers",
            "no world:tinny; the nearest is world:tiny, there are world:tiny, world",
        ),
        ("world:tiny/answers", "world:tiny/answers", "names rows; the model is world:tiny"),
        ("world:tiny", "world:tiny/answer", "names no rows; the nearest is world:tiny/answers, world:tiny/ has docum"),
        ("world:tiny", "world:tiny", "'world:tiny' names no rows; world:tiny/ has documents, demonstrations"),
        ("world:tiny", "world:huge/answers", "no world:huge; the nearest is"),
    ],
)
def test_wrong_names_are_one_sentence(tmp_path, model, rows, says):
    made(tmp_path)
    config = Config(cache=str(tmp_path), model=ModelConfig(path=model), data=Data(path=(rows,)))
    with pytest.raises(UserError) as error:
        worlds.provide(config, no_training)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_start_that_cannot_be_made_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"isn't made yet.*configs/dpo.py:tiny"):
        worlds.file("world:tiny/answers", str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--config.cache"):
        worlds.file("world:tiny/answers", str(tmp_path / "file"), no_training)


def whole(name: str, recipe: worlds.Recipe, place: epath.Path, train: worlds.TrainFunction) -> None:
    """What stands in the place of the stages."""
    place.mkdir()
    (place / worlds.WHOLE).write_text(place.name)


def test_a_folder_that_is_not_whole_is_made_again(tmp_path, monkeypatch):
    place = made(tmp_path)
    (place / worlds.WHOLE).unlink()
    (place / "answers.jsonl").write_text("half")
    monkeypatch.setattr(worlds, "_make", whole)
    assert worlds.folder("tiny", str(tmp_path), no_training) == place
    assert [path.name for path in place.iterdir()] == [worlds.WHOLE]


def test_a_making_that_fails_leaves_nothing(tmp_path):
    def stopped(config: Config, workdir: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worlds.folder("tiny", str(tmp_path), stopped)
    assert not list((tmp_path / "worlds").iterdir())


def test_of_two_that_make_at_once_the_first_stays(tmp_path, monkeypatch):
    def slower(*arguments: object) -> None:
        whole(*arguments)  # pyright: ignore[reportArgumentType]
        made(tmp_path)

    monkeypatch.setattr(worlds, "_make", slower)
    place = worlds.folder("tiny", str(tmp_path), no_training)
    assert (place / worlds.WHOLE).read_text() == "{}"
    assert list(place.parent.iterdir()) == [place]


def test_a_recipe_is_known_by_all_that_decides(monkeypatch):
    other = dataclasses.replace
    assert other(RECIPE, takes="long", preference=worlds.Preference(steps=1)).digest == RECIPE.digest
    changes = {"width": 32, "sft": other(STAGE, rate=2e-3), "world": other(ROWS, seed=1)}
    digests = {RECIPE.digest, *(other(RECIPE, **{name: value}).digest for name, value in changes.items())}
    monkeypatch.setattr(worlds, "MAKING", worlds.MAKING + 1)
    assert len(digests | {RECIPE.digest}) == len(changes) + 2
