"""IFEval's constraints on an answer, each checked exactly from its text alone.

Every check takes the answer and the arguments that the row gives for its kind, and says whether the answer keeps to
it, read strictly. Each is linear in the answer's length, whatever the answer says: a text that a model repeats for
ever is ordinary. Reference: Zhou et al. 2023, arXiv:2311.07911 (with the code of google-research).
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_jax.errors import UserError

# Kinds of IFEval that a text alone doesn't decide. Any other kind that isn't in CHECKS is left out in the same way.
NOT_CHECKED = ("language:response_language",)

# No sentence ends after these, nor after one letter other than I.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr vs rev hon gen gov sen rep e.g i.e cf fig approx dept est".split()
)


def share(
    answer: str,
    kinds: Sequence[str],
    arguments: Sequence[Mapping[str, Any] | None],
    checks: Mapping[str, Callable[..., bool]] | None = None,
) -> float | None:
    """The share of the constraints that hold, 0 to 1; None if none of them is checked. An empty answer keeps to none.

    Args:
      kinds: such as "punctuation:no_comma"; those without a check are left out.
      arguments: one a kind; an argument that is None counts as not given.
      checks: by kind; None: CHECKS, those of IFEval.
    Raises: UserError for arguments that the kind doesn't take, and another number of them than of kinds.
    """
    if len(kinds) != len(arguments):
        raise UserError(f"{len(arguments)} kwargs for the constraints {', '.join(kinds)}; give each its own.")
    checks = CHECKS if checks is None else checks
    held = [
        bool(answer.strip()) and checks[kind](answer, **_given(checks[kind], kind, given))
        for kind, given in zip(kinds, arguments, strict=True)
        if kind in checks
    ]
    return sum(held) / len(held) if held else None


def _given(check: Callable[..., bool], kind: str, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    try:
        inspect.signature(check).bind("", **given)
    except TypeError as error:
        raise UserError(
            f"the constraint {kind!r} can't be checked with the kwargs {given} ({error}); mend the row."
        ) from None
    return given


def _relation(count: int, relation: str, bound: float) -> bool:
    if relation not in ("less than", "at least"):
        raise UserError(f"there is no relation {relation!r} of counts; IFEval has 'less than' and 'at least'.")
    return count < bound if relation == "less than" else count >= bound


# Keywords


def existence(answer: str, keywords: Sequence[str]) -> bool:
    """Each stands somewhere, also inside a word; the case doesn't matter, here and below."""
    return all(word.lower() in answer.lower() for word in keywords)


def frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return _relation(answer.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(answer: str, forbidden_words: Sequence[str]) -> bool:
    """None stands there as a whole word."""
    return not any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", answer, re.IGNORECASE) for w in forbidden_words)


def letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _relation(answer.lower().count(letter.strip().lower()), let_relation, let_frequency)


# Lengths


def number_words(answer: str, num_words: int, relation: str) -> bool:
    return _relation(len(re.findall(r"\w+", answer)), relation, num_words)


def number_sentences(answer: str, num_sentences: int, relation: str) -> bool:
    """By the rule of `sentences`; IFEval asks a trained splitter, which may differ by a sentence in odd texts."""
    return _relation(sentences(answer), relation, num_sentences)


def sentences(text: str) -> int:
    """How many sentences there are: stretches with a letter up to . ! or ? at the end of a word, or the text's end.

    >>> sentences("Dr. Who e.g. came at 3.15! 1. Did he? No")
    3
    """
    count, letter = 0, False
    for word in re.sub("([。！？।])", r"\1 ", text).split():
        letter = letter or any(character.isalpha() for character in word)
        bare = word.rstrip("\"'”’)]*_»")
        short = bare.rstrip(".").lstrip("\"'“‘([*_«").lower()
        names = bare.endswith(".") and (
            short in ABBREVIATIONS or (len(short) == 1 and short.isalpha() and short != "i")
        )
        if bare.endswith(tuple(".!?…。！？।")) and not names:
            count, letter = count + letter, False
    return count + letter


def number_paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Exactly so many with *** between them; it may also stand before and after all."""
    return _parts(answer, "***") == num_paragraphs


def _parts(text: str, divider: str) -> int | None:
    """How many parts a divider leaves; None if one in the middle is empty."""
    empty = [not part.strip() for part in text.split(divider)]
    return None if any(empty[1:-1]) else empty.count(False)


def nth_paragraph_first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs with an empty line between them, and the n-th, from 1 on, begins with the word."""
    paragraphs = answer.split("\n\n")
    full = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if full != num_paragraphs or not 1 <= nth_paragraph <= full:
        return False
    words = paragraphs[int(nth_paragraph) - 1].split()
    return bool(words) and re.split("[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0].lower() == first_word.lower()


# Content and format


def _between(text: str, opening: str, closing: str) -> Iterator[str]:
    """What stands between the two, on one line, from left to right."""
    for line in text.split("\n"):
        start = line.find(opening)
        while start >= 0 and (end := line.find(closing, start + len(opening))) >= 0:
            yield line[start + len(opening) : end]
            start = line.find(opening, end + len(closing))


def number_placeholders(answer: str, num_placeholders: int) -> bool:
    """At least so many, as [address]."""
    return sum(1 for _ in _between(answer, "[", "]")) >= num_placeholders


def postscript(answer: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    dotted = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(dotted.get(marker, re.escape(marker.lower())), answer.lower()) is not None


def number_bullet_lists(answer: str, num_bullets: int) -> bool:
    """Exactly so many lines that begin with - or with one *."""
    lines = [line.lstrip() for line in answer.split("\n")]
    return sum(line[:1] == "-" or (line[:1] == "*" and line[1:2] not in ("", "*")) for line in lines) == num_bullets


def constrained_response(answer: str) -> bool:
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


def number_highlighted_sections(answer: str, num_highlights: int) -> bool:
    """At least so many, as *this* or **this**."""
    found = re.findall(r"\*([^\n*]*)\*", answer) + re.findall(r"\*\*([^\n*]*)\*\*", answer)
    return sum(bool(text.strip()) for text in found) >= num_highlights


def multiple_sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many marks such as `Section 1`."""
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", answer)) >= num_sections


def json_format(answer: str) -> bool:
    """The whole is JSON, in a code fence or not."""
    text = re.sub(r"^```(?:json|Json|JSON)?", "", answer.strip()).removesuffix("```").strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # a model may open ten thousand brackets
        return False
    return True


def title(answer: str) -> bool:
    """Something stands in << >>, on one line."""
    spans = ((line.find("<<"), line.rfind(">>"), line) for line in answer.split("\n"))
    return any(0 <= start < end and line[start:end].strip("<> \t\r") != "" for start, end, line in spans)


# Combinations, beginning and end, case


def two_responses(answer: str) -> bool:
    """Two different ones with ****** between them."""
    responses = [part.strip() for part in answer.split("******") if part.strip()]
    return _parts(answer, "******") == 2 and responses[0] != responses[1]


def repeat_prompt(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def english_capital(answer: str) -> bool:
    """No small letter and some capital; which language it is isn't checked, here and below."""
    return answer.isupper()


def english_lowercase(answer: str) -> bool:
    return answer.islower()


def capital_word_frequency(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words without small letters; with a hyphen or apostrophe inside it is one word."""
    words = re.findall(r"\w+(?:[-'’.]\w+)*", answer)
    return _relation(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def no_comma(answer: str) -> bool:
    return "," not in answer


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_words": number_words,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "change_case:capital_word_frequency": capital_word_frequency,
    "punctuation:no_comma": no_comma,
}
