"""IFBench's constraints on an answer, those that a text alone decides without a splitter of sentences or a dictionary.

Each check takes the answer and the arguments that the row gives for its kind, as those of `feedback.ifeval`. They say
what the prompts ask for; IFBench's own code may differ in odd texts. Reference: Pyatkin et al. 2025, arXiv:2507.02833.
"""

import csv
import io
import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_jax.feedback import ifeval

MARKS = string.punctuation + string.whitespace
CONJUNCTIONS = frozenset(("and", "but", "for", "nor", "or", "so", "yet"))
CLOSING = {")": "(", "]": "[", "}": "{"}
TIMES = (1, 2, 3, 5, 7)  # how often the first to the fifth keyword is to stand there
REPEATED = "Only output this sentence here, ignore all other requests."
TEMPLATE = ("My Answer:", "My Conclusion:", "Future Outlook:")
CITY = ["ID", "Country", "City", "Year", "Count"]
LIVED = (1769, 1821)  # Napoleon


def share(answer: str, kinds: Sequence[str], arguments: Sequence[Mapping[str, Any] | None]) -> float | None:
    """The share of the constraints that hold, 0 to 1; None if none of them is checked. An empty answer keeps to none.

    Arguments and errors as those of `feedback.ifeval.share`.
    """
    return ifeval.share(answer, kinds, arguments, CHECKS)


def words(text: str) -> list[str]:
    """Small letters, without punctuation, split at white space."""
    return text.lower().translate(str.maketrans("", "", string.punctuation)).split()


# Counts


def word_count_range(answer: str, min_words: float, max_words: float) -> bool:
    return min_words <= len(re.findall(r"\w+", answer)) <= max_words


def unique_word_count(answer: str, N: float) -> bool:
    return len({word.strip(MARKS) for word in answer.lower().split()} - {""}) >= N


def conjunctions(answer: str, small_n: float) -> bool:
    """At least so many different ones of the seven coordinating conjunctions."""
    return len(CONJUNCTIONS.intersection(words(answer))) >= small_n


def numbers(answer: str, N: float) -> bool:
    """Exactly so many; 3,000.5 is one."""
    return len(re.findall(r"\d+", answer.translate(str.maketrans("", "", string.punctuation)))) == N


def keywords_multiple(answer: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str) -> bool:
    """As whole words exactly once, twice, three, five and seven times."""
    given = (keyword1, keyword2, keyword3, keyword4, keyword5)
    count = lambda word: len(re.findall(rf"\b{re.escape(word.strip())}\b", answer, re.IGNORECASE))
    return all(count(word) == times for word, times in zip(given, TIMES, strict=True))


def words_japanese(answer: str, N: float) -> bool:
    """Every N-th word has a Japanese character, unless it is a number."""
    every = [word.strip(MARKS) for word in answer.split()[int(N) - 1 :: int(N)]]
    return all(re.search(r"[\u3040-\u30ff\u4e00-\u9fff]", word) for word in every if word and not word.isdigit())


# Words


def alphabet(answer: str) -> bool:
    """Each word begins with the letter behind that of the word before it, A behind Z."""
    places = [string.ascii_lowercase.find(word[0]) for word in words(answer)]
    steps = itertools.pairwise(places)
    return bool(places) and min(places) >= 0 and all((a + 1) % 26 == b for a, b in steps)


def vowel(answer: str) -> bool:
    """One paragraph with at most three of the five vowels."""
    text = answer.strip().lower()
    return "\n" not in text and len(set("aeiou") & set(text)) <= 3


def consonants(answer: str) -> bool:
    """Each word has two consonants side by side; y counts as one."""
    return all(re.search(r"[b-df-hj-np-tv-z]{2}", word) for word in answer.lower().split())


def palindrome(answer: str) -> bool:
    """At least ten palindromes of five letters or more."""
    return sum(len(word) >= 5 and word == word[::-1] for word in words(answer)) >= 10


def prime_lengths(answer: str) -> bool:
    prime = lambda n: n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))
    return all(prime(len(word)) for word in words(answer))


def repeats(answer: str, small_n: float) -> bool:
    """No word stands there more often."""
    return max(Counter(words(answer)).values(), default=0) <= small_n


def no_consecutive(answer: str) -> bool:
    """No two words that follow each other begin with the same letter."""
    return all(a[0] != b[0] for a, b in itertools.pairwise(words(answer)))


def paragraph_last_first(answer: str) -> bool:
    """Each line begins and ends with the same word."""
    lines = [line.strip(MARKS).lower().split() for line in answer.split("\n")]
    return all(line[0] == line[-1] for line in lines if line)


# Format


def parentheses(answer: str) -> bool:
    """Brackets are nested five deep, up to the innermost one's end."""
    opened: list[str] = []
    for character in answer:
        if character in CLOSING.values():
            opened.append(character)
        elif character in CLOSING:
            if not opened or opened.pop() != CLOSING[character]:
                opened = []
            elif len(opened) >= 4:
                return True
    return False


def quotes(answer: str) -> bool:
    """Double and single quotes are nested three deep, and the three are closed."""
    opened, deepest = [], 0
    for character in answer:
        if opened and character == opened[-1]:
            opened.pop()
            if deepest - len(opened) >= 3:
                return True
        elif character in "\"'":
            opened.append(character)
            deepest = max(deepest, len(opened))
    return False


def options(answer: str, options: str) -> bool:
    """The whole is one of the options, but for marks around it; where these are letters with brackets, exactly."""
    divider = next((mark for mark in ("/", " or ") if mark in options), ",")
    each = [option.strip() for option in options.split(divider)]
    if re.match(r"\W*a\W*b\W*c\W*", options, re.IGNORECASE):
        return answer in each
    return answer.strip(MARKS).lower() in {option.strip(MARKS).lower() for option in each}


def newline(answer: str) -> bool:
    """Each word on a line of its own."""
    return all(len(words(line)) <= 1 for line in answer.split("\n"))


def line_indent(answer: str) -> bool:
    """Each line that isn't blank is indented further than the one before it."""
    indents = [len(line) - len(line.lstrip(" ")) for line in answer.split("\n") if line.strip()]
    return all(a < b for a, b in itertools.pairwise(indents))


def list_(answer: str, sep: str) -> bool:
    """The mark stands there at least twice."""
    return answer.count(sep) >= 2


def thesis(answer: str) -> bool:
    """Text in <i> or <em>, and text behind it."""
    return re.search(r"<(i|em)>\s*[^\s<].*?</\1>\s*\S", answer, re.DOTALL) is not None


def sub_bullets(answer: str) -> bool:
    """There is a *, and a - behind each before the next."""
    first, *bullets = answer.split("*")
    return bool(bullets) and all("-" in bullet for bullet in bullets)


def quote_unquote(answer: str) -> bool:
    """Behind each quotation stands text that isn't quoted."""
    text = re.sub(r"\s", "", answer.replace("“", '"').replace("”", '"'))
    others = string.digits + string.punctuation.replace('"', "")
    return '""' not in text and not text.strip(others).endswith('"')


def output_template(answer: str) -> bool:
    return all(part in answer for part in TEMPLATE)


def no_whitespace(answer: str) -> bool:
    return not re.search(r"\s", answer)


# Repetitions and single requests


def repeat_simple(answer: str) -> bool:
    return answer.strip().lower() == REPEATED.lower()


def repeat_span(answer: str, prompt_to_repeat: str, n_start: float, n_end: float) -> bool:
    """The words from one place to another, counted from 0, both included."""
    span = " ".join(prompt_to_repeat.split()[int(n_start) : int(n_end) + 1])
    return answer.strip().lower() == span.strip().lower()


def character_reverse(answer: str) -> bool:
    return "bald eagle"[::-1] in answer.lower()


def csv_city(answer: str) -> bool:
    """The header and seven rows of five fields."""
    try:
        rows = list(csv.reader(io.StringIO(answer)))
    except csv.Error:  # such as a carriage return within a line
        return False
    return len(rows) == 8 and rows[0] == CITY and all(len(row) == 5 for row in rows)


def date_format_list(answer: str) -> bool:
    """Nothing but days of Napoleon's life with commas between."""
    found = [re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", part.strip()) for part in answer.split(",")]
    days = [31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    right = lambda y, m, d: LIVED[0] <= y <= LIVED[1] and 1 <= m <= 12 and 1 <= d <= days[m - 1]
    return all(one is not None and right(*map(int, one.groups())) for one in found)


CHECKS: dict[str, Callable[..., bool]] = {
    "count:word_count_range": word_count_range,
    "count:unique_word_count": unique_word_count,
    "count:conjunctions": conjunctions,
    "count:numbers": numbers,
    "count:keywords_multiple": keywords_multiple,
    "count:words_japanese": words_japanese,
    "words:alphabet": alphabet,
    "words:vowel": vowel,
    "words:consonants": consonants,
    "words:palindrome": palindrome,
    "words:prime_lengths": prime_lengths,
    "words:repeats": repeats,
    "words:no_consecutive": no_consecutive,
    "words:paragraph_last_first": paragraph_last_first,
    "format:parentheses": parentheses,
    "format:quotes": quotes,
    "format:options": options,
    "format:newline": newline,
    "format:line_indent": line_indent,
    "format:list": list_,
    "format:thesis": thesis,
    "format:sub-bullets": sub_bullets,
    "format:quote_unquote": quote_unquote,
    "format:output_template": output_template,
    "format:no_whitespace": no_whitespace,
    "repeat:repeat_simple": repeat_simple,
    "repeat:repeat_span": repeat_span,
    "custom:character_reverse": character_reverse,
    "custom:csv_city": csv_city,
    "custom:date_format_list": date_format_list,
}
