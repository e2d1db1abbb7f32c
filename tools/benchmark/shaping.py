"""A slower link: tc in the network namespaces of both hosts, where the kernel has a queueing discipline for it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from tests.hosts import Host

BURST = "256kb"
"""Large enough for the segments that a veth pair hands over in one piece."""
LATENCY = "50ms"
"""So much may wait in the queue before packets are dropped."""


class NoShaping(Exception):
    """The kernel or the machine cannot do it; says why."""


def shape(hosts: Sequence[Host], rate: str) -> dict[str, str]:
    """Limit what each host sends, with a token bucket; `rate` as tc has it ("1gbit").

    :raises NoShaping: it cannot be done here.
    """
    for host in hosts:
        device = _device(host)
        argv = ["tc", "qdisc", "replace", "dev", device, "root", "tbf"]
        try:
            done = host.run([*argv, "rate", rate, "burst", BURST, "latency", LATENCY], check=False)
        except OSError as err:
            raise NoShaping(f"cannot run tc: {err}") from err
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().replace("\n", "; ")
            raise NoShaping(f"cannot limit {device} of {host.name} to {rate}: {reason}")
    return {"rate": rate, "discipline": "tbf", "burst": BURST, "latency": LATENCY}


def _device(host: Host) -> str:
    """The host's end of the veth pair."""
    listed = subprocess.run(
        host.command(["ip", "-brief", "link", "show", "type", "veth"]),
        stdin=subprocess.DEVNULL, capture_output=True, check=True, text=True,
    )  # fmt: skip
    return listed.stdout.split("@")[0].split()[0]
