"""What no longer stands under its path is refused by name: open files, mapped files, the program itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from agent.procfs.maps import parse_maps, read_maps
from agent.state.mm import check_exe
from agent.state.vma import LayoutDumper
from agent.types import Pid
from tests.kernel.files_support import live_child
from tests.kernel.support import wait_for


def test_open_files_that_were_replaced_or_renamed(tmp_path: Path) -> None:
    code = """
    def make(name):
        fd = os.open(name, os.O_RDWR | os.O_CREAT); os.write(fd, name.encode()); return fd
    os.dup2(make("replaced"), 50); os.close(make("other")); os.rename("other", "replaced")
    os.dup2(make("linked"), 51); os.link("linked", "second"); os.unlink("linked")
    os.dup2(make("hidden"), 52); os.link("hidden", "third"); os.unlink("hidden"); os.close(make("hidden"))
    os.dup2(make("renamed"), 53); os.rename("renamed", "new name")
    ready()
    """
    with live_child(tmp_path, code) as child:
        found = {obstacle.what.split(",")[-1].removeprefix("fd ").strip(): obstacle for obstacle in child.check()}
    kinds = {number: obstacle.kind for number, obstacle in found.items() if number in ("50", "51", "52", "53")}
    # A renamed file is found under its new name.
    assert kinds == {"50": "deleted file", "51": "unreachable file", "52": "unreachable file"}
    assert all(obstacle.hint for obstacle in found.values())


def test_mapped_files_that_were_replaced_or_deleted(tmp_path: Path) -> None:
    code = """
    import mmap
    kept = []
    for name in ("replaced", "deleted", "renamed"):
        with open(name, "w+b") as f:
            f.write(bytes(4096)); f.flush()
            kept.append(mmap.mmap(f.fileno(), 4096, mmap.MAP_PRIVATE))
    open("other", "w").close(); os.rename("other", "replaced"); os.unlink("deleted"); os.rename("renamed", "new")
    ready()
    """
    with live_child(tmp_path, code) as child:
        dumper = LayoutDumper(Pid(child.pid), lambda entry: 1)
        found = dumper.check(parse_maps(read_maps(child.pid)), {})
    names = sorted(Path(obstacle.what.split(" ", 1)[1].removesuffix(" (deleted)")).name for obstacle in found)
    assert names == ["deleted", "replaced"]
    assert all("deleted or replaced" in obstacle.detail and obstacle.hint for obstacle in found)


def test_a_program_that_was_replaced_or_deleted(tmp_path: Path) -> None:
    program = tmp_path / "program"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "1000"]) as process:
        try:
            wait_for(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(program), "the program to start")
            assert check_exe(Pid(process.pid)) == []
            shutil.copy("/bin/sleep", tmp_path / "upgrade")
            os.rename(tmp_path / "upgrade", program)
            (obstacle,) = check_exe(Pid(process.pid))
            assert obstacle.kind == "executable" and str(program) in obstacle.what
            program.unlink()
            assert [found.kind for found in check_exe(Pid(process.pid))] == ["executable"]
        finally:
            process.kill()
