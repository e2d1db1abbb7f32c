"""The step between a section, which travels, and the schema object in it; the kinds are protocol.state's."""

from __future__ import annotations

from typing import Any, TypeVar

from protocol import codec
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.messages import StateSection
from protocol.state import KINDS, StateKind

T = TypeVar("T")


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
            f"version {section.version_id} is of an older Ferry, the oldest that this one reads is "
            f"{known.oldest_version_id}"
        )
    return None
