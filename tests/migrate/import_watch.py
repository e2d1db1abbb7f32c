"""An agent that notes what it imports, and when.

Usage: python -m tests.migrate.import_watch OUTPUT MODULE ARGUMENT...

Runs main() of MODULE, then writes to OUTPUT, as JSON, a pair of time (CLOCK_MONOTONIC, ns) and name for every module
that was looked for.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


class Watch:
    """A finder that finds nothing: Python asks it first for every module that is not there yet."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        self.seen.append((time.monotonic_ns(), name))


def main() -> int:
    watch = Watch()
    sys.meta_path.insert(0, watch)
    output, module = Path(sys.argv[1]), sys.argv[2]
    del sys.argv[1:3]
    try:
        status: int = importlib.import_module(module).main()
    finally:
        output.write_text(json.dumps(watch.seen))
    return status


if __name__ == "__main__":
    sys.exit(main())
