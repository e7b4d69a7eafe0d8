"""The parts of the quickstart that go without training; the whole is the README's first command."""

import pathlib

import jax
import pytest
from etils import epath

from experiments import quickstart
from rlhf_jax import fields, flags, worlds
from rlhf_jax.chain import checks
from rlhf_jax.data import world_rows
from rlhf_jax.data.rows import Refusal
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint as hf
from rlhf_jax.models.tokenizers import load_tokenizer

ROWS = {
    "held_out": world_rows.prompts(200, 0, "held_out"),
    "shifted": world_rows.prompts(200, 0, "held_out", shifted=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> epath.Path:
    folder = epath.Path(tmp_path_factory.mktemp("base"))
    worlds.write_model(folder, [row["completion"] for row in world_rows.documents(3000, 0)])
    return folder


def test_every_row_fits_and_reads_back(base):
    tokenizer = load_tokenizer(base)
    encoder = Encoder(tokenizer)
    rows = [*world_rows.documents(2000, 1), *world_rows.demonstrations(500, 1)]
    for row, tokens in zip(rows, encoder.encode_many([(r["prompt"], r["completion"]) for r in rows]), strict=True):
        assert not isinstance(tokens, Refusal)
        assert len(tokens) <= worlds.LENGTH["length"]
        assert tokenizer.decode(tokens.ids, skip_special_tokens=True) == row["prompt"] + row["completion"]


@pytest.mark.parametrize("split", ROWS)
def test_every_prompt_leaves_room_for_an_answer(base, split):
    context = worlds.SHAPE["max_position_embeddings"]
    ids = Encoder(load_tokenizer(base)).prompts([row["prompt"] for row in ROWS[split]])
    assert max(len(prompt) for prompt in ids if not isinstance(prompt, Refusal)) + 24 <= context


def test_an_empty_prompt_is_the_start_token(base):
    encoder = Encoder(load_tokenizer(base))
    (ids,) = encoder.prompts([""])
    assert not isinstance(ids, Refusal)
    assert ids.tolist() == [encoder.bos_id]
    assert encoder.stop_ids() == (encoder.eos_id,)


def test_the_model_is_tiny(base):
    size = sum(leaf.size for leaf in jax.tree.leaves(hf.describe(base).shapes()))
    assert size < 500_000


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_that_mean_nothing_are_one_sentence(tmp_path: pathlib.Path, seeds: tuple[int, ...]):
    with pytest.raises(UserError, match="give different numbers of at least 0"):
        quickstart.main(quickstart.Quickstart(workdir=str(tmp_path), seeds=seeds))
    assert not list(tmp_path.iterdir())


def test_another_seed_is_another_seed_of_everything():
    chain = flags.load(f"{quickstart.CONFIG}:{quickstart.NAME}")
    own = quickstart.seeded(chain, 3, "here")
    changed = fields.diff(chain, own)
    assert (own.seed, own.labels.labeller.seed, own.cache) == (3, 3, "here")
    assert own.sft.model.path == "world:small@3/pretrained"
    assert own.reward.reward.demonstrations == ("world:small@3/demonstrations_held_out",)
    assert not [leaf.path for leaf in fields.leaves(own) if f"world:{quickstart.NAME}/" in fields.text(leaf.value)]
    assert all(line.startswith(("seed:", "cache:", "labels.labeller.seed:")) or "@3/" in line for line in changed)
    checks.check(own)
    assert worlds.recipe_of("small@0") == worlds.RECIPES["small"]  # so the first seed is that of configs/*.py:small


def told(score: float) -> dict[str, object]:
    """What a chain returns."""
    estimate = {"mean": score, "low": score, "high": score}
    table = {"title": "held-out prompts", "columns": ["model", "score"], "rows": [["ppo", "1.0"]], "note": ""}
    spots = [{"at": at, "kl": kl, "score": estimate, "proxy": estimate} for at, kl in (("sft", 0.0), ("step 1", 1.0))]
    return {"verdict": [f"ppo is ahead: {score}"], "table": table, "frontier": {"ppo": spots}}


def test_each_seed_is_a_chain_and_every_seed_is_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart.run, "use_compile_cache", lambda: None)
    calls = []

    def chain(own, workdir, command):
        calls.append((own.seed, workdir, command))
        pathlib.Path(workdir).mkdir(parents=True)
        (pathlib.Path(workdir) / "report.html").write_text(f"the report of seed {own.seed}")
        return told(own.seed + 0.5)

    monkeypatch.setattr(quickstart, "run_chain", chain)
    quickstart.main(quickstart.Quickstart(workdir=str(tmp_path / "one"), seeds=(4,)))
    assert (tmp_path / "one" / "report.html").read_text() == "the report of seed 4"
    quickstart.main(quickstart.Quickstart(workdir=str(tmp_path / "two"), seeds=(0, 1)))
    page = (tmp_path / "two" / "report.html").read_text()
    for words in (
        "ppo is ahead: 0.5",
        "ppo is ahead: 1.5",
        "seed 0: held-out prompts",
        "seed1/report.html",
        "--seeds=0,1",
    ):
        assert words in page
    assert [(seed, pathlib.Path(place).name) for seed, place, _ in calls] == [(4, "seed4"), (0, "seed0"), (1, "seed1")]
