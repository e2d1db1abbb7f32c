"""TCP and UDP sockets: listening, bound, connected (UDP) or fresh.

A TCP connection belongs to two hosts. It is refused, or with --tcp-close carried as a connection
that the peer has reset: the program finds out as it would after a failure of the network, and its
clients connect again. Datagrams that wait to be read are dropped, as UDP allows. Multicast
memberships cannot be listed by any call; only a socket bound to a group is recognised. Sources:
tcp(7), udp(7), ip(7), include/uapi/linux/tcp.h (struct tcp_info).
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import logging
import os
import select
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from agent.errors import RestoreError
from agent.kernel.libc import libc
from agent.state.context import DumpContext
from agent.state.openfile import (
    AT_ONCE,
    Candidates,
    Description,
    DumpJob,
    FileKind,
    Item,
    PreflightJob,
    Recheck,
    RestoreJob,
    are_nobodys,
    find_holders,
    set_status_flags,
)
from agent.state.sockets import opened, socket_identity
from agent.state.sockopts import (
    SO_PEEK_OFF,
    SOL_TCP,
    Values,
    apply_options,
    columns_of,
    dump_options,
    has_filter,
)
from agent.state.tcpreset import ResetMaker
from protocol.state.inetsk import InetAddress, InetMessage, InetSocket, InetState
from protocol.state.sockopts import SocketOptions

_log = logging.getLogger(__name__)

_connect = libc["connect"]
_connect.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_connect.restype = ctypes.c_int

TCP_CLOSE, TCP_LISTEN = 7, 10
TCP_STATES = (
    "?", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE",
    "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING",
)  # fmt: skip
_TCP_INFO = struct.Struct("=B23xII")
"""include/uapi/linux/tcp.h, the beginning of struct tcp_info: tcpi_state, tcpi_unacked, tcpi_sacked."""
TCP_ULP = 31
POLLRDHUP = 0x2000

Sockaddr = tuple[str, int] | tuple[str, int, int, int]


def _identity(job: DumpJob, desc: Description) -> tuple[int, int, int]:
    found: tuple[int, int, int] = job.memo[f"socket {desc.fd}"]
    return found


def dump_inet(job: DumpJob, desc: Description) -> InetSocket | None:
    """Describe a TCP or UDP socket, or refuse it."""
    family, kind, protocol = _identity(job, desc)
    with opened(job.fetch(desc), family, kind, protocol) as sock:
        local = _address(sock.getsockname())
        remote = _peer(sock)
        if kind == socket.SOCK_STREAM:
            return _dump_tcp(job, desc, sock, local, remote)
        if local is not None and ipaddress.ip_address(local.host).is_multicast:
            job.refuse(desc, "multicast", f"bound to group {local.host}", "multicast is not carried yet")
            return None
        if not _check_filter(job, desc, sock):
            return None
        return InetSocket(
            family=family,
            type=kind,
            protocol=protocol,
            state=InetState.CONNECTED if remote else InetState.OPEN,
            options=dump_options(sock),
            local=local,
            remote=remote,
            shutdown=_shutdown_bits(sock),
            queue=tuple(_peek_datagrams(sock)) if job.content else (),
        )


def _peek_datagrams(sock: socket.SocketType) -> Iterator[InetMessage]:
    # Only what came from this host: the process may have sent it to itself and relies on it.
    poller = select.poll()
    poller.register(sock.fileno(), select.POLLIN)
    if not any(events & select.POLLIN for _, events in poller.poll(0)):
        return
    before = sock.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF)
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        own = sock.getsockname()[0]
        while True:
            data, raw = sock.recvfrom(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            sender = _address(raw)
            if sender is not None and (
                sender.host == own or ipaddress.ip_address(sender.host).is_loopback
            ):
                yield InetMessage(data=data, sender=sender)
    except OSError:
        return  # EAGAIN: that was the last one; or an ICMP error that waits to be reported.
    finally:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, before)


def _dump_tcp(
    job: DumpJob,
    desc: Description,
    sock: socket.SocketType,
    local: InetAddress | None,
    remote: InetAddress | None,
) -> InetSocket | None:
    facts = _look(sock)
    state = facts.state
    if facts.is_connected:
        if state != TCP_CLOSE and not job.ctx.options.tcp_close:
            name = TCP_STATES[state] if state < len(TCP_STATES) else str(state)
            job.refuse(
                desc, "tcp connection", f"{_show(local)} -> {_show(remote)} is {name}",
                "carry it as a connection reset by its peer with --tcp-close,"
                " or let the clients disconnect first",
            )  # fmt: skip
            return None
        return InetSocket(
            family=sock.family, type=sock.type, protocol=sock.proto, state=InetState.RESET,
            options=SocketOptions(),
        )  # fmt: skip
    if not _check_filter(job, desc, sock):
        return None
    if state == TCP_LISTEN and facts.waiting and not job.ctx.options.tcp_close:
        job.refuse(
            desc, "tcp connection", f"{facts.waiting} connections to {_show(local)} wait for accept(2)",
            "try again, or let them be reset with --tcp-close",
        )  # fmt: skip
        return None
    job.memo[_facts_of(desc)] = facts
    return InetSocket(
        family=sock.family,
        type=sock.type,
        protocol=sock.proto,
        state=InetState.LISTENING if state == TCP_LISTEN else InetState.OPEN,
        options=columns_of(sock.family, sock.type, sock.proto).options(facts.answers),
        local=local,
        backlog=facts.backlog if state == TCP_LISTEN else 0,
    )


class _TcpFacts(NamedTuple):
    """Of a TCP socket that is not connected, and has no filter: all that its description is made of."""

    state: int
    waiting: int
    """In state LISTEN: the length of the accept queue."""
    backlog: int
    """In state LISTEN: its limit."""
    is_connected: bool
    """Whether it is, or was."""
    name: Sockaddr
    interface: str
    """That of the name."""
    answers: Values


def _look(sock: socket.SocketType) -> _TcpFacts:
    # In state LISTEN tcpi_unacked and tcpi_sacked mean something else.
    state, waiting, backlog = _TCP_INFO.unpack(sock.getsockopt(SOL_TCP, socket.TCP_INFO, _TCP_INFO.size))
    is_connected = state != TCP_LISTEN and (state != TCP_CLOSE or _was_connected(sock))
    name = sock.getsockname()
    answers = [] if is_connected else columns_of(sock.family, sock.type, sock.proto).ask(sock)
    return _TcpFacts(state, waiting, backlog, is_connected, name, _interface(name), answers)


def _facts_of(desc: Description) -> str:
    return f"tcp {desc.id}"


def _check_filter(job: DumpJob, desc: Description, sock: socket.SocketType) -> bool:
    if has_filter(sock):
        job.refuse(desc, "socket filter", "a packet filter is attached", "it is not carried yet")
        return False
    return True


def _was_connected(sock: socket.SocketType) -> bool:
    # A socket that never connected polls as hung up, but not as closed by its peer.
    poller = select.poll()
    poller.register(sock.fileno(), POLLRDHUP)
    return any(events & POLLRDHUP for _, events in poller.poll(0))


def _shutdown_bits(sock: socket.SocketType) -> int:
    # udp_poll(): RDHUP for the receiving side, HUP for both.
    poller = select.poll()
    poller.register(sock.fileno(), POLLRDHUP)
    events = dict(poller.poll(0)).get(sock.fileno(), 0)
    return 3 if events & select.POLLHUP else 1 if events & POLLRDHUP else 0


def _peer(sock: socket.SocketType) -> InetAddress | None:
    try:
        return _address(sock.getpeername())
    except OSError as err:
        if err.errno in (errno.ENOTCONN, errno.EINVAL):
            return None
        raise


def _address(address: Sockaddr) -> InetAddress | None:
    host, _, _ = address[0].partition("%")
    if address[1] == 0 and ipaddress.ip_address(host).is_unspecified:
        return None
    flowinfo = address[2] if len(address) == 4 else 0
    return InetAddress(host=host, port=address[1], flowinfo=flowinfo, interface=_interface(address))


def _interface(address: Sockaddr) -> str:
    scope = address[3] if len(address) == 4 else 0
    return socket.if_indextoname(scope) if scope else ""


def _sockaddr(family: int, address: InetAddress) -> Sockaddr:
    if family == socket.AF_INET:
        return (address.host, address.port)
    scope = socket.if_nametoindex(address.interface) if address.interface else 0
    return (address.host, address.port, address.flowinfo, scope)


def _show(address: InetAddress | None) -> str:
    if address is None:
        return "*"
    return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"


def inet_unchanged(check: Recheck, found: Candidates[InetSocket]) -> Iterable[int]:
    """Of TCP sockets that nobody outside can reach, or that will be found reset: those that a dump describes as before.

    Datagrams would come to a socket as soon as it is bound, so all of UDP is made in the end.
    """
    tcp = [
        (desc, body)
        for desc, body in found
        if body.type == socket.SOCK_STREAM and body.state is not InetState.CONNECTED
    ]
    if check.now is check.before:
        return [desc.id for desc, _body in tcp]
    return chain.from_iterable(_as_before(check, tcp[low : low + AT_ONCE]) for low in range(0, len(tcp), AT_ONCE))


def _as_before(check: Recheck, some: Candidates[InetSocket]) -> list[int]:
    ctx = check.now.ctx
    try:
        free = are_nobodys(ctx.fetch_all([desc.fd for desc, _body in some]))
        return [desc.id for (desc, body), is_free in zip(some, free) if is_free and _is_as_before(check, desc, body)]
    finally:
        ctx.drop_fetched()


def _is_as_before(check: Recheck, desc: Description, body: InetSocket) -> bool:
    # Where it is not, the dump that follows says why it cannot be carried.
    job = check.now
    fd = job.fetch(desc)
    try:
        with opened(fd, body.family, body.type, body.protocol) as sock:
            if body.state is InetState.RESET:
                if job.ctx.options.tcp_close and _is_connected(sock):
                    return True
            elif _look(sock) == check.before.memo[_facts_of(desc)] and not has_filter(sock):
                return True
        job.memo[f"socket {desc.fd}"] = socket_identity(fd)
        return dump_inet(job, desc) == body
    except OSError:
        return False


def _is_connected(sock: socket.SocketType) -> bool:
    """Tell of a TCP socket that was to be found reset whether it still is; False where only a whole dump can tell.

    A server has thousands of them. IPV6_ADDRFORM makes one of IPv4 of one of IPv6.
    """
    state = sock.getsockopt(SOL_TCP, socket.TCP_INFO, 1)[0]
    family = sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    return state not in (TCP_LISTEN, TCP_CLOSE) and family == sock.family


def reset_connections(ctx: DumpContext) -> None:
    """Reset every TCP connection, and close every listening socket, that only the stopped process holds.

    For a process that will not run again: its peers learn now what its end would tell them later.
    The agent's copies stay the context's.
    """
    folder = f"/proc/{ctx.pid}/fd"
    held = {fd: os.readlink(f"{folder}/{fd}") for fd in map(int, os.listdir(folder))}
    sockets = {fd: link for fd, link in held.items() if link.startswith("socket:")}
    if not sockets:
        return
    others = find_holders(ctx)
    for target_fd, link in sockets.items():
        if link not in others:
            with socket.socket(fileno=os.dup(ctx.fetch_fd(target_fd))) as sock:
                if sock.proto == socket.IPPROTO_TCP and sock.family in (socket.AF_INET, socket.AF_INET6):
                    _disconnect(sock.fileno())


def _disconnect(fd: int) -> None:
    # connect(2) to AF_UNSPEC: what remains is a fresh socket. The socket module cannot name that address.
    address = ctypes.create_string_buffer(bytes(16), 16)
    if _connect(fd, address, len(address)) < 0:
        _log.debug("A connection ends with its process: %s", os.strerror(ctypes.get_errno()))


def preflight_inet(job: PreflightJob, items: Sequence[Item[InetSocket]]) -> None:
    """Check that every address can be bound here, by binding all of them for a moment."""
    bound: list[socket.socket] = []
    try:
        for item in items:
            if item.body.state is InetState.RESET:
                continue
            try:
                bound.append(_bind(item.body))
            except OSError as err:
                hint = "stop what uses the port on the destination"
                if err.errno == errno.EADDRNOTAVAIL:
                    hint = "give the destination this address first (ip address add)"
                job.refuse(
                    item, "port", f"cannot bind {_show(item.body.local)}: {err.strerror}", hint
                )
            except RestoreError as err:
                job.refuse(item, "socket", str(err))
    finally:
        for sock in bound:
            sock.close()


def _bind(body: InetSocket) -> socket.socket:
    sock = socket.socket(body.family, body.type, body.protocol)
    try:
        apply_options(sock, body.options, before_bind=True)
        if body.local is not None:
            if body.type == socket.SOCK_STREAM:
                # Old connections in TIME_WAIT must not keep the port from us.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(_sockaddr(body.family, body.local))
            except OSError as err:
                # The address of a connected datagram socket was mostly chosen by routing.
                if err.errno != errno.EADDRNOTAVAIL or body.state is not InetState.CONNECTED:
                    raise
                sock.bind(("" if body.family == socket.AF_INET else "::", body.local.port))
        return sock
    except BaseException:
        sock.close()
        raise


def restore_inet(job: RestoreJob, items: Sequence[Item[InetSocket]]) -> None:
    """Make every socket.

    :raises RestoreError: when an address or an option cannot be had.
    """
    resets = ResetMaker()
    try:
        for item in items:
            body = item.body
            try:
                if body.state is InetState.RESET:
                    sock = resets.make(body.family)
                else:
                    sock = _make(body, listening=not job.ahead)
            except OSError as err:
                raise RestoreError(
                    f"Cannot restore {item}: {_show(body.local)}: {err.strerror}"
                ) from err
            fd = sock.detach()
            job.put(item, fd)
            set_status_flags(fd, item.file.flags)
        for item in items:
            _send_queue(job, item, items)
    finally:
        resets.close()


def _send_queue(
    job: RestoreJob, item: Item[InetSocket], items: Sequence[Item[InetSocket]]
) -> None:
    local = item.body.local
    for message in item.body.queue:
        sender = next(
            (
                other
                for other in items
                if other.body.type == socket.SOCK_DGRAM
                and other.body.family == item.body.family
                and other.body.local is not None
                and other.body.local.port == message.sender.port
            ),
            None,
        )
        if sender is None or local is None:
            _log.info("A datagram waiting in %s is dropped: another process sent it", item)
            continue
        unspecified = ipaddress.ip_address(local.host).is_unspecified
        target = replace(local, host=message.sender.host) if unspecified else local
        body = sender.body
        with opened(job.fds[sender.id], body.family, body.type, body.protocol) as sock:
            try:
                sock.sendto(
                    message.data, socket.MSG_DONTWAIT, _sockaddr(item.body.family, target)
                )
            except OSError as err:
                _log.warning("A datagram waiting in %s is lost: %s", item, err)


def listen_ahead(item: Item[InetSocket], fd: int) -> None:
    """Have a socket listen that was made ahead; ``fd`` is the agent's.

    :raises RestoreError: somebody else listens there by now.
    """
    body = item.body
    with opened(fd, body.family, body.type, body.protocol) as sock:
        try:
            sock.listen(body.backlog)
        except OSError as err:
            raise RestoreError(f"Cannot restore {item}: {_show(body.local)}: {err.strerror}") from err


def _make(body: InetSocket, *, listening: bool) -> socket.socket:
    sock = _bind(body)
    try:
        if body.type == socket.SOCK_STREAM and body.local is not None:
            reuse = body.options.ints.get("SO_REUSEADDR", 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        apply_options(sock, body.options, before_bind=False)
        if body.state is InetState.LISTENING and listening:
            sock.listen(body.backlog)
        elif body.state is InetState.CONNECTED and body.remote is not None:
            sock.connect(_sockaddr(body.family, body.remote))
        if body.shutdown:
            sock.shutdown(socket.SHUT_RDWR if body.shutdown == 3 else socket.SHUT_RD)
        return sock
    except BaseException:
        sock.close()
        raise


KIND = FileKind(
    name="inet",
    dump=dump_inet,
    restore=restore_inet,
    preflight=preflight_inet,
    unchanged=inet_unchanged,
)
