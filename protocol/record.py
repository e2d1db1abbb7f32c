"""Records: ``@record(...)`` is ``@dataclass(frozen=True, slots=True, kw_only=...)``, made in a quarter of the time.

A program that starts defines about a hundred of them. The standard decorator writes and compiles the source of six
functions for each, half a millisecond of start-up a class; here one is compiled, ``__init__``, and the rest are
closures. What comes out is a dataclass to everyone who asks: fields(), replace(), asdict() and is_dataclass() of
dataclasses take it, and type checkers see the standard decorator. Fields have no options but a default or a factory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(*, frozen: bool, slots: bool, kw_only: bool = False) -> Callable[[type], type]:
        """Return the class decorator; ``frozen`` and ``slots`` must be given, and be True, for those who read it."""
        assert frozen and slots

        def decorate(cls: type) -> type:
            return _make(cls, kw_only=kw_only)

        return decorate


def _make(cls: type, *, kw_only: bool) -> type:
    made: Any = dataclasses.dataclass(init=False, repr=False, eq=False, slots=True, kw_only=kw_only)(cls)
    fields = dataclasses.fields(made)
    made.__init__ = _init(fields, checked=hasattr(made, "__post_init__"))
    made.__setattr__, made.__delattr__ = _refuse_to_set, _refuse_to_delete
    made.__getstate__, made.__setstate__ = _get_state, _set_state
    own = vars(made)
    names = [field.name for field in fields]
    values = attrgetter(*names) if names else lambda _self: ()

    def equal(self: Any, other: Any) -> bool:
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def digest(self: Any) -> int:
        return hash(values(self))

    def show(self: Any) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{self.__class__.__qualname__}({shown})"

    if "__eq__" not in own:
        made.__eq__, made.__hash__ = equal, digest
    if "__repr__" not in own:
        made.__repr__ = show
    result: type = made
    return result


def _init(fields: tuple[dataclasses.Field[Any], ...], *, checked: bool) -> Callable[..., None]:
    # The source names fields only, which are identifiers; defaults and factories are passed in by name.
    known: dict[str, Any] = {"_set": object.__setattr__, "_missing": dataclasses.MISSING}
    parameters, body = [], []
    if fields and fields[0].kw_only:
        parameters.append("*")
    for field in fields:
        assert field.init and field.kw_only == fields[0].kw_only
        name = value = field.name
        if field.default is not dataclasses.MISSING:
            known[f"_default_{name}"] = field.default
            parameters.append(f"{name}=_default_{name}")
        elif field.default_factory is not dataclasses.MISSING:
            known[f"_make_{name}"] = field.default_factory
            parameters.append(f"{name}=_missing")
            value = f"_make_{name}() if {name} is _missing else {name}"
        else:
            parameters.append(name)
        body.append(f" _set(self, {name!r}, {value})")
    if checked:
        body.append(" self.__post_init__()")
    source = f"def __init__({', '.join(['self', *parameters])}):\n" + "\n".join(body or [" pass"])
    exec(source, known)  # noqa: S102 - as dataclasses does
    init: Callable[..., None] = known["__init__"]
    return init


def _refuse_to_set(self: object, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(self: object, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


# For copy and pickle, which would set the fields one by one.


def _get_state(self: Any) -> list[Any]:
    return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _set_state(self: Any, state: list[Any]) -> None:
    for field, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, field.name, value)
