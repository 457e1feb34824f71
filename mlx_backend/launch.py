"""Several processes of this machine that train together, as a ring of MLX: what mlx.launch would start.

mlx.launch itself ends with status 0 whatever its ranks did (mlx 0.32), and spins where there is no standard input.
"""

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import RankLost
from common.system.launch import share_cores
from common.system.process import rank_arguments
from common.system.signals import heeded

_GRACE, _POLL = 30.0, 0.1  # seconds


def launch(count: int, command: list[str]) -> int:
    """Run the program in `count` processes; rank 0's exit status, 130 where the user stopped it.

    Raises RankLost where rank 0 was killed; of another it says so itself.
    """
    env = os.environ | share_cores(count)
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
        ranks: list[subprocess.Popen] = []

        def forward(number: int, frame: object) -> None:
            """A signal comes once, from here: each rank has a session of its own."""
            for rank in ranks[:1]:
                rank.send_signal(number)

        for number in heeded():
            signal.signal(number, forward)
        try:
            for rank in range(count):
                place = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
                guarded = [sys.executable, *rank_arguments(command)]
                ranks.append(subprocess.Popen(guarded, env=env | place, start_new_session=True))
            return _wait(ranks)
        finally:
            for process in ranks:
                process.kill()  # nothing where it has ended
                process.wait()


def _wait(ranks: Sequence[subprocess.Popen]) -> int:
    """Rank 0's exit status. Where another fails, rank 0 has some time to say so: before all have joined it cannot."""
    failed_at = math.inf
    while (first := ranks[0].poll()) is None and time.monotonic() < failed_at + _GRACE:
        if any(rank.poll() for rank in ranks[1:]):
            failed_at = min(failed_at, time.monotonic())
        time.sleep(_POLL)
    if first is not None and first >= 0:
        return first
    number = next(number for number, rank in enumerate(ranks) if rank.poll())
    status = ranks[number].returncode
    reason = signal.Signals(-status).name if status < 0 else f"status {status}"
    raise RankLost(reason, f"rank {number} (process {ranks[number].pid})")


def _free_ports(count: int) -> range:
    """So many ports in a row that nobody listens on."""
    while True:
        first = random.randrange(20_000, 60_000)  # noqa: S311
        if all(map(_is_free, range(first, first + count))):
            return range(first, first + count)


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
