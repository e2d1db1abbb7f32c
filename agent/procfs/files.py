"""Reading files of /proc, with one answer for "the task is gone": ProcessLookupError.

Must never decide anything. Sources: proc(5).
"""

from __future__ import annotations

import os


def read_bytes(path: str) -> bytes:
    """Return the whole content of a file below /proc/PID.

    :raises ProcessLookupError: the task is gone (whatever errno this kernel chose to say so).
    :raises FileNotFoundError: the task is there but has no such file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise_if_gone(path)
        raise
    try:
        chunks = []
        while chunk := os.read(fd, 1 << 16):
            chunks.append(chunk)
    finally:
        os.close(fd)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def read_text(path: str) -> str:
    """Return the whole content as text; bytes that are not UTF-8 survive as surrogates."""
    return os.fsdecode(read_bytes(path))


def read_link(path: str) -> str:
    """Return where a link below /proc/PID points; errors as in read_bytes()."""
    try:
        return os.readlink(path)
    except FileNotFoundError:
        raise_if_gone(path)
        raise


def raise_if_gone(path: str) -> None:
    """Raise ProcessLookupError if the task that ``path`` (/proc/PID/... or .../task/TID/...) names is gone."""
    parts = path.split("/")
    depth = 5 if len(parts) > 5 and parts[3] == "task" else 3
    task = "/".join(parts[:depth])
    if not os.path.isdir(task):
        raise ProcessLookupError(3, "No such process", task) from None
