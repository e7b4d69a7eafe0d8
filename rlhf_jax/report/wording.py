"""How numbers and other people's text are written on a page."""

import math
import re
import unicodedata
from typing import SupportsFloat, SupportsIndex

# What a browser would obey, hide or choke on: controls but for tab and newline, lone surrogates, marks that turn
# the direction of what follows, characters without width, non-characters, invisible tags.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """The text with every character that can't be seen, or isn't allowed in HTML, named in its place.

    >>> print(visible("a\\x00b\\x1b[1m\\u202ec\\ud800"))
    a‹U+0000›b‹U+001B›[1m‹U+202E›c‹U+D800›
    """
    return _UNSEEN.sub(lambda found: f"‹U+{ord(found[0]):04X}›", text.replace("\r\n", "\n"))


def number(value: SupportsFloat | SupportsIndex) -> str:
    """Three significant digits, whole numbers in full; thousands are grouped.

    >>> print([number(x) for x in (12345, 0.5, -12.345, 1234.5, 2e-5, 0.0, float("nan"))])
    ['12,345', '0.500', '−12.3', '1,234', '2.00e−5', '0', 'nan']
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, SupportsIndex):
        return f"{value.__index__():,}".replace("-", "−")
    x = float(value)
    size = abs(x)
    if not math.isfinite(x):
        text = str(x).replace("inf", "∞")
    elif x == 0:
        text = "0"
    elif size >= 1e9 or size < 0.001:
        text = f"{x:.2e}"
    elif size >= 999.5:
        text = f"{x:,.0f}"
    else:
        text = f"{x:#.3g}".rstrip(".")
    return _tidy(text)


def tick(value: float) -> str:
    """A number beside an axis, without the zeros that say nothing.

    >>> print([tick(x) for x in (0.30000000000000004, 20000.0, -1e-05)])
    ['0.3', '20,000', '−1e−5']
    """
    return _tidy(f"{value:,.6g}")


def _tidy(text: str) -> str:
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), text).replace("-", "−")


def shortened(text: str, columns: int) -> str:
    """One line that takes at most so many columns; wide characters take two, combining ones none.

    >>> print(shortened("a long name", 8), shortened("short", 8))
    a long … short
    """
    line = " ".join(visible(text).split())
    widths = [_width(character) for character in line]
    if sum(widths) <= columns:
        return line
    kept, used = "", 0
    for character, width in zip(line, widths, strict=True):
        used += width
        if used > columns - 1 or len(kept) >= 4 * columns:  # a pile of combining marks ends too
            break
        kept += character
    return kept + "…"


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
