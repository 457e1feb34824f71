"""Several processes of this machine that train together, as a ring of MLX: what mlx.launch would start.

mlx.launch itself ends with status 0 whatever its ranks did (mlx 0.32), and spins where there is no standard input.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from common.errors import RankLost
from common.system.hardware import physical_cores
from common.system.signals import STOPS


def launch(count: int, command: list[str]) -> int:
    """Run the program in `count` processes; rank 0's exit status, 130 where the user stopped it.

    Raises RankLost where rank 0 was killed; of another it says so itself.
    """
    threads = str(max(1, physical_cores() // count))
    env = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads} | os.environ
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]))
        ranks = [
            subprocess.Popen(
                [sys.executable, *command],
                env=env | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                start_new_session=True,  # a signal comes once, from here
            )
            for rank in range(count)
        ]
        for number in STOPS:
            signal.signal(number, lambda number, frame: ranks[0].send_signal(number))
        first, *_ = [process.wait() for process in ranks]
    if first < 0:
        raise RankLost(signal.Signals(-first).name, f"rank 0 (process {ranks[0].pid})")
    return first


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
