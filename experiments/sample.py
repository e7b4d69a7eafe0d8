"""Completes prompts with a model: python -m experiments.sample --model=FOLDER_OR_WORKDIR --prompt=TEXT."""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user

import jax
import numpy as np
from etils import epath

from rlhf_jax import flags, run
from rlhf_jax.data.prompts import Asked, read
from rlhf_jax.data.rows import Message, Refusal, Text
from rlhf_jax.data.tokens import Encoder
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import text_of
from rlhf_jax.sampling.distribution import Sampling, check
from rlhf_jax.sampling.sampler import Completion, Sampler
from rlhf_jax.workdir import Policy, open_policy

SLOTS = 64  # completions drawn at a time
STEPS = 8  # tokens between two looks at a completion that is streamed
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what the first bytes of a character decode to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample(Sampling):
    """Completes a prompt, the prompts of a file, or a conversation; only the completions go to stdout."""

    model: Annotated[str, "workdir of a run (also WORKDIR@STEP, WORKDIR@best), model folder or Hub name"]
    prompt: Annotated[str | None, "text to complete; empty: begin a text"] = None
    prompts: Annotated[str | None, "file of prompts: rows with prompt or messages, or any other file's lines"] = None
    chat: Annotated[bool, "talk: each prompt, or else each line of stdin, is a user's message"] = False
    samples: Annotated[int, "completions of each prompt"] = 1
    seed: Annotated[int, "of the draws"] = 0
    out: Annotated[str | None, "JSONL file to write the completions to as well; it must not exist"] = None
    step: Annotated[int | None, "checkpoint of the run; none: the newest"] = None


class Speaker:
    """A model that completes prompts as one program run asks for."""

    def __init__(self, program: Sample, policy: Policy, encoder: Encoder, samples: int, slots: int):
        self.program, self.policy, self.encoder = program, policy, encoder
        self._sampler = Sampler(policy.model, slots=slots, samples=samples)
        self._text = text_of(policy.tokenizer)
        self._key = jax.random.PRNGKey(program.seed)

    def ids(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """The tokens of prompts. Errors: UserError naming the first that can't be completed."""
        shape = self.policy.model.shape
        for one in asked:
            if not isinstance(one.text, str) and not self.encoder.chat:
                raise UserError(
                    f"{one.where} holds messages and the tokenizer of {self.program.model} has no chat template; "
                    "give prompts that are strings."
                )
        out = []
        for one, ids in zip(
            asked, self.encoder.prompts([a.text for a in asked], [a.tools for a in asked]), strict=True
        ):
            if isinstance(ids, Refusal):
                raise UserError(f"{one.where} can't be used ({ids}); change it or leave it away.")
            if len(ids) >= shape.length:
                raise UserError(
                    f"{one.where} has {len(ids)} tokens; it must have fewer than the model's context of {shape.length}."
                )
            if ids.max() >= shape.vocab:
                raise UserError(
                    f"{one.where} has the token {ids.max()}, but the model's vocabulary ends at {shape.vocab - 1}; "
                    "give --model a folder whose tokenizer belongs to it."
                )
            out.append(ids)
        return out

    def complete(
        self, ids: Sequence[np.ndarray], steps: int | None = None, rows: Sequence[int] | None = None
    ) -> Iterator[tuple[Completion, str]]:
        """Completions with their texts as `Sampler.stream` gives them; the token that ends one is no text."""
        stop_ids = self.encoder.stop_ids(self.policy.end_ids)
        parts = self._sampler.stream(
            self.policy.params, ids, self.program, self._key, stop_ids=stop_ids, rows=rows, steps=steps
        )
        for part in parts:
            yield part, self._text(ids[part.row], part)

    def say(self, ids: np.ndarray, row: int = 0) -> tuple[Completion, str]:
        """Prints one completion while it is drawn."""
        printed = 0
        for part, text in self.complete([ids], STEPS, [row]):
            ready = text if part.stop else text.rstrip(UNFINISHED)
            print(ready[printed:], end="", flush=True)
            printed = max(printed, len(ready))
        print(flush=True)
        return part, text


def _check(program: Sample) -> None:
    """Errors: UserError for flags that mean nothing or don't go together."""
    check(program, "--")
    given = [name for name in ("prompt", "prompts") if getattr(program, name) is not None]
    if len(given) == 2:
        raise UserError("--prompt and --prompts are both given; give one of them.")
    if not given and not program.chat:
        raise UserError("nothing to complete; give --prompt=TEXT, --prompts=FILE, or --chat to talk.")
    if program.samples < 1:
        raise UserError(f"--samples={program.samples} is not allowed; it must be at least 1.")
    if not given and program.samples > 1:
        raise UserError("a conversation goes on from one answer; drop --samples, or give --prompt=TEXT.")
    if not 0 <= program.seed < 2**32:
        raise UserError(f"--seed={program.seed} is not allowed; it must be from 0 to {2**32 - 1}.")
    if program.out is not None and epath.Path(program.out).expanduser().exists():
        raise UserError(f"--out={program.out} already exists; give a new file.")


def _asked(program: Sample) -> list[Asked]:
    """The prompts that the flags give; none for a conversation on the terminal."""
    asked = read(program.prompts) if program.prompts is not None else []
    if program.prompt is not None:
        try:
            program.prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no text
            raise UserError("--prompt is not UTF-8 text; give it in UTF-8.") from None
        asked = [Asked("--prompt", program.prompt)]
    if program.chat:
        return [a._replace(text=(Message("user", a.text),)) if isinstance(a.text, str) else a for a in asked]
    return asked


@contextlib.contextmanager
def _rows(path: str | None) -> Iterator[IO[str] | None]:
    """The file of --out."""
    if path is None:
        yield None
        return
    file = epath.Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("w", encoding="utf-8")
    except (OSError, ImportError) as error:
        raise UserError(f"--out={path} can't be written ({error}); give another file.") from error
    with stream:
        yield stream


def _write(out: IO[str] | None, prompt: Text, completion: Completion, text: str) -> None:
    if out is None:
        return
    row = {
        "prompt": prompt if isinstance(prompt, str) else [message.fields for message in prompt],
        "completion": text,
        "tokens": len(completion.tokens),
        "stop": completion.stop,
        "logprob": float(completion.old_logprobs.sum(dtype=np.float64)),
    }
    print(json.dumps(row, ensure_ascii=False), file=out, flush=True)


def _note(*words: Any, end: str = "\n") -> None:
    print(*words, end=end, file=sys.stderr, flush=True)


def _in_order(parts: Iterator[tuple[Completion, str]], samples: int) -> Iterator[tuple[Completion, str]]:
    """Completions in the order of prompts and samples, each as soon as those before it are there."""
    early: dict[tuple[int, int], tuple[Completion, str]] = {}
    following = (0, 0)
    for part, text in parts:
        early[part.row, part.sample] = part, text
        while following in early:
            yield early.pop(following)
            row, sample = following
            following = (row, sample + 1) if sample + 1 < samples else (row + 1, 0)


def _complete_all(speaker: Speaker, asked: Sequence[Asked], ids: Sequence[np.ndarray], out: IO[str] | None) -> int:
    """Prints the completions, a blank line between them, their names on stderr; how many tokens they have."""
    samples, tokens = speaker.program.samples, 0
    if len(asked) * samples == 1:
        completion, text = speaker.say(ids[0])
        _write(out, asked[0].text, completion, text)
        return len(completion.tokens)
    for number, (completion, text) in enumerate(_in_order(speaker.complete(ids), samples)):
        if number:
            print(flush=True)
        one = asked[completion.row]
        which = f", sample {completion.sample + 1} of {samples}" if samples > 1 else ""
        _note(f"[{one.where}{which}: {len(completion.tokens)} tokens, {completion.stop}]")
        print(text, flush=True)
        _write(out, one.text, completion, text)
        tokens += len(completion.tokens)
    return tokens


def _talk(speaker: Speaker, out: IO[str] | None) -> int:
    """A conversation with stdin, up to its end; how many tokens the answers have."""
    history: tuple[Message, ...] = ()
    tokens = turn = 0
    while True:
        if sys.stdin.isatty():
            _note("> ", end="")
        line = sys.stdin.readline()
        if not line:
            return tokens
        if not line.strip():
            continue
        history = (*history, Message("user", line.rstrip("\r\n")))
        (ids,) = speaker.ids([Asked(f"the conversation of {len(history)} messages", history)])
        completion, text = speaker.say(ids, turn)
        _write(out, history, completion, text)
        history = (*history, Message("assistant", text))
        tokens, turn = tokens + len(completion.tokens), turn + 1


def _sample(program: Sample) -> None:
    _check(program)
    asked = _asked(program)
    run.use_compile_cache()
    policy = open_policy(program.model, program.step)
    encoder = Encoder(policy.tokenizer)
    if program.chat and not encoder.chat:
        raise UserError(
            f"--chat needs a chat template and the tokenizer of {program.model} has none; give --prompt or --prompts "
            "without --chat."
        )
    count = max(1, len(asked)) * program.samples
    speaker = Speaker(program, policy, encoder, program.samples, min(SLOTS, count))
    ids = speaker.ids(asked)
    size = sum(leaf.size for leaf in jax.tree.leaves(policy.params))
    step = f" at step {policy.step}" if policy.step else ""
    _note(f"{program.model}{step}: {size:,} parameters, context {policy.model.shape.length}, {jax.devices()[0]}")
    start = time.perf_counter()
    with _rows(program.out) as out:
        tokens = _complete_all(speaker, asked, ids, out) if asked else _talk(speaker, out)
    seconds = time.perf_counter() - start
    if asked:  # a conversation waits for its user
        _note(f"{tokens} tokens in {seconds:.1f} s, compiling included: {tokens / seconds:.0f} a second")


def main(program: Sample) -> None:
    """Runs it."""
    try:
        _sample(program)
    except KeyboardInterrupt:
        _note()
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of stdout has seen enough; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    flags.run(main, Sample)
