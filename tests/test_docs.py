"""What the pages say can be followed: links, pictures, blocks of code, and every flag of every command.

No command is run: programs read their command lines with the parsers that they have, and stop there.
"""

import argparse
import contextlib
import dataclasses
import doctest
import functools
import importlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from rlhf_jax import checks, fields, flags
from rlhf_jax.config import Config, MeshShape
from rlhf_jax.errors import UserError
from tests import pages
from tests.pages import ROOT, Page

LANGUAGES = ("", "sh", "python", "json", "toml", "text")
Wrong = Iterator[tuple[int, str]]  # the line of a page, and what is wrong there


def complaints(wrong: Callable[[Page], Wrong], read: Sequence[Page] | None = None) -> str:
    """Everything that is wrong, a line each."""
    found = [f"{page.name}:{line}: {text}" for page in read or pages.pages() for line, text in wrong(page)]
    return "\n".join(found)


def broken_links(page: Page) -> Wrong:
    for line, href in page.links:
        path, _, anchor = href.partition("#")
        if re.match(r"[a-z]+:", href):
            continue
        target = (page.path.parent / path).resolve() if path else page.path
        if not target.exists() or path and not target.is_relative_to(ROOT):
            yield line, f"{href} leads to nothing"
        elif target.is_dir():
            yield line, f"{href} is a folder, which the site has no page for; name its README.md"
        elif anchor and target.suffix != ".md":
            yield line, f"{href}: only pages have headings"
        elif anchor and anchor not in pages.page(target).anchors:
            near = fields.nearest(anchor, pages.page(target).anchors)
            yield line, f"{href}: there is no such heading; the nearest is #{near}"


def broken_blocks(page: Page) -> Wrong:
    for line, language, text in page.blocks:
        try:
            if language not in LANGUAGES:
                yield line, f"a block of {language!r}; one of {', '.join(filter(None, LANGUAGES))} is checked"
            elif language == "python":
                shown = [example.source for example in doctest.DocTestParser().get_examples(text)]
                for source in shown or [text]:
                    compile(source, page.name, "exec")
            elif language == "toml":
                tomllib.loads(text)
            elif language == "json":
                _read_json(text)
        except (SyntaxError, ValueError) as error:
            yield line, f"this {language} can't be read: {error}"


def _read_json(text: str) -> None:
    """One value, or one a line. Raises ValueError."""
    try:
        json.loads(text)
    except ValueError:
        for one in filter(str.strip, text.splitlines()):
            json.loads(one)


# Commands.


@functools.cache
def program_of(name: str) -> type:
    """The dataclass of a program of experiments/, of which there is one each (tests/test_config.py)."""
    module = importlib.import_module(f"experiments.{name}")
    own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
    return next(value for value in own if isinstance(value, type) and dataclasses.is_dataclass(value))


def read_program(name: str, words: Sequence[str]) -> None:
    """Raises UserError for a command line that the program would refuse before it looks at a file."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # what --help writes and ends in
        read = flags.parse([name, *words], program_of(name))
        config = getattr(read, "config", None)
        if isinstance(config, Config) and not any(":" in one for one in (config.loss.name, *config.rewards.functions)):
            alone = dataclasses.replace(config.reward, members=1)
            checks.check(dataclasses.replace(config, reward=alone, mesh=MeshShape(1, 1, 1)))


class Read(Exception):
    """A command line was read, and the program needs no more of it."""


def read_benchmark(name: str, words: Sequence[str]) -> None:
    """Raises UserError for a command line that the parser of the benchmark refuses."""
    if "ArgumentParser(" not in (ROOT / f"benchmarks/{name}.py").read_text():
        if words:
            raise UserError(f"benchmarks.{name} takes no flags")
        return

    def parse_args(self: argparse.ArgumentParser) -> Any:
        self.parse_known_args, said = self.parse_known_args, io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                rest = self.parse_known_args([*words])[1]
            except SystemExit:
                raise UserError(said.getvalue().strip().splitlines()[-1]) from None
        if rest:
            raise UserError(f"there is no flag {rest[0]}")
        raise Read

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Read):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        importlib.import_module(f"benchmarks.{name}").main()


def read_python(words: Sequence[str], given: str) -> None:
    """What `python` is asked for. Raises UserError, or SyntaxError for a text that it is given to read."""
    match words:
        case ["-m", module, *rest] if module.startswith(("experiments.", "benchmarks.")):
            folder, _, name = module.partition(".")
            if not (ROOT / folder / f"{name}.py").is_file():
                raise UserError(f"there is no {module}")
            (read_program if folder == "experiments" else read_benchmark)(name, rest)
        case ["-m", "venv", _]:
            pass
        case ["-", *_]:
            compile(given, "given", "exec")
        case _:
            raise UserError(f"nobody knows what python {' '.join(words)} would run")


def read_make(words: Sequence[str], given: str) -> None:
    targets = re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text())
    for word in words:
        if "=" not in word and word not in targets:
            raise UserError(f"there is no target {word!r}; there are {', '.join(targets)}")


def read_pip(words: Sequence[str], given: str) -> None:
    known = re.findall(r'(?m)^ {8}"(\w+)": ', (ROOT / "setup.py").read_text())
    for extra in re.findall(r"(?:\.|rlhf_jax)\[(.+?)\]", " ".join(words)):
        if extra not in known:
            raise UserError(f"setup.py has no extra {extra!r}; it has {', '.join(known)}")


# What reads the words behind the first of a command, and the one that is taken as it is.
READERS: dict[str, Callable[[Sequence[str], str], None]] = {
    "python": read_python, "make": read_make, "pip": read_pip,
    "source": lambda words, given: None,
}  # fmt: skip


def refused(line: int, words: Sequence[str], given: str) -> Wrong:
    """What is wrong with one simple command, if anything is."""
    try:
        if words[0] not in READERS:
            yield line, f"nobody knows the command {words[0]!r}; READERS of tests/test_docs.py has those that are known"
        else:
            READERS[words[0]](words[1:], given)
    except (UserError, SyntaxError) as error:
        yield line, f"{' '.join(words[:3])}: {error}"


def broken_commands(page: Page) -> Wrong:
    for line, language, text in page.blocks:
        if language == "sh":
            for at, words, given in pages.commands(text, line):
                yield from refused(at, words, given)
    for line, text in page.code:  # in running text a command may leave out what it needs beside
        if re.match(r"(python|make) ", text) and not re.match(r"python -m [a-z]+\.[A-Z]", text):
            for _, words, given in pages.commands(text):
                for _, told in refused(line, words, given):
                    if not re.search(r": pass --\w+=|arguments are required", told):
                        yield line, told


@functools.cache
def every_flag() -> frozenset[str]:
    """The flags of all programs and benchmarks and the names of their sections, without the two hyphens."""
    found = {"help", "flagfile"}
    for file in (ROOT / "experiments").glob("[a-z]*.py"):
        for field in fields.declared(program_of(file.stem)):
            found.add(field.name)
            if field.is_section:
                value = field.type() if field.value is fields.MISSING else field.value
                found |= _paths(value, field.path)
    for file in (ROOT / "benchmarks").glob("*.py"):
        found |= set(re.findall(r'add_argument\("--(\w+)"', file.read_text()))
    return frozenset(found)


def _paths(section: Any, path: str) -> set[str]:
    """The dotted paths of all fields of a section."""
    found = set()
    for field in fields.declared(section, path):
        found |= {field.path} | (_paths(field.value, field.path) if field.is_section else set())
    return found


def unknown_flags(page: Page) -> Wrong:
    for line, text in page.code:
        for told in re.findall(r"(?<![\w-])--([a-z][a-z0-9_.]*)", text):
            name = told.removesuffix(".")
            if name not in every_flag() and name.removeprefix("no") not in every_flag():
                yield line, f"no program has a flag --{name}; the nearest is --{fields.nearest(name, every_flag())}"


# Figures.


def without_command(page: Page) -> Wrong:
    """Tables and pictures of a page of results, if no section that holds them says how they were made.

    A command in a section's text before its first section below is of all of these.
    """
    made = [block.line for block in page.blocks if "python -m " in block.text]
    made += [line for line, text in page.code if text.startswith("python -m ")]
    starts = [line for line, _, _ in page.headings] + [sys.maxsize]
    for shown in page.shown:
        level, told = 7, False
        for (start, own, _), end in reversed([*zip(page.headings, starts[1:], strict=True)]):
            if start <= shown and own < level:  # the section itself, then those that it is a part of
                level, told = own, told or any(start < line < end for line in made)
        if not told:
            yield shown, "a table or picture, and no section that it is in says with which command it was made"


def measured_without_command(page: Page) -> Wrong:
    """Words that name a machine, on a page without any command."""
    commands = [block.text for block in page.blocks] + [text for _, text in page.code]
    if not any("python -m " in text or text.startswith("make ") for text in commands):
        for line, token in page.words:
            if re.search(r"\b(Xeon|EPYC)\b", token.content):
                yield line, "something was measured here, and the page has no command"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Commands are typed in the root of the checkout."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("wrong", [broken_links, broken_blocks, broken_commands, unknown_flags])
def test_no_page_says_what_is_not_so(wrong):
    told = complaints(wrong)
    assert not told, f"\n{told}"


def test_every_picture_is_shown_on_a_page():
    shown = {(page.path.parent / href).resolve() for page in pages.pages() for _, href in page.links if ":" not in href}
    assert set((ROOT / "docs").rglob("*.png")) <= shown


def test_every_figure_among_the_results_has_its_command():
    results = [page for page in pages.pages() if page.path.parent == ROOT / "docs/results"]
    told = complaints(without_command, results)
    assert results and not told, f"\n{told}"


def test_what_was_measured_has_its_command():
    told = complaints(measured_without_command, [page for page in pages.pages() if page.path.parent.name != "adr"])
    assert not told, f"\n{told}"


SPOILT = (
    (broken_links, "[a](nowhere.md)", "nowhere.md leads to nothing"),
    (
        broken_links,
        "# Here\n\n## `Here`, there!\n\n[a](#here-there) [b](#her)",
        "no such heading; the nearest is #here",
    ),
    (broken_links, "![a](nowhere.png)", "nowhere.png leads to nothing"),
    (broken_blocks, "```python\nx = (\n```", "this python can't be read"),
    (broken_blocks, '```json\n{"a": 1}\n{"a": 1,}\n```', "this json can't be read"),
    (broken_blocks, "```toml\na = \n```", "this toml can't be read"),
    (broken_blocks, "```bash\nls\n```", "a block of 'bash'"),
    (broken_commands, "```sh\npython -m experiments.trian\n```", "there is no experiments.trian"),
    (broken_commands, "```sh\nmake tests # all\n```", "there is no target 'tests'"),
    (broken_commands, "```sh\nlaunch\n```", "nobody knows the command 'launch'"),
    (broken_commands, "```sh\npip install -e '.[dcos]'\n```", "no extra 'dcos'"),
    (broken_commands, "```sh\npython -m benchmarks.sampler --modle=X\n```", "there is no flag --modle=X"),
    (broken_commands, "```sh\npython -m benchmarks.sampler --batch=many\n```", "invalid int value: 'many'"),
    (broken_commands, "Type `python -m experiments.rank --labelers=3`.", "the nearest is --labellers"),
    (broken_commands, "```sh\npython -m experiments.train --config=configs/dpo.py\n```", "pass --workdir="),
    (unknown_flags, "With `--config.loss.bta=1`", "the nearest is --config.loss.beta"),
    (without_command, "# A\n\n`python -m benchmarks.sampler`\n\n# B\n\n## C\n\n| a |\n| - |\n", "a table or picture"),
    (measured_without_command, "On an EPYC it takes a second.", "has no command"),
)
TRAIN = "A=1 B='2 3' \\\npython -m experiments.train --config=configs/dpo.py{} \\\n    --workdir=a {} > log"


@pytest.mark.parametrize(("wrong", "text", "told"), SPOILT)
def test_what_is_wrong_is_found(tmp_path, wrong, text, told):
    (tmp_path / "page.md").write_text(text)
    found = list(wrong(Page(tmp_path / "page.md")))
    assert len(found) == 1 and told in found[0][1], found


@pytest.mark.parametrize(
    ("variant", "more", "told"),
    [
        (":tiny", "--config.loss.beta=0.3  # which is more", ""),
        (":tny", "", "has no variant 'tny'; the nearest is 'tiny'"),
        (":tiny", "--config.loss.bta=1", "the nearest is --config.loss.beta"),
        (":tiny", "--config.loss.beta=low", "it takes a number"),
        (":tiny", "--config.loss.name=ipo --config.loss.label_smoothing=0.1", "would ignore label_smoothing"),
    ],
)
def test_a_command_is_read_as_its_program_reads_it(tmp_path, variant, more, told):
    (tmp_path / "page.md").write_text(f"# A\n\n```sh\nmake test\n{TRAIN.format(variant, more)}\n```\n")
    found = list(broken_commands(Page(tmp_path / "page.md")))
    assert len(found) == bool(told) and all(line == 5 and told in text for line, text in found), found
