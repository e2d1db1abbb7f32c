"""Write the golden bytes tests/protocol/vectors/*.hex that do not exist yet.

    python tools/make_vectors.py

A vector on disk is a promise to peers and images out in the world: this program never changes
one. Where today's code gives other bytes it says so and exits with 1; the cure is a new protocol
version and new samples, not a new file of the old name.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.protocol.samples import VECTORS  # noqa: E402  (needs the path above)

DIRECTORY = ROOT / "tests" / "protocol" / "vectors"


def main() -> int:
    """Write what is missing; complain about what differs."""
    differing = 0
    for name, data in VECTORS.items():
        path = DIRECTORY / f"{name}.hex"
        text = "\n".join(textwrap.wrap(data.hex(), 96)) + "\n"
        if not path.exists():
            path.write_text(text, encoding="ascii")
            print(f"wrote {path.relative_to(ROOT)}, {len(data)} bytes")
        elif path.read_text(encoding="ascii") != text:
            print(f"{path.relative_to(ROOT)} differs from today's encoding", file=sys.stderr)
            differing += 1
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
