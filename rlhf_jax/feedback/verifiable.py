"""Rewards that a program decides: school mathematics, competition mathematics, constraints on form.

All have the form of a reward function (`feedback.rewards`). What an answer says is read, never run.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from rlhf_jax.errors import UserError
from rlhf_jax.feedback import ifeval as constraints

Said = str | Sequence[Mapping[str, Any]]  # a text, or role/content messages, of which the last assistant's counts


def said(completion: Said) -> str:
    """The answer's text; of messages without one of the assistant, or with none of its words, it is empty."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") for message in completion if message["role"] == "assistant"]
    return contents[-1] or "" if contents else ""


# School mathematics


LONGEST_NUMBER = 40  # characters; a longer one is no answer to a question
# A minus right after a word, a number or a bracket takes away; elsewhere it is a sign.
NUMBER = re.compile(r"(?:(?<![\w)\]}])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/0*[1-9]\d*)?")
# In this order: the calculator's notes, LaTeX's commas and spaces, currency signs, fractions, dashes.
CLEANING = (
    (re.compile(r"<<[^<>\n]*>>"), ""),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"\\?[$€£¥₹]"), ""),
    (re.compile(r"\\[dt]?frac(?:\{(\d+)\}\{(\d+)\}|(\d)(\d))"), r"\1\3/\2\4"),
    (re.compile(r"[−–]"), "-"),
)


def gsm8k(prompts: Sequence[Said], completions: Sequence[Said], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1.0 if the final number of the completion equals that of the reference, 0.0 if not.

    The final number is the last one after `####`; else the last in the last \\boxed{}; else what follows the last
    "answer is" on its line, after the line's last equals sign; else the last of all. Commas of thousands, currency
    signs, percent signs and full stops don't count, 12.0 is 12, and 3/4 is 0.75.

    Args:
      answer: solutions of GSM8K, which end with `#### N`, or numbers; None where a row has none.
    Returns: one an answer; None where the row has no reference.
    Raises: UserError for a reference that is no number.
    References: Cobbe et al. 2021, arXiv:2110.14168.

    >>> print(gsm8k(["6 * 3?"], ["That makes 6 * 3 = $18.00."], ["6 * 3 = <<6*3=18>>18\\n#### 18"]))
    [1.0]
    """
    return [
        None if wanted is None else float(final_number(said(completion)) == _reference(wanted))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def final_number(text: str) -> Fraction | None:
    """The number that an answer comes to, as `gsm8k` says; None if it has none."""
    for pattern, plain in CLEANING:
        text = pattern.sub(plain, text)
    if marked := re.findall(rf"####[^\w\n]{{0,9}}?({NUMBER.pattern})", text):
        return _value(marked[-1])
    if numbers := NUMBER.findall(boxed(text) or ""):
        return _value(numbers[-1])
    _, found, rest = text.lower().rpartition("answer is")
    line = rest.lstrip(" :*\n").partition("\n")[0]
    if found and (stated := NUMBER.search(line.rpartition("=")[2])):
        return _value(stated[0])
    numbers = NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def boxed(text: str) -> str | None:
    """What the last \\boxed{} or \\fbox{} of a text holds; None without one that is closed."""
    opened = max(text.rfind(r"\boxed{"), text.rfind(r"\fbox{"))
    if opened < 0:
        return None
    start = text.index("{", opened) + 1
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[start : start + brace.start()].strip()
    return None


def _value(number: str) -> Fraction | None:
    if len(number) > LONGEST_NUMBER:
        return None
    above, _, below = number.replace(",", "").partition("/")
    return Fraction(above) / Fraction(below or "1")


def _reference(answer: Any) -> Fraction:
    text = str(answer).rpartition("####")[2]
    for pattern, plain in CLEANING:
        text = pattern.sub(plain, text)
    number = NUMBER.fullmatch(text.strip().rstrip(".%"))
    value = _value(number[0]) if number else None
    if value is None:
        raise UserError(
            f"the reference {str(answer)[-80:]!r} is no number, nor a solution that ends with `#### N`; "
            "mend the column answer."
        )
    return value


# Competition mathematics


LONGEST_ANSWER = 300  # characters; of MATH's own none has over 160
SECONDS = 3  # of processor time that one comparison may take
MEMORY = 4 << 30  # bytes of address space
LIMITS = (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT)  # how a process ends that meets one
Pair = tuple[str, str]  # reference and answer
CHECKER = "from rlhf_jax.feedback import verifiable; verifiable.serve()"


def math(prompts: Sequence[Said], completions: Sequence[Said], answer: Sequence[Any], **_: Any) -> list[float | None]:
    """1.0 if what the last \\boxed{} of the completion holds equals the reference as mathematics, 0.0 if not.

    Equal texts are equal; others are compared by Math-Verify, decimals to 6 places. That needs the extra `verify`. It
    runs in a process of its own with limits of processor time and memory, because nine characters can ask for a number
    that no machine holds; an answer that goes over a limit, or over LONGEST_ANSWER characters, earns 0.0.

    Args:
      answer: the reference answers in LaTeX, or solutions with one in \\boxed{}; None where a row has none.
    Returns: one an answer; None where the row has no reference.
    Raises: UserError if Math-Verify isn't installed.
    References: Hendrycks et al. 2021, arXiv:2103.03874.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("reward function 'math' needs the package math-verify; run: pip install 'rlhf_jax[verify]'.")
    pairs = [
        None if wanted is None else ((boxed(str(wanted)) or str(wanted)).strip(), boxed(said(completion)) or "")
        for completion, wanted in zip(completions, answer, strict=True)
    ]
    equal = {pair: pair[0] == pair[1] for pair in pairs if pair}
    equal |= _compare([pair for pair, same in equal.items() if pair[1] and not same and len(pair[1]) <= LONGEST_ANSWER])
    return [None if pair is None else float(equal[pair]) for pair in pairs]


def _compare(pairs: Sequence[Pair]) -> dict[Pair, bool]:
    """Whether reference and answer are equal. A checker that dies of a limit takes one answer with it."""
    equal: dict[Pair, bool] = {}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    while len(equal) < len(pairs):
        with subprocess.Popen(
            [sys.executable, "-c", CHECKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # who stops the run by the keyboard doesn't stop a comparison
        ) as checker:
            assert checker.stdin
            try:
                _ask(checker, pairs, equal)
            finally:
                checker.kill()
                with contextlib.suppress(BrokenPipeError):  # of what it didn't live to read
                    checker.stdin.close()
    return equal


def _ask(checker: subprocess.Popen, pairs: Sequence[Pair], equal: dict[Pair, bool]) -> None:
    """Fills in `equal` until all is there, or the checker died of a limit: then with one False at the end."""
    assert checker.stdin and checker.stdout
    if checker.stdout.readline():
        for pair in pairs[len(equal) :]:
            with contextlib.suppress(BrokenPipeError):  # it died: there is no line to read
                print(json.dumps(pair), file=checker.stdin, flush=True)
            if not (line := checker.stdout.readline()):
                break
            equal[pair] = json.loads(line)
        else:
            return
    if (status := checker.wait()) not in LIMITS:
        raise RuntimeError(f"the process that compares answers ended with status {status}; its own words are above.")
    equal[pairs[len(equal)]] = False


def serve() -> None:
    """The process that compares: a line of [reference, answer] in, a line of true or false out."""
    import resource  # not on every system, and only here

    from math_verify import LatexExtractionConfig, parse, verify  # pyright: ignore[reportMissingImports]

    logging.disable()  # it warns that its timeouts are off: the limits below also end what runs inside C
    # What isn't LaTeX it would give to a parser of SymPy that runs it as Python: so only LaTeX is read.
    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    def limit(kind: int, amount: int) -> None:
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))

    limit(resource.RLIMIT_AS, MEMORY)
    print("ready", flush=True)
    for line in sys.stdin:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        limit(resource.RLIMIT_CPU, int(used) + 1 + SECONDS)  # whole seconds: an answer has SECONDS at least
        untimed: Any = None  # allowed, and not what its signature says
        wanted, given = (parse(rf"\boxed{{{text}}}", latex, parsing_timeout=untimed) for text in json.loads(line))
        print(json.dumps(bool(verify(wanted, given, timeout_seconds=None))), flush=True)


# Constraints on form


def ifeval(
    prompts: Sequence[Said],
    completions: Sequence[Said],
    instruction_id_list: Sequence[Sequence[str] | None],
    kwargs: Sequence[Sequence[Mapping[str, Any] | None] | None],
    **_: Any,
) -> list[float | None]:
    """The share of a row's constraints that the completion keeps to, read strictly, 0 to 1.

    Every kind of IFEval is checked (`feedback.ifeval.CHECKS`) but language:response_language, and of
    change_case:english_capital and english_lowercase the case alone. Kinds that aren't checked are left out.

    Args:
      instruction_id_list: of each row, the kinds; None where a row has none.
      kwargs: of each row, the arguments of each kind.
    Returns: one an answer; None where no constraint of the row is checked.
    Raises: UserError for arguments that a kind doesn't take.
    References: Zhou et al. 2023, arXiv:2311.07911.

    >>> print(ifeval(["Hi?"], ["hello, you"], [["punctuation:no_comma", "change_case:english_lowercase"]], [[{}, {}]]))
    [0.5]
    """
    rows = zip(completions, instruction_id_list, kwargs, strict=True)
    return [constraints.share(said(text), kinds or (), arguments or ()) for text, kinds, arguments in rows]


REWARDS: dict[str, Callable[..., list[float | None]]] = {"gsm8k": gsm8k, "math": math, "ifeval": ifeval}
