"""How long agent-send takes to start: what one waits for before anything happens."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

from tests.hosts import REPOSITORY

AGENT_SEND = [sys.executable, "-m", "agent.cli.send"]


def compile_agents() -> None:
    """Leave the agents' bytecode where Python looks for it, as pip does: users never wait for the compiler.

    To be called before any agent starts; without it most of a start is compiling where PYTHONDONTWRITEBYTECODE is set.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "agent", "protocol"], cwd=REPOSITORY, check=True)


def measure_startup(runs: int) -> dict[str, Any]:
    """Seconds of `agent-send --help`, of `--check` of a small process, and of Python doing nothing (the floor)."""
    nothing = subprocess.DEVNULL  # and no pipe of ours, which could not be moved
    with subprocess.Popen(["sleep", "infinity"], stdin=nothing, stdout=nothing, stderr=nothing) as small:
        try:
            commands = {
                "python": [sys.executable, "-c", "pass"],
                "help": [*AGENT_SEND, "--help"],
                "check": [*AGENT_SEND, "--check", str(small.pid)],
            }
            # In turn, so that a busy moment does not hit one of them alone.
            taken: dict[str, list[float]] = {name: [] for name in commands}
            for _ in range(runs):
                for name, argv in commands.items():
                    taken[name].append(_seconds(argv))
        finally:
            small.kill()
    return {
        name: {"median_s": round(statistics.median(times), 4), "min_s": round(min(times), 4), "runs": runs}
        for name, times in taken.items()
    }


def _seconds(argv: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(
        argv, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=True
    )
    return time.monotonic() - began


def startup_text(startup: dict[str, Any]) -> str:
    names = {"python": "python -c pass", "help": "agent-send --help", "check": "agent-send --check"}
    return "start-up (median, fastest): " + "; ".join(
        f"{names[name]} {times['median_s'] * 1e3:.0f}, {times['min_s'] * 1e3:.0f} ms" for name, times in startup.items()
    )
