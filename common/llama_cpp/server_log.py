"""A log with an end: of what a server prints, the newest is kept."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from common.errors import UserError

LOG_BYTES = 5_000_000


@contextmanager
def bounded_log(log: Path | None) -> Iterator[Callable[[str], None]]:
    """What adds a line to the log, to nothing where it is None. Raises UserError where it cannot be opened.

    A log that has LOG_BYTES becomes `<log>.1`, in place of the one before.
    """
    if log is None:
        yield lambda line: None
        return
    try:
        handler = RotatingFileHandler(log, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--log {log} cannot be written: {error.strerror}.", "Give another file.") from None
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk stops no server
    try:
        yield lambda line: handler.emit(logging.makeLogRecord({"msg": line.encode("utf-8", "replace").decode()}))
    finally:
        handler.close()
