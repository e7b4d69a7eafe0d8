"""Frozen dataclasses as typed absl flags: one flag a leaf, and every mistake answered in one sentence.

A program is itself a frozen dataclass: its leaves are its own flags, and a field that is a dataclass is a
section, filled from a file and then overridden leaf by leaf. The meaning of a leaf stands in its annotation.

    @dataclasses.dataclass(frozen=True)
    class Train:
        config: Config  # --config=FILE.py and then --config.loss.beta=0.3
        workdir: Annotated[str, "the folder that the run writes to"]  # no default: it must be given
        resume: Annotated[bool, "continue what stands in the workdir"] = False

    def main(program: Train) -> None: ...

    if __name__ == "__main__":
        flags.run(main, Train)

A file has a function `get_config`. One with variants also has `VARIANTS`, a dict whose keys are their names;
`--config=FILE.py:NAME` calls `get_config(NAME)`, and `--config=FILE.py` calls `get_config()`:

    VARIANTS = {"default": {}, "tiny": {"steps": 20}}

    def get_config(variant: str = "default") -> Config:
        return Config(train=Train(**VARIANTS[variant]))

Leaf types: int, float, bool, str, Literal, `tuple[T, ...]` (values with commas between) and `T | None`
(written `none`; the text "none" itself can only be given in a file). `--flagfile=FILE` is absl's own.

One field of a program may take the words of the command line, which otherwise nothing reads:

    runs: Annotated[tuple[str, ...], flags.WORDS, "folders"] = ()  # compare A B --seed=1, or compare --runs=A,B
"""

import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar, get_args, get_type_hints

from absl import flags
from etils import epath

from rlhf_jax.errors import UserError
from rlhf_jax.fields import (
    MISSING,
    SCALARS,
    Field,
    declared,
    describe,
    doc,
    entry,
    from_dict,
    leaves,
    nearest,
    replace,
    to_dict,
)

P = TypeVar("P")
WORDS: Final = object()  # in an annotation: the field takes the words of the command line too


def load(spec: str) -> Any:
    """Returns what `get_config` of FILE.py, or of FILE.py:VARIANT, returns; the module's docstring has more.

    Raises UserError, with the nearest that exists, if the file or the variant doesn't. What the file itself
    raises keeps its traceback.
    """
    name, variant = re.findall(r"\A(.*?)(:[^/:]*)?\Z", spec, re.DOTALL)[0]
    path = epath.Path(name)
    if not path.is_file() or path.suffix != ".py":
        what = f"{name} is not a config file, FILE.py" if path.is_file() else f"there is no config file {name!r}"
        near = {file.stem: file for file in _config_files(path)}
        hint = f"the nearest is {near[nearest(path.stem, near)]}" if near else f"{path.parent} holds none"
        raise UserError(f"{what}; {hint}.")
    module = types.ModuleType(f"config_file_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look the module of a class up there
    # Not through importlib: its bytecode cache takes a file that was edited within the second for unchanged.
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    get_config, variants = getattr(module, "get_config", None), getattr(module, "VARIANTS", {})
    if get_config is None:
        raise UserError(f"{name} has no function get_config; give it one that returns the config.")
    if not variant:
        return get_config()
    if variant[1:] not in variants:
        near = f"the nearest is {nearest(variant[1:], variants)!r} of {', '.join(variants)}" if variants else ""
        raise UserError(f"{name} has no variant {variant[1:]!r}; {near or f'it has none, so pass {name} alone'}.")
    return get_config(variant[1:])


def _config_files(path: epath.Path) -> Iterator[epath.Path]:
    """The config files in the folder `path`, beside it and in the folder configs beside it."""
    for folder in (path.parent / "configs", path.parent, path):
        for file in sorted(folder.glob("*.py")) if folder.is_dir() else ():
            if b"def get_config(" in file.read_bytes():
                yield file


@contextmanager
def _one_sentence(values: flags.FlagValues) -> Iterator[None]:
    """Turns absl's complaints about a command line into ours."""
    try:
        yield
    except flags.UnrecognizedFlagError as error:
        near = f"the nearest is --{nearest(error.flagname, values)}, and --help lists them all"
        raise UserError(f"there is no flag --{error.flagname}; {near}.") from None
    except (flags.Error, ValueError) as error:
        raise UserError(f"{str(error).removeprefix('ERROR:: ')}.") from None


def _flag_values(fields: Iterable[Field]) -> flags.FlagValues:
    """absl flags of our own, not the global ones, so that a process can parse more than once."""
    values = flags.FlagValues()
    values.set_gnu_getopt()  # a stray word must not end the reading
    for field in fields:
        default = None if field.value is MISSING else field.value
        flags.DEFINE(field.kind, field.path, default, field.meaning, values, boolean=field.kind.boolean)
    flags.DEFINE(SCALARS[bool], "help", False, "list every flag", values, boolean=True, short_name="h")
    return values


def parse(argv: Sequence[str], program: type[P]) -> P:
    """Returns the program's dataclass: its sections from their files, and then what the command line says.

    Args:
      argv: the command line, the program's name first.
      program: a frozen dataclass as in the module's docstring.
    Raises: UserError for whatever is wrong with the command line or a file; SystemExit(0) after --help.
    """
    own = [_with_words(field, program) for field in declared(program) if not field.is_section]
    sections = [field for field in declared(program) if field.is_section]
    meaning = "the file, FILE.py or FILE.py:VARIANT, that the fields below start from"
    files = [field._replace(type=str, value=None, meaning=field.meaning or meaning) for field in sections]
    first = _flag_values(own + files)
    with _one_sentence(first):
        argv = [argv[0], *first.read_flags_from_files(argv[1:])]
        unread = first(argv, known_only=True)
    loaded = {field.name: _load_section(field, first[field.name].value) for field in sections}
    if first["help"].value:
        told = [describe(section, name) for name, section in loaded.items() if section is not None]
        unset = {name: MISSING if section is None else None for name, section in loaded.items()}
        shown = own + [file._replace(value=first[file.name].value or unset[file.name]) for file in files]
        mine = "\n".join(["flags", *map(entry, shown)])
        print("\n\n".join([doc(program), mine, *told]).lstrip())
        raise SystemExit(0)
    if absent := [name for name, section in loaded.items() if section is None]:
        with _one_sentence(first):  # perhaps --config was only misspelt
            first([a for a in unread if not re.match(rf"--?(no)?({'|'.join(absent)})\.", a)])
        raise UserError(f"pass --{absent[0]}=FILE.py or --{absent[0]}=FILE.py:VARIANT to start from.")
    known = own + [leaf for name, section in loaded.items() for leaf in leaves(section, name)]
    values = _flag_values(known + files)
    with _one_sentence(values):
        words = values(argv)[1:]
    given = {leaf.path: values[leaf.path].value for leaf in known if values[leaf.path].present}
    given |= _words(words, [field.path for field in own if _takes_words(field, program)], given)
    for leaf in own:
        if leaf.value is MISSING and leaf.path not in given:
            raise UserError(f"pass --{leaf.path}=...: {leaf.meaning or leaf.kind.allowed}.")
    replaced = {name: replace(section, given, name) for name, section in loaded.items()}
    return program(**replaced, **{leaf.name: given[leaf.path] for leaf in own if leaf.path in given})


def _takes_words(field: Field, program: type) -> bool:
    return WORDS in get_args(get_type_hints(program, include_extras=True)[field.name])


def _with_words(field: Field, program: type) -> Field:
    """The field, its meaning saying so where it takes words."""
    if not _takes_words(field, program):
        return field
    return field._replace(meaning=f"{field.meaning}; also the words of the command line that no flag takes")


def _words(words: Sequence[str], takes: Sequence[str], given: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The words as the value of the field that takes them; commas in them are theirs."""
    if words and not takes:
        raise UserError(f"nothing reads the word {words[0]!r}; write --flag=value, --help lists the flags.")
    if words and takes[0] in given:
        raise UserError(f"the word {words[0]!r} and --{takes[0]} say the same thing; leave one of them away.")
    return {takes[0]: tuple(words)} if words else {}


def _load_section(field: Field, spec: str | None) -> Any:
    """The section that a file gives, else the program's default, else None; its leaves' types are checked."""
    section = field.value if spec is None else load(spec)
    if section is MISSING:
        return None
    if not isinstance(section, field.type):
        found = type(section).__name__
        raise UserError(f"{spec}: get_config returned a {found}; it must return a {field.type.__name__}.")
    return from_dict(type(section), to_dict(section), f"{spec}: " if spec else "", field.path)


def run(main: Callable[[P], None], program: type[P], argv: Sequence[str] | None = None) -> None:
    """Calls `main` with the program's dataclass, read from the command line.

    A UserError, from the command line or from `main`, becomes one line on stderr and exit status 2.
    """
    try:
        main(parse(sys.argv if argv is None else argv, program))
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(2) from None
