"""Several processes of this machine that train together, started as torchrun starts them."""

import logging
import os
import signal
import sys

from common.errors import RankLost
from common.system.launch import share_cores
from common.system.process import rank_arguments
from common.system.signals import heeded

_GRACE = 300  # seconds in which a rank that is told to end may finish and save its step


def launch(count: int, command: list[str]) -> int:
    """Run the program in `count` processes; the exit status of the first that failed, 130 where the user stopped it."""
    import psutil
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable()  # the ranks say what happened
    os.environ.update(share_cores(count))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"twintune-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=",".join(number.name for number in heeded()),  # for rank 0, which stops
        shutdown_timeout=_GRACE,
    )
    try:
        elastic_launch(config, sys.executable)(*rank_arguments(command))
    except SignalException:
        for rank in psutil.Process().children():  # of a second Ctrl-C
            rank.kill()
        return 130
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        said = 0 in error.failures and error.failures[0].exitcode > 0  # by rank 0, of another rank
        if first.exitcode < 0 and not said:
            raise RankLost(signal.Signals(-first.exitcode).name, f"rank {rank} (process {first.pid})") from None
        return max(1, first.exitcode)
    return 0
