"""Frozen columns on disk: what a fixed model says of a completion is computed once.

A value is keyed by the completion's own tokens (so by data, template, tokenizer and length at once) in a file
named by the checkpoint that said it: another run on the same rows and reference finds it there.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from etils import epath
from safetensors.numpy import load, save

from rlhf_jax.data.dataset import Example
from rlhf_jax.data.tokens import Tokens


def keys_of(example: Example, shared: bool = False) -> list[int]:
    """A 64-bit name of each completion with its prompt; with `shared` also of the length that all of them have."""
    length = min(int(tokens.mask.sum()) for tokens in example.completions) if shared else None
    return [_key_of(tokens, length) for tokens in example.completions]


def _key_of(tokens: Tokens, length: int | None) -> int:
    digest = hashlib.blake2b(tokens.ids.tobytes(), digest_size=8)
    digest.update(tokens.mask.tobytes())
    if length is not None:
        digest.update(length.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


class Columns:
    """One float32 a completion."""

    def __init__(self, folder: str | os.PathLike, identity: str, shared: bool = False):
        """Args:
        identity: names the model, its numbers and how they are computed.
        shared: the values are of the length that all completions of an example have, not of whole completions.
        """
        self._path = epath.Path(folder) / f"{identity}{'-shared' if shared else ''}.safetensors"
        self._shared = shared
        self._known: dict[int, float] = {}
        if self._path.exists():
            stored = load(self._path.read_bytes())
            self._known = dict(zip(stored["keys"].tolist(), stored["values"].tolist(), strict=True))

    def knows(self, example: Example) -> bool:
        """Whether the values of all its completions are known."""
        return all(key in self._known for key in keys_of(example, self._shared))

    def add(self, examples: Sequence[Example], values: np.ndarray) -> None:
        """Takes the values of examples, float32 [N, K]; they are not on disk yet."""
        for example, row in zip(examples, values.tolist(), strict=True):
            self._known.update(zip(keys_of(example, self._shared), row, strict=False))  # fewer than K, perhaps

    def save(self) -> None:
        """Writes all values."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        keys = np.fromiter(self._known.keys(), np.uint64, len(self._known))
        values = np.fromiter(self._known.values(), np.float32, len(self._known))
        part = self._path.parent / f"{self._path.name}.{os.getpid()}"
        part.write_bytes(save({"keys": keys, "values": values}))
        part.replace(self._path)  # whole or not at all, also when two runs write

    def table(self, examples: Sequence[Example]) -> np.ndarray:
        """Values by example index, float32 [largest index + 2, K]; the last row, index -1, is of padding: 0."""
        size = max((e.index for e in examples), default=-1) + 2
        table = np.zeros((size, max((len(e.completions) for e in examples), default=1)), np.float32)
        for example in examples:
            values = [self._known[key] for key in keys_of(example, self._shared)]
            table[example.index, : len(values)] = values
        return table


def fill(
    stores: Mapping[str, Columns],
    examples: Sequence[Example],
    compute: Callable[[Sequence[Example]], Mapping[str, np.ndarray]],
    write: bool,
) -> int:
    """Computes what is missing in any of the stores, float32 [N, K] each for N examples; how many were missing."""
    missing = [example for example in examples if not all(store.knows(example) for store in stores.values())]
    if missing:
        for name, values in compute(missing).items():
            stores[name].add(missing, values)
            if write:
                stores[name].save()
    return len(missing)
