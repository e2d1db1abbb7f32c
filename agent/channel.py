"""Byte channels to the peer: sockets, pipes and image files behind one blocking interface.

A channel moves bytes and knows nothing of frames. It must never copy what it is handed: buffers go
to the kernel as they are (sendmsg/writev with a list) and come back into a buffer of the caller.
Everything that goes wrong with the link is a TransferError that names the peer and the phase of the
migration.

Calls may come from one thread at a time. All fds are close-on-exec.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from agent.errors import TransferError, UsageError
from agent.kernel.tcp_info import LinkProgress, read_progress

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_log = logging.getLogger(__name__)

IOV_MAX = 1024
"""include/uapi/linux/uio.h, UIO_MAXIOV: buffers per writev."""
DRAIN_LIMIT_S = 2.0
"""How long close_gracefully() waits for the peer to read our last words and hang up."""
_DRAIN_BYTES = 1 << 16


class PeerGone(TransferError):
    """The peer closed the connection, or the connection broke."""


class PeerSilent(TransferError):
    """The peer did not answer in time."""


def _flat(buffer: ReadableBuffer) -> memoryview:
    return memoryview(buffer).cast("B")


class Channel:
    """A connected byte stream over one or two fds, which it owns.

    ``phase`` is set by the migration as it goes on; it is named in every error. ``recorded`` is
    true for image files, where no peer answers.
    """

    recorded = False

    def __init__(self, read_fd: int, write_fd: int, peer: str) -> None:
        self.peer = peer
        self.phase = "handshake"
        self.bytes_sent = 0
        self.bytes_received = 0
        self.timeout_s: float | None = None
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._poll = select.poll()
        if read_fd >= 0:
            self._poll.register(read_fd, select.POLLIN)

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.peer}>"

    # -- what a transport may replace --------------------------------------------------------------

    def _write(self, buffers: Sequence[ReadableBuffer]) -> int:
        return os.writev(self._write_fd, buffers)

    def _read_into(self, view: memoryview) -> int:
        return os.readv(self._read_fd, [view])

    def _read_ready(self, view: memoryview) -> int | None:
        """Read what is there, if that is cheaper than to ask first; None: nothing is, or it is not."""
        return None

    def _pending(self) -> bool:
        """Whether received bytes are held above the fd, where poll(2) cannot see them."""
        return False

    def progress(self) -> LinkProgress | None:
        """How far the connection has got with what was sent; None: nobody knows."""
        return None

    def _close_fds(self) -> None:
        read_fd, write_fd = self._read_fd, self._write_fd
        self._read_fd = self._write_fd = -1
        for fd in {read_fd, write_fd} - {-1}:
            os.close(fd)

    # -- sending -----------------------------------------------------------------------------------

    def send_buffers(self, buffers: Sequence[ReadableBuffer]) -> int:
        """Send every byte of every buffer, in order, and return their number.

        The buffers may be reused as soon as this returns.

        :raises PeerGone: the connection is broken; what the peer sent before may still be readable.
        :raises PeerSilent: a socket took nothing for ``self.timeout_s``.
        """
        total = sum([memoryview(buffer).nbytes for buffer in buffers])
        try:
            if len(buffers) <= IOV_MAX:
                done = self._write_some(buffers)
                if done == total:
                    self.bytes_sent += total
                    return total
            else:
                done = 0
            self._send_rest(buffers, done)
        except OSError as err:
            raise self._send_error(err) from err
        self.bytes_sent += total
        return total

    def _send_rest(self, buffers: Sequence[ReadableBuffer], done: int) -> None:
        # Slow path: a partial send, or more buffers than one call takes. An empty view cannot be
        # cast.
        views = [_flat(buffer) for buffer in buffers if memoryview(buffer).nbytes]
        first = 0
        while True:
            while first < len(views) and done >= views[first].nbytes:
                done -= views[first].nbytes
                first += 1
            if first == len(views):
                return
            if done:
                views[first] = views[first][done:]
            done = self._write_some(views[first : first + IOV_MAX])

    def _write_some(self, buffers: Sequence[ReadableBuffer]) -> int:
        while True:
            try:
                return self._write(buffers)
            except BlockingIOError:
                # An inherited stdio fd may be non-blocking; the flag is shared with others, so it
                # stays.
                waiter = select.poll()
                waiter.register(self._write_fd, select.POLLOUT)
                waiter.poll()

    def _send_error(self, err: OSError) -> TransferError:
        if err.errno in _GONE_ERRNOS:
            return PeerGone(f"Lost {self.peer} while sending in {self.phase}: {err.strerror}")
        return TransferError(f"Cannot send to {self.peer} in {self.phase}: {err.strerror or err}")

    # -- receiving ---------------------------------------------------------------------------------

    def poll_readable(self, timeout_s: float = 0.0) -> bool:
        """Whether a read would return at once: bytes are there, or the end of the stream."""
        return self._pending() or bool(self._poll.poll(max(0.0, timeout_s) * 1000))

    def recv_exactly_into(self, buffer: WriteableBuffer, *, timeout_s: float | None = None) -> None:
        """Fill the whole buffer.

        ``timeout_s`` bounds each silence of the peer, not the whole transfer; None means
        ``self.timeout_s``, and if that is None too, no bound.

        :raises PeerGone: the stream ended or broke before the buffer was full.
        :raises PeerSilent: nothing came for that long.
        """
        view = memoryview(buffer)
        if not view.nbytes:
            return
        view = view.cast("B")
        wanted = view.nbytes
        limit = self.timeout_s if timeout_s is None else timeout_s
        while view.nbytes:
            count = self._recv_some(view, limit)
            if not count:
                part = wanted - view.nbytes
                raise PeerGone(self._end_text(part, wanted))
            self.bytes_received += count
            view = view[count:]

    def _recv_some(self, view: memoryview, limit_s: float | None) -> int:
        while True:
            try:
                count = self._read_ready(view)
                if count is not None:
                    return count
                if limit_s is not None and not self.poll_readable(limit_s):
                    raise PeerSilent(f"{self.peer} sent nothing for {limit_s:g} s in {self.phase}")
                return self._read_into(view)
            except BlockingIOError:
                self._poll.poll(None if limit_s is None else limit_s * 1000)
            except OSError as err:
                text = f"in {self.phase}: {err.strerror or err}"
                if err.errno in _GONE_ERRNOS:
                    raise PeerGone(f"Lost {self.peer} while receiving {text}") from err
                raise TransferError(f"Cannot receive from {self.peer} {text}") from err

    def _end_text(self, part: int, wanted: int) -> str:
        where = f" after {part} of {wanted} expected bytes" if part else ""
        return f"{self.peer} closed the connection in {self.phase}{where}"

    # -- ending ------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """True once no fd is held any more."""
        return self._read_fd < 0 and self._write_fd < 0

    def fds(self) -> set[int]:
        """The fd numbers that this channel holds open in the agent."""
        return {self._read_fd, self._write_fd} - {-1}

    def half_close(self) -> None:
        """Tell the peer that nothing more will be sent; receiving goes on."""
        if self._write_fd >= 0 and self._write_fd != self._read_fd:
            os.close(self._write_fd)
            self._write_fd = -1

    def complete(self) -> None:
        """The migration is complete: make what was sent durable (files); nothing for a
        connection."""

    def close(self) -> None:
        """Close at once; without complete() before it, a file that was being written is deleted."""
        self._poll = select.poll()
        self._close_fds()

    def close_gracefully(self, *, limit_s: float = DRAIN_LIMIT_S) -> None:
        """Close, but let our last words (Abort, Resumed) arrive first.

        Closing a socket that holds unread bytes resets the connection, which discards what is still
        on its way to the peer. So stop sending, then read and drop until the peer hangs up or
        ``limit_s`` is over.
        """
        if not self.closed and not self.recorded:
            with contextlib.suppress(OSError, TransferError):
                self.half_close()
                self._drain(limit_s)
        self.close()

    def _drain(self, limit_s: float) -> None:
        scrap = memoryview(bytearray(_DRAIN_BYTES))
        end = time.monotonic() + limit_s
        while (left := end - time.monotonic()) > 0:
            if self.poll_readable(left) and not self._read_into(scrap):
                return


_GONE_ERRNOS = frozenset(
    {
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
    }
)


class SocketChannel(Channel):
    """A connected stream socket, which it owns."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(True)
        super().__init__(sock.fileno(), sock.fileno(), peer)
        self.socket = sock
        self._send_limit_s: float | None = None

    def _write(self, buffers: Sequence[ReadableBuffer]) -> int:
        if self._send_limit_s != self.timeout_s:
            self._limit_sending()
        try:
            return self.socket.sendmsg(buffers)
        except BlockingIOError as err:
            # Nothing at all could be sent for that long, while the target may be waiting frozen.
            raise PeerSilent(
                f"{self.peer} took nothing for {self.timeout_s:g} s in {self.phase}"
            ) from err

    def _limit_sending(self) -> None:
        limit_s = self._send_limit_s = self.timeout_s
        seconds, rest = divmod(limit_s or 0.0, 1)
        # struct timeval; zero is no limit.
        value = struct.pack("qq", int(seconds), max(int(rest * 1e6), 1 if limit_s else 0))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def _read_into(self, view: memoryview) -> int:
        return self.socket.recv_into(view)

    def _read_ready(self, view: memoryview) -> int | None:
        try:
            return self.socket.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def progress(self) -> LinkProgress | None:
        """For TCP (and TLS over it), what the kernel knows."""
        return read_progress(self.socket)

    def half_close(self) -> None:
        """Tell the peer that nothing more will be sent; receiving goes on."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def _close_fds(self) -> None:
        self._read_fd = self._write_fd = -1
        self.socket.close()


class FileWriteChannel(Channel):
    """An image being written: it appears under its name, complete, or not at all.

    The bytes go to a temporary file beside the final one, readable by its owner only (it holds the
    memory of a process); complete() renames it over what was there. A device or FIFO is written
    directly.
    """

    recorded = True

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)
        self._temporary = ""
        try:
            mode = os.stat(self.path).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        except OSError as err:
            raise UsageError(f"Cannot write image {path!r}: {err.strerror}") from err
        if stat.S_ISDIR(mode) or stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
            raise UsageError(f"Cannot write image {path!r}: it exists and is not a regular file")
        try:
            fd = self._open_temporary() if stat.S_ISREG(mode) else os.open(self.path, os.O_WRONLY)
        except OSError as err:
            raise UsageError(f"Cannot write image {path!r}: {err.strerror}") from err
        super().__init__(-1, fd, f"file:{path}")

    def _open_temporary(self) -> int:
        folder, name = os.path.split(self.path)
        for attempt in range(100):
            temporary = os.path.join(folder, f".{name[:200]}.{os.getpid()}-{attempt}.partial")
            try:
                fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            except FileExistsError:
                continue
            self._temporary = temporary
            return fd
        raise FileExistsError(errno.EEXIST, "too many partial images of that name")

    def poll_readable(self, timeout_s: float = 0.0) -> bool:
        """Never: a file does not answer."""
        return False

    def _read_into(self, view: memoryview) -> int:
        raise TransferError(
            f"Cannot receive from {self.peer}: an image that is being written never answers"
        )

    def half_close(self) -> None:
        """Nothing: complete() ends the image."""

    def complete(self) -> None:
        """Make the image durable and give it its name.

        :raises TransferError: it could not be written out; the file of that name is unchanged.
        """
        if not self._temporary:
            return
        try:
            os.fsync(self._write_fd)
            os.rename(self._temporary, self.path)
        except OSError as err:
            raise TransferError(f"Cannot complete {self.peer}: {err.strerror}") from err
        self._temporary = ""
        folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        except OSError as err:
            # Some file systems cannot sync a directory; the image itself is safe.
            _log.debug("Cannot sync the directory of %s: %s", self.peer, err.strerror)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Close; without complete() before it, the partial image is deleted."""
        super().close()
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            self._temporary = ""


class FileReadChannel(Channel):
    """An image being played; what is sent to it is dropped, since nobody listens."""

    recorded = True

    def __init__(self, path: str) -> None:
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as err:
            raise UsageError(f"Cannot read image {path!r}: {err.strerror}") from err
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise UsageError(f"Cannot read image {path!r}: it is a directory")
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        super().__init__(fd, -1, f"file:{path}")

    def _write(self, buffers: Sequence[ReadableBuffer]) -> int:
        return sum(memoryview(buffer).nbytes for buffer in buffers)

    def _end_text(self, part: int, wanted: int) -> str:
        return f"{self.peer} ends early, in {self.phase}: it was cut off"
