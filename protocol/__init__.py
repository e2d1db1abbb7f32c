"""Ferry's migration protocol: bytes in, events out.

No sockets, threads, clocks or Linux in here; the agent brings those. One connection carries one
migration; a checkpoint image is the same byte stream in a file, the source's half of it.

The stream is a sequence of frames (framing.py). A CONTROL frame is one message (messages.py,
fields by codec.py), a PAGES frame one batch of page contents (pages.py). All numbers outside
messages are little-endian; numeric zero is never a valid tag. Which may come when is one table in
session.py; how large anything may be is limits.py.

Sequence
========

    source                                          destination          state on both sides
      |                                                  |               IDLE
      |-- Hello (versions, session, host) -------------->|               NEGOTIATING
      |<------------- Accept (version, host, options) ---|               SETUP
      |-- StateSection * (what is known before) -------->|
      |-- Prepare -------------------------------------->|               PREPARING
      |                                     preflight    |
      |<------------------------ Prepared (obstacles) ---|               ACTIVE, or FAILED
      |                                                  |
      |-- RoundBegin 0 --------------------------------->|               ROUND
      |-- page batches, StateSection * ----------------->|
      |-- RoundEnd 0 (totals) -------------------------->|               PLACING
      |<------------------------------ RoundPlaced 0 ----|               ACTIVE
      |   ... rounds 1..n while the target runs ...      |
      |-- StateSection "pre_dump", "pre_files" --------->|               threads, files made ahead
      |   ... one more round, right before the freeze ...|
      |                                                  |
      |-- Switchover ----------------------------------->|               SWITCHOVER
      |   ... if the target writes a lot one more round, |
      |       for whose RoundPlaced nobody waits ...     |               FINAL_ROUND, SWITCHOVER
      |-- StateSection "threads_ahead" (idle ones) ----->|               "kept_threads" names those that count
      |   all threads stopped                            |
      |-- StateSection * (the final ones) -------------->|
      |-- StateSection "files" or "files_change" ------->|               restore of all but memory
      |-- RoundBegin n+1, batches, RoundEnd ------------>|               FINAL_ROUND, SWITCHOVER
      |-- StateEnd (nr_sections, digest) --------------->|               RESTORING
      |                                     restore      |
      |<---------------------------- Restored (digest) --|               RESTORED
      |   hold that outlives the agent                   |
      |-- Commit --------------- POINT OF NO RETURN ---->|               COMMITTED
      |                                     release      |
      |<-------------------------------- Resumed (pid) --|               COMPLETED
      |   kill the original                              |

Abort ends it from either side at any time before Commit (FAILED). Losing the link does the same,
except after Commit: UNDECIDED. Then, on a new connection: Resolve -> / <- Resolution.

After Commit the destination alone may still send Abort, and the source then goes on: one that was
on its way already, or one that says that the copy could not be taken over after all. Of the latter
it must first make certain that no copy can run: its record of the session says "aborted", for good
and durably, and the copy is ended. A destination that has recorded "committed", or cannot tell what
it has recorded, never sends it.

A recorded stream (an image) has the left column only. Every answer counts as given when it is due.

Messages
========

    tag  message                direction     legal in
     1   Hello                  ->            IDLE
     2   Accept                 <-            NEGOTIATING
     3   StateSection           ->            SETUP, ACTIVE, ROUND, SWITCHOVER, FINAL_ROUND
     4   Prepare                ->            SETUP
     5   Prepared               <-            PREPARING
     6   RoundBegin             ->            ACTIVE, SWITCHOVER
     7   RoundEnd               ->            ROUND, FINAL_ROUND
     8   Switchover             ->            ACTIVE
     9   StateEnd               ->            SWITCHOVER
    10   Restored               <-            RESTORING
    11   Commit                 ->            RESTORED
    12   Resumed                <-            COMMITTED
    13   Abort                  <->           up to RESTORED; only <- in COMMITTED
    14   Resolve                ->            IDLE
    15   Resolution             <-            RESOLVING
    16   ChannelAnnouncement    ->            first on every further connection (channel.py)
    17   RoundPlaced            <-            PLACING

Version promise
===============

Within one protocol version nothing changes its meaning: not a tag, a field, an encoding or the
order of messages. A field may be added when its default means what its absence meant; the golden
bytes in tests/protocol/vectors hold us to it. Everything else takes a new version, and a build
speaks every version between OLDEST_PROTOCOL_VERSION and PROTOCOL_VERSION. The source offers its
range in Hello, the destination chooses in Accept. State sections are versioned on their own, kind
by kind (state/__init__.py): a new resource kind or field does not need a new protocol version, and
a destination that does not know a required kind refuses by its name. An image is read by every
build that speaks its version.

Failure
=======

From received bytes, whatever they are, only RemoteProtocolError comes out. What this side does
wrong is LocalProtocolError, raised before anything is sent.

Glossary
========

    absent          a page that has no contents at the source; the destination drops what it held
    batch           ranges of pages of one space and, where they have contents, those contents
    commit          the decision that the copy is the process; taken once, by the source
    destination     the side that ends up with the process
    digest          hash of all memory, to compare both copies (--verify)
    frame           header, type and payload: the unit of the byte stream
    image           a recorded migration in a file
    kind            what a state section describes: "mm", "files", "pipe"
    obstacle        one reason why a process cannot be moved, with a hint
    owner           the process or shared object a section belongs to
    preflight       the destination's look at what it could not restore, before any page is sent
    round           one pass over what changed since the pass before
    section         the state of one resource, versioned, encoded by its schema
    session         one migration, from Hello to its end, named by a UUID
    source          the side that has the process at first
    space           what page ranges are offsets into: a process's memory or a shared object
    switchover      the source is stopped for the last time; what follows is downtime
    totals          what RoundEnd says was sent, compared with what arrived
    undecided       the link died between Commit and Resumed; both copies stay frozen
"""
