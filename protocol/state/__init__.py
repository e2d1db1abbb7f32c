"""State sections: the registry of resource kinds, and the step between section and schema object.

Each module of this package is one kind of resource: its schema, a tree of frozen dataclasses, and
one call of register(). A section says what the resource *is*, not how a host represents it, so
that either side can change how it dumps or restores.

Versions work like this. A kind's ``version_id`` counts the changes of its schema. A section
carries the version it was written in and the oldest version whose readers understand it when
they skip fields they do not know; a reader older than that refuses. So a new field needs a
default, which is what its absence meant, and raises ``minimum_version_id`` only when ignoring it
would restore something wrong.

This package must never import the agent or touch the system.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, TypeVar

from protocol import codec
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.messages import StateSection

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateKind:
    """One kind of resource this build can read and write."""

    name: str
    schema: type[Any]
    version_id: int
    minimum_version_id: int
    """Oldest version whose readers understand what this build writes."""
    required: bool
    """What it writes: whether a destination that does not know the kind must refuse."""
    wire: type[Any]
    """The schema in which it travels. Where it is not ``schema`` itself: ``wire.of(state)`` makes it,
    ``whole()`` gives the state back."""
    oldest_version_id: int
    """Oldest version that this build can still read."""


KINDS: dict[str, StateKind] = {}
"""Every registered kind by name; load_all() fills it completely."""


def register(
    name: str,
    schema: type[Any],
    *,
    version_id: int = 1,
    minimum_version_id: int = 1,
    required: bool = True,
    wire: type[Any] | None = None,
    oldest_version_id: int = 1,
) -> StateKind:
    """Make `schema`, a dataclass, the meaning of sections named `name`."""
    kind = StateKind(
        name=name,
        schema=schema,
        version_id=version_id,
        minimum_version_id=minimum_version_id,
        required=required,
        wire=wire or schema,
        oldest_version_id=oldest_version_id,
    )
    known = KINDS.setdefault(name, kind)
    if known != kind:
        raise ValueError(f"state kind {name!r} is already registered for {known.schema.__name__}")
    return kind


def load_all() -> None:
    """Import every schema module of this package, so that KINDS is complete."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def encode_section(kind: str | StateKind, owner_id: int, obj: object) -> StateSection:
    """Return the section that carries `obj`, an instance of the kind's schema.

    :raises LocalProtocolError: when the kind is unknown, `obj` is something else or too large.
    """
    name = kind if isinstance(kind, str) else kind.name
    known = KINDS.get(name)
    if known is None:
        raise LocalProtocolError(f"State kind {name!r} is not registered")
    if type(obj) is not known.schema:
        raise LocalProtocolError(
            f"State of kind {name!r} must be {known.schema.__name__}, not {type(obj).__name__}"
        )
    try:
        return StateSection(
            kind=name,
            version_id=known.version_id,
            minimum_version_id=known.minimum_version_id,
            required=known.required,
            owner_id=owner_id,
            body=codec.encode(obj if known.wire is known.schema else known.wire.of(obj)),
        )
    except ValueError as err:
        raise LocalProtocolError(f"Cannot make a section of kind {name!r}: {err}") from err


def decode_section(section: StateSection) -> Any:
    """Return the schema object in `section`, or None for an optional kind this build cannot read.

    :raises RemoteProtocolError: when a required section is of an unknown kind or version, naming
        it, or any readable one is malformed.
    """
    known = KINDS.get(section.kind)
    problem = _why_unreadable(section, known)
    if problem is None and known is not None:
        newer = section.version_id > known.version_id
        found = codec.decode(known.wire, section.body, ignore_unknown=newer)
        try:
            return found if known.wire is known.schema else found.whole()
        except ValueError as err:
            raise RemoteProtocolError(f"{known.wire.__name__}: {err}") from err
    if section.required:
        raise RemoteProtocolError(f"Cannot read required section {section.kind!r}: {problem}")
    return None


def decode_section_as(schema: type[T], section: StateSection) -> T:
    """Like decode_section, for a caller that knows what it must get.

    :raises RemoteProtocolError: also when the section holds something else or cannot be read.
    """
    obj = decode_section(section)
    if type(obj) is not schema:
        raise RemoteProtocolError(
            f"Section {section.kind!r} holds {type(obj).__name__} instead of {schema.__name__}"
        )
    result: T = obj
    return result


def _why_unreadable(section: StateSection, known: StateKind | None) -> str | None:
    if known is None:
        return "unknown kind"
    if section.minimum_version_id > known.version_id:
        return (
            f"version {section.version_id} needs a reader of version "
            f"{section.minimum_version_id}, this one is {known.version_id}"
        )
    if section.version_id < known.oldest_version_id:
        return (
            f"version {section.version_id} is of an older Ferry, this one reads versions "
            f"{known.oldest_version_id} to {known.version_id}"
        )
    return None
