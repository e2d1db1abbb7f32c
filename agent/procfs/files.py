"""Reading files of /proc, with one answer for "the task is gone": ProcessLookupError.

Must never decide anything. Sources: proc(5).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator

READ_BYTES = 1 << 16


def read_bytes(path: str) -> bytes:
    """Return the whole content of a file below /proc/PID.

    :raises ProcessLookupError: the task is gone (whatever errno this kernel chose to say so).
    :raises FileNotFoundError: the task is there but has no such file.
    """
    chunks = list(_chunks(path))
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def read_again(path: str, known: bytes) -> bytes:
    """As read_bytes(), but for content that equals `known` it returns that, and needs no memory for another."""
    at = 0
    chunks = _chunks(path)
    for chunk in chunks:
        if not known.startswith(chunk, at):
            return b"".join([known[:at], chunk, *chunks])
        at += len(chunk)
    return known if at == len(known) else known[:at]


def read_lines(path: str) -> Iterator[bytes]:
    """Yield the content in pieces of whole lines; only the last one may be cut off. Errors as in read_bytes()."""
    rest = b""
    for chunk in _chunks(path):
        end = chunk.rfind(b"\n") + 1
        if end:
            yield rest + chunk[:end]
            rest = chunk[end:]
        else:
            rest += chunk
    if rest:
        yield rest


def _chunks(path: str) -> Iterator[bytes]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise_if_gone(path)
        raise
    try:
        while chunk := os.read(fd, READ_BYTES):
            yield chunk
    finally:
        os.close(fd)


class ReadAgain:
    """Files of /proc that are to be read when time matters: opened ahead, as far as descriptors allow."""

    def __init__(self, paths: Iterable[str], *, limit: int) -> None:
        self._fds: dict[str, int] = {}
        for path in itertools.islice(paths, limit):
            with contextlib.suppress(OSError):
                self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_bytes(self, path: str) -> bytes:
        """As read_bytes(), of any file."""
        fd = self._fds.get(path)
        if fd is not None:
            with contextlib.suppress(ProcessLookupError):  # the task is gone; by now another may have its name
                content = part = os.pread(fd, READ_BYTES, 0)
                while part:
                    part = os.pread(fd, READ_BYTES, len(content))
                    content += part
                return content
        return read_bytes(path)

    def close(self) -> None:
        """Close all; closing twice is harmless."""
        while self._fds:
            os.close(self._fds.popitem()[1])


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
