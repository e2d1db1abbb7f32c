"""Show captured protocol bytes, or an image file, as one JSON object per line.

    python tools/decode_stream.py x.ferry
    agent-send PID stdio: | tee capture | ...; python tools/decode_stream.py capture
    python tools/decode_stream.py --check x.ferry     also: is the order of messages legal?

Each line has "offset" (of the frame, in bytes) and "frame"; messages add "message" and their
fields, page batches what they cover. State sections are shown by their schema, or as plain values
where the kind is unknown. Long byte strings are cut (--bytes N), and so are range tables
(--ranges N). A last line with "error" and exit status 1 tell where a stream stops making sense.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protocol import sections, state  # noqa: E402  (needs the path above)
from protocol.codec import decode_plain  # noqa: E402
from protocol.errors import RemoteProtocolError  # noqa: E402
from protocol.framing import HEADER_BYTES, Frame, FrameDecoder, FrameType  # noqa: E402
from protocol.messages import StateSection, decode_message  # noqa: E402
from protocol.pages import parse_batch  # noqa: E402
from protocol.session import Role, Session, SessionState  # noqa: E402

CHUNK_BYTES = 1 << 20


class StreamPrinter:
    """Turns frames into lines; with `session`, checks their order on the way."""

    def __init__(self, session: Session | None, max_bytes: int, max_ranges: int) -> None:
        self._session = session
        self._max_bytes = max_bytes
        self._max_ranges = max_ranges

    def lines(self, stream: BinaryIO) -> Iterator[dict[str, Any]]:
        """Yield one object for each frame, and one with "error" where the stream breaks."""
        offset = 0
        try:
            for frame in read_frames(stream):
                yield {"offset": offset, "frame": frame.type.name, **self._describe(frame)}
                offset += HEADER_BYTES + len(frame.payload)
            if self._session is not None and self._session.state is not SessionState.COMPLETED:
                raise RemoteProtocolError(f"Stream ends in state {self._session.state.value}")
        except RemoteProtocolError as err:
            yield {"offset": offset, "error": str(err)}

    def _describe(self, frame: Frame) -> dict[str, Any]:
        if frame.type is FrameType.PAGES:
            return self._describe_batch(frame.payload)
        message = decode_message(frame.payload)
        if self._session is not None:
            self._session.receive(message)
        line = {"message": type(message).__name__, **self._plain(message)}
        if isinstance(message, StateSection):
            line["body"] = self._plain(section_state(message))
        return line

    def _describe_batch(self, payload: memoryview) -> dict[str, Any]:
        batch = parse_batch(payload)
        if self._session is not None:
            self._session.page_batch_received(batch)
        shown = batch.ranges[: 2 * self._max_ranges]
        return {
            "space_id": batch.space_id,
            "encoding": batch.encoding.name,
            "nr_ranges": len(batch.ranges) // 2,
            "nr_pages": batch.nr_pages,
            "nr_payload": batch.payload.nbytes,
            "ranges": [
                f"{start:#x}-{end:#x}" for start, end in zip(shown[0::2], shown[1::2], strict=True)
            ],
        }

    def _plain(self, value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return value.name if value.name else value.value
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return {name: self._plain(getattr(value, name)) for name in names}
        if isinstance(value, dict):
            return {str(key): self._plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._plain(item) for item in value]
        if isinstance(value, bytes):
            cut = value[: self._max_bytes].hex()
            return cut if len(value) <= self._max_bytes else f"{cut}... ({len(value)} bytes)"
        if isinstance(value, (str, int, float)) or value is None:
            return value
        return repr(value)


def read_frames(stream: BinaryIO) -> Iterator[Frame]:
    """Yield the frames of `stream`, reading no more than it must hold for one.

    :raises RemoteProtocolError: where they end making sense.
    """
    decoder = FrameDecoder()
    while data := stream.read(CHUNK_BYTES):
        decoder.receive_data(data)
        while (frame := decoder.next_frame()) is not None:
            yield frame
    decoder.end_of_stream()


def section_state(section: StateSection) -> object:
    """Return what the section holds: a schema object, or plain values where it cannot be read."""
    try:
        known = sections.decode_section(section)
    except RemoteProtocolError:
        known = None
    if known is not None:
        return known
    try:
        return decode_plain(section.body)
    except RemoteProtocolError:
        return section.body


def main(arguments: list[str] | None = None) -> int:
    """Decode the file named on the command line."""
    parser = argparse.ArgumentParser(
        description="Show captured protocol bytes, or an image file, as JSON lines."
    )
    parser.add_argument("file", help="captured bytes; - for standard input")
    parser.add_argument(
        "--check", action="store_true", help="also check that this is one whole recorded migration"
    )
    parser.add_argument("--bytes", type=int, default=64, help="bytes shown of a byte string")
    parser.add_argument("--ranges", type=int, default=8, help="ranges shown of a batch")
    options = parser.parse_args(arguments)
    state.load_all()
    session = Session(Role.DESTINATION, recorded=True) if options.check else None
    printer = StreamPrinter(session, options.bytes, options.ranges)
    failed = False
    stream = sys.stdin.buffer if options.file == "-" else open(options.file, "rb")
    with stream:
        for line in printer.lines(stream):
            print(json.dumps(line))
            failed = "error" in line
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
