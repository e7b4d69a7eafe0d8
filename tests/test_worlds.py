"""Starts that are made here: what their names mean, that making is whole or not at all, and the same every time."""

import dataclasses
import hashlib
import json
import pathlib

import pytest
from etils import epath

from rlhf_jax import fields, run, world_recipes, worlds
from rlhf_jax.config import Config, ModelConfig
from rlhf_jax.data import world, world_frank, world_rows
from rlhf_jax.data.config import Data
from rlhf_jax.errors import UserError

ROWS = world_rows.World(
    documents=200, documents_held_out=32, demonstrations=64, demonstrations_held_out=32, prompts=16, prompts_held_out=8,
    prompts_shifted=0, pairs=0, pairs_held_out=0, stepwise=20, stepwise_held_out=5,
)  # fmt: skip
STAGE = worlds.Stage(rate=1e-3, steps=2, patience=0, warmup=1)
RECIPE = worlds.Recipe(ROWS, takes="a moment", width=16, pretrain=STAGE, sft=STAGE)
FRANK = dataclasses.replace(RECIPE, frank=world_frank.Frank(20, 40, 40, 20, 12, 6), layers=1)
DIGESTS = {name: (worlds.RECIPES[name].pretrained_digest, worlds.RECIPES[name].digest) for name in ("tiny", "small")}


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(worlds.RECIPES, "tiny", RECIPE)


def no_training(config: Config, workdir: str) -> None:
    raise AssertionError("nothing was to be made")


def made(cache: pathlib.Path) -> tuple[epath.Path, epath.Path]:
    """Both parts of a whole start without the trouble: the pre-trained and the fine-tuned."""
    names = f"tiny-pretrained-{RECIPE.pretrained_digest}", f"tiny-{RECIPE.digest}"
    first, second = (epath.Path(cache) / "worlds" / name for name in names)
    for place in (first, second):
        place.mkdir(parents=True)
        (place / worlds.WHOLE).write_text("{}")
    return first, second


def content(folder: epath.Path) -> dict[str, str]:
    files = sorted(pathlib.Path(folder).rglob("*"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[epath.Path, epath.Path]]:
    """Both parts of the same start, made twice: at once, and the first alone before the second is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(worlds.RECIPES, "tiny", RECIPE)
        caches = [str(tmp_path_factory.mktemp("cache")) for _ in range(2)]
        second = worlds.folder("tiny", caches[0], run.train)
        alone = worlds.pretrained("tiny", caches[1], run.train)
        assert [path.name for path in alone.parent.iterdir()] == [alone.name]
        return [
            (worlds.pretrained("tiny", caches[0]), second), (alone, worlds.folder("tiny", caches[1], run.train)),
        ]  # fmt: skip


def test_making_is_deterministic(two):
    for part in range(2):
        assert content(two[0][part]) == content(two[1][part])


def test_a_start_holds_its_files_and_nothing_else(two):
    first, second = two[0]
    for place, files in ((first, worlds.WRITTEN), (second, worlds.SAID)):
        assert {path.name for path in place.iterdir()} == {"model", worlds.WHOLE, *(f"{part}.jsonl" for part in files)}
    assert {path.name for path in first.parent.iterdir()} == {first.name, second.name}
    asked = {row["prompt"] for row in worlds.read(first / "prompts_held_out.jsonl")}
    for part, held_out in (("answers", False), ("answers_held_out", True)):
        rows = worlds.read(second / f"{part}.jsonl")
        assert rows
        assert {world.held_out(row["prompt"]) for row in rows} == {held_out}
        assert not held_out or {row["prompt"] for row in rows} <= asked


def test_its_models_are_read_as_any_other_and_differ(two):
    first, second = (worlds.open_subject("sft", str(place / "model")) for place in two[0])
    assert (
        json.loads(first.model.source)["hidden_size"] == json.loads(second.model.source)["hidden_size"] == RECIPE.width
    )
    assert (two[0][0] / "model/model.safetensors").read_bytes() != (two[0][1] / "model/model.safetensors").read_bytes()


def test_names_become_paths_and_other_paths_stay(tmp_path):
    first, second = made(tmp_path)
    given = worlds.provide(
        fields.replace(
            Config(cache=str(tmp_path)),
            {
                "model.path": "world:tiny/pretrained", "data.path": ("world:tiny/answers", "mine.jsonl"),
                "data.eval_path": ("world:tiny/prompts_held_out",), "rewards.model": "world:tiny",
                "reward.demonstrations": ("world:tiny/demonstrations",), "ppo.value_path": "runs/reward",
                "ppo.pretrain": ("text.jsonl", "world:tiny/documents"),
            },
        ),
        no_training,
    )  # fmt: skip
    assert (given.model.path, given.rewards.model) == (str(first / "model"), str(second / "model"))
    assert given.data.path == (str(second / "answers.jsonl"), "mine.jsonl")
    assert given.data.eval_path == (str(first / "prompts_held_out.jsonl"),)
    assert given.reward.demonstrations == (str(first / "demonstrations.jsonl"),)
    assert given.ppo.value_path == "runs/reward"
    assert given.ppo.pretrain == ("text.jsonl", str(first / "documents.jsonl"))
    other = Config(cache=str(tmp_path), model=ModelConfig(path="mine"), data=Data(path=("a.jsonl",)))
    assert worlds.provide(other, no_training) == other
    assert worlds.provide(Config(), no_training) == Config()


@pytest.mark.parametrize("part", worlds.FILES)
def test_one_file_is_found_without_a_config(tmp_path, part):
    place = made(tmp_path)[part in worlds.SAID]
    assert worlds.file(f"world:tiny/{part}", str(tmp_path)) == place / f"{part}.jsonl"


def test_a_name_may_have_a_seed(tmp_path):
    recipe = worlds.recipe_of("tiny@3")
    assert recipe == dataclasses.replace(RECIPE, world=dataclasses.replace(ROWS, seed=3))
    assert worlds.recipe_of(f"tiny@{ROWS.seed}") == RECIPE
    with pytest.raises(UserError, match=r"world:tiny@3 isn't made yet.*--config.model.path=world:tiny@3"):
        worlds.model("world:tiny@3", str(tmp_path))


@pytest.mark.parametrize(
    ("model", "rows", "says"),
    [
        (
            "world:tinny",
            "world:tiny/answers",
            "no world:tinny; the nearest is world:tiny, there are world:tiny, world",
        ),
        (
            "world:tiny/answers",
            "world:tiny/answers",
            "model.path=world:tiny/answers names rows; the models are world:tiny",
        ),
        ("world:tiny/pretrain", "world:tiny/answers", "names no model; the models are world:tiny and world:tiny/pretr"),
        ("world:tiny@x", "world:tiny/answers", "the seed behind @ is a whole number of at least 0, as in world:tiny@1"),
        ("world:tiny", "world:tiny/answer", "names no rows; the nearest is world:tiny/answers, world:tiny/ has docum"),
        ("world:tiny", "world:tiny/secrets", "names no rows; the nearest is world:tiny/"),  # world:frank has them
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


def whole(what: str, recipe: worlds.Recipe, start: epath.Path, place: epath.Path, train: worlds.TrainFunction) -> None:
    """What stands in the place of the second part's stages."""
    place.mkdir()
    (place / worlds.WHOLE).write_text(place.name)


def test_a_folder_that_is_not_whole_is_made_again(tmp_path, monkeypatch):
    _, place = made(tmp_path)
    (place / worlds.WHOLE).unlink()
    (place / "answers.jsonl").write_text("half")
    monkeypatch.setattr(worlds, "_make_tuned", whole)
    assert worlds.folder("tiny", str(tmp_path), no_training) == place
    assert [path.name for path in place.iterdir()] == [worlds.WHOLE]


def test_a_making_that_fails_leaves_nothing(tmp_path):
    def stopped(config: Config, workdir: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worlds.folder("tiny", str(tmp_path), stopped)
    assert not list((tmp_path / "worlds").iterdir())


def test_of_two_that_make_at_once_the_first_stays(tmp_path, monkeypatch):
    first, second = made(tmp_path)
    second.rmtree()

    def slower(*arguments: object) -> None:
        whole(*arguments)  # pyright: ignore[reportArgumentType]
        second.mkdir()
        (second / worlds.WHOLE).write_text("{}")

    monkeypatch.setattr(worlds, "_make_tuned", slower)
    place = worlds.folder("tiny", str(tmp_path), no_training)
    assert (place / worlds.WHOLE).read_text() == "{}"
    assert {*place.parent.iterdir()} == {first, second}


def test_a_recipe_is_known_by_all_that_decides(monkeypatch):
    other = dataclasses.replace
    assert other(RECIPE, takes="long", preference=worlds.Preference(steps=1)).digest == RECIPE.digest
    changes = {"width": 32, "sft": other(STAGE, rate=2e-3), "world": other(ROWS, seed=1)}
    recipes = [RECIPE, *(other(RECIPE, **{name: value}) for name, value in changes.items())]
    digests, first = {one.digest for one in recipes}, {one.pretrained_digest for one in recipes}
    monkeypatch.setattr(world_recipes, "MAKING", world_recipes.MAKING + 1)
    assert len(digests | {RECIPE.digest}) == len(changes) + 2
    assert len(first | {RECIPE.pretrained_digest}) == len(changes) + 1  # fine-tuning decides nothing of the first part


def test_starts_that_were_made_before_are_found():
    """Their folders bear these digests: what is added for another start must leave them as they are."""
    assert DIGESTS == {"tiny": ("bc14bf5288b4", "616b2c6ca920"), "small": ("d5229a0b4493", "9ee242bb4978")}
    assert len({one.digest for one in (RECIPE, FRANK, dataclasses.replace(FRANK, layers=2))}) == 3


def test_a_frank_start_has_longer_rows_and_prompts_that_provoke(tmp_path, monkeypatch):
    monkeypatch.setitem(worlds.RECIPES, "frank", FRANK)
    place = worlds.pretrained("frank", str(tmp_path), run.train)
    files = {path.name for path in place.iterdir()} - {"model", worlds.WHOLE}
    assert files == {f"{part}.jsonl" for part in worlds.WRITTEN + worlds.FRANK}
    assert worlds.file("world:frank/secrets", str(tmp_path)) == place / "secrets.jsonl"
    shape = json.loads((place / "model/config.json").read_text())
    assert (shape["num_hidden_layers"], shape["max_position_embeddings"]) == (1, 128)
    tokenizer = worlds.open_subject("base", str(place / "model")).tokenizer
    documents = [row["completion"] for row in worlds.read(place / "documents.jsonl")]
    assert len(documents) == ROWS.documents + 100
    assert max(len(tokenizer(text).input_ids) for text in documents) < FRANK.length["length"]
    with pytest.raises(UserError, match=r"names rows; the models are world:frank and"):
        worlds.model("world:frank/secrets", str(tmp_path))
