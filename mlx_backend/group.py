"""The ranks that train together, over mx.distributed: what `mlx.launch` has started, on a ring of sockets or JACCL."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from common.errors import RankLost

_MOST = 2**28  # bytes that are sent at once; MLX counts an array's in 31 bits


class MlxGroup:
    """See `common.backend_package.Group`."""

    def __init__(self) -> None:
        with _lost():
            joined = mx.distributed.init()
        self.rank, self.size = joined.rank(), joined.size()

    def broadcast(self, data: bytes | None) -> bytes:
        size = int(self.gather(np.array([len(data or b"")]))[0][0])
        content = np.frombuffer(data, np.uint8) if data else np.zeros(size, np.uint8)
        with _lost():
            parts = [content[start : start + _MOST] for start in range(0, size, _MOST)]
            return b"".join(_written(mx.distributed.all_sum(mx.array(part), stream=mx.cpu)).tobytes() for part in parts)

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        sent = np.frombuffer(array.tobytes(), np.uint8)  # MLX's arrays have no float64
        with _lost():
            found = _written(mx.distributed.all_gather(mx.array(sent)[None], stream=mx.cpu))
        return [np.frombuffer(row.tobytes(), array.dtype).reshape(array.shape) for row in found]

    def close(self) -> None:
        """The sockets close with the process."""


def sum_over_ranks(arrays: Sequence[mx.array]) -> list[mx.array]:
    """Of each the sum over the ranks."""
    with _lost():
        found = [mx.distributed.all_sum(array, stream=mx.cpu) for array in arrays]
        mx.eval(found)
    return found


def _written(array: mx.array) -> np.ndarray:
    mx.eval(array)
    return np.array(array)


@contextmanager
def _lost() -> Iterator[None]:
    """RankLost for what MLX raises where a process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(str(error).splitlines()[0]) from None
