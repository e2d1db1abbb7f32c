"""The two ways a protocol rule can be broken, told apart by who broke it.

    ProtocolError
    +-- LocalProtocolError     this side tried something the protocol does not allow: a bug of ours
    +-- RemoteProtocolError    the peer sent something the protocol does not allow, or garbage

Received bytes, whatever they are, may raise nothing but RemoteProtocolError. The agent translates
both into its own tree; nothing here knows about processes, phases or exit codes.
"""

from __future__ import annotations


class ProtocolError(Exception):
    """Root of the protocol's errors; never raised itself."""


class LocalProtocolError(ProtocolError):
    """This side was about to break the protocol; nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol, or the bytes are not ours at all; the session cannot go on."""
