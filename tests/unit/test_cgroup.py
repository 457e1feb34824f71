"""Limits of containers and jobs, read from a made-up /proc and made-up groups of both versions."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from common.commands.doctor import doctor
from common.errors import UserError
from common.llama_cpp.convert import quantize
from common.llama_cpp.install import LlamaCpp
from common.llama_cpp.server import Server, ServerOptions
from common.system import cgroup, hardware, memory
from common.system.cgroup import Limit, core_limit, memory_left, memory_limit
from tests.contexts import context

GB = 10**9
Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """`build(own, mounts, files)`: a machine of 64 GB and 32 cores. Returns the folder where groups are mounted.

    own: lines of /proc/self/cgroup. mounts: `(folder, root, kind and options)`. files: contents by path.
    """
    monkeypatch.setattr(cgroup, "PROC", tmp_path / "proc")
    available = SimpleNamespace(total=64 * GB, available=50 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)

    def make(own: str, mounts: list[tuple[str, str, str]], files: dict[str, str]) -> Path:
        groups = tmp_path / "groups"
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cgroup").write_text(own)
        lines = [
            f"{number} 23 0:2{number} {root} {groups / folder} rw,relatime shared:4 - {kind}\n"
            for number, (folder, root, kind) in enumerate(mounts, 30)
        ]
        (tmp_path / "proc" / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + "".join(lines))
        for name, text in files.items():
            (groups / name).parent.mkdir(parents=True, exist_ok=True)
            (groups / name).write_text(f"{text}\n")
        return groups

    return make


V2 = [("", "/", "cgroup2 cgroup2 rw")]
V1 = [
    ("memory", "/", "cgroup cgroup rw,memory"),
    ("cpu", "/", "cgroup cgroup rw,cpu,cpuacct"),
    ("unified", "/", "cgroup2 cgroup2 rw"),
]
V1_OWN = "4:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n0::/docker/a\n"
UNLIMITED = "9223372036854771712"


def test_a_machine_without_limits(build: Build) -> None:
    build("0::/user.slice\n", V2, {"user.slice/memory.max": "max", "user.slice/cpu.max": "max 100000"})
    assert (memory_limit(), memory_left(), core_limit()) == (None, None, None)
    assert (memory.total(), memory.available(), hardware.cores()) == (64 * GB, 50 * GB, 32)


def test_version_1_without_limits(build: Build) -> None:
    files = {"cpu/docker/a/cpu.cfs_quota_us": "-1", "cpu/docker/a/cpu.cfs_period_us": "100000"}
    build(V1_OWN, V1, files | {"memory/docker/a/memory.limit_in_bytes": UNLIMITED})
    assert (memory_limit(), memory_left(), core_limit()) == (None, None, None)


def test_a_machine_without_groups(build: Build) -> None:
    build("", [], {})
    assert (memory_limit(), memory_left(), core_limit()) == (None, None, None)


def test_the_smallest_limit_up_to_the_root_counts(build: Build) -> None:
    groups = build(
        "0::/kube/pod/container\n",
        V2,
        {
            "kube/pod/container/memory.max": "max",
            "kube/pod/container/cpu.max": "800000 100000",
            "kube/pod/memory.max": f"{8 * GB}",
            "kube/pod/memory.current": f"{6 * GB}",
            "kube/pod/memory.stat": f"anon {2 * GB}\ninactive_file {3 * GB}\nactive_file {1 * GB}",
            "kube/pod/cpu.max": "250000 100000",
            "kube/memory.max": f"{32 * GB}",
            "kube/memory.current": f"{31 * GB}",
        },
    )
    assert memory_limit() == Limit(8 * GB, groups / "kube/pod/memory.max")
    assert core_limit() == Limit(2.5, groups / "kube/pod/cpu.max")
    assert memory_left() == 1 * GB  # of the group above, whose other pods have taken the rest
    assert (memory.total(), memory.available(), hardware.cores()) == (8 * GB, 1 * GB, 3)


def test_files_in_the_page_cache_count_as_left(build: Build) -> None:
    files = {"memory.max": f"{8 * GB}", "memory.current": f"{7 * GB}"}
    build("0::/\n", V2, files | {"memory.stat": f"inactive_file {2 * GB}\nactive_file {3 * GB}"})
    assert memory_left() == 6 * GB


def test_the_limit_that_slows_down_counts_too(build: Build) -> None:
    groups = build("0::/job\n", V2, {"job/memory.max": f"{8 * GB}", "job/memory.high": f"{5 * GB}"})
    assert memory_limit() == Limit(5 * GB, groups / "job/memory.high")


def test_limits_of_version_1(build: Build) -> None:
    """The file names and the hierarchies of Docker and Slurm on older systems; the parent's files are summed."""
    groups = build(
        V1_OWN,
        V1,
        {
            "memory/docker/a/memory.limit_in_bytes": f"{4 * GB}",
            "memory/docker/a/memory.usage_in_bytes": f"{3 * GB}",
            "memory/docker/a/memory.stat": f"inactive_file 0\ntotal_inactive_file {GB}\ntotal_active_file {GB}",
            "memory/memory.limit_in_bytes": UNLIMITED,
            "cpu/docker/a/cpu.cfs_quota_us": "150000",
            "cpu/docker/a/cpu.cfs_period_us": "100000",
        },
    )
    assert memory_limit() == Limit(4 * GB, groups / "memory/docker/a/memory.limit_in_bytes")
    assert memory_left() == 3 * GB
    assert core_limit() == Limit(1.5, groups / "cpu/docker/a/cpu.cfs_quota_us")
    assert hardware.cores() == 2


@pytest.mark.parametrize(
    ("own", "root"),
    [
        ("0::/docker/a\n", "/docker/a"),  # only its own group is mounted
        ("0::/\n", "/"),  # it sees its own group as the root
        ("0::/docker/a\n", "/docker/b"),  # its path is not among what is mounted
        ("0::/../a\n", "/"),  # its group lies outside of what it may see
    ],
)
def test_a_container_sees_its_limit_at_the_mount(build: Build, own: str, root: str) -> None:
    groups = build(own, [("", root, "cgroup2 cgroup2 rw")], {"memory.max": f"{2 * GB}"})
    assert memory_limit() == Limit(2 * GB, groups / "memory.max")


def test_doctor_says_where_a_limit_comes_from(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    groups = build("0::/\n", V2, {"memory.max": f"{8 * GB}", "cpu.max": "150000 100000"})
    doctor(context("json"))
    said = capsys.readouterr().out
    assert f"8.00 GB (of the machine's 64.00 GB, by {groups / 'memory.max'}), 8.00 GB available" in said
    assert f"({groups / 'cpu.max'} allows 1.5)" in said


@pytest.mark.parametrize(
    ("files", "variable", "affinity", "threads"),
    [({"cpu.max": "150000 100000"}, "", 16, "2"), ({}, "3", 16, "3"), ({}, "", 4, "4"), ({}, "", 16, None)],
    ids=["quota", "OMP_NUM_THREADS", "affinity", "nothing"],
)
@pytest.mark.slow
def test_programs_of_llama_cpp_start_no_more_threads_than_are_allowed(
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    variable: str,
    affinity: int,
    threads: str | None,
) -> None:
    """They count the machine's cores. The stand-in writes down how it was called, and fails."""
    build("0::/\n", V2, files)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 16)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    program, calls = tmp_path / "program", tmp_path / "calls"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(calls)!r}, 'w').write(' '.join(sys.argv))\nexit(1)\n"
    )
    program.chmod(0o755)
    llama = LlamaCpp(tmp_path, program, program, "test", "1")
    with pytest.raises(UserError), Server(llama, tmp_path / "m.gguf", ServerOptions(timeout=60)):
        pass
    assert re.findall(r" -t (\d+)", calls.read_text()) == [threads] * bool(threads)
    with pytest.raises(UserError):
        quantize(tmp_path / "m.gguf", tmp_path / "out.gguf", "Q8_0", llama, lambda share, text: None)
    assert calls.read_text().split()[-1] == (threads or "Q8_0")
