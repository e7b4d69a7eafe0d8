"""The fields of frozen dataclasses: their types, values and meanings, and configs as JSON has them.

Leaf types: int, float, bool, str, Literal, `tuple[T, ...]` and `T | None`; a nested dataclass is a section.
"""

import dataclasses
import difflib
import functools
import operator
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from absl import flags

from rlhf_jax.errors import UserError

T = TypeVar("T")
MISSING = dataclasses.MISSING


def nearest(word: str, options: Iterable[str]) -> str:
    """Returns the option (there is at least one, dotted or not) that `word` was most likely meant to be."""

    def likeness(option: str) -> float:
        ends = word.rpartition(".")[2], option.rpartition(".")[2]
        if option.startswith(f"{word}.") or ends[0] == "".join(part[:1] for part in ends[1].split("_")):
            return 1.0  # a section without its field, or initials such as lr
        whole, last = (difflib.SequenceMatcher(None, a, b).ratio() for a, b in ((word, option), ends))
        return max(whole, 0.95 * last)

    return max(options, key=likeness)


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

    return Kind(allowed=allowed, read=lambda text: check(parser.parse(text)), check=check, boolean=scalar is bool)


SCALARS = {
    int: _scalar(int, "an int", flags.IntegerParser()),
    float: _scalar(float, "a number", flags.FloatParser()),
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
    if origin in (Union, types.UnionType) and type(None) in args and bare(annotation) != annotation:
        inner = kind(bare(annotation), where)
        return Kind(
            allowed=f"{inner.allowed}, or none",
            read=lambda word: None if word == "none" else inner.read(word),
            check=lambda given: None if given is None else inner.check(given),
            boolean=inner.boolean,
        )
    raise TypeError(f"{where} is of type {annotation}, which no flag can have")


def bare(annotation: Any) -> Any:
    """The type without its meaning and without None."""
    args = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return bare(args[0])
    if type(None) in args:
        return functools.reduce(operator.or_, (a for a in args if a is not type(None)))
    return annotation


def text(value: Any) -> str:
    """Returns the value as one types it after `--flag=`."""
    if isinstance(value, tuple | list):
        return ",".join(map(text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


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
        return to_dict(value) if dataclasses.is_dataclass(value) else [*value] if type(value) is tuple else value

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
            raise UserError(f"{where}there is no field {f'{path}.{name}'.lstrip('.')}; the nearest is {near}.")
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


def replace(section: Any, given: Mapping[str, Any], path: str = "") -> Any:
    """Returns a dataclass instance with other values at the dotted paths of leaves, those that begin with `path`.

    All of a section's changes are made at once, so that its own checks see only the values meant.
    Raises UserError for a path that no leaf has, such as that of a section.
    """
    known = {leaf.path for leaf in leaves(section, path)}
    for name in given:
        if name not in known and name.startswith(f"{path}." if path else ""):
            raise UserError(f"there is no field {name} to change; the nearest is {nearest(name, known)}.")
    made = {}
    for field in declared(section, path):
        if field.is_section:
            made[field.name] = replace(field.value, given, field.path)
        elif field.path in given:
            made[field.name] = given[field.path]
    return dataclasses.replace(section, **made)


def diff(a: Any, b: Any) -> list[str]:
    """Returns a line `field: a -> b` for each leaf in which two dataclass instances differ."""
    old, new = ({leaf.path: leaf.value for leaf in leaves(side)} for side in (a, b))
    pairs = {path: (old.get(path, "absent"), new.get(path, "absent")) for path in old | new}
    return [f"{path}: {text(was)} -> {text(now)}" for path, (was, now) in pairs.items() if was != now]


def describe(section: Any, path: str = "config", meaning: str = "") -> str:
    """Returns the help of a section: each field's value, type and meaning, then those of its sections."""
    fields = declared(section, path)
    title = f"{path}: {meaning or doc(type(section)).partition('.')[0]}".rstrip(": ")
    nested = [f"\n{describe(f.value, f.path, f.meaning)}" for f in fields if f.is_section]
    return "\n".join([title, *(entry(f) for f in fields if not f.is_section), *nested])


def entry(leaf: Field) -> str:
    shown = "  (required)" if leaf.value is MISSING else f"={text(leaf.value)}"
    meaning = textwrap.indent(textwrap.fill(leaf.meaning, 100), "      ")
    return f"  --{leaf.path}{shown}  [{leaf.kind.allowed}]\n{meaning}".rstrip()


def doc(cls: type) -> str:
    doc = " ".join((cls.__doc__ or "").split())
    return "" if doc.startswith(f"{cls.__name__}(") else doc  # not the signature that dataclass writes
