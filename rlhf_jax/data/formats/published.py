"""The shapes of published data sets, each as its authors wrote it.

Adapters as in `columns`; one record may give several rows. Where people or judges compared answers, a record
without a preference is `Left`: a tie teaches no pair. A question becomes a user's message with a chat template,
and without one a text that ends with a newline.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.data.formats.columns import instructed, transcripts
from rlhf_jax.data.formats.values import (
    Columns,
    answer,
    asked,
    entries,
    fields,
    number,
    perhaps,
    reply,
    string,
    whole,
)
from rlhf_jax.data.rows import (
    Conversation,
    Demonstration,
    Left,
    Message,
    Preference,
    Prompt,
    Ranking,
    Refusal,
    Stepwise,
    Text,
)

TIE = "no preference: a tie"


def _compared(prompt: Text, answers: Sequence[str], better: int, chat: bool) -> Preference:
    """Two answers, of which the one at `better` (0 or 1) is preferred."""
    if not all(text.strip() for text in answers):
        raise Left("one of the two answers is empty")
    if answers[0] == answers[1]:
        raise Left("the two answers are the same")
    return Preference(prompt, reply(answers[better], chat), reply(answers[1 - better], chat))


def _strings(columns: Columns, *names: str) -> list[str]:
    return [string(columns[name], name) for name in names]


# Self-Instruct, Wang et al. 2022, arXiv:2212.10560


def self_instruct(columns: Columns, chat: bool) -> tuple[Demonstration, ...]:
    """An instruction with its instances, each an input and an output."""
    instruction = string(columns["instruction"], "instruction")
    rows = []
    for one in entries(columns["instances"], "instances"):
        given, output = (
            string(fields(one, "instances").get(name), f"instances.{name}") for name in ("input", "output")
        )
        answer(output, "instances.output")
        rows.append(Demonstration(instructed(instruction, given, chat), reply(output, chat)))
    return tuple(rows)


# OpenAssistant's trees, Koepf et al. 2023, arXiv:2304.07327


def oasst(columns: Columns, chat: bool) -> tuple[Demonstration, ...]:
    """A conversation for every way down a tree that takes the best reply of the assistant at each place.

    Ways part where people went on in several manners; what two of them share is trained in both. A last
    question that has no reply is dropped.
    """
    paths = _best_paths(_node(columns["prompt"]), ())
    if not paths:
        raise Left("no reply in the tree")
    return tuple(Demonstration((), path) for path in paths)


def oasst_ranking(columns: Columns, chat: bool) -> tuple[Ranking, ...]:
    """The ranked replies to every message of a tree, behind all that was said before it."""
    rows = tuple(_rankings(_node(columns["prompt"]), ()))
    if not rows:
        raise Left("no message with two ranked replies in the tree")
    return rows


def is_tree(columns: Columns) -> bool:
    """Whether a tree hangs from the prompt; rows made of one may keep its number beside a plain prompt."""
    return isinstance(columns.get("prompt"), Mapping)


def _node(value: Any) -> Columns:
    node = fields(value, "prompt")
    if node.get("role") not in ("prompter", "assistant"):
        raise Refusal(f"'prompt' has a message with role {node.get('role')!r}; allowed are prompter, assistant")
    string(node.get("text"), "prompt.text")
    return node


def _replies(node: Columns) -> list[Columns]:
    """What follows, but for deleted and empty messages and all behind them."""
    replies = map(_node, perhaps(node.get("replies"), "prompt.replies"))
    return [reply for reply in replies if not reply.get("deleted") and reply["text"].strip()]


def _grown(before: Conversation, node: Columns) -> Conversation:
    return (*before, Message("user" if node["role"] == "prompter" else "assistant", node["text"]))


def _best_paths(node: Columns, before: Conversation) -> list[Conversation]:
    """The ways on from a message, each to a last reply."""
    path, replies = _grown(before, node), _replies(node)
    if node["role"] == "prompter":  # a reply that stands alone has no rank
        best = sorted(replies, key=lambda one: (one.get("rank") is None, one.get("rank") or 0))[:1]
        return [way for one in best for way in _best_paths(one, path)]
    return [way for one in replies for way in _best_paths(one, path)] or [path]


def _rankings(node: Columns, before: Conversation) -> Iterator[Ranking]:
    path = _grown(before, node)
    ranked = [(one["text"], one["rank"]) for one in _replies(node) if one.get("rank") is not None]
    if node["role"] == "prompter" and len(ranked) > 1:
        ranks = tuple(number(rank, "prompt.rank") for _, rank in ranked)
        yield Ranking(path, tuple((Message("assistant", text),) for text, _ in ranked), ranks)
    for one in _replies(node):
        yield from _rankings(one, path)


# Everyone Deserves a Reward (DSP), Cheng et al. 2023, arXiv:2309.03126


def scored_transcripts(columns: Columns, chat: bool) -> Preference:
    """Two HH transcripts, the one of the higher score preferred."""
    texts, scores = entries(columns["text"], "text"), entries(columns["score"], "score")
    if len(texts) != 2 or len(scores) != 2:
        raise Refusal(f"{len(texts)} 'text' and {len(scores)} 'score', and two of each are compared")
    first, second = (number(score, "score") for score in scores)
    if first == second:
        raise Left(TIE)
    return transcripts(texts[first < second], texts[first > second], chat)


def is_scored_pair(columns: Columns) -> bool:
    """Whether texts stand in a list; a document with a score has one text."""
    return isinstance(columns.get("text"), list)


def domain(preferred: str, columns: Columns, chat: bool) -> Ranking:
    """The answer of one domain above those of all the others, which are equal."""
    answers = fields(columns["responses"], "responses")
    texts = {name: string(text, f"responses.{name}") for name, text in answers.items()}
    if preferred not in texts:
        raise Refusal(f"'responses' has no answer of {preferred!r}")
    texts = {name: text for name, text in texts.items() if text.strip()}
    if preferred not in texts or len(texts) < 2:
        raise Left("the answer of the preferred domain, or all others, are empty")
    ranks = tuple(float(name != preferred) for name in texts)
    prompt = asked(string(columns["query"], "query"), chat)
    return Ranking(prompt, tuple(reply(text, chat) for text in texts.values()), ranks)


def is_by_domain(columns: Columns) -> bool:
    """Whether each response stands under the name of its domain."""
    return isinstance(columns.get("responses"), Mapping)


# Comparisons by people and by judges


def pandalm(columns: Columns, chat: bool) -> Preference:
    """What most annotators prefer: 1 and 2 are the answers, 0 a tie. Wang et al. 2023, arXiv:2306.05087."""
    instruction, first, second = _strings(columns, "instruction", "response1", "response2")
    given = string(columns.get("input", ""), "input")
    votes = [whole(value, name) for name, value in columns.items() if name.startswith("annotator")]
    if bad := set(votes) - {0, 1, 2}:
        raise Refusal(f"an annotator's choice is {min(bad)}; allowed are 0, 1, 2")
    choice, count = Counter(votes).most_common(1)[0]
    if 2 * count <= len(votes):
        raise Left("no preference: no choice of most annotators")
    if choice == 0:
        raise Left(TIE)
    return _compared(instructed(instruction, given, chat), (first, second), choice - 1, chat)


# Five grades; how clear the preference was is not kept.
GRADES = {"a-is-better": 0, "a-is-slightly-better": 0, "tie": None, "b-is-slightly-better": 1, "b-is-better": 1}


def graded_pair(columns: Columns, chat: bool) -> Preference:
    """A comparison in five grades, as in Tulu's human evaluation. Wang et al. 2023, arXiv:2306.04751."""
    prompt, first, second, grade = _strings(columns, "prompt", "completion_a", "completion_b", "preference")
    if grade not in GRADES:
        raise Refusal(f"'preference' is {grade!r}; allowed are {', '.join(GRADES)}")
    better = GRADES[grade]
    if better is None:
        raise Left(TIE)
    return _compared(asked(prompt, chat), (first, second), better, chat)


def judged_pair(columns: Columns, chat: bool) -> Preference:
    """A judge's preference from 1 (the first answer) to 2 (the second), as in AlpacaEval. arXiv:2404.04475."""
    instruction, first, second = _strings(columns, "instruction", "output_1", "output_2")
    judged = number(columns["preference"], "preference")
    if judged in (0, 1.5):  # 0 is how AlpacaEval used to write a tie
        raise Left(TIE)
    if not 1 <= judged <= 2:
        raise Refusal(f"'preference' is {judged}, not from 1 to 2")
    return _compared(instructed(instruction, "", chat), (first, second), int(judged > 1.5), chat)


# Fine-grained feedback on answers from passages, Wu et al. 2023, arXiv:2306.01693


def finegrained(columns: Columns, chat: bool) -> tuple[Demonstration, ...]:
    """The reference answer, and the first prediction as an annotator mended it."""
    feedback = fields(columns["feedback"], "feedback")
    texts = string(columns["gold"], "gold"), string(feedback.get("corrected-prediction"), "corrected-prediction")
    good = [text for text in dict.fromkeys(texts) if text.strip()]
    if not good:
        raise Refusal("'gold' and 'corrected-prediction' are empty answers")
    return tuple(Demonstration(from_passages(columns, chat), reply(text, chat)) for text in good)


def finegrained_pairs(columns: Columns, chat: bool) -> tuple[Preference, ...]:
    """Each two of the four predictions of which one was preferred."""
    predictions, choices = six_choices(columns)
    prompt = from_passages(columns, chat)
    pairs = [
        _compared(prompt, pair, choice - 1, chat)
        for pair, choice in zip(itertools.combinations(predictions, 2), choices, strict=True)
        if choice and pair[0] != pair[1] and all(text.strip() for text in pair)
    ]
    if not pairs:
        raise Left(TIE)
    return tuple(pairs)


def finegrained_ranking(columns: Columns, chat: bool) -> Ranking:
    """The four predictions by how often each was preferred, a tie half a time for both; equal ones stand once."""
    predictions, choices = six_choices(columns)
    wins = [0.0] * 4
    for (first, second), choice in zip(itertools.combinations(range(4), 2), choices, strict=True):
        wins[first] += (0.5, 1, 0)[choice]
        wins[second] += (0.5, 0, 1)[choice]
    ranks: dict[str, float] = {}
    for text, won in zip(predictions, wins, strict=True):
        if text.strip():
            ranks.setdefault(text, -won)
    return Ranking(from_passages(columns, chat), tuple(reply(text, chat) for text in ranks), tuple(ranks.values()))


def six_choices(columns: Columns) -> tuple[list[str], list[int]]:
    """Four predictions and what was preferred of each two: 1 the first, 2 the second, 0 neither."""
    predictions = _strings(columns, *(f"prediction {n}" for n in (1, 2, 3, 4)))
    choices = [whole(value, "preference") for value in entries(columns["preference"], "preference")]
    if len(choices) != 6 or not set(choices) <= {0, 1, 2}:
        raise Refusal("'preference' is not six choices from 0, 1, 2")
    return predictions, choices


def finegrained_spans(columns: Columns, chat: bool) -> Stepwise:
    """The first prediction, cut where an error begins or ends: a piece inside an error is wrong."""
    (text,) = _strings(columns, "prediction 1")
    errors = perhaps(fields(columns["feedback"], "feedback").get("errors"), "errors")
    spans = [tuple(whole(fields(e, "errors").get(end), f"errors.{end}") for end in ("start", "end")) for e in errors]
    if any(not 0 <= start < end <= len(text) for start, end in spans):
        raise Refusal("an error lies outside of the prediction")
    answer(text, "prediction 1")
    spans = [(_before_space(text, start), _before_space(text, end)) for start, end in spans]
    cuts = itertools.pairwise(sorted({0, len(text), *itertools.chain(*spans)}))
    pieces = [(text[a:b], float(not any(start <= a and b <= end for start, end in spans))) for a, b in cuts]
    steps, labels = zip(*pieces, strict=True)
    return Stepwise(from_passages(columns, chat), tuple(reply(step, chat) for step in steps), labels)


def _before_space(text: str, place: int) -> int:
    """The place before the white space that a place stands behind: tokens begin with it, and a word's own is kept."""
    return len(text[:place].rstrip()) if place < len(text) else place


def from_passages(columns: Columns, chat: bool) -> Text:
    """The passages, each a title and its sentences, and then the question: a prompt is cut at its beginning."""
    found = [entries(one, "passages") for one in perhaps(columns["passages"], "passages") if one]
    passages = [[string(part, "passages") for part in one] for one in found]
    told = [f"{title}\n{' '.join(sentences)}" for title, *sentences in passages]
    return asked("\n\n".join([*told, string(columns["question"], "question")]), chat)


# Prompts for rollouts

ANSWERS = ("messages", "conversations", "completion", "chosen")


def is_unanswered(columns: Columns) -> bool:
    """Whether no column of a shared form holds an answer to train on."""
    return not any(name in columns for name in ANSWERS)


def problem(columns: Columns, chat: bool) -> Prompt:
    """A problem whose short answer can be checked; its own solution is not trained on. MATH, arXiv:2103.03874."""
    return Prompt(asked(string(columns["problem"], "problem"), chat))


def first_turn(columns: Columns, chat: bool) -> Prompt:
    """What a user says first; what they say next stands behind an answer that is not there. MT-Bench."""
    turns = entries(columns["turns"], "turns")
    return Prompt(asked(string(turns[0], "turns"), chat))
