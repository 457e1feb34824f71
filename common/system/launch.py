"""Whether a launcher has started this process as one of several that train together."""

import os
import socket
from dataclasses import dataclass


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
