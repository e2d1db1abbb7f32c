"""A character device that is the same on every host: null, zero, full, random, urandom."""

from __future__ import annotations

from dataclasses import dataclass

PORTABLE_DEVICES: dict[tuple[int, int], str] = {
    # Documentation/admin-guide/devices.txt, major 1.
    (1, 3): "/dev/null",
    (1, 5): "/dev/zero",
    (1, 7): "/dev/full",
    (1, 8): "/dev/random",
    (1, 9): "/dev/urandom",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CharDevice:
    """The device by number, and the path under which the process opened it."""

    major: int
    minor: int
    path: str

    def __post_init__(self) -> None:
        if (self.major, self.minor) not in PORTABLE_DEVICES:
            raise ValueError(f"device {self.major}:{self.minor} is not portable")
        if not self.path.startswith("/") or "\0" in self.path:
            raise ValueError(f"device path {self.path!r} is not absolute")
