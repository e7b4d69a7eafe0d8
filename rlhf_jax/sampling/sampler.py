"""Prompts in, completions out: the host's half of the sampler.

It hands rows to slots that are free and collects those that have stopped. Which slot a row is in, and with whom,
changes nothing about its completion: its randomness is its own, and it sees only itself.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf_jax import sharding
from rlhf_jax.errors import UserError
from rlhf_jax.ops.layout import Layout
from rlhf_jax.sampling import slots as device
from rlhf_jax.sampling.distribution import Sampling, check, knobs
from rlhf_jax.sampling.mixture import Drawable

STOPS = {device.END: "end", device.LENGTH: "length"}
SMALLEST_BUCKET = 16


class Completion(NamedTuple):
    """One completion, n tokens; the token that ended it is its last."""

    row: int  # which prompt
    sample: int  # which of its completions
    tokens: np.ndarray  # [n] int32
    old_logprobs: np.ndarray  # [n] float32, nats: the whole softmax at the temperature (1 if that is 0)
    behaviour_logprobs: np.ndarray  # [n] float32, nats: the distribution really drawn from
    stop: str  # "end": a token of the stop ids; "length": max_new_tokens or the context; "": goes on


def bucket(size: int, most: int) -> int:
    """The smallest power of two from 16 on that holds `size`, or `most`."""
    return min(most, max(SMALLEST_BUCKET, 1 << (size - 1).bit_length()))


def number_of(ids: np.ndarray) -> int:
    """A number of 31 bits that belongs to these token ids, for randomness that nothing which stands beside changes."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=4).digest(), "big") >> 1


class Sampler:
    """Draws completions from a model, or a mixture; compiles once for each bucket of prompt and completion lengths."""

    def __init__(self, model: Drawable, *, slots: int = 64, samples: int = 1):
        """Args:
        slots: rows decoded at a time; rounded up so that the mesh and a prompt's samples divide it.
        samples: completions of each prompt; they share one pass over it.
        """
        if model.layout.mesh is None:
            model = dataclasses.replace(model, layout=Layout(sharding.make_mesh(sharding.MeshShape(1, 1, 1))))
        self.model, self.samples = model, samples
        shards = model.layout.shards
        self._slots = -(-max(slots, samples) // shards) * shards
        # Prompts that enter at a time: a quarter of the slots, so that few of them wait for the others.
        fresh = max(1, self._slots // (4 * samples))
        self._fresh = -(-fresh // shards) * shards
        places = device.places(model.layout)
        empty, advance = (functools.partial(function, model) for function in (device.empty, device.advance))
        self._empty = jax.jit(empty, static_argnums=(0, 1, 2), out_shardings=places)
        self._advance = jax.jit(advance, donate_argnums=1, out_shardings=places)
        self._publish = jax.jit(lambda params: sharding.for_decoding(params, model))

    @property
    def compiles(self) -> int:
        """How many programs of the decode loop were compiled so far."""
        return self._advance._cache_size()  # pyright: ignore[reportAttributeAccessIssue]

    def generate(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        key: jax.Array,
        *,
        stop_ids: tuple[int, ...] = (),
        rows: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """The completions of each prompt, in the order of the prompts and of the samples.

        Args:
          prompts: token ids, int [n] each, n >= 1 and below the context.
          key: uint32 [2], of the run, its purpose and its step.
          stop_ids: tokens that end a completion.
          rows: a number for each prompt, which its randomness comes from; none: its place.
        Errors: UserError for numbers that mean nothing and prompts that don't fit.
        """
        out: dict[tuple[int, int], Completion] = {}
        for completion in self.stream(params, prompts, sampling, key, stop_ids=stop_ids, rows=rows):
            out[completion.row, completion.sample] = completion
        return [[out[i, j] for j in range(self.samples)] for i in range(len(prompts))]

    def stream(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        key: jax.Array,
        *,
        stop_ids: tuple[int, ...] = (),
        rows: Sequence[int] | None = None,
        steps: int | None = None,
    ) -> Iterator[Completion]:
        """As `generate`, each completion as soon as it has stopped.

        Args:
          steps: also what there is of every completion, each time that many tokens more were drawn.
        """
        check(sampling)
        context = self.model.shape.length
        _check_prompts(prompts, context)
        _check_turns(prompts, sampling.max_new_tokens, self.model.shape.turning_point)
        if not prompts:
            return
        longest = max(map(len, prompts))
        columns, ring = bucket(longest, context), bucket(sampling.max_new_tokens, context)
        queue = collections.deque((i, j) for i in range(len(prompts)) for j in range(self.samples))
        rows = range(len(prompts)) if rows is None else rows
        limits = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
        params, numbers = self._publish(params), self._put(knobs(sampling, stop_ids))
        key = self._put(key)
        state = self._empty(self._slots, columns, ring)
        held: list[tuple[int, int] | None] = [None] * self._slots
        most = np.int32(ring + 1 if steps is None else steps)
        while queue or any(held):
            fresh, last = self._fill(queue, held, prompts, rows, limits, columns)
            # Another prompt enters as soon as its samples have room; the last ones run to their end.
            enough = np.int32(self._entering() if queue else self._slots)
            wait = most if last else np.int32(0)
            state = self._advance(params, state, self._put(fresh), numbers, key, *self._put((wait, enough)))
            yield from self._collect(state, held, partial=steps is not None and last)

    def _entering(self) -> int:
        """Slots that the prompts of one pass fill."""
        return min(self._fresh * self.samples, self._slots // self.samples * self.samples)

    def _put(self, tree: Any) -> Any:
        """Host arrays as they are on every device."""
        everywhere = self.model.layout.sharding()
        place = lambda x: jax.make_array_from_process_local_data(everywhere, np.asarray(x))
        return jax.tree.map(place, tree)

    def _fill(
        self,
        queue: collections.deque,
        held: list,
        prompts: Sequence[np.ndarray],
        rows: Sequence[int],
        limits: list[int],
        width: int,
    ) -> tuple[device.Fresh, bool]:
        """Takes prompts off the queue into free slots; also whether no more of them could enter now."""
        free = [slot for slot, item in enumerate(held) if item is None]
        count = min(self._fresh, len(free) // self.samples, len(queue) // self.samples)
        tokens, length = np.zeros((self._fresh, width), np.int32), np.ones(self._fresh, np.int32)
        source, row, sample, limit = (np.full(self._slots, value, np.int32) for value in (-1, 0, 0, 0))
        for place in range(count):
            number, _ = queue[0]
            tokens[place, : len(prompts[number])], length[place] = prompts[number], len(prompts[number])
            for _ in range(self.samples):
                slot = free.pop(0)
                held[slot] = item = queue.popleft()
                source[slot], row[slot], sample[slot], limit[slot] = place, rows[number], item[1], limits[number]
        last = not queue or len(free) < self.samples
        parts: list[Any] = [tokens, length, source, row, sample, limit]
        return device.Fresh(*parts), last

    def _collect(self, state: device.Slots, held: list, partial: bool) -> Iterator[Completion]:
        """The completions of slots that have stopped, which are free then; with `partial` also of the others."""
        names = ("stop", "count", "start", "tokens", "logprobs", "behaviour")
        stop, count, start, *columns = (sharding.fetch(getattr(state, name)) for name in names)
        for slot, item in enumerate(held):
            if item is None or (stop[slot] == device.RUNNING and not partial):
                continue
            order = (start[slot] + np.arange(count[slot])) % columns[0].shape[1]
            tokens, logprobs, behaviour = (column[slot, order] for column in columns)
            yield Completion(item[0], item[1], tokens, logprobs, behaviour, STOPS.get(int(stop[slot]), ""))
            if stop[slot] != device.RUNNING:
                held[slot] = None


def _check_prompts(prompts: Sequence[np.ndarray], context: int) -> None:
    for number, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise UserError(
                f"prompt number {number + 1} has {len(prompt)} tokens; it must have at least 1 and fewer than the "
                f"model's context of {context}."
            )


def _check_turns(prompts: Sequence[np.ndarray], new: int, point: int | None) -> None:
    """A cache holds keys that are turned already, so no row may pass the point where they turn otherwise."""
    for number, prompt in enumerate(prompts):
        if point is not None and len(prompt) <= point < len(prompt) + new:
            raise UserError(
                f"prompt number {number + 1} has {len(prompt)} tokens and with max_new_tokens {new} may pass {point}, "
                f"where the model's rope turns all tokens otherwise; allow at most {point - len(prompt)} new tokens, "
                "or give a longer prompt."
            )
