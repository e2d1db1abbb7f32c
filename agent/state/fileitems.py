"""The open files of a process as the destination receives them: decoded, and checked before anything is made.

What makes them is agent.state.filerestore.
"""

from __future__ import annotations

from typing import Any

from agent.errors import RestoreError
from agent.state import filelock
from agent.state.context import RestoreOptions
from agent.state.openfile import Item, PreflightJob
from agent.state.registry import FILE_KINDS
from agent.types import Obstacle
from protocol import codec
from protocol.state.bodies import FILE_BODIES
from protocol.state.files import FilesState, OpenFile


def decode_items(state: FilesState) -> dict[str, list[Item[Any]]]:
    """Decode the bodies, by kind.

    :raises RemoteProtocolError: when one is malformed.
    :raises RestoreError: when a kind is unknown.
    """
    numbers: dict[int, list[int]] = {}
    for entry in state.fds:
        numbers.setdefault(entry.file_id, []).append(entry.fd)
    items: dict[str, list[Item[Any]]] = {}
    for file in state.files:
        items.setdefault(file.kind, []).append(decode_item(file, tuple(numbers[file.id])))
    return items


def decode_item(file: OpenFile, fds: tuple[int, ...]) -> Item[Any]:
    """Decode one body; errors as decode_items()."""
    schema = FILE_BODIES.get(file.kind)
    if schema is None:
        raise RestoreError(f"Cannot restore fd {fds[0]}: unknown kind of file {file.kind!r}")
    return Item(file, codec.decode(schema, file.body), fds)


def preflight_files(state: FilesState, options: RestoreOptions) -> list[Obstacle]:
    """Check on the destination that everything can be opened there. Changes nothing."""
    job = PreflightJob(options)
    items = decode_items(state)
    for name, kind in FILE_KINDS.items():
        if kind.preflight is not None and name in items:
            kind.preflight(job, items[name])
    filelock.preflight_locks(job, items.get("regular", ()))
    return job.obstacles
