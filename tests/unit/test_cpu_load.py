"""How many threads compute beside other programs."""

import os
import subprocess
import sys
from collections import namedtuple
from typing import Any

import psutil
import pytest

from common.system import cpu_load
from common.system.cpu_load import OtherPrograms, ThreadCount
from common.training.busy_cpu import BusyCpu
from tests.unit.bigram import Bigram
from tests.unit.test_loop import metrics, run

_Core = namedtuple("_Core", "user nice system irq softirq idle")
_Times = namedtuple("_Times", "user system")


class Machine:
    """Cores, a clock, and what others and this process compute on them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
        self.clock, self.others, self.own, self.allowed = 100.0, [0.0] * cores, 0.0, set(range(cores))
        monkeypatch.setattr(cpu_load.time, "monotonic", lambda: self.clock)
        monkeypatch.setattr(psutil, "cpu_times", self._cores)
        monkeypatch.setattr(cpu_load.os, "times", lambda: _Times(self.own, 0.0))
        monkeypatch.setattr(cpu_load.os, "sched_getaffinity", lambda _: self.allowed, raising=False)

    def _cores(self, percpu: bool) -> list[_Core]:
        assert percpu
        share = self.own / len(self.allowed)  # whatever this process computes stands in the system's count too
        mine = [share * (i in self.allowed) for i in range(len(self.others))]
        return [_Core(mine[i] + busy / 2, 0.0, busy / 2, 0.0, 0.0, 0.0) for i, busy in enumerate(self.others)]

    def passes(self, seconds: float, busy: float, own: float = 0.0, core: int = 0) -> None:
        """Others keep `busy` of core `core`, this process `own` cores."""
        self.clock += seconds
        self.others[core] += busy * seconds
        self.own += own * seconds


def test_other_programs_are_what_this_process_did_not_compute(monkeypatch):
    machine = Machine(monkeypatch, 4)
    others = OtherPrograms()
    machine.passes(2.0, busy=0.5, own=3.0)
    assert others.busy_cores() == pytest.approx(0.5)
    machine.passes(0.2, busy=1.0)
    assert others.busy_cores() is None  # too soon after the last
    machine.passes(0.8, busy=1.0)
    assert others.busy_cores() == pytest.approx(1.0)


def test_only_cores_that_this_process_may_use_count(monkeypatch):
    machine = Machine(monkeypatch, 4)
    machine.allowed = {2, 3}
    others = OtherPrograms()
    machine.passes(1.0, busy=1.0, own=2.0, core=0)
    assert (others.cores, others.busy_cores()) == (2, pytest.approx(0.0))
    machine.passes(1.0, busy=1.0, own=1.0, core=3)
    assert others.busy_cores() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("cores", "most", "busy", "threads"),
    [
        (2, 2, 0.1, 2),  # a desktop that does next to nothing
        (2, 2, 0.5, 1),  # a busy program that shares its core with one of our threads
        (2, 2, 1.0, 1),
        (2, 2, 2.0, 1),  # never none
        (8, 8, 1.0, 7),
        (8, 8, 3.1, 5),
        (16, 8, 3.0, 8),  # two threads a core: there is room
        (16, 8, 12.0, 4),
    ],
)
def test_no_thread_shares_a_core(monkeypatch, cores, most, busy, threads):
    machine = Machine(monkeypatch, cores)
    count = ThreadCount(most)
    machine.passes(1.0, busy=busy)
    assert (count.look(), count.now, count.most) == (threads, threads, most)


def test_threads_fall_at_once_and_return_after_five_quiet_seconds(monkeypatch):
    machine = Machine(monkeypatch, 2)
    count, seen = ThreadCount(2), []
    for busy in [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, *[0.0] * 6]:
        machine.passes(1.0, busy)
        seen.append(count.look())
    assert seen == [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the real count is tried on Linux")
def test_a_busy_program_is_seen_on_this_machine(monkeypatch):
    if not psutil.cpu_times().user:
        pytest.skip("this system counts no programs")
    core = min(os.sched_getaffinity(0))
    monkeypatch.setattr(cpu_load.os, "sched_getaffinity", lambda _: {core})
    others = OtherPrograms()
    spin = f"import os, time; os.sched_setaffinity(0, {{{core}}}); s = time.time()\nwhile time.time() < s + 1.5: pass"
    subprocess.run([sys.executable, "-c", spin], check=True, timeout=120)
    found = others.busy_cores()
    assert found is not None
    assert found > 0.2  # it shares the core with other tests


def test_fewer_threads_are_told_once_and_stand_in_the_metrics():
    said: list[str] = []
    observer: Any = type("Observer", (), {"say": lambda self, text: said.append(text)})()
    busy = BusyCpu(observer)
    lines: list[dict[str, int]] = []
    for threads in [(4, 4), (3, 4), (2, 4), (4, 4), None]:
        lines.append({})
        busy.note(lines[-1], threads)
    assert lines == [{"threads": 4}, {"threads": 3}, {"threads": 2}, {"threads": 4}, {}]
    assert said == ["other programs keep the CPU busy: 3 of 4 threads compute until they are done"]


def test_a_step_has_its_own_number_of_threads_on_record(tmp_path):
    class Adapting(Bigram):
        def cpu_threads(self) -> tuple[int, int]:
            return len(self.calls), 9  # the first step computes with one thread, the second with two

    run(tmp_path, Adapting(), valid=[])
    assert [line["threads"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_where_nothing_counts_programs_the_threads_stay(monkeypatch):
    machine = Machine(monkeypatch, 4)
    count = ThreadCount(4)

    def denied(percpu: bool) -> None:
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", denied)
    machine.clock += 1
    assert count.look() == 4
    assert OtherPrograms().busy_cores() is None


def test_cores_without_numbers_of_their_own_count_all_together(monkeypatch):
    """A container may list its own few cores under other numbers than the affinity has."""
    machine = Machine(monkeypatch, 2)
    monkeypatch.setattr(cpu_load.os, "sched_getaffinity", lambda _: {6, 7})
    machine.allowed = {0, 1}
    others = OtherPrograms()
    machine.passes(1.0, busy=0.7, own=1.0)
    assert others.busy_cores() == pytest.approx(0.7)
