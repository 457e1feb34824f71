"""Whether a launcher has started this process as one of several that train together."""

import os
import socket
from dataclasses import dataclass

from common.system.hardware import physical_cores

_SHARED = "TWINTUNE_SHARED_CORES"  # names the variables that hold a rank to its share


def share_cores(count: int) -> dict[str, str]:
    """The environment that holds each of `count` ranks to its share of the cores, unless the user has set it."""
    share = str(max(1, physical_cores() // count))
    wanted = {name: share for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ}
    return wanted | {_SHARED: " ".join(wanted)}


def free_cores() -> None:
    """Programs that this rank starts, now that the others have ended, may take all cores."""
    for name in os.environ.pop(_SHARED, "").split():
        os.environ.pop(name, None)


@dataclass(frozen=True)
class Launch:
    """by: the backend whose launcher it is: torch for torchrun, mlx for mlx.launch. local_rank: on this machine.

    name: the same after torchrun has restarted rank 0, so many times.
    """

    by: str
    rank: int
    local_rank: int
    name: str
    restarts: int = 0


def launched() -> Launch | None:
    """What the launcher says in the environment; None where there was none."""
    env = os.environ
    if run_id := env.get("TORCHELASTIC_RUN_ID"):
        name = run_id if run_id != "none" else f"{socket.gethostname()} {os.getppid()}"
        return Launch("torch", int(env["RANK"]), int(env["LOCAL_RANK"]), name, int(env["TORCHELASTIC_RESTART_COUNT"]))
    if "MLX_RANK" in env:
        return Launch("mlx", int(env["MLX_RANK"]), 0, "")
    return None
