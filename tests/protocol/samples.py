"""One example of everything that travels, shared by the tests and tools/make_vectors.py.

The values are arbitrary but fixed: the golden bytes in vectors/ are made from them. Never change
one; add another under a new name.
"""

from __future__ import annotations

from array import array

from protocol.channel import ChannelAnnouncement, ChannelRole
from protocol.codec import Buffer
from protocol.framing import FrameType, encode_frame
from protocol.messages import (
    Abort,
    Accept,
    Commit,
    Decision,
    Hello,
    HostFacts,
    Message,
    Prepare,
    Prepared,
    Resolution,
    Resolve,
    Restored,
    Resumed,
    RoundBegin,
    RoundEnd,
    RoundPlaced,
    StateEnd,
    StateSection,
    Switchover,
    WireObstacle,
    encode_message,
)
from protocol.pages import PageBatch, PageEncoding, batch_buffers, check_batch

SESSION = "00112233445566778899aabbccddeeff"
DIGEST = "5eed" * 10
PAGE = 4096

HOST = HostFacts(
    hostname="alpha",
    machine="x86_64",
    kernel_release="6.18.0",
    page_size=4096,
    boot_id="0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0",
    vdso_sha256="ab" * 32,
    xstate_mask=0xE7,
    xstate_size=2696,
    monotonic_ns=123_456_789_012,
    boottime_ns=223_456_789_012,
    cpu_flags=["fpu", "sse2", "avx2", "hypervisor"],
    uid=0,
    capabilities=0x1FF_FFFF_FFFF,
)

OBSTACLE = WireObstacle(
    kind="tty", what="fd 0", detail="is a terminal", hint="start it with its input redirected"
)

SECTION = StateSection(
    kind="sample",
    version_id=2,
    minimum_version_id=1,
    required=True,
    owner_id=4121,
    body=b"\x81\xa1x\x01",
)

MESSAGES: dict[str, Message] = {
    "hello": Hello(version_min=1, version_max=1, software="ferry 0.1", session=SESSION, host=HOST),
    "accept": Accept(version=1, software="ferry 0.1", host=HOST, options={"compress": "zstd"}),
    "state_section": SECTION,
    "prepare": Prepare(),
    "prepared": Prepared(),
    "prepared_refused": Prepared(obstacles=[OBSTACLE]),
    "round_begin": RoundBegin(round=0),
    "round_end": RoundEnd(
        round=0, pages_raw=3, pages_zero=16, pages_absent=1, bytes_payload=8192 + 20
    ),
    "round_placed": RoundPlaced(round=0),
    "switchover": Switchover(),
    "state_end": StateEnd(nr_sections=2, digest=DIGEST),
    "state_end_plain": StateEnd(nr_sections=0),
    "restored": Restored(digest=DIGEST),
    "commit": Commit(),
    "resumed": Resumed(pid=4121, released_monotonic_ns=987_654_321),
    "abort": Abort(phase="restore", reason="no room at 0x7f0000000000", obstacles=[OBSTACLE]),
    "resolve": Resolve(session=SESSION),
    "resolution": Resolution(session=SESSION, decision=Decision.COMMITTED),
    "channel": ChannelAnnouncement(session=SESSION, role=ChannelRole.PAGES, index=1),
}


def batch(
    encoding: PageEncoding, *ranges: int, payload: Buffer = b"", space_id: int = 4121
) -> PageBatch:
    """A checked batch of flat `ranges`."""
    return check_batch(space_id, encoding, array("Q", ranges), payload)


BATCHES: dict[str, PageBatch] = {
    "raw": batch(
        PageEncoding.RAW,
        *(0x7F00_0000_0000, 0x7F00_0000_1000, 0x7F00_0000_3000, 0x7F00_0000_4000),
        payload=b"\x5a" * PAGE + b"\xa5" * PAGE,
    ),
    "zero": batch(PageEncoding.ZERO, 0x10000, 0x20000),
    "absent": batch(PageEncoding.ABSENT, 0x20000, 0x21000),
    # Any bytes: the protocol does not look into compressed contents.
    "zstd": batch(PageEncoding.ZSTD, 0x1000, 0x2000, payload=b"\x28\xb5\x2f\xfd" + bytes(16)),
    "expect": batch(PageEncoding.EXPECT, 0x7F00_0000_0000, 0x7F00_0040_0000),
}


def frame_of(sample: Message | PageBatch) -> bytes:
    """The frame that carries `sample`, in one piece."""
    if isinstance(sample, PageBatch):
        return b"".join(encode_frame(FrameType.PAGES, *batch_buffers(sample)))
    return b"".join(encode_frame(FrameType.CONTROL, encode_message(sample)))


RECORDED: list[Message | PageBatch] = [
    MESSAGES["hello"],
    SECTION,
    MESSAGES["prepare"],
    MESSAGES["round_begin"],
    BATCHES["raw"],
    BATCHES["zero"],
    BATCHES["absent"],
    BATCHES["zstd"],
    MESSAGES["round_end"],
    MESSAGES["switchover"],
    RoundBegin(round=1),
    BATCHES["absent"],
    RoundEnd(round=1, pages_raw=0, pages_zero=0, pages_absent=1, bytes_payload=0),
    SECTION,
    MESSAGES["state_end"],
    MESSAGES["commit"],
]
"""The source's half of one whole migration: what an image holds."""

VECTORS: dict[str, bytes] = {
    **{f"v1_{name}": frame_of(message) for name, message in MESSAGES.items()},
    **{f"v1_pages_{name}": frame_of(sample) for name, sample in BATCHES.items()},
    "v1_image": b"".join(map(frame_of, RECORDED)),
}
"""File stem in vectors/ -> the bytes it must hold."""
