"""Restartable sequences: the area a thread registers with rseq(2), and the critical section descriptor in it.

Addresses are target addresses. Source: include/uapi/linux/rseq.h.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint32, c_uint64
from typing import Final

RSEQ_FLAG_UNREGISTER: Final = 1 << 0
RSEQ_ORIG_SIZE: Final = 32
"""Bytes of the first published struct rseq, which every kernel accepts."""
RSEQ_SIG_X86: Final = 0x53053053
"""The signature that glibc registers on x86."""


class rseq(ctypes.Structure):
    """include/uapi/linux/rseq.h; node_id and mm_cid since v6.3."""

    _fields_ = [
        ("cpu_id_start", c_uint32),
        ("cpu_id", c_uint32),
        ("rseq_cs", c_uint64),
        ("flags", c_uint32),
        ("node_id", c_uint32),
        ("mm_cid", c_uint32),
        ("padding", c_uint32),
    ]


class rseq_cs(ctypes.Structure):
    """include/uapi/linux/rseq.h; a thread inside must be resumed at ``abort_ip``."""

    _fields_ = [
        ("version", c_uint32),
        ("flags", c_uint32),
        ("start_ip", c_uint64),
        ("post_commit_offset", c_uint64),
        ("abort_ip", c_uint64),
    ]
