"""A config, losses and programs as small as show every type of field: for the tests of fields, flags, registries."""

import dataclasses
from typing import Annotated, Any, Literal

from rlhf_jax import registry
from rlhf_jax.errors import UserError


def dpo(pair: Any, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Any: ...


def ipo(
    pair: Any,
    *,
    beta: Annotated[float, "1/nats"] = 0.1,
    length_normalised: bool = True,
    form: Literal["a", "b"] = "a",
) -> Any: ...


def bare(pair: Any, *, scale: int) -> Any: ...


LOSSES = {"dpo": dpo, "ipo": ipo, "bare": bare}


@registry.generated(LOSSES)
class Loss:
    """Which loss, and what it reads. More text."""

    name: str = "dpo"


@dataclasses.dataclass(frozen=True)
class Inner:
    """The innermost."""

    depth: Annotated[int, "how deep"] = 3


@dataclasses.dataclass(frozen=True)
class Data:
    path: Annotated[tuple[str, ...], "files"] = ()
    shares: tuple[float, ...] = (1.0,)
    too_long: Annotated[Literal["cut_prompt", "refuse", "stop"], "what becomes of long rows"] = "cut_prompt"
    length: Annotated[int | None, "tokens"] = 256
    shuffle: bool = True
    pack: bool | None = None
    inner: Inner = Inner()


@dataclasses.dataclass(frozen=True)
class Train:
    steps: Annotated[int, "optimiser updates"] = 100
    rate: Annotated[float, "learning rate"] = 1e-3
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise UserError(f"train.warmup is {self.warmup}, more than train.steps, {self.steps}.")


@dataclasses.dataclass(frozen=True)
class Config:
    seed: Annotated[int, "of everything random"] = 0
    data: Data = Data()
    loss: Loss = Loss()
    train: Annotated[Train, "the loop"] = Train()


@dataclasses.dataclass(frozen=True)
class Program:
    """Trains a policy."""

    config: Config
    workdir: Annotated[str | None, "where the run writes"] = None
    resume: Annotated[bool, "continue"] = False


@dataclasses.dataclass(frozen=True)
class Alone:
    out: Annotated[str, "the folder to write"]
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Defaulted:
    config: Config = Config(seed=7)
