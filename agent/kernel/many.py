"""One system call made for many things, such as a thousand descriptors, with none of our code run for each of them.

Must never decide anything: what a failed call means is up to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")


def try_each(call: Callable[..., ResultT], *columns: Iterable[Any]) -> list[ResultT | None]:
    """Return what ``call`` returns for each row of arguments, as map() does; None where it raises OSError."""
    results: list[ResultT | None] = []
    calls = map(call, *columns)
    while True:
        # A list that is extended by what then fails keeps what came before, and map() goes on with the next row.
        try:
            results.extend(calls)
            return results
        except OSError:
            results.append(None)
