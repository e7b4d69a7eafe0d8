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
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import operator
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from absl import flags
from etils import epath

from rlhf_jax.errors import UserError

P = TypeVar("P")
T = TypeVar("T")
MISSING = dataclasses.MISSING


def nearest(word: str, options: Iterable[str]) -> str:
    """Returns the option (there is at least one, dotted or not) that `word` was most likely meant to be."""

    def likeness(option: str) -> float:
        pairs = (word, option), (word.rpartition(".")[2], option.rpartition(".")[2])
        whole, last = (difflib.SequenceMatcher(None, a, b).ratio() for a, b in pairs)
        return 1.0 if option.startswith(f"{word}.") else max(whole, 0.95 * last)

    return max(options, key=likeness)


# ---- the types of a leaf


class Kind(flags.ArgumentParser):
    """The absl parser of one leaf type: `read` takes a flag's text, `check` a value from a file or from JSON.

    Both return the value in the declared type (an int becomes a float, a list a tuple) and raise ValueError,
    TypeError or KeyError where `allowed`, a phrase, doesn't describe it. Made with keywords only: absl shares
    the parsers made from equal positions, and 1 equals True.
    """

    def __init__(
        self, *, allowed: str, read: Callable[[str], Any], check: Callable[[Any], Any], boolean: bool = False
    ) -> None:
        self.allowed, self.read, self.check, self.boolean = allowed, read, check, boolean

    def parse(self, argument: Any) -> Any:
        """What absl calls, with a flag's text or with a default, which is a value already."""
        return self.attempt(self.read if isinstance(argument, str) else self.check, argument)

    def attempt(self, convert: Callable[[Any], Any], value: Any) -> Any:
        try:
            return convert(value)
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"it takes {self.allowed}") from None


def _scalar(scalar: type, allowed: str, parser: flags.ArgumentParser) -> Kind:
    def check(value: Any) -> Any:
        value = float(value) if scalar is float and type(value) is int else value
        if type(value) is not scalar or value != value:  # not-a-number equals nothing, not even itself
            raise ValueError(value)
        return value

    return Kind(
        allowed=allowed, read=lambda text: check(parser.parse(text)), check=check, boolean=scalar is bool
    )


SCALARS = {
    int: _scalar(int, "an int", flags.IntegerParser()),
    float: _scalar(float, "a float", flags.FloatParser()),
    bool: _scalar(bool, "true or false", flags.BooleanParser()),
    str: _scalar(str, "a string", flags.ArgumentParser()),
}


def kind(annotation: Any, where: str) -> Kind:
    """Returns the parser of a leaf type; raises TypeError, which names `where`, for one that no flag has."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in SCALARS:
        return SCALARS[annotation]
    if origin is Literal:
        return Kind(
            allowed=f"one of {', '.join(map(text, args))}",
            read=lambda word: {text(value): value for value in args}[word],
            check=lambda given: {(type(value), value): value for value in args}[type(given), given],
        )
    if origin is tuple and args[1:] == (...,):
        item = kind(args[0], where)
        return Kind(
            allowed=f"values with commas between, each {item.allowed}",
            read=lambda words: tuple(item.read(word.strip()) for word in words.split(",")) if words else (),
            check=lambda given: tuple(map(item.check, {tuple: given, list: given}[type(given)])),
        )
    if origin in (Union, types.UnionType) and type(None) in args and _bare(annotation) != annotation:
        inner = kind(_bare(annotation), where)
        return Kind(
            allowed=f"{inner.allowed}, or none",
            read=lambda word: None if word == "none" else inner.read(word),
            check=lambda given: None if given is None else inner.check(given),
            boolean=inner.boolean,
        )
    raise TypeError(f"{where} is of type {annotation}, which no flag can have")


def _bare(annotation: Any) -> Any:
    """The type without its meaning and without None."""
    args = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _bare(args[0])
    if type(None) in args:
        return functools.reduce(operator.or_, (a for a in args if a is not type(None)))
    return annotation


def text(value: Any) -> str:
    """Returns the value as one types it after `--flag=`."""
    if isinstance(value, tuple | list):
        return ",".join(map(text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# ---- the fields of a dataclass


class Field(NamedTuple):
    """One field: its name, its dotted path, type and meaning, its value or default (MISSING without one)."""

    name: str
    path: str
    type: Any
    meaning: str
    value: Any

    @property
    def is_section(self) -> bool:
        return dataclasses.is_dataclass(self.type)

    @property
    def kind(self) -> Kind:
        return kind(self.type, self.path)


def declared(node: Any, path: str = "") -> list[Field]:
    """Returns the fields of a dataclass (with their defaults) or of an instance (with their values)."""
    cls = node if isinstance(node, type) else type(node)
    hints, found = get_type_hints(cls, include_extras=True), []
    for field in (field for field in dataclasses.fields(cls) if field.init):
        hint = hints[field.name]
        hint, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if node is not cls:
            value = getattr(node, field.name)
        else:
            value = field.default if field.default_factory is MISSING else field.default_factory()
        here = f"{path}.{field.name}".lstrip(".")
        found.append(Field(field.name, here, hint, " ".join(n for n in notes if isinstance(n, str)), value))
    return found


def leaves(section: Any, path: str = "") -> Iterator[Field]:
    """Yields every leaf of a dataclass instance, depth first, its path beginning with `path`."""
    for field in declared(section, path):
        yield from leaves(field.value, field.path) if field.is_section else (field,)


def to_dict(section: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass instance as JSON has them: nested dicts, tuples as lists."""

    def plain(value: Any) -> Any:
        return (
            to_dict(value) if dataclasses.is_dataclass(value) else [*value] if type(value) is tuple else value
        )

    return {field.name: plain(field.value) for field in declared(section)}


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "", path: str = "") -> T:
    """Returns `cls` filled from nested dicts; what is absent keeps its default, leaves get their exact type.

    Raises UserError, beginning with `where`, for a field that doesn't exist, one without a default that is
    absent, and a value of another type.
    """
    fields, made = {field.name: field for field in declared(cls, path)}, {}
    for name in values:
        if name not in fields:
            near = fields[nearest(name, fields)].path
            raise UserError(
                f"{where}there is no field {f'{path}.{name}'.lstrip('.')}; the nearest is {near}."
            )
    for name, field in fields.items():
        if name not in values and field.value is MISSING:
            raise UserError(f"{where}the field {field.path} is missing, and it has no default.")
        if name in values and field.is_section:
            if not isinstance(values[name], Mapping):
                raise UserError(f"{where}{field.path} is {values[name]!r}, but it is a section with fields.")
            made[name] = from_dict(field.type, values[name], where, field.path)
        elif name in values:
            try:
                made[name] = field.kind.attempt(field.kind.check, values[name])
            except ValueError as error:
                raise UserError(f"{where}{field.path} is {values[name]!r}, but {error}.") from None
    return cls(**made)


def diff(a: Any, b: Any) -> list[str]:
    """Returns a line `field: a -> b` for each leaf in which two dataclass instances differ."""
    old, new = ({leaf.path: leaf.value for leaf in leaves(side)} for side in (a, b))
    pairs = {path: (old.get(path, "absent"), new.get(path, "absent")) for path in old | new}
    return [f"{path}: {text(was)} -> {text(now)}" for path, (was, now) in pairs.items() if was != now]


def describe(section: Any, path: str = "config", meaning: str = "") -> str:
    """Returns the help of a section: each field's value, type and meaning, then those of its sections."""
    fields = declared(section, path)
    title = f"{path}: {meaning or _doc(type(section)).partition('.')[0]}".rstrip(": ")
    nested = [f"\n{describe(f.value, f.path, f.meaning)}" for f in fields if f.is_section]
    return "\n".join([title, *(_entry(f) for f in fields if not f.is_section), *nested])


def _entry(leaf: Field) -> str:
    shown = "  (required)" if leaf.value is MISSING else f"={text(leaf.value)}"
    meaning = textwrap.indent(textwrap.fill(leaf.meaning, 100), "      ")
    return f"  --{leaf.path}{shown}  [{leaf.kind.allowed}]\n{meaning}".rstrip()


def _doc(cls: type) -> str:
    doc = " ".join((cls.__doc__ or "").split())
    return "" if doc.startswith(f"{cls.__name__}(") else doc  # not the signature that dataclass writes


# ---- registries: functions by name, their keyword-only arguments as fields


def _keywords(function: Callable) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def generated(registry: Mapping[str, Callable]) -> Callable[[type], Any]:
    """Returns a class decorator: a frozen dataclass with a field for each hyper-parameter of a registry.

    The class gives its docstring, `name: str` with the default entry, and fields of its own if it has any.
    Every keyword-only argument of an entry becomes `T | None = None`, None meaning the entry's own default.
    Raises TypeError if two entries read one argument in different types, or in one that no flag has.

    >>> def dpo(pair, *, beta: float = 0.1): ...
    >>> @generated({"dpo": dpo})
    ... class Loss:
    ...     name: str = "dpo"
    >>> Loss(beta=0.3)
    Loss(name='dpo', beta=0.3)
    """
    kinds: dict[str, Any] = {}
    read_by: dict[str, list[str]] = {}
    for entry, function in registry.items():
        for name, parameter in _keywords(function).items():
            bare, default = _bare(parameter.annotation), parameter.default
            kind(bare, f"{name} of {entry}")
            if kinds.setdefault(name, bare) != bare:
                raise TypeError(
                    f"{name} is {bare} in {entry}, but {kinds[name]} in {', '.join(read_by[name])}"
                )
            shown = "required" if default is inspect.Parameter.empty else text(default)
            read_by.setdefault(name, []).append(f"{entry} ({shown})")

    def decorate(cls: type) -> Any:
        own = inspect.get_annotations(cls)
        if clash := sorted(own.keys() & kinds.keys()):
            raise TypeError(f"{cls.__name__} declares {', '.join(clash)}, which its registry reads too")
        if vars(cls).get("name") not in registry:
            raise TypeError(f"{cls.__name__}.name must default to one of {', '.join(registry)}")
        own["name"] = Annotated[str, f"{', '.join(registry)}, or my_pkg.module:function from outside"]
        for name, bare in kinds.items():
            own[name] = Annotated[bare | None, f"read by {', '.join(read_by[name])}"]
            setattr(cls, name, dataclasses.field(default=None, metadata={"registry": True}))
        cls.__annotations__ = own
        return dataclasses.dataclass(frozen=True)(cls)

    return decorate


def resolve(registry: Mapping[str, T], name: str, what: str) -> T:
    """Returns the entry of that name, or the function `my_pkg.module:function` from outside.

    Raises UserError if there is neither; `what` says in a word what the entries are, such as "loss". A module
    that exists but fails while it is imported keeps its own traceback.
    """
    if name in registry:
        return registry[name]
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise UserError(
            f"there is no {what} {name!r}; the nearest is {nearest(name, registry)!r}. Choose one of "
            f"{', '.join(registry)}, or my_pkg.module:function from outside."
        )
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{what} {name!r}: there is no module {error.name!r} on the path.") from None
    if not callable(getattr(found, attribute, None)):
        names = [n for n, value in vars(found).items() if callable(value)]
        near = f"; the nearest is {nearest(attribute, names)!r}" if names else ""
        raise UserError(f"{what} {name!r}: the module {module!r} has no function {attribute!r}{near}.")
    return getattr(found, attribute)


def arguments(section: str, function: Callable, fields: Any, flag_prefix: str = "") -> dict[str, Any]:
    """Returns the keyword arguments to call `function` with: its defaults, then the fields that are set.

    Args:
      section: the section's name, such as "loss".
      function: the entry that `fields.name` resolved to.
      fields: an instance of a class that `generated` made; fields that it declares itself are left out.
      flag_prefix: what the section's flags begin with, by default `--config.SECTION`.
    Raises: UserError if a field is set that `function` doesn't read, or one that it needs isn't.
    """
    prefix, takes = flag_prefix or f"--config.{section}", _keywords(function)
    ours = [field.name for field in dataclasses.fields(fields) if "registry" in field.metadata]
    given = {name: getattr(fields, name) for name in ours if getattr(fields, name) is not None}
    if ignored := [name for name in given if name not in takes]:
        raise UserError(
            f"{section} {fields.name!r} would ignore {', '.join(ignored)}; it takes "
            f"{', '.join(takes) or 'none'}. Drop {prefix}.{ignored[0]} or choose another {prefix}.name."
        )
    effective = {name: parameter.default for name, parameter in takes.items()} | given
    for name, value in effective.items():
        if value is inspect.Parameter.empty:
            how = f"pass {prefix}.{name}" if name in ours else "give that argument a default"
            raise UserError(f"{section} {fields.name!r} needs {name}; {how}.")
    return effective


# ---- config files


def load(spec: str) -> Any:
    """Returns what `get_config` of FILE.py, or of FILE.py:VARIANT, returns; the module's docstring has more.

    Raises UserError, with the nearest that exists, if the file or the variant doesn't. What the file itself
    raises keeps its traceback.
    """
    name, variant = re.findall(r"\A(.*?)(:[^/:]*)?\Z", spec, re.DOTALL)[0]
    path = epath.Path(name)
    if not path.is_file():
        beside = {other.stem: other for other in path.parent.glob("*.py")} if path.parent.is_dir() else {}
        near = f"the nearest is {beside[nearest(path.stem, sorted(beside))]}" if beside else ""
        raise UserError(f"there is no config file {name!r}; {near or f'{path.parent} holds none'}.")
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
        near = (
            f"the nearest is {nearest(variant[1:], variants)!r} of {', '.join(variants)}" if variants else ""
        )
        raise UserError(
            f"{name} has no variant {variant[1:]!r}; {near or f'it has none, so pass {name} alone'}."
        )
    return get_config(variant[1:])


# ---- the command line


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
    own = [field for field in declared(program) if not field.is_section]
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
        print(
            "\n\n".join([f"{_doc(program)}\n\nflags:".lstrip(), "\n".join(map(_entry, own + files)), *told])
        )
        raise SystemExit(0)
    if absent := [name for name, section in loaded.items() if section is None]:
        with _one_sentence(first):  # perhaps --config was only misspelt
            first([a for a in unread if not re.match(rf"--?(no)?({'|'.join(absent)})\.", a)])
        raise UserError(f"pass --{absent[0]}=FILE.py or --{absent[0]}=FILE.py:VARIANT to start from.")
    known = own + [leaf for name, section in loaded.items() for leaf in leaves(section, name)]
    values = _flag_values(known + files)
    with _one_sentence(values):
        words = values(argv)[1:]
    if words:
        raise UserError(f"nothing reads the word {words[0]!r}; write --flag=value, --help lists the flags.")
    given = {leaf.path: values[leaf.path].value for leaf in known if values[leaf.path].present}
    for leaf in own:
        if leaf.value is MISSING and leaf.path not in given:
            raise UserError(f"pass --{leaf.path}=...: {leaf.meaning or leaf.kind.allowed}.")
    replaced = {name: _replace(section, name, given) for name, section in loaded.items()}
    return program(**replaced, **{leaf.name: given[leaf.path] for leaf in own if leaf.path in given})


def _load_section(field: Field, spec: str | None) -> Any:
    """The section that a file gives, else the program's default, else None; its leaves' types are checked."""
    section = field.value if spec is None else load(spec)
    if section is MISSING:
        return None
    if not isinstance(section, field.type):
        found = type(section).__name__
        raise UserError(f"{spec}: get_config returned a {found}; it must return a {field.type.__name__}.")
    return from_dict(type(section), to_dict(section), f"{spec}: " if spec else "", field.path)


def _replace(section: Any, path: str, given: Mapping[str, Any]) -> Any:
    """All of a section's changes at once, so that its own checks see only the values meant."""
    made = {}
    for field in declared(section, path):
        if field.is_section:
            made[field.name] = _replace(field.value, field.path, given)
        elif field.path in given:
            made[field.name] = given[field.path]
    return dataclasses.replace(section, **made)


def run(main: Callable[[P], None], program: type[P], argv: Sequence[str] | None = None) -> None:
    """Calls `main` with the program's dataclass, read from the command line.

    A UserError, from the command line or from `main`, becomes one line on stderr and exit status 2.
    """
    try:
        main(parse(sys.argv if argv is None else argv, program))
    except UserError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        raise SystemExit(2) from None
