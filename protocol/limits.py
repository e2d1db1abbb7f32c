"""Every hard limit of the protocol, in one place, each with its unit and its reason.

The incoming stream is hostile: a length or count is compared with a limit before anything of that
size is allocated. Limits are part of the protocol: a sender stays below them, a receiver refuses
what exceeds them, and raising one needs a new protocol version.
"""

from __future__ import annotations

PAGE_SIZE = 4096
"""Bytes. The unit of every range on the wire; both hosts must have it (version.py)."""

MAX_CONTROL_FRAME_BYTES = 64 << 20
"""Bytes. A state section travels in one frame; the largest hold queued pipe and socket data."""

MAX_STATE_BYTES = MAX_CONTROL_FRAME_BYTES - (64 << 10)
"""Bytes of one section's body; leaves room for the section's own fields in the frame."""

MAX_BATCH_BYTES = 1 << 20
"""Bytes of page contents in one batch, before compression. Large enough that the per-batch cost
vanishes, small enough to stay in the cache of both sides and to keep a link fair."""

MAX_BATCH_RANGES = 16384
"""Ranges in one batch: a table of 256 KiB. A batch with contents never needs more than 256."""

MAX_ADDRESS = 1 << 63
"""Bytes. End of the largest range: above every user address and every file offset, and below
the point where a signed 64-bit offset overflows."""

MAX_PAGES_FRAME_BYTES = 16 + 16 * MAX_BATCH_RANGES + MAX_BATCH_BYTES
"""Bytes. Batch header, full range table and full payload."""

MAX_FRAME_BYTES = max(MAX_CONTROL_FRAME_BYTES, MAX_PAGES_FRAME_BYTES)
"""Bytes of payload in any frame; each frame type has its own, tighter limit (framing.py)."""

MAX_LIST_ITEMS = 1 << 20
"""Items in one encoded list; above fs.nr_open's default and any sane max_map_count. The msgpack
parser reserves 8 bytes an item before it has seen one."""

MAX_MAP_ITEMS = 1 << 16
"""Entries in one encoded map: fields of a record, or a table keyed by a number."""

MAX_SECTIONS = 1 << 16
"""State sections in one session, first and final ones together."""

MAX_ROUNDS = 1 << 20
"""Rounds in one session; policy gives up long before, this only bounds a peer that never does."""

MAX_TEXT_CHARS = 4096
"""Characters of a host name, reason or other human text in a control message."""

MAX_OBSTACLES = 4096
"""Obstacles in one message; the sender cuts a longer list and says so in the last one."""
