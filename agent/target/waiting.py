"""Waiting for threads of the target: how, and what to do instead.

A stop of a thread takes some ten microseconds, on a busy host many more. Meanwhile the agent does Errands, small steps
of work that have to be done anyway; only when there are none left it looks again and again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Final, final

_SPIN_S: Final = 0.00001
"""How long to wait by yielding the CPU, before sleeping between looks: an urgent agent yields to nobody, and
the very thread it waits for may need its CPU."""
_SHORT_PAUSE_S: Final = 0.00002
_LONG_PAUSE_S: Final = 0.0002
PATIENT_S: Final = 0.002
"""After so long, looks may be farther apart."""


def pause(waited_s: float) -> None:
    """Let others run between two looks at something that has been waited for so long."""
    if waited_s < _SPIN_S:
        os.sched_yield()
    else:
        time.sleep(_SHORT_PAUSE_S if waited_s < PATIENT_S else _LONG_PAUSE_S)


@final
class Errands:
    """Steps of work, done one at a time; what one of them raises is kept until finish(), and ends them."""

    def __init__(self, steps: Iterable[object] = ()) -> None:
        self._steps = iter(steps)
        self._error: Exception | None = None

    def step(self) -> bool:
        """Do one; False when there is none left."""
        if self._error is not None:
            return False
        try:
            next(self._steps)
        except StopIteration:
            return False
        except Exception as err:
            self._error = err
            return False
        return True

    def finish(self) -> None:
        """Do all that are left.

        :raises Exception: what a step has raised.
        """
        while self.step():
            pass
        if self._error is not None:
            raise self._error
