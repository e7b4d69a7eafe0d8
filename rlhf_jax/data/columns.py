"""Frozen columns on disk: what a fixed model says of a completion is computed once.

A value is keyed by the completion's own tokens (so by data, template, tokenizer and length at once) in a file
named by the checkpoint that said it: another run on the same rows and reference finds it there.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath
from safetensors.numpy import load, save

from rlhf_jax.data.dataset import Example
from rlhf_jax.data.tokens import Tokens


def key_of(tokens: Tokens) -> int:
    """A 64-bit name of a prompt with its completion."""
    digest = hashlib.blake2b(tokens.ids.tobytes(), digest_size=8)
    digest.update(tokens.mask.tobytes())
    return int.from_bytes(digest.digest(), "little")


class Columns:
    """One float32 a completion."""

    def __init__(self, folder: str | os.PathLike, identity: str):
        """Args: identity: names the model, its numbers and how they are computed."""
        self._path = epath.Path(folder) / f"{identity}.safetensors"
        self._known: dict[int, float] = {}
        if self._path.exists():
            stored = load(self._path.read_bytes())
            self._known = dict(zip(stored["keys"].tolist(), stored["values"].tolist(), strict=True))

    def missing(self, examples: Iterable[Example]) -> list[Example]:
        """The examples with a completion whose value isn't known."""
        return [e for e in examples if any(key_of(c) not in self._known for c in e.completions)]

    def fill(self, examples: Sequence[Example], compute: Callable[[Sequence[Example]], np.ndarray], write: bool) -> int:
        """Computes what is missing, float32 [N, K] for N examples, and stores it; how many were missing."""
        missing = self.missing(examples)
        if missing:
            for example, row in zip(missing, compute(missing), strict=True):
                known = zip(example.completions, row.tolist(), strict=False)  # an example may have fewer than K
                self._known.update((key_of(completion), value) for completion, value in known)
            if write:
                self._save()
        return len(missing)

    def _save(self) -> None:
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
            table[example.index, : len(example.completions)] = [self._known[key_of(c)] for c in example.completions]
        return table
