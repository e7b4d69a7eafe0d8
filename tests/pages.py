"""The pages of the documentation, read as GitHub reads them: headings, links, blocks of code, commands."""

import dataclasses
import functools
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = pathlib.Path(__file__).resolve().parents[1]
MARKDOWN = MarkdownIt("commonmark").enable("table")


class Found(NamedTuple):
    """Something at a line of a page, such as a link or a command."""

    line: int
    text: str


class Block(NamedTuple):
    """A block between fences; `line` is that of its first line."""

    line: int
    language: str
    text: str


@dataclasses.dataclass(frozen=True)
class Page:
    """One file of Markdown."""

    path: pathlib.Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT)) if self.path.is_relative_to(ROOT) else self.path.name

    @functools.cached_property
    def tokens(self) -> list[Token]:
        return MARKDOWN.parse(self.path.read_text())

    @functools.cached_property
    def headings(self) -> list[tuple[int, int, str]]:
        """Of each heading its line, its level and its anchor."""
        found, seen = [], {}
        for opening, inside in zip(self.tokens, self.tokens[1:], strict=False):
            if opening.type == "heading_open" and opening.map:
                base = slug("".join(part.content for part in inside.children or ()))
                seen[base] = seen.get(base, -1) + 1
                found.append((opening.map[0] + 1, int(opening.tag[1]), f"{base}-{seen[base]}" if seen[base] else base))
        return found

    @functools.cached_property
    def anchors(self) -> set[str]:
        return {anchor for _, _, anchor in self.headings}

    @functools.cached_property
    def blocks(self) -> list[Block]:
        fences = [token for token in self.tokens if token.type == "fence" and token.map]
        return [Block(t.map[0] + 2, t.info.strip(), t.content) for t in fences if t.map]

    @functools.cached_property
    def words(self) -> list[tuple[int, Token]]:
        """Every piece of running text with its line: a text, a link's opening, an image, a piece of code."""
        found = []
        for token in self.tokens:
            line = token.map[0] + 1 if token.map else 0
            for part in token.children or ():
                found.append((line, part))
                line += part.type in ("softbreak", "hardbreak")
        return found

    @property
    def links(self) -> list[Found]:
        """What links and pictures lead to."""
        attribute = {"link_open": "href", "image": "src"}
        return [Found(line, str(t.attrs[attribute[t.type]])) for line, t in self.words if t.type in attribute]

    @property
    def code(self) -> list[Found]:
        """The pieces of code in running text."""
        return [Found(line, token.content) for line, token in self.words if token.type == "code_inline"]

    @property
    def shown(self) -> list[int]:
        """The lines where a table or a picture stands."""
        tables = [token.map[0] + 1 for token in self.tokens if token.type == "table_open" and token.map]
        return sorted(tables + [line for line, token in self.words if token.type == "image"])


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading, before it numbers those that are the same."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@functools.cache
def page(path: pathlib.Path) -> Page:
    """The page of a file, which is read once."""
    return Page(path)


def pages() -> list[Page]:
    """README.md and what stands beside it, and all of docs/."""
    return [page(path) for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]]


def commands(text: str, line: int = 1) -> Iterator[tuple[int, list[str], str]]:
    """The simple commands of a piece of shell, each with its line, its words and what `<<` gives it to read.

    Comments, redirections and settings of variables are left out; what `$(...)` gives becomes one word, X.
    Raises ValueError for a quotation that nobody closes.
    """
    lines = text.splitlines()
    while lines:
        start, whole = line, lines.pop(0)
        while True:
            try:
                words = _split(whole)
                break
            except ValueError:
                if not lines:
                    raise
                whole, line = f"{whole.removesuffix(chr(92))}\n{lines.pop(0)}", line + 1
        given = []
        if end := re.search(r"<<'?(\w+)'?", whole):
            while lines and lines[0] != end[1]:
                given.append(lines.pop(0))
            lines, line = lines[1:], line + len(given) + 1
        line += 1
        for simple in words:
            yield start, simple, "\n".join(given)


def _split(text: str) -> list[list[str]]:
    """The simple commands of what may be a whole line. Raises ValueError if it goes on."""
    if text.endswith("\\"):
        raise ValueError("the line goes on")
    text = re.sub(r"(?m)(^|\s)#.*$", "", re.sub(r"\$\([^()]*\)", "X", text))
    reader = shlex.shlex(text, posix=True, punctuation_chars="|&;<>")
    reader.whitespace_split, reader.commenters = True, ""
    found: list[list[str]] = [[]]
    skip = False
    for word in reader:
        if set(word) <= set("|&;"):
            found.append([])
        elif set(word) <= set("<>"):
            skip = True  # the file that comes next
        elif skip:
            skip = False
        elif found[-1] or not re.match(r"\w+=", word):
            found[-1].append(word)
    return [words for words in found if words]
