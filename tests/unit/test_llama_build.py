"""`llama build` and `llama clean` as processes that are killed, or meet: a stub of cmake writes down what happens."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common.llama_cpp import install
from tests import ROOT

# Its compiler is in a process group of its own, as Ninja's are, and goes on for a minute.
CMAKE = """
import os, subprocess, sys, time
if "--version" in sys.argv: print("cmake version 3.30.0")
elif "--build" in sys.argv:
    import psutil
    known = open(os.environ["SEEN"], "a+")
    known.seek(0)
    pids = map(int, known.read().split())
    running = [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    if running: open(os.environ["SEEN"] + ".overlap", "w").write(str(running))
    compiler = subprocess.Popen(["sleep", "60"], start_new_session=True)
    known.write(f"{os.getpid()}\\n{compiler.pid}\\n")
    known.flush()
    compiler.wait()
"""


class Builds:
    def __init__(self, folder: Path) -> None:
        caches = folder / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        self.seen, self.cache = folder / "seen", caches / "twintune"
        (self.cache / f"llama.cpp-{install.VERSION}" / "source").mkdir(parents=True)
        cmake = folder / "bin" / "cmake"
        cmake.parent.mkdir()
        cmake.write_text(f"#!{sys.executable}\n{CMAKE}")
        cmake.chmod(0o755)
        path = f"{cmake.parent}{os.pathsep}{os.environ['PATH']}"
        self.env = os.environ | {"HOME": str(folder), "PATH": path, "SEEN": str(self.seen)}
        self.env.pop("XDG_CACHE_HOME", None)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, action: str) -> "subprocess.Popen[str]":
        command = [sys.executable, str(ROOT / "cli.py"), "llama", action]
        pipe = subprocess.PIPE
        self.started.append(subprocess.Popen(command, env=self.env, stdout=pipe, stderr=subprocess.STDOUT, text=True))
        return self.started[-1]

    def pids(self) -> list[int]:
        return [int(line) for line in self.seen.read_text().split()] if self.seen.exists() else []


@pytest.fixture
def builds(tmp_path: Path) -> Iterator[Builds]:
    found = Builds(tmp_path)
    yield found
    for process in found.started:
        process.kill()
        process.communicate()


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_build_takes_its_compilers_along_before_another_begins(builds: Builds) -> None:
    first = builds.start("build")
    wait_for(lambda: len(builds.pids()) == 2)
    second, clean = builds.start("build"), builds.start("clean")
    out, _ = clean.communicate(timeout=60)
    assert (clean.returncode, "is being built by another process" in out) == (1, True), out
    time.sleep(0.5)  # the second one waits
    first.kill()
    wait_for(lambda: len(builds.pids()) == 4)
    assert not builds.seen.with_name("seen.overlap").exists()
    assert [runs(pid) for pid in builds.pids()] == [False, False, True, True]
    second.kill()
    wait_for(lambda: not any(map(runs, builds.pids())), 20)
    clean = builds.start("clean")
    out, _ = clean.communicate(timeout=60)
    assert (clean.returncode, f"removed llama.cpp-{install.VERSION}" in out) == (0, True), out
    assert [path.name for path in builds.cache.iterdir()] == ["locks"]
