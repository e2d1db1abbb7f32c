"""The name and version that Ferry gives itself in handshakes and ``--version``."""

from __future__ import annotations

VERSION = "0.1.0"
SOFTWARE = f"ferry/{VERSION}"
