"""Registries: functions by name, whose keyword-only arguments become the fields of a config section."""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

from rlhf_jax.errors import UserError
from rlhf_jax.fields import bare as bare_type
from rlhf_jax.fields import kind, nearest, text

T = TypeVar("T")
PER_ROW = "or a number a row, from a column of the data"  # float32 [B] in the place of the number
PerRow = Annotated[float, PER_ROW]  # of an argument of an entry


def _keywords(function: Callable, eval_str: bool = False) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function, eval_str=eval_str).parameters.values()
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
        for name, parameter in _keywords(function, eval_str=True).items():
            bare, default = bare_type(parameter.annotation), parameter.default
            kind(bare, f"{name} of {entry}")
            if kinds.setdefault(name, bare) != bare:
                raise TypeError(f"{name} is {bare} in {entry}, but {kinds[name]} in {', '.join(read_by[name])}")
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


def arguments(section: str, function: Callable, fields: Any) -> dict[str, Any]:
    """Returns the keyword arguments to call `function` with, the entry that `fields.name` resolved to.

    As `arguments_of` of one function.
    """
    return arguments_of(section, {fields.name: function}, fields)[fields.name]


def arguments_of(section: str, functions: Mapping[str, Callable], fields: Any) -> dict[str, dict[str, Any]]:
    """Returns the keyword arguments to call each of the functions with: its defaults, then the fields that are set.

    Args:
      section: the section's name, such as "loss".
      functions: by the names that `fields.name` resolved to.
      fields: an instance of a class that `generated` made; fields that it declares itself are left out.
    Raises: UserError if a field is set that no function reads, or one that a function needs isn't.
    """
    prefix = f"--config.{section}"
    takes = {name: _keywords(function) for name, function in functions.items()}
    ours = [field.name for field in dataclasses.fields(fields) if "registry" in field.metadata]
    given = {name: getattr(fields, name) for name in ours if getattr(fields, name) is not None}
    known = list(dict.fromkeys(name for keywords in takes.values() for name in keywords))
    if ignored := [name for name in given if name not in known]:
        raise UserError(
            f"{section} {fields.name!r} would ignore {', '.join(ignored)}; it takes "
            f"{', '.join(known) or 'none'}. Drop {prefix}.{ignored[0]} or choose another {prefix}.name."
        )
    effective = {
        name: {k: given.get(k, parameter.default) for k, parameter in keywords.items()}
        for name, keywords in takes.items()
    }
    for name, values in effective.items():
        for argument, value in values.items():
            if value is inspect.Parameter.empty:
                how = f"pass {prefix}.{argument}" if argument in ours else "give that argument a default"
                raise UserError(f"{section} {name!r} needs {argument}; {how}.")
    return effective
