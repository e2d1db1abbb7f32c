"""Pure functions of the handshake: which version to speak, and whether two hosts can do it at all.

Version promise: within one protocol version, frames, messages and batches never change their
meaning; a field may be added only with a default. Anything else is a new version. State sections
have versions of their own (state/__init__.py), so that a new resource kind needs no new protocol.

This module must never read the host it runs on: both hosts' facts come in as arguments. Sources
for the processor flags: arch/x86/include/asm/cpufeatures.h, Intel SDM volume 2.
"""

from __future__ import annotations

from collections.abc import Iterable

from protocol.errors import RemoteProtocolError
from protocol.limits import PAGE_SIZE
from protocol.messages import HostFacts, WireObstacle

PROTOCOL_VERSION = 1
"""Newest version this build speaks, and writes into images."""

OLDEST_PROTOCOL_VERSION = 1
"""Oldest version this build speaks."""

# Flags of /proc/cpuinfo that promise an instruction to programs, which may have asked CPUID once
# and will go on using it. The many others describe the kernel's own affairs (pti, vmx, ibpb...)
# and differ between hosts that run the same programs equally well.
_INSTRUCTION_FLAGS = frozenset(
    """
    3dnow 3dnowext abm adx cldemote clflush clflushopt clwb clzero cmov cx16 cx8 enqcmd f16c fma
    fma4 fsgsbase fxsr gfni lahf_lm lwp mmx mmxext monitorx movbe movdir64b movdiri mpx ospke
    pclmulqdq pku pni popcnt prefetchi rdpid rdrand rdseed rdtscp rtm serialize syscall tbm tsc
    user_shstk vaes vpclmulqdq waitpkg xgetbv1 xop xsave xsavec xsaveopt
    """.split()
)
# Families that keep growing: a member newer than this list still counts.
_INSTRUCTION_PREFIXES = ("aes", "amx", "avx", "bmi", "sha", "sm3", "sm4", "sse", "ssse")


def choose_version(version_min: int, version_max: int) -> int:
    """Return the newest version both this build and a peer with that range speak.

    :raises RemoteProtocolError: when there is none.
    """
    version = min(version_max, PROTOCOL_VERSION)
    if version < max(version_min, OLDEST_PROTOCOL_VERSION):
        raise RemoteProtocolError(
            f"Peer speaks protocol versions {version_min} to {version_max}, "
            f"this side {OLDEST_PROTOCOL_VERSION} to {PROTOCOL_VERSION}"
        )
    return version


def explain_refusal(source: HostFacts, destination: HostFacts) -> list[WireObstacle]:
    """Return every reason why a process of `source` cannot run on `destination`; empty is good."""
    if source.machine != destination.machine:
        # Nothing below means anything between two architectures.
        return [
            WireObstacle(
                kind="machine",
                what=destination.hostname,
                detail=f"is {destination.machine}, the source is {source.machine}",
                hint="choose a destination of the same architecture",
            )
        ]
    return [
        *_page_size(source, destination),
        *_cpu(source, destination),
        *_xstate(source, destination),
        *_vdso(source, destination),
    ]


def _page_size(source: HostFacts, destination: HostFacts) -> Iterable[WireObstacle]:
    for host in (source, destination):
        if host.page_size != PAGE_SIZE:
            yield WireObstacle(
                kind="page-size",
                what=host.hostname,
                detail=f"has pages of {host.page_size} bytes, Ferry supports {PAGE_SIZE}",
                hint="boot a kernel with 4 KiB pages",
            )


def _cpu(source: HostFacts, destination: HostFacts) -> Iterable[WireObstacle]:
    missing = instruction_flags(source) - instruction_flags(destination)
    if missing:
        yield WireObstacle(
            kind="cpu",
            what=destination.hostname,
            detail=f"processor lacks {' '.join(sorted(missing))}",
            hint="choose a destination whose processor has all the source's instructions",
        )


def instruction_flags(host: HostFacts) -> frozenset[str]:
    """Return the processor flags of `host` that programs may depend on."""
    flags = frozenset(host.cpu_flags)
    if host.machine != "x86_64":
        return flags
    return frozenset(
        flag
        for flag in flags
        if flag in _INSTRUCTION_FLAGS or flag.startswith(_INSTRUCTION_PREFIXES)
    )


def _xstate(source: HostFacts, destination: HostFacts) -> Iterable[WireObstacle]:
    missing = source.xstate_mask & ~destination.xstate_mask
    same_mask = source.xstate_mask == destination.xstate_mask
    if missing:
        yield WireObstacle(
            kind="xstate",
            what=destination.hostname,
            detail=f"does not keep register states {missing:#x} of the source's "
            f"{source.xstate_mask:#x}",
            hint="choose a destination with the same processor features enabled",
        )
    elif destination.xstate_size < source.xstate_size or (
        same_mask and destination.xstate_size != source.xstate_size
    ):
        # The same states in another layout, as between two vendors (the offset of PKRU): signal
        # frames already on a stack could not be returned from.
        yield WireObstacle(
            kind="xstate",
            what=destination.hostname,
            detail=f"lays register state out in {destination.xstate_size} bytes, "
            f"the source in {source.xstate_size}",
            hint="choose a destination of the same processor vendor",
        )


def _vdso(source: HostFacts, destination: HostFacts) -> Iterable[WireObstacle]:
    if source.vdso_sha256 != destination.vdso_sha256:
        # Programs hold pointers into the vdso; another image has its functions elsewhere.
        yield WireObstacle(
            kind="vdso",
            what=destination.hostname,
            detail=f"kernel {destination.kernel_release} has another vdso than the source's "
            f"{source.kernel_release}",
            hint="run the same kernel build on both hosts",
        )
