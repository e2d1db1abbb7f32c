"""flake8, isort and mypy --strict find nothing; a failure shows what they print.

They read setup.cfg. Part of the suite so that one command, and one summary line, covers everything.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest

from tests.hosts import REPOSITORY
from tests.prerequisites import require

CODE = ["agent", "protocol", "tests", "tools"]
LINTERS = {
    "flake8": CODE,
    "isort": ["--check-only", "--diff", *CODE],
    "mypy": ["--strict"],
}


@pytest.mark.timeout(300)  # mypy without its cache, on a busy machine
@pytest.mark.parametrize("name", LINTERS)
def test_linter_finds_nothing(name: str) -> None:
    require(importlib.util.find_spec(name), f"{name} is not installed: pip install '.[test]'")
    done = subprocess.run(
        [sys.executable, "-m", name, *LINTERS[name]],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_no_machine_path_or_registry_is_named() -> None:
    # /proc/PID/root/ is no home directory.
    suspects = ["index" + "-url", "trusted" + "-host", "(?<![\\w}])/home" + "/", "(?<![\\w}])/root" + "/"]
    for folder in [*CODE, ".ci"]:
        for path in (REPOSITORY / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".hex":
                text = path.read_text(errors="replace")
                found = [word for word in suspects if re.search(word, text)]
                assert not found, f"{path} names {found}"
