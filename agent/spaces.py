"""Space ids: which memory a page batch belongs to. They mean something within one migration only."""

from __future__ import annotations

PROCESS_SPACE = 1
"""The process's own memory; trees will count on from here."""
FIRST_OBJECT_SPACE = 1 << 16
"""Shared objects are numbered from here on, in the order in which they are met."""
