"""Socket options, common to all families: name to value, only those that differ from a new socket."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """``ints`` by the option's C name; ``blobs`` for options that are structures or text."""

    ints: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, blob in self.blobs.items():
            if len(blob) > 256:
                raise ValueError(f"socket option {name} is {len(blob)} bytes long")
