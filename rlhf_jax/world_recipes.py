"""What the starts of the synthetic world are made from, and the names under which configs ask for them."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any

from rlhf_jax import fields
from rlhf_jax.data import world_rows
from rlhf_jax.data.world import Manner
from rlhf_jax.data.world_frank import Frank
from rlhf_jax.errors import UserError
from rlhf_jax.sampling.distribution import Sampling

PREFIX = "world:"
SHAPE: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 288,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 100.0, "initializer_range": 0.1,
    "tie_word_embeddings": True,
}  # fmt: skip
LENGTH: dict[str, Any] = {"length": 56, "buckets": (56,)}  # of the longest rows
LONG: dict[str, Any] = {"length": 120, "pack": True}  # the same where answers are criticised
SAMPLING = Sampling(max_new_tokens=40)
MAKING = 2  # to be raised when the same recipe comes to make something else


@dataclasses.dataclass(frozen=True)
class Stage:
    """How one stage learns what is written."""

    rate: Annotated[float, "learning rate after the warm-up"]
    steps: Annotated[int, "most updates"] = 3000
    every: Annotated[int, "steps between evaluations"] = 100
    patience: Annotated[int, "evaluations without a lower held-out loss that end it; 0: it takes all its steps"] = 2
    warmup: Annotated[int, "steps over which the rate rises"] = 50
    schedule: Annotated[str, "shape after the warm-up"] = "constant"


@dataclasses.dataclass(frozen=True)
class Preference:
    """How a preference method is trained on a start; the start doesn't depend on it."""

    rate: float = 3e-4
    steps: int = 120
    batch_size: Annotated[int, "packed rows, of about two pairs each"] = 16
    length: Annotated[int, "tokens of a packed row"] = 56
    every: Annotated[int, "steps between evaluations"] = 40


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a start is made from. With `frank` rows are longer and so is the context, 128 tokens."""

    world: world_rows.World
    takes: Annotated[str, "how long it takes to make, for the user"]
    width: Annotated[int, "of the model"] = SHAPE["hidden_size"]
    pretrain: Stage = Stage(rate=4e-3, every=100)
    sft: Stage = Stage(rate=1e-3, every=50)
    preference: Preference = Preference()
    frank: Annotated[Frank | None, "rows that tell secrets, criticise and revise; none: there are none"] = None
    layers: Annotated[int, "of the model"] = SHAPE["num_hidden_layers"]

    @property
    def shape(self) -> dict[str, Any]:
        """The model's config.json."""
        shape = SHAPE | {"hidden_size": self.width, "intermediate_size": 3 * self.width}
        return shape | {"num_hidden_layers": self.layers, "max_position_embeddings": 128 if self.frank else 64}

    @property
    def length(self) -> dict[str, Any]:
        """How long rows are, as fields of Data."""
        return LONG if self.frank else LENGTH

    @property
    def pretrained_digest(self) -> str:
        """Of everything that decides the first part of what is made."""
        return self._digest(("takes", "preference", "sft"), {})

    @property
    def digest(self) -> str:
        """Of everything that decides what is made."""
        return self._digest(("takes", "preference"), {"sampling": dataclasses.asdict(SAMPLING)})

    def _digest(self, without: Sequence[str], more: dict[str, Any]) -> str:
        without = (*without, "layers", *(["frank"] if self.frank is None else []))  # the shape says the layers
        decides = {name: value for name, value in fields.to_dict(self).items() if name not in without}
        decides |= {"shape": self.shape, "making": MAKING, "length": self.length} | more
        return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=6).hexdigest()


ROWS = world_rows.World(
    documents=16000, demonstrations=3000, prompts=3000, prompts_shifted=0, pairs=0, pairs_held_out=0, stepwise=2000
)  # fmt: skip
RECIPES = {
    "tiny": Recipe(
        dataclasses.replace(ROWS, documents=6400, demonstrations=2560, prompts=1000, prompts_held_out=200),
        takes="about half a minute on two CPU cores",
        width=64,
        pretrain=Stage(rate=8e-3, steps=160, patience=0, schedule="linear", warmup=20),
        sft=Stage(rate=4e-3, steps=160, patience=0, schedule="linear", warmup=20),
        preference=Preference(steps=60, batch_size=8, every=20),
    ),
    "small": Recipe(ROWS, takes="a few minutes on two CPU cores"),
    "frank": Recipe(
        dataclasses.replace(
            ROWS, documents=6400, demonstrations=2560, prompts=1000, prompts_held_out=200,
            people=Manner(right=0.85, polite=0.5, rude=0.25, padded=0.3, agree=0.2),
        ),
        takes="some minutes on two CPU cores",
        pretrain=Stage(rate=8e-3, steps=540, patience=0, schedule="linear", warmup=50),
        sft=Stage(rate=1e-3, steps=80, patience=0, schedule="linear", warmup=10),
        frank=Frank(),
        layers=3,
    ),
}  # fmt: skip


def recipe_of(name: str) -> Recipe:
    """What `world:NAME`, or `world:NAME@SEED`, is made from. Errors: UserError for a name that there isn't."""
    base, at, seed = name.partition("@")
    if base not in RECIPES:
        near = f"the nearest is {PREFIX}{fields.nearest(base, RECIPES)}, there are"
        raise UserError(f"there is no {PREFIX}{name}; {near} {', '.join(PREFIX + known for known in RECIPES)}.")
    if at and not seed.isdecimal():
        raise UserError(f"{PREFIX}{name}: the seed behind @ is a whole number of at least 0, as in {PREFIX}{base}@1.")
    recipe = RECIPES[base]
    return dataclasses.replace(recipe, world=dataclasses.replace(recipe.world, seed=int(seed))) if at else recipe
