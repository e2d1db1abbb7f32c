"""State sections: the registry of resource kinds. The step between section and schema object is protocol.sections.

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
from dataclasses import dataclass
from typing import Any


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
    import pkgutil  # Slow, and a check comes without.

    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
