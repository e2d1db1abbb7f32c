"""PagePlacer under the name the layers promise (style.md, section 1); the work is in place.py."""

from __future__ import annotations

from agent.pages.place import PagePlacer

__all__ = ["PagePlacer"]
