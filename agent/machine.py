"""Which machines Ferry runs on."""

from __future__ import annotations

import os

from agent.errors import SetupError
from agent.kernel.arch import MACHINE, is_supported_machine


def require_machine() -> None:
    """Refuse a processor architecture that Ferry does not know, before anything is looked at.

    :raises SetupError: this is not an x86_64 machine.
    """
    if not is_supported_machine():
        raise SetupError(
            f"Cannot migrate on {os.uname().machine}: Ferry supports {MACHINE} only",
            hint="both hosts must be x86_64",
        )
