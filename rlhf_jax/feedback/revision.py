"""Critique and revision: a model says what is wrong with an answer by a principle, and writes the answer anew.

Each round draws a principle for each prompt and asks for a critique of the latest answer, then for its revision:

    prompt, answer, critique request -> critique
    prompt, answer, critique request, critique, revision request -> revision

With a chat template prompt, requests, answers and critiques are turns of a conversation; without one they are lines of
a text, and what is written ends with its line.

References: Bai et al. 2022, arXiv:2212.08073, sec. 3.1.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.formats import values
from rlhf_jax.data.rows import Message, Text
from rlhf_jax.feedback.constitution import Constitution, Principle
from rlhf_jax.feedback.judges import written

EMPTY, CUT = "it was empty", "it didn't end"
NO_CRITIQUE = "there was no critique of it"


class Written(NamedTuple):
    """What a model wrote behind a prompt.

    Attributes:
      text: None: nothing could be drawn.
      ended: whether it ended by itself, and not at the length.
      why: why nothing could be drawn, a clause; "" where it was.
    """

    text: str | None
    ended: bool = True
    why: str = ""


# write(asked, places, number): a text behind each prompt. The place of a prompt and the number decide the randomness.
Write = Callable[[Sequence[Text], Sequence[int], int], list[Written]]


class Revised(NamedTuple):
    """A prompt with its answers, from the first to the last revision.

    Attributes:
      answers: one more than rounds.
      critiques, principles: of each round; a critique that couldn't be had is empty.
      kept: of each round, why the answer stayed as it was, a clause; "" where it is a revision.
    """

    prompt: Text
    answers: tuple[str, ...]
    critiques: tuple[str, ...] = ()
    principles: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def revised(self) -> bool:
        """Whether any round wrote the answer anew."""
        return not all(self.kept)

    @property
    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        prompt = self.prompt if isinstance(self.prompt, str) else [turn.fields for turn in self.prompt]
        return self._asdict() | {"prompt": prompt}


def as_conversation(before: str, prompt: Text, *turns: str) -> Text:
    """Turns of assistant and user behind a prompt, `before` in front of what the user says first.

    >>> as_conversation("", "Hi\\n", "Go away.", "What is wrong with that?")[2]
    Message(role='user', content='What is wrong with that?', more='')
    """
    said = (Message("user", prompt.strip()),) if isinstance(prompt, str) else prompt
    if before:
        first = next((place for place, turn in enumerate(said) if turn.role == "user"), 0)
        turn = said[first]
        said = (*said[:first], turn._replace(content=f"{before}\n\n{turn.content}"), *said[first + 1 :])
    roles = ("assistant", "user")
    return (*said, *(Message(roles[place % 2], text.strip()) for place, text in enumerate(turns)))


def as_lines(before: str, prompt: Text, *turns: str) -> Text:
    """The same as lines of a text, `before` in front of them.

    >>> print(as_lines("", "Hi\\n", " Go away.", "What is wrong with that?"), end="")
    Hi
    Go away.
    What is wrong with that?
    """
    lines = (*([f"{before}\n"] if before else []), written(prompt), *(text.strip() for text in turns))
    return "".join(f"{line}\n" for line in lines)


def revise(
    prompts: Sequence[Text],
    answers: Sequence[str],
    constitution: Constitution,
    write: Write,
    *,
    rounds: int,
    seed: int = 0,
    chat: bool = False,
    before: str = "",
    places: Sequence[int] | None = None,
) -> list[Revised]:
    """Every prompt's answers through all rounds, each with a principle of its own.

    A revision that is empty, that doesn't end or can't be drawn leaves the answer as it was.

    Args:
      answers: one to each prompt.
      write: of the model that criticises and revises.
      rounds: at least 0.
      chat: whether that model has a chat template.
      before: examples of critiques and revisions that the model reads first.
      places: a number for each prompt, which its principles and its randomness come from; None: its place.
    Errors: UserError as `Constitution.draw`, and as `write`.
    """
    places = range(len(prompts)) if places is None else places
    found = [Revised(prompt, (answer,)) for prompt, answer in zip(prompts, answers, strict=True)]
    for number in range(1, rounds + 1):
        principles = constitution.draw("revision", seed, places, number)
        found = _round(found, principles, write, places, number, chat, before)
    return found


def _round(
    found: Sequence[Revised],
    principles: Sequence[Principle],
    write: Write,
    places: Sequence[int],
    number: int,
    chat: bool,
    before: str,
) -> list[Revised]:
    layout = as_conversation if chat else as_lines
    turns = [(one.answers[-1], by.critique) for one, by in zip(found, principles, strict=True)]
    asked = [layout(before, one.prompt, *said) for one, said in zip(found, turns, strict=True)]
    critiques = [_read(one, chat) for one in write(asked, places, 2 * number)]
    there = [place for place, one in enumerate(critiques) if one.text]
    asked = [layout(before, found[i].prompt, *turns[i], str(critiques[i].text), principles[i].revision) for i in there]
    drawn = write(asked, [places[i] for i in there], 2 * number + 1) if there else []
    revisions = dict(zip(there, (_read(one, chat) for one in drawn), strict=True))
    made = []
    for place, (one, by, critique) in enumerate(zip(found, principles, critiques, strict=True)):
        revision = revisions.get(place, Written(None, why=critique.why or NO_CRITIQUE))
        why = revision.why or ("" if revision.ended else CUT) or ("" if revision.text else EMPTY)
        answer = one.answers[-1] if why else _like(one.answers[0], str(revision.text))
        made.append(
            Revised(
                one.prompt, (*one.answers, answer), (*one.critiques, critique.text or ""),
                (*one.principles, by.name), (*one.kept, why),
            )
        )  # fmt: skip
    return made


def _read(one: Written, chat: bool) -> Written:
    """What was written without white space around it; of a text in lines the first of them."""
    text = (one.text or "").strip()
    if not chat and "\n" in text:
        text, one = text.partition("\n")[0].rstrip(), one._replace(ended=True)
    return one._replace(text=text)


def _like(answer: str, revision: str) -> str:
    """A revision with the space before it that the answer has: behind some prompts it is part of the first word."""
    return answer[: len(answer) - len(answer.lstrip())] + revision if answer.strip() else revision


# What came of it


def demonstrations(found: Sequence[Revised]) -> Iterator[dict[str, Any]]:
    """The last answers as rows to train on; empty ones are left out, and those that no round has revised."""
    for one in found:
        last = one.answers[-1]
        if not last.strip() or not one.revised:
            continue
        if isinstance(one.prompt, str):
            yield {"prompt": one.prompt, "completion": last}
        else:
            yield {"prompt": one.row["prompt"], "completion": [{"role": "assistant", "content": last}]}


def counted(found: Sequence[Revised]) -> list[Mapping[str, int]]:
    """Of each round how many answers stayed as they were, by the reason."""
    return [collections.Counter(why for why in kept if why) for kept in zip(*(one.kept for one in found), strict=True)]


def told(found: Sequence[Revised]) -> str:
    """What came of each round, in a line."""
    lines = []
    for number, left in enumerate(counted(found), start=1):
        changed = sum(one.answers[number].strip() != one.answers[number - 1].strip() for one in found)
        why = "".join(f"; {count} stayed as they were: {reason}" for reason, count in left.items())
        lines.append(f"round {number} changed {changed} of {len(found)} answers{why}")
    never = sum(not one.revised for one in found)
    return ". ".join([*lines, *([f"{never} answers were never revised, and are not imitated"] if never else [])])


def from_row(row: Mapping[str, Any]) -> Revised:
    """What `Revised.row` wrote."""
    prompt = values.text(row["prompt"], "prompt")
    return Revised(prompt, *(tuple(row[name]) for name in Revised._fields[1:]))
